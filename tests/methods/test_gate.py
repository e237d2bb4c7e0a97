"""Gates on LoRA, IA3 and bottlenecks: their equation, which tokens they see, what refuses them."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import graftune as gt
from graftune.errors import AdapterError, SettingsError
from graftune.sites import masks
from tests.contract.subjects import logits, shake
from tests.families import FAMILIES

GATED = {
    "lora": gt.LoRA(r=2, targets="qv", gate="mean"),
    "ia3": gt.IA3(targets="qv", feedforward=(), gate="mean"),
    "bottleneck": gt.PfeifferAdapter(reduction=8, gate="mean"),
}


def attached(method: Any, family: str = "bert", seed: int = 1) -> tuple[Any, gt.Adapter]:
    model = FAMILIES[family].build()
    adapter = gt.attach(model, method, "task", seed=seed)
    shake(adapter, seed, noise=0.3)
    return model, adapter


def recorded(model: Any, module: str, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns what a module is given and what it answers, adapters in it."""
    found: list[Any] = []
    handle = model.get_submodule(module).register_forward_hook(
        lambda _, args, output: found.append((args[0], output))
    )
    logits(model, inputs)
    handle.remove()
    return found[0]


@pytest.mark.parametrize("kind", ["mean", "mean-padded", "token"])
@pytest.mark.parametrize("times_scale", [False, True])
def test_a_gate_stands_in_the_place_of_loras_scale(kind: str, times_scale: bool) -> None:
    method = gt.LoRA(r=2, alpha=6, targets="query", gate=kind, gate_times_scale=times_scale)
    model, adapter = attached(method)
    module = "bert.encoder.layer.0.attention.self.query"
    inputs = FAMILIES["bert"].inputs(padding="right")
    x, y = recorded(model, module, inputs)
    own = {n.removeprefix(f"{module}."): t for n, t in adapter.state_dict().items() if module in n}
    G = torch.sigmoid(x @ own["gate.weight"].T + own["gate.bias"])  # (rows, tokens, 1)
    real = inputs["attention_mask"].bool()
    if kind == "mean":
        G = torch.stack([g[m].mean(0, keepdim=True) for g, m in zip(G, real, strict=True)])
    elif kind == "mean-padded":
        G = G.mean(1, keepdim=True)
    host = model.get_submodule(module)
    s = 3.0 if times_scale else 1.0
    expected = F.linear(x, host.weight, host.bias) + s * G * (x @ own["A"].T @ own["B"].T)
    assert torch.allclose(y, expected, atol=1e-6)


def test_a_gate_multiplies_the_scales_of_ia3() -> None:
    model, adapter = attached(gt.IA3(targets="query", feedforward=(), gate="token"))
    module = "bert.encoder.layer.1.attention.self.query"
    x, y = recorded(model, module, FAMILIES["bert"].inputs())
    own = {n.removeprefix(f"{module}."): t for n, t in adapter.state_dict().items() if module in n}
    host = model.get_submodule(module)
    G = torch.sigmoid(x @ own["gate.weight"].T + own["gate.bias"])
    assert torch.allclose(y, F.linear(x, host.weight, host.bias) * own["l"] * G, atol=1e-6)


@pytest.mark.parametrize("method", GATED)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_mean_of_real_tokens_doesnt_see_padding(method: str, side: Any) -> None:
    family, name = ("bert", "right") if side == "right" else ("gpt2", "left")
    if method == "ia3" and family == "gpt2":
        pytest.skip("GPT-2's query is a slice; bert says it of IA3")
    model, _ = attached(GATED[method], family)
    padded, alone = (FAMILIES[family].inputs(padding=p, length=7) for p in (name, None))
    short = {k: v[:1, :5] if v.ndim == 2 else v[:1] for k, v in alone.items()}
    one = logits(model, short)
    row = logits(model, padded)[:1]
    if family == "gpt2":
        row = row[:, 2:]
    assert torch.allclose(one, row, atol=1e-5)


def test_a_mean_over_padding_does_see_it() -> None:
    model, _ = attached(gt.LoRA(r=2, targets="qv", gate="mean-padded"))
    padded, alone = (FAMILIES["bert"].inputs(padding=p, length=7) for p in ("right", None))
    short = {k: v[:1, :5] if v.ndim == 2 else v[:1] for k, v in alone.items()}
    assert not torch.allclose(logits(model, short), logits(model, padded)[:1], atol=1e-4)


@pytest.mark.parametrize("method", GATED)
def test_a_row_of_mixed_rows_has_its_own_mask(method: str) -> None:
    model, _ = attached(GATED[method])
    other = gt.attach(model, GATED[method], "other", seed=3)
    shake(other, 4, noise=0.3)
    inputs = FAMILIES["bert"].inputs(batch=4, padding="right")
    with gt.using(model, gt.Rows(["other", "task", None, "task"])):
        mixed = logits(model, inputs)
    for row, name in enumerate(["other", "task", None, "task"]):
        with gt.using(model, name):
            alone = logits(model, inputs)[row]
        assert torch.allclose(mixed[row], alone, atol=1e-6)


def test_auto_is_a_mean_in_encoders_and_by_token_in_decoders() -> None:
    _, adapter = attached(gt.LoRA(r=2, targets="attention", gate="auto"), "t5")
    kinds = {
        ("decoder" in graft.place.module, graft.delta.gate.kind)  # type: ignore[union-attr]
        for graft in adapter.grafts
    }
    assert kinds == {(False, "mean"), (True, "token")}


def test_generate_with_an_encoders_masked_mean_is_the_row_alone() -> None:
    model, _ = attached(gt.LoRA(r=2, targets="attention", gate="auto"), "t5")
    inputs = FAMILIES["t5"].inputs(padding="right", length=7)
    asked = {k: v for k, v in inputs.items() if not k.startswith("decoder")}
    settings = {"max_new_tokens": 4, "do_sample": False}
    both = model.generate(**asked, **settings)
    alone = model.generate(**{k: v[:1, :5] for k, v in asked.items()}, **settings)
    assert torch.equal(both[0, : alone.shape[1]], alone[0])


def test_masks_are_of_the_pass_even_when_a_checkpoint_is_recomputed_after_another() -> None:
    model, adapter = attached(gt.LoRA(r=2, targets="attention", gate="mean"))
    first, second = FAMILIES["bert"].inputs(padding="right"), FAMILIES["bert"].inputs(seed=3)

    def gradients(checkpointed: bool) -> dict[str, Tensor]:
        model.train()
        model.zero_grad()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        losses = [model(**inputs).logits.square().sum() for inputs in (first, second)]
        sum(losses).backward()  # type: ignore[union-attr]
        model.gradient_checkpointing_disable()
        return {n: p.grad.clone() for n, p in adapter.named_parameters() if p.grad is not None}

    plain, again = gradients(False), gradients(True)
    assert plain.keys() == again.keys()
    assert all(torch.allclose(plain[n], again[n], atol=1e-5) for n in plain)


def test_masks_are_by_thread() -> None:
    seen: list[Any] = []
    with masks.seen_as(masks.Noted({"encoder": torch.ones(1, 2)})):
        thread = threading.Thread(target=lambda: seen.append(masks.noted().by_stack))
        thread.start()
        thread.join()
    assert seen == [{}]


def test_a_mask_that_doesnt_fit_is_refused() -> None:
    model, _ = attached(gt.LoRA(r=2, targets="qv", gate="mean"))
    inputs = FAMILIES["bert"].inputs()
    square = torch.ones(2, 1, 7, 7)
    with pytest.raises(AdapterError, match=r'attention_mask of \(rows, tokens\).*gate="token"'):
        model(**{**inputs, "attention_mask": square})


def test_a_mean_where_rows_are_flattened_is_refused() -> None:
    model, _ = attached(gt.LoRA(r=2, targets="up", gate="mean-padded"), "opt")
    with pytest.raises(AdapterError, match=r'tokens of all rows together.*take "token"'):
        logits(model, FAMILIES["opt"].inputs())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: gt.LoRA(gate="rows"), r"LoRA: gate is 'rows', expected one of auto, mean"),
        (lambda: gt.LoRA(gate="tokn"), r'Did you mean "token"'),
        (lambda: gt.LoRA(gate="mean", dora=True), "goes with neither dora, lora_bias nor init"),
        (lambda: gt.LoRA(gate="mean", init="pissa"), "goes with neither dora"),
        (lambda: gt.IA3(gate="mean"), r'name "up" in targets, and set feedforward=\(\)'),
        (lambda: gt.PfeifferAdapter(gate="all"), "PfeifferAdapter: gate is 'all'"),
    ],
)
def test_wrong_settings_are_refused(make: Any, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        make()


def test_a_gated_adapter_cant_be_merged_and_isnt_written_for_peft(tmp_path) -> None:
    for method in (GATED["lora"], GATED["ia3"]):
        model, adapter = attached(method)
        before = logits(model, FAMILIES["bert"].inputs(padding="right"))
        with pytest.raises(AdapterError, match="can't be merged: its gates"):
            gt.merge(model, "task")
        folder = adapter.save(tmp_path / method.name)
        fresh = FAMILIES["bert"].build()
        gt.load(fresh, folder)
        assert torch.equal(logits(fresh, FAMILIES["bert"].inputs(padding="right")), before)


def test_gates_of_embeddings_and_experts_are_refused() -> None:
    with pytest.raises(SettingsError, match="is no linear, and can't be gated"):
        gt.attach(FAMILIES["bert"].build(), gt.LoRA(targets="embeddings", gate="token"), "a")
    with pytest.raises(SettingsError, match="a gate and init"):
        gt.attach(FAMILIES["mixtral"].build(), gt.LoRA(r=2, gate="token"), "a")
