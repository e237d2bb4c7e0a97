"""Ladder Side-Tuning: a narrow network beside the frozen one, fed from its blocks through gates.

    s_0 = P_in e;   s <- mu_i s + (1 - mu_i) P_i h_i;   s <- Block_i(s);   y = P_out N(s)

    e what enters the blocks, h_i what leaves block i, both without gradient; mu = sigmoid(alpha/T)

The side is a model of the same class at 1/reduction of each width, so a backward pass goes through
narrow blocks alone, and the trunk's activations are not kept. Of an encoder-decoder, the side of
the decoder attends to what that of the encoder made. Identity at init: no; with ending="add", which
adds P_out N(s) to the trunk's last state and starts with P_out = 0, yes. Merge: no.
Sung, Cho, Bansal 2022, arXiv 2206.06522, section 3; T = 0.1 from the authors' code.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from graftune.anatomy import Anatomy, Stack
from graftune.anatomy.modules import body_around
from graftune.errors import SettingsError
from graftune.methods._batches import batches, evaluating
from graftune.methods._fisher import rows_of, squared_gradients
from graftune.methods._pruning import Importance, magnitude, prune_into
from graftune.methods._side import Ladder, Narrow, narrow_config, shape_of, side_body
from graftune.methods.base import Method, register
from graftune.sites.base import Graft, TrunkPlace

INITS = ("magnitude", "fisher", "random")
ENDINGS = ("replace", "add")


class Body(NamedTuple):
    """One body that gets a side."""

    path: str
    stack: Stack
    feeds_decoder: bool


@register
@dataclass(frozen=True, kw_only=True)
class LadderSideTuning(Method):
    """Trains a narrow side network; memory is what its own backward pass needs.

    Merge: not possible, the side runs beside the model.
    """

    name: ClassVar[str] = "LadderSideTuning"
    paper: ClassVar[str] = (
        "Sung, Cho, Bansal 2022, LST: Ladder Side-Tuning for Parameter and Memory Efficient "
        "Transfer Learning"
    )
    summary: ClassVar[str] = "A narrow network beside the frozen one; no backward pass through it."
    default_lr: ClassVar[float] = 3e-3

    reduction: int = 8
    """r: what each width of the model is divided by for the side's."""
    drop: tuple[int, ...] = ()
    """Positions of blocks, in each stack, that the side has none for."""
    init: str = "magnitude"
    """Of the side's blocks: the model's own, pruned to the rows and columns with the largest
    weights ("magnitude") or squared gradients on the data ("fisher", the paper's); or "random", as
    the model's class starts them."""
    samples: int = 1024
    """Examples whose gradients "fisher" takes, the first of the data."""
    temperature: float = 0.1
    """T of the gates."""
    ending: str = "replace"
    """"replace": the side's answer stands for the trunk's, as in the paper; "add": it is added to
    the trunk's, from zero on."""
    dropout: float | None = 0.0
    """Every dropout of the side; None for the model's own rates, as in the paper. Where attention
    drops out, kernels for CPUs keep its probabilities, as many as the trunk's."""
    trunk_dropout: bool = False
    """Whether the frozen model drops out in training."""

    def check(self) -> None:
        """See `Method.check`."""
        self._check_number("reduction", 1)
        self._check_number("samples", 1)
        self._check_number("temperature", 1e-6)
        if self.dropout is not None:
            self._check_number("dropout", 0.0, 1.0, open_high=True)
        self._check_choice("init", INITS)
        self._check_choice("ending", ENDINGS)

    def plan(self, model: nn.Module, anatomy: Anatomy, *, empty: bool = False) -> list[Graft]:
        """See `Method.plan`.

        Raises:
            SettingsError: widths that don't divide, blocks that aren't there, a model that isn't
                one stack or an encoder with a decoder.
        """
        bodies = self._bodies(model, anatomy)
        if empty or self.init == "random":
            return [self._graft(model, body) for body in bodies]
        return [self._graft(model, body, magnitude) for body in bodies]

    @property
    def needs_data(self) -> bool:
        """See `Method.needs_data`."""
        return self.init == "fisher"

    def plan_on(
        self, model: nn.Module, anatomy: Anatomy, data: Iterable[Mapping[str, Tensor]]
    ) -> tuple[Method, list[Graft]]:
        """See `Method.plan_on`.

        Raises:
            SettingsError: as `plan`; and a model that returns no loss for the data.
        """
        bodies = list(self._bodies(model, anatomy))
        names = [
            part.path
            for body in bodies
            for block in body.stack.blocks
            for span in block.spans
            for part in span.projections
        ]
        chosen = {name: model.get_parameter(name) for name in dict.fromkeys(names)}
        with evaluating(model):
            rows = (row for batch in batches(model, data, self.name) for row in rows_of(batch))
            examples = islice(rows, self.samples)
            found = squared_gradients(self.name, model, list(chosen.values()), examples)
        known = dict(zip(chosen, found, strict=True))

        def fisher(name: str, tensor: Tensor) -> Tensor:
            return known[name]

        return self, [self._graft(model, body, fisher) for body in bodies]

    def count(self, model: nn.Module, anatomy: Anatomy) -> int:
        """See `Method.count`: blocks and norms of the side, P_in, P_i, P_out and the gates."""
        total = 0
        for body in self._bodies(model, anatomy):
            layers, narrow = self._narrow(model, body, "meta")
            own = sum(tensor.numel() for tensor in narrow.body.parameters())
            d = body.stack.blocks[0].width
            n = d // self.reduction
            total += own + (1 + len(layers)) * (n * d + n) + len(body.stack.blocks)
            total += 0 if body.feeds_decoder else d * n + d
        return total

    def _graft(self, model: nn.Module, body: Body, importance: Importance | None = None) -> Graft:
        """Returns a side, pruned out of the body's blocks if it is told what matters in them."""
        device = next(model.get_submodule(body.path).parameters()).device
        layers, narrow = self._narrow(model, body, device)
        if importance is not None:
            blocks = [body.stack.blocks[at] for at in layers]
            prune_into(self.name, model, blocks, narrow, self.reduction, importance)
        shape = shape_of(body.stack, narrow, layers, has_end=not body.feeds_decoder)
        delta = Ladder(
            narrow.body,
            shape,
            self.temperature,
            adds=self.ending == "add",
            dropout=self.trunk_dropout,
        )
        paths = tuple(block.path for block in body.stack.blocks)
        return Graft(TrunkPlace(body.path, paths, body.feeds_decoder), delta)

    def _narrow(self, model: nn.Module, body: Body, device: Any) -> tuple[tuple[int, ...], Narrow]:
        """Returns the positions that the side has blocks for, and its body."""
        depth = len(body.stack.blocks)
        layers = tuple(at for at in range(depth) if at not in self.drop)
        config: Any = model.get_submodule(body.path).config
        narrow = narrow_config(self.name, config, layers, depth, self.reduction, self.dropout)
        return layers, side_body(model, body.path, narrow, device)

    def _bodies(self, model: nn.Module, anatomy: Anatomy) -> Iterator[Body]:
        kinds = tuple(stack.kind for stack in anatomy.stacks)
        if len(kinds) != 1 and kinds != ("encoder", "decoder"):
            raise SettingsError(
                f"{self.name}: the model's stacks are {', '.join(kinds) or 'not known'}, expected "
                "one, or an encoder and a decoder."
            )
        for stack in anatomy.stacks:
            self._check_stack(stack)
            path = body_around(model, stack.path)
            yield Body(path, stack, stack.kind == "encoder" and len(kinds) == 2)

    def _check_stack(self, stack: Stack) -> None:
        depth = len(stack.blocks)
        beyond = [at for at in self.drop if not 0 <= at < depth]
        if beyond:
            raise SettingsError(
                f"{self.name}: drop names block {beyond[0]}, but {stack.path} has {depth}, "
                f"0 to {depth - 1}."
            )
        if len(set(self.drop)) >= depth:
            raise SettingsError(
                f"{self.name}: drop leaves no block of the {depth} in {stack.path}."
            )
        widths = {block.width for block in stack.blocks}
        if len(widths) > 1:
            found = ", ".join(map(str, sorted(widths)))
            raise SettingsError(
                f"{self.name}: the blocks of {stack.path} differ in width ({found}), expected one."
            )
