"""`method: auto` on a tiny base: what a run's settings become, with memory and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import graftune as gt
from graftune.errors import SettingsError
from graftune.planning import auto
from graftune.planning.auto import chosen_for
from graftune.planning.fitting import MARGIN
from graftune.tasks.settings import RunSettings
from tests.tasks import tiny


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("auto")
    tiny.bert(folder / "base")
    tiny.llama(folder / "decoder")
    tiny.write_jsonl(folder / "mail.jsonl", tiny.mail(60))
    tiny.write_jsonl(folder / "lessons.jsonl", tiny.lessons())
    return folder


def settings(place: Path, **more: Any) -> RunSettings:
    told = {"base": str(place / "base"), "data": str(place / "mail.jsonl"), "method": "auto"}
    return RunSettings(**{**told, **more})


def test_the_settings_name_the_method_and_what_was_chosen_and_keep_the_rest(place: Path) -> None:
    found = chosen_for(settings(place, train={"batch_size": 4, "warmup": 0.3})).settings
    assert found.method == {"name": "BitFit"}
    assert (found.train.epochs, found.train.batch_size, found.train.warmup) == (20, 4, 0.3)
    assert found.run_name == "classification-bitfit"
    again = RunSettings.from_dict(found.to_dict())
    assert again == found


def test_a_decoder_of_instructions_gets_lora(place: Path) -> None:
    asked = settings(
        place, base=str(place / "decoder"), data=str(place / "lessons.jsonl"), task="instruct"
    )
    found = chosen_for(asked)
    assert found.settings.method == {"name": "LoRA", "r": 8, "targets": "blocks"}
    assert "as planned" in found.choice.reasons[-1]


def peak(place: Path, method: str, **more: Any) -> int:
    given = {"batch_size": 16, "length": longest(place), **more}
    return gt.plan(str(place / "base"), method, task="classification", **given).peak_bytes


def longest(place: Path) -> int:
    said = chosen_for(settings(place)).choice.reasons[-1]
    return int(said.partition(" tokens")[0].rpartition(" ")[2])


def test_a_tight_memory_splits_the_batch_and_says_so(place: Path) -> None:
    whole = peak(place, "BitFit")
    assert peak(place, "BitFit", batch_size=8, accumulation=2) < whole * (1 - MARGIN)
    found = chosen_for(settings(place), memory=whole)
    assert (found.settings.train.batch_size, found.settings.train.accumulation) == (8, 2)
    assert "2 parts of 8" in found.choice.reasons[-1]
    roomy = chosen_for(settings(place), memory=2 * whole)
    assert roomy.settings.train.batch_size is None


def test_where_nothing_fits_one_error_says_so_and_the_way_on(place: Path) -> None:
    with pytest.raises(SettingsError, match=r"BitFit doesn't fit into .*--memory.*smaller base"):
        chosen_for(settings(place), memory="2KiB")


def test_what_takes_least_is_taken_where_the_choice_does_not_fit(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = auto.fitted

    def no_bitfit(base: Any, method: Any, *rest: Any, **more: Any) -> Any:
        if method.name == "BitFit":
            raise SettingsError("BitFit doesn't fit.")
        return fitted(base, method, *rest, **more)

    monkeypatch.setattr(auto, "fitted", no_bitfit)
    found = chosen_for(settings(place), memory="1GiB")
    assert found.settings.method == {"name": "LadderSideTuning"}
    assert found.settings.train.epochs == 20
    assert found.choice.reasons[0].startswith("LadderSideTuning: BitFit would not fit")


def test_what_cannot_be_planned_stops_only_a_run_with_a_memory(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_plan(*given: Any, **more: Any) -> Any:
        raise SettingsError("it reads numbers.")

    monkeypatch.setattr(auto, "fitted", no_plan)
    monkeypatch.setattr(auto, "planned", no_plan)
    found = chosen_for(settings(place))
    assert found.settings.method == {"name": "BitFit"}
    assert found.choice.reasons[-1] == "Not planned: it reads numbers."
    with pytest.raises(SettingsError, match="it reads numbers"):
        chosen_for(settings(place), memory="1GiB")


def test_settings_that_no_plan_knows_are_no_error_without_a_memory(place: Path) -> None:
    found = chosen_for(settings(place, train={"optimizer": "galore_adamw"}))
    assert found.settings.train.optimizer == "galore_adamw"
    assert "Not planned: " in found.choice.reasons[-1]


@pytest.mark.parametrize(
    ("more", "memory", "said"),
    [
        ({"method": {"name": "auto", "r": 4}}, None, r"method\.r: auto chooses"),
        ({}, "6 gigs", "--memory"),
        ({"task": "choices"}, "6GiB", "isn't planned"),
        ({"base": "nowhere/at-all"}, None, "nowhere"),
    ],
)
def test_what_cannot_be_is_refused(
    place: Path, more: dict[str, Any], memory: str | None, said: str
) -> None:
    with pytest.raises(SettingsError, match=said):
        chosen_for(settings(place, **more), memory)
