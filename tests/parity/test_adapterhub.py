"""AdapterHub's own outputs: what it wrote and computed, loaded here and computed again.

The fixtures, made with `adapters` 1.3.0, lie outside the project; each architecture has a base, its
inputs, and a directory for each case:

    ARCH/base  ARCH/inputs.safetensors ("VARIANT/ARGUMENT")
    ARCH/CASE/adapter_NAME  ARCH/CASE/fusion  ARCH/CASE/case.json
    ARCH/CASE/outputs.safetensors ("eager/VARIANT/logits")
"""

from __future__ import annotations

import copy
import functools
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import graftune as gt
from graftune.anatomy.modules import is_in
from graftune.formats.adapterhub.writing import save

ROOT = os.environ.get("GRAFTUNE_ADAPTERHUB_FIXTURES")
TOLERANCE = 1e-5
ARCHITECTURES = ("bert", "gpt2", "llama", "t5", "vit")

pytestmark = pytest.mark.skipif(
    ROOT is None, reason="GRAFTUNE_ADAPTERHUB_FIXTURES names no folder of AdapterHub's outputs"
)

OVER_N_TWICE = "AdapterHub's bug: Average divides by the number of members twice, h included"
CHAIN = "AdapterHub's Stack of LoRAs is a chain, the second reading the first's change; ours adds"
LEFT_OUT: dict[str, str] = {
    "average": OVER_N_TWICE,
    "stack_lora": CHAIN,
    "flex_head": "has a test of its own",
}
"""Cases that aren't compared, of one architecture or of all, and why."""
REWRITTEN = (
    *("vera", "prefix_tuning", "prefix_tuning_gated", "stack_prefix", "parallel_prefix"),
    *("mam", "unipelt", "loreft", "noreft"),
)
"""Cases whose tensors become others when read: VeRA a LoRA, an MLP the prefix that it makes; of
LoReFT the basis is another, of NoReFT the intervention at no tokens."""


def _cases() -> list[tuple[str, str]]:
    if ROOT is None:
        return [("none", "none")]
    found = sorted(Path(ROOT).glob("*/*/case.json"))
    return [(case.parts[-3], case.parts[-2]) for case in found if case.parts[-3] in ARCHITECTURES]


@functools.cache
def _base(arch: str) -> Any:
    folder = Path(str(ROOT)) / arch / "base"
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(folder, attn_implementation="eager").eval()


def _inputs(arch: str, variant: str) -> dict[str, Tensor]:
    every = load_file(Path(str(ROOT)) / arch / "inputs.safetensors")
    return {k.partition("/")[2]: t for k, t in every.items() if k.startswith(f"{variant}/")}


def _logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def _composition(setup: str) -> Any:
    """Returns what AdapterHub's text of a setup means here: "Stack[lang, Fuse[a, b]]"."""
    made = {
        "Stack": gt.Stack,
        "Fuse": gt.Fuse,
        "Parallel": gt.Parallel,
        "BatchSplit": lambda a, b: gt.Rows([a, b, b, b]),  # batch_sizes=[1, 3]
        "Average": lambda a, b: gt.Average(a, b, weights=(0.3 / 2, 0.7 / 2)),  # see OVER_N_TWICE
    }
    text = setup.replace("[", "(").replace("]", ")")
    return eval(text, {"a": "a", "b": "b", "lang": "lang", **made})


def _shut(adapters: dict[str, gt.Adapter], blocks: Sequence[int]) -> None:
    """Lets bottlenecks in some blocks add nothing, as if there were none."""
    for adapter in adapters.values():
        inside = {block.path for block in adapter.anatomy.blocks if block.index in blocks}
        for name, tensor in adapter.named_parameters():
            if name.endswith((".up", ".up_bias")) and is_in(name, inside):
                tensor.data.zero_()


@pytest.mark.parametrize(("arch", "case"), _cases(), ids=lambda part: part)
def test_logits_are_those_of_adapterhub(arch: str, case: str, tmp_path: Path) -> None:
    reason = LEFT_OUT.get(f"{arch}/{case}") or LEFT_OUT.get(case)
    if reason is not None:
        pytest.skip(reason)
    folder, model = Path(str(ROOT)) / arch / case, copy.deepcopy(_base(arch))
    about = json.loads((folder / "case.json").read_text())
    for name in about["adapters"]:
        gt.load(model, _told(case, folder / f"adapter_{name}", tmp_path), name=name)
    if about["fusion"]:
        gt.load(model, folder / "fusion", name="fusion")
    skipped = about["skip_layers"] or ()
    if arch == "t5":  # counted over both stacks, where `drop` counts each
        _shut(gt.adapters(model), skipped)
        skipped = ()
    gt.activate(model, _composition(about["setup"]), drop=len(skipped))
    expected = load_file(folder / "outputs.safetensors")
    start, end = f"{about['reference_impl']}/", "/logits"
    variants = [k[len(start) : -len(end)] for k in expected if k.startswith(start)]
    compared = 0
    for variant in variants:
        if f"{start}{variant}{end}" not in expected:
            continue
        if ("gated" in case or case == "unipelt") and variant == "padleft":
            continue  # a gate is a mean over padding too, whose positions differ there
        inputs, theirs = _inputs(arch, variant), expected[f"{start}{variant}{end}"]
        mask = inputs.get("attention_mask")
        _check_close(_logits(model, inputs), theirs, mask if arch in ("gpt2", "llama") else None)
        compared += 1
    assert compared


def _told(case: str, folder: Path, into: Path) -> Path:
    """Returns an adapter's folder, of a DiReFT a copy whose settings say what AdapterHub's lose."""
    if not case.startswith("direft"):
        return folder
    copied = Path(shutil.copytree(folder, into / folder.name))
    file = copied / "adapter_config.json"
    found = json.loads(file.read_text())
    found["config"]["subtract_projection"] = False
    file.write_text(json.dumps(found))
    return copied


def _single(arch: str, case: str) -> bool:
    """Whether a case has an adapter that is read, and isn't written in another form."""
    reason = LEFT_OUT.get(f"{arch}/{case}") or LEFT_OUT.get(case)
    folder = Path(str(ROOT)) / arch / case / "adapter_a"
    return reason is None and folder.is_dir() and case not in REWRITTEN


@pytest.mark.parametrize(
    ("arch", "case"), [pair for pair in _cases() if _single(*pair)], ids=lambda part: part
)
def test_what_is_loaded_is_written_as_it_was(arch: str, case: str, tmp_path: Path) -> None:
    if (arch, case) in (("t5", "compacter"), ("t5", "compacterpp")):
        pytest.skip("AdapterHub can't load what maps share in T5, so that it isn't written")
    theirs, ours = Path(str(ROOT)) / arch / case / "adapter_a", tmp_path / "a"
    adapter = gt.load(copy.deepcopy(_base(arch)), theirs, name="a")
    save(adapter, ours)
    configs = [json.loads((at / "adapter_config.json").read_text()) for at in (theirs, ours)]
    for config in configs:
        del config["model_name"]
    assert configs[0] == configs[1]
    given, found = (load_file(at / "adapter.safetensors") for at in (theirs, ours))
    assert given.keys() == found.keys()
    for name, tensor in given.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-5)


def _check_close(ours: Tensor, theirs: Tensor, mask: Tensor | None = None) -> None:
    difference = (ours - theirs).abs()
    if mask is not None:
        difference *= mask.repeat(len(difference) // len(mask), 1).unsqueeze(-1)
    assert difference.max() <= TOLERANCE * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("case", ["fusion", "fusion_static", "fusion_stack"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_setup_brings_its_adapters_and_its_composition(arch: str, case: str) -> None:
    folder, model = Path(str(ROOT)) / arch / case, copy.deepcopy(_base(arch))
    gt.load(model, folder / "setup", allow_pickle=True)
    expected = load_file(folder / "outputs.safetensors")
    variant = "full" if arch == "vit" else "nomask"
    ours = _logits(model, _inputs(arch, variant))
    _check_close(ours, expected[f"eager/{variant}/logits"])


@pytest.mark.parametrize("folder", ["adapter_task", "adapter_task_safetensors"])
def test_a_flexible_head_is_berts_pooler_and_classifier(folder: str) -> None:
    case, base = Path(str(ROOT)) / "bert" / "flex_head", _base("bert")
    config = copy.deepcopy(base.config)
    config.num_labels = 4
    model = type(base)(config).eval()
    same = {k: t for k, t in base.state_dict().items() if not k.startswith("classifier")}
    model.load_state_dict(same, strict=False)
    gt.load(model, case / folder, allow_pickle=True)
    expected = load_file(case / "outputs.safetensors")
    for variant in ("nomask", "padright"):
        ours = _logits(model, _inputs("bert", variant))
        _check_close(ours, expected[f"eager/{variant}/logits"])
