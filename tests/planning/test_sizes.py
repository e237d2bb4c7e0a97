from __future__ import annotations

import pytest

from graftune.errors import SettingsError
from graftune.planning.sizes import parse_bytes


def test_binary_and_decimal_units_differ() -> None:
    assert parse_bytes("8GiB") == 8 * 2**30
    assert parse_bytes("8GB") == 8 * 10**9


def test_units_are_read_in_any_case_and_with_blanks() -> None:
    assert parse_bytes(" 1.5 gib ") == 3 * 2**29


@pytest.mark.parametrize("text", ["8", "8 gigs", "much", "", "-3GiB", "0GiB"])
def test_nonsense_is_refused_with_what_was_expected(text: str) -> None:
    with pytest.raises(SettingsError, match="expected"):
        parse_bytes(text, "--fit")


def test_the_nearest_unit_is_named() -> None:
    with pytest.raises(SettingsError, match='Did you mean "GiB"'):
        parse_bytes("8GiBs")
