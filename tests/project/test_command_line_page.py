"""The page of the command line says what the command line says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from graftune.tasks.settings import RunSettings
from tests.project.pages import ROOT, blocks

PAGE = ROOT / "docs/reference/command-line.md"


def test_the_table_has_each_command() -> None:
    command = [str(Path(sys.executable).parent / "graftune"), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    there = re.findall(r"^  ([a-z-]+) +\S", shown.partition("Commands:")[2], re.M)
    assert sorted(there) == sorted(
        re.findall(r"^\| `graftune ([a-z-]+)`", PAGE.read_text("utf-8"), re.M)
    )


def test_the_settings_file_is_one(tmp_path: Path) -> None:
    (block,) = blocks(PAGE, "yaml")
    path = tmp_path / "run.yaml"
    path.write_text(block.text, encoding="utf-8")
    settings = RunSettings.from_yaml(path)
    assert settings.method["r"] == 8
    assert settings.run_dir == Path("runs/mail")
