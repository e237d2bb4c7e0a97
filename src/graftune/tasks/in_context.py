"""In-context learning: nothing is trained, the prompt shows some training rows before a question.

    instruction ⏎⏎ demonstration 1 ⏎⏎ … ⏎⏎ demonstration k ⏎⏎ question ─> argmax_y log p(y | prompt)

It is no adapter, but a baseline under the same commands: `method: {name: in-context, shots: 8}`.
What may be switched are the four aspects of demonstrations: which label goes with which input, what
the inputs are, which labels there are, and the format (Min et al. 2022, arXiv 2202.12837).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from graftune.errors import SettingsError
from graftune.tasks.settings import TaskOptions
from graftune.tasks.templates import Template
from graftune.tasks.verbalizer import Combine

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig

ANSWERED = "Text: {text}\nLabel: {label}"
MASKED = "{text} Label: {mask}."
"""The templates of language models and of masked models where none is given."""
PAIRED = {"{text}": "{text}\n{text_pair}"}
_FORMS = ("incontext", "icl", "hardprompt")


class InContext(TaskOptions):
    """Settings of in-context learning; `shots: 0` is a hard prompt alone."""

    name: ClassVar[str] = "in-context"
    summary: ClassVar[str] = "demonstrations in the prompt; trains nothing (a baseline)"
    paper: ClassVar[str] = "Brown et al. 2020, arXiv 2005.14165"

    shots: Annotated[int, Field(ge=0)] = 8
    """Demonstrations before each question; 0: the template alone."""
    template: str | None = None
    """How a row is written, as "{text} It was {label}."; {mask} in place of {label} for a masked
    model; without either the answer comes last. Default: "Text: {text}", below it "Label: …"."""
    instruction: str = ""
    """What stands before the first demonstration; the system's turn of a chat."""
    separator: str = "\n\n"
    """What stands between instruction, demonstrations and question."""
    words: dict[str, str | list[str]] = Field(default_factory=dict)
    """What the model says for a label, one word or several. Default: the label's name."""
    combine: Combine = "mean"
    """How a label's score comes from those of several words."""
    length_normalised: bool = True
    """Score a word of several tokens by their mean log-probability, not by its sum."""
    select: Literal["random", "balanced", "nearest"] = "random"
    """Which training rows are shown: any; as many of each label; or for each question those whose
    texts are nearest to its own by the base's mean hidden state, the nearest last."""
    order: int | None = None
    """Seed of the demonstrations' order. Default: `train.seed`, which also draws the rows."""
    labels: Literal["gold", "random"] = "gold"
    """The labels of the demonstrations: their own, or any."""
    inputs: Literal["gold", "random"] = "gold"
    """The texts of the demonstrations: their own, or as many words drawn from all of them."""
    format: Literal["pairs", "labels-only", "inputs-only"] = "pairs"
    """What is shown of a demonstration: text and label in the template, or one of them alone."""
    share: bool = True
    """Run what all prompts have in common once, and a question once for all labels."""
    against: str | None = None
    """The run of a trained adapter: after how many predictions was training it cheaper?"""


@dataclass(frozen=True)
class Demonstrations:
    """What may be shown before a question."""

    rows: list[dict[str, Any]]
    """The fields of examples, in the order in which they are shown; to choose from if there are
    vectors."""
    vectors: Tensor | None = field(default=None, compare=False)
    """The texts' mean hidden states, `(rows, width)`, where the nearest are shown."""


def is_in_context(method: Mapping[str, Any]) -> bool:
    """Whether a run's `method` settings ask for a prompt and not for an adapter.

    Example:
        >>> is_in_context({"name": "InContext"}), is_in_context({"name": "lora"})
        (True, False)
    """
    return "".join(filter(str.isalnum, str(method["name"]).lower())) in _FORMS


def in_context_of(method: Mapping[str, Any]) -> InContext:
    """Returns the settings in a run's `method`.

    Raises:
        SettingsError: A key is unknown, a value can't be, or the template is none.
    """
    given = {key: value for key, value in method.items() if key != "name"}
    found = InContext.of(InContext.name, given, "method")
    if found.template is not None:
        _check_template(Template.of(found.template))
    if found.shots == 0 and found.select == "nearest":
        raise SettingsError("method.select is nearest, but method.shots is 0: nothing is shown.")
    if found.select == "nearest" and found.inputs == "random":
        raise SettingsError("method.inputs is random: of random texts none is the nearest.")
    return found


def template_of(
    settings: InContext, base: str, config: PreTrainedConfig | None, columns: Mapping[str, str]
) -> Template:
    """Returns the template for a base, its slots called by their roles.

    Args:
        settings: The user's.
        base: What the base is called.
        config: The base's; None for one that is not converted yet, which is a language model.
        columns: The data's column of each role.

    Raises:
        SettingsError: It isn't for such a base, or has a slot that isn't in the data.
    """
    masked = config is not None and is_masked(config)
    text = settings.template
    if text is None:
        text = MASKED if masked else ANSWERED
        if "text_pair" in columns:
            text = text.replace(*next(iter(PAIRED.items())))
    template = Template.of(text)
    if not (template.has("label") or template.has("mask") or masked):
        template = Template.of(f"{text.rstrip()} {{label}}")
    if masked and not template.has("mask"):
        raise SettingsError(
            f'method.template "{text}" has no {{mask}}, but {base} is a masked model, which '
            "answers there and nowhere else."
        )
    if template.has("mask") and not masked:
        raise SettingsError(
            f'method.template "{text}" has {{mask}}, but {base} is no masked model: write '
            "{label} where the answer comes."
        )
    return template.bound(columns)


def is_masked(config: PreTrainedConfig) -> bool:
    """Whether a model predicts masked tokens rather than the next one."""
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    decodes = config.is_encoder_decoder or getattr(config, "is_decoder", False)
    return type(config) in MODEL_FOR_MASKED_LM_MAPPING and not decodes


def _check_template(template: Template) -> None:
    if template.soft_tokens:
        raise SettingsError(
            f'method.template "{template.text}" has {template.soft_tokens} soft tokens, which are '
            "trained: a hard prompt has none; PromptTuning and PTuning train theirs."
        )
    late = template.parted()[1].texts
    if late:
        raise SettingsError(
            f'method.template "{template.text}": {{{late[0]}}} stands after {{label}}, but a '
            "language model answers last."
        )
