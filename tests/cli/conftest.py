"""A tiny base model and tiny rows, made once, and a way to run the command line on them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

LABELS = {"parcel": "where is my parcel", "refund": "i want my money", "noise": "it hums at night"}
FILLERS = [
    "please",
    "today",
    "now",
    "again",
    "really",
    "still",
    "hello",
    "sorry",
    "why",
    "again now",
]


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture(scope="session")
def graftune():
    """Runs the command line in this process: `graftune("train", "--help")`."""
    from graftune.cli.app import app

    def run(*arguments: object, stdin: str = "") -> Ended:
        words = [str(word) for word in arguments]
        result = CliRunner().invoke(app, words, prog_name="graftune", input=stdin)
        return Ended(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture(scope="session")
def rows(tmp_path_factory) -> Path:
    """Ninety distinct rows of three labels, as JSONL."""
    path = tmp_path_factory.mktemp("rows") / "mail.jsonl"
    texts = [
        {"text": f"{first} {text} {last}", "label": label}
        for label, text in LABELS.items()
        for first in FILLERS
        for last in FILLERS[:3]
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in texts))
    return path


@pytest.fixture(scope="session")
def base(tmp_path_factory, rows) -> Path:
    """A BERT of two layers with a word-level tokenizer, as a folder."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = sorted({word for line in rows.read_text().splitlines()
                    for word in json.loads(line)["text"].split()})  # fmt: skip
    vocabulary = {word: index for index, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=64,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("base") / "tiny-bert"
    BertModel(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]", model_max_length=64,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory, graftune, base, rows) -> tuple[Path, Ended]:
    """A run's directory and how `graftune train` ended there."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    ended = graftune(
        "train", "--base", base, "--data", rows, "--method", "lora", "--r", 4,
        "--epochs", 2, "--lr", 0.01, "--out", out, "--name", "tiny",
    )  # fmt: skip
    return out, ended
