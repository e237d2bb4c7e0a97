"""Prompts under the commands of adapters: whole runs on tiny models, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from graftune.errors import DataError, FormatError, SettingsError
from graftune.tasks import run
from graftune.tasks.classification import Classification
from graftune.tasks.in_context import Demonstrations, InContext, in_context_of, template_of
from graftune.tasks.in_context_run import InContextRun
from graftune.tasks.models import base_config, load_base
from graftune.tasks.ranking import RankedPrompt
from graftune.tasks.result import RunResult, Silent
from graftune.tasks.settings import RunSettings
from graftune.tasks.task import Ready
from tests.tasks import tiny

COLUMNS = {"text": "text", "label": "label"}
ROWS = [
    {"text": "i want my parcel", "answer": "delivery"},
    {"text": "money back please", "answer": "refund"},
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bases")
    makers = {"llama": tiny.llama, "t5": tiny.t5, "bert": tiny.masked_bert}
    tiny.write_jsonl(folder / "mail.jsonl", tiny.mail(60))
    made = {name: str(maker(folder / name)) for name, maker in makers.items()}
    return {**made, "data": str(folder / "mail.jsonl")}


def settings(bases: dict[str, str], out: Path, base: str = "llama", **values: Any) -> RunSettings:
    method = {"name": "in-context", "shots": 4, **values.pop("method", {})}
    data = {"train": bases["data"], **values.pop("data", {})}
    return RunSettings(base=bases[base], data=data, method=method, out=str(out), **values)


def prompt(
    bases: dict[str, str], base: str = "llama", rows: Any = ROWS, room: int = 128, **method: Any
) -> RankedPrompt:
    chosen = InContext(**method)
    template = template_of(chosen, base, base_config(bases[base]), COLUMNS)
    found = load_base(bases[base], "masked-lm" if template.has("mask") else "lm")
    ready = Ready(found.model, found.tokenizer, ["delivery", "refund"], room)
    return RankedPrompt(chosen, template, ready, Demonstrations(list(rows)), room)


def ask(made: RankedPrompt, *texts: str, batch_size: int = 4) -> list[dict[str, Any]]:
    questions = [Classification().question(text, f"row {n}") for n, text in enumerate(texts)]
    return made.answers(questions, batch_size=batch_size)


# What a prompt says


@pytest.mark.parametrize(
    ("method", "before", "question"),
    [
        (
            {},
            "Text: i want my parcel\nLabel: delivery\n\nText: money back please\nLabel: refund\n\n",
            "Text: hello\nLabel:",
        ),
        (
            {"template": "{text} so {label}.", "separator": "\n", "instruction": "say what"},
            "say what\ni want my parcel so delivery.\nmoney back please so refund.\n",
            "hello so",
        ),
        (
            {"words": {"refund": ["money", "back"]}, "template": "{text} is", "separator": " "},
            "i want my parcel is delivery money back please is money ",
            "hello is",
        ),
        ({"format": "labels-only"}, "delivery\n\nrefund\n\n", "Text: hello\nLabel:"),
        (
            {"format": "inputs-only"},
            "i want my parcel\n\nmoney back please\n\n",
            "Text: hello\nLabel:",
        ),
    ],
)
def test_the_prompts_text(
    method: dict[str, Any], before: str, question: str, bases: dict[str, str]
) -> None:
    made = prompt(bases, **method).text
    assert made.before(ROWS) == before
    assert made.question({"text": "hello"}) == question


def test_a_masked_models_prompt_has_a_mask(bases: dict[str, str]) -> None:
    made = prompt(bases, "bert", template="{text} : {mask} .").text
    assert made.demonstration(ROWS[1]) == "money back please : refund ."
    assert made.question({"text": "hello"}) == "hello : [MASK] ."


def test_pairs_are_written_below_each_other(bases: dict[str, str]) -> None:
    columns = {"text": "premise", "text_pair": "hypothesis", "label": "label"}
    found = template_of(InContext(), "base", base_config(bases["llama"]), columns)
    assert found.text == "Text: {text}\n{text_pair}\nLabel: {label}"


# What a prompt answers


def whole(made: RankedPrompt, text: str) -> torch.Tensor:
    """The mean log-probability of each label, every sequence by itself."""
    tokenizer, model = made.ready.tokenizer, made.ready.model
    start = tokenizer(made.text.before(made.shown.rows) + f"Text: {text}\nLabel:")["input_ids"]
    found = []
    for label in ("delivery", "refund"):
        word = tokenizer(label)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([[*start, *word]])).logits[0, len(start) - 1 : -1]
        chances = torch.log_softmax(logits, dim=-1)
        found.append(chances[range(len(word)), word].mean())
    return torch.stack(found)


@pytest.mark.parametrize("share", [True, False])
def test_the_likeliest_label_answers(share: bool, bases: dict[str, str]) -> None:
    made = prompt(bases, share=share)
    texts = ["hello good day", "my refund please", "now"]
    for text, found in zip(texts, ask(made, *texts), strict=True):
        chances = torch.softmax(whole(made, text), dim=-1)
        torch.testing.assert_close(
            torch.tensor(list(found["probabilities"].values())), chances, atol=1e-5, rtol=0
        )
        assert found["label"] == ["delivery", "refund"][int(chances.argmax())]


def test_sharing_runs_fewer_tokens(bases: dict[str, str]) -> None:
    shared, alone = prompt(bases), prompt(bases, share=False)
    texts = ["hello good day", "my refund please", "now"]
    assert ask(shared, *texts)[0]["text"] == ask(alone, *texts)[0]["text"]
    assert shared.costs.tokens_alone == alone.costs.tokens_alone == alone.costs.tokens
    assert shared.costs.start_tokens + shared.costs.tokens < alone.costs.tokens / 3
    assert shared.costs.rows == alone.costs.rows == 3
    assert alone.costs.start_tokens == 0


@pytest.mark.parametrize("combine", ["mean", "sum", "logsumexp"])
def test_a_label_of_several_words_is_scored_by_all(combine: str, bases: dict[str, str]) -> None:
    words = {"refund": ["money", "back"]}
    made = prompt(bases, words=words, combine=combine)
    found = list(ask(made, "hello")[0]["probabilities"].values())
    tokenizer = made.ready.tokenizer
    ids = tokenizer(made.text.before(ROWS) + "Text: hello\nLabel:", return_tensors="pt")
    with torch.no_grad():
        chances = torch.log_softmax(made.ready.model(ids["input_ids"]).logits[0, -1], dim=-1)
    delivery, *both = chances[tokenizer.convert_tokens_to_ids(["delivery", "money", "back"])]
    total = torch.stack(both)
    refund = {"mean": total.mean(), "sum": total.sum(), "logsumexp": total.logsumexp(0)}[combine]
    expected = torch.softmax(torch.stack([delivery, refund]), dim=-1)
    assert torch.allclose(torch.tensor(found), expected, atol=1e-5)


@pytest.mark.parametrize("normalised", [True, False])
def test_words_of_several_tokens(normalised: bool, bases: dict[str, str]) -> None:
    made = prompt(bases, words={"refund": "money back please"}, length_normalised=normalised)
    assert len(made.word("money back please")) == 3
    found = ask(made, "hello")[0]["probabilities"]
    tokenizer = made.ready.tokenizer
    start = tokenizer(made.text.before(ROWS) + "Text: hello\nLabel:")["input_ids"]
    scores = []
    for said in ("delivery", "money back please"):
        word = tokenizer(said)["input_ids"]
        with torch.no_grad():
            logits = made.ready.model(torch.tensor([[*start, *word]])).logits[0]
        chances = torch.log_softmax(logits[len(start) - 1 : -1], -1)[range(len(word)), word]
        scores.append(chances.mean() if normalised else chances.sum())
    expected = torch.softmax(torch.stack(scores), dim=-1)
    assert torch.allclose(torch.tensor(list(found.values())), expected, atol=1e-5)


def test_a_masked_model_answers_at_its_mask(bases: dict[str, str]) -> None:
    made = prompt(bases, "bert", rows=[], template="{text} {mask}")
    found = ask(made, "hello good day", "now")
    tokenizer = made.ready.tokenizer
    ids = tokenizer("now [MASK]", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = made.ready.model(ids).logits[0, 2]
    words = tokenizer.convert_tokens_to_ids(["delivery", "refund"])
    expected = torch.softmax(logits[words], dim=-1)
    assert torch.allclose(
        torch.tensor(list(found[1]["probabilities"].values())), expected, atol=1e-5
    )


def test_a_text_that_is_too_long_is_cut_the_demonstrations_stay(bases: dict[str, str]) -> None:
    made = prompt(bases, room=40)
    long = " ".join(["hello"] * 60)
    ids = made.text.prompt(made.text.before(ROWS), {"text": long}, 39, "row 1")
    assert len(ids) == 39
    before = made.text.ids(made.text.before(ROWS))
    assert ids[: len(before)] == before
    assert ids[-2:] == made.text.ids("\nLabel:")
    with pytest.raises(DataError, match=r"row 1: .* before the answer; show fewer"):
        made.text.prompt(made.text.before(ROWS), {"text": long}, 20, "row 1")


# Runs


@pytest.fixture(scope="module")
def finished(bases: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return run.train(settings(bases, tmp_path_factory.mktemp("runs") / "run"))


def test_a_run_has_the_result_of_an_adapters(finished: RunResult) -> None:
    assert finished.kind == "in-context"
    assert finished.name == "classification-in-context"
    assert finished.metrics["test"].keys() == {"accuracy", "macro_f1", "mcc"}
    assert finished.parameters["trainable"] == 0
    assert sum(map(sum, finished.confusion)) == finished.costs["rows"] == 12
    assert finished.costs["tokens"] < finished.costs["tokens_alone"]
    assert RunResult.load(finished.run_dir) == finished
    names = {item.name for item in Path(finished.run_dir).iterdir()}
    assert names == {
        *("run.yaml", "env.json", "adapter", "predictions.test.jsonl", "result.json"),
        *("graftune_task.json", "scores.test.jsonl"),
    }
    assert {item.name for item in Path(finished.adapter_path).iterdir()} == {
        *("graftune_task.json", "prompt.json"),
    }
    kept = json.loads((Path(finished.adapter_path) / "prompt.json").read_text())
    assert len(kept["demonstrations"]) == 4
    assert kept["method"]["shots"] == 4


def test_evaluate_and_predict_work_as_for_adapters(finished: RunResult) -> None:
    out = Path(finished.run_dir)
    found = run.evaluate(out)
    assert found["metrics"] == finished.metrics["test"]
    assert found["confusion"] == finished.confusion
    rows = [json.loads(line) for line in (out / "predictions.test.jsonl").open()]
    for directory in (out, out / "adapter"):
        answers = run.predict(directory, [row["text"] for row in rows])
        assert [one["label"] for one in answers] == [row["label"] for row in rows]
        assert answers[0]["probabilities"] == pytest.approx(rows[0]["probabilities"], abs=1e-5)
    assert run.evaluate(out, split="validation")["rows"] == finished.data["rows"]["validation"]


def test_without_demonstrations_the_template_alone_asks(
    finished: RunResult, bases: dict[str, str], tmp_path: Path
) -> None:
    bare = run.train(settings(bases, tmp_path / "bare", method={"shots": 0}))
    asked = ["i want my parcel"]
    (found,) = run.predict(finished.run_dir, asked, base_only=True)
    (expected,) = run.predict(bare.run_dir, asked)
    assert found == expected
    assert found["probabilities"] != run.predict(finished.run_dir, asked)[0]["probabilities"]


def test_it_is_made_again_from_its_settings(finished: RunResult, tmp_path: Path) -> None:
    again = RunSettings.from_yaml(Path(finished.run_dir) / "run.yaml")
    found = run.train(again.replaced(out=str(tmp_path / "again")))
    assert found.metrics == finished.metrics
    assert (tmp_path / "again" / "adapter" / "prompt.json").read_text() == (
        Path(finished.adapter_path) / "prompt.json"
    ).read_text()
    assert run.train(again, resume=True) == finished


def test_the_nearest_rows_are_kept_with_their_vectors(
    bases: dict[str, str], tmp_path: Path
) -> None:
    found = run.train(settings(bases, tmp_path / "near", method={"select": "nearest", "shots": 2}))
    rows = [json.loads(line) for line in (tmp_path / "near/predictions.test.jsonl").open()]
    answers = run.predict(tmp_path / "near", [row["text"] for row in rows])
    assert [one["score"] for one in answers] == pytest.approx([r["score"] for r in rows], abs=1e-5)
    kept = json.loads((tmp_path / "near/adapter/prompt.json").read_text())
    assert len(kept["demonstrations"]) == found.data["rows"]["train"]
    assert (tmp_path / "near/adapter/vectors.safetensors").is_file()


@pytest.mark.parametrize(
    ("base", "method"),
    [("bert", {"shots": 2}), ("t5", {"shots": 2}), ("bert", {"shots": 0}),
     ("llama", {"labels": "random", "inputs": "random"})],
)  # fmt: skip
def test_every_kind_of_language_model_is_prompted(
    base: str, method: dict[str, Any], bases: dict[str, str], tmp_path: Path
) -> None:
    found = run.train(settings(bases, tmp_path / "run", base, method=method))
    assert found.costs["rows"] == 12
    assert run.evaluate(tmp_path / "run")["metrics"] == found.metrics["test"]


def test_rows_choose_among_answers_of_their_own(bases: dict[str, str], tmp_path: Path) -> None:
    rows = [
        {"text": row["text"], "choices": ["refund", "delivery", "yes no"][: 2 + n % 2],
         "answer": row["label"]}
        for n, row in enumerate(tiny.mail(30))
    ]  # fmt: skip
    data = str(tiny.write_jsonl(tmp_path / "quiz.jsonl", rows))
    made = settings(bases, tmp_path / "run", task="choices", data={"train": data})
    found = run.train(made)
    assert found.metrics["test"].keys() == {"accuracy"}
    assert run.evaluate(tmp_path / "run")["metrics"] == found.metrics["test"]
    (answer,) = run.predict(tmp_path / "run", [{"text": "money", "choices": ["yes", "no"]}])
    assert answer["label"] in ("yes", "no")


# What is refused, before anything is written


@pytest.mark.parametrize(
    ("base", "values", "told"),
    [
        ("llama", {"method": {"shots": 99}}, "shots is 99, but there are only 42 training rows"),
        ("llama", {"method": {"shot": 2}}, 'method: shot: unknown key. Did you mean "shots"'),
        ("llama", {"method": {"template": "Label: {label}"}}, "no slot for a text"),
        ("llama", {"method": {"template": "{txt} {label}"}}, 'Did you mean "text"'),
        ("llama", {"method": {"template": "{text} {mask}"}}, "no masked model: write"),
        ("llama", {"method": {"template": "{label} {text}"}}, "stands after {label}"),
        ("llama", {"method": {"template": "{text} {soft:3} {label}"}}, "3 soft tokens"),
        ("llama", {"method": {"words": {"refunds": "money"}}}, 'Did you mean "refund"'),
        ("llama", {"method": {"words": {"refund": "reimburse"}}}, 'doesn\'t know "reimburse"'),
        ("llama", {"method": {"select": "nearest", "shots": 0}}, "nothing is shown"),
        ("llama", {"method": {"select": "nearest", "inputs": "random"}}, "none is the nearest"),
        ("llama", {"train": {"epochs": 2}}, "train.epochs is 2.0, but in-context learning trains"),
        ("llama", {"beside": {"a": "runs/a"}}, "beside names adapters"),
        ("llama", {"data": {"max_length": 200}}, "max_length is 200, but .* takes at most 128"),
        ("bert", {"method": {"template": "{text} {label}"}}, "no {mask}, but .* masked model"),
        ("bert", {"method": {"words": {"refund": "money back"}}}, '"money back" is 2 tokens'),
        ("llama", {"method": {"shots": 20}}, r"has 2\d\d tokens \(20 demonstrations .* takes 128"),
    ],
)
def test_what_cannot_be_is_told_first(
    base: str, values: dict[str, Any], told: str, bases: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=told.replace("{", r"\{")):
        run.train(settings(bases, tmp_path / "run", base, **values))
    assert not (tmp_path / "run").exists()


def test_a_prompt_that_is_too_long_says_how_many_shots_would_fit(
    bases: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(SettingsError) as refused:
        run.train(settings(bases, tmp_path / "run", method={"shots": 20}))
    fits = int(str(refused.value).partition(" shots would fit")[0].rpartition(" ")[2])
    assert 4 < fits < 20
    run.train(settings(bases, tmp_path / "run", method={"shots": fits}))
    with pytest.raises(SettingsError, match=f"{fits} shots would fit"):
        run.train(settings(bases, tmp_path / "more", method={"shots": fits + 1}))


def test_another_models_tokenizer_is_told(bases: dict[str, str], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(bases["llama"])
    model.resize_token_embeddings(12)
    model.save_pretrained(tmp_path / "small")
    AutoTokenizer.from_pretrained(bases["llama"]).save_pretrained(tmp_path / "small")
    made = settings({**bases, "llama": str(tmp_path / "small")}, tmp_path / "run")
    with pytest.raises(FormatError, match=r"tokenizer doesn't match the base: .* for 12"):
        run.train(made)
    assert not (tmp_path / "run").exists()


def test_a_text_with_a_mask_is_told(bases: dict[str, str]) -> None:
    made = prompt(bases, "bert", template="{text} {mask}")
    with pytest.raises(DataError, match=r'row 0: its prompt holds "\[MASK\]" more than once'):
        ask(made, "now [MASK] please")


def test_nothing_can_be_dropped_of_a_prompt(finished: RunResult) -> None:
    with pytest.raises(SettingsError, match="nothing to drop"):
        run.predict(finished.run_dir, ["hello"], drop=1)


def test_a_broken_prompt_is_told(finished: RunResult, tmp_path: Path) -> None:
    for item in Path(finished.adapter_path).iterdir():
        (tmp_path / item.name).write_text(item.read_text())
    (tmp_path / "prompt.json").write_text("{}")
    with pytest.raises(FormatError, match=r"prompt.json\" can't be read"):
        run.predict(tmp_path, ["hello"])


def test_its_name_is_known_in_any_form() -> None:
    from graftune.tasks.in_context import is_in_context

    assert all(is_in_context({"name": name}) for name in ("in-context", "InContext", "in_context"))
    assert not is_in_context({"name": "lora"})
    assert in_context_of({"name": "in-context"}).shots == 8


def test_a_dry_run_shows_the_first_prompt(bases: dict[str, str], tmp_path: Path) -> None:
    found = run.plan(settings(bases, tmp_path / "run", method={"shots": 1}))
    text = InContextRun.prepared(settings(bases, tmp_path / "run"), Silent())
    asked = text.data.splits["test"][0].fields["text"]
    assert found["prompt"].endswith(f"\n\nText: {asked}\nLabel:")
    assert found["prompt"].count("Label: ") == 1
    assert found["settings"]["method"]["shots"] == 1
    assert not (tmp_path / "run").exists()
