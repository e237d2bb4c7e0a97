"""What a run gives back, and who may watch it. Nothing here imports torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from graftune.errors import FormatError


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """Everything a finished run knows about itself, as JSON-able values."""

    name: str
    """The run's name."""
    kind: str
    """"adapter" for a trained adapter, "probe" for a linear probe of the frozen base,
    "in-context" for demonstrations in the prompt."""
    settings: dict[str, Any]
    """The settings with every default filled in."""
    versions: dict[str, str]
    """Versions of Python and of the libraries that took part."""
    history: list[dict[str, Any]]
    """What was logged: rows with `step`, `epoch` and `loss`, `lr`, `grad_norm` or `eval_…`."""
    metrics: dict[str, dict[str, float]]
    """The task's metrics by split: "validation", "test"."""
    confusion: list[list[int]]
    """Test rows by true label (row) and answered label (column); empty without labels."""
    labels: list[str]
    """The label names in the order of the confusion; empty without labels."""
    parameters: dict[str, Any]
    """`gt.summary(model).to_dict()`."""
    adapter_bytes: int
    """Size of the adapter's directory on disk."""
    base_bytes: int
    """Size of the base model's weights in memory."""
    seconds: float
    """Wall time from the first row read to the result written."""
    peak_memory_bytes: int
    """The process's (on a GPU: the device's) peak."""
    adapter_path: str
    """The adapter's directory; '' for a probe."""
    run_dir: str
    """The run's directory."""
    data: dict[str, Any] = field(default_factory=dict[str, Any])
    """What was found in the data: `DataReport.to_dict()`."""
    notes: list[str] = field(default_factory=list[str])
    """What the user was told on the way."""
    classes: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """`{label, precision, recall, f1, support}` of each kind of entity in the test rows."""
    heat_maps: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """What the method has to show of the trained adapter: `HeatMap`s as dictionaries."""

    costs: dict[str, float] = field(default_factory=dict[str, float])
    """What the test rows' predictions took: `rows`, `seconds`, `tokens`, and before the first one
    `start_seconds` (training, or a shared prompt). Of prompts also `start_tokens`, and
    `tokens_alone`, those that would have been run without sharing."""
    against: dict[str, Any] = field(default_factory=dict[str, Any])
    """Of prompts: the adapter's run that they are compared with, its `name`, `run_dir`, `costs`,
    and `predictions`, after how many of them it was the cheaper one (None: never)."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the result as nested dictionaries of plain values."""
        return asdict(self)

    def to_json(self) -> str:
        """Returns the result as indented JSON text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def load(cls, run_dir: str | Path) -> RunResult:
        """Returns the result that a run wrote into its directory.

        Raises:
            FormatError: The directory holds no finished run.
        """
        path = Path(run_dir) / "result.json"
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise FormatError(f'"{run_dir}" holds no finished run: there is no {path}.') from None
        except (ValueError, TypeError) as error:
            raise FormatError(f"{path} is not a run's result: {error}.") from error


class Watcher(Protocol):
    """Who watches a run. All methods are called from the training loop, so they must be quick."""

    def on_start(self, plan: dict[str, Any]) -> None:
        """Training begins: `name, task, method, base, run_dir, train_rows, validation_rows,
        test_rows, total_steps, epochs, batch_size, lr, parameters` (a summary's dictionary).
        """
        ...

    def on_step(self, state: dict[str, Any]) -> None:
        """A step was logged: `step, total, epoch, loss, lr, seconds, seconds_left,
        peak_memory_bytes` (`loss` is the mean since the last one).
        """
        ...

    def on_eval(self, metrics: dict[str, Any]) -> None:
        """The validation data was evaluated: `step, epoch, eval_loss` and the task's metrics."""
        ...

    def on_note(self, note: str) -> None:
        """Something worth saying in one sentence."""
        ...

    def on_end(self, result: RunResult) -> None:
        """The run is finished and written."""
        ...


@runtime_checkable
class Checker(Protocol):
    """A watcher that may end a run after any of its steps."""

    def check(self) -> None:
        """Called after each step, whether it is logged or not; what it raises ends the run."""
        ...


class Silent:
    """The watcher that says nothing."""

    def on_start(self, plan: dict[str, Any]) -> None:
        """Does nothing."""

    def on_step(self, state: dict[str, Any]) -> None:
        """Does nothing."""

    def on_eval(self, metrics: dict[str, Any]) -> None:
        """Does nothing."""

    def on_note(self, note: str) -> None:
        """Does nothing."""

    def on_end(self, result: RunResult) -> None:
        """Does nothing."""
