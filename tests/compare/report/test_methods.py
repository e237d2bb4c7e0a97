"""The page of a comparison: what is on it, as text and as a browser draws it."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from graftune.compare.report.disagreements import disagreements
from graftune.compare.report.methods import COLUMNS, csv, render, rows
from graftune.compare.report.scatter import Point, front, scatter
from tests.compare.comparing import comparison
from tests.compare.report.test_report import check

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PROBE = """<script>
addEventListener("error", (event) => { document.title = "broken: " + event.message; });
</script>"""
TRY = """<script>
const head = [...document.querySelectorAll("table.sortable th")].find((one) =>
  one.textContent === "own peak memory");
head.click();
const first = () => document.querySelector("table.sortable tbody tr").cells[0].textContent;
const up = first();
head.click();
const drawn = [...document.querySelectorAll("main > .charts svg")].map((svg) => {
  const box = svg.getBoundingClientRect();
  const marks = [...svg.querySelectorAll("circle, rect.cell")];
  const inside = marks.every((one) => {
    const mark = one.getBoundingClientRect();
    return mark.width > 0 && mark.left >= box.left - 9 && mark.right <= box.right + 9;
  });
  return svg.getAttribute("aria-label") + ":" + (box.height > 40 && marks.length > 0 && inside);
});
const wide = document.documentElement.scrollWidth - innerWidth;
const found = document.createElement("pre");
found.id = "found";
found.textContent = JSON.stringify({ up, down: first(), drawn, wide, title: document.title });
document.body.append(found);
</script>"""


def test_the_page_is_well_formed_and_asks_the_network_for_nothing(tmp_path: Path) -> None:
    page = render(comparison(tmp_path))
    reader = check(page)
    assert not re.search(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]{2,}", page)
    assert not [attrs for tag, attrs in reader.tags if "src" in attrs or tag == "iframe"]
    links = [attrs["href"] for tag, attrs in reader.tags if tag == "a"]
    assert [link.partition(";")[0] for link in links] == ["data:text/csv", "data:application/json"]
    told = json.loads(base64.b64decode(links[1].partition(",")[2]))
    assert told["as_good"][0] == "full"
    assert len(page.encode()) < 1_000_000


def test_the_table_has_the_best_first_and_what_has_no_result_last(tmp_path: Path) -> None:
    found = rows(comparison(tmp_path))
    assert [line[0].text for line in found] == ["full", "LoRA", "BitFit", "probe", "lost", "big"]
    assert {len(line) for line in found} == {len(COLUMNS)}
    assert found[4][1].text.startswith("failed: its process")


def test_every_line_has_the_command_that_makes_it_again(tmp_path: Path) -> None:
    page = render(comparison(tmp_path))
    assert f"graftune train {tmp_path}/runs/LoRA-seed0/run.yaml" in page
    assert f"--method probe --out {tmp_path}-again" in page
    assert f"graftune compare {tmp_path}/compare.yaml" in page


def test_the_csv_has_a_line_for_each_run(tmp_path: Path) -> None:
    lines = csv(comparison(tmp_path)).splitlines()
    assert lines[0].startswith("method,seed,accuracy,trained")
    assert len(lines) == 1 + 10


def test_the_front_has_what_nothing_cheaper_beats() -> None:
    points = [Point(name, n, x, y) for n, (name, x, y) in enumerate(
        [("a", 3, 0.9), ("b", 1, 0.5), ("c", 2, 0.5), ("d", 3, 0.8)], 1)]  # fmt: skip
    assert [one.name for one in front(points)] == ["b", "a"]
    assert [one.name for one in front(points, is_falling=True)] == ["b"]


def test_costs_far_apart_are_drawn_by_their_factors_and_zero_has_a_place() -> None:
    points = [Point("none", 1, 0, 0.5), Point("few", 2, 100, 0.6), Point("all", 3, 1e6, 0.7)]
    drawn = str(scatter("t", points, x_label="trained"))
    assert '">0</text>' in drawn
    places = [float(x) for x in re.findall(r'<circle[^>]*cx="([0-9.]+)"', drawn)]
    assert places[0] < places[1] < places[2]
    assert scatter("t", [], x_label="trained") == ""


def test_rows_that_part_the_methods_most_come_first() -> None:
    def answers(*given: str) -> list[dict[str, str]]:
        return [{"text": f"row {n}", "true": "x", "label": one} for n, one in enumerate(given)]

    found = disagreements(
        {"a": answers("x", "x", "x"), "b": answers("x", "y", "x"), "c": answers("x", "y", "y"),
         "d": answers("x", "x", "x")}
    )  # fmt: skip
    assert [one.text for one in found] == ["row 1", "row 2"]
    assert found[0].answers == (("x", "a, d", True), ("y", "b, c", False))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to draw the page with")
@pytest.mark.parametrize("width", [1100, 500])
def test_a_browser_draws_every_plot_and_sorts_without_an_error(tmp_path: Path, width: int) -> None:
    page = render(comparison(tmp_path)).replace("<body>", f"<body>{PROBE}")
    path = tmp_path / "page.html"
    path.write_text(page.replace("</body>", f"{TRY}</body>"))
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2000"]
    done = subprocess.run(
        [*command, f"file://{path}"], capture_output=True, text=True, check=True, timeout=120
    )
    told = re.search(r'<pre id="found">(.*?)</pre>', done.stdout)
    assert told is not None
    found = json.loads(told[1])
    assert not found["title"].startswith("broken")
    assert (found["up"], found["down"]) == ("lost", "full")
    assert len(found["drawn"]) == 9
    assert all(one.endswith(":true") for one in found["drawn"])
    assert found["wide"] <= 0
