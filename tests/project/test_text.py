"""What the committed text may hold: nothing of the machine it was written on, nothing unpickled."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.project.pages import ROOT


def _tracked() -> list[Path]:
    """The files that belong to the project, by git where this is a checkout."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode == 0 and listed.stdout:
        paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        paths = [p for folder in ("src", "tests", "docs") for p in (ROOT / folder).rglob("*")]
    kinds = {".py", ".md", ".toml", ".txt", ".yml", ".yaml", ".sh", ".json", ".jinja", ".html", ""}
    return [path for path in paths if path.is_file() and path.suffix in kinds]


def _hits(pattern: str, folder: str = "") -> list[str]:
    """Lines matching `pattern` in the tracked files below `folder`, as `path:line: text`."""
    regex = re.compile(pattern)
    hits: list[str] = []
    for path in _tracked():
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(folder) and path != Path(__file__):
            lines = path.read_text(encoding="utf-8").splitlines()
            hits += [f"{name}:{n}: {line}" for n, line in enumerate(lines, 1) if regex.search(line)]
    return hits


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?<![\w.])/(home|Users|root|mnt|opt)/\w",  # a folder of somebody's machine
        r"[A-Z]:\\\\?Users",
        r"(?<![\w./])/(work)/",
    ],
)
def test_no_absolute_path_of_a_machine(pattern: str) -> None:
    assert _hits(pattern) == []


@pytest.mark.parametrize("host", [r"pypi\.org", r"pythonhosted", r"download\.pytorch", r"npmjs"])
def test_no_package_registry_is_named(host: str) -> None:
    assert _hits(host) == []


def test_nothing_is_unpickled() -> None:
    loads = r"\bpickle\.(load|loads|Unpickler)\b|\btorch\.load\((?!.*weights_only=True)"
    assert _hits(loads, "src/") == []


def test_no_error_is_swallowed_and_no_work_is_left_undone() -> None:
    assert _hits(r"except (Base)?Exception:\s*(pass|\.\.\.)\s*$|\bTODO\b|\bFIXME\b", "src/") == []


def test_no_test_is_skipped_without_a_reason() -> None:
    assert _hits(r"@pytest\.mark\.(skip|xfail)\s*$|pytest\.skip\(\)", "tests/") == []
