"""The settings of a run: what is trained, on which data, with which method, and where it goes.

One `RunSettings` says everything. It comes from keyword arguments, a dictionary or a YAML file,
refuses what it doesn't know, and is written, with every default filled in, beside the result.
Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from graftune.errors import SettingsError
from graftune.tasks.settings_message import settings_message
from graftune.tasks.settings_overrides import apply_overrides, parse_override
from graftune.tasks.settings_yaml import KeyPath, dump, read_settings_file

Fraction = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0)]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Columns(_Section):
    """Which column of the data holds what; the usual names are found by themselves."""

    text: str | None = None
    """Classification, regression and choices: the text, or the first of a pair. Seq2seq: what is
    read."""
    text_pair: str | None = None
    """Classification, regression and choices, of pairs: the second text. Embedding: what belongs
    to the first."""
    negative: str | None = None
    """Embedding: a text that doesn't belong to the first of the pair."""
    image: str | None = None
    """Images: the path of the image, beside the file of the rows or from here."""
    value: str | None = None
    """Regression: the number to learn."""
    words: str | None = None
    """Labelling: the words, a list."""
    tags: str | None = None
    """Labelling: the words' tags, a list of the same length."""
    label: str | None = None
    """Classification: the label's name or number. Multilabel: a list of them. Choices: the right
    one, or its number from 0."""
    choices: str | None = None
    """Choices: the answers to choose from, a list; without it, all labels of the training data."""
    instruction: str | None = None
    """Instructions: what is asked."""
    input: str | None = None
    """Instructions: what the question is about (alpaca's `input`, dolly's `context`)."""
    question: str | None = None
    """Spans: what is asked about the passage."""
    context: str | None = None
    """Spans: the passage."""
    answer: str | None = None
    """Instructions: the answer to learn. Spans: the answers, parts of the passage. Seq2seq: what
    is written."""
    messages: str | None = None
    """Instructions: whole conversations, lists of `{role, content}`."""


class DataSettings(_Section):
    """Where the data lies and how it is split."""

    train: str
    """A CSV, TSV, JSONL, JSON, Parquet or CoNLL file, a folder of them, or a `datasets` folder or
    name."""
    validation: str | None = None
    """Like `train`; made from the training data when not given."""
    test: str | None = None
    """Like `train`; made from the training data when not given."""
    columns: Columns = Columns()
    """Columns by name, where they don't have the usual ones."""
    max_length: Annotated[int, Field(ge=4)] | None = None
    """Longest text in tokens; longer ones are cut, and counted. Default: the model's limit, at
    most 512; 384 for spans, whose passages are read in windows, and 1024 for instructions."""
    validation_fraction: Fraction = 0.1
    """Share of the training data held out for validation when no file is given; 0 for none."""
    test_fraction: Fraction = 0.2
    """Share of the training data held out for the test when no file is given; 0 for none."""
    seed: int = 0
    """Seed of the splits that are made here."""
    skip_bad: bool = False
    """Whether rows that can't be read or used are left out, counted and reported; else the first of
    them is an error that names its line."""


class TrainSettings(_Section):
    """How it is trained. What is None takes the task's or the method's default."""

    epochs: Positive | None = None
    """Passes over the training data. Default: 10; 3 for instructions and spans."""
    steps: Count | None = None
    """Optimiser steps, instead of `epochs`."""
    seconds: Positive | None = None
    """Wall time of training after which it ends with what is best so far."""
    batch_size: Count | None = None
    """Examples per step. Default: 8 for choices and instructions, else 16."""
    accumulation: Count = 1
    """Batches whose gradients are summed to one step."""
    lr: Positive | None = None
    """Learning rate at its highest. Default: the method's `default_lr` (LoRA and BitFit 1e-3, full
    fine-tuning 5e-5: few trained values want large steps)."""
    head_lr: Positive | None = None
    """Learning rate of a head that trains with the method. Default: the same."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate goes on after the warm-up."""
    warmup: Fraction = 0.06
    """Share of the steps in which the learning rate rises from 0."""
    optimizer: str | None = None
    """Optimiser by transformers' name, as `adafactor`, `sgd`, `adamw_8bit` or `paged_adamw_8bit`.
    Default: AdamW."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay of the optimiser; biases and norms never decay."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradients are scaled down to this norm; 0 leaves them."""
    seed: int = 0
    """Seed of the new weights, the order of the data and the dropout."""
    eval_every: Annotated[int, Field(ge=0)] | None = None
    """Steps between evaluations on the validation data. Default: each epoch; 0: only at the end."""
    save_every: Annotated[int, Field(ge=0)] | None = None
    """Steps between checkpoints. Default: with each evaluation; 0: never."""
    keep: Count = 1
    """Checkpoints kept, apart from the best one."""
    select: Literal["best", "last"] = "best"
    """Which weights the run ends with: the best on the validation data, or the last."""
    metric: str | None = None
    """What "best" means. Default: accuracy; entity_f1 for labelling, f1 for spans; loss
    for instructions."""
    early_stop: Count | None = None
    """Evaluations in a row without a better metric after which the run ends."""
    head_start: bool = True
    """Begin with a new head for labels of texts or words that is fitted to the frozen base, not
    with noise."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the base's weights; auto: bfloat16 on a GPU that has it, else float32."""
    quantize: Literal["nf4", "fp4", "int8", "torchao-int8", "torchao-int4"] | None = None
    """Load the base's linears in 4 or 8 bit; what is trained beside them is float32."""
    double_quant: bool = True
    """Of `nf4` and `fp4`: quantise the scales too, 4.13 bits a parameter and not 4.5."""
    adapter_precision: Literal["float32", "bfloat16"] = "float32"
    """Type of what is trained; bfloat16 halves it and its optimizer states, less exactly."""
    gradient_checkpointing: bool = False
    """Compute activations twice to keep fewer of them."""
    loss_chunk: Count | None = None
    """Instructions: tokens of which logits and loss are computed at once, so that those of a whole
    batch are never kept. Default: all."""
    offload_activations: bool = False
    """Keep what the backward pass needs in the host's memory, not on the GPU."""
    offload_optimizer: bool = False
    """Keep the optimiser's state in the host's memory between its steps."""
    trunk_cache: bool | None = None
    """Compute what lies below all that trains once, and keep it on disk while it trains. Default:
    where that changes nothing; true: also where the blocks drop out below, which is then off."""
    drop: int | tuple[int, int] = 0
    """Lowest blocks left without adapters (AdapterDrop): so many, always; or [low, high], a number
    drawn in every training pass, and none otherwise."""
    group_by_length: bool = True
    """Make batches of texts of about one length, so that little is padded."""

    packing: bool = False
    """Instructions: put as many conversations into each training row as `data.max_length` has room
    for; they don't see each other, and `batch_size` counts rows."""
    report_to: tuple[str, ...] = ()
    """Where transformers' Trainer logs to besides the run's own files, by its names, as
    `tensorboard`, `wandb` or `mlflow`."""

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_name_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("drop", mode="before")
    @classmethod
    def _numbers_of_blocks(cls, value: Any) -> Any:
        given: list[Any] = list(value) if isinstance(value, list | tuple) else [value, value]
        whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in given)
        if len(given) != 2 or not whole or given[0] > given[1]:
            raise ValueError(f"expected a number of blocks or [low, high], found {value!r}")
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.epochs is not None and self.steps is not None:
            raise ValueError(f"epochs={self.epochs:g} and steps={self.steps}: give one of the two")
        return self


class TaskOptions(_Section):
    """A task's own settings, below `task_options`. A task that has some makes a subclass."""

    @classmethod
    def of(cls, task: str, values: Mapping[str, Any], where: str = "task_options") -> Self:
        """Returns the settings of a task's name, which stand below the key `where`.

        Raises:
            SettingsError: A key is unknown, or a value can't be.
        """
        if values and not cls.model_fields:
            raise SettingsError(f"{where}: the task {task} has none, found {', '.join(values)}.")
        try:
            return cls(**values)
        except ValidationError as error:
            raise SettingsError(settings_message(error, cls, lambda _: where)) from None


class RunSettings(_Section):
    """Everything that a training run is told.

    Example:
        >>> s = RunSettings(base="demo:minilm", data={"train": "mail.csv"}, method="lora")
        >>> s.method, s.data.test_fraction, str(s.run_dir)
        ({'name': 'lora'}, 0.2, 'runs/classification-lora')

    Raises:
        SettingsError: A key is unknown or missing, or a value can't be; it names the key, the
            value and the nearest right one.
    """

    base: str
    """The base model: `demo:minilm`, `demo:smollm2`, a folder, a GGUF file or a hub name."""
    task: str = "classification"
    """`classification` (of texts or pairs), `regression` (numbers), `multilabel` (sets of
    labels), `instruct`, `choices` (among answers), `multiple-choice` (by an encoder's head),
    `labelling` (of words), `spans` (answers in passages), `embedding` (vectors of texts)
    `seq2seq` (texts for texts), `lm` or `masked-lm` (raw text), or `images`."""
    task_options: dict[str, Any] = Field(default_factory=dict)
    """The task's own settings."""
    data: DataSettings
    """Where the data lies."""
    method: dict[str, Any] = Field(default_factory=lambda: {"name": "LoRA"})
    """The method's `name` and its settings; `graftune methods` lists them."""
    beside: dict[str, str] = Field(default_factory=dict)
    """Trained adapters that the method attends to (a fusion's members): names, and the directories
    of their runs or of the adapters themselves."""
    start: str | None = None
    """A trained adapter whose values this one starts from, the directory of its run or its own:
    of the same method and places, or for a soft prompt any of the same length. A head keeps its
    own start."""
    train: TrainSettings = TrainSettings()
    """How it is trained."""
    out: str | None = None
    """The run's directory. Default: `runs/NAME`."""
    name: str | None = None
    """The run's and the adapter's name. Default: TASK-METHOD."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise SettingsError(settings_message(error, type(self))) from None

    @field_validator("method", mode="before")
    @classmethod
    def _name_first(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, Mapping) and "name" not in value:
            raise ValueError('needs a name, as in {"name": "lora", "r": 8}')
        return value

    @field_validator("data", mode="before")
    @classmethod
    def _train_alone(cls, value: Any) -> Any:
        return {"train": value} if isinstance(value, str) else value

    @field_validator("name")
    @classmethod
    def _name_is_a_word(cls, value: str | None) -> str | None:
        if value is not None:
            _check_name(value)
        return value

    @field_validator("beside")
    @classmethod
    def _names_are_words(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            _check_name(name)
        return value

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], where: Callable[[KeyPath], str] | None = None
    ) -> RunSettings:
        """Returns settings from nested dictionaries; `where` puts a place before an error.

        Raises:
            SettingsError: As for the class.
        """
        try:
            return cls._checked(values)
        except ValidationError as error:
            raise SettingsError(settings_message(error, cls, where)) from None

    @classmethod
    def _checked(cls, values: Mapping[str, Any]) -> RunSettings:
        """Returns settings from nested dictionaries, pydantic's own errors left as they are."""
        made = cls.__new__(cls)
        cls.__pydantic_validator__.validate_python(dict(values), self_instance=made)
        return made

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Iterable[str] = ()) -> RunSettings:
        """Returns the settings of a YAML file, changed by `a.b=value` overrides.

        Raises:
            SettingsError: As for the class, with `file:line` before it; or the file can't be read.
        """
        file = read_settings_file(path)
        changes = [parse_override(text) for text in overrides]
        values = apply_overrides(file.values, changes)
        changed = {key for key, _ in changes}

        def where(key: KeyPath) -> str:
            return "--set" if key in changed else file.where(key)

        return cls.from_dict(values, where)

    def with_overrides(self, overrides: Iterable[str]) -> RunSettings:
        """Returns these settings changed by `a.b=value` overrides.

        Raises:
            SettingsError: An override isn't `key=value`, or its key or value can't be.
        """
        changes = [parse_override(text) for text in overrides]
        return self.from_dict(apply_overrides(self.to_dict(), changes), lambda _: "--set")

    def replaced(self, **changes: Any) -> RunSettings:
        """Returns these settings with other values, checked; sections are merged.

        Raises:
            SettingsError: As for the class.
        """
        return self.from_dict(_merged(self.to_dict(), changes))

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as nested dictionaries of plain values."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """Returns the settings as a YAML file's text, which `from_yaml` reads."""
        return dump(self.to_dict())

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """Returns the JSON schema of a settings file, for editors."""
        return cls.model_json_schema()

    @property
    def method_name(self) -> str:
        """The method's name as it was given."""
        return str(self.method["name"])

    @property
    def run_name(self) -> str:
        """The run's name, which is the adapter's too."""
        return self.name or f"{self.task}-{self.method_name.lower()}"

    @property
    def run_dir(self) -> Path:
        """The directory of everything that the run writes."""
        return Path(self.out) if self.out else Path("runs") / self.run_name


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(f'"{name}" is no name: use letters, digits, "-" and "_" only')


def _merged(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(values)
    for key, value in changes.items():
        section = isinstance(value, Mapping) and isinstance(out.get(key), dict) and key != "method"
        out[key] = _merged(out[key], cast(Mapping[str, Any], value)) if section else value
    return out
