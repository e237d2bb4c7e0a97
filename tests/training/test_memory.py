from __future__ import annotations

import mmap

from graftune.training import memory


def test_the_peak_grows_with_what_is_touched_and_is_reset() -> None:
    memory.reset_peak_memory()
    before = memory.process_peak_bytes()
    with mmap.mmap(-1, 60_000_000) as fresh:  # a heap could reuse pages that it has already
        for page in range(0, len(fresh), mmap.PAGESIZE):
            fresh[page] = 1
        after = memory.process_peak_bytes()
    assert after >= before + 40_000_000


def test_without_a_device_in_use_the_processs_peak_is_told() -> None:
    if memory.device_peak_bytes() == 0:
        assert memory.peak_memory_bytes() == memory.process_peak_bytes()
    assert memory.peak_memory_bytes() > 1_000_000


def test_a_system_that_cannot_reset_keeps_its_peak(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "no" / "such")
    memory.reset_peak_memory()
    assert memory.process_peak_bytes() > 0


def test_where_there_is_no_proc_the_system_is_asked(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "none")
    assert memory.process_peak_bytes() > 1_000_000
