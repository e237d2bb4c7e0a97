"""What makes virtual tokens while they train: a recurrent net, an MLP, or nothing.

    lstm    h = MLP(biLSTM(E))      LSTM: d to h each way, `depth` layers; MLP: 2h -> 2h ReLU -> d
    mlp     h = MLP(E)              `depth` linears: d -> h ReLU ... h -> d
    none    h = E

E (m, d). The encoder is a way of training: once it is over, h alone is kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftune.methods._soft_prompts import Prompt
from graftune.sites.base import EmbeddingDelta


class Encoder(nn.Module):
    """An LSTM, where it has one, and linears with ReLU between them.

    Shapes: W1 (out, in), c1 (out), W2 ...; of the LSTM those of `torch.nn.LSTM`, by its names.

    Args:
        width: d.
        lstm: the LSTM's width each way and its layers, or None.
        widths: before the first linear and after each.
        dropout: between the LSTM's layers, in training.
        options: dtype and device.
    """

    def __init__(
        self,
        width: int,
        lstm: tuple[int, int] | None,
        widths: Sequence[int],
        dropout: float,
        options: Any,
    ) -> None:
        super().__init__()
        self.lstm, self.p = lstm, dropout
        shapes = {} if lstm is None else lstm_shapes(width, *lstm)
        self.recurrent, self.linears = tuple(shapes), len(widths) - 1
        for n, (fan_in, out) in enumerate(itertools.pairwise(widths), 1):
            shapes |= {f"W{n}": (out, fan_in), f"c{n}": (out,)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, **options)))

    def start(self) -> None:
        """Sets initial values, as linears and LSTMs start: within 1/sqrt of the inputs or width."""
        for name, tensor in self.named_parameters():
            is_linears = name not in self.recurrent
            fan = self._tensor(f"W{name[1:]}").shape[1] if is_linears else tensor.shape[0] // 4
            nn.init.uniform_(tensor, -(fan**-0.5), fan**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Returns what it makes of `(m, d)`, of the same shape."""
        if self.lstm is not None:
            x = self._recurrent(x, *self.lstm)
        for n in range(1, self.linears + 1):
            x = F.linear(F.relu(x) if n > 1 else x, self._tensor(f"W{n}"), self._tensor(f"c{n}"))
        return x

    def _recurrent(self, x: Tensor, width: int, layers: int) -> Tensor:
        weights = [self._tensor(name) for name in self.recurrent]
        zero = x.new_zeros(2 * layers, 1, width)
        return torch.lstm(  # what torch.nn.LSTM calls: (m, 1, d) -> (m, 1, 2h)
            x[:, None],
            (zero, zero),
            weights,
            has_biases=True,
            num_layers=layers,
            dropout=self.p,
            train=self.training,
            bidirectional=True,
            batch_first=False,
        )[0][:, 0]

    def _tensor(self, name: str) -> Tensor:
        return self.get_parameter(name)


class PromptFromEncoder(EmbeddingDelta):
    """h, which an encoder makes of E. Shapes: E (m, d); see `Encoder`."""

    E: nn.Parameter

    def __init__(
        self, E: Tensor, encoder: Encoder, is_after_first: bool, marker: int | None
    ) -> None:
        super().__init__()
        self.E, self.encoder, self.length = nn.Parameter(E), encoder, len(E)
        self.is_after_first, self.marker = is_after_first, marker

    def prompt(self, tasks: Tensor | None = None) -> Tensor:
        """See `EmbeddingDelta.prompt`."""
        return self.encoder(self.E)

    @torch.no_grad()
    def kept(self) -> Prompt:
        """Returns the virtual tokens themselves, without the encoder."""
        return Prompt(self.prompt().clone(), self.is_after_first, self.marker)


def lstm_shapes(width: int, hidden: int, layers: int) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a bidirectional LSTM's tensors, by the names `torch.nn.LSTM` has."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        fan_in = width if layer == 0 else 2 * hidden
        for end in ("", "_reverse"):
            shapes[f"weight_ih_l{layer}{end}"] = (4 * hidden, fan_in)
            shapes[f"weight_hh_l{layer}{end}"] = (4 * hidden, hidden)
            shapes[f"bias_ih_l{layer}{end}"] = (4 * hidden,)
            shapes[f"bias_hh_l{layer}{end}"] = (4 * hidden,)
    return shapes
