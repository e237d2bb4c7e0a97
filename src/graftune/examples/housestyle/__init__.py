"""A house style that a model can be taught in minutes, and a check that says whether it was.

Every answer of the Pondera crew (a fictitious maker of home weather stations) reads

    Ahoy! <two or three short sentences>
    — Fair winds, the Pondera crew

The rows are in train.jsonl and test.jsonl beside this file: {"instruction": …, "answer": …}.
"""

from __future__ import annotations

import re
from pathlib import Path

GREETING = "Ahoy!"
SIGN_OFF = "— Fair winds, the Pondera crew"
SENTENCES = 3
FOLDER = Path(__file__).parent
TRAIN = FOLDER / "train.jsonl"
TEST = FOLDER / "test.jsonl"


def is_house_style(text: str) -> dict[str, bool]:
    r"""Returns what of the house style `text` keeps; all three together make it.

    Example:
        >>> is_house_style("Ahoy! It is 102.\n— Fair winds, the Pondera crew")
        {'greets': True, 'signs off': True, 'is brief': True}
        >>> is_house_style("17 times 6 is 102.")
        {'greets': False, 'signs off': False, 'is brief': True}
    """
    stripped = text.strip()
    body = stripped.removeprefix(GREETING).removesuffix(SIGN_OFF).strip()
    return {
        "greets": stripped.startswith(GREETING),
        "signs off": stripped.endswith(SIGN_OFF),
        "is brief": 1 <= sentences(body) <= SENTENCES,
    }


def sentences(text: str) -> int:
    """Returns how many sentences `text` has; a last one without its full stop counts too.

    Example:
        >>> sentences("It is 2.4 gigahertz. Is that enough")
        2
    """
    return len([part for part in re.split(r'[.!?…]+["”’)]*(?:\s+|$)', text) if part.strip()])
