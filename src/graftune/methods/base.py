"""What a method is, a frozen settings object that plans where its deltas go; and their registry."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import json
import math
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from graftune.anatomy import Anatomy
from graftune.anatomy.modules import is_in
from graftune.errors import AdapterError, SettingsError, nearest
from graftune.sites.base import Graft

_OUTSIDE = "outside"
HeadChoice = bool | tuple[str, ...] | None


@dataclass(frozen=True)
class Setting:
    """One field of a method, for help texts."""

    name: str
    type: str
    default: Any
    doc: str


@dataclass(frozen=True)
class HeatMap:
    """What a method has to show of a trained adapter: a number for each row and column."""

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    """By row; None where there is nothing."""
    note: str = ""

    @classmethod
    def by_block(
        cls, title: str, values: Mapping[str, float], anatomy: Anatomy, note: str = ""
    ) -> HeatMap:
        """Returns a map with a column for each block and a row for each name inside one.

        Args:
            title: what the numbers are.
            values: by the absolute name of a module or tensor; those outside every block have a
                column of their own.
            anatomy: which blocks there are.
            note: a sentence below it.
        """
        several = len(anatomy.stacks) > 1
        blocks = {
            block.path: f"{stack.kind} {block.position}" if several else str(block.position)
            for stack in anatomy.stacks
            for block in stack.blocks
        }
        cells: dict[tuple[str, str], float] = {}
        for name, value in values.items():
            path = next((path for path in blocks if name.startswith(f"{path}.")), None)
            row = name if path is None else name.removeprefix(f"{path}.")
            cells[row, _OUTSIDE if path is None else blocks[path]] = value
        rows = tuple(dict.fromkeys(row for row, _ in cells))
        filled = {column for _, column in cells}
        columns = tuple(c for c in (*blocks.values(), _OUTSIDE) if c in filled)
        table = tuple(tuple(cells.get((row, column)) for column in columns) for row in rows)
        return cls(title, rows, columns, table, note)


@dataclass(frozen=True, kw_only=True)
class Method:
    """Settings of one method, checked when made; a subclass plans its grafts.

    Subclasses are frozen keyword-only dataclasses with one doc comment below each field. `check`
    raises for values out of range; `plan` raises everything that depends on the model.
    """

    name: ClassVar[str] = "Method"
    paper: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    default_lr: ClassVar[float] = 1e-3
    """Learning rate that the method's users start from, for AdamW."""
    prunes: ClassVar[bool] = False
    """Whether it prunes until training ends, so that only the last weights are what it means."""
    mixes_rows: ClassVar[bool] = True
    """Whether it may be one of several in `Rows`."""

    train_head: HeadChoice = None
    """Heads trained with it: None, the newly initialised ones; True, all; False, none; or names."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = _frozen(getattr(self, field.name))
            object.__setattr__(self, field.name, value)
            self._check_type(field, value)
        self.check()

    @property
    def fuses(self) -> tuple[Any, ...]:
        """Attached adapters (names, or Stacks of them) that it attends to; they act with it."""
        return ()

    @property
    def trains_in_place(self) -> bool:
        """Whether it trains the base's own tensors (then it can't be deactivated)."""
        return False

    def check(self) -> None:
        """Raises SettingsError if a value is out of range; a subclass says which are."""

    def plan(self, model: nn.Module, anatomy: Anatomy, *, empty: bool = False) -> list[Graft]:
        """Returns the grafts for a model, touching nothing.

        Args:
            model: the base.
            anatomy: what it is made of.
            empty: leave tensors uninitialised and sizes unjudged, for a file to fill them.

        Raises:
            SettingsError: if a setting doesn't fit the model.
            AnatomyError: if a target names nothing in it.
        """
        raise NotImplementedError

    @property
    def needs_data(self) -> bool:
        """Whether it looks at data before it is attached: then `plan_on` is called, not `plan`."""
        return False

    def plan_on(
        self, model: nn.Module, anatomy: Anatomy, data: Iterable[Mapping[str, Tensor]]
    ) -> tuple[Method, list[Graft]]:
        """Returns the settings that fit the data, and the grafts; the model is as it was after.

        Args:
            model: the base, no adapter acting.
            anatomy: what it is made of.
            data: batches of what the model's forward takes, with labels where training has them.
        """
        raise NotImplementedError

    def plan_saved(
        self, model: nn.Module, anatomy: Anatomy, tensors: Mapping[str, Tensor]
    ) -> list[Graft]:
        """Returns empty grafts of the shapes that a file's tensors, by absolute name, have.

        A method whose shapes are not told by its settings alone overrides this.
        """
        return self.plan(model, anatomy, empty=True)

    def count(self, model: nn.Module, anatomy: Anatomy) -> int:
        """Returns how many parameters it trains, without the head: the paper's formula."""
        raise NotImplementedError

    def needs_steps(self, adapter: Any) -> bool:
        """Whether training must call `penalty` and `advance`, or the result is another method's."""
        return False

    def check_steps(self, total: int) -> None:
        """Raises SettingsError if a schedule doesn't fit so many optimizer steps."""

    def penalty(self, adapter: Any) -> Tensor | None:
        """Returns what training adds to the loss, a scalar, or None."""
        return None

    def advance(self, adapter: Any, step: int, total: int) -> None:
        """Moves a schedule on, after each optimizer step, while the gradients are still there.

        Args:
            adapter: what is trained.
            step: the steps taken, from 1 to `total`.
            total: of the whole run.
        """

    def finish(self, adapter: Any) -> None:
        """Brings a trained adapter into its last form, as by leaving out what was pruned.

        Tensors may be others afterwards; called again, it changes nothing.
        """

    def changes_at_the_end(self, adapter: Any) -> bool:
        """Whether `finish` gives an adapter other tensors."""
        return type(self).finish is not Method.finish

    def start_from(self, adapter: Any, source: Any, task: int | str | None = None) -> None:
        """Gives an adapter of this method the values of another; heads keep theirs.

        Args:
            adapter: just attached.
            source: an adapter that was trained, of the same places unless a method says more.
            task: which of the source's, where it has several.

        Raises:
            AdapterError: the source can't be started from.
            FormatError: its tensors are others.
        """
        if task is not None:
            raise AdapterError(f'task is {task!r}, but "{source.name}" has no tasks to choose of.')
        own, given = adapter.state_dict(), source.state_dict()
        kept = {name: value for name, value in own.items() if is_in(name, adapter.head_names)}
        taken = {name: t for name, t in given.items() if not is_in(name, source.head_names)}
        adapter.load_state_dict({**taken, **kept})

    def heat_maps(self, adapter: Any) -> list[HeatMap]:
        """Returns what is worth drawing of a trained adapter."""
        return []

    def param_groups(self, adapter: Any, lr: float) -> list[dict[str, Any]] | None:
        """Returns optimizer groups (`params`, `lr`, ...) of the adapter's tensors, or None."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as JSON-able values, with the method's name under "method"."""
        return {"method": self.name, **json.loads(json.dumps(dataclasses.asdict(self)))}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Method:
        """Returns the method that `to_dict` wrote, or a mapping of the same form.

        Raises:
            SettingsError: for an unknown method or setting, naming the nearest.
        """
        given = dict(settings)
        kind = cls
        if "method" in given:
            kind = find(str(given.pop("method")))
        known = [field.name for field in dataclasses.fields(kind)]
        for key in given:
            if key not in known:
                raise SettingsError(
                    f'{kind.name} has no setting "{key}"; it has {", ".join(known)}.'
                    f"{nearest(key, known)}"
                )
        return kind(**given)

    @classmethod
    def settings(cls) -> list[Setting]:
        """Returns every setting with its type, default and doc comment."""
        hints = {f.name: f for f in dataclasses.fields(cls)}
        docs = _doc_comments(cls)
        return [
            Setting(name, str(field.type), _default(field), docs.get(name, ""))
            for name, field in hints.items()
        ]

    def _check_type(self, field: dataclasses.Field[Any], value: Any) -> None:
        hint = _hints(type(self))[field.name]
        if not _fits(value, hint):
            raise SettingsError(
                f"{self.name}: {field.name} is {value!r} ({type(value).__name__}), expected "
                f"{_plain(str(field.type))}."
            )

    def _check_number(
        self, field: str, low: float, high: float = math.inf, *, open_high: bool = False
    ) -> None:
        """Raises unless a field is a finite number in [low, high] (or [low, high))."""
        value = getattr(self, field)
        inside = low <= value < high if open_high else low <= value <= high
        if not (math.isfinite(value) and inside):
            bound = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
            raise SettingsError(f"{self.name}: {field} is {value!r}, expected {bound}.")

    def _check_choice(self, field: str, choices: tuple[str, ...]) -> None:
        """Raises unless a field is one of the choices, or a list of them."""
        given = getattr(self, field)
        for value in given if isinstance(given, tuple) else (given,):
            if value not in choices:
                raise SettingsError(
                    f"{self.name}: {field} is {value!r}, expected one of {', '.join(choices)}."
                    f"{nearest(str(value), choices)}"
                )


M = TypeVar("M", bound=type[Method])
_registry: dict[str, type[Method]] = {}


def register(method: M) -> M:
    """Registers a method class under its name. A class decorator.

    Raises:
        SettingsError: if another class has the name.
    """
    taken = _registry.get(method.name)
    if taken is not None and taken.__qualname__ != method.__qualname__:
        raise SettingsError(f'A method named "{method.name}" is registered already: {taken!r}.')
    _registry[method.name] = method
    return method


def registered() -> dict[str, type[Method]]:
    """Returns the registered methods by name."""
    return dict(sorted(_registry.items()))


def find(name: str) -> type[Method]:
    """Returns the method of a name, whatever its case.

    Raises:
        SettingsError: if there is none, naming the nearest.
    """
    from graftune.methods import methods

    known = methods()
    for key, method in known.items():
        if key.lower() == name.lower():
            return method
    raise SettingsError(
        f'No method is named "{name}"; there are {", ".join(known)}.{nearest(name, known)}'
    )


def _frozen(value: Any) -> Any:
    """Returns lists and sets as tuples, in mappings too: the form in which settings are kept."""
    if isinstance(value, list | tuple):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, Mapping):
        return {key: _frozen(item) for key, item in value.items()}
    return tuple(sorted(value)) if isinstance(value, set | frozenset) else value


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type made of plain types, unions, tuples and mappings."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, arg) for arg in args)
    if origin is typing.Literal:  # which of them: `check` says, with the nearest
        return isinstance(value, str)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, args[0]) for item in value)
    if origin in (dict, Mapping):
        pairs = value.items() if isinstance(value, Mapping) else [(None, None)]
        return all(_fits(k, args[0]) and _fits(v, args[1]) for k, v in pairs)
    if hint is None or hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _plain(hint: str) -> str:
    """Returns an annotation as words for an error."""
    return hint.replace("tuple[", "list of ").replace(", ...]", "").replace(" | ", " or ")


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _doc_comments(cls: type) -> dict[str, str]:
    """Returns the string below each annotated field, of the class and its bases.

    A class typed at a prompt, or shipped without its source, has none.
    """
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            source = inspect.getsource(base)
        except (OSError, TypeError):
            continue
        body = ast.parse(textwrap.dedent(source)).body[0]
        assert isinstance(body, ast.ClassDef)
        for here, below in zip(body.body, body.body[1:], strict=False):
            if isinstance(here, ast.AnnAssign) and isinstance(below, ast.Expr):
                text = ast.literal_eval(below.value)
                docs[ast.unparse(here.target)] = " ".join(str(text).split())
    return docs
