"""Invertible adapters: the coupling by hand at the embeddings, and its inverse before the head."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

import graftune as gt
from graftune.anatomy.entrance import find_entrance
from graftune.errors import SettingsError
from graftune.methods._bottleneck import SerialMethod
from tests.contract.subjects import logits, scores, shake
from tests.families import FAMILIES

TENSORS = [f"{w}_{n}" for w in "FG" for n in ("down", "down_bias", "up", "up_bias")]


def coupled(family: str, name: str = "default", seed: int = 1, **settings: Any) -> Any:
    """Returns a model with a coupling off its start, and bottlenecks that do nothing yet."""
    model = settings.pop("model", None) or FAMILIES[family].build()
    method = gt.PfeifferAdapter(reduction=8, init="zero-up", invertible=True, **settings)
    adapter = gt.attach(model, method, name, seed=0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, tensor in adapter.named_parameters():
            if key.startswith("invertible."):
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return model, adapter


def own_of(adapter: gt.Adapter) -> dict[str, Tensor]:
    """Returns the coupling's tensors by their own names."""
    found = adapter.state_dict()
    return {name: found[f"invertible.{name}"] for name in TENSORS}


def part(own: dict[str, Tensor], which: str, z: Tensor) -> Tensor:
    inner = torch.relu(z @ own[f"{which}_down"].t() + own[f"{which}_down_bias"])
    return inner @ own[f"{which}_up"].t() + own[f"{which}_up_bias"]


def couple(own: dict[str, Tensor], x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    first = x[..., :half] + part(own, "F", x[..., half:])
    return torch.cat([first, x[..., half:] + part(own, "G", first)], -1)


def uncouple(own: dict[str, Tensor], y: Tensor) -> Tensor:
    half = y.shape[-1] // 2
    second = y[..., half:] - part(own, "G", y[..., :half])
    return torch.cat([y[..., :half] - part(own, "F", second), second], -1)


def by_hand(family: str, model: Any, *owns: dict[str, Tensor], undo: bool = True) -> Tensor:
    """Returns the logits of a plain model whose embeddings are coupled and head's input isn't."""
    parts = gt.anatomy(model)
    path = find_entrance(model, parts)
    assert path is not None

    def change(_: Any, __: Any, output: Tensor) -> Tensor:
        for own in owns:
            output = couple(own, output)
        return output

    def restore(_: Any, args: Any) -> Any:
        x = args[0]
        for own in reversed(owns):
            x = uncouple(own, x)
        return (x, *args[1:])

    model.get_submodule(path).register_forward_hook(change)
    if undo and parts.output_embeddings is not None:
        model.get_submodule(parts.output_embeddings).register_forward_pre_hook(restore)
    return logits(model, FAMILIES[family].inputs())


WITH_TOKENS = ("bert", "gpt2", "llama", "gemma2", "t5", "bart", "bloom", "distilbert", "clip")


@pytest.mark.parametrize("family", WITH_TOKENS)
def test_embeddings_are_coupled_and_the_heads_input_is_not(family: str) -> None:
    model, adapter = coupled(family)
    base = logits(FAMILIES[family].build(), FAMILIES[family].inputs())
    found = logits(model, FAMILIES[family].inputs())
    expected = by_hand(family, FAMILIES[family].build(), own_of(adapter))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
    assert (found - base).abs().max() > 1e-3


def test_a_masked_language_models_head_is_one() -> None:
    config = FAMILIES["bert"].config()
    torch.manual_seed(0)
    model: Any = transformers.BertForMaskedLM(config).eval()
    plain = copy.deepcopy(model)
    _, adapter = coupled("bert", model=model)
    assert adapter.grafts[-1].place.module == "cls.predictions.decoder"
    expected = by_hand("bert", plain, own_of(adapter))
    torch.testing.assert_close(
        logits(model, FAMILIES["bert"].inputs()), expected, atol=2e-5, rtol=2e-5
    )


def test_the_inverse_at_the_head_can_be_left_out() -> None:
    model, adapter = coupled("llama", undo_at_head=False)
    expected = by_hand("llama", FAMILIES["llama"].build(), own_of(adapter), undo=False)
    torch.testing.assert_close(
        logits(model, FAMILIES["llama"].inputs()), expected, atol=2e-5, rtol=2e-5
    )


def test_the_inverse_gives_back_what_was_coupled() -> None:
    _, adapter = coupled("llama")
    x = torch.randn(2, 5, 32)
    coupling: Any = adapter.grafts[-1].delta.common.invertible  # type: ignore[union-attr]
    with torch.no_grad():
        torch.testing.assert_close(coupling(x), couple(own_of(adapter), x))
        assert (coupling(x) - x).abs().max() > 0.1
        torch.testing.assert_close(coupling.inverse(coupling(x)), x, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(coupling(coupling.inverse(x)), x, atol=1e-5, rtol=1e-5)


def test_several_are_taken_back_in_reverse() -> None:
    model, first = coupled("llama", "language", seed=1)
    _, second = coupled("llama", "task", seed=2, model=model)
    for adapters in ((first, second), (second, first)):
        expected = by_hand("llama", FAMILIES["llama"].build(), *map(own_of, adapters))
        with gt.using(model, gt.Stack(*(a.name for a in adapters))):
            found = logits(model, FAMILIES["llama"].inputs())
        torch.testing.assert_close(found, expected, atol=3e-5, rtol=3e-5)


def test_what_else_changes_the_heads_input_does_so_before() -> None:
    model, adapter = coupled("llama", "language")
    scales = gt.IA3(targets=(), feedforward=("lm_head",))
    shake(gt.attach(model, scales, "scales"), seed=3, noise=0.3)
    found = [
        with_stack(model, *names) for names in (("language", "scales"), ("scales", "language"))
    ]
    assert torch.equal(*found)
    plain = FAMILIES["llama"].build()
    l_ff = next(iter(gt.adapters(model)["scales"].parameters())).detach()
    plain.lm_head.register_forward_pre_hook(lambda _, args: (args[0] * l_ff,))
    expected = by_hand("llama", plain, own_of(adapter))
    torch.testing.assert_close(found[0], expected, atol=2e-5, rtol=2e-5)


def with_stack(model: Any, *names: str) -> Tensor:
    with gt.using(model, gt.Stack(*names)):
        return logits(model, FAMILIES["llama"].inputs())


def test_rows_and_dropped_blocks_have_their_own() -> None:
    model, first = coupled("llama", "a", seed=1)
    coupled("llama", "b", seed=2, model=model)
    inputs = FAMILIES["llama"].inputs(batch=3)
    with gt.using(model, gt.Rows(["b", None, "a"])):
        mixed = logits(model, inputs)
    for row, name in enumerate(["b", None, "a"]):
        with gt.using(model, name):
            torch.testing.assert_close(mixed[row], logits(model, inputs)[row])
    shake(first, seed=4)
    gt.activate(model, "a", drop=2)  # both blocks' bottlenecks; the embeddings are no block
    expected = by_hand("llama", FAMILIES["llama"].build(), own_of(first))
    norm = dict(first.named_parameters())
    assert not any("norm" in name for name in norm)
    torch.testing.assert_close(
        logits(model, FAMILIES["llama"].inputs()), expected, atol=3e-5, rtol=3e-5
    )


@pytest.mark.parametrize(
    "method",
    [
        gt.PfeifferAdapter(reduction=8, init="zero-up", invertible=True),
        gt.HoulsbyAdapter(bottleneck=4, init="zero-up", invertible=True),
        gt.Compacter(bottleneck=4, init="zero-up", invertible=True),
    ],
)
def test_it_starts_as_the_base_and_counts(method: SerialMethod) -> None:
    model, inputs = FAMILIES["gpt2"].build(), FAMILIES["gpt2"].inputs()
    base, parts = logits(model, inputs), gt.anatomy(model)
    without = type(method).from_dict({**method.to_dict(), "invertible": False})
    extra = 2 * (2 * 16 * 8 + 16 + 8)
    assert method.count(model, parts) == without.count(model, parts) + extra
    adapter = gt.attach(model, method)
    assert adapter.count() == method.count(FAMILIES["gpt2"].build(), parts)
    assert torch.equal(logits(model, inputs), base)
    assert gt.summary(model).changed == sum(
        t.numel() for n, t in adapter.named_parameters() if ".ln_" in n
    )


def test_its_own_reduction_gives_its_width() -> None:
    _, adapter = coupled("bert", invertible_reduction=4)
    assert own_of(adapter)["F_down"].shape == (4, 16)
    assert own_of(coupled("bert", invertible_reduction=100)[1])["G_down"].shape == (1, 16)


@pytest.mark.parametrize("family", ["opt", "vit", "whisper"])
def test_models_without_embedded_tokens_are_refused(family: str) -> None:
    model = FAMILIES[family].build()
    with pytest.raises(SettingsError, match="PfeifferAdapter: invertible acts on token embeddings"):
        gt.attach(model, gt.PfeifferAdapter(reduction=8, invertible=True))
    assert gt.adapters(model) == {}


def test_a_width_that_is_odd_is_refused() -> None:
    sizes = {"hidden_size": 33, "num_attention_heads": 3}
    with pytest.raises(SettingsError, match="embeddings are 33 wide"):
        gt.attach(FAMILIES["bert"].build(**sizes), gt.PfeifferAdapter(invertible=True))


def test_saved_copied_and_taken_off_it_is_the_same(tmp_path: Any) -> None:
    model, adapter = coupled("t5")
    inputs, base = FAMILIES["t5"].inputs(), FAMILIES["t5"].build()
    expected = logits(model, inputs)
    adapter.save(tmp_path / "task")
    fresh = FAMILIES["t5"].build()
    gt.load(fresh, tmp_path / "task")
    for twin in (fresh, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin, inputs), expected)
    gt.activate(model, None)
    assert torch.equal(logits(model, inputs), logits(base, inputs))
    gt.detach(model, "default")
    assert list(model.state_dict()) == list(base.state_dict())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(family: str, reentrant: bool) -> None:
    found: list[dict[str, Tensor]] = []
    for checkpointed in (False, True):
        model, adapter = coupled(family)
        model.train()
        shake(adapter, seed=5)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        scores(model(**FAMILIES[family].inputs())).float().pow(2).mean().backward()
        found.append({n: t.grad for n, t in adapter.named_parameters() if t.grad is not None})
    plain, again = found
    assert {f"invertible.{name}" for name in TENSORS} <= plain.keys()
    assert plain.keys() == again.keys()
    for name, gradient in again.items():
        torch.testing.assert_close(gradient, plain[name], atol=1e-6, rtol=1e-4)


def test_it_generates_with_and_without_a_cache() -> None:
    model, _ = coupled("llama")
    options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    inputs = FAMILIES["llama"].inputs()
    cached = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, use_cache=False, **options), cached)


def test_bf16_hosts_keep_their_dtype_and_start_as_they_were() -> None:
    model, inputs = FAMILIES["llama"].build(dtype=torch.bfloat16), FAMILIES["llama"].inputs()
    base = logits(model, inputs)
    adapter = gt.attach(model, gt.PfeifferAdapter(reduction=8, init="zero-up", invertible=True))
    assert {t.dtype for t in adapter.parameters()} == {torch.float32}
    assert torch.equal(logits(model, inputs), base)


def test_compiled_it_is_the_same() -> None:
    model, _ = coupled("llama")
    inputs = FAMILIES["llama"].inputs()
    expected = logits(model, inputs)
    compiled: Any = torch.compile(model, backend="eager")
    torch.testing.assert_close(logits(compiled, inputs), expected)


def test_training_learns() -> None:
    model = FAMILIES["llama"].build()
    method = gt.PfeifferAdapter(reduction=4, invertible=True)
    adapter = gt.attach(model, method, seed=0)
    inputs = FAMILIES["llama"].inputs(batch=4)
    start = {n: t.clone() for n, t in own_of(adapter).items()}
    optimizer = torch.optim.Adam(list(adapter.parameters()), lr=0.02)
    losses: list[float] = []
    for _ in range(20):
        output = model(**inputs).logits[:, :-1]
        loss = F.cross_entropy(output.flatten(0, 1), inputs["input_ids"][:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert not any(torch.equal(t, start[n]) for n, t in own_of(adapter).items())
