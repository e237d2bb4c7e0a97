"""GGUF files, dequantised once into the user's cache as a folder that loads in an instant.

transformers reads a GGUF file as a quantised model and dequantises it in Python, 20 to 40 s for
135 M parameters. The copy holds the same numbers in float32 with the tokenizer, its chat template
and a generation config that stops at the end of a turn.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
from collections.abc import Callable, Generator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftune.errors import FormatError, GraftuneError, SettingsError
from graftune.tasks.folder_cache import built_once, cache_folder, is_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LAYOUT = 1
"""Raised when converted copies of an earlier graftune must be made again."""
ANSWER_TOKENS = 256
MAGIC = b"GGUF"


def converted(gguf: Path, note: Callable[[str], object], *, name: str = "") -> Path:
    """Returns the cached folder of a GGUF model, converting it first if need be.

    Args:
        gguf: the file, absolute.
        note: told one line before the conversion starts.
        name: the distribution that carries the file, whose version then stands for its content;
            else path, size and time do.

    Raises:
        SettingsError: the `gguf` package is missing, or the cache can't be written.
        FormatError: the file is not a GGUF model that transformers can read.
    """
    folder = cache_folder() / "models" / _folder_name(gguf, name)
    if is_whole(folder):
        return folder
    _check_readable(gguf)
    note(f"converting {gguf.name} once into {folder} (less than a minute for a small model) …")
    try:
        return built_once(folder, lambda part: _convert(gguf, part))
    except GraftuneError:
        raise
    except OSError as error:
        raise SettingsError(
            f"the converted copy of {gguf.name} cannot be written to {folder.parent}: {error}; "
            "set GRAFTUNE_CACHE to a folder with room"
        ) from error


def _folder_name(gguf: Path, name: str) -> str:
    """Returns a readable folder name that changes whenever the file's content does."""
    stat = gguf.stat()
    try:
        state = f"{name} {version(name)} {stat.st_size}" if name else ""
    except PackageNotFoundError:
        state = ""
    state = state or f"{gguf} {stat.st_size} {stat.st_mtime_ns}"
    digest = hashlib.sha256(f"{LAYOUT} {state}".encode()).hexdigest()[:8]
    return f"{gguf.stem}-{digest}"


def _check_readable(gguf: Path) -> None:
    """Refuses a file that isn't GGUF, and a machine without the reader."""
    with gguf.open("rb") as opened:
        start = opened.read(len(MAGIC))
    if start != MAGIC:
        raise FormatError(f"{gguf} is not a GGUF file: it starts with {start!r}, not {MAGIC!r}")
    if importlib.util.find_spec("gguf") is None:
        raise SettingsError(f"reading {gguf.name} needs the package gguf: pip install gguf")


def _convert(gguf: Path, part: Path) -> None:
    """Writes the dequantised model and its tokenizer into `part`.

    Raises:
        FormatError: transformers can't read the file.
        OSError: `part` can't be written.
    """
    with quiet(), contextlib.redirect_stderr(io.StringIO()):  # its bar knows no switch
        model, tokenizer = _read(gguf)
        _settle_generation(model, tokenizer)
        _settle_length(model, tokenizer)
        tokenizer.save_pretrained(part)
        model.save_pretrained(part)


def _read(gguf: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Returns the file's model in float32, no longer marked as quantised, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"gguf_file": gguf.name, "trust_remote_code": False}
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(gguf.parent), **where)
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent), dtype=torch.float32, **where
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        why = str(error).split("\n")[0]
        raise FormatError(f"{gguf} cannot be read as a language model: {why}") from error
    model.hf_quantizer = None
    model.is_quantized = False
    for trace in ("quantization_config", "_model_name_or_path"):
        if hasattr(model.config, trace):
            delattr(model.config, trace)
    return model, tokenizer


def _settle_generation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Makes `generate` greedy, bounded and stopped by the tokenizer's end of turn."""
    from transformers import GenerationConfig

    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    for key, value in ids.items():
        setattr(model.config, key, value)
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=ANSWER_TOKENS, **ids)


def _settle_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Tells the tokenizer the model's longest input, which a GGUF file keeps elsewhere."""
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest and tokenizer.model_max_length > longest:
        tokenizer.model_max_length = longest


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Silences transformers' loading bars and tables."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
