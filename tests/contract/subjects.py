"""What the invariants are tried on: every method, one line each, on every tiny family.

A later method joins the whole suite by one line in METHODS.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import graftune as gt
from graftune.methods.base import Method
from tests import worked_example
from tests.families import FAMILIES, Family

METHODS: dict[str, Method] = {
    "lora": gt.LoRA(r=4, alpha=8),
    "adalora": gt.AdaLoRA(r=4, target_r=2),
    "loha": gt.LoHa(r=4, alpha=8),
    "lokr": gt.LoKr(r=2, alpha=4),
    "vera": gt.VeRA(r=16),
    "gated": gt.LoRA(r=4, alpha=8, targets="attention", gate="auto"),
    "bitfit": gt.BitFit(add_missing=True),
    "full": gt.FullFineTuning(keep_base=True),
    "ia3": gt.IA3(),
    "said": gt.SAID(d=200),
    "selective": gt.Selective(),
    "norms": gt.LayerNormTuning(),
    "diffpruning": gt.DiffPruning(keep=0.05),
    "fishmask": gt.FishMask(keep=0.05),
    "houlsby": gt.HoulsbyAdapter(bottleneck=4, init="zero-up"),
    "pfeiffer": gt.PfeifferAdapter(reduction=8, init="zero-up"),
    "parallel": gt.ParallelAdapter(sublayers=("attention", "cross-attention", "ffn")),
    "compacter": gt.Compacter(bottleneck=4, init="zero-up", phm_init_range=0.5),
    "compacterpp": gt.CompacterPlusPlus(bottleneck=4, init="zero-up", phm_init_range=0.5),
    "adapterplus": gt.AdapterPlus(reduction=8, init="zero-up"),
    "mam": gt.MAM(length=3, hidden=8, bottleneck=4),
    "unipelt": gt.UniPELT(length=3, hidden=8, bottleneck=4, r=2),
    "union": gt.Union(methods=(gt.LoRA(r=2, targets="attention"), gt.IA3(targets=()))),
    "unified": gt.UnifiedAdapter(location="head", k=3),
    "loreft": gt.LoReFT(),
    "noreft": gt.NoReFT(r=2, tied=True),
    "direft": gt.DiReFT(r=2, prefix_positions=2),
    "prefix": gt.PrefixTuning(length=3, hidden=8),
    "ptuningv2": gt.PTuningV2(length=3, dropout=0.0),
    "llamaadapter": gt.LLaMAAdapter(length=3, layers=":"),
    "prompt": gt.PromptTuning(length=3),
    "multitask": gt.MultitaskPromptTuning(length=3),
    "ptuning": gt.PTuning(length=3, hidden=8),
    "ladder": gt.LadderSideTuning(reduction=2, init="random"),
    "gain": worked_example.gain()(),
}
"""Settings that apply to every family; `keep_base` lets full fine-tuning be switched off."""

NOT_LINEAR = (
    "unified",
    "unipelt",
    "mam",
    "gated",
    "houlsby",
    "pfeiffer",
    "parallel",
    "compacter",
    "compacterpp",
    "adapterplus",
    "loreft",
    "noreft",
    "direft",
    "prefix",
    "ptuningv2",
    "llamaadapter",
    "prompt",
    "multitask",
    "ptuning",
    "ladder",
)
"""Methods that can't be merged: no weight does what they do."""

OFF_AT_START = (
    *("unipelt", "mam", "prefix", "ptuningv2", "prompt", "multitask", "ptuning"),
    "ladder",
)
"""Methods that don't start equal to the base: attention is shared with what they add."""

LONGER_ROWS = ("prompt", "multitask", "ptuning")
"""Methods that lengthen rows, so that sums over masked places round otherwise than alone: 6e-6 in
fp32, 1e-14 in fp64."""

REFUSALS: dict[tuple[str, str, str], str] = {
    **{
        ("attach", m, f): "takes embeddings in place of"
        for m in LONGER_ROWS
        for f in ("whisper", "vit", "swin")
        if (m, f) != ("prompt", "vit")
    },
    **{("attach", "ladder", f): "expected one" for f in ("swin", "clip")},
    **{("attach", m, "clip"): "has two towers: say which" for m in LONGER_ROWS},
    ("rows", "prompt", "vit"): "prompts of one length",
    **{("rows", m, "bart"): "prompts of one length" for m in LONGER_ROWS},
    **{("rows", "full", family): "changes whole weights" for family in FAMILIES},
    **{("rows", "said", family): "changes whole weights" for family in FAMILIES},
    **{
        ("rows", m, f): "changes whole weights"
        for m in ("diffpruning", "fishmask")
        for f in FAMILIES
    },
    ("rows", "bitfit", "deberta-v2"): "runs once for all rows",
    ("rows", "norms", "deberta-v2"): "runs once for all rows",
    **{
        ("rows", m, "deberta-v2"): "runs once for all rows"
        for m in ("houlsby", "compacter", "compacterpp")
    },
    **{
        ("rows", "selective", family): "runs once for all rows"
        for family in ("deberta-v2", "t5", "mt5", "swin")
    },
}
"""(invariant, method, family) that can't be, with the words of the error that says so."""

BASE_DEPENDS_ON_PADDING = {
    (family, "left")
    for family in ("bert", "roberta", "electra", "deberta-v2", "distilbert", "modernbert", "bart")
}
"""Where the base itself answers otherwise when padded: encoders pool the first position, and
BART's encoder counts positions from the padding on."""

ONE_SIZE = ("whisper", "vit", "swin")
"""Families of sound and images, which have one size and no padding."""

EAGER_ONLY = ("gemma2",)
"""Families whose own logits differ between attention kernels (it caps scores in eager alone)."""

STEPS = 100
"""Optimizer steps that methods with a schedule are told; the suite takes a few of them."""

VARIANTS = (
    *("compacterpp", "ptuningv2", "noreft", "direft", "multitask"),
    *("mam", "unipelt", "union", "unified"),
)
"""Methods that act where another of METHODS does, by the same means: outside KINDS they are tried
by `make test-all` alone."""

CASES = [(m, f) for f in FAMILIES for m in METHODS if ("attach", m, f) not in REFUSALS]
KINDS = ("bert", "gpt2", "llama", "gemma2", "mixtral", "gpt_neox", "t5", "vit")
"""Families that cover every kind of block, for what is slow: post- and pre-norm, fused, Conv1D,
GQA, sandwich, experts, parallel residual, encoder-decoder, vision."""


@dataclass
class Subject:
    """A tiny model with its inputs, and a method's name."""

    family: Family
    model: nn.Module
    inputs: dict[str, Tensor]
    method: str

    @classmethod
    def of(cls, method: str, family: str, **options: Any) -> Subject:
        """Returns a fresh model of the family."""
        kind = FAMILIES[family]
        return cls(kind, kind.build(**options), kind.inputs(), method)

    def attach(self, name: str = "task", seed: int = 1, noise: float = 0.05) -> gt.Adapter:
        """Attaches the method and, with noise, moves every tensor of it off its start."""
        chosen = METHODS[self.method]
        data = [self.labelled()] if chosen.needs_data else None
        adapter = gt.attach(self.model, chosen, name, seed=seed, data=data)
        if chosen.needs_steps(adapter):
            adapter.begin(STEPS)
        shake(adapter, seed, noise)
        return adapter

    def labelled(self) -> dict[str, Any]:
        """Returns the inputs with what makes the model return a loss."""
        return {**self.inputs, **self.family.labels(self.model, self.inputs)}

    def output(self, inputs: dict[str, Tensor] | None = None) -> Tensor:
        """Returns the model's logits."""
        return logits(self.model, self.inputs if inputs is None else inputs)


def shake(adapter: gt.Adapter, seed: int, noise: float = 0.05) -> None:
    """Adds noise to every tensor of an adapter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in adapter.parameters():
            tensor.add_(torch.randn(tensor.shape, generator=generator).to(tensor) * noise)


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Returns the logits of a forward pass without gradient."""
    with torch.no_grad():
        return scores(model(**inputs))


def scores(output: Any) -> Tensor:
    """Returns what a model's output says, whatever the model."""
    found = output.get("logits", None)
    return output.logits_per_image if found is None else found


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns copies of the model's tensors, without those of adapters."""
    return {n: t.clone() for n, t in model.state_dict().items() if ".deltas." not in f".{n}"}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors are equal bit for bit, in names and order too."""
    return list(left) == list(right) and all(torch.equal(left[k], right[k]) for k in left)
