"""Heat maps: every value is a cell with its tooltip, readable without a script."""

from __future__ import annotations

import itertools
import re
from typing import Any

from graftune.compare.report import render_report
from graftune.compare.report.heatmap import heat_map
from graftune.methods.base import HeatMap
from tests.compare.results import result


def made(rows: int, columns: int, values: Any = None) -> dict[str, Any]:
    values = values or [[at + column for column in range(columns)] for at in range(rows)]
    return {
        "title": "Rank of each matrix",
        "rows": [f"attention.row{at}" for at in range(rows)],
        "columns": [str(at) for at in range(columns)],
        "values": values,
        "note": "Each began with 12.",
    }


def test_each_value_is_a_cell_with_its_tooltip() -> None:
    drawn = str(heat_map(made(2, 3)))
    assert drawn.count('<rect class="cell"') == 6
    assert "<title>attention.row1, 2: 3</title>" in drawn
    assert re.findall(r"--v:([\d.]+)", drawn) == ["0.00", "0.33", "0.67", "0.33", "0.67", "1.00"]


def test_what_is_missing_has_no_cell() -> None:
    drawn = str(heat_map(made(1, 3, [[None, 0.25, float("nan")]])))
    assert drawn.count('<rect class="cell"') == 1
    assert ">.25</text>" in drawn
    assert heat_map(made(1, 1, [[None]])) == ""


def test_zeros_alone_and_negative_values_can_be_drawn() -> None:
    assert str(heat_map(made(1, 2, [[0, 0]]))).count("--v:0.00") == 2
    assert "--v:-" not in str(heat_map(made(1, 2, [[-1, 2]])))


def test_many_columns_show_no_numbers_but_tooltips() -> None:
    drawn = str(heat_map(made(30, 60)))
    assert drawn.count('<rect class="cell"') == 1800
    assert 'class="in' not in drawn
    assert len(drawn) < 300_000


def test_names_of_columns_do_not_overlap() -> None:
    for count in (6, 12, 24, 60):
        columns = [f"decoder {at}" for at in range(count)]
        drawn = str(heat_map(made(1, count) | {"columns": columns}))
        found = [float(x) for x in re.findall(r'<text class="tick mid" x="([\d.]+)"', drawn)]
        assert all(b - a >= 8 * len("decoder 59") for a, b in itertools.pairwise(found))


def test_many_columns_take_the_whole_width() -> None:
    assert 'class="heat" viewBox="0 0 480 ' in str(heat_map(made(2, 12)))
    drawn = str(heat_map(made(2, 48)))
    assert 'class="heat long" viewBox="0 0 1000 ' in drawn
    assert drawn.count('class="in mid"') == 96


def test_numbers_are_readable_on_every_shade_in_both_themes() -> None:
    page = render_report(result(heat_maps=[made(2, 2)]))
    themes = re.findall(
        r"--card: (#\w+); --ink: (#\w+).*?--c0: (#\w+).*?--darkest: (\d+)%", page, re.DOTALL
    )
    assert len(themes) == 3
    for card, ink, colour, darkest in themes:
        share = (4 + int(darkest)) / 100
        shade = [share * a + (1 - share) * b for a, b in zip(rgb(colour), rgb(card), strict=True)]
        light, dark = sorted((luminance(shade), luminance(rgb(ink))), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5  # WCAG's AA


def rgb(colour: str) -> list[float]:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    return [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]


def luminance(colour: list[float]) -> float:
    line = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in colour]
    return 0.2126 * line[0] + 0.7152 * line[1] + 0.0722 * line[2]


def test_names_are_escaped_and_long_ones_cut() -> None:
    found = made(1, 1) | {"rows": ["<b>" + "x" * 40], "title": "<i>"}
    drawn = str(heat_map(found))
    assert "<b>" not in drawn
    assert "<i>" not in drawn
    assert "…" in drawn


def test_the_report_shows_a_runs_maps() -> None:
    page = render_report(result(heat_maps=[made(2, 2)]))
    assert "<h3>Rank of each matrix</h3>" in page
    assert "Each began with 12." in page
    assert page.count('<rect class="cell"') == 4
    assert '<rect class="cell"' not in render_report(result())


def test_values_by_block_have_a_column_for_each() -> None:
    import graftune as gt
    from tests.families import FAMILIES

    parts = gt.anatomy(FAMILIES["t5"].build())
    names = {
        "encoder.block.0.layer.0.SelfAttention.q": 3,
        "decoder.block.1.layer.0.SelfAttention.q": 5,
        "shared": 1,
    }
    found = HeatMap.by_block("t", names, parts)
    assert found.columns == ("encoder 0", "decoder 1", "outside")
    assert found.rows == ("layer.0.SelfAttention.q", "shared")
    assert found.values == ((3, 5, None), (None, None, 1))
