"""What a comparison found: how each method did, how sure that is, and what to choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from graftune.compare.report import words
from graftune.compare.report.view import main_metric, scores_of, split_of
from graftune.compare.results import Record, Status
from graftune.compare.settings import CompareSettings
from graftune.compare.statistics import Standing, standings

if TYPE_CHECKING:
    from graftune.compare.run import Plan


@dataclass(frozen=True)
class MemberOutcome:
    """How one method did."""

    label: str
    kind: str
    """ "adapter", "probe" or "in-context"."""
    trials: tuple[Record, ...]
    runs: tuple[Record, ...]
    """One for each seed."""
    lr: float | None = None
    """The chosen learning rate; None for the method's own."""
    status: Status = "done"
    """Not "done" if a run failed or was left out; those that are done still count."""
    why: str = ""

    @property
    def done(self) -> list[Record]:
        """The runs that have a result."""
        return [one for one in self.runs if one.is_done]

    @property
    def rate(self) -> float | None:
        """The learning rate that the runs had."""
        return next((one.lr for one in self.done), self.lr)

    @property
    def parameters(self) -> int | None:
        """Trained parameters."""
        found = [one.result["parameters"].get("trainable") for one in self.done]
        return next((int(count) for count in found if count is not None), None)

    @property
    def memory(self) -> float | None:
        """Bytes of the runs' own peak, their mean."""
        return _mean([one.memory_bytes for one in self.done])

    @property
    def seconds(self) -> float | None:
        """Wall time of training, its mean; of what doesn't train, of the whole run."""
        return _mean([one.result["costs"].get("start_seconds") or one.seconds for one in self.done])

    @property
    def disk(self) -> float | None:
        """Bytes of the adapter on disk."""
        return _mean([one.result.get("adapter_bytes") for one in self.done])

    def values(self, metric: str) -> list[float]:
        """Returns the metric of each run on held-out rows."""
        found = [scores_of(one.result).get(metric) for one in self.done]
        return [value for value in found if value is not None]


@dataclass(frozen=True)
class Comparison:
    """Everything that a comparison found."""

    settings: CompareSettings
    metric: str
    """What the methods are compared by; "" if none was measured."""
    split: str
    rows: int
    """Rows of that split."""
    members: tuple[MemberOutcome, ...]
    standings: tuple[Standing, ...]
    """The methods that were measured, the best first."""
    steps: dict[str, int]
    seconds: float
    data: dict[str, Any] = field(default_factory=dict[str, Any])

    @classmethod
    def of(
        cls,
        settings: CompareSettings,
        plan: Plan,
        members: Sequence[MemberOutcome],
        seconds: float,
    ) -> Comparison:
        """Returns the comparison of methods that were run."""
        results = [one.result for member in members for one in member.done]
        main = next((found for one in results if (found := main_metric(one))), None)
        metric = main[0] if main else ""
        split = split_of(results[0]) if results else "test"
        values = {m.label: found for m in members if (found := m.values(metric))}
        scores = {m.label: [one.scores for one in m.done] for m in members if m.label in values}
        ranked = standings(
            values,
            scores,
            is_falling=metric in words.LOWER_IS_BETTER,
            is_share=metric in words.SHARES,
            is_of_rows=metric == "accuracy",
        )
        rows = int(plan.data["rows"].get(split, 0))
        return cls(
            settings, metric, split, rows, tuple(members), tuple(ranked), plan.steps, seconds,
            plan.data,
        )  # fmt: skip

    def member(self, label: str) -> MemberOutcome:
        """Returns a method's outcome."""
        return next(one for one in self.members if one.label == label)

    @property
    def as_good(self) -> list[str]:
        """The best method, and those that can't be told from it."""
        return [one.label for one in self.standings if one.is_as_good]

    @property
    def winner(self) -> str | None:
        """The best method, if it is better than all others for sure."""
        found = self.as_good
        return found[0] if len(found) == 1 and len(self.standings) > 1 else None

    def to_dict(self) -> dict[str, Any]:
        """Returns the comparison as plain values."""
        from graftune.compare.recommendation import recommendation

        return {
            "settings": self.settings.to_dict(),
            "metric": self.metric,
            "split": self.split,
            "rows": self.rows,
            "winner": self.winner,
            "as_good": self.as_good,
            "recommendation": recommendation(self),
            "standings": [asdict(one) for one in self.standings],
            "methods": [_plain(one, self.metric) for one in self.members],
            "seconds": self.seconds,
        }


def _plain(member: MemberOutcome, metric: str) -> dict[str, Any]:
    return {
        "label": member.label,
        "kind": member.kind,
        "status": member.status,
        "why": member.why,
        "lr": member.rate,
        "values": member.values(metric),
        "parameters": member.parameters,
        "memory_bytes": member.memory,
        "seconds": member.seconds,
        "adapter_bytes": member.disk,
        "trials": [
            {
                "lr": one.lr,
                "status": one.status,
                "why": one.why,
                "validation": one.result.get("metrics", {}).get("validation", {}),
            }
            for one in member.trials
        ],
        "run_dirs": [str(one.result["run_dir"]) for one in member.done],
    }


def _mean(values: Sequence[Any]) -> float | None:
    known = [float(value) for value in values if value is not None]
    return sum(known) / len(known) if known else None
