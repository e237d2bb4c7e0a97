from pathlib import Path
from typing import Any

import pytest

from graftune.errors import SettingsError
from graftune.tasks.models import load_base
from graftune.tasks.resolving import length_limit, method_of, resolved
from graftune.tasks.settings import RunSettings
from graftune.tasks.task import find_task
from tests.tasks import tiny


def settings(**values: Any) -> RunSettings:
    return RunSettings(**{"base": "b", "data": "x.csv", **values})


def whole(made: RunSettings) -> RunSettings:
    return resolved(made, find_task(made.task), method_of(made.method))


@pytest.mark.parametrize(
    ("name", "method"),
    [("lora", "LoRA"), ("LoRA", "LoRA"), ("full", "FullFineTuning"), ("bit-fit", "BitFit")],
)
def test_methods_are_found_in_any_spelling(name: str, method: str) -> None:
    assert method_of({"name": name}).name == method


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"name": "loar"}, 'No method is named "loar".*Did you mean "LoRA"'),
        ({"name": "lora", "rank": 8}, 'LoRA has no setting "rank"'),
        ({"name": "lora", "r": 0}, "r is 0"),
    ],
)
def test_wrong_methods_are_told(method: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        method_of(method)


def test_defaults_are_filled_in_once() -> None:
    made = whole(settings(method="full"))
    assert (made.train.lr, made.train.epochs, made.train.batch_size) == (5e-5, 10, 16)
    assert (made.train.metric, made.name) == ("accuracy", "classification-full")
    assert whole(made) == made


def test_what_is_given_stays() -> None:
    made = whole(settings(train={"steps": 5, "lr": 0.1, "batch_size": 2}, name="mine"))
    assert (made.train.epochs, made.train.steps, made.train.lr) == (None, 5, 0.1)
    assert (made.train.batch_size, made.name, made.out) == (2, "mine", "runs/mine")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"task": "instrct"}, 'No task is named "instrct".*Did you mean "instruct"'),
        ({"train": {"metric": "acuracy"}}, 'classification has.*Did you mean "accuracy"'),
        ({"data": {"train": "x", "columns": {"answer": "a"}}}, "data.columns.answer"),
        ({"train": {"optimizer": "adafctor"}}, 'transformers doesn.*Did you mean "adafactor"'),
        ({"train": {"save_every": 10}}, "multiple of train.eval_every, which is each epoch"),
        ({"train": {"save_every": 10, "eval_every": 4}}, "which is 4"),
        ({"train": {"early_stop": 2, "select": "last"}}, "needs train.select: best"),
        ({"train": {"early_stop": 2, "save_every": 0}}, "needs train.select: best"),
    ],
)
def test_settings_that_do_not_go_together_are_told(values: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        whole(settings(**values))


def test_without_checkpoints_the_last_weights_are_kept() -> None:
    assert whole(settings(train={"save_every": 0})).train.select == "last"


def test_length_is_the_models_limit_unless_less_is_asked(tmp_path: Path) -> None:
    base = load_base(str(tiny.bert(tmp_path)), labels=["a", "b"])
    task = find_task("classification")
    assert length_limit(settings(), task, base.model, base.tokenizer) == 40
    asked = settings(data={"train": "x", "max_length": 12})
    assert length_limit(asked, task, base.model, base.tokenizer) == 12
    asked = settings(data={"train": "x", "max_length": 64})
    with pytest.raises(SettingsError, match="max_length is 64, but b takes at most 40 tokens"):
        length_limit(asked, task, base.model, base.tokenizer)


def test_positions_kept_for_padding_do_not_count(tmp_path: Path) -> None:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        intermediate_size=8, max_position_embeddings=34, pad_token_id=1,
    )  # fmt: skip
    base = load_base(str(tiny.bert(tmp_path)), labels=["a", "b"])
    model = RobertaForSequenceClassification(config)
    assert length_limit(settings(), find_task("classification"), model, base.tokenizer) == 32


def test_loggers_that_are_unknown_or_not_installed_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers.integrations import integration_utils

    monkeypatch.setattr(
        integration_utils, "get_available_reporting_integrations", lambda: ["mlflow"]
    )
    with pytest.raises(SettingsError, match='Did you mean "tensorboard"'):
        whole(settings(train={"report_to": "tensorbord"}))
    with pytest.raises(SettingsError, match="whose package isn't installed"):
        whole(settings(train={"report_to": ["mlflow", "tensorboard"]}))
    assert whole(settings(train={"report_to": "mlflow"})).train.report_to == ("mlflow",)
