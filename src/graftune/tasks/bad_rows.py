"""Rows that can't be used: an error by default, left out and counted where that was asked for."""

from __future__ import annotations

from dataclasses import dataclass, field

from graftune.errors import DataError

KEPT_REASONS = 20
"""Different reasons that are kept; further ones are counted together, so that memory stays flat."""
_OTHERS = "other reasons"


@dataclass
class BadRows:
    """What was left out of a split, and why."""

    count: int = 0
    reasons: dict[str, int] = field(default_factory=dict[str, int])
    """Rows by reason."""
    places: dict[str, str] = field(default_factory=dict[str, str])
    """Where the first row of each reason stands, as `mail.csv:12`."""

    def add(self, where: str, reason: str) -> None:
        """Counts a row."""
        self.count += 1
        known = reason in self.reasons or len(self.reasons) < KEPT_REASONS
        reason = reason if known else _OTHERS
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        self.places.setdefault(reason, where)

    def notes(self, split: str) -> list[str]:
        """Returns what to say of it: the number, and each reason with its first place."""
        if not self.count:
            return []
        rows = "row was" if self.count == 1 else "rows were"
        said = [f"{self.count} {split} {rows} left out (data.skip_bad)."]
        for reason, count in sorted(self.reasons.items(), key=lambda one: -one[1]):
            said.append(f"{count} × {self.places[reason]}: {reason}")
        return said


def refuse(bad: BadRows | None, where: str, reason: str) -> None:
    """Counts a row that can't be used, or raises DataError where none may be left out."""
    if bad is None:
        raise DataError(f"{where}: {reason}")
    bad.add(where, reason)
