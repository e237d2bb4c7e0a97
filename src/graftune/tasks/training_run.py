"""One training run, step by step: data, base, adapter, training, test, files."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftune import processes
from graftune.anatomy.packed import stored_bytes
from graftune.errors import SettingsError
from graftune.tasks import beside, dropping, packing, sparing, starting, workspace
from graftune.tasks.data import Example, Loaded
from graftune.tasks.fitting import Features, Fitted, fit, total_steps
from graftune.tasks.measured import Measured
from graftune.tasks.predicting import answer, measure_logits
from graftune.tasks.quantising import keep_in
from graftune.tasks.resolving import length_limit, method_of, precision, resolved
from graftune.tasks.result import RunResult, Watcher
from graftune.tasks.settings import RunSettings
from graftune.tasks.task import Encoded, Ready, Task, find_task
from graftune.tasks.task_file import write_task
from graftune.tasks.workshop import ALONE, Source

if TYPE_CHECKING:
    from graftune.adapter import Adapter
    from graftune.methods.base import HeatMap, Method

SHOWN_ANSWERS = 8
"""Test rows that are answered at the end of a run of a task that generates text."""
LONGEST_ANSWER = 128
"""Tokens of such an answer at most."""


@dataclass
class TrainingRun:
    """A run whose settings and data are known to be sound; nothing is written or loaded yet."""

    settings: RunSettings
    task: Task
    method: Method
    data: Loaded
    labels: list[str]
    watcher: Watcher
    began: float
    source: Source = ALONE
    notes: list[str] = field(default_factory=list[str])
    costs: dict[str, float] = field(default_factory=dict[str, float])

    @classmethod
    def prepared(
        cls, settings: RunSettings, watcher: Watcher, source: Source = ALONE
    ) -> TrainingRun:
        """Returns a run, its settings resolved and its data read and checked.

        Raises:
            SettingsError: A setting can't be.
            DataError: The data can't be trained on.
        """
        began = time.monotonic()
        task = find_task(settings.task, settings.task_options)
        method = method_of(settings.method)
        settings = resolved(settings, task, method)
        data = source.data(settings, task)
        labels = task.labels(data.splits)
        if "validation" not in data.splits:
            settings = _without_validation(settings)
        method.check_steps(total_steps(settings, len(data.splits["train"])))
        check_shares(settings)
        beside.check_names(settings, method)
        dropping.check(settings, method)
        sparing.check(settings, task)
        run = cls(settings, task, method, data, labels, watcher, began, source)
        run.notes.extend(data.report.notes)
        if method.prunes and settings.train.select == "best":
            run.settings = settings.replaced(train={"select": "last"})
            run.notes.append(
                f"{method.name} prunes until training ends, so the run keeps its last weights."
            )
        return run

    def plan(self) -> dict[str, Any]:
        """Returns what the run would do.

        Raises:
            FormatError: What lies beside it is no adapter, or one for another base.
            SettingsError: It can't start from what it is to start from.
        """
        beside.folders(self.settings)
        starting.folder(self.settings, self.method)
        return {
            "settings": self.settings.to_dict(),
            "data": self.data.report.to_dict(),
            "labels": self.labels,
            "total_steps": total_steps(self.settings, len(self.data.splits["train"])),
            "notes": self.notes,
        }

    def run(self, resume: bool, overwrite: bool) -> RunResult:
        """Trains, tests, writes everything, and returns the result.

        Raises:
            SettingsError: The run's directory is taken, or holds a run with other settings.
            DataError: The data is not what the resumed run was begun with.
            FormatError: What lies beside it is no adapter, or one for another base.
            TrainingError: The run can't go on.
        """
        run_dir = self.settings.run_dir
        earlier = run_dir if resume else None
        others = beside.folders(self.settings, earlier)
        start = starting.folder(self.settings, self.method, earlier)
        with self._claimed(run_dir, resume, overwrite):
            finished = self._earlier(run_dir) if resume else None
            if finished is not None:
                self._note(f"{run_dir} is finished already; nothing was done.")
                return finished
            return self._run(run_dir, resume, others, start)

    @contextmanager
    def _claimed(self, run_dir: Path, resume: bool, overwrite: bool) -> Iterator[None]:
        """Holds the run's directory; of several processes the first holds it for all of them."""
        mine = workspace.claimed(run_dir, resume=resume, overwrite=overwrite)
        with mine if processes.is_first() else nullcontext():
            processes.wait()
            yield
            processes.wait()

    def rehearse(self) -> None:
        """Makes what runs of one workshop share, and keeps nothing else."""
        ready, fresh = self._ready()
        encoded = self._encoded(ready)
        if self.task.starts_head and self.settings.train.head_start and not self.method.fuses:
            self._start_head(ready, fresh, encoded)

    def trainable(self) -> tuple[int, int]:
        """Returns how many parameters the run would train, and how many the base has."""
        from graftune.counting import summary

        ready, _ = self._ready()
        self._attach(ready, self._encoded(ready), None)
        found = summary(ready.model)
        return found.trainable, found.base

    def _earlier(self, run_dir: Path) -> RunResult | None:
        """Returns an earlier run's result, None if it isn't finished; refuses other settings."""
        if not (run_dir / workspace.SETTINGS).exists():
            return None
        check_same_settings(workspace.read_settings(run_dir), self.settings)
        workspace.check_same_data(run_dir, self.data.report.hashes)
        done = (run_dir / workspace.RESULT).exists()
        return RunResult.load(run_dir) if done else None

    def _run(
        self, run_dir: Path, resume: bool, others: Mapping[str, Path], start: Path | None
    ) -> RunResult:
        from graftune.training.memory import reset_peak_memory

        for note in self.notes:
            self.watcher.on_note(note)
        workspace.write_text(run_dir / workspace.SETTINGS, self.settings.to_yaml())
        environment = workspace.environment(self.data.report.hashes)
        workspace.write_json(run_dir / workspace.ENVIRONMENT, environment)
        reset_peak_memory()
        ready, fresh = self._ready()
        base_bytes = stored_bytes(ready.model)
        if processes.is_first():
            beside.keep(others, run_dir)
        processes.wait()
        beside.attach(ready.model, {name: run_dir / workspace.BESIDE / name for name in others})
        encoded = self._encoded(ready)
        trained = time.monotonic()
        if self.task.starts_head and self.settings.train.head_start:
            self._start_head(ready, fresh, encoded)
        adapter = self._attach(ready, encoded, start)
        rows = encoded["train"].features
        if self.settings.train.packing:
            rows = self._packed(ready, adapter, rows)
        fitted = self._fit(ready, encoded, rows, run_dir, resume)
        for note in fitted.said:
            self._note(note)
        if not resume:  # else only a part of the training was seen
            self.costs["start_seconds"] = time.monotonic() - trained
        self._measure_attention(ready, encoded)
        maps = self._measure_gates(ready, adapter, encoded)
        self._save(adapter, ready, run_dir)
        measured = self._test(ready, encoded, run_dir)
        workspace.write_scores(run_dir, measured.rows)
        result = self._result(ready, adapter, fitted, measured, run_dir, base_bytes)
        result = replace(result, heat_maps=[*result.heat_maps, *map(asdict, maps)])
        workspace.write_text(run_dir / workspace.RESULT, result.to_json())
        self.watcher.on_end(result)
        return result

    def _attach(self, ready: Ready, encoded: Mapping[str, Encoded], start: Path | None) -> Adapter:
        """Attaches the run's own adapter, and lets it act in the blocks it is for."""
        from graftune.adapter import attach

        seen = self._batches(ready, encoded["train"].features) if self.method.needs_data else None
        seed = self.settings.train.seed
        adapter = attach(ready.model, self.method, self.settings.run_name, seed=seed, data=seen)
        if start is not None:
            self._note(starting.take(adapter, start, str(self.settings.start)))
        keep_in(adapter, self.settings.train.adapter_precision)
        note = dropping.activate(adapter, self.settings.train.drop)
        dropping.check_trains(adapter, self.settings.train.drop)
        if note is not None:
            self._note(note)
        return adapter

    def _packed(self, ready: Ready, adapter: Adapter, rows: Features) -> Features:
        """Returns the training rows, several in each where there is room."""
        packing.check(ready, adapter, self.task.collate(ready))
        packed = packing.pack(rows, ready.max_length)
        self._note(packing.summary(packed, len(rows)))
        return packed

    def _measure_attention(self, ready: Ready, encoded: Mapping[str, Encoded]) -> None:
        """Measures what a fusion attends to, on the validation rows where there are some."""
        if not self.method.fuses:
            return
        from graftune.fusing import fusion_weights

        split = "validation" if encoded.get("validation", Encoded()).features else "train"
        batches = self._batches(ready, encoded[split].features)
        rest = dropping.schedule(self.settings.train.drop).rest
        fusion_weights(ready.model, self.settings.run_name, batches, drop=rest)
        self._note(f"Attention to each adapter was measured on the {split} rows.")

    def _measure_gates(
        self, ready: Ready, adapter: Adapter, encoded: Mapping[str, Encoded]
    ) -> list[HeatMap]:
        """Returns drawings of how far gates are open on the validation rows, if any."""
        from graftune.gating import gate_maps, gates, has_gates

        if not has_gates(adapter):
            return []
        split = "validation" if encoded.get("validation", Encoded()).features else "train"
        rest = dropping.schedule(self.settings.train.drop).rest
        batches = self._batches(ready, encoded[split].features)
        found = gates(ready.model, adapter.name, batches, drop=rest)
        self._note(f"Gates were measured on the {split} rows.")
        return gate_maps(found, adapter.anatomy)

    def _ready(self) -> tuple[Ready, tuple[str, ...]]:
        """Returns the base, ready to train, and the names of the tensors that are new in it."""
        labels = (self.labels or None) if self.task.new_head else None
        dtype = precision(self.settings)
        base = self.source.base(self.settings, self.task, labels, dtype, self._note)
        for note in self.task.prepare(base.tokenizer):
            self._note(note)
        limit = length_limit(self.settings, self.task, base.model, base.tokenizer)
        return Ready(base.model, base.tokenizer, self.labels, limit), base.fresh

    def _batches(self, ready: Ready, rows: Sequence[Any]) -> Iterator[dict[str, Any]]:
        """Yields encoded rows in batches as training sees them, but not shuffled."""
        collate = self.task.collate(ready)
        size = self.settings.train.batch_size or 1
        for start in range(0, len(rows), size):
            batch = self.task.inputs(collate(rows[start : start + size]))
            yield {key: tensor.to(ready.model.device) for key, tensor in batch.items()}

    def _start_head(
        self, ready: Ready, fresh: Sequence[str], encoded: Mapping[str, Encoded]
    ) -> None:
        """Fits a new head to what training begins with: the base, or the mean of a fusion's."""
        from graftune.adapter import using
        from graftune.composition import Average
        from graftune.tasks.head_start import start_head

        splits = {split: encoded[split].features for split in encoded if split != "test"}
        members = self.method.fuses
        rest = dropping.schedule(self.settings.train.drop).rest
        if members:
            with using(ready.model, Average(*members), drop=rest):
                is_started = start_head(ready, fresh, splits)
        else:
            is_started = self.source.start_head(self.settings, ready, fresh, splits)
        if not is_started:
            self._note("This model's head begins with random values: it isn't one new layer.")

    def _encoded(self, ready: Ready) -> dict[str, Encoded]:
        """Returns all splits as tokens, their lengths in the data's report."""
        found: dict[str, Encoded] = {}
        for split, examples in self.data.splits.items():
            one = self.source.encoded(self.settings, self.task, split, examples, ready)
            found[split] = one
            self.data.report.measure(split, one.lengths, ready.max_length, one.cut)
            for note in found[split].notes:
                self._note(f"{split.capitalize()}: {note}")
        return found

    def _fit(
        self,
        ready: Ready,
        encoded: Mapping[str, Encoded],
        rows: Features,
        run_dir: Path,
        resume: bool,
    ) -> Fitted:
        validation = encoded.get("validation", Encoded())
        examples = self.data.splits.get("validation", [])
        return fit(
            ready,
            self.task,
            self.settings,
            rows,
            validation.features,
            score=self.task.scorer(examples, validation, ready),
            run_dir=run_dir,
            watcher=self.watcher,
            plan=self._announcement(ready, run_dir),
            resume=resume,
            trunk=self.source.trunk(self.settings),
        )

    def _announcement(self, ready: Ready, run_dir: Path) -> dict[str, Any]:
        from graftune.counting import summary

        rows = self.data.report.rows
        train = self.settings.train
        return {
            "name": self.settings.run_name,
            "task": self.task.name,
            "method": self.method.name,
            "base": self.settings.base,
            "run_dir": str(run_dir),
            "train_rows": rows["train"],
            "validation_rows": rows.get("validation", 0),
            "test_rows": rows.get("test", 0),
            "epochs": train.epochs,
            "batch_size": train.batch_size,
            "lr": train.lr,
            "parameters": summary(ready.model).to_dict(),
        }

    def _save(self, adapter: Adapter, ready: Ready, run_dir: Path) -> None:
        """Writes the adapter and, beside it and in the run's directory, what prediction needs."""
        from graftune.formats.saving import whole

        with whole(adapter):
            if processes.is_first():
                adapter.save(run_dir / workspace.ADAPTER)
        processes.wait()
        write_task(
            self,
            ready,
            run_dir,
            chats=not self.task.new_head,
            beside=list(self.settings.beside),
            drop=dropping.schedule(self.settings.train.drop).rest,
        )

    def _test(self, ready: Ready, encoded: Mapping[str, Encoded], run_dir: Path) -> Measured:
        examples = self.data.splits.get("test")
        if not examples:
            return Measured({}, [])
        size = 2 * (self.settings.train.batch_size or 1)
        if self.labels or self.task.answers_all:
            began = time.monotonic()
            answers = answer(self.task, ready, examples, size)
            self._count(examples, encoded["test"], time.monotonic() - began, ready)
            self._write_answers(examples, answers, run_dir)
            return self.task.measure(examples, answers, self.labels)
        shown = [self.task.question(one.fields, one.where) for one in examples[:SHOWN_ANSWERS]]
        room = min(LONGEST_ANSWER, ready.max_length // 2)
        began = time.monotonic()
        answers = answer(self.task, ready, shown, size, room)
        self._count(shown, encoded["test"], time.monotonic() - began, ready)
        self._write_answers(examples, answers, run_dir)
        score = self.task.scorer(examples, encoded["test"], ready)
        return measure_logits(self.task, ready, encoded["test"].features, size, score)

    def _count(
        self, answered: Sequence[Example], encoded: Encoded, seconds: float, ready: Ready
    ) -> None:
        """Notes what predictions took; `encoded` are the test rows."""
        lengths = encoded.lengths[: len(answered)]
        most = max(lengths) if encoded.cut == 0 else ready.max_length
        tokens = sum(min(length, most) for length in lengths)
        self.costs |= {"rows": len(answered), "seconds": seconds, "tokens": tokens}

    def _write_answers(
        self, examples: Sequence[Example], answers: Sequence[Mapping[str, Any]], run_dir: Path
    ) -> None:
        rows = [
            {**found, **self.task.truth(example)}
            for example, found in zip(examples, answers, strict=False)
        ]
        workspace.write_lines(run_dir / workspace.PREDICTIONS, rows)

    def _result(
        self,
        ready: Ready,
        adapter: Adapter,
        fitted: Fitted,
        measured: Measured,
        run_dir: Path,
        base_bytes: int,
    ) -> RunResult:
        from graftune.counting import summary
        from graftune.training.memory import peak_memory_bytes

        metrics = {"validation": fitted.validation, "test": measured.metrics}
        return RunResult(
            name=self.settings.run_name,
            kind="adapter",
            settings=self.settings.to_dict(),
            versions=workspace.versions(),
            history=fitted.history,
            metrics={split: found for split, found in metrics.items() if found},
            confusion=measured.confusion,
            classes=measured.classes,
            labels=self.labels,
            parameters=summary(ready.model).to_dict(),
            adapter_bytes=workspace.size_of(run_dir / workspace.ADAPTER),
            base_bytes=base_bytes,
            seconds=time.monotonic() - self.began,
            peak_memory_bytes=peak_memory_bytes(),
            adapter_path=str(run_dir / workspace.ADAPTER),
            run_dir=str(run_dir),
            data=self.data.report.to_dict(),
            notes=self.notes,
            costs=self.costs,
            heat_maps=[asdict(found) for found in adapter.method.heat_maps(adapter)],
        )

    def _note(self, note: str) -> None:
        self.notes.append(note)
        self.watcher.on_note(note)


def check_shares(settings: RunSettings) -> None:
    """Checks that the processes of a run can share its batches out evenly.

    Raises:
        SettingsError: They can't.
    """
    rows, several = settings.train.batch_size or 1, processes.count()
    if rows % several:
        raise SettingsError(
            f"train.batch_size is {rows}, the rows of a step over all processes, which {several} "
            f"processes can't share evenly: take a multiple of {several}."
        )


def check_same_settings(before: RunSettings, now: RunSettings) -> None:
    """Checks that a run is resumed with the settings it was begun with.

    Raises:
        SettingsError: They differ; it names the first key that does.
    """
    old, new = _flat(before.to_dict()), _flat(now.to_dict())
    for key in dict.fromkeys([*old, *new]):
        if old.get(key) != new.get(key):
            raise SettingsError(
                f"The run was begun with {key} = {old.get(key)!r}, not {new.get(key)!r}: resume it "
                "with its own settings, or start another one."
            )


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{above}.{key}" if above else key
        flat |= _flat(value, path) if isinstance(value, dict) else {path: value}
    return flat


def _without_validation(settings: RunSettings) -> RunSettings:
    """Returns settings for a run that has nothing to select the best weights by."""
    if settings.train.early_stop is not None:
        raise SettingsError("train.early_stop needs validation data, and there is none.")
    return settings.replaced(train={"select": "last"})
