"""Several seeds and the search of a learning rate: what is run, what is compared, what stays."""

import statistics
from pathlib import Path
from typing import Any

import pytest

from graftune.errors import SettingsError
from graftune.tasks.rates import Rates, search_rate
from graftune.tasks.result import Silent
from graftune.tasks.seeds import spread, train_seeds, with_seeds
from graftune.tasks.settings import RunSettings
from tests.tasks import tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.bert(tmp_path_factory.mktemp("base") / "bert")


def settings(folder: Path, base: Path, **values: Any) -> RunSettings:
    data = tiny.write_jsonl(folder / "mail.jsonl", tiny.mail(60))
    made = RunSettings(
        base=str(base), data=str(data), method="lora", out=str(folder / "run"), name="mail",
        train={"steps": 8, "lr": 1e-2, "batch_size": 8, "head_start": False},
    )  # fmt: skip
    return made.replaced(**values)


def test_runs_differ_in_their_seed_alone_and_have_names_of_their_own(
    tmp_path: Path, base: Path
) -> None:
    made = with_seeds(settings(tmp_path, base, train={"seed": 7}), 3)
    assert [one.name for one in made] == ["mail-seed0", "mail-seed1", "mail-seed2"]
    assert [one.train.seed for one in made] == [7, 8, 9]
    assert [one.run_dir.name for one in made] == ["run-seed0", "run-seed1", "run-seed2"]
    assert len({one.data.seed for one in made}) == 1


def test_the_spread_is_that_of_the_runs_and_a_finished_series_resumes(
    tmp_path: Path, base: Path
) -> None:
    chosen = settings(tmp_path, base)
    results = train_seeds(chosen, 2)
    losses = [one.metrics["validation"]["loss"] for one in results]
    assert losses[0] != losses[1]
    found = spread(results)["validation"]["loss"]
    assert found["mean"] == pytest.approx(statistics.fmean(losses))
    assert found["sd"] == pytest.approx(abs(losses[0] - losses[1]) / 2**0.5)
    assert train_seeds(chosen, 2, resume=True) == results
    with pytest.raises(SettingsError, match="holds a run already"):
        train_seeds(chosen, 2)


def test_a_taken_directory_is_refused_before_the_first_run(tmp_path: Path, base: Path) -> None:
    taken = tmp_path / "run-seed1"
    taken.mkdir()
    (taken / "mine.txt").write_text("x")
    with pytest.raises(SettingsError, match=r"mine\.txt"):
        train_seeds(settings(tmp_path, base), 2)
    assert not (tmp_path / "run-seed0").exists()


def test_one_seed_is_no_series(tmp_path: Path, base: Path) -> None:
    with pytest.raises(SettingsError, match="two runs or more"):
        with_seeds(settings(tmp_path, base), 1)


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def on_note(self, note: str) -> None:
        self.notes.append(note)


def test_the_best_rate_on_the_validation_data_is_found_and_nothing_stays(
    tmp_path: Path, base: Path
) -> None:
    chosen, watch = settings(tmp_path, base, train={"steps": 60, "metric": "loss"}), Notes()
    before = sorted(path.name for path in tmp_path.iterdir())
    found = search_rate(chosen, factors=(1e-6, 30.0), share=0.7, watch=watch)
    assert list(found.tried) == [1e-9, 3e-2]
    assert found.best == 3e-2
    assert found.tried[3e-2] < found.tried[1e-9]  # type: ignore[operator]
    assert (found.metric, found.steps) == ("loss", 42)
    assert len(watch.notes) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_test_rows_are_not_looked_at(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graftune.tasks.training_run import TrainingRun

    seen: list[set[str]] = []
    encoded = TrainingRun._encoded

    def recorded(run: TrainingRun, ready: Any) -> Any:
        seen.append(set(run.data.splits))
        return encoded(run, ready)

    monkeypatch.setattr(TrainingRun, "_encoded", recorded)
    search_rate(settings(tmp_path, base), factors=(1.0,))
    assert seen == [{"train", "validation"}]


def test_without_validation_or_training_there_is_no_search(tmp_path: Path, base: Path) -> None:
    with pytest.raises(SettingsError, match="needs validation data"):
        search_rate(settings(tmp_path, base, data={"validation_fraction": 0}))
    with pytest.raises(SettingsError, match="have no learning rate"):
        search_rate(settings(tmp_path, base, method={"name": "in-context"}))


def test_a_rate_at_the_edge_and_one_that_diverged_are_said() -> None:
    said = Rates("accuracy", 20, {1e-4: 0.5, 1e-3: 0.9, 1e-2: None}, 1e-2).sentence()
    assert "0.01: not finite" in said
    assert "at the edge" in said
    assert "edge" not in Rates("accuracy", 20, {1e-4: 0.5, 1e-3: 0.9, 1e-2: 0.1}, 1e-3).sentence()
