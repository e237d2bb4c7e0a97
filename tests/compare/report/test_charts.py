import xml.etree.ElementTree as ET

import pytest

from graftune.compare.report.charts import (
    MOST_POINTS,
    Bar,
    Series,
    bar_chart,
    line_chart,
    thinned,
    ticks,
)


def circles(svg):
    return [node for node in ET.fromstring(str(svg)).iter() if node.tag.endswith("circle")]


def test_line_chart_has_one_mark_with_a_tooltip_per_point():
    svg = line_chart("Loss", [Series("a", ((1, 2.0), (2, 1.0), (3, 0.5)), 0)], x_label="step")
    marks = circles(svg)
    assert len(marks) == 3
    assert [mark[0].text for mark in marks] == [
        "a: 2 at step 1", "a: 1 at step 2", "a: 0.5 at step 3",
    ]  # fmt: skip


def test_line_chart_of_one_point_or_of_equal_values_is_drawn_within_its_box():
    for points in [((5, 1.0),), ((1, 0.0), (2, 0.0)), ((0, -3.0),)]:
        svg = line_chart("Loss", [Series("a", points, 0)], x_label="step")
        for mark in circles(svg):
            assert 0 <= float(mark.get("cx")) <= 480
            assert 0 <= float(mark.get("cy")) <= 260


def test_line_chart_without_points_is_empty():
    assert line_chart("Loss", [Series("a", (), 0)], x_label="step") == ""


def test_a_curves_name_is_escaped():
    svg = line_chart('<b>"', [Series("</svg><script>", ((1, 1.0),), 0)], x_label="step")
    assert "<script" not in svg
    ET.fromstring(str(svg))


def test_bars_are_as_long_as_their_values():
    bars = [Bar("a", 1.0, "1", 0), Bar("b", 0.25, "0.25", 1, 0.2, 0.3)]
    tree = ET.fromstring(str(bar_chart("Score", bars, most=1.0)))
    widths = [float(node.get("width")) for node in tree.iter() if "bar" in node.get("class", "")
              and node.tag.endswith("rect")]  # fmt: skip
    assert widths[1] == pytest.approx(widths[0] / 4)


def test_thinned_keeps_the_mean_and_the_last_step():
    points = [(float(i), float(i % 2)) for i in range(5000)]
    few = thinned(points)
    assert len(few) <= MOST_POINTS
    assert few[-1][0] == 4999
    assert sum(y for _, y in few) / len(few) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (-3, 7), (0.12, 0.13), (1e-5, 1e-3), (4, 4), (0, 0)]
)
def test_ticks_are_round_and_cover_the_range(low, high):
    found = ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    assert 2 <= len(found) <= 8
