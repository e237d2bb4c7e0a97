import re
from typing import Any

import pytest

from graftune.compare.report import break_even, render_report
from tests.compare.results import result


def run(seconds: float, predictions: int | None) -> dict[str, Any]:
    costs = {"rows": 10, "seconds": 1.0, "tokens": 200, "start_seconds": 61.0}
    other = {"name": "lora", "run_dir": "runs/lora", "costs": costs, "predictions": predictions}
    found = result("in-context").to_dict()
    mine = {"rows": 2, "seconds": seconds, "tokens": 60, "start_seconds": 1.0}
    return {**found, "kind": "in-context", "costs": mine, "against": other}


def test_the_lines_cross_at_the_ringed_point() -> None:
    prompts, adapter = break_even.series(run(1.0, 150))
    assert prompts.points == ((0, 1), (150, 76), (300, 151))
    assert adapter.points == ((0, 61), (150, pytest.approx(76)), (300, pytest.approx(91)))
    assert (adapter.best, adapter.points[1][0]) == (1, 150)
    assert 'class="dot best s1"' in str(break_even.chart(run(1.0, 150)))


def test_lines_that_never_cross_are_drawn_without_a_ring() -> None:
    prompts, adapter = break_even.series(run(0.1, None))
    assert [x for x, _ in prompts.points] == [0, 1000]
    assert adapter.best is None
    assert break_even.sentence(run(0.1, None)).startswith("lora is never cheaper: a prediction")


def test_the_report_draws_and_says_it() -> None:
    page = render_report(run(1.0, 150))
    assert "After 150 predictions lora is cheaper: training took 1 min 1 s" in page
    assert "a prediction 100 ms against 500 ms" in page
    assert 'aria-label="Wall time by predictions"' in page
    assert re.search(r"<b>30</b><span>tokens run for a prediction", page)


def test_a_run_without_a_comparison_has_no_such_chart() -> None:
    assert break_even.series(result().to_dict()) == []
    assert break_even.sentence(result().to_dict()) == ""
    assert "Wall time by predictions" not in render_report(result())


def test_runs_side_by_side_show_what_a_prediction_takes() -> None:
    page = render_report([run(1.0, 150), result("LoRA")])
    assert "a prediction" in page
    assert ">500 ms<" in page
    assert "a prediction" not in render_report([result("LoRA"), result("BitFit")])
