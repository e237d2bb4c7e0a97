"""Which column of the data is which: named by the user, or found by its usual name."""

from __future__ import annotations

from collections.abc import Iterable

from graftune.errors import DataError, nearest
from graftune.tasks.tables import Table


def find_column(
    table: Table, role: str, named: str | None, usual: Iterable[str], *, required: bool = True
) -> str | None:
    """Returns the column for a role: the one the user named, else the first of the usual names.

    Args:
        table: Where to look.
        role: What the column is for, as in the setting `data.columns.<role>`.
        named: The user's name for it.
        usual: Names to look for, best first; upper and lower case are the same.
        required: Whether not finding it is an error.

    Raises:
        DataError: The named column isn't there, or a required one isn't found.
    """
    columns = table.columns
    if named is not None:
        if named in columns:
            return named
        raise DataError(
            f'{table.source} has no column "{named}" (data.columns.{role}); '
            f"found {_listed(columns)}.{nearest(named, columns)}"
        )
    usual = list(usual)
    lower = {column.lower(): column for column in reversed(columns)}
    found = next((lower[name] for name in usual if name in lower), None)
    if found is None and required:
        hint = next((hint for name in usual if (hint := nearest(name, columns))), "")
        raise DataError(
            f"{table.source} has no {role} column: found {_listed(columns)}, looked for "
            f"{', '.join(usual)}; name it with data.columns.{role}.{hint}"
        )
    return found


def check_columns(table: Table, columns: dict[str, str]) -> None:
    """Checks that a table has the columns that were found in the training data.

    Raises:
        DataError: One is missing.
    """
    have = table.columns
    for role, name in columns.items():
        if name not in have:
            raise DataError(
                f'{table.source} has no column "{name}", which is the {role} of the training '
                f"data; found {_listed(have)}.{nearest(name, have)}"
            )


def _listed(columns: Iterable[str]) -> str:
    return ", ".join(f'"{column}"' for column in columns)
