"""The whole job with graftune: `python -m benchmarks.job_ours FOLDER SEED`."""

from __future__ import annotations

import json
import sys
import time

import graftune as gt
from benchmarks import job_data
from graftune.tasks.models import load_base
from graftune.training import training_args


def main(folder: str, seed: int) -> None:
    labels = job_data.labels()
    base = load_base("demo:minilm", "classification", labels=labels, seed=seed)

    def encoded(split: str) -> list[dict[str, object]]:
        found = job_data.rows(split)
        tokens = base.tokenizer([row["text"] for row in found], truncation=True)
        return [
            {"input_ids": ids, "labels": labels.index(row["label"])}
            for ids, row in zip(tokens["input_ids"], found, strict=True)
        ]

    adapter = gt.attach(base.model, gt.LoRA(r=job_data.RANK), seed=seed)
    args = training_args(
        folder,
        num_train_epochs=job_data.EPOCHS,
        per_device_train_batch_size=job_data.BATCH,
        learning_rate=job_data.RATE,
        seed=seed,
        disable_tqdm=True,
    )
    trainer = gt.Trainer(model=base.model, args=args, train_dataset=encoded("train"))
    trainer.train()
    adapter.save(f"{folder}/adapter")
    seconds = time.process_time()
    found = trainer.predict(encoded("test"))
    accuracy = (found.predictions.argmax(-1) == found.label_ids).mean()
    print(json.dumps({"seconds": seconds, "accuracy": float(accuracy)}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
