"""graftune: every parameter-efficient fine-tuning method on any Hugging Face transformer.

    import graftune as gt
    adapter = gt.attach(model, gt.LoRA(r=8), name="intents")

Names are loaded when first used, so that importing this is instant. Methods, such as `gt.LoRA`, are
found by the name that their class is registered under.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graftune import anatomy as anatomy
    from graftune import methods as methods
    from graftune.adapter import Adapter, activate, adapters, attach, detach, state_of, using
    from graftune.anatomy import Anatomy, resolve
    from graftune.combining import combine
    from graftune.composition import AdapterDrop, Average, Fuse, Parallel, Rows, Stack
    from graftune.counting import summary
    from graftune.formats import inspect, load
    from graftune.fusing import fusion_weights, prune_fusion
    from graftune.gating import gates
    from graftune.merging import merge, unmerge
    from graftune.methods.adalora import AdaLoRA
    from graftune.methods.adapterplus import AdapterPlus
    from graftune.methods.base import register
    from graftune.methods.bitfit import BitFit
    from graftune.methods.compacter import Compacter, CompacterPlusPlus
    from graftune.methods.diffpruning import DiffPruning
    from graftune.methods.fishmask import FishMask
    from graftune.methods.full import FullFineTuning
    from graftune.methods.fusion import AdapterFusion
    from graftune.methods.houlsby import HoulsbyAdapter
    from graftune.methods.ia3 import IA3
    from graftune.methods.ladder import LadderSideTuning
    from graftune.methods.layernorm import LayerNormTuning
    from graftune.methods.llamaadapter import LLaMAAdapter
    from graftune.methods.loha import LoHa
    from graftune.methods.lokr import LoKr
    from graftune.methods.lora import LoRA
    from graftune.methods.mam import MAM
    from graftune.methods.multitaskprompt import MultitaskPromptTuning
    from graftune.methods.parallel import ParallelAdapter
    from graftune.methods.pfeiffer import PfeifferAdapter
    from graftune.methods.prefix import PrefixTuning, PTuningV2
    from graftune.methods.prompt import PromptTuning
    from graftune.methods.ptuning import PTuning
    from graftune.methods.reft import DiReFT, LoReFT, NoReFT
    from graftune.methods.said import SAID
    from graftune.methods.selective import Selective
    from graftune.methods.unified import UnifiedAdapter
    from graftune.methods.union import Union
    from graftune.methods.unipelt import UniPELT
    from graftune.methods.vera import VeRA
    from graftune.planning import Plan, PlanSettings, fit, plan
    from graftune.prefixing import as_prefix
    from graftune.training import AdapterCallback, Trainer
    from graftune.training.chunked_loss import chunked_loss
    from graftune.training.trunk_cache import TrunkCache
    from graftune.voting import vote

__version__ = "0.1.0"

_HOMES = {
    "Adapter": "adapter",
    "AdapterCallback": "training",
    "AdapterDrop": "composition",
    "Anatomy": "anatomy",
    "Average": "composition",
    "Fuse": "composition",
    "Parallel": "composition",
    "Plan": "planning",
    "PlanSettings": "planning",
    "Rows": "composition",
    "Stack": "composition",
    "Trainer": "training",
    "TrunkCache": "training.trunk_cache",
    "activate": "adapter",
    "adapters": "adapter",
    "as_prefix": "prefixing",
    "attach": "adapter",
    "chunked_loss": "training.chunked_loss",
    "combine": "combining",
    "detach": "adapter",
    "fit": "planning",
    "fusion_weights": "fusing",
    "gates": "gating",
    "prune_fusion": "fusing",
    "inspect": "formats",
    "plan": "planning",
    "load": "formats",
    "merge": "merging",
    "register": "methods.base",
    "resolve": "anatomy",
    "state_of": "adapter",
    "summary": "counting",
    "unmerge": "merging",
    "using": "adapter",
    "vote": "voting",
}
__all__ = [
    "IA3",
    "MAM",
    "SAID",
    "AdaLoRA",
    "Adapter",
    "AdapterCallback",
    "AdapterDrop",
    "AdapterFusion",
    "AdapterPlus",
    "Anatomy",
    "Average",
    "BitFit",
    "Compacter",
    "CompacterPlusPlus",
    "DiReFT",
    "DiffPruning",
    "FishMask",
    "FullFineTuning",
    "Fuse",
    "HoulsbyAdapter",
    "LLaMAAdapter",
    "LadderSideTuning",
    "LayerNormTuning",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoReFT",
    "MultitaskPromptTuning",
    "NoReFT",
    "PTuning",
    "PTuningV2",
    "Parallel",
    "ParallelAdapter",
    "PfeifferAdapter",
    "Plan",
    "PlanSettings",
    "PrefixTuning",
    "PromptTuning",
    "Rows",
    "Selective",
    "Stack",
    "Trainer",
    "TrunkCache",
    "UniPELT",
    "UnifiedAdapter",
    "Union",
    "VeRA",
    "activate",
    "adapters",
    "anatomy",
    "as_prefix",
    "attach",
    "chunked_loss",
    "combine",
    "detach",
    "fit",
    "fusion_weights",
    "gates",
    "inspect",
    "load",
    "merge",
    "methods",
    "plan",
    "prune_fusion",
    "register",
    "resolve",
    "state_of",
    "summary",
    "unmerge",
    "using",
    "vote",
]


def __getattr__(name: str) -> Any:
    if name in ("anatomy", "methods"):  # packages that can be called as what they are named after
        return importlib.import_module(f"graftune.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"graftune.{_HOMES[name]}"), name)
    if not name.startswith("_") and name[:1].isupper():
        from graftune.methods import methods

        known = methods()
        if name in known:
            return known[name]
    from graftune.errors import nearest

    raise AttributeError(f'graftune has no "{name}".{nearest(name, __all__)}')


def __dir__() -> list[str]:
    return __all__
