"""P-tuning: the nets that make virtual tokens, dropping them, files, settings, training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftune as gt
from graftune.errors import AdapterError, SettingsError
from graftune.methods.ptuning import PTuning
from tests.contract.subjects import logits, shake
from tests.families import FAMILIES
from tests.methods.changes import check_uniform, learns


def parts(adapter: Any) -> dict[str, Tensor]:
    return {name.rpartition("prompt.")[2]: t for name, t in adapter.state_dict().items()}


def made(adapter: Any) -> Tensor:
    return adapter.method.prompt_of(adapter)


def test_the_published_settings_are_the_defaults() -> None:
    method = PTuning()
    assert (method.length, method.encoder, method.depth, method.dropout) == (9, "lstm", 2, 0.0)
    shapes = {
        n: tuple(t.shape) for n, t in parts(gt.attach(FAMILIES["llama"].build(), method)).items()
    }
    assert shapes["encoder.weight_ih_l0"] == (4 * 16, 32)  # d/2 each way
    assert shapes["encoder.weight_ih_l1_reverse"] == (4 * 16, 32)
    assert shapes["encoder.W1"] == shapes["encoder.W2"] == (32, 32)


@pytest.mark.parametrize(("hidden", "depth"), [(None, 2), (5, 1), (20, 3)])
def test_the_lstm_is_torchs(hidden: int | None, depth: int) -> None:
    method = PTuning(length=4, hidden=hidden, depth=depth, train_head=False)
    adapter = gt.attach(FAMILIES["llama"].build(), method, seed=0)
    found = parts(adapter)
    h = hidden or 16
    lstm = nn.LSTM(32, h, depth, bidirectional=True, batch_first=True)
    mlp = nn.Sequential(nn.Linear(2 * h, 2 * h), nn.ReLU(), nn.Linear(2 * h, 32))
    own = {n.removeprefix("encoder."): t for n, t in found.items()}
    lstm.load_state_dict({n: t for n, t in own.items() if "_l" in n})
    names = {"0.weight": "W1", "0.bias": "c1", "2.weight": "W2", "2.bias": "c2"}
    mlp.load_state_dict({name: own[mine] for name, mine in names.items()})
    torch.testing.assert_close(made(adapter), mlp(lstm(own["E"][None])[0])[0])


@pytest.mark.parametrize(("hidden", "depth"), [(None, 2), (7, 3), (None, 1)])
def test_the_mlp_has_its_linears(hidden: int | None, depth: int) -> None:
    method = PTuning(length=4, encoder="mlp", hidden=hidden, depth=depth, train_head=False)
    adapter = gt.attach(FAMILIES["llama"].build(), method, seed=0)
    found = parts(adapter)
    x = found["E"]
    for n in range(1, depth + 1):
        x = x.relu() if n > 1 else x
        x = x @ found[f"encoder.W{n}"].t() + found[f"encoder.c{n}"]
        assert x.shape == (4, (hidden or 32) if n < depth else 32)
    torch.testing.assert_close(made(adapter), x)


def test_initial_values() -> None:
    model = FAMILIES["llama"].build()
    found = parts(gt.attach(model, PTuning(length=500, hidden=100), seed=0))
    assert abs(found["E"].std().item() - 1) < 0.02
    check_uniform(found["encoder.weight_ih_l0"], 100, within=0.03)
    check_uniform(found["encoder.weight_hh_l1_reverse"], 100, within=0.03)
    check_uniform(found["encoder.W1"], 200, within=0.03)
    none = gt.attach(model, PTuning(length=6, encoder="none"), name="none", seed=0)
    table: Any = model.get_input_embeddings().weight
    assert all(any(torch.equal(row, word) for word in table) for row in made(none))


@pytest.mark.parametrize("encoder", ["lstm", "mlp"])
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_without_what_made_them_it_answers_the_same_bit_for_bit(
    family: str, encoder: str, tmp_path: Path
) -> None:
    model, inputs = FAMILIES[family].build(), FAMILIES[family].inputs()
    method = PTuning(length=3, encoder=encoder, train_head=False)
    adapter = gt.attach(model, method, seed=0)
    shake(adapter, seed=1)
    expected = logits(model, inputs)
    adapter.save(tmp_path / "training")
    adapter.finish()
    assert parts(adapter).keys() == {"tokens"}
    assert adapter.count() == 3 * 32
    assert all(tensor.requires_grad for tensor in adapter.parameters())
    assert torch.equal(logits(model, inputs), expected)
    adapter.finish()
    adapter.save(tmp_path / "finished")
    for folder in ("training", "finished"):
        fresh = FAMILIES[family].build()
        loaded = gt.load(fresh, tmp_path / folder)
        assert ("tokens" in parts(loaded)) == (folder == "finished")
        assert torch.equal(logits(fresh, inputs), expected)


def test_a_marker_is_kept_by_files_and_by_finishing(tmp_path: Path) -> None:
    model, inputs = FAMILIES["llama"].build(), FAMILIES["llama"].inputs()
    inputs["input_ids"][:, 2:4] = 98
    adapter = gt.attach(model, PTuning(length=2, marker=98), seed=0)
    expected = logits(model, inputs)
    adapter.finish()
    assert torch.equal(logits(model, inputs), expected)
    adapter.save(tmp_path / "it")
    fresh = FAMILIES["llama"].build()
    gt.load(fresh, tmp_path / "it")
    assert torch.equal(logits(fresh, inputs), expected)


def test_virtual_tokens_depend_on_each_other_under_an_lstm() -> None:
    for encoder, several in (("lstm", True), ("mlp", False)):
        adapter = gt.attach(FAMILIES["llama"].build(), PTuning(length=3, encoder=encoder), seed=0)
        delta: Any = adapter.grafts[0].delta
        delta.prompt()[0].sum().backward()
        assert bool(delta.E.grad[1:].abs().sum() > 0) == several


def test_dropout_acts_in_training_alone() -> None:
    model = FAMILIES["llama"].build()
    adapter = gt.attach(model, PTuning(length=3, dropout=0.5), seed=0)
    assert torch.equal(made(adapter), made(adapter))
    model.train()
    assert not torch.equal(made(adapter), made(adapter))


def test_a_prompt_starts_from_it_and_it_from_another() -> None:
    model = FAMILIES["llama"].build()
    inputs = FAMILIES["llama"].inputs()
    source = gt.attach(model, PTuning(length=3), name="source", seed=0)
    expected = logits(model, inputs)
    gt.attach(model, gt.PromptTuning(length=3), name="prompt").start_from(source)
    assert torch.equal(logits(model, inputs), expected)
    plain = gt.attach(model, PTuning(length=3, encoder="none"), name="none").start_from(source)
    assert torch.equal(made(plain), made(source))
    again = gt.attach(model, PTuning(length=3), name="again", seed=9).start_from(source)
    assert torch.equal(made(again), made(source))
    with pytest.raises(AdapterError, match="its lstm makes the virtual tokens"):
        again.start_from(plain)


def test_the_base_can_train_beside_it() -> None:
    kind = FAMILIES["bert"]
    model, inputs = kind.build(), kind.inputs()
    base = gt.attach(model, gt.FullFineTuning(keep_base=True, train_head=False), name="base")
    prompt = gt.attach(model, PTuning(length=3, train_head=False), name="prompt", seed=0)
    gt.activate(model, gt.Stack("base", "prompt"))
    logits_of: Any = model(**inputs).logits
    logits_of.sum().backward()
    for adapter in (base, prompt):
        assert all(tensor.requires_grad for tensor in adapter.parameters())
        assert any(t.grad is not None and t.grad.abs().sum() > 0 for t in adapter.parameters())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"length": 0}, "length is 0"),
        ({"encoder": "lstn"}, "expected one of lstm, mlp, none"),
        ({"hidden": 0}, "hidden is 0"),
        ({"depth": 0}, "depth is 0"),
        ({"encoder": "none", "hidden": 4}, 'hidden is 4, but encoder is "none"'),
        ({"encoder": "mlp", "dropout": 0.1}, "between an LSTM's layers"),
        ({"depth": 1, "dropout": 0.1}, "with depth 1"),
        ({"position": "end"}, "expected one of front, after-first"),
        ({"position": "front", "marker": 3}, "each says where"),
        ({"marker": -1}, "marker is -1"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        PTuning(**settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"length": 64}, "leaves no room"),
        ({"marker": 99}, "the model has 99 tokens"),
        ({"marker": 0}, "which pads rows"),
    ],
)
def test_settings_that_do_not_fit_the_model(settings: dict[str, Any], words: str) -> None:
    model = FAMILIES["gpt2"].build()
    model.config.pad_token_id = 0
    with pytest.raises(SettingsError, match=words):
        gt.attach(model, PTuning(**settings))
    assert not gt.adapters(model)


@pytest.mark.parametrize("encoder", ["lstm", "mlp", "none"])
def test_training_learns(encoder: str) -> None:
    first, last = learns(PTuning(length=6, encoder=encoder), "llama")
    assert last < 0.95 * first
