import subprocess
import sys

import pytest

COMMANDS = [
    *("demo", "plan", "train", "evaluate", "predict", "inspect", "convert", "merge", "methods"),
    *("intrinsic", "transfer"),
]
HEAVY = ["torch", "transformers", "datasets", "pydantic", "jinja2", "numpy", "rich", "yaml"]
LIST_MODULES = """
import sys
from graftune.cli import main
sys.argv = ["graftune", *{arguments!r}]
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended.code
print("loaded:", *(name for name in {heavy!r} if name in sys.modules))
"""


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments):
    # typer itself brings pydantic to a command's own arguments where it is installed
    heavy = HEAVY if arguments == ["--help"] else [one for one in HEAVY if one != "pydantic"]
    code = LIST_MODULES.format(arguments=arguments, heavy=heavy)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "loaded:"


def test_commands_are_listed_in_the_order_of_use_and_none_is_cut(graftune):
    listed = graftune("--help").out.partition("Commands:")[2]
    assert [line.split()[0] for line in listed.strip().splitlines()] == COMMANDS
    assert "..." not in listed


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_examples_and_json(graftune, command):
    ended = graftune(command, "--help")
    assert ended.code == 0
    assert "Examples:" in ended.out
    assert f"graftune {command}" in ended.out
    assert "--json" in ended.out
    assert "--debug" in ended.out


def test_options_stand_under_their_headings(graftune):
    text = graftune("train", "--help").out
    places = [text.index(f"\n{name}:\n") for name in ("Base and data", "Method", "Run", "Output")]
    assert places == sorted(places)
    assert text.index("  --r <") > text.index("\nMethod:\n")


def test_no_command_shows_the_help(graftune):
    ended = graftune()
    assert ended.code == 2
    assert "Commands:" in ended.err


def test_an_unknown_command_names_the_nearest(graftune):
    ended = graftune("trian")
    assert ended.code == 2
    assert "train" in ended.err
