import dataclasses

from graftune.tasks.prompt_costs import PromptCosts, break_even, per_prediction
from tests.compare.results import result

ADAPTER = dataclasses.replace(
    result("LoRA"), costs={"rows": 10, "seconds": 1.0, "tokens": 200, "start_seconds": 61.0}
)


def test_costs_are_means_over_predictions() -> None:
    costs = PromptCosts(rows=4, seconds=2.0, tokens=100).to_dict()
    assert per_prediction(costs) == 0.5
    assert per_prediction(costs, "tokens") == 25
    assert per_prediction({"rows": 0, "seconds": 0.0}) is None


def test_training_is_cheaper_from_where_the_lines_cross() -> None:
    found = break_even({"rows": 2, "seconds": 1.0, "start_seconds": 1.0}, ADAPTER)
    assert found["predictions"] == 150  # (61 - 1) / (0.5 - 0.1)
    assert (found["name"], found["costs"]) == ("LoRA", ADAPTER.costs)


def test_prompts_that_are_no_slower_stay_the_cheaper_ones() -> None:
    assert break_even({"rows": 2, "seconds": 0.2}, ADAPTER)["predictions"] is None


def test_training_that_took_less_than_the_start_is_cheaper_at_once() -> None:
    costs = {"rows": 2, "seconds": 1.0, "start_seconds": 90.0}
    assert break_even(costs, ADAPTER)["predictions"] == 0
