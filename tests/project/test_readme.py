"""The README does what it says: its snippet runs, its commands exist, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from graftune.methods import methods
from tests.project.pages import ROOT, blocks, commands, run_python

README = ROOT / "README.md"
COMMANDS = commands(README)
TARGETS = ("setup", "demo", "demo-chat", "test", "test-all", "lint", "bench", "docs")
BIN = Path(sys.executable).parent


def _run(command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs one README command; `graftune` is the one of this environment."""
    words = shlex.split(command)
    if words[0] == "graftune":
        words[0] = str(BIN / "graftune")
    return subprocess.run(
        words, cwd=cwd, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )


def _targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))


def test_the_two_commands_are_there() -> None:
    assert {"make demo", "make demo-chat"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_is_one_that_is_run_here(command: str) -> None:
    assert command.split()[0] in {"make", "graftune"}
    if command.startswith("make"):
        assert command.split()[1] in _targets()


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("graftune")])
def test_each_graftune_command_has_the_options_it_is_shown_with(
    command: str, tmp_path: Path
) -> None:
    name, *words = command.split()[1:]
    shown = _run(f"graftune {name} --help", tmp_path)
    assert shown.returncode == 0, shown.stderr
    for option in [word for word in words if word.startswith("--")]:
        assert re.search(rf"{option}\b", shown.stdout), option


@pytest.mark.slow
def test_the_graftune_commands_run_one_after_the_other(tmp_path: Path) -> None:
    write_mail(tmp_path / "mail.csv")
    for command in [c for c in COMMANDS if c.startswith("graftune")]:
        result = _run(command, tmp_path)
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
        assert result.stdout.strip(), command


def write_mail(path: Path) -> None:
    """Writes the rows that the README's `mail.csv` stands for."""
    things = ["lamp", "chair", "kettle", "radio", "clock", "fan", "mirror", "scale", "torch", "mug"]
    lines = ["text,label"]
    for thing in things:
        lines += [f"Where is my {thing}?,parcel", f"My {thing} has not arrived yet,parcel"]
        lines += [f"Money back for the {thing} please,refund", f"Refund my {thing},refund"]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.parametrize("target", ["demo", "demo-chat"])
def test_what_a_demo_target_runs_has_all_its_options(target: str, tmp_path: Path) -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    recipe = re.search(rf"^{target}:.*\n\t\$\(BIN\)/(graftune .*)$", makefile, re.M)
    assert recipe
    words = recipe[1].split()
    shown = _run("graftune demo --help", tmp_path)
    assert shown.returncode == 0, shown.stderr
    for option in [word for word in words if word.startswith("--")]:
        assert option in shown.stdout


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make")])
def test_each_make_command_runs(command: str) -> None:
    """As a user types it, in this checkout, which `make` has already set up or sets up now."""
    result = _run(command, ROOT)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]


def test_the_python_example_runs_and_learns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace = run_python(README)
    assert (tmp_path / "out/intents/adapter_model.safetensors").is_file()
    assert capsys.readouterr().out.strip()
    answers = namespace["model"](**namespace["batch"]).logits.argmax(-1)  # type: ignore[operator]
    assert answers.tolist() == [0, 1]


def test_the_python_example_is_fifteen_lines() -> None:
    (example,) = blocks(README, "python")
    assert len([line for line in example.text.splitlines() if line.strip()]) <= 15


def test_the_table_of_methods_names_methods_that_exist() -> None:
    rows = re.findall(r"^\| \[`(\w+)`\]\(docs/reference/methods", README.read_text("utf-8"), re.M)
    assert {"LoRA", "BitFit", "FullFineTuning"} <= set(rows) <= set(methods())


def test_links_lead_to_files_that_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README.read_text("utf-8"))
    assert links
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


@pytest.mark.parametrize("target", TARGETS)
def test_the_makefile_has_each_target_and_says_what_it_does(target: str) -> None:
    shown = subprocess.run(
        ["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert re.search(rf"^make {target} +\S", shown.stdout, re.M)
