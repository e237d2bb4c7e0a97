"""A folder in the cache is whole or not there, whatever happens while it is made."""

import os
import threading
import time
from pathlib import Path

import pytest

from graftune.tasks.folder_cache import built_once, cache_folder, is_whole


def write_two(part: Path) -> None:
    (part / "a.txt").write_text("first")
    (part / "b.txt").write_text("second")


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_built_folder_holds_what_was_built_and_is_whole(tmp_path: Path):
    folder = built_once(tmp_path / "deep" / "model", write_two)
    assert names(folder) == ["a.txt", "b.txt", "contents.json"]
    assert is_whole(folder)
    assert names(folder.parent) == ["model"]


def test_second_call_does_not_build(tmp_path: Path):
    built_once(tmp_path / "model", write_two)

    def never(part: Path) -> None:
        pytest.fail("built twice")

    built_once(tmp_path / "model", never)


def test_failed_build_leaves_nothing(tmp_path: Path):
    def fails(part: Path) -> None:
        write_two(part)
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        built_once(tmp_path / "model", fails)
    assert names(tmp_path) == []


@pytest.mark.parametrize("harm", ["cut", "lost", "unlisted"])
def test_damaged_folder_is_made_again(tmp_path: Path, harm: str):
    folder = built_once(tmp_path / "model", write_two)
    if harm == "cut":
        (folder / "a.txt").write_text("f")
    elif harm == "lost":
        (folder / "b.txt").unlink()
    else:
        (folder / "contents.json").write_text("{")
    assert not is_whole(folder)
    built_once(folder, write_two)
    assert is_whole(folder)
    assert names(tmp_path) == ["model"]


def test_process_that_finishes_second_yields_to_the_first(tmp_path: Path):
    both_inside = threading.Barrier(2)

    def build(part: Path) -> None:
        write_two(part)
        both_inside.wait(timeout=30)

    threads = [
        threading.Thread(target=built_once, args=(tmp_path / "model", build)) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert is_whole(tmp_path / "model")
    assert names(tmp_path) == ["model"]


def test_parts_of_killed_processes_go_after_a_day(tmp_path: Path):
    old, new = tmp_path / ".x.old.part", tmp_path / ".x.new.part"
    old.mkdir()
    new.mkdir()
    long_ago = time.time() - 2 * 24 * 3600
    os.utime(old, (long_ago, long_ago))
    built_once(tmp_path / "model", write_two)
    assert names(tmp_path) == [".x.new.part", "model"]


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("GRAFTUNE_CACHE", str(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here"
    monkeypatch.delenv("GRAFTUNE_CACHE")
    monkeypatch.setenv("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "graftune"
