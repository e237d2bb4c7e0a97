"""Which programs take an adapter directory, what stands in the way, and how to mend it.

Each rule is one function over what `inspect` found; nothing here imports torch. What the programs
accept was read in their loaders: vLLM's peft_helper.py and lora_model.py, SGLang's lora_config.py,
LoRAX's documentation, llama.cpp's convert_lora_to_gguf.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

READERS = ("peft", "vLLM", "SGLang", "LoRAX", "llama.cpp")
MAX_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank may be."""

_MERGE = "merge it into the base model and serve that (graftune merge)"
_PLAIN = (".lora_A.weight", ".lora_B.weight")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether one program loads an adapter as it is."""

    reader: str
    obstacles: tuple[str, ...]
    mends: tuple[str, ...]
    """What to do about them, or which option to pass where there is no obstacle."""

    @property
    def loads(self) -> bool:
        """Whether nothing stands in the way."""
        return not self.obstacles

    def __str__(self) -> str:
        text = "yes" if self.loads else "no: " + "; ".join(self.obstacles)
        return text + (f" ({'; '.join(self.mends)})" if self.mends else "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contents:
    """What a verdict is made from."""

    config: Mapping[str, Any]
    tensors: Sequence[str]
    ranks: tuple[int, ...]

    @property
    def is_lora(self) -> bool:
        """Whether the config says LORA."""
        return self.config.get("peft_type") == "LORA"

    def setting(self, key: str) -> Any:
        """Returns a setting, None where it has no effect."""
        return self.config.get(key) or None

    @property
    def heads(self) -> list[str]:
        """Returns the names of whole modules in the file."""
        return sorted(name for name in self.tensors if "lora_" not in name)

    @property
    def embeddings(self) -> bool:
        """Whether there are low-rank tensors of embeddings."""
        return any("lora_embedding_" in name for name in self.tensors)


def verdicts(contents: Contents, peft_types: Sequence[str]) -> tuple[Verdict, ...]:
    """Returns one verdict per reader, in the order of `READERS`."""
    rules: tuple[Callable[[Contents], list[tuple[str, str]]], ...]
    rules = (_vllm, _sglang, _lorax, _llama_cpp)
    found = [_verdict("peft", _peft(contents, peft_types))]
    for reader, rule in zip(READERS[1:], rules, strict=True):
        type_name = contents.config.get("peft_type")
        problems = rule(contents) if contents.is_lora else [(f"it reads LoRA, not {type_name}", "")]
        found.append(_verdict(reader, problems))
    vllm = found[1]
    if vllm.loads and contents.ranks:
        fitting = next((rank for rank in MAX_VLLM_RANKS if rank >= max(contents.ranks)), None)
        found[1] = dataclasses.replace(vllm, mends=(f"--max-lora-rank {fitting}",))
    return tuple(found)


def foreign_verdicts(program: str, converts: bool) -> tuple[Verdict, ...]:
    """Returns the verdicts on a directory that only `program`, and graftune, read as it is."""
    obstacle = f"it is in the form of {program}"
    mend = "graftune convert --to peft" if converts else "load it with graftune"
    return tuple(Verdict(reader=reader, obstacles=(obstacle,), mends=(mend,)) for reader in READERS)


def _verdict(reader: str, problems: list[tuple[str, str]]) -> Verdict:
    mends = tuple(dict.fromkeys(mend for _, mend in problems if mend))
    return Verdict(reader=reader, obstacles=tuple(text for text, _ in problems), mends=mends)


def _peft(contents: Contents, peft_types: Sequence[str]) -> list[tuple[str, str]]:
    type_name = contents.config.get("peft_type")
    if type_name in peft_types:
        return []
    return [(f"PEFT has no {type_name}", "load it with graftune, or " + _MERGE)]


def _plain_only(contents: Contents) -> list[tuple[str, str]]:
    """What every server but PEFT stumbles over."""
    problems: list[tuple[str, str]] = []
    if contents.setting("use_dora"):
        problems.append(("it is DoRA (use_dora)", _MERGE))
    if contents.setting("modules_to_save"):
        heads = ", ".join(contents.config["modules_to_save"])
        problems.append((f"it brings whole modules of its own (modules_to_save: {heads})", _MERGE))
    if contents.config.get("bias", "none") != "none" or contents.setting("lora_bias"):
        problems.append(("it changes biases", _MERGE))
    if contents.setting("target_parameters"):
        problems.append(("it acts on experts kept as one tensor (target_parameters)", _MERGE))
    if contents.setting("trainable_token_indices"):
        problems.append(("it changes single tokens (trainable_token_indices)", _MERGE))
    if not problems and contents.heads:
        problems.append((f'tensor "{contents.heads[0]}" isn\'t lora_A or lora_B', _MERGE))
    return problems


def _vllm(contents: Contents) -> list[tuple[str, str]]:
    problems = _plain_only(contents)
    if contents.embeddings:
        problems.append(("it acts on embeddings", _MERGE))
    if contents.setting("rank_pattern") or contents.setting("alpha_pattern"):
        problems.append(
            (
                "ranks or alphas differ between modules and it scales all by lora_alpha / r",
                "train with one r and alpha for all modules, or " + _MERGE,
            )
        )
    if contents.ranks and max(contents.ranks) > MAX_VLLM_RANKS[-1]:
        problems.append((f"rank {max(contents.ranks)} is above {MAX_VLLM_RANKS[-1]}", _MERGE))
    return problems


def _sglang(contents: Contents) -> list[tuple[str, str]]:
    problems = _plain_only(contents)
    if contents.embeddings:
        problems.append(("it acts on embeddings", _MERGE))
    return problems


def _lorax(contents: Contents) -> list[tuple[str, str]]:
    return _vllm(contents)


def _llama_cpp(contents: Contents) -> list[tuple[str, str]]:
    problems = _plain_only(contents)
    if contents.embeddings:
        problems.append(("it acts on embeddings", _MERGE))
    if contents.setting("rank_pattern") or contents.setting("alpha_pattern"):
        problems.append(("it keeps one alpha for all modules", _MERGE))
    if contents.setting("use_rslora"):
        problems.append(("it scales by alpha / r, not alpha / sqrt(r) (use_rslora)", _MERGE))
    return problems
