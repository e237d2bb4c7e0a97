"""Which method for which data, and why: what is published, as a function of facts.

    choices by a language model, few rows          (IA)³ as T-Few
    labels or numbers of texts, encoder, few rows  BitFit
    everything else                                LoRA on all linears, its rank by the rows

Lines between "few" and "many" are ours; papers say which way it goes, not where.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

FEW = 1_000
"""Training rows below which they are few."""
MORE = 10_000
MANY = 100_000
LARGE = 1_000_000_000
"""Parameters of a base from which learning rates are those of large language models."""
HUGE = 20_000_000_000
OF_TEXTS = ("classification", "regression", "multilabel", "multitask")
"""Tasks that answer a whole text by a head."""
BY_HEADS = (*OF_TEXTS, "labelling")
"""Tasks whose default is ten passes."""
LENGTHS = ("epochs", "steps")
"""Settings of which one says how long is trained."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a choice is made by."""

    task: str
    rows: int
    """Training rows."""
    parameters: int
    """Parameters of the base."""
    is_encoder: bool
    """Whether the base reads both ways and has no decoder."""
    has_biases: bool
    """Whether its linears have biases."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A method with its settings, those of training, and why."""

    method: dict[str, Any]
    train: dict[str, Any]
    reasons: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Part:
    why: str
    method: dict[str, Any] = field(default_factory=dict[str, Any])
    train: dict[str, Any] = field(default_factory=dict[str, Any])


def choose(facts: Facts, given: Collection[str] = ()) -> Choice:
    """Returns what published work says for such data and such a base.

    Args:
        facts: of the data and the base.
        given: settings of training that are fixed, and left alone.

    Example:
        >>> made = choose(Facts(task="instruct", rows=20_000, parameters=10**8, is_encoder=False,
        ...                     has_biases=False))
        >>> made.method, made.train
        ({'name': 'LoRA', 'r': 16, 'targets': 'blocks'}, {})
    """
    fixed = {*given, *(LENGTHS if set(LENGTHS) & set(given) else ())}
    method: dict[str, Any] = {}
    train: dict[str, Any] = {}
    reasons: list[str] = []
    for part in _parts(facts):
        kept = {key: value for key, value in part.train.items() if key not in fixed}
        if part.method or kept:
            method, train = method | part.method, train | kept
            reasons.append(part.why)
    return Choice(method=method, train=train, reasons=tuple(reasons))


class Fitting(Protocol):
    """What is told of settings that fit: `fitting.Fit`, or anything like it."""

    @property
    def budget_bytes(self) -> int:
        """What they had to fit into."""
        ...

    @property
    def plan(self) -> Any:
        """The plan, with `peak_bytes` and `settings`."""
        ...

    @property
    def changes(self) -> tuple[str, ...]:
        """What differs from what was asked, as `name=value`."""
        ...


def told(fit: Fitting) -> tuple[str, ...]:
    """Returns what a memory asked for, a sentence each."""
    settings = fit.plan.settings
    changed = {change.partition("=")[0] for change in fit.changes}
    said = {
        "accumulation": f"The batch is computed in {settings.accumulation} parts of "
        f"{settings.batch_size}, with the same gradient.",
        "gradient_checkpointing": "Activations are computed twice: the same gradient, a third more "
        "time.",
        "precision": f"The base's weights are {settings.precision}.",
        "optimizer": f"The optimizer is {settings.optimizer}, which keeps less.",
        "quantize": f"The base's linears are kept as {settings.quantize}, on which LoRA came as "
        "far as on 16 bits (Dettmers et al. 2023).",
    }
    size = f"{_size(fit.plan.peak_bytes)} of {_size(fit.budget_bytes)}"
    first = (
        f"A step with rows of {settings.length} tokens, the longest, takes {size} as planned, "
        "besides the process itself."
    )
    return (first, *(text for name, text in said.items() if name in changed))


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _parts(facts: Facts) -> Iterator[_Part]:
    is_few = facts.rows < FEW
    if facts.task == "choices" and is_few:
        yield from _t_few(facts)
    elif facts.task in OF_TEXTS and is_few and facts.is_encoder and facts.has_biases:
        yield _Part(
            method={"name": "BitFit"},
            why=f"BitFit: {facts.rows:,} training rows are few, and on small sets the biases alone "
            "come as far as full fine-tuning, sometimes further (Ben Zaken et al. 2021).",
        )
        yield from _passes(facts)
    else:
        yield from _lora(facts)
        yield from _passes(facts)


def _t_few(facts: Facts) -> Iterator[_Part]:
    yield _Part(
        method={"name": "IA3"},
        why=f"IA3: a language model that chooses learns from few rows, here {facts.rows:,}, by "
        "three scaled vectors a block (T-Few, Liu et al. 2022).",
    )
    yield _Part(
        train={"optimizer": "adafactor"},
        why="The optimizer is Adafactor, as in T-Few.",
    )
    yield _Part(train={"steps": 1000}, why="1,000 steps, as in T-Few.")


def _lora(facts: Facts) -> Iterator[_Part]:
    yield _Part(
        method={"name": "LoRA", "r": _rank(facts.rows), "targets": "blocks"},
        why="LoRA on all linears of attention and feed-forward: with all of them it came as far as "
        "full fine-tuning, with attention's alone it didn't (Dettmers et al. 2023).",
    )
    rows = f"rank {_rank(facts.rows)} for {facts.rows:,} training rows"
    yield _Part(
        method={"r": _rank(facts.rows)},
        why=f"{rows[0].upper()}{rows[1:]}: low ranks are enough for small sets (Hu et al. 2021), "
        "and learn less than full fine-tuning from large ones (Biderman et al. 2024).",
    )
    if facts.parameters >= LARGE:
        rate = 1e-4 if facts.parameters >= HUGE else 2e-4
        yield _Part(
            train={"lr": rate},
            why=f"Learning rate {rate:g}: the base has {facts.parameters / 1e9:.3g} billion "
            "parameters, and large ones want small steps (Dettmers et al. 2023).",
        )


def _rank(rows: int) -> int:
    return 8 if rows < MORE else 16 if rows < MANY else 64


def _passes(facts: Facts) -> Iterator[_Part]:
    if facts.task not in BY_HEADS:
        return
    if facts.rows < FEW:
        yield _Part(
            train={"epochs": 20.0},
            why="20 passes: on few rows short trainings end anywhere (Mosbach et al. 2021).",
        )
        yield _Part(
            train={"warmup": 0.1}, why="A tenth of the steps warm up (Mosbach et al. 2021)."
        )
    elif facts.rows >= MANY:
        yield _Part(
            train={"epochs": 3.0},
            why=f"3 passes: {facts.rows:,} rows are many, and two to four were enough for sets of "
            "that size (Devlin et al. 2019).",
        )
