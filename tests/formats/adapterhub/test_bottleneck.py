"""Bottlenecks read from AdapterHub's files compute AdapterHub's equations, written here anew."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graftune as gt
from graftune.errors import FormatError
from tests.families import FAMILIES
from tests.formats.adapterhub.directories import (
    BLOCKS,
    BOTTLENECK,
    FORMS,
    WIDTH,
    bottlenecks,
    places,
    write,
)

# What a pre-norm block's sublayer sees before its norm, and the module that answers.
SPOTS = {
    "gpt2": ("transformer.h", {"attention": ("ln_1", "attn"), "ffn": ("ln_2", "mlp")}),
    "llama": (
        "model.layers",
        {
            "attention": ("input_layernorm", "self_attn"),
            "ffn": ("post_attention_layernorm", "mlp"),
        },
    ),
}
Inner = Callable[[Tensor], Tensor]


def inner(tensors: dict[str, Tensor], home: str, config: dict[str, Any]) -> Inner:
    """Returns A: z -> s (U phi(D z + c) + d)."""
    phi = {"relu": F.relu, "swish": F.silu}[config["non_linearity"]]
    own = {k.removeprefix(f"{home}.adapters.task."): t for k, t in tensors.items() if home in k}

    def compute(z: Tensor) -> Tensor:
        down = F.linear(z, own["adapter_down.0.weight"], own["adapter_down.0.bias"])
        up = F.linear(phi(down), own["adapter_up.weight"], own["adapter_up.bias"])
        return config["scaling"] * up

    return compute


def patch_post(output: Any, A: Inner, form: str) -> None:
    """Lets a post-norm block's output module compute what AdapterHub's does."""

    def forward(hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        h, x, norm = output.dense(hidden_states), input_tensor, output.LayerNorm
        if form == "seq_bn":
            return norm(h + A(norm(h + x)) + x)
        return norm(h + (A(h) if form == "double_seq_bn" else A(x)) + x)

    output.forward = forward


def patch_pre(norm: nn.Module, module: nn.Module, A: Inner, form: str) -> None:
    """Lets a pre-norm block's sublayer answer what AdapterHub's does."""
    seen: list[Tensor] = []
    norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))

    def after(_: nn.Module, args: Any, output: Any) -> Any:
        h, x = output if isinstance(output, Tensor) else output[0], seen.pop()
        new = h + {"seq_bn": A(h + x), "double_seq_bn": A(h), "par_bn": A(x)}[form]
        return new if isinstance(output, Tensor) else (new, *output[1:])

    module.register_forward_hook(after)


def patch(model: nn.Module, family: str, form: str, tensors: dict[str, Tensor]) -> None:
    config = BOTTLENECK | FORMS[form]
    kinds = ("attention", "ffn") if config["mh_adapter"] else ("ffn",)
    for (index, kind), home in places(family, kinds).items():
        A = inner(tensors, home, config)
        if family == "bert":
            patch_post(model.get_submodule(home), A, form)
        elif family == "t5":
            layer = model.get_submodule(home)
            name = "SelfAttention" if kind == "attention" else "DenseReluDense"
            patch_pre(layer.layer_norm, layer.get_submodule(name), A, form)  # type: ignore[arg-type]
        else:
            path, spots = SPOTS[family]
            block = model.get_submodule(f"{path}.{index}")
            norm, module = (block.get_submodule(name) for name in spots[kind])
            patch_pre(norm, module, A, form)


def logits(model: Any, family: str) -> Tensor:
    with torch.no_grad():
        return model(**FAMILIES[family].inputs()).logits


def load(path: Path, family: str, **options: Any) -> Any:
    model = FAMILIES[family].build()
    return gt.load(model, path, name="a", **options)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_it_computes_the_equations(family: str, form: str, tmp_path: Path) -> None:
    config = BOTTLENECK | FORMS[form]
    tensors = bottlenecks(family, config)
    loaded = load(write(tmp_path / "a", config, tensors, family), family).model
    reference = FAMILIES[family].build()
    plain = logits(reference, family)
    patch(reference, family, form, tensors)
    expected = logits(reference, family)
    assert (expected - plain).abs().max() > 1e-3
    torch.testing.assert_close(logits(loaded, family), expected, atol=1e-5, rtol=1e-5)


def test_names_of_the_bare_model_and_old_names_mean_the_same(tmp_path: Path) -> None:
    tensors = bottlenecks("bert", BOTTLENECK)
    expected = logits(
        load(write(tmp_path / "a", BOTTLENECK, tensors, "bert"), "bert").model, "bert"
    )
    bare = {name.removeprefix("bert."): tensor for name, tensor in tensors.items()}
    old = {k.replace(".adapters.", ".layer_text_task_adapters."): t for k, t in tensors.items()}
    for number, named in enumerate((bare, old)):
        found = load(write(tmp_path / str(number), BOTTLENECK, named, "bert"), "bert")
        assert torch.equal(logits(found.model, "bert"), expected)


def test_a_task_model_s_file_fits_the_bare_model(tmp_path: Path) -> None:
    path = write(tmp_path / "a", BOTTLENECK, bottlenecks("bert", BOTTLENECK), "bert")
    adapter = gt.load(FAMILIES["bert"].build().base_model, path)
    assert {graft.place.module for graft in adapter.grafts} == {
        f"encoder.layer.{index}.output.dropout" for index in range(BLOCKS)
    }


def test_old_module_names_of_vit_are_found(tmp_path: Path) -> None:
    config = BOTTLENECK | FORMS["double_seq_bn"]
    found = load(write(tmp_path / "a", config, bottlenecks("vit", config), "vit"), "vit")
    assert len(found.grafts) == 2 * BLOCKS


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, {"placement": "adapterhub", "skips": "answer"}),
        ({"residual_before_ln": False}, {"placement": "adapterhub", "skips": "read"}),
        ({"residual_before_ln": "post_add"}, {"placement": "adapterhub", "skips": "sum"}),
        ({"original_ln_before": False}, {"placement": "simple"}),
        ({"residual_before_ln": False, "original_ln_after": False}, {"placement": "result"}),
        ({"dropout": 0.1, "stochastic_depth": 0.2}, {"dropout": 0.1, "stochastic_depth": 0.2}),
        ({"non_linearity": "gelu_new"}, {"activation": "gelu_tanh"}),
        ({"leave_out": [0]}, {"layers": (1,)}),
        ({"init_weights": "mam_adapter"}, {"init": "zero-up"}),
    ],
    ids=str,
)
def test_settings_become_ours(
    flags: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    config = BOTTLENECK | flags
    tensors = bottlenecks("bert", config)
    left = [f".layer.{index}." for index in config["leave_out"]]
    kept = {k: t for k, t in tensors.items() if not any(block in k for block in left)}
    method = load(write(tmp_path / "a", config, kept, "bert"), "bert").method
    assert {name: getattr(method, name) for name in expected} == expected
    assert isinstance(method, gt.PfeifferAdapter)


def test_norms_gates_and_scales_are_read(tmp_path: Path) -> None:
    flags = {"ln_before": True, "ln_after": True, "use_gating": True, "scaling": "channel"}
    config, draw = BOTTLENECK | flags, torch.Generator().manual_seed(6)
    tensors: dict[str, Tensor] = {}
    for key, tensor in bottlenecks("bert", config).items():
        home = key.partition(".adapters.")[0] + ".adapters.task."
        tensors[key.replace("adapter_down.0", "adapter_down.1")] = tensor
        for name, shape in {
            "gate.weight": (1, WIDTH),
            "gate.bias": (1,),
            "scaling": (WIDTH,),
        }.items():
            tensors[home + name] = torch.randn(shape, generator=draw)
        for name in ("weight", "bias"):
            before = torch.randn(WIDTH, generator=draw)
            tensors[f"{home}adapter_norm_before.{name}"] = before
            tensors[f"{home}adapter_down.0.{name}"] = before.clone()
            tensors[f"{home}adapter_norm_after.{name}"] = torch.randn(WIDTH, generator=draw)
    adapter = load(write(tmp_path / "a", config, tensors, "bert"), "bert")
    own, home = adapter.state_dict(), "bert.encoder.layer.1.output.adapters.task."
    for name, theirs in {
        "before_weight": "adapter_norm_before.weight",
        "after_bias": "adapter_norm_after.bias",
        "down": "adapter_down.1.weight",
        "gate.weight": "gate.weight",
        "scale": "scaling",
    }.items():
        assert torch.equal(own[f"bert.encoder.layer.1.ffn.adapter.{name}"], tensors[home + theirs])


def test_a_bottleneck_is_at_least_one_wide(tmp_path: Path) -> None:
    config = BOTTLENECK | {"reduction_factor": {"0": 8, "default": 1000}}
    tensors = {
        name: tensor
        for k, block in ((4, ".layer.0."), (1, ".layer.1."))
        for name, tensor in bottlenecks("bert", config, k=k).items()
        if block in name
    }
    adapter = load(write(tmp_path / "a", config, tensors, "bert"), "bert")
    assert [graft.delta.down.shape[0] for graft in adapter.grafts] == [4, 1]


def test_words_of_old_files_are_spelt_out(tmp_path: Path) -> None:
    config = BOTTLENECK | FORMS["double_seq_bn"]
    tensors = bottlenecks("bert", config, k=2)
    method = load(write(tmp_path / "a", "houlsby", tensors, "bert"), "bert").method
    assert method == gt.HoulsbyAdapter(
        bottleneck=None,
        reduction=16,
        activation="silu",
        init="bert",
        train_norms=False,
        train_head=False,
    )


def test_gelu_without_a_version_is_todays_gelu_new(tmp_path: Path) -> None:
    config = BOTTLENECK | {"non_linearity": "gelu"}
    tensors = bottlenecks("bert", config)
    for version, expected in (("adapters.1.3.0", "gelu"), (None, "gelu_tanh"), ("3.2.1", "gelu")):
        path = write(tmp_path / str(version), config, tensors, "bert", version=version)
        assert load(path, "bert").method.activation == expected


@pytest.mark.parametrize(
    "flags",
    [
        {"original_ln_after": False, "original_ln_before": False},
        {"original_ln_after": False},
        {"original_ln_after": False, "is_parallel": True},
    ],
    ids=str,
)
def test_a_lost_residual_is_added_and_told(flags: dict[str, Any], tmp_path: Path) -> None:
    config = BOTTLENECK | flags
    path = write(tmp_path / "a", config, bottlenecks("bert", config), "bert")
    with pytest.warns(UserWarning, match="AdapterHub loses what the sublayer's answer is added to"):
        load(path, "bert")


def test_an_old_task_adapter_names_an_invertible_one_that_it_has_not(tmp_path: Path) -> None:
    config = BOTTLENECK | {"inv_adapter": "nice", "inv_adapter_reduction_factor": 2}
    tensors = bottlenecks("bert", config)
    path = write(tmp_path / "a", config, tensors, "bert", type="text_task")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(path, "bert")
    with pytest.raises(FormatError, match=r"8 missing: .*invertible\.F_down"):
        load(write(tmp_path / "b", config, tensors, "bert"), "bert")


def coupling(home: str, k: int = 8) -> dict[str, Tensor]:
    """Returns random tensors of an invertible adapter."""
    draw, half = torch.Generator().manual_seed(6), 16
    shapes = {"0.weight": (k, half), "0.bias": (k,), "2.weight": (half, k), "2.bias": (half,)}
    return {
        f"{home}.task.{which}.{name}": torch.randn(shape, generator=draw) * 0.3
        for which in "FG"
        for name, shape in shapes.items()
    }


NICE = {"inv_adapter": "nice", "inv_adapter_reduction_factor": 2}
OLD_NICE = {"invertible_adapter": {"block_type": "nice", "reduction_factor": 4}}


@pytest.mark.parametrize(
    ("settings", "home", "k"),
    [
        (NICE, "transformer.invertible_adapters", 8),
        (OLD_NICE, "transformer.invertible_lang_adapters", 4),
    ],
)
@pytest.mark.parametrize("wrote", ["GPT2LMHeadModel", "GPT2AdapterModel"])
def test_an_invertible_adapter_is_read_with_its_inverse_where_the_class_has_it(
    settings: dict[str, Any], home: str, k: int, wrote: str, tmp_path: Path
) -> None:
    config, tensors = BOTTLENECK | settings, coupling(home, k)
    every = tensors | bottlenecks("gpt2", config)
    adapter = load(write(tmp_path / "a", config, every, "gpt2", model_class=wrote), "gpt2")
    found, undone = adapter.state_dict(), wrote == "GPT2AdapterModel"
    assert adapter.method.undo_at_head is undone
    assert [g.place.module for g in adapter.grafts if "invertible" in str(dict(g.tensors()))] == [
        "transformer.drop",
        *(["lm_head"] if undone else []),
    ]
    assert torch.equal(found["invertible.F_down"], tensors[f"{home}.task.F.0.weight"])
    assert torch.equal(found["invertible.G_up_bias"], tensors[f"{home}.task.G.2.bias"])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"inv_adapter": "glow"}, r"an invertible adapter \('glow'\), expected one of the form"),
        ({}, r"an invertible adapter \(None\)"),
        (NICE | FORMS["par_bn"], "an invertible adapter beside parallel bottlenecks"),
    ],
)
def test_other_invertible_adapters_are_refused(
    settings: dict[str, Any], told: str, tmp_path: Path
) -> None:
    config = BOTTLENECK | settings
    tensors = bottlenecks("bert", config) | coupling("bert.invertible_adapters")
    with pytest.raises(FormatError, match=told):
        load(write(tmp_path / "a", config, tensors, "bert"), "bert")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"non_linearity": "geluu"}, 'activation "geluu" is unknown.*Did you mean "gelu"'),
        ({"phm_layer": True}, "lacks the tensors that all maps share"),
        ({"phm_layer": True, "phm_bias": False}, "is a Compacter with phm_bias=False"),
        ({"mh_adapter": None}, 'no "mh_adapter"'),
        ({"brand_new": 3}, '"brand_new" \\(3\\), written by AdapterHub adapters 1.3.0, is unknown'),
        ({"residual_before_ln": "post_add", "original_ln_before": False}, "post_add"),
        ({"reduction_factor": {"0": 4}}, "reduction has nothing for block 1"),
        ({"architecture": "mtl_lora"}, 'of kind "mtl_lora".*this version reads .*bottleneck'),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_refused(flags: dict[str, Any], told: str, tmp_path: Path) -> None:
    config = BOTTLENECK | flags
    path = write(tmp_path / "a", config, bottlenecks("bert", BOTTLENECK), "bert")
    model = FAMILIES["bert"].build()
    with pytest.raises(FormatError, match=told):
        gt.load(model, path)
    assert gt.adapters(model) == {}


def test_a_compacters_maps_are_sums_of_kronecker_products(tmp_path: Path) -> None:
    config = BOTTLENECK | {"phm_layer": True, "phm_dim": 4, "phm_rank": 1}
    draw, n, k = torch.Generator().manual_seed(7), 4, WIDTH // 4
    shapes = {
        "adapter_down.0.W_left": (n, WIDTH // n, 1),
        "adapter_down.0.W_right": (n, 1, k // n),
        "adapter_down.0.b": (k,),
        "adapter_up.W_left": (n, k // n, 1),
        "adapter_up.W_right": (n, 1, WIDTH // n),
        "adapter_up.b": (WIDTH,),
    }
    rule = torch.randn(n, n, n, generator=draw)
    tensors, maps = {"bert.shared_parameters.task.phm_rule": rule}, dict[str, Tensor]()
    for home in places("bert", ("ffn",)).values():
        own = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
        tensors |= {f"{home}.adapters.task.{name}": tensor for name, tensor in own.items()}
        for which in ("adapter_down.0", "adapter_up"):
            left, right = own[f"{which}.W_left"], own[f"{which}.W_right"]
            whole = sum(torch.kron(rule[i], left[i] @ right[i]) for i in range(n))
            assert isinstance(whole, Tensor)
            maps[f"{home}.adapters.task.{which}.weight"] = whole.t()
            maps[f"{home}.adapters.task.{which}.bias"] = own[f"{which}.b"]
    found = load(write(tmp_path / "a", config, tensors, "bert"), "bert")
    assert isinstance(found.method, gt.CompacterPlusPlus)
    reference = FAMILIES["bert"].build()
    patch(reference, "bert", "seq_bn", maps)
    torch.testing.assert_close(logits(found.model, "bert"), logits(reference, "bert"))


def test_sandwich_norms_are_refused(tmp_path: Path) -> None:
    tensors = bottlenecks("llama", BOTTLENECK)
    path = write(tmp_path / "a", BOTTLENECK, tensors, "llama", model_type="gemma2")
    with pytest.raises(FormatError, match="another block's norm"):
        load(path, "gemma2")
