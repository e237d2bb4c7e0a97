"""LoRA, DoRA, VeRA and (IA)3 read from AdapterHub's files: the weights they stand for, written out.

Each reference is the plain model with other weights (and biases) in it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftune as gt
from graftune.errors import BaseMismatchError, FormatError
from tests.families import FAMILIES
from tests.formats.adapterhub.directories import IA3, LORA, WIDTH, write

# Linears below a block by what their tensors in the file hang on: query, key, value, up, down.
LINEARS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "bert": (
        ("bert.encoder.layer.0", "bert.encoder.layer.1"),
        {
            "q": "attention.self.query",
            "k": "attention.self.key",
            "v": "attention.self.value",
            "up": "intermediate.dense",
            "down": "output.dense",
        },
    ),
    "llama": (
        ("model.layers.0", "model.layers.1"),
        {
            "q": "self_attn.q_proj",
            "k": "self_attn.k_proj",
            "v": "self_attn.v_proj",
            "up": "mlp.down_proj",  # AdapterHub's name for LLaMA's is the other way round
            "down": "mlp.up_proj",
        },
    ),
    "t5": (
        ("encoder.block.0", "encoder.block.1"),
        {
            "q": "layer.0.SelfAttention.q",
            "k": "layer.0.SelfAttention.k",
            "v": "layer.0.SelfAttention.v",
            "up": "layer.1.DenseReluDense.wi",
            "down": "layer.1.DenseReluDense.wo",
        },
    ),
}
_DECODER = {
    "q": ("layer.0.SelfAttention.q", "layer.1.EncDecAttention.q"),
    "k": ("layer.0.SelfAttention.k", "layer.1.EncDecAttention.k"),
    "v": ("layer.0.SelfAttention.v", "layer.1.EncDecAttention.v"),
    "up": ("layer.2.DenseReluDense.wi",),
    "down": ("layer.2.DenseReluDense.wo",),
}
ALL = {"attn_matrices": ["q", "k", "v"], "intermediate_lora": True, "output_lora": True}
Draw = Callable[..., Tensor]


def drawn() -> Draw:
    generator = torch.Generator().manual_seed(4)
    return lambda *shape: torch.randn(shape, generator=generator) * 0.3


def wanted(config: dict[str, Any]) -> list[str]:
    flags = {"up": config["intermediate_lora"], "down": config["output_lora"]}
    return [*config["attn_matrices"], *(name for name, on in flags.items() if on)]


def paths(family: str, config: dict[str, Any]) -> list[str]:
    blocks, names = LINEARS[family]
    found = [f"{block}.{names[name]}" for block in blocks for name in wanted(config)]
    if family == "t5":
        found += [
            f"decoder.block.{index}.{path}"
            for index in range(2)
            for name in wanted(config)
            for path in _DECODER[name]
        ]
    return found


def lora_tensors(family: str, config: dict[str, Any]) -> dict[str, Tensor]:
    """Returns random A and B of every linear that the settings name; of (IA)3 B alone."""
    model, draw, r = FAMILIES[family].build(), drawn(), config["r"]
    tensors: dict[str, Tensor] = {}
    for path in paths(family, config):
        out, fan_in = model.get_submodule(path).weight.shape  # type: ignore[union-attr,misc]
        if config["composition_mode"] == "add":
            tensors[f"{path}.loras.task.lora_A"] = draw(r, fan_in)
        tensors[f"{path}.loras.task.lora_B"] = draw(out, r)
        if config["use_dora"]:
            tensors[f"{path}.loras.task.m.weight"] = draw(out, 1).abs() + 0.5
    return tensors


def merged(family: str, tensors: dict[str, Tensor], config: dict[str, Any]) -> nn.Module:
    """Returns the base with the changes in its weights."""
    model, s = FAMILIES[family].build(), config["alpha"] / config["r"]
    for path in paths(family, config):
        host: Any = model.get_submodule(path)
        own = {n.partition(".loras.task.")[2]: t for n, t in tensors.items() if f"{path}." in n}
        with torch.no_grad():
            if config["composition_mode"] == "scale":
                host.weight *= own["lora_B"]
                if host.bias is not None:
                    host.bias *= own["lora_B"].flatten()
                continue
            change = own["lora_B"] @ own["lora_A"]
            if not config["use_dora"]:
                host.weight += s * change
                continue
            f = own["m.weight"].flatten() / (host.weight + change).norm(dim=1)
            host.weight.copy_(f[:, None] * (host.weight + s * change))
            if host.bias is not None:
                host.bias *= f
    return model


def logits(model: Any, family: str) -> Tensor:
    with torch.no_grad():
        return model(**FAMILIES[family].inputs()).logits


def load(path: Path, family: str) -> gt.Adapter:
    return gt.load(FAMILIES[family].build(), path, name="a")


def check(found: gt.Adapter, reference: nn.Module, family: str) -> None:
    plain, expected = logits(FAMILIES[family].build(), family), logits(reference, family)
    assert (expected - plain).abs().max() > 1e-3
    torch.testing.assert_close(logits(found.model, family), expected, atol=2e-5, rtol=1e-5)
    gt.merge(found.model, found.name)
    torch.testing.assert_close(logits(found.model, family), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "config",
    [LORA, LORA | ALL, LORA | {"use_dora": True}, LORA | ALL | {"use_dora": True}, IA3],
    ids=["lora", "all", "dora", "dora all", "ia3"],
)
@pytest.mark.parametrize("family", LINEARS)
def test_it_computes_the_equations(family: str, config: dict[str, Any], tmp_path: Path) -> None:
    tensors = lora_tensors(family, config)
    found = load(write(tmp_path / "a", config, tensors, family), family)
    check(found, merged(family, tensors, config), family)


def gated(family: str, tensors: dict[str, Tensor], config: dict[str, Any]) -> nn.Module:
    """Returns the base with hooks that compute the gated equations, means over all tokens."""
    model = FAMILIES[family].build()

    def hook(own: dict[str, Tensor]) -> Any:
        def changed(host: nn.Module, args: Any, y: Tensor) -> Tensor:
            x = args[0]
            G = torch.sigmoid(x @ own["gate.weight"].T + own["gate.bias"]).mean(1, keepdim=True)
            if config["composition_mode"] == "scale":
                return y * own["lora_B"].flatten() * G
            return y + G * (x @ own["lora_A"].T @ own["lora_B"].T)

        return changed

    for path in paths(family, config):
        own = {n.partition(".loras.task.")[2]: t for n, t in tensors.items() if f"{path}." in n}
        model.get_submodule(path).register_forward_hook(hook(own))
    return model


@pytest.mark.parametrize("config", [LORA | ALL, IA3], ids=["lora", "ia3"])
@pytest.mark.parametrize("family", LINEARS)
def test_gates_stand_in_the_place_of_alpha(
    family: str, config: dict[str, Any], tmp_path: Path
) -> None:
    config = config | {"use_gating": True, "alpha": 5}
    tensors, draw = lora_tensors(family, config), drawn()
    for path in paths(family, config):
        fan_in = FAMILIES[family].build().get_submodule(path).weight.shape[1]  # type: ignore[union-attr]
        tensors[f"{path}.loras.task.gate.weight"] = draw(1, fan_in)  # type: ignore[arg-type]
        tensors[f"{path}.loras.task.gate.bias"] = draw(1)
    found = load(write(tmp_path / "a", config, tensors, family), family)
    plain, expected = (
        logits(model, family)
        for model in (FAMILIES[family].build(), gated(family, tensors, config))
    )
    assert (expected - plain).abs().max() > 1e-3
    torch.testing.assert_close(logits(found.model, family), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("letters", [["q", "v"], ["q", "k", "v"], ["v"]], ids="".join)
@pytest.mark.parametrize("mode", ["add", "scale"])
def test_gpt2s_linear_holds_one_change_for_each_letter(
    mode: str, letters: list[str], tmp_path: Path
) -> None:
    config = (LORA if mode == "add" else IA3) | {
        "attn_matrices": letters,
        "intermediate_lora": False,
    }
    draw, r, model = drawn(), config["r"], FAMILIES["gpt2"].build()
    reference, tensors = FAMILIES["gpt2"].build(), dict[str, Tensor]()
    for index in range(2):
        path = f"transformer.h.{index}.attn.c_attn"
        host: Any = reference.get_submodule(path)
        A, B = draw(r * len(letters), WIDTH), draw(WIDTH * len(letters), r)
        tensors[f"{path}.loras.task.lora_B"] = B
        if mode == "add":
            tensors[f"{path}.loras.task.lora_A"] = A
        for at, letter in enumerate(letters):
            columns = slice("qkv".index(letter) * WIDTH, ("qkv".index(letter) + 1) * WIDTH)
            own_A, own_B = A[at * r : (at + 1) * r], B[at * WIDTH : (at + 1) * WIDTH]
            with torch.no_grad():
                if mode == "add":
                    host.weight[:, columns] += config["alpha"] / r * (own_B @ own_A).t()
                else:
                    host.weight[:, columns] *= own_B.t()
                    host.bias[columns] *= own_B.flatten()
    found = gt.load(model, write(tmp_path / "a", config, tensors, "gpt2"), name="a")
    own = found.save(tmp_path / "own")
    again = gt.load(FAMILIES["gpt2"].build(), own, name="a")
    assert torch.equal(logits(again.model, "gpt2"), logits(model, "gpt2"))
    check(found, reference, "gpt2")


def test_vera_is_read_as_the_lora_that_it_is(tmp_path: Path) -> None:
    config, draw = LORA | {"vera_d": 0.1, "vera_b": 0.0}, drawn()
    A, B = draw(3, WIDTH), draw(WIDTH, 3)
    tensors = {"bert.shared_parameters.task.lora_A": A, "bert.shared_parameters.task.lora_B": B}
    reference = FAMILIES["bert"].build()
    for path in paths("bert", config):
        D, V = draw(3, 3), draw(WIDTH, WIDTH)
        tensors |= {f"{path}.loras.task.vera_D": D, f"{path}.loras.task.vera_B": V}
        with torch.no_grad():
            reference.get_submodule(path).weight += 2 * V @ B @ D @ A  # type: ignore[operator]
    path = write(tmp_path / "a", config, tensors, "bert")
    found = load(path, "bert")
    assert isinstance(found.method, gt.LoRA)
    check(found, reference, "bert")
    forgotten = {name: t for name, t in tensors.items() if "shared_parameters" not in name}
    with pytest.raises(FormatError, match="forgets to save"):
        load(write(tmp_path / "b", config, forgotten, "bert"), "bert")


def test_before_1_1_there_was_no_scale(tmp_path: Path) -> None:
    tensors = lora_tensors("bert", LORA)
    for version, alpha in (("adapters.1.0.1", 3), ("adapters.1.1.0", 6), ("3.2.1", 6)):
        path = write(tmp_path / version, LORA, tensors, "bert", version=version)
        method = load(path, "bert").method
        assert isinstance(method, gt.LoRA)
        assert method.alpha == alpha


@pytest.mark.parametrize(
    ("family", "config", "targets"),
    [
        ("bert", LORA, ("query", "value")),
        ("bert", IA3, ("key", "value", "up")),
        ("llama", LORA | ALL, ("query", "key", "value", "up", "down")),
        ("t5", LORA, ("query", "value")),
    ],
)
def test_targets_are_roles_where_they_can_be(
    family: str, config: dict[str, Any], targets: tuple[str, ...], tmp_path: Path
) -> None:
    path = write(tmp_path / "a", config, lora_tensors(family, config), family)
    method: Any = load(path, family).method
    assert set(method.targets) == set(targets)


def test_what_comes_from_vits_old_names(tmp_path: Path) -> None:
    config, draw, tensors = LORA | ALL, drawn(), dict[str, Tensor]()
    hidden = FAMILIES["vit"].build().config.intermediate_size
    names = {f"attention.attention.{n}": (WIDTH, WIDTH) for n in ("query", "key", "value")}
    names |= {"intermediate.dense": (WIDTH, hidden), "output.dense": (hidden, WIDTH)}
    for index in range(2):
        for name, (fan_in, out) in names.items():
            at = f"vit.encoder.layer.{index}.{name}.loras.task"
            tensors |= {f"{at}.lora_A": draw(3, fan_in), f"{at}.lora_B": draw(out, 3)}
    found = load(write(tmp_path / "a", config, tensors, "vit"), "vit")
    own = found.state_dict()
    for theirs, ours in {
        "attention.attention.key": "attention.k_proj",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
    }.items():
        given = tensors[f"vit.encoder.layer.1.{theirs}.loras.task.lora_B"]
        assert torch.equal(own[f"vit.layers.1.{ours}.B"], given)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"use_gating": True}, "8 missing: .*gate.weight"),
        ({"attn_matrices": ["q", "k", "v"]}, "ask for key, query, value matrices"),
        ({"intermediate_lora": True}, "and 1 of each feed-forward"),
        ({"use_dora": True}, "4 missing: .*m.weight"),
        ({"composition_mode": "scale"}, "4 unexpected: .*lora_A"),
    ],
    ids=str,
)
def test_tensors_that_settings_do_not_name(
    changed: dict[str, Any], told: str, tmp_path: Path
) -> None:
    tensors = lora_tensors("bert", LORA)
    with pytest.raises(FormatError, match=told):
        load(write(tmp_path / "a", LORA | changed, tensors, "bert"), "bert")


def test_another_rank_or_width_is_refused(tmp_path: Path) -> None:
    tensors = lora_tensors("bert", LORA)
    with pytest.raises(BaseMismatchError, match=r"lora_A\" is \(3, 32\), this model needs \(5, 32"):
        load(write(tmp_path / "a", LORA | {"r": 5}, tensors, "bert"), "bert")
    model = FAMILIES["bert"].build(hidden_size=16, num_attention_heads=2)
    with pytest.raises(BaseMismatchError, match=r"this model needs \(3, 16\)"):
        gt.load(model, write(tmp_path / "b", LORA, tensors, "bert"))
    assert gt.adapters(model) == {}
