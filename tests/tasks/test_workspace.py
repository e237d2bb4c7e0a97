import errno
import json
import os
from pathlib import Path

import pytest

from graftune.errors import DataError, FormatError, SettingsError
from graftune.tasks import workspace


def test_a_free_directory_is_made(tmp_path: Path) -> None:
    with workspace.claimed(tmp_path / "a" / "run"):
        assert (tmp_path / "a" / "run").is_dir()


def test_foreign_files_are_never_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with (
        pytest.raises(SettingsError, match=r"not a run's \(thesis\.txt\)"),
        workspace.claimed(tmp_path, overwrite=True),
    ):
        raise AssertionError("claimed")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_finished_run_needs_a_word_to_be_replaced(tmp_path: Path) -> None:
    for name in (workspace.SETTINGS, workspace.RESULT, "notes.txt"):
        (tmp_path / name).write_text("x")
    with pytest.raises(SettingsError, match="holds a run already"), workspace.claimed(tmp_path):
        raise AssertionError("claimed")
    with workspace.claimed(tmp_path, overwrite=True):
        assert [item.name for item in tmp_path.iterdir()] == ["notes.txt"]


def test_a_resumed_run_keeps_its_files(tmp_path: Path) -> None:
    (tmp_path / workspace.SETTINGS).write_text("x")
    (tmp_path / workspace.CHECKPOINTS / "checkpoint-1").mkdir(parents=True)
    with workspace.claimed(tmp_path, resume=True):
        assert (tmp_path / workspace.CHECKPOINTS / "checkpoint-1").is_dir()


def test_two_runs_cannot_hold_one_directory(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with (
        workspace.claimed(run),
        pytest.raises(FormatError, match=f"another process .pid {os.getpid()}"),
        workspace.claimed(run),
    ):
        raise AssertionError("claimed twice")


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    workspace.write_json(path, {"old": True})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FormatError, match=r"a\.json\" can't be written: No space left"):
        workspace.write_json(path, {"old": False})
    assert json.loads(path.read_text()) == {"old": True}
    assert [item.name for item in tmp_path.iterdir()] == ["a.json"]


def test_directories_that_say_nothing_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"has no graftune_task\.json"):
        workspace.read_task(tmp_path)
    with pytest.raises(FormatError, match="is not there"):
        workspace.read_task(tmp_path / "none")
    (tmp_path / workspace.TASK).write_text("{}")
    with pytest.raises(FormatError, match="lacks task, base"):
        workspace.read_task(tmp_path)
    with pytest.raises(FormatError, match=r"has no run\.yaml"):
        workspace.read_settings(tmp_path)


def test_a_run_is_not_resumed_on_other_data(tmp_path: Path) -> None:
    workspace.check_same_data(tmp_path, {"a.csv": "1"})
    workspace.write_json(tmp_path / workspace.ENVIRONMENT, workspace.environment({"a.csv": "1"}))
    workspace.check_same_data(tmp_path, {"a.csv": "1"})
    with pytest.raises(DataError, match=r'"a\.csv" is not what it was'):
        workspace.check_same_data(tmp_path, {"a.csv": "2"})
