"""Multitask prompts: whose each row is, a target's start, two rates, distillation."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import graftune as gt
from graftune.errors import AdapterError, SettingsError
from graftune.methods.multitaskprompt import MultitaskPromptTuning, distillation
from graftune.training.groups import parameter_groups
from tests.contract.subjects import logits, shake
from tests.families import FAMILIES
from tests.sites.test_embedding import SHORT, TEXT, close
from tests.training.models import examples
from tests.training.runs import trainer

THREE = MultitaskPromptTuning(length=3, tasks=3, r=2, train_head=False)


def attached(family: str, method: MultitaskPromptTuning = THREE, **options: Any) -> Any:
    model = FAMILIES[family].build(**options)
    adapter = gt.attach(model, method, name="many", seed=0)
    shake(adapter, seed=1, noise=0.5)
    return model, adapter


def parts(adapter: Any) -> dict[str, Tensor]:
    return {name.rpartition(".")[2]: t for name, t in adapter.state_dict().items()}


@pytest.mark.parametrize("family", TEXT)
def test_each_row_is_answered_under_its_own_tasks_prompt(family: str) -> None:
    model, adapter = attached(family)
    inputs = FAMILIES[family].inputs(batch=3)
    found = parts(adapter)
    alone: list[Tensor] = []
    for task in range(3):
        plain = gt.attach(model, gt.PromptTuning(length=3, train_head=False), name=f"task{task}")
        with torch.no_grad():
            next(plain.parameters()).copy_(found["tokens"] * (found["u"][task] @ found["v"][task]))
        alone.append(logits(model, inputs))
    gt.activate(model, "many")
    mixed = logits(model, {**inputs, "task_ids": torch.tensor([2, 0, 1])})
    for row, task in enumerate((2, 0, 1)):
        assert close(mixed[row], alone[task][row])
    with gt.using(model, "many", tasks=1):
        assert close(logits(model, inputs), alone[1])
        assert close(logits(model, {**inputs, "task_ids": [2, 0, 1]}), mixed, 0)  # goes before
    with gt.using(model, "many", tasks=[2, 0, 1]):
        assert torch.equal(logits(model, inputs), mixed)
    with gt.using(model, gt.Rows(["task1", "many", "task0"]), tasks=[0, 2, 0]):
        rows = logits(model, inputs)
    for row, task in enumerate((1, 2, 0)):
        assert close(rows[row], alone[task][row])


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_generates_each_row_under_its_task(family: str) -> None:
    model, _ = attached(family)
    inputs = FAMILIES[family].inputs()
    inputs = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    for options in ({}, {"use_cache": False}, {"num_beams": 2}):
        with gt.using(model, "many", tasks=[2, 1]):
            said = model.generate(**inputs, **SHORT, **options)
        for row, task in enumerate((2, 1)):
            with gt.using(model, "many", tasks=task):
                assert torch.equal(model.generate(**inputs, **SHORT, **options)[row], said[row])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "has 3 tasks: say whose each row is"),
        ({"task_ids": torch.tensor([0, 3])}, "Task 3 is not one of .* 0 to 2"),
        ({"task_ids": torch.tensor([0, -1])}, "Task -1 is not"),
        ({"task_ids": torch.tensor([0.0, 1.0])}, "one whole number"),
        ({"task_ids": torch.zeros(2, 2, dtype=torch.long)}, "one whole number"),
        ({"task_ids": torch.tensor([0, 1, 2])}, "3 tasks are given for a batch of 2"),
    ],
)
def test_rows_that_do_not_say_their_task(given: dict[str, Any], words: str) -> None:
    model, _ = attached("llama")
    with pytest.raises(AdapterError, match=words):
        model(**FAMILIES["llama"].inputs(), **given)
    model(**FAMILIES["llama"].inputs(), task_ids=0)  # nothing is left of the failed pass
    with pytest.raises(AdapterError, match="has 3 tasks"):
        model(**FAMILIES["llama"].inputs())


def test_tasks_that_do_not_fit_what_is_activated() -> None:
    model, _ = attached("llama")
    gt.attach(model, gt.PromptTuning(length=2), name="plain")
    with pytest.raises(AdapterError, match='Task 7 is not one of adapter "many"'):
        gt.activate(model, "many", tasks=7)
    with pytest.raises(AdapterError, match="none of the adapters that act has several tasks"):
        gt.activate(model, "plain", tasks=0)
    with pytest.raises(ValueError, match="task_ids"):  # transformers' own
        model.generate(**FAMILIES["llama"].inputs(), **SHORT, task_ids=torch.tensor([0, 1]))
    assert model(**FAMILIES["llama"].inputs(), task_ids=1).logits.shape[0] == 2  # has no tasks


def test_one_task_needs_no_saying() -> None:
    model = FAMILIES["llama"].build()
    gt.attach(model, MultitaskPromptTuning(length=3), name="one", seed=0)
    inputs = FAMILIES["llama"].inputs()
    plain = FAMILIES["llama"].build()
    gt.attach(plain, gt.PromptTuning(length=3), name="one", seed=0)
    assert torch.equal(logits(model, inputs), logits(plain, inputs))


@pytest.mark.parametrize("r", [1, 3])
def test_initial_values(r: int) -> None:
    model = FAMILIES["llama"].build()
    ones = MultitaskPromptTuning(length=200, tasks=2, r=r)
    found = parts(gt.attach(model, ones, seed=0))
    scale = found["u"] @ found["v"]
    assert torch.equal(scale, torch.ones(2, 200, 32))
    assert (r == 1) or found["u"][..., 1:].std().item() == pytest.approx(0.02, rel=0.1)
    model = FAMILIES["llama"].build()
    normal = parts(gt.attach(model, MultitaskPromptTuning(length=200, r=9, task_init="normal")))
    for name in "uv":
        assert normal[name].std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        (None, lambda u, v: u.mean(0) @ v.mean(0)),
        ("average", lambda u, v: u.mean(0) @ v.mean(0)),
        (2, lambda u, v: u[2] @ v[2]),
        ("shared", lambda u, v: torch.ones(3, 32)),
    ],
)
def test_a_target_starts_from_what_its_sources_learned(task: Any, expected: Any) -> None:
    model, sources = attached("llama")
    found = parts(sources)
    target = gt.attach(model, MultitaskPromptTuning(length=3, r=2, tasks=2), name="target")
    assert target.start_from(sources, task=task) is target
    made = parts(target)
    assert torch.equal(made["tokens"], found["tokens"])
    for k in range(2):
        torch.testing.assert_close(made["u"][k] @ made["v"][k], expected(found["u"], found["v"]))
    plain = gt.attach(model, gt.PromptTuning(length=3), name="plain").start_from(sources, task=task)
    torch.testing.assert_close(
        parts(plain)["tokens"], found["tokens"] * expected(found["u"], found["v"])
    )


def test_a_tasks_prompt_alone_answers_the_same() -> None:
    model, many = attached("bert")
    inputs = FAMILIES["bert"].inputs()
    with gt.using(model, "many", tasks=2):
        expected = logits(model, inputs)
    gt.attach(model, gt.PromptTuning(length=3, train_head=False), name="two").start_from(
        many, task=2
    )
    assert close(logits(model, inputs), expected)


def test_starts_from_an_ordinary_prompt_and_not_from_what_is_none() -> None:
    model = FAMILIES["bert"].build("classification")
    plain = gt.attach(model, gt.PromptTuning(length=3), name="plain", seed=0)
    shake(plain, seed=1)
    target = gt.attach(model, MultitaskPromptTuning(length=3), name="target", seed=1)
    head = {n: t.clone() for n, t in target.state_dict().items() if "classifier" in n}
    target.start_from(plain)
    assert torch.equal(parts(target)["tokens"], parts(plain)["tokens"])
    assert head
    assert all(torch.equal(target.state_dict()[name], value) for name, value in head.items())
    with pytest.raises(AdapterError, match="which has one task"):
        target.start_from(plain, task=1)
    with pytest.raises(AdapterError, match='"target" has 0 to 0, "average" and "shared"'):
        plain.start_from(target, task=3)
    longer = gt.attach(model, gt.PromptTuning(length=5), name="longer")
    with pytest.raises(AdapterError, match=r'No start from "plain".* is \(3, 32\), expected'):
        longer.start_from(plain)
    lora = gt.attach(model, gt.LoRA(), name="lora")
    with pytest.raises(AdapterError, match="has no virtual tokens"):
        target.start_from(lora)


def test_prompt_and_factors_learn_at_rates_of_their_own() -> None:
    model, adapter = attached("llama")
    groups = parameter_groups(model, [adapter], lr=0.3, weight_decay=0.01)
    found = parts(adapter)
    rates = {
        found_name: (group["lr"], group["weight_decay"])
        for group in groups
        for tensor in group["params"]
        for found_name, value in found.items()
        if value.data_ptr() == tensor.data_ptr()
    }
    assert rates["tokens"] == (0.3, 0.01)
    assert rates["u"] == rates["v"] == (pytest.approx(0.4), 0.0)


def test_files_and_copies_know_the_tasks(tmp_path: Path) -> None:
    model, adapter = attached("llama")
    inputs = {**FAMILIES["llama"].inputs(), "task_ids": torch.tensor([2, 1])}
    expected = logits(model, inputs)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin, inputs), expected)
    adapter.save(tmp_path / "many")
    fresh = FAMILIES["llama"].build()
    gt.load(fresh, tmp_path / "many")
    assert torch.equal(logits(fresh, inputs), expected)
    compiled: Any = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(**inputs).logits, expected)
    gt.activate(model, gt.Parallel("many", None))
    assert torch.equal(logits(model, inputs)[:2], expected)
    gt.activate(model, gt.Parallel("many", None), tasks=inputs.pop("task_ids"))
    assert torch.equal(logits(model, inputs)[:2], expected)


def test_a_detached_one_leaves_no_hook() -> None:
    model, _ = attached("llama")
    gt.activate(model, None)
    gt.detach(model, "many")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tasks": 0}, "tasks is 0"),
        ({"r": 0}, "r is 0"),
        ({"task_init": "one"}, "expected one of ones, normal"),
        ({"task_lr_ratio": -1}, "task_lr_ratio is -1"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        MultitaskPromptTuning(**settings)


def test_distillation_is_the_divergence_and_the_distance_of_states() -> None:
    torch.manual_seed(0)
    outputs = [
        SimpleNamespace(
            logits=torch.randn(2, 3, 5, requires_grad=True),
            hidden_states=(torch.randn(2, 3, 4), torch.randn(2, 3, 4)),
        )
        for _ in range(2)
    ]
    student, teacher = outputs
    p, q = (output.logits.softmax(-1) for output in (teacher, student))
    apart = (p * (p.log() - q.log())).sum(-1)
    pairs = zip(student.hidden_states, teacher.hidden_states, strict=True)
    states = torch.stack([F.mse_loss(a, b) for a, b in pairs]).mean()
    got = distillation(student, teacher)
    torch.testing.assert_close(got, apart.mean() + states)
    got.backward()
    assert student.logits.grad is not None
    assert teacher.logits.grad is None
    mask = torch.tensor([[1, 0, 0], [1, 1, 0]])
    only = distillation(SimpleNamespace(logits=student.logits), teacher, mask)
    torch.testing.assert_close(only, apart[mask.bool()].mean())


def test_a_trainer_gives_each_row_its_task(tmp_path: Path) -> None:
    model = FAMILIES["bert"].build("classification")
    method = MultitaskPromptTuning(length=3, tasks=2, train_head=False)
    adapter = gt.attach(model, method, name="task", seed=0)
    shake(adapter, seed=1)  # off its start, so that P has a part in every gradient
    before = {name: t.clone() for name, t in parts(adapter).items()}
    rows = [{**row, "task_ids": 1} for row in examples(8)]
    trainer(tmp_path, model=model, train_dataset=rows, num_train_epochs=1).train()
    after = parts(adapter)
    assert torch.equal(after["u"][0], before["u"][0])  # no row was of task 0
    for name in ("tokens", "u", "v"):
        assert not torch.equal(after[name], before[name])


def test_tasks_learn_apart_under_their_teachers() -> None:
    kind = FAMILIES["llama"]
    model, inputs = kind.build(), kind.inputs(batch=2)
    for seed, name in enumerate(("a", "b")):
        shake(gt.attach(model, gt.PromptTuning(length=3), name=name, seed=seed), seed, 0.5)
    adapter = gt.attach(model, MultitaskPromptTuning(length=3, tasks=2), name="many", seed=3)
    with gt.using(model, gt.Rows(["a", "b"])), torch.no_grad():
        teacher = model(**inputs, task_ids=torch.tensor([0, 1]), output_hidden_states=True)
    optimizer = torch.optim.Adam(adapter.method.param_groups(adapter, 0.02))
    losses: list[float] = []
    for _ in range(40):
        optimizer.zero_grad()
        student = model(**inputs, task_ids=torch.tensor([0, 1]), output_hidden_states=True)
        loss = distillation(student, teacher)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert not torch.equal(parts(adapter)["u"][0], parts(adapter)["u"][1])
