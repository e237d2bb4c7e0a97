"""What importing graftune may load, and in which direction its parts import each other."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.project.pages import ROOT

HEAVY = ("torch", "transformers", "datasets", "accelerate", "pandas", "sklearn", "peft")


def _loaded(code: str) -> list[str]:
    """The heavy libraries that a fresh process has loaded after running `code`."""
    check = f"import sys; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", f"{code}\n{check}"], capture_output=True, text=True, check=True
    )
    return result.stdout.splitlines()[-1].split()


def test_importing_graftune_loads_no_heavy_library() -> None:
    assert _loaded("import graftune") == []


def test_asking_for_help_loads_no_heavy_library() -> None:
    code = """
import sys
from graftune.cli import main
sys.argv = ["graftune", "--help"]
try:
    main()
except SystemExit as exit:
    assert not exit.code, exit.code
"""
    assert _loaded(code) == []


@pytest.mark.parametrize("command", ["train", "demo", "inspect", "methods"])
def test_asking_a_command_for_help_loads_no_heavy_library(command: str) -> None:
    code = f"""
import sys
from graftune.cli import main
sys.argv = ["graftune", {command!r}, "--help"]
try:
    main()
except SystemExit as exit:
    assert not exit.code, exit.code
"""
    assert _loaded(code) == []


def test_imports_point_one_way() -> None:
    code = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports())"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
