"""A run of in-context learning, in the directory and with the result of a trained adapter's run."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graftune.anatomy.packed import elements, stored_bytes
from graftune.errors import SettingsError
from graftune.tasks import prompting, workspace
from graftune.tasks.chat_prompt import ChatPrompt
from graftune.tasks.data import Example, Loaded
from graftune.tasks.demonstrations import chosen, text_of, with_vectors
from graftune.tasks.in_context import Demonstrations, InContext, in_context_of
from graftune.tasks.measured import Measured
from graftune.tasks.predicting import measure_logits
from graftune.tasks.prompt_costs import PromptCosts, break_even
from graftune.tasks.prompt_room import check_room, first_prompt
from graftune.tasks.quantising import Quantising
from graftune.tasks.ranking import RankedPrompt
from graftune.tasks.resolving import UNBOUNDED, check_roles, most_tokens, precision
from graftune.tasks.result import RunResult, Watcher
from graftune.tasks.settings import RunSettings, TrainSettings
from graftune.tasks.task import Ready, Task, find_task
from graftune.tasks.task_file import write_task
from graftune.tasks.workshop import ALONE, Source

ROWS_AT_ONCE = 16
SHOWN_ANSWERS = 8
"""Test rows that are answered where an answer is any text."""
LONGEST_ANSWER = 128
"""Tokens of such an answer at most."""
_USED = ("batch_size", "seed", "precision", "quantize", "double_quant")


@dataclass
class InContextRun:
    """A run whose settings and data are known to be sound; nothing is written or loaded yet."""

    settings: RunSettings
    task: Task
    method: InContext
    data: Loaded
    labels: list[str]
    rows: list[dict[str, Any]]
    """What may be shown."""
    against: RunResult | None
    watcher: Watcher
    began: float
    source: Source = ALONE
    notes: list[str] = field(default_factory=list[str])

    @classmethod
    def prepared(
        cls, settings: RunSettings, watcher: Watcher, source: Source = ALONE
    ) -> InContextRun:
        """Returns a run, its settings resolved and its data read and checked.

        Raises:
            SettingsError: A setting can't be, or the data has too few rows for it.
            DataError: The data can't be used.
            FormatError: What it is compared with is no finished run.
        """
        began = time.monotonic()
        task = find_task(settings.task, settings.task_options)
        method = in_context_of(settings.method)
        prompting.check_task(method, task)
        settings = _resolved(settings, task, method)
        against = _adapter_run(method.against) if method.against else None
        data = source.data(settings, task)
        labels = task.labels(data.splits)
        rows = chosen(method, data.splits["train"], labels, settings.train.seed)
        run = cls(settings, task, method, data, labels, rows, against, watcher, began, source)
        run.notes.extend(data.report.notes)
        return run

    def plan(self) -> dict[str, Any]:
        """Returns what the run would do: `Run.plan`'s keys, and the first question's `prompt`."""
        return {
            "settings": self.settings.to_dict(),
            "data": self.data.report.to_dict(),
            "labels": self.labels,
            "total_steps": 0,
            "notes": self.notes,
            "prompt": first_prompt(
                self.settings.base,
                self.method,
                self.data.report.columns,
                self.rows,
                (self._tested() or self.data.splits["train"])[0],
            ),
        }

    def run(self, resume: bool, overwrite: bool) -> RunResult:
        """Shows, asks, measures, writes everything, and returns the result.

        Raises:
            SettingsError: The run's directory is taken, or a prompt is longer than the model.
            FormatError: The base can't be loaded, or its tokenizer is another's.
        """
        run_dir = self.settings.run_dir
        if resume and (run_dir / workspace.RESULT).exists():
            self._note(f"{run_dir} is finished already; nothing was done.")
            return RunResult.load(run_dir)
        ready, template = self._ready()
        prompt = prompting.prompt_of(self.method, template, ready, Demonstrations(self.rows))
        examples = self._tested() or self.data.splits["train"][:1]
        self._note(check_room(prompt, examples, self.settings.base))
        with workspace.claimed(run_dir, resume=resume, overwrite=overwrite):
            return self._run(prompt, ready, run_dir)

    def _run(self, prompt: RankedPrompt | ChatPrompt, ready: Ready, run_dir: Path) -> RunResult:
        from graftune.training.memory import reset_peak_memory

        for note in self.notes:
            self.watcher.on_note(note)
        workspace.write_text(run_dir / workspace.SETTINGS, self.settings.to_yaml())
        environment = workspace.environment(self.data.report.hashes)
        workspace.write_json(run_dir / workspace.ENVIRONMENT, environment)
        reset_peak_memory()
        if self.method.select == "nearest":
            self._embed(prompt, ready)
        self._save(prompt.shown, ready, run_dir)
        measured = self._test(prompt, ready, run_dir)
        workspace.write_scores(run_dir, measured.rows)
        result = self._result(prompt.costs, measured, ready, run_dir)
        workspace.write_text(run_dir / workspace.RESULT, result.to_json())
        self.watcher.on_end(result)
        return result

    def _ready(self) -> tuple[Ready, Any]:
        settings, columns = self.settings, self.data.report.columns
        base, template = prompting.base_of(
            settings.base,
            self.task,
            self.method,
            columns,
            lambda kind: self.source.frozen(
                settings, kind, precision(settings), self.watcher.on_note
            ),
        )
        for note in () if self.task.picks else self.task.prepare(base.tokenizer):
            self._note(note)
        limit = most_tokens(base.model, base.tokenizer)
        wanted = settings.data.max_length
        if wanted is not None and limit is not None and wanted > limit:
            raise SettingsError(
                f"data.max_length is {wanted}, but {settings.base} takes at most {limit} tokens."
            )
        self.data.report.max_length = wanted or limit or UNBOUNDED
        longest = self.data.report.max_length
        return Ready(base.model, base.tokenizer, self.labels, longest), template

    def _tested(self) -> list[Example]:
        return self.data.splits.get("test", [])

    def _embed(self, prompt: RankedPrompt | ChatPrompt, ready: Ready) -> None:
        """Gives the rows that may be shown their vectors."""
        began = time.monotonic()
        prompt.shown = with_vectors(self.rows, ready)
        prompt.costs.start_seconds += time.monotonic() - began
        texts = [text_of(row) for row in self.rows]
        prompt.costs.start_tokens += sum(
            map(len, ready.tokenizer(texts, verbose=False)["input_ids"])
        )

    def _save(self, shown: Demonstrations, ready: Ready, run_dir: Path) -> None:
        prompting.save(run_dir / workspace.ADAPTER, self.method, shown)
        write_task(self, ready, run_dir, chats=not self.task.picks)

    def _test(self, prompt: RankedPrompt | ChatPrompt, ready: Ready, run_dir: Path) -> Measured:
        examples = self._tested()
        if not examples:
            return Measured({}, [])
        size = self.settings.train.batch_size or ROWS_AT_ONCE
        asked, room = examples, 0
        if not self.task.picks:
            asked = [self.task.question(one.fields, one.where) for one in examples[:SHOWN_ANSWERS]]
            room = LONGEST_ANSWER
        told = self._announced(len(asked))
        answers = prompt.answers(asked, batch_size=size, max_new_tokens=room, told=told)
        rows = [
            {**found, "true": one.stratum or one.fields["answer"]}
            if self.task.picks
            else {**found, **one.fields}
            for one, found in zip(examples, answers, strict=False)
        ]
        workspace.write_lines(run_dir / workspace.PREDICTIONS, rows)
        if isinstance(prompt, ChatPrompt):
            return measure_logits(self.task, ready, prompt.features(examples), size)
        return self.task.measure(examples, answers, self.labels)

    def _announced(self, total: int) -> Any:
        """Tells the watcher what begins; returns what tells it of each prediction."""
        from graftune.training.memory import peak_memory_bytes

        began = time.monotonic()
        self.watcher.on_start(
            {
                "name": self.settings.run_name,
                "task": self.task.name,
                "method": InContext.name,
                "base": self.settings.base,
                "run_dir": str(self.settings.run_dir),
                "shots": self.method.shots,
                "total_steps": total,
                "parameters": {},
            }
        )

        def told(done: int) -> None:
            seconds = time.monotonic() - began
            left = seconds / done * (total - done)
            state = {"step": done, "total": total, "seconds": seconds, "seconds_left": left}
            self.watcher.on_step({**state, "peak_memory_bytes": peak_memory_bytes()})

        return told

    def _result(
        self, costs: PromptCosts, measured: Measured, ready: Ready, run_dir: Path
    ) -> RunResult:
        from graftune.training.memory import peak_memory_bytes

        count = sum(elements(p) for p in ready.model.parameters())
        against = break_even(costs.to_dict(), self.against) if self.against else {}
        return RunResult(
            name=self.settings.run_name,
            kind=InContext.name,
            settings=self.settings.to_dict(),
            versions=workspace.versions(),
            history=[],
            metrics={"test": measured.metrics} if measured.metrics else {},
            confusion=measured.confusion,
            labels=self.labels,
            parameters={"trainable": 0, "changed": 0, "base": count, "share": 0.0},
            adapter_bytes=workspace.size_of(run_dir / workspace.ADAPTER),
            base_bytes=stored_bytes(ready.model),
            seconds=time.monotonic() - self.began,
            peak_memory_bytes=peak_memory_bytes(),
            adapter_path=str(run_dir / workspace.ADAPTER),
            run_dir=str(run_dir),
            data=self.data.report.to_dict(),
            notes=self.notes,
            costs=costs.to_dict(),
            against=against,
        )

    def _note(self, note: str) -> None:
        self.notes.append(note)


def _resolved(settings: RunSettings, task: Task, method: InContext) -> RunSettings:
    """Returns settings with every default filled in; what only training knows must be left out."""
    plain = TrainSettings()
    for key in TrainSettings.model_fields:
        if key not in _USED and getattr(settings.train, key) != getattr(plain, key):
            raise SettingsError(
                f"train.{key} is {getattr(settings.train, key)!r}, but in-context learning trains "
                "nothing: leave it out."
            )
    if settings.beside:
        raise SettingsError("beside names adapters, but in-context learning has no use for any.")
    if settings.start is not None:
        raise SettingsError("start names an adapter, but in-context learning has no use for one.")
    check_roles(settings, task)
    quantize = Quantising.asked(settings.train)
    if quantize is not None:
        quantize.check()
    return settings.replaced(
        name=settings.run_name,
        out=str(settings.run_dir),
        task_options=task.options.model_dump(mode="json"),
        method={"name": InContext.name, **method.model_dump(mode="json")},
        train={"batch_size": settings.train.batch_size or ROWS_AT_ONCE},
    )


def _adapter_run(path: str) -> RunResult:
    """Returns the run of an adapter to compare costs with."""
    found = RunResult.load(path)
    if not found.costs.get("rows") or not found.costs.get("start_seconds"):
        raise SettingsError(
            f'method.against: "{path}" doesn\'t say how long its training and its predictions '
            "took; train it again (with a test split), by a version that does."
        )
    return found
