"""Base models, by name, folder, GGUF file or demo name.

    "demo:minilm"             a folder inside an installed package, read where it lies
    "demo:smollm2"            a GGUF file inside an installed package ─┐
    "models/tiny.Q4_0.gguf"   a GGUF file                             ─┴─> converted once, cached
    "runs/my-model"           a folder with config.json and safetensors
    "org/name"                a name: the Hugging Face cache, else the hub

What the checkpoint doesn't hold (a new classification head) is initialised from a seed, and named
in `Base.fresh`; a checkpoint that lacks anything else is refused instead of filled with noise.
Pickled weights and code from a model's repository are never loaded.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftune.errors import FormatError, GraftuneError, SettingsError, nearest
from graftune.tasks.base_specs import is_gguf, listed, locate, not_found
from graftune.tasks.gguf_models import quiet
from graftune.tasks.quantising import Quantising, check_done, check_plain, device, left_alone

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

IMAGE_TASK = "image-classification"
"""The task whose base has an image processor, and no tokenizer."""
TASKS = {
    "classification": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "masked-lm": "AutoModelForMaskedLM",
    "feature": "AutoModel",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "regression": "AutoModelForSequenceClassification",
    "multilabel": "AutoModelForSequenceClassification",
    "multiple-choice": "AutoModelForMultipleChoice",
    IMAGE_TASK: "AutoModelForImageClassification",
}
NEW_HEADS = (
    *("classification", "token-classification", "question-answering", "regression", "multilabel"),
    "multiple-choice",
    IMAGE_TASK,
)
"""The tasks whose head a pretrained base lacks, and which is made."""
LABELLED = NEW_HEADS[:2]
"""Those of them whose head chooses one of several labels."""
WITH_LABELS = (*LABELLED, "multilabel", IMAGE_TASK)
"""Those of them whose head has an output for each label."""
LANGUAGE_MODEL = "lm"
"""The task of a causal or an encoder-decoder language model, whichever a base is."""
DTYPES = ("float32", "bfloat16", "float16", "auto")
ATTENTIONS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")
SHOWN = 3
PREFIX = "base_model_prefix"
SPAN_HEAD = "qa_outputs."
"""Beginning of the names of a head for starts and ends, in every class that has one."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """A pretrained model, ready to attach to."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    spec: str
    """What the user wrote; `model.name_or_path` says the same."""
    folder: Path | None
    """Where its files lie; None for a name of the hub."""
    fresh: tuple[str, ...]
    """The tensors that the checkpoint doesn't hold: its new head."""


def load_base(
    spec: str,
    task: str = "classification",
    *,
    labels: Sequence[str] | None = None,
    dtype: str = "float32",
    attn: str | None = None,
    seed: int = 0,
    quantize: Quantising | None = None,
    note: Callable[[str], object] | None = None,
) -> Base:
    """Returns the base model that `spec` names, in eval mode on the CPU, with its tokenizer.

    A quantised one is put where it will run, on the GPU if there is one.

    Args:
        spec: a folder, a GGUF file, a demo or a hub name, as in the module's docstring.
        task: "classification", "causal-lm", "seq2seq-lm", "lm" (whichever of the two language
            models it is), "masked-lm", "feature" (no head), "token-classification",
            "question-answering", "regression" (one number), "multilabel", "multiple-choice" or
            "image-classification", whose `tokenizer` is the image processor.
        labels: the classes, in the order of the head's outputs; None keeps the checkpoint's.
            A trained head of another size is replaced by a new one.
        dtype: "float32", "bfloat16", "float16" or "auto" (the checkpoint's).
        attn: transformers' attention implementation; None lets the model choose.
        seed: draws the new head; the caller's random state is left alone.
        quantize: how linears inside the blocks are quantised; None leaves them.
        note: told one line before a conversion that takes long; default: standard error.

    Raises:
        SettingsError: an argument is not one of those allowed, or `spec` names nothing.
        FormatError: what `spec` names is not a whole model for this task.

    Example:
        >>> base = load_base("demo:minilm", labels=["no", "yes"])  # doctest: +SKIP
        >>> base.fresh  # doctest: +SKIP
        ('classifier.bias', 'classifier.weight')
    """
    from graftune.sites import originals
    from graftune.sites.quantised import keep_exact, share_tables

    _check_settings(task, labels, dtype, attn)
    if quantize is not None:
        quantize.check()
    source = locate(spec, note or _to_stderr)
    with quiet(), _clear_errors(spec, task, source):
        config = _config(source, labels, task)
        check_plain(config, spec, quantize)
        if task == LANGUAGE_MODEL:
            task = "seq2seq-lm" if config.is_encoder_decoder else "causal-lm"
        model, fresh = _model(source, config, task, dtype, attn, seed, quantize)
        tokenizer = _image_processor(source) if task == IMAGE_TASK else _tokenizer(source)
    keep_exact(model)
    share_tables(model)
    _refuse_gaps(model, fresh, spec, task)
    if task != IMAGE_TASK:
        _agree_on_padding(tokenizer, model)
    _rename(model, spec)
    originals.remember(model, source)
    folder = source if isinstance(source, Path) else None
    return Base(model=model, tokenizer=tokenizer, spec=spec, folder=folder, fresh=fresh)


def base_config(spec: str) -> PreTrainedConfig | None:
    """Returns a base's configuration without its weights; None where it isn't converted yet.

    Raises:
        SettingsError: `spec` names nothing.
        FormatError: what it names is not a model's folder.
    """
    if is_gguf(spec):
        return None
    source = locate(spec, _to_stderr)
    with quiet(), _clear_errors(spec, "classification", source):
        return _config(source, None, "classification")


def load_shell(spec: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Returns a base's body without values, on the meta device, and its tokenizer.

    No weight is read.

    Raises:
        SettingsError: `spec` names nothing.
        FormatError: what it names is not a model's folder.
    """
    import torch
    from transformers import AutoModel, GenerationConfig

    source = locate(spec, _to_stderr)
    with quiet(), _clear_errors(spec, "feature", source), torch.device("meta"):
        model = AutoModel.from_config(_config(source, None, "feature"))
        with contextlib.suppress(OSError):  # most encoders have none
            model.generation_config = GenerationConfig.from_pretrained(str(source))
        tokenizer = _tokenizer(source)
    _agree_on_padding(tokenizer, model)
    return model, tokenizer


def _check_settings(task: str, labels: Sequence[str] | None, dtype: str, attn: str | None) -> None:
    """Refuses an argument of `load_base` that can't be, before anything is read."""
    for what, value, allowed in (
        ("task", task, (*TASKS, LANGUAGE_MODEL)),
        ("dtype", dtype, DTYPES),
        ("attn", attn, (None, *ATTENTIONS)),
    ):
        if value not in allowed:
            words = [word for word in allowed if word]
            raise SettingsError(
                f'{what} = "{value}" is not known; choose {listed(words)}.'
                f"{nearest(str(value), words)}"
            )
    if labels is None:
        return
    if task not in WITH_LABELS:
        raise SettingsError(f'labels belong to the tasks {listed(WITH_LABELS)}, not to "{task}"')
    if isinstance(labels, str) or len(labels) < 2:
        raise SettingsError(f"labels = {labels!r}: a classifier needs a list of at least two")
    if twice := sorted({label for label in labels if list(labels).count(label) > 1}):
        raise SettingsError(f"labels names {listed(twice)} more than once")


def _config(source: Path | str, labels: Sequence[str] | None, task: str) -> PreTrainedConfig:
    """Returns the model's configuration, with the classes in it."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(source), trust_remote_code=False)
    if labels is not None:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
        is_set = task == "multilabel"
        config.problem_type = (
            "multi_label_classification" if is_set else "single_label_classification"
        )
    elif task == "question-answering":
        config.num_labels = 2  # a start and an end
    elif task == "regression":
        config.num_labels, config.problem_type = 1, "regression"
    return config


def _model(
    source: Path | str,
    config: PreTrainedConfig,
    task: str,
    dtype: str,
    attn: str | None,
    seed: int,
    quantize: Quantising | None,
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Returns the model in eval mode, and the names of the tensors its checkpoint lacks."""
    import torch
    import transformers

    if task == "seq2seq-lm" and not config.is_encoder_decoder:
        raise SettingsError(
            f'the base model "{source}" is a {config.model_type}, which has no encoder: texts for '
            'texts want an encoder-decoder; a decoder learns answers by the task "instruct".'
        )
    auto: Any = getattr(transformers, TASKS[task])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, report = auto.from_pretrained(
            str(source),
            config=config,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            attn_implementation=attn,
            use_safetensors=True,
            trust_remote_code=False,
            key_mapping=_renamed(auto, config),
            ignore_mismatched_sizes=task in NEW_HEADS,
            output_loading_info=True,
            **_quantised(auto, config, dtype, quantize),
        )
    if quantize is not None:
        check_done(model, quantize)
    mismatched = [entry[0] for entry in report["mismatched_keys"]]
    return model.eval(), tuple(sorted({*report["missing_keys"], *mismatched}))


def _quantised(
    auto: Any, config: PreTrainedConfig, dtype: str, quantize: Quantising | None
) -> dict[str, Any]:
    """Returns what a quantised base is loaded with besides."""
    import torch

    if quantize is None:
        return {}
    computes = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    asked = quantize.config(computes, left_alone(auto, config, quantize.width))
    return {"quantization_config": asked, "device_map": {"": device()}}


def _renamed(auto: Any, config: PreTrainedConfig) -> dict[str, str] | None:
    """Returns how a class that calls its body otherwise than its type does finds it in checkpoints.

    So do LLaMA's and others' classes for question answering: "transformer", where all else of the
    type says "model", and loading would leave the whole body random.
    """
    kind: Any = auto._model_mapping.get(type(config), None)
    kind = kind[0] if isinstance(kind, tuple) else kind
    above = (
        one for one in getattr(kind, "__mro__", ()) if one.__name__.endswith("PreTrainedModel")
    )
    usual, own = getattr(next(above, None), "base_model_prefix", ""), getattr(kind, PREFIX, "")
    return {rf"^{usual}\.": f"{own}."} if usual and own and usual != own else None


def _image_processor(source: Path | str) -> Any:
    """Returns a base's image processor: Pillow's, so that all machines have the same numbers."""
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(str(source), backend="pil")


def _tokenizer(source: Path | str) -> PreTrainedTokenizerBase:
    """Returns the model's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)


def _refuse_gaps(model: PreTrainedModel, fresh: tuple[str, ...], spec: str, task: str) -> None:
    """Refuses a checkpoint that lacks more than a new head or an unused pooler.

    Raises:
        FormatError: parts of the pretrained model would be random numbers.
    """
    prefix = model.base_model_prefix + "."
    whole = model.base_model is model
    gaps = [
        name
        for name in fresh
        if "pooler" not in name
        and not (task == "question-answering" and name.startswith(SPAN_HEAD))
        and (task not in NEW_HEADS or whole or name.startswith(prefix))
    ]
    if gaps:
        shown = ", ".join(gaps[:SHOWN]) + (" …" if len(gaps) > SHOWN else "")
        raise FormatError(
            f'the checkpoint of "{spec}" cannot serve {task} as {type(model).__name__}: '
            f"{len(gaps)} of its tensors are missing or of another size ({shown})"
        )


def _agree_on_padding(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Gives a tokenizer without a padding token its end token, and tells the model.

    A decoder's classification head finds each row's last real token by the padding id.
    """
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    generation = getattr(model, "generation_config", None)
    if generation is not None and generation.pad_token_id is None:
        generation.pad_token_id = tokenizer.pad_token_id


def _rename(model: PreTrainedModel, spec: str) -> None:
    """Makes the model answer to `spec`: a cache's path means nothing on another machine."""
    model.name_or_path = spec
    model.config.name_or_path = spec


@contextlib.contextmanager
def _clear_errors(spec: str, task: str, source: Path | str) -> Generator[None]:
    """Turns what transformers raises while loading into one sentence."""
    from safetensors import SafetensorError

    try:
        yield
    except GraftuneError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        why = " ".join(str(error).split("\n")[0].split())
        if isinstance(source, Path):
            raise FormatError(
                f'the base model "{spec}" cannot be loaded for {task} from {source}: {why}'
            ) from error
        raise not_found(spec, why) from error


def _to_stderr(line: str) -> None:
    """Prints one line where it doesn't mix with results."""
    print(line, file=sys.stderr, flush=True)
