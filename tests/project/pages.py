"""Reads the code blocks out of the project's Markdown pages, for the tests that run them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w+)[^\n]*\n(?P<text>.*?)^(?P=indent)```\s*$", re.M | re.S
)
_NOT_RUN = re.compile(r"<!-- not run: .{8,} -->\s*\Z")


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block: its language, its text and the line it starts at."""

    language: str
    text: str
    line: int


def blocks(page: Path, *languages: str) -> list[Block]:
    """Returns the page's blocks in these languages, but those after `<!-- not run: reason -->`."""
    text = page.read_text(encoding="utf-8")
    found: list[Block] = []
    for match in _FENCE.finditer(text):
        if match["language"] in languages and not _NOT_RUN.search(text[: match.start()]):
            body = re.sub(rf"^{match['indent']}", "", match["text"], flags=re.M)
            line = text[: match.start()].count("\n") + 1
            found.append(Block(language=match["language"], text=body, line=line))
    return found


def run_python(page: Path) -> dict[str, object]:
    """Runs a page's Python blocks one after the other in one namespace, which is returned.

    Tracebacks name the page and the line in it.
    """
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page, "python"):
        source = "\n" * block.line + block.text
        exec(compile(source, str(page), "exec"), namespace)
    return namespace


def commands(page: Path) -> list[str]:
    """Returns the page's shell commands, continuation lines joined, comments left out."""
    lines: list[str] = []
    for block in blocks(page, "bash", "sh", "console"):
        joined = re.sub(r"\s*\\\n\s*", " ", block.text)
        lines += [re.sub(r"\s+#.*", "", line).removeprefix("$ ") for line in joined.splitlines()]
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]
