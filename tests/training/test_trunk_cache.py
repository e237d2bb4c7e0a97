"""The trunk cache: the same weights with it as without, and what it can't keep is said."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import graftune as gt
from graftune.errors import TrainingError
from graftune.methods.base import Method
from graftune.training import training_args
from graftune.training.trunk_cache import KeptRows, TrunkCache
from graftune.training.trunk_store import TrunkStore
from tests.families import FAMILIES

LADDER = gt.LadderSideTuning(reduction=2)
TOP = gt.LoRA(r=2, layers=(1,))


def rows(family: str, count: int = 12, width: int = 9) -> list[dict[str, Any]]:
    kind = FAMILIES[family]
    generator = torch.Generator().manual_seed(0)
    found: list[dict[str, Any]] = []
    for number in range(count):
        ids = torch.randint(5, 99, (width,), generator=generator).tolist()
        labels: Any = ids if kind.kind == "decoder" else number % 3
        labels = ids[:4] if kind.kind == "encoder-decoder" else labels
        found.append({"input_ids": ids, "attention_mask": [1] * width, "labels": labels})
    return found


def trained(
    family: str, method: Method, folder: Path, cache: Any, data: Any = None, **arguments: Any
) -> tuple[dict[str, Tensor], Any]:
    model = FAMILIES[family].build()
    adapter = gt.attach(model, method, seed=1)
    args = training_args(
        str(folder),
        num_train_epochs=3,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        **arguments,
    )
    trainer = gt.Trainer(
        model, args, train_dataset=rows(family) if data is None else data, trunk_cache=cache
    )
    trainer.train()
    return adapter.state_dict(), trainer


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "bart"])
@pytest.mark.parametrize("method", [LADDER, TOP], ids=["ladder", "top"])
def test_the_final_weights_are_those_without_it(
    family: str, method: Method, tmp_path: Path
) -> None:
    if method is TOP and family in ("t5", "bart"):
        pytest.skip("of several stacks, a side network's alone")
    same: dict[str, Any] = {"train_sampling_strategy": "sequential"}  # batches in every epoch
    plain, _ = trained(family, method, tmp_path / "a", None, **same)
    kept, trainer = trained(family, method, tmp_path / "b", True, **same)
    assert trainer.trunk_summary.startswith("24 of 36 rows were fed")
    assert all(torch.equal(plain[name], kept[name]) for name in plain)
    assert not (tmp_path / "b" / "trunk_cache").exists()


def test_rows_of_other_lengths_and_batches_come_out_alike(tmp_path: Path) -> None:
    data = [
        {**row, "input_ids": row["input_ids"][: 3 + n % 6]} for n, row in enumerate(rows("bert"))
    ]
    data = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in data]
    plain, _ = trained("bert", LADDER, tmp_path / "a", None, data=data)
    kept, _ = trained("bert", LADDER, tmp_path / "b", True, data=data)
    for name in plain:
        torch.testing.assert_close(plain[name], kept[name], atol=1e-4, rtol=1e-4)


def batch_of(family: str) -> tuple[nn.Module, dict[str, Any]]:
    kind = FAMILIES[family]
    model, inputs = kind.build(), kind.inputs()
    return model, {**inputs, **kind.labels(model, inputs)}


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "gemma2", "whisper", "vit", "t5"])
def test_blocks_that_are_fed_do_not_run(family: str, tmp_path: Path) -> None:
    model, batch = batch_of(family)
    adapter = gt.attach(model, LADDER, seed=1)
    cache = TrunkCache(model, tmp_path)
    model.train()
    with cache.passing(batch):
        first = model(**batch).loss
    with torch.no_grad():
        for block in adapter.anatomy.blocks:
            for name, tensor in model.get_submodule(block.path).named_parameters():
                if "deltas" not in name:
                    tensor.fill_(torch.nan)
    with cache.passing(batch):
        assert torch.equal(first, model(**batch).loss)
    assert model(**batch).loss.isnan() or family == "t5"
    assert all("forward" not in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_the_graph_keeps_no_fed_state_and_reads_it_again(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = batch_of(family)
    gt.attach(model, LADDER, seed=1)
    cache = TrunkCache(model, tmp_path)
    with cache.passing(batch):
        loss = model(**batch).loss
    loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    read: list[StorageWeakRef] = []
    state = KeptRows.state

    def noted(self: KeptRows, stack: int, at: int) -> Tensor:
        found = state(self, stack, at)
        read.append(StorageWeakRef(found.untyped_storage()))
        return found

    monkeypatch.setattr(KeptRows, "state", noted)
    with cache.passing(batch):
        loss = model(**batch).loss
    before = len(read)
    assert all(one.expired() for one in read)
    loss.backward()
    assert len(read) == 2 * before
    for name, tensor in model.named_parameters():
        if tensor.grad is not None:
            assert torch.equal(tensor.grad, expected[name])


def test_a_row_is_known_whatever_padding_stands_around_it(tmp_path: Path) -> None:
    model, _ = batch_of("bert")
    gt.attach(model, LADDER, seed=1)
    cache = TrunkCache(model, tmp_path)
    ids = torch.tensor([[5, 6, 7, 8]])
    padded = torch.tensor([[5, 6, 7, 8, 0, 0]])
    with torch.no_grad():
        with cache.passing({"input_ids": ids, "attention_mask": torch.ones_like(ids)}):
            alone = model(ids, torch.ones_like(ids)).logits
        more = {"input_ids": padded, "attention_mask": (padded > 0).long()}
        with cache.passing(more):
            again = model(**more).logits
    assert cache.hits == 1
    torch.testing.assert_close(alone, again, atol=1e-6, rtol=1e-5)


def test_rows_that_differ_in_anything_the_trunk_reads_are_other_rows(tmp_path: Path) -> None:
    model, _ = batch_of("bert")
    gt.attach(model, LADDER, seed=1)
    cache = TrunkCache(model, tmp_path)
    ids, ones = torch.tensor([[5, 6, 7, 8]]), torch.ones(1, 4, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": ones}
    others = [
        {**batch, "input_ids": ids.flip(1)},
        {**batch, "token_type_ids": ones},
        {**batch, "attention_mask": torch.tensor([[0, 1, 1, 1]])},
    ]
    with torch.no_grad():
        for one in (batch, *others, {**batch, "labels": torch.tensor([1])}):
            with cache.passing(one):
                model(**one)
    assert cache.hits == 1  # labels alone change nothing below


def test_another_models_states_are_never_found(tmp_path: Path) -> None:
    model, _ = batch_of("bert")
    gt.attach(model, LADDER, seed=1)
    one = TrunkCache(model, tmp_path)
    one.store.close()
    with torch.no_grad():
        model.get_parameter("bert.encoder.layer.0.output.dense.bias").add_(1e-3)
    two = TrunkCache(model, tmp_path)
    assert one.store.folder != two.store.folder


def test_half_the_bytes_are_near(tmp_path: Path) -> None:
    model, batch = batch_of("bert")
    gt.attach(model, LADDER, seed=1)
    exact, half = TrunkCache(model, tmp_path), TrunkCache(model, tmp_path, "float16")
    with torch.no_grad():
        for cache in (exact, half):
            with cache.passing(batch):
                first = model(**batch).logits
        with half.passing(batch):
            torch.testing.assert_close(model(**batch).logits, first, atol=1e-2, rtol=1e-2)
    assert half.store.bytes * 2 == exact.store.bytes


@pytest.mark.parametrize(
    ("family", "method", "words"),
    [
        ("bert", gt.LoRA(r=2), "in the lowest block"),
        ("bert", gt.PromptTuning(length=2), "acts at bert, below the blocks"),
        ("bart", TOP, "beside a side network"),
        ("bert", gt.FullFineTuning(), "trains the model itself"),
        ("bert", gt.FullFineTuning(keep_base=True), "below the blocks|lowest block"),
        ("bert", gt.LadderSideTuning(reduction=2, trunk_dropout=True), "trunk_dropout"),
    ],
)
def test_what_is_not_the_same_in_every_epoch_is_refused(
    family: str, method: Method, words: str, tmp_path: Path
) -> None:
    model, _ = batch_of(family)
    gt.attach(model, method)
    with pytest.raises(TrainingError, match=f"No trunk cache: .*{words}"):
        TrunkCache(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_block_thawed_by_hand_is_refused(tmp_path: Path) -> None:
    model, _ = batch_of("bert")
    gt.attach(model, TOP)
    model.get_parameter("bert.encoder.layer.0.output.dense.bias").requires_grad_(True)
    with pytest.raises(TrainingError, match=r"layer.0.output.dense.bias trains, below the cut"):
        TrunkCache(model, tmp_path)


def test_dropout_below_is_a_reason_unless_it_is_to_be_off(tmp_path: Path) -> None:
    model, batch = batch_of("bert")
    gt.attach(model, TOP)
    model.config.hidden_dropout_prob = 0.1
    with pytest.raises(TrainingError, match=r"hidden_dropout_prob=0.1"):
        TrunkCache(model, tmp_path)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    cache = TrunkCache(model, tmp_path, still=True)
    model.train()
    with cache.passing(batch):
        model(**batch)
    assert all(module.training for module in model.modules())


FILL = """
import os, sys, torch
from pathlib import Path
from graftune.training.trunk_store import TrunkStore
store = TrunkStore(Path(sys.argv[1]), torch.float32)
for n in range(int(sys.argv[2])):
    store.put(f"row-{n}", [torch.full((2, 300, 8), float(n)), torch.full((3,), float(-n))])
    if n == 7:
        print("begun", flush=True)
"""


def test_a_killed_writer_leaves_whole_rows_and_the_next_goes_on(tmp_path: Path) -> None:
    run = subprocess.Popen(
        [sys.executable, "-c", FILL, str(tmp_path), "1000000"], stdout=subprocess.PIPE
    )
    assert run.stdout is not None
    assert run.stdout.readline() == b"begun\n"
    run.kill()
    run.wait()
    store = TrunkStore(tmp_path, torch.float32)
    assert len(store) >= 8
    for n in range(len(store)):
        found = store.get(f"row-{n}")
        assert found is not None
        assert torch.equal(found[0], torch.full((2, 300, 8), float(n)))
        assert torch.equal(found[1], torch.full((3,), float(-n)))
    store.put("more", [torch.ones(4)])
    store.close()
    assert torch.equal(TrunkStore(tmp_path, torch.float32).get("more")[0], torch.ones(4))  # type: ignore[index]


def filled(folder: Path) -> None:
    store = TrunkStore(folder, torch.float32)
    for n in range(3):
        store.put(str(n), [torch.full((4,), float(n))])
    store.close()


def test_half_a_line_and_a_record_without_one_are_left_out(tmp_path: Path) -> None:
    filled(tmp_path)
    index = tmp_path / "index.jsonl"
    text = index.read_text()
    index.write_text(text[:-10])
    store = TrunkStore(tmp_path, torch.float32)
    assert [key in store for key in "012"] == [True, True, False]
    store.put("3", [torch.full((4,), 3.0)])
    store.close()
    again = TrunkStore(tmp_path, torch.float32)
    assert [json.loads(line)["key"] for line in index.read_text().splitlines()] == ["0", "1", "3"]
    assert torch.equal(again.get("3")[0], torch.full((4,), 3.0))  # type: ignore[index]


def test_a_damaged_record_counts_as_missing(tmp_path: Path) -> None:
    filled(tmp_path)
    states = tmp_path / "states.bin"
    raw = bytearray(states.read_bytes())
    raw[20] ^= 1
    states.write_bytes(bytes(raw))
    store = TrunkStore(tmp_path, torch.float32)
    assert store.get("1") is None
    assert store.get("2") is not None


def test_the_second_of_two_runs_reads_and_does_not_write(tmp_path: Path) -> None:
    filled(tmp_path)
    first, second = TrunkStore(tmp_path, torch.float32), TrunkStore(tmp_path, torch.float32)
    second.put("4", [torch.ones(4)])
    assert second.why_not == "another run writes to it"
    assert "4" not in second
    assert second.get("1") is not None
    assert first.why_not is None


def test_it_stops_at_its_limit(tmp_path: Path) -> None:
    store = TrunkStore(tmp_path, torch.float32, limit=40)
    for n in range(4):
        store.put(str(n), [torch.ones(4)])
    assert len(store) == 2
    assert store.why_not == "its 40 bytes are full"


def test_a_full_disk_is_said_and_what_is_there_still_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path)
    store = TrunkStore(tmp_path, torch.float32)

    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    store.put("4", [torch.ones(4)])
    monkeypatch.undo()
    assert store.why_not == "it can't be written (No space left on device)"
    assert store.get("2") is not None


def test_a_trainer_with_its_own_forward_is_refused(tmp_path: Path) -> None:
    model, _ = batch_of("bert")
    gt.attach(model, LADDER)
    trainer = gt.Trainer(
        model,
        training_args(str(tmp_path)),
        train_dataset=rows("bert"),
        trunk_cache=True,
        forward=lambda model, batch: model(**batch),
    )
    with pytest.raises(TrainingError, match="trunk_cache goes by a batch's rows"):
        trainer.train()
