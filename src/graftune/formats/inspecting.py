"""What an adapter directory holds, told without loading a model or torch."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from graftune.errors import FormatError
from graftune.formats import directory
from graftune.formats.adapterhub import folder as adapterhub
from graftune.formats.adapterhub.folder import is_here as is_adapterhub
from graftune.formats.atomic import read_whole
from graftune.formats.servers import Contents, Verdict, foreign_verdicts, verdicts
from graftune.formats.tensors import TensorEntry, TensorFile, nonfinite

# PEFT's names of the methods it has; ours for the others are not among them.
PEFT_TYPES = (
    *("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "LORA", "ADALORA"),
    *("ADAMSS", "BOFT", "ADAPTION_PROMPT", "IA3", "BEFT", "LILY", "LOHA", "LOKR", "OFT", "POLY"),
    *("LN_TUNING", "VERA", "FROD", "PVERA", "FOURIERFT", "GLORA", "XLORA", "HRA", "VBLORA"),
    *("UNILORA", "CPT", "MISS", "RANDLORA", "ROAD", "TRAINABLE_TOKENS", "HIRA", "SHIRA", "C3A"),
    *("WAVEFT", "OSF", "DELORA", "GRALORA", "CARTRIDGE", "TINYLORA", "PSOFT", "PEANUT", "SHADOW"),
    *("SUPERTUNING", "DEFT"),
)
_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(embedding_)?A(\.weight)?$")
_ALSO_PEFT = ("LoRA", "DoRA", "VeRA", "IA3")
"""Methods of AdapterHub's that become PEFT's."""
_LAYER = re.compile(r"\.\d+\.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspection:
    """What `inspect` found; `str()` is a page to read, `to_dict()` the same as data."""

    path: str
    wrote: str
    """The program that wrote the directory, with its version where known."""
    method: str
    base: str
    base_class: str | None
    task: str | None
    settings: Mapping[str, Any]
    ranks: tuple[int, ...]
    """Every rank that occurs, small to large."""
    targets: Mapping[str, int]
    """Number of adapted modules by the last part of their names."""
    heads: tuple[str, ...]
    """Modules saved whole."""
    tensors: tuple[TensorEntry, ...]
    parameters: int
    size: int
    """Bytes of the directory's own files."""
    nonfinite: Mapping[str, int] | None
    """Values that are infinite or not a number by tensor; None if not looked for."""
    verdicts: tuple[Verdict, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns the inspection as JSON-able data."""
        found = dataclasses.asdict(self)
        for verdict, given in zip(found["verdicts"], self.verdicts, strict=True):
            verdict["loads"] = given.loads
        for entry, given in zip(found["tensors"], self.tensors, strict=True):
            entry |= {"count": given.count}
        return found

    def __str__(self) -> str:
        rows = [
            ("adapter", self.path),
            ("method", self.method + (f", task {self.task}" if self.task else "")),
            ("written by", self.wrote),
            ("base model", " ".join(filter(None, (self.base or "not named", self.base_class)))),
            ("ranks", ", ".join(map(str, self.ranks)) or "none"),
            ("targets", ", ".join(f"{name} ({n})" for name, n in self.targets.items()) or "none"),
            ("own modules", ", ".join(self.heads) or "none"),
            ("parameters", f"{self.parameters:,} in {len(self.tensors)} tensors"),
            ("on disk", f"{self.size:,} bytes"),
        ]
        if self.nonfinite is not None:
            rows.append(("not finite", f"{sum(self.nonfinite.values()):,} values"))
        rows += [(f"in {verdict.reader}", str(verdict)) for verdict in self.verdicts]
        return "\n".join(f"{label:<14}{text}" for label, text in rows)


def inspect(path: str | Path, *, check_values: bool = False) -> Inspection:
    """Returns what an adapter directory holds and which programs will take it.

    Reads the JSON files and the header of the tensor file alone, so it is instant for any size.

    Args:
        path: a folder; nothing is fetched.
        check_values: also look through every tensor for values that aren't finite.

    Raises:
        FormatError: there is no such folder, or a file in it is missing or broken.
    """
    return read_whole(Path(path), lambda folder: _inspect(folder, str(path), check_values))


def _inspect(folder: Path, shown: str, check_values: bool) -> Inspection:
    if is_adapterhub(folder):
        return _inspect_adapterhub(folder, shown, check_values)
    found = directory.read(folder)
    if found.tensors is None:
        raise FormatError(
            f'"{shown}" keeps its weights as a pickle ({found.pickle}), which is not opened.'
        )
    entries = tuple(found.tensors.entries[name] for name in sorted(found.tensors.entries))
    modules, ranks = _factors(found.tensors)
    own = found.own or {}
    contents = Contents(config=found.config, tensors=[e.name for e in entries], ranks=ranks)
    peft_types = PEFT_TYPES if not own or own.get("peft", True) else ()
    return Inspection(
        path=shown,
        wrote=_wrote(found),
        method=str(own.get("method", {}).get("method") or found.config["peft_type"]),
        base=str(found.config.get("base_model_name_or_path") or ""),
        base_class=own.get("base", {}).get("class") or _mapped_class(found.config),
        task=found.config.get("task_type"),
        settings=own.get("method") or {k: v for k, v in found.config.items() if v is not None},
        ranks=ranks,
        targets=modules,
        heads=tuple(found.config.get("modules_to_save") or ()),
        tensors=entries,
        parameters=sum(entry.count for entry in entries),
        size=found.size,
        nonfinite=nonfinite(found.tensors) if check_values else None,
        verdicts=verdicts(contents, peft_types),
    )


def _inspect_adapterhub(folder: Path, shown: str, check_values: bool) -> Inspection:
    if (folder / adapterhub.SETUP).is_file():
        below = sorted(e.name for e in folder.iterdir() if e.is_dir() and is_adapterhub(e))
        raise FormatError(
            f'"{shown}" is a setup of several adapters: inspect one of {", ".join(below)} in it.'
        )
    found = adapterhub.read(folder)
    if found.tensors is None:
        raise FormatError(
            f'"{shown}" keeps its weights as a pickle ({found.pickle}), which is not opened.'
        )
    entries = tuple(
        found.tensors.entries[name]
        for name in sorted(found.tensors.entries)
        if ".pool." not in name  # copies of others
    )
    r = found.settings.get("r")
    return Inspection(
        path=shown,
        wrote=found.wrote,
        method=found.method,
        base=str(found.config.get("model_name") or ""),
        base_class=found.config.get("model_class"),
        task=None,
        settings={k: v for k, v in found.settings.items() if v is not None},
        ranks=(r,) if isinstance(r, int) and found.method != "IA3" else (),
        targets=_adapterhub_targets(found.name, entries),
        heads=found.head_names,
        tensors=entries,
        parameters=sum(entry.count for entry in entries),
        size=found.size + (0 if found.head is None else found.head.size),
        nonfinite=nonfinite(found.tensors) if check_values else None,
        verdicts=foreign_verdicts("AdapterHub", found.method in _ALSO_PEFT),
    )


def _adapterhub_targets(name: str, entries: Iterable[TensorEntry]) -> dict[str, int]:
    """Returns how many modules adapters hang on, by the last parts of their names."""
    hosts = {entry.name.partition(f".{name}.")[0].rpartition(".")[0] for entry in entries}
    return dict(sorted(collections.Counter(host.rpartition(".")[2] for host in hosts).items()))


def _factors(file: TensorFile) -> tuple[dict[str, int], tuple[int, ...]]:
    modules: collections.Counter[str] = collections.Counter()
    ranks: set[int] = set()
    for name, entry in sorted(file.entries.items()):
        match = _FACTOR.match(name)
        if match and entry.shape:
            modules[match["module"].removesuffix(".base_layer").rpartition(".")[2]] += 1
            ranks.add(entry.shape[0])
    return dict(sorted(modules.items())), tuple(sorted(ranks))


def _wrote(found: directory.Directory) -> str:
    if found.own:
        return f"graftune {found.own.get('graftune_version', '')}".strip()
    version = found.config.get("peft_version")
    return f"HF PEFT {version}" if version else "HF PEFT, version not given"


def _mapped_class(config: Mapping[str, Any]) -> str | None:
    return (config.get("auto_mapping") or {}).get("base_model_class")
