"""A base's weights as its checkpoint has them, for what corrects those that are quantised."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor, nn

from graftune.errors import SettingsError
from graftune.sites import hosts

_FOLDER = "_graftune_weights"
_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def remember(model: nn.Module, folder: Path | str) -> None:
    """Notes where a model's checkpoint lies, if its name doesn't say."""
    model.__dict__[_FOLDER] = str(folder)


def residual(model: nn.Module, module: str) -> Tensor:
    """Returns what a quantised linear lost, W - Q(W), `(out, in)` in float32.

    Raises:
        SettingsError: its checkpoint isn't there, lacks the weight, or has another one.
    """
    now = hosts.read(model.get_submodule(module)).float()
    weight = _read(model, module).to(device=now.device).float()
    if sorted(weight.shape) != sorted(now.shape):
        raise SettingsError(_said(module, f"of shape {tuple(weight.shape)}, not {(*now.shape,)}"))
    # Conv1D keeps (in, out), and what it became doesn't tell: the nearer of the two it is.
    turns = [turned for turned in (weight, weight.t()) if turned.shape == now.shape]
    lost = min((turned - now for turned in turns), key=lambda change: float(change.norm()))
    if lost.norm() > 0.5 * now.norm():
        raise SettingsError(_said(module, "with other numbers than it was quantised from"))
    return lost


def _read(model: nn.Module, module: str) -> Tensor:
    from safetensors import safe_open

    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    name = f"{module}.weight"
    names = (name, name.removeprefix(prefix), prefix + name)
    folder = _folder(model, module)
    for file in _files(folder):
        with safe_open(file, framework="pt") as tensors:
            known = set(tensors.keys())
            for found in names:
                if found in known:
                    return tensors.get_tensor(found)
    raise SettingsError(_said(module, f'not in "{folder}" under the name {name}'))


def _files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / name for name in dict.fromkeys(names)]
    return [folder / _FILE]


def _folder(model: nn.Module, module: str) -> Path:
    from huggingface_hub import snapshot_download

    config = getattr(model, "config", None)
    spec = model.__dict__.get(_FOLDER) or str(getattr(config, "_name_or_path", ""))
    folder = Path(spec)
    if spec and not folder.is_dir():
        try:
            folder = Path(snapshot_download(spec, local_files_only=True))
        except (OSError, ValueError) as error:
            raise SettingsError(_said(module, f'not in "{spec}"')) from error
    if not spec or not ((folder / _FILE).is_file() or (folder / _INDEX).is_file()):
        raise SettingsError(_said(module, f'not in "{spec}", which holds no {_FILE}'))
    return folder


def _said(module: str, found: str) -> str:
    return (
        f'LoRA: init "loftq" reads the weight that {module} was quantised from, and it is {found}; '
        'load the base from the folder of its safetensors, or take init="zero-B".'
    )
