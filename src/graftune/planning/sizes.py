"""Amounts of memory as people write them: 8GiB, 24 GB, 512MiB."""

from __future__ import annotations

import re

from graftune.errors import SettingsError, nearest

UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_AMOUNT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str | int, name: str = "an amount of memory") -> int:
    """Returns bytes; GB counts in thousands, GiB in 1024s.

    Args:
        text: a number with its unit; a whole number alone is bytes if it is no text.
        name: what it is, for the error.

    Raises:
        SettingsError: it is no amount, or none above zero.

    Example:
        >>> parse_bytes("8GiB"), parse_bytes("8 GB"), parse_bytes("1.5mib")
        (8589934592, 8000000000, 1572864)
    """
    if isinstance(text, int) and not isinstance(text, bool) and text > 0:
        return text
    found = _AMOUNT.fullmatch(str(text))
    if found is None:
        raise SettingsError(f'{name} is "{text}", expected a number and a unit, as in 8GiB or 8GB.')
    number, unit = found.groups()
    known = {unit.lower(): size for unit, size in UNITS.items()}
    if unit.lower() not in known:
        said = f'the unit "{unit}"' if unit else "no unit"
        raise SettingsError(
            f'{name} is "{text}", with {said}; expected one of {", ".join(UNITS)}.'
            f"{nearest(unit, UNITS)}"
        )
    amount = int(float(number) * known[unit.lower()])
    if amount <= 0:
        raise SettingsError(f'{name} is "{text}", expected more than nothing.')
    return amount
