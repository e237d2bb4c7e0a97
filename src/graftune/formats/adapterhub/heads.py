"""The head that lies in an adapter's directory, onto the head that the model has.

static   tensors by the model's own names: "classifier.weight"
flex     "heads.task.1.weight": the linears of a Sequential in their order, which are those of
         the model's head, BERT's pooler with them
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graftune.anatomy import Anatomy
from graftune.anatomy.modules import is_in
from graftune.errors import BaseMismatchError, FormatError
from graftune.formats.base import base_tensors
from graftune.formats.tensors import listed
from graftune.sites.base import Graft, base_modules
from graftune.sites.parameter import own_value

_FLEX = re.compile(r"heads\.(?P<name>.+)\.(?P<index>\d+)\.(?P<tensor>weight|bias)")
_CLASSES = {
    "classification": "ForSequenceClassification",
    "multilabel_classification": "ForSequenceClassification",
    "image_classification": "ForImageClassification",
    "tagging": "ForTokenClassification",
    "question_answering": "ForQuestionAnswering",
}
"""The models whose heads compute what AdapterHub's do, by its kinds of heads."""
_ACTIVATIONS = {"distilbert": "relu", "electra": "gelu"}
"""What lies between the linears of a head; elsewhere tanh."""
_ALONE = "pass head=False to load the adapter without it."


@dataclasses.dataclass(frozen=True)
class Head:
    """The values that a directory has for a model's head."""

    modules: tuple[str, ...] = ()
    """Paths of the head's modules; none where the values are the model's own."""
    tensors: Mapping[str, Tensor] = dataclasses.field(default_factory=dict[str, Tensor])
    """By the model's names."""

    def grafts(self, model: nn.Module) -> list[Graft]:
        """Returns the head's values as grafts."""
        found: list[Graft] = []
        for name, tensor in self.tensors.items():
            graft = own_value(model, name, empty=True, adds=False)
            graft.delta.shared = False  # type: ignore[assignment]
            graft.delta.value.data.copy_(tensor)  # type: ignore[operator,union-attr]
            found.append(graft)
        return found


def read(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    anatomy: Anatomy,
    where: str,
) -> Head:
    """Returns a directory's head as values of the model's own tensors.

    Raises:
        FormatError: the model has no such head.
        BaseMismatchError: its sizes differ.
    """
    given = config.get("config")
    named = dict(tensors) if given is None else _flex(given, tensors, model, anatomy, where)
    base = base_tensors(model)
    absent = sorted(named.keys() - base.keys())
    if absent:
        raise FormatError(
            f"{where} has a head, and this {type(model).__name__} has no {listed(absent)}: {_ALONE}"
        )
    wrong = [name for name, tensor in named.items() if tensor.shape != base[name].shape]
    if wrong:
        shapes = [tuple(tensor.shape) for tensor in (named[wrong[0]], base[wrong[0]])]
        raise BaseMismatchError(
            f'{where} has a head of another size: "{wrong[0]}" is {shapes[0]}, this model needs '
            f"{shapes[1]}; load the base with as many labels, or {_ALONE}"
        )
    return _own(named, base, anatomy)


def _own(named: Mapping[str, Tensor], base: Mapping[str, Tensor], anatomy: Anatomy) -> Head:
    """Returns the head without what is the model's own, and each tied tensor once."""
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in sorted(named.items()):
        module = name.rpartition(".")[0]
        home = next((head for head in anatomy.heads if is_in(module, (head,))), module)
        modules.setdefault(home, {})[name] = tensor
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for home, inside in list(modules.items()):
        if all(_same(base[name], tensor) for name, tensor in inside.items()):
            del modules[home]
            continue
        for name, tensor in inside.items():
            if id(base[name]) not in seen:
                seen.add(id(base[name]))
                found[name] = tensor
    return Head(tuple(modules), found)


def _same(base: Tensor, tensor: Tensor) -> bool:
    if base.is_meta:
        return False
    return torch.equal(base.detach().cpu(), tensor.to(base.dtype))


def _flex(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    anatomy: Anatomy,
    where: str,
) -> dict[str, Tensor]:
    """Returns a flexible head's tensors by the names of the model's linears."""
    kind, found = str(config.get("head_type")), dict[int, dict[str, Tensor]]()
    for key, tensor in tensors.items():
        match = _FLEX.fullmatch(key)
        if match is None:
            raise FormatError(f'{where}: tensor "{key}" of its head is unknown here; {_ALONE}')
        found.setdefault(int(match["index"]), {})[match["tensor"]] = tensor
    linears = _linears(model, anatomy, bool(config.get("use_pooler")))
    activation = _ACTIVATIONS.get(anatomy.model_type, "tanh")
    fits = (
        kind in _CLASSES
        and type(model).__name__.endswith(_CLASSES[kind])
        and len(linears) == len(found)
        and (len(found) < 2 or config.get("activation_function") == activation)
    )
    if not fits:
        raise FormatError(
            f"{where} has a head of kind {kind} with {len(found)} layers "
            f"({config.get('activation_function')}), which this {type(model).__name__} has not: "
            f"{_ALONE}"
        )
    inside = [found[index] for index in sorted(found)]
    return {
        f"{module}.{name}": tensor
        for module, own in zip(linears, inside, strict=True)
        for name, tensor in own.items()
    }


def _linears(model: nn.Module, anatomy: Anatomy, pooled: bool) -> Sequence[str]:
    """Returns the linears between the last block and the logits, the pooler's unless given."""
    modules = base_modules(model)
    linears = [path for path, module in modules.items() if isinstance(module, nn.Linear)]
    heads = [path for path in linears if is_in(path, anatomy.heads)]
    pooler = [path for path in linears if path.endswith("pooler.dense")]
    return heads if pooled else [*pooler, *heads]
