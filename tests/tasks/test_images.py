"""Images: what is read and refused, and whole runs on a tiny vision transformer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import graftune as gt
from graftune.errors import DataError
from graftune.tasks import images, run
from graftune.tasks.images import Images, opened
from graftune.tasks.models import load_base
from graftune.tasks.settings import Columns, RunSettings
from graftune.tasks.sources import file_hashes, read_source
from graftune.tasks.tables import Table
from graftune.tasks.task import Ready
from tests.tasks import tiny

TASK = Images()
COLOURS = {"blue": (20, 20, 200), "green": (20, 180, 40), "red": (200, 30, 20)}


def painted(folder: Path, count: int = 20) -> Path:
    """Writes images of three colours, in a folder for each."""
    draw = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            noise = draw.integers(-20, 20, (20, 16, 3))
            pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:02}.png")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("images")
    tiny.vit(found / "vit")
    painted(found / "colours")
    return found


def settings_of(folder: Path, out: str, method: dict[str, Any], **train: Any) -> RunSettings:
    return RunSettings(
        base=str(folder / "vit"),
        task="images",
        data={"train": str(folder / "colours")},
        method=method,
        train={"lr": 1e-2, "steps": 30, "batch_size": 8, "eval_every": 0, **train},
        out=str(folder / out),
    )


def test_a_run_learns_is_read_again_and_merges(folder: Path) -> None:
    lora = {"name": "lora", "r": 4}
    result = run.train(settings_of(folder, "run", lora))
    assert result.metrics["test"]["accuracy"] > 0.9
    assert result.labels == sorted(COLOURS)
    assert run.evaluate(folder / "run")["metrics"] == pytest.approx(result.metrics["test"])
    again = run.train(settings_of(folder, "again", lora))
    assert again.metrics == result.metrics
    base = load_base(str(folder / "vit"), "image-classification", labels=result.labels)
    gt.load(base.model, folder / "run" / "adapter", "task")
    pixels = {"pixel_values": torch.randn(2, 3, 16, 16)}
    with torch.no_grad():
        expected = base.model(**pixels).logits
        gt.merge(base.model, "task")
        torch.testing.assert_close(base.model(**pixels).logits, expected, atol=1e-5, rtol=1e-5)


def test_a_new_process_answers_from_the_command_line(folder: Path) -> None:
    import subprocess
    import sys

    if not (folder / "run").exists():
        run.train(settings_of(folder, "run", {"name": "lora", "r": 4}))
    asked = str(folder / "colours" / "green" / "03.png")
    code = "from graftune.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "predict", str(folder / "run"), asked, "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    answer = json.loads(done.stdout)
    answer = answer[0] if isinstance(answer, list) else answer
    assert answer["label"] == "green"
    assert answer["image"] == asked
    assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    "method", ["pfeifferadapter", "prompttuning", "bitfit", "prefixtuning", "full"]
)
def test_other_methods_train_too(folder: Path, method: str) -> None:
    result = run.train(settings_of(folder, f"run-{method}", {"name": method}, steps=4))
    assert 0 <= result.metrics["test"]["accuracy"] <= 1


def test_a_folder_of_splits_and_a_table_of_paths_are_read(folder: Path, tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        shutil.copytree(folder / "colours", tmp_path / "parted" / split)
    tables = read_source(str(tmp_path / "parted"))
    assert list(tables) == ["train", "validation", "test"] or set(tables) == {
        "train", "validation", "test",
    }  # fmt: skip
    assert len(tables["test"].rows) == 60
    before = file_hashes(str(tmp_path / "parted"))
    (tmp_path / "parted" / "test" / "red" / "00.png").unlink()
    assert file_hashes(str(tmp_path / "parted")) != before
    shutil.copytree(folder / "colours" / "red", tmp_path / "red")
    rows = [{"path": "red/00.png", "label": "red"}, {"path": "red/01.png", "label": "b"}]
    tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    table = read_source(str(tmp_path / "rows.jsonl"))["train"]
    found = TASK.examples(table, TASK.columns(table, Columns()))
    assert [one.stratum for one in found] == ["red", "b"]
    assert Path(found[0].fields["image"]) == tmp_path / "red" / "00.png"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is empty"),
        (b"not an image", "is no whole image"),
        (None, "there is no file"),
        ("truncated", "is no whole image"),
    ],
)
def test_what_is_no_image_is_told_with_its_line(data: Any, said: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jpg"
    if data == "truncated":
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(file)
        file.write_bytes(file.read_bytes()[:600])
    elif data is not None:
        file.write_bytes(data)
    table = Table([{"image": "a.jpg", "label": "x"}], str(tmp_path / "rows.csv"), [2])
    with pytest.raises(DataError, match=rf"rows\.csv:2: .*{said}"):
        TASK.examples(table, TASK.columns(table, Columns()))


def test_bad_images_are_left_out_and_counted_where_asked(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "colours", tmp_path / "colours")
    (tmp_path / "colours" / "red" / "bad.png").write_bytes(b"no")
    settings = settings_of(folder, "bad", {"name": "bitfit"}, steps=1).replaced(
        data={"train": str(tmp_path / "colours")}
    )
    with pytest.raises(DataError, match=r"bad\.png"):
        run.plan(settings)
    told = run.plan(settings.replaced(data={"skip_bad": True}))
    assert sum(told["data"]["left_out"]["train"].values()) == 1
    assert sum(told["data"]["rows"].values()) == 60


def test_images_are_opened_as_batches_are_made(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(str(folder / "vit"), "image-classification", labels=sorted(COLOURS))
    ready = Ready(base.model, base.tokenizer, sorted(COLOURS), 512)
    table = read_source(str(folder / "colours"))["train"]
    found = TASK.examples(table, TASK.columns(table, Columns()))
    seen: list[Path] = []
    monkeypatch.setattr(images, "opened", lambda path: (seen.append(path), opened(path))[1])
    rows = TASK.encode(found, ready).features
    assert seen == []
    batch = TASK.collate(ready)(rows[:3])
    assert len(seen) == 3
    assert batch["pixel_values"].shape == (3, 3, 16, 16)


def test_grey_transparent_and_turned_images_become_plain_ones(tmp_path: Path) -> None:
    for mode in ("L", "RGBA", "P", "1"):
        Image.new(mode, (6, 4)).save(tmp_path / "a.png")
        assert (opened(tmp_path / "a.png").mode, opened(tmp_path / "a.png").size) == ("RGB", (6, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    Image.new("RGB", (6, 4)).save(tmp_path / "b.jpg", exif=exif)
    assert opened(tmp_path / "b.jpg").size == (4, 6)
