"""The invariants of every method on every family; the slow ones on each kind of block."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graftune as gt
from graftune.errors import AdapterError, SettingsError
from tests import worked_example
from tests.contract.subjects import (
    BASE_DEPENDS_ON_PADDING,
    CASES,
    EAGER_ONLY,
    FAMILIES,
    KINDS,
    LONGER_ROWS,
    METHODS,
    NOT_LINEAR,
    OFF_AT_START,
    ONE_SIZE,
    REFUSALS,
    VARIANTS,
    Subject,
    logits,
    same,
    scores,
    shake,
    tensors,
)

every_case = pytest.mark.parametrize(
    ("method", "family"),
    [
        pytest.param(m, f, marks=[pytest.mark.slow] if m in VARIANTS and f not in KINDS else [])
        for m, f in CASES
    ],
)
some_cases = pytest.mark.parametrize(("method", "family"), [(m, f) for m, f in CASES if f in KINDS])


@pytest.fixture(autouse=True)
def known() -> Iterator[None]:
    """The worked example's method is known by its name, in these tests alone."""
    with worked_example.registered():
        yield


@pytest.fixture
def subject(method: str, family: str) -> Subject:
    return Subject.of(method, family)


@every_case
def test_only_the_adapter_trains(subject: Subject) -> None:
    before = tensors(subject.model)
    adapter = subject.attach(noise=0)
    adapter_ids = {id(p) for p in adapter.parameters()}
    assert {id(p) for p in subject.model.parameters() if p.requires_grad} == adapter_ids
    start = {name: t.clone() for name, t in adapter.named_parameters()}
    train(subject, adapter, steps=2)
    assert same(tensors(subject.model), before)
    moved = [t.numel() for n, t in adapter.named_parameters() if not torch.equal(t, start[n])]
    assert sum(moved) > 0.4 * sum(t.numel() for t in start.values())
    assert all(torch.isfinite(t).all() for t in adapter.parameters())


@every_case
def test_starts_as_the_base(subject: Subject) -> None:
    base = subject.output()
    subject.attach(noise=0)
    assert torch.equal(subject.output(), base) == (subject.method not in OFF_AT_START)


@pytest.mark.parametrize(
    ("method", "family"), [(m, f) for what, m, f in REFUSALS if what == "attach"]
)
def test_a_method_that_a_family_can_not_have_is_refused(subject: Subject) -> None:
    words = REFUSALS["attach", subject.method, subject.family.name]
    modules = list(subject.model.named_modules())
    with pytest.raises(SettingsError, match=words):
        subject.attach()
    assert list(subject.model.named_modules()) == modules


@every_case
def test_off_or_detached_is_the_base(subject: Subject) -> None:
    base, before = subject.output(), subject.model.state_dict()
    modules = [name for name, _ in subject.model.named_modules()]
    attributes = set(subject.model.__dict__)
    flags = [p.requires_grad for p in subject.model.parameters()]
    subject.attach()
    assert not torch.allclose(subject.output(), base)
    with gt.using(subject.model, None):
        assert torch.equal(subject.output(), base)
    gt.activate(subject.model, None)
    assert torch.equal(subject.output(), base)
    gt.detach(subject.model, "task")
    assert torch.equal(subject.output(), base)
    assert same(subject.model.state_dict(), before)
    assert [name for name, _ in subject.model.named_modules()] == modules
    assert set(subject.model.__dict__) == attributes
    assert [p.requires_grad for p in subject.model.parameters()] == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in subject.model.modules())


@every_case
def test_saved_and_loaded_is_the_same(subject: Subject, tmp_path: Path) -> None:
    adapter = subject.attach()
    expected = subject.output()
    adapter.save(tmp_path / "task")
    fresh = Subject.of(subject.method, subject.family.name)
    loaded = gt.load(fresh.model, tmp_path / "task", name="again")
    assert torch.equal(fresh.output(), expected)
    saved = adapter.state_dict()
    assert loaded.state_dict().keys() == saved.keys()
    assert sum(t.numel() for t in loaded.state_dict().values()) == sum(
        t.numel() for t in saved.values()
    )


@every_case
def test_merged_is_unmerged(subject: Subject) -> None:
    before = tensors(subject.model)
    subject.attach()
    expected = subject.output()
    if lacks_a_place_to_merge(subject):
        with pytest.raises(AdapterError, match="can't be merged"):
            gt.merge(subject.model, "task")
        assert torch.equal(subject.output(), expected)
        return
    gt.merge(subject.model, "task")
    scale = max(1.0, expected.abs().max().item())
    assert (subject.output() - expected).abs().max() <= 1e-5 * scale
    assert list(subject.model.state_dict()) == list(before)
    gt.unmerge(subject.model)
    assert same(tensors(subject.model), before)
    assert torch.equal(subject.output(), expected)


@every_case
def test_count_is_the_formula(subject: Subject) -> None:
    adapter = subject.attach(noise=0)
    method = METHODS[subject.method]
    plain = Subject.of(subject.method, subject.family.name).model
    parts = gt.anatomy(plain)
    head = sum(p.numel() for h in parts.new_heads for p in plain.get_submodule(h).parameters())
    whole = method.name == "FullFineTuning"
    assert adapter.count() == method.count(plain, parts) + (0 if whole else head)
    assert gt.summary(subject.model).trainable == adapter.count()


@every_case
def test_mixed_rows_are_each_row_alone(subject: Subject) -> None:
    subject.attach("a", seed=1)
    subject.attach("b", seed=2)
    inputs = subject.family.inputs(batch=3)
    members = ["a", None, "b"]
    refusal = REFUSALS.get(("rows", subject.method, subject.family.name))
    if refusal is not None:
        with pytest.raises(AdapterError, match=refusal):
            gt.activate(subject.model, gt.Rows(members))
        return
    with gt.using(subject.model, gt.Rows(members)):
        mixed = logits(subject.model, inputs)
    for row, member in enumerate(members):
        with gt.using(subject.model, member):
            alone = logits(subject.model, inputs)
        picked = slice(row, row + 1)
        if subject.family.kind == "text-vision":  # images by texts: this image with this text
            mixed_row, alone_row = mixed[row, row], alone[row, row]
        else:
            mixed_row, alone_row = mixed[picked], alone[picked]
        scale = max(1.0, alone_row.abs().max().item())
        atol = (1e-5 if subject.method in LONGER_ROWS else 2e-6) * scale
        torch.testing.assert_close(mixed_row, alone_row, atol=atol, rtol=2e-5)


SIDES = [(f, side) for f in FAMILIES for side in ("left", "right")]


@pytest.mark.parametrize(("family", "side"), SIDES)
def test_padding_changes_the_base_where_it_is_said(family: str, side: str) -> None:
    kind = FAMILIES[family]
    together = kind.inputs(batch=2, padding=side)  # type: ignore[arg-type]
    assert ("attention_mask" in together) == (family not in ONE_SIZE)
    if family not in ONE_SIZE:
        apart = distance_from_alone(Subject(kind, kind.build(), together, ""), together)
        assert (apart > 2e-5) == ((family, side) in BASE_DEPENDS_ON_PADDING)


@pytest.mark.parametrize(
    ("method", "family", "side"),
    [
        (method, family, side)
        for family, side in SIDES
        if family not in ONE_SIZE and (family, side) not in BASE_DEPENDS_ON_PADDING
        for method in METHODS
        if (method, family) in CASES
    ],
)
def test_padding_changes_no_more_than_in_the_base(subject: Subject, side: str) -> None:
    together = subject.family.inputs(batch=2, padding=side)  # type: ignore[arg-type]
    subject.attach()
    assert distance_from_alone(subject, together) <= 2e-5


TEXT = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


def distance_from_alone(subject: Subject, together: dict[str, Tensor]) -> float:
    """Returns how far the rows of a padded batch are from each row alone without padding."""
    mask, whole, far = together["attention_mask"], logits(subject.model, together), 0.0
    for row in range(len(mask)):
        kept = mask[row].bool()
        one = {
            key: value[row : row + 1][:, kept] if key in TEXT else value[row : row + 1]
            for key, value in together.items()
        }
        alone = logits(subject.model, one)
        here = whole[row, row] if subject.family.kind == "text-vision" else whole[row]
        if subject.family.kind == "decoder":
            here = here[kept]
        scale = max(1.0, here.abs().max().item())
        far = max(far, (alone.reshape(here.shape) - here).abs().max().item() / scale)
    return far


@every_case
def test_copies_and_pickles_are_independent(subject: Subject) -> None:
    base = subject.output()
    subject.attach()
    expected = subject.output()
    for twin in (copy.deepcopy(subject.model), pickle.loads(pickle.dumps(subject.model))):
        assert torch.equal(logits(twin, subject.inputs), expected)
        shake(gt.adapters(twin)["task"], seed=9)
        assert not torch.equal(logits(twin, subject.inputs), expected)
        gt.activate(twin, None)
        gt.detach(twin, "task")
        assert torch.equal(logits(twin, subject.inputs), base)
        assert torch.equal(subject.output(), expected)


@some_cases
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(subject: Subject, reentrant: bool) -> None:
    adapter = subject.attach()
    subject.model.train()
    plain = gradients(subject, adapter)
    subject.model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
    for name, gradient in gradients(subject, adapter).items():
        torch.testing.assert_close(gradient, plain[name], atol=1e-6, rtol=1e-4)


@some_cases
def test_recomputation_sees_what_its_forward_saw(subject: Subject) -> None:
    adapter = subject.attach()
    subject.model.train()
    plain = gradients(subject, adapter)
    gt.activate(subject.model, None)
    for tensor in adapter.parameters():
        tensor.requires_grad_(True)
    subject.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    torch.manual_seed(0)
    with gt.using(subject.model, "task"):
        loss = loss_of(subject)
    got = dict(
        zip(
            plain,
            torch.autograd.grad(loss, list(adapter.parameters()), allow_unused=True),
            strict=True,
        )
    )
    for name, gradient in got.items():
        expected = plain[name]
        gradient = torch.zeros_like(expected) if gradient is None else gradient
        torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4)


@some_cases
def test_runs_in_bfloat16(method: str, family: str) -> None:
    subject = Subject.of(method, family, dtype=torch.bfloat16)
    inputs = {
        k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in subject.inputs.items()
    }
    base = logits(subject.model, inputs)
    adapter = subject.attach(noise=0)
    assert torch.equal(logits(subject.model, inputs), base) == (method not in OFF_AT_START)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    shake(adapter, seed=3)
    changed = logits(subject.model, inputs)
    assert changed.dtype == torch.bfloat16
    assert not torch.equal(changed, base)


@pytest.mark.parametrize(
    ("method", "family"),
    [
        pytest.param(m, f, marks=[] if (f, m) == ("bert", "lora") else pytest.mark.slow)
        for m, f in CASES
        if f in KINDS
    ],
)
def test_compiles_also_when_attached_late(subject: Subject) -> None:
    subject.output()
    compiled: Any = torch.compile(subject.model, backend="eager")
    base = logits(compiled, subject.inputs)
    subject.attach()
    expected = subject.output()
    assert not torch.equal(expected, base)
    torch.testing.assert_close(logits(compiled, subject.inputs), expected)
    gt.activate(subject.model, None)
    torch.testing.assert_close(logits(compiled, subject.inputs), base)
    gt.activate(subject.model, "task")
    torch.testing.assert_close(logits(compiled, subject.inputs), expected)
    with gt.using(subject.model, None):
        torch.testing.assert_close(logits(compiled, subject.inputs), base)


@pytest.mark.parametrize(
    ("method", "family"), [(m, f) for m, f in CASES if f in KINDS and f not in EAGER_ONLY]
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_kernels_agree(subject: Subject, attention: str) -> None:
    subject.attach()
    expected = subject.output()
    subject.model.set_attn_implementation(attention)  # type: ignore[operator]
    torch.testing.assert_close(subject.output(), expected, atol=2e-5, rtol=2e-4)


GENERATORS = [
    (m, f) for m, f in CASES if FAMILIES[f].generates and f in (*KINDS, "bart", "bloom", "whisper")
]


@pytest.mark.parametrize(("method", "family"), GENERATORS)
def test_generates_with_and_without_a_cache(subject: Subject) -> None:
    subject.attach()
    options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    plain = generate(subject, **options)
    assert torch.equal(generate(subject, use_cache=False, **options), plain)
    beams = generate(subject, num_beams=2, **options)
    assert beams.shape[0] == plain.shape[0]
    torch.manual_seed(0)
    sampled = generate(subject, **{**options, "do_sample": True})
    torch.manual_seed(0)
    assert torch.equal(generate(subject, **{**options, "do_sample": True}), sampled)
    if not lacks_a_place_to_merge(subject):
        gt.merge(subject.model, "task")
    assert torch.equal(generate(subject, **options), plain)


@pytest.mark.parametrize(
    ("method", "family"), [c for c in GENERATORS if ("rows", *c) not in REFUSALS]
)
def test_generates_rows_with_beams(subject: Subject) -> None:
    subject.attach("a", seed=1)
    subject.attach("b", seed=2)
    options: dict[str, Any] = {
        "max_new_tokens": 4,
        "min_new_tokens": 4,
        "num_beams": 2,
        "do_sample": False,
    }
    with gt.using(subject.model, gt.Rows(["a", "b"])):
        mixed = generate(subject, **options)
    for row, member in enumerate(["a", "b"]):
        with gt.using(subject.model, member):
            assert torch.equal(generate(subject, **options)[row], mixed[row])


def generate(subject: Subject, **options: Any) -> Tensor:
    return subject.model.generate(**subject.inputs, **options)  # type: ignore[operator]


def lacks_a_place_to_merge(subject: Subject) -> bool:
    """Whether no weight does what was added, or the base has no bias where one was."""
    if subject.method in NOT_LINEAR:
        return True
    parts = gt.state_of(subject.model).anatomy
    names = {name for name in gt.adapters(subject.model)["task"].state_dict()}
    biases = {name for name in names if name.endswith(".bias")}
    return subject.method == "bitfit" and not biases <= {
        *parts.biases,
        *names_in_heads(parts, names),
    }


def names_in_heads(parts: gt.Anatomy, names: set[str]) -> set[str]:
    return {n for n in names if n.startswith(tuple(f"{h}." for h in parts.new_heads) or ("\0",))}


def loss_of(subject: Subject) -> Tensor:
    output = subject.model(**subject.inputs)
    return scores(output).float().pow(2).mean()


def gradients(subject: Subject, adapter: gt.Adapter) -> dict[str, Tensor]:
    for tensor in adapter.parameters():
        tensor.grad = None
    torch.manual_seed(0)  # what is drawn in training is drawn alike
    loss_of(subject).backward()
    return {
        name: torch.zeros_like(t) if t.grad is None else t.grad.clone()
        for name, t in adapter.named_parameters()
    }


def train(subject: Subject, adapter: gt.Adapter, steps: int) -> None:
    optimizer = torch.optim.SGD(list(adapter.parameters()), lr=0.1)
    subject.model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(subject).backward()
        optimizer.step()
    subject.model.eval()
