"""Settings with every default filled in, and checked against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graftune.errors import SettingsError, nearest
from graftune.tasks.quantising import Quantising
from graftune.tasks.settings import RunSettings
from graftune.tasks.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from graftune.methods.base import Method

UNBOUNDED = 1_000_000
"""Tokenizers that know no limit claim one beyond this."""


def method_of(settings: Mapping[str, Any]) -> Method:
    """Returns the method of `{"name": …, settings}`; the name in any case, or its unique beginning.

    Raises:
        SettingsError: There is no such method or setting, or a value can't be.

    Example:
        >>> method_of({"name": "lora", "r": 4}).r, method_of({"name": "full"}).name
        (4, 'FullFineTuning')
    """
    from graftune.methods import methods
    from graftune.methods.base import Method

    given = dict(settings)
    name = _plain(str(given.pop("name")))
    known = {_plain(key): key for key in methods()}
    begun = [key for key in known if key.startswith(name)] if name else []
    whole = name if name in known or len(begun) != 1 else begun[0]
    if whole == "auto":
        raise SettingsError(
            'method is "auto": a method is chosen by `graftune train --method auto`, before a run.'
        )
    return Method.from_dict({"method": known.get(whole, str(settings["name"])), **given})


def resolved(settings: RunSettings, task: Task, method: Method) -> RunSettings:
    """Returns settings in which every default of the task and the method is filled in.

    Doing it twice is doing it once. What needs the data or the model (`max_length`, `precision`)
    stays as it is.

    Raises:
        SettingsError: Settings don't go together.
    """
    train = settings.train
    _check_metric(settings, task)
    check_roles(settings, task)
    _check_optimizer(train.optimizer)
    quantize = Quantising.asked(train)
    if quantize is not None:
        quantize.check()
    _check_report_to(train.report_to)
    select = "last" if 0 in (train.eval_every, train.save_every) else train.select
    if train.early_stop is not None and select != "best":
        raise SettingsError(
            "train.early_stop needs train.select: best, and evaluations and checkpoints on the way."
        )
    if select == "best" and train.save_every and not _multiple(train.save_every, train.eval_every):
        raise SettingsError(
            f"train.save_every is {train.save_every}: to select the best weights it must be a "
            f"multiple of train.eval_every, which is {train.eval_every or 'each epoch'}; or set "
            "train.select: last."
        )
    epochs = train.epochs if train.epochs or train.steps else task.epochs
    return settings.replaced(
        name=settings.run_name,
        out=str(settings.run_dir),
        task_options=task.options.model_dump(mode="json"),
        train={
            "epochs": epochs,
            "batch_size": train.batch_size or task.batch_size,
            "lr": train.lr or method.default_lr,
            "metric": train.metric or task.metric,
            "select": select,
        },
    )


def length_limit(
    settings: RunSettings, task: Task, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> int:
    """Returns the longest example in tokens: what was asked for, at most what the model takes.

    Raises:
        SettingsError: More was asked for.
    """
    if task.reads_images:
        return task.max_length
    limit = most_tokens(model, tokenizer)
    wanted = settings.data.max_length
    if wanted is None:
        return min(task.max_length, limit or task.max_length)
    if limit is not None and wanted > limit:
        raise SettingsError(
            f"data.max_length is {wanted}, but {settings.base} takes at most {limit} tokens."
        )
    return wanted


def most_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Returns how many tokens a model and its tokenizer take at once; None where none say."""
    limits = [limit for limit in (_positions(model), tokenizer.model_max_length) if limit]
    return min([int(found) for found in limits if found < UNBOUNDED], default=None)


def precision(settings: RunSettings) -> str:
    """Returns the type of the base's weights: "float32", "bfloat16" or "float16"."""
    import torch

    if settings.train.precision != "auto":
        return settings.train.precision
    return "bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"


def _multiple(steps: int, of: int | None) -> bool:
    return bool(of) and steps % (of or 1) == 0


def _check_metric(settings: RunSettings, task: Task) -> None:
    metric = settings.train.metric
    known = ("loss", *task.metrics)
    if metric is not None and metric not in known:
        raise SettingsError(
            f'train.metric is "{metric}"; {task.name} has {", ".join(known)}.'
            f"{nearest(metric, known)}"
        )


def _check_optimizer(name: str | None) -> None:
    if name is None:
        return
    from transformers.training_args import OptimizerNames

    known = [str(found.value) for found in OptimizerNames]
    if name not in known:
        hint = nearest(name, known) or f" There are {', '.join(known)}."
        raise SettingsError(f'train.optimizer is "{name}", which transformers doesn\'t know.{hint}')


def _check_report_to(names: Sequence[str]) -> None:
    if not names:
        return
    from transformers.integrations import integration_utils

    known = list(integration_utils.INTEGRATION_TO_CALLBACK)
    there = integration_utils.get_available_reporting_integrations()
    for name in names:
        if name not in known:
            raise SettingsError(
                f'train.report_to is "{name}", which transformers doesn\'t know; it has '
                f"{', '.join(known)}.{nearest(name, known)}"
            )
        if name not in there:
            raise SettingsError(
                f'train.report_to is "{name}", whose package isn\'t installed here; install it, or '
                f"leave it out. Installed: {', '.join(there) or 'none'}."
            )


def check_roles(settings: RunSettings, task: Task) -> None:
    """Checks that the columns that are named are those of the task.

    Raises:
        SettingsError: One is not.
    """
    for role, column in settings.data.columns.model_dump().items():
        if column is not None and role not in task.roles:
            raise SettingsError(
                f'data.columns.{role} is "{column}", but {task.name} has no such column: it knows '
                f"{', '.join(task.roles)}."
            )


def _positions(model: PreTrainedModel) -> int | None:
    """Returns how many positions a model has embeddings for, without those kept for padding."""
    from torch import nn

    limit: int | None = getattr(model.config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        if (
            "position" in name
            and isinstance(module, nn.Embedding)
            and module.padding_idx is not None
        ):
            return module.num_embeddings - module.padding_idx - 1
    return limit if limit and limit > 0 else None


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "").replace(" ", "")
