"""Writes the report: one HTML file that needs nothing else, neither network nor script."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graftune.compare.report.comparison import Comparison, compare
from graftune.compare.report.view import Run, RunView, predictions_of, run_view
from graftune.errors import SettingsError


def write_report(result: Any, path: str | os.PathLike[str]) -> Path:
    """Writes one run's report, or several runs' comparison, and returns its path.

    The file is written beside its place and renamed, so a reader never sees half of it.

    Args:
        result: A RunResult, its `to_dict()`, or a sequence of these.
        path: The HTML file to write; its folder is made.

    Raises:
        SettingsError: if `result` is an empty sequence.
    """
    return write_page(render_report(result), path)


def write_page(page: str, path: str | os.PathLike[str]) -> Path:
    """Writes a page's HTML whole or not at all, and returns its path; its folder is made."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(page)
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return target


def render_report(result: Any) -> str:
    """Returns the page's HTML.

    Raises:
        SettingsError: if `result` is an empty sequence.
    """
    runs = [_as_run(one) for one in _as_sequence(result)]
    if not runs:
        raise SettingsError("a report needs at least one run; it was given an empty list")
    comparison = compare(runs) if len(runs) > 1 else None
    return _fill([run_view(run) for run in runs], comparison)


def _fill(views: Sequence[RunView], comparison: Comparison | None) -> str:
    verdict = comparison.verdict if comparison else views[0].verdict
    return fill("template.html.j2", runs=views, comparison=comparison, verdict=verdict)


def fill(template: str, **values: Any) -> str:
    """Returns one of the package's templates with its values in, escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    pages = Environment(
        loader=PackageLoader("graftune.compare.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return pages.get_template(template).render(**values)


def _as_sequence(result: Any) -> Sequence[Any]:
    if isinstance(result, Sequence) and not isinstance(result, str):
        return result
    return [result]


def _as_run(result: Any) -> Run:
    if isinstance(result, Mapping):
        run = dict(result)
    elif hasattr(result, "to_dict"):
        run = dict(result.to_dict())
    elif dataclasses.is_dataclass(result) and not isinstance(result, type):
        run = dataclasses.asdict(result)
    else:
        raise SettingsError(
            f"a report needs a RunResult or a list of them; it was given {type(result).__name__}"
        )
    run.setdefault("predictions", predictions_of(run.get("run_dir")))
    return run
