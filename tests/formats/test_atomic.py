"""A directory is the old one or the new one, whole, whatever happens while it is written."""

from __future__ import annotations

import errno
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

from graftune.errors import FormatError
from graftune.formats import atomic


def write(path: Path, version: int, *, timeout_s: float = 30.0, size: int = 200_000) -> None:
    with atomic.replacing(path, timeout_s=timeout_s) as folder:
        (folder / "adapter_model.safetensors").write_bytes(bytes([version]) * size)
        (folder / "adapter_config.json").write_text(str(version))


def version_of(path: Path, size: int = 200_000) -> int:
    """Returns the version of a whole directory, or fails."""

    def read(folder: Path) -> int:
        assert sorted(entry.name for entry in folder.iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        version = int((folder / "adapter_config.json").read_text())
        assert (folder / "adapter_model.safetensors").read_bytes() == bytes([version]) * size
        return version

    return atomic.read_whole(path, read)


@pytest.fixture(params=["exchange", "two renames"])
def any_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "two renames":
        monkeypatch.setattr(atomic, "exchange", lambda one, other: False)
    return request.param


@pytest.mark.usefixtures("any_kernel")
def test_a_save_replaces_the_directory_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    for version in (1, 2):
        write(tmp_path / "a", version)
        assert version_of(tmp_path / "a") == version
        assert os.listdir(tmp_path) == ["a"]


@pytest.mark.usefixtures("any_kernel")
def test_kill_at_any_moment_leaves_a_whole_directory(tmp_path: Path) -> None:
    path = tmp_path / "a"
    started = time.perf_counter()
    write(path, 0)
    some_saves = max(0.02, 6 * (time.perf_counter() - started))
    seen = set()
    for attempt in range(50):
        child = os.fork()
        if child == 0:
            version = 1
            while True:  # until it is killed
                write(path, version)
                version = version % 200 + 1
        time.sleep(random.Random(attempt).uniform(0.0, some_saves))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        seen.add(version_of(path))
    assert len(seen) > 1  # some saves got through
    write(path, 201)
    assert version_of(path) == 201
    assert os.listdir(tmp_path) == ["a"]


def test_two_writers_leave_one_whole_version(tmp_path: Path) -> None:
    path = tmp_path / "a"
    children = []
    for writer in (1, 2):
        child = os.fork()
        if child == 0:
            for _ in range(20):
                write(path, writer)
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert version_of(path) in (1, 2)
    assert os.listdir(tmp_path) == ["a"]


def test_a_second_writer_gives_up_with_a_clear_error(tmp_path: Path) -> None:
    with atomic.replacing(tmp_path / "a") as folder:
        (folder / "adapter_config.json").write_text("1")
        with pytest.raises(FormatError, match=rf"another process \(pid {os.getpid()}\)"):
            write(tmp_path / "a", 2, timeout_s=0.05)
    assert (tmp_path / "a" / "adapter_config.json").read_text() == "1"


def test_a_reader_never_mixes_two_versions(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write(path, 1)
    stop = threading.Event()

    def keep_writing() -> None:
        version = 1
        while not stop.is_set():
            version = version % 200 + 1
            write(path, version)
            time.sleep(0.002)

    writer = threading.Thread(target=keep_writing)
    writer.start()
    try:
        for _ in range(50):
            version_of(path)
    finally:
        stop.set()
        writer.join()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_and_leaves_the_old_version(tmp_path: Path, code: int) -> None:
    path = tmp_path / "a"
    write(path, 1)
    with pytest.raises(FormatError, match=r"the disk is full .* what was there is unchanged"):
        fail_while_writing(path, OSError(code, os.strerror(code)))
    assert version_of(path) == 1
    assert os.listdir(tmp_path) == ["a"]


def test_an_interrupt_leaves_the_old_version(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write(path, 1)
    with pytest.raises(KeyboardInterrupt):
        fail_while_writing(path, KeyboardInterrupt())
    assert version_of(path) == 1
    assert os.listdir(tmp_path) == ["a"]


def fail_while_writing(path: Path, error: BaseException) -> None:
    with atomic.replacing(path) as folder:
        (folder / "adapter_config.json").write_text("2")
        raise error


def test_other_files_of_the_directory_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write(path, 1)
    (path / "tokenizer.json").write_text("tokens")
    (path / "logs").mkdir()
    (path / "logs" / "loss.txt").write_text("0.1")
    (path / "adapter_model.bin").write_text("an older pickle")
    write(path, 2)
    assert sorted(os.listdir(path)) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "logs",
        "tokenizer.json",
    ]
    assert (path / "logs" / "loss.txt").read_text() == "0.1"


def test_a_readme_that_is_no_card_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.mkdir()
    (path / "README.md").write_text("mine")
    with atomic.replacing(path) as folder:
        (folder / "adapter_config.json").write_text("1")
        (folder / "README.md").write_text("card")
    assert (path / "README.md").read_text() == "mine"


def test_a_file_in_the_way_is_told(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a file")
    with pytest.raises(FormatError, match='a" is a file'):
        write(tmp_path / "a", 1)


def test_a_link_to_a_directory_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", 1)
    assert (tmp_path / "link").is_symlink()
    assert version_of(tmp_path / "real") == 1


def test_a_missing_directory_names_the_last_one_that_is_there(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=f'"{tmp_path}" has no "b"'):
        version_of(tmp_path / "b" / "c")
