"""The files of an AdapterHub directory, read and checked but not yet understood; needs no torch."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graftune.errors import FormatError
from graftune.formats.directory import CONFIG, Directory, read_json
from graftune.formats.tensors import read_header

FUSION = "adapter_fusion_config.json"
SETUP = "adapter_setup.json"
HEAD = "head_config.json"
WEIGHTS = {
    CONFIG: ("adapter.safetensors", "pytorch_adapter.bin"),
    FUSION: ("model_adapter_fusion.safetensors", "pytorch_model_adapter_fusion.bin"),
    HEAD: ("model_head.safetensors", "pytorch_model_head.bin"),
}
"""Tensors by the settings they belong to: the file to read, and the pickle in its place."""
FILES = (*WEIGHTS, SETUP, *(name for pair in WEIGHTS.values() for name in pair))
"""Every file of such a directory."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Folder(Directory):
    """One adapter or fusion of AdapterHub's; `config` is its settings file as it is."""

    head: Directory | None = None
    """The head that lies beside it."""

    @property
    def settings(self) -> dict[str, Any]:
        """The settings proper; of an old file that names them by a word, what the word means."""
        return self.config["config"]

    @property
    def is_fusion(self) -> bool:
        """Whether it is a fusion, not an adapter."""
        return "query" in self.settings

    @property
    def name(self) -> str:
        """What the adapter is called in the names of its tensors."""
        return str(self.config.get("name"))

    @property
    def method(self) -> str:
        """A short name of its method, for people."""
        given = self.settings
        if self.is_fusion:
            return "AdapterFusion"
        kind = given.get("architecture") or ("Compacter" if given.get("phm_layer") else None)
        if kind is None:
            return "parallel bottleneck" if given.get("is_parallel") else "bottleneck"
        if kind != "lora":
            return str(kind)
        if given.get("composition_mode") == "scale":
            return "IA3"
        if given.get("vera_d") is not None or given.get("vera_b") is not None:
            return "VeRA"
        return "DoRA" if given.get("use_dora") else "LoRA"

    @property
    def head_names(self) -> tuple[str, ...]:
        """The modules of the head that lies beside it; "head" where a pickle hides them."""
        if self.head is None:
            return ()
        if self.head.tensors is None:
            return ("head",)
        return tuple(sorted({name.rpartition(".")[0] for name in self.head.tensors.entries}))

    @property
    def wrote(self) -> str:
        """The program that wrote it, with its version where known."""
        return wrote(self.config)


def is_here(folder: Path) -> bool:
    """Whether a folder holds what AdapterHub writes."""
    if any((folder / name).is_file() for name in (FUSION, SETUP)):
        return True
    config = read_json(folder, CONFIG)
    return config is not None and "peft_type" not in config and "config" in config


def read(folder: Path) -> Folder:
    """Reads the settings and the tensor files' headers of one adapter or fusion.

    Raises:
        FormatError: a file is missing, isn't JSON or isn't whole.
    """
    kind = FUSION if (folder / FUSION).is_file() else CONFIG
    config = read_json(folder, kind)
    if config is None:
        raise FormatError(f'"{folder}" has no {CONFIG}.')
    if not isinstance(config.get("config"), dict | str):
        raise FormatError(f'"{folder / kind}" has no "config": it holds no settings.')
    config["config"] = _spelt_out(config["config"], folder / kind)
    head = read_json(folder, HEAD)
    parts = _part(folder, kind, config)
    return Folder(
        **{field.name: getattr(parts, field.name) for field in dataclasses.fields(parts)},
        head=None if head is None else _part(folder, HEAD, head),
    )


def wrote(config: Mapping[str, Any]) -> str:
    """Returns the program that wrote a settings file, with its version."""
    version = str(config.get("version") or "")
    if version.startswith("adapters."):
        return f"AdapterHub adapters {version.removeprefix('adapters.')}"
    return f"adapter-transformers {version}".strip()


def version_of(config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Returns the version of `adapters` that wrote a settings file; None for its forerunner."""
    version = str(config.get("version") or "")
    if not version.startswith("adapters."):
        return None
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def _part(folder: Path, kind: str, config: dict[str, Any]) -> Directory:
    name, pickle = WEIGHTS[kind]
    weights = folder / name
    if not weights.exists() and not (folder / pickle).exists():
        raise FormatError(f'"{folder}" has AdapterHub\'s {kind}, but neither {name} nor {pickle}.')
    present = [folder / file for file in (kind, name) if (folder / file).exists()]
    return Directory(
        path=folder,
        config={**config, "base_model_name_or_path": config.get("model_name") or ""},
        own=None,
        tensors=read_header(weights) if weights.exists() else None,
        pickle=None if weights.exists() else pickle,
        size=sum(file.stat().st_size for file in present),
    )


_BOTTLENECK: dict[str, Any] = {
    "mh_adapter": False,
    "output_adapter": True,
    "reduction_factor": 16,
    "non_linearity": "relu",
    "original_ln_before": True,
}
_HOULSBY = _BOTTLENECK | {
    "mh_adapter": True,
    "non_linearity": "swish",
    "original_ln_before": False,
}
_PARALLEL = _BOTTLENECK | {
    "reduction_factor": 2,
    "original_ln_before": False,
    "is_parallel": True,
    "scaling": 4.0,
}
_WORDS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("pfeiffer", "seq_bn"), _BOTTLENECK),
    **dict.fromkeys(("houlsby", "double_seq_bn"), _HOULSBY),
    **dict.fromkeys(("parallel", "par_bn"), _PARALLEL),
    **dict.fromkeys(("scaled_parallel", "scaled_par_bn"), _PARALLEL | {"scaling": "learned"}),
}
"""Settings that old files name by a word."""


def _spelt_out(given: dict[str, Any] | str, file: Path) -> dict[str, Any]:
    if isinstance(given, dict):
        return given
    if given not in _WORDS:
        raise FormatError(
            f'"{file}" has the settings "{given}", a word that isn\'t known here; known are '
            f"{', '.join(_WORDS)}."
        )
    return dict(_WORDS[given])
