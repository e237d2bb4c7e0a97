"""`graftune predict`: answers for texts from the command line, a file or standard input."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from graftune.cli.options import AsJson, Debug, Drop, Vote, With


def predict(
    run: Annotated[Path, typer.Argument(help="The directory of a run or of its adapter.")],
    texts: Annotated[
        list[str] | None, typer.Argument(help="Texts; else --data, else lines of standard input.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="A file of rows to answer.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the answers here, one JSON object a line.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows computed at once.", min=1)] = 32,
    max_new_tokens: Annotated[
        int, typer.Option(help="Longest generated answer, in tokens.", min=1)
    ] = 128,
    base_only: Annotated[
        bool,
        typer.Option(
            "--base-only", help="Answer with the base, without the adapter or demonstrations."
        ),
    ] = False,
    drop: Drop = None,
    others: With = None,
    vote: Vote = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Answer texts with a trained adapter.

    A classifier gives each text a label and how sure it is, a labeller the entities in it, a chat
    model generates an answer, a reader of spans finds it in the row's passage.

    \b
    Examples:
      graftune predict runs/classification-lora "where is my parcel?" "it hums at night"
      graftune predict runs/classification-lora --data mail.csv --out answers.jsonl
      graftune predict runs/a "where is my parcel?" --with runs/b --with runs/c
      cat questions.txt | graftune predict runs/instruct-lora --json
    """
    from graftune.cli import screen
    from graftune.tasks.run import predict as answer

    rows = _rows(texts or [], data)
    found = answer(
        run,
        rows,
        batch_size,
        base_only=base_only,
        max_new_tokens=max_new_tokens,
        drop=drop,
        others=others or (),
        vote=vote,
    )
    if out is not None:
        write_lines(found, out)
    if as_json:
        screen.print_json(found)
    elif out is not None:
        print(f"{len(found)} answers in {out}")
    else:
        _show(rows, found)


def write_lines(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes one JSON object a line, beside the file's place first, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        part.write_text("".join(lines), encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _rows(texts: list[str], data: str | None) -> list[Any]:
    from graftune.errors import DataError

    if texts and data:
        raise DataError(f'both texts and --data "{data}" are given; give one of the two.')
    if data:
        from graftune.tasks.sources import read_split

        return list(read_split(data, "test").rows)
    if not texts and not sys.stdin.isatty():
        texts = [line.strip() for line in sys.stdin if line.strip()]
    if not texts:
        raise DataError(
            'nothing to answer: give texts, as in graftune predict RUN "some text", or --data FILE.'
        )
    return list(texts)


def _show(rows: Sequence[Any], found: Sequence[dict[str, Any]]) -> None:
    from graftune.cli import screen
    from graftune.compare.report import words

    if found and "label" in found[0]:
        table = [[one["label"], words.percent(one["score"]), one["text"]] for one in found]
        columns = ["label", "sure", "text"]
        if "members" in found[0]:
            columns[1:2] = ["votes", "members"]
            for cells, one in zip(table, found, strict=True):
                cells.insert(2, ", ".join(one["members"]))
        screen.print_table(columns, table, numbers=9)
        return
    if found and "entities" in found[0]:
        _show_entities(found)
        return
    if found and "labels" in found[0]:
        table = [[", ".join(one["labels"]) or "(none)", _text(one)] for one in found]
        screen.print_table(["labels", "text"], table, numbers=9)
        return
    if found and "value" in found[0]:
        screen.print_table(
            ["value", "text"], [[words.number(one["value"]), _text(one)] for one in found]
        )
        return
    for row, one in zip(rows, found, strict=True):
        asked = one.get("question") or (row if isinstance(row, str) else words.plain(row))
        print(f"> {asked}\n{one['answer'] or '(no answer)'}\n")


def _text(found: dict[str, Any]) -> str:
    return " | ".join(found[role] for role in ("text", "text_pair") if role in found)


def _show_entities(found: Sequence[dict[str, Any]]) -> None:
    from graftune.cli import screen
    from graftune.compare.report import words

    for one in found:
        print(f"> {' '.join(one['words'])}")
        rows = [
            [mark["type"], words.percent(mark["score"]), mark["text"]] for mark in one["entities"]
        ]
        if rows:
            screen.print_table(["entity", "sure", "text"], rows, numbers=9)
        else:
            print("no entities")
        print()
