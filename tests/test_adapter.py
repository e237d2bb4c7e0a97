"""An adapter's life: names, several at once, heads of their own, saving, detaching."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import graftune as gt
from graftune.adapter import Planned, attach_planned
from graftune.errors import AdapterError, FormatError, GraftuneError, SettingsError
from tests.contract.subjects import logits, same, shake, tensors
from tests.families import FAMILIES

INPUTS = FAMILIES["bert"].inputs()
QUERY = "bert.encoder.layer.0.attention.self.query"


def bert(*names: str, method: Any = None, **options: Any) -> Any:
    """Returns a model with an adapter of each name, off its start; the last is active."""
    model = FAMILIES["bert"].build(**options)
    for seed, name in enumerate(names):
        shake(gt.attach(model, method or gt.LoRA(r=2), name, seed=seed), seed)
    return model


@pytest.mark.parametrize("name", ["", "a/b", "a\\b", "a.b", ".", " a", "a\n", None, 3])
def test_a_name_that_can_not_be_a_folder_or_a_path_is_refused(name: Any) -> None:
    model = bert()
    with pytest.raises(AdapterError, match="name is text without") as error:
        gt.attach(model, gt.LoRA(), name)
    assert repr(name) in str(error.value)
    assert gt.adapters(model) == {}
    assert not hasattr(model, "_graftune")


def test_a_name_is_attached_once() -> None:
    model = bert("a")
    before = logits(model, INPUTS)
    with pytest.raises(AdapterError, match=r'"a" is attached already; detach it, or take another'):
        gt.attach(model, gt.LoRA(), "a")
    assert torch.equal(logits(model, INPUTS), before)
    assert list(gt.adapters(model)) == ["a"]


@pytest.mark.parametrize("name", ["weight", "bias", "deltas", "training", "été", "a-b c"])
def test_any_other_name_will_do(name: str) -> None:
    model = bert()
    base = logits(model, INPUTS)
    adapter = gt.attach(model, gt.LoRA(bias="all"), name)
    shake(adapter, seed=1)
    assert not torch.equal(logits(model, INPUTS), base)
    gt.activate(model, None)
    gt.detach(model, name)
    assert torch.equal(logits(model, INPUTS), base)


def test_adapters_side_by_side_act_one_at_a_time() -> None:
    model, base = bert("a", "b"), logits(bert(), INPUTS)
    alone = {name: logits(bert(name), INPUTS) for name in "a"}
    seen = {}
    for name in ("a", "b", None):
        gt.activate(model, name)
        seen[name] = logits(model, INPUTS)
    assert torch.equal(seen["a"], alone["a"])
    assert torch.equal(seen[None], base)
    assert len({tuple(t.flatten().tolist()) for t in seen.values()}) == 3


def test_a_stack_of_loras_sums_their_changes() -> None:
    model = bert("a", "b")
    host = model.get_submodule(QUERY)
    changes = [host.deltas[name].weight_change() for name in "ab"]
    gt.activate(model, gt.Stack("a", "b"))
    x = torch.randn(3, 32)
    expected = x @ (host.weight + sum(changes)).t() + host.bias
    torch.testing.assert_close(host(x), expected, atol=2e-6, rtol=1e-5)


def test_adapters_of_different_methods_stack() -> None:
    model = bert("a")
    shake(gt.attach(model, gt.BitFit(), "b"), seed=5)
    host = model.get_submodule(QUERY)
    gt.activate(model, gt.Stack("a", "b"))
    x = torch.randn(3, 32)
    bias = host.deltas["b"]._modules["bias"].value
    expected = x @ (host.weight + host.deltas["a"].weight_change()).t() + bias
    torch.testing.assert_close(host(x), expected, atol=2e-6, rtol=1e-5)


def test_each_adapter_has_a_head_of_its_own() -> None:
    model = bert("a", "b")
    own = {name: dict(a.named_parameters()) for name, a in gt.adapters(model).items()}
    assert gt.adapters(model)["a"].head_names == ("classifier",)
    heads = [own[name]["classifier.weight"] for name in "ab"]
    assert not torch.equal(heads[0], heads[1])
    for name, head in zip("ab", heads, strict=True):
        with gt.using(model, name):
            x = torch.randn(2, 32)
            expected = x @ head.t() + own[name]["classifier.bias"]
            torch.testing.assert_close(model.classifier(x), expected)


def test_heads_may_have_other_numbers_of_labels() -> None:
    model, theirs = bert("three"), bert(num_labels=5)
    theirs.bert.load_state_dict(bert().bert.state_dict())
    shake(gt.attach(theirs, gt.LoRA(r=2), "five", seed=5), seed=5)
    expected = logits(theirs, INPUTS)
    attach_planned(
        model,
        gt.LoRA(r=2),
        "five",
        lambda _: Planned(gt.LoRA(r=2), gt.adapters(theirs)["five"].grafts, ("classifier",)),
    )
    for name, width in (("three", 3), ("five", 5), ("three", 3)):
        gt.activate(model, name)
        assert logits(model, INPUTS).shape == (2, width)
    with gt.using(model, "five"):
        assert torch.equal(logits(model, INPUTS), expected)
    with gt.using(model, gt.Rows(["five", "three"])), pytest.raises(AdapterError, match="sizes"):
        logits(model, INPUTS)


@pytest.mark.parametrize(
    ("choice", "heads"),
    [
        (None, ("classifier",)),
        (True, ("classifier",)),
        (False, ()),
        (("pooler",), ("bert.pooler",)),
        (("bert.pooler", "classifier"), ("bert.pooler", "classifier")),
    ],
)
def test_train_head_chooses_the_heads(choice: Any, heads: tuple[str, ...]) -> None:
    adapter = gt.attach(bert(), gt.LoRA(r=2, train_head=choice))
    assert adapter.head_names == heads
    names = [n for n, _ in adapter.named_parameters() if not n.endswith((".A", ".B"))]
    assert {name.rpartition(".")[0].removesuffix(".dense") for name in names} == set(heads)


def test_a_head_that_is_not_there_is_refused() -> None:
    model = bert()
    with pytest.raises(SettingsError, match=r'names "classifer".*Did you mean "classifier"\?'):
        gt.attach(model, gt.LoRA(train_head=("classifer",)))
    assert not hasattr(model, "_graftune")


COMPOSITIONS: list[tuple[Any, str]] = [
    ("aa", r'No adapter is named "aa"; attached: "intents", "topics"'),
    ("intent", r'Did you mean "intents"\?'),
    (gt.Stack("intents", "topic"), r'named "topic".*Did you mean "topics"\?'),
    (gt.Rows(["intents", "topic"]), r'named "topic".*Did you mean "topics"\?'),
    (["intents"], r"A composition is a name, None, Stack.*or Rows.*found \['intents'\]"),
    (3, "found 3"),
]


@pytest.mark.parametrize(("composition", "message"), COMPOSITIONS)
def test_a_composition_that_can_not_be_changes_nothing(composition: Any, message: str) -> None:
    model = bert("intents", "topics")
    before = logits(model, INPUTS)
    with pytest.raises(AdapterError, match=message):
        gt.activate(model, composition)
    with pytest.raises(AdapterError, match=message), gt.using(model, composition):
        pass
    assert torch.equal(logits(model, INPUTS), before)


def test_rows_must_be_as_many_as_the_batch_has() -> None:
    model = bert("a", "b")
    with gt.using(model, gt.Rows(["a", "b", None])), pytest.raises(AdapterError) as error:
        logits(model, INPUTS)
    assert "Rows names 3 rows" in str(error.value)
    assert "batch of 2" in str(error.value)


def test_rows_may_be_stacks() -> None:
    model = bert("a", "b")
    with gt.using(model, gt.Rows([gt.Stack("a", "b"), None])):
        mixed = logits(model, INPUTS)
    for row, member in enumerate([gt.Stack("a", "b"), None]):
        with gt.using(model, member):
            torch.testing.assert_close(mixed[row], logits(model, INPUTS)[row], atol=2e-6, rtol=2e-5)


def test_detach_needs_an_adapter_that_is_idle() -> None:
    model = bert("a", "b")
    with pytest.raises(AdapterError, match=r'"b" is active: gt\.activate\(model, None\) before'):
        gt.detach(model, "b")
    gt.activate(model, gt.Stack("b", "a"))
    with pytest.raises(AdapterError, match='"a" is active'):
        gt.detach(model, "a")
    gt.activate(model, "a")
    with gt.using(model, gt.Rows(["b", None])), pytest.raises(AdapterError, match='"b" is active'):
        gt.detach(model, "b")
    gt.merge(model, "a")
    with pytest.raises(AdapterError, match='"a" is merged: unmerge before you detach'):
        gt.detach(model, "a")
    with pytest.raises(AdapterError, match='No adapter is named "c"'):
        gt.detach(model, "c")
    gt.detach(model, "b")
    assert list(gt.adapters(model)) == ["a"]


def test_a_plain_model_says_that_nothing_is_attached() -> None:
    model = bert()
    calls = (gt.unmerge, gt.state_of, lambda m: gt.activate(m, None), lambda m: gt.detach(m, "a"))
    for call in calls:
        with pytest.raises(AdapterError, match="No adapter is attached to this BertFor"):
            call(model)
    assert gt.adapters(model) == {}


def test_only_what_acts_gets_gradients() -> None:
    model = bert("a", "b")
    own = {name: {id(t) for t in a.parameters()} for name, a in gt.adapters(model).items()}

    def trained() -> set[int]:
        return {id(p) for p in model.parameters() if p.requires_grad}

    assert trained() == own["b"]
    gt.activate(model, "a")
    assert trained() == own["a"]
    gt.activate(model, gt.Stack("a", "b"))
    assert trained() == own["a"] | own["b"]
    with gt.using(model, None):
        assert trained() == own["a"] | own["b"]
    gt.activate(model, gt.Rows(["b", None]))
    assert trained() == own["b"]
    gt.activate(model, None)
    assert trained() == set()


def test_an_adapter_set_aside_stays_frozen() -> None:
    model = bert("a", "b")
    gt.adapters(model)["a"].trainable = False
    gt.activate(model, gt.Stack("a", "b"))
    assert not any(t.requires_grad for t in gt.adapters(model)["a"].parameters())
    assert all(t.requires_grad for t in gt.adapters(model)["b"].parameters())


def test_what_was_frozen_before_stays_so_after() -> None:
    model = bert()
    model.bert.embeddings.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    gt.attach(model, gt.LoRA(), "a")
    assert not any(p.requires_grad for n, p in model.named_parameters() if n in flags)
    gt.activate(model, None)
    gt.detach(model, "a")
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


def test_state_dict_keeps_the_bases_keys_and_adds_below_them() -> None:
    plain = bert()
    keys = list(plain.state_dict())
    model = bert("a", method=gt.LoRA(r=2, targets="qv"))
    found = model.state_dict()
    assert [key for key in found if ".deltas." not in key] == keys
    assert {key for key in found if key.startswith(f"{QUERY}.deltas")} == {
        f"{QUERY}.deltas.output.a.A",
        f"{QUERY}.deltas.output.a.B",
    }


def test_load_state_dict_takes_all_or_nothing() -> None:
    adapter = gt.adapters(bert("a", method=gt.LoRA(r=2, targets="qv")))["a"]
    before = {n: t.clone() for n, t in adapter.state_dict().items()}
    other = {n: t + 1 for n, t in before.items()}
    wrong = dict(other)
    wrong["nothing"] = wrong.pop(f"{QUERY}.A")
    wrong[f"{QUERY}.B"] = torch.zeros(3, 3)
    with pytest.raises(FormatError) as error:
        adapter.load_state_dict(wrong)
    for words in (f"{QUERY}.A is missing", "nothing is unexpected", "(3, 3), expected (32, 2)"):
        assert words in str(error.value)
    assert same(adapter.state_dict(), before)
    adapter.load_state_dict({f"{QUERY}.A": other[f"{QUERY}.A"]}, strict=False)
    assert torch.equal(adapter.state_dict()[f"{QUERY}.A"], other[f"{QUERY}.A"])
    adapter.load_state_dict(other)
    assert same(adapter.state_dict(), other)


def test_save_pretrained_writes_the_active_adapter_alone(tmp_path: Path) -> None:
    model = bert("a", "b")
    gt.activate(model, "a")
    expected = logits(model, INPUTS)
    model.save_pretrained(tmp_path / "stock")
    saved = gt.adapters(model)["a"].save(tmp_path / "own")
    files = {path.name for path in (tmp_path / "stock").iterdir()}
    assert not any(name.startswith(("model", "pytorch_model")) for name in files), files
    stock, own = (load_file(p / "adapter_model.safetensors") for p in (tmp_path / "stock", saved))
    assert stock.keys() == own.keys()
    assert all(torch.equal(stock[key], own[key]) for key in own)
    written = [(p / "adapter_config.json").read_text() for p in (tmp_path / "stock", saved)]
    assert json.loads(written[0]) == json.loads(written[1])
    fresh = bert()
    gt.load(fresh, tmp_path / "stock", name="again")
    assert torch.equal(logits(fresh, INPUTS), expected)


def test_save_pretrained_without_an_active_adapter_says_so(tmp_path: Path) -> None:
    model = bert("a", "b")
    gt.activate(model, None)
    with pytest.raises(AdapterError, match=r"No adapter is active.*a, b"):
        model.save_pretrained(tmp_path / "none")


@pytest.mark.parametrize("end", ["merged", "detached"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_merged_or_detached_it_writes_a_plain_checkpoint(
    tmp_path: Path, family: str, end: str
) -> None:
    model, inputs = FAMILIES[family].build(), FAMILIES[family].inputs()
    shake(gt.attach(model, gt.LoRA(r=2), "a", seed=0), seed=1)
    if end == "merged":
        gt.merge(model, "a")
    else:
        gt.activate(model, None)
        gt.detach(model, "a")
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    assert not (tmp_path / "adapter_config.json").exists()
    again = type(model).from_pretrained(tmp_path)  # type: ignore[attr-defined]
    assert torch.equal(logits(again, inputs), expected)
    assert same(tensors(again), tensors(model))


def test_a_compiled_wrapper_stands_for_its_model() -> None:
    model = bert()
    wrapped: Any = torch.compile(model, backend="eager")
    adapter = gt.attach(wrapped, gt.LoRA(r=2), "a", seed=0)
    assert adapter.model is model
    assert list(gt.adapters(wrapped)) == list(gt.adapters(model)) == ["a"]
    assert gt.state_of(wrapped) is gt.state_of(model)
    assert gt.summary(wrapped) == gt.summary(model)
    gt.activate(wrapped, None)
    gt.detach(wrapped, "a")
    assert gt.adapters(model) == {}


@pytest.mark.parametrize(
    "method",
    [
        gt.LoRA(),
        gt.LoRA(dora=True),
        gt.LoRA(targets="all-linear", trainable_tokens=(1, 2)),
        gt.LoRA(init="pissa"),
        gt.LoRA(init="olora"),
        gt.BitFit(),
        gt.FullFineTuning(keep_base=True),
    ],
)
def test_everything_attaches_on_the_meta_device(method: Any) -> None:
    model = FAMILIES["bert"].build(meta=True)
    adapter = gt.attach(model, method)
    assert all(tensor.is_meta for tensor in adapter.state_dict().values())
    with torch.no_grad():
        assert model(input_ids=INPUTS["input_ids"].to("meta")).logits.shape == (2, 3)
    gt.activate(model, None)
    gt.detach(model, "default")


def test_an_adapter_says_what_it_is() -> None:
    adapter = gt.attach(bert(), gt.LoRA(r=2, targets="qv", train_head=False), "intents")
    assert repr(adapter) == "Adapter('intents', LoRA, 512 parameters)"
    assert dict(adapter.named_parameters()).keys() == adapter.state_dict().keys()
    assert adapter.method == gt.LoRA(r=2, targets="qv", train_head=False)


def test_starts_from_another_adapter_but_for_its_head() -> None:
    model = bert("a")
    source = gt.adapters(model)["a"]
    new = gt.attach(model, source.method, "b", seed=5)
    head = {n: t.clone() for n, t in new.state_dict().items() if "classifier" in n}
    assert new.start_from(source) is new
    for name, tensor in new.state_dict().items():
        assert torch.equal(tensor, head.get(name, source.state_dict()[name]))
    with pytest.raises(AdapterError, match='"a" has no tasks to choose of'):
        new.start_from(source, task=1)
    other = gt.attach(model, gt.LoRA(r=3), "c")
    with pytest.raises(AdapterError, match='No start from "a"'):
        other.start_from(source)


def test_a_failed_attach_beside_another_leaves_both_as_they_were() -> None:
    model = bert("a")
    before, modules = logits(model, INPUTS), [n for n, _ in model.named_modules()]
    with pytest.raises(GraftuneError):
        gt.attach(model, gt.LoRA(r=500), "b")
    assert list(gt.adapters(model)) == ["a"]
    assert [n for n, _ in model.named_modules()] == modules
    assert torch.equal(logits(model, INPUTS), before)


def test_moving_and_casting_the_model_takes_the_adapter_along() -> None:
    model = bert("a").to(torch.float64)
    assert {p.dtype for p in gt.adapters(model)["a"].parameters()} == {torch.float64}
    expected = logits(model, INPUTS)
    torch.testing.assert_close(logits(bert("a"), INPUTS).double(), expected, atol=1e-5, rtol=1e-5)
