from pathlib import Path

import pytest
import torch

from graftune.errors import SettingsError
from graftune.tasks import run
from graftune.tasks.models import load_base
from graftune.tasks.probe import sentence_vectors
from graftune.tasks.settings import RunSettings
from graftune.tasks.task import Ready, find_task
from tests.tasks import tiny


def test_vectors_are_means_over_the_texts_own_tokens(tmp_path: Path) -> None:
    base = load_base(str(tiny.bert(tmp_path)), "feature")
    ready = Ready(base.model, base.tokenizer, [], 40)
    task = find_task("classification")
    texts = ["hello good day you can", "hello"]
    found = sentence_vectors(task, ready, [task.question(text, "row") for text in texts])
    for text, vector in zip(texts, found, strict=True):
        with torch.no_grad():
            states = base.model(**base.tokenizer(text, return_tensors="pt")).last_hidden_state
        assert torch.allclose(vector, states[0].mean(dim=0), atol=1e-6)


def test_a_task_without_labels_has_no_probe() -> None:
    with pytest.raises(SettingsError, match="needs labels; the task instruct has none"):
        run.linear_probe(RunSettings(base="b", task="instruct", data="x.csv"))
