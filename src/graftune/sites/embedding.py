"""The embedding site: virtual tokens among those that enter a body, and out of what it answers.

    ids ──[embeddings]── E ──[P ; E]── blocks ── [h_P ; h] ──── h          decoders, encoders
                              └────────────────── [h_P ; h] ── cross-attention     encoder-decoders

The site hangs below the body, the module that takes `input_ids` or `inputs_embeds`. Mask, positions
and token types grow with the sequence. Since the body's answer is as long as the base's, heads,
labels and losses know nothing of virtual tokens, nor does `generate`: a cache that holds a prompt
is marked, and passes that go on with it count the prompt in.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftune.errors import AdapterError
from graftune.sites import masks
from graftune.sites.base import EmbeddingDelta, EmbeddingPlace, Graft
from graftune.sites.caches import caches_in
from graftune.sites.entrance import PositionTable
from graftune.sites.kept import thread_id
from graftune.sites.marked import filled
from graftune.sites.prompt_rows import PromptSite
from graftune.sites.state import Active
from graftune.sites.static_caches import MaskMaker, fitted, make_room
from graftune.sites.woven import Woven, is_empty

MARK = "_graftune_prompt"
"""Attribute of a cache that holds a prompt: how it came in, a `CameIn`."""


@dataclass(frozen=True, eq=False)
class CameIn:
    """How a prompt came in.

    Attributes:
        woven: the prompt.
        length: how many tokens it came in with.
        missed_first: whether it is to follow the first token, and a row was padding alone.
    """

    woven: Woven
    length: int
    missed_first: bool


class EmbeddingSite(PromptSite):
    """Deltas on the sequence of embedded tokens.

    Args:
        active: the model's shared state.
    """

    def __init__(self, active: Active) -> None:
        super().__init__(active)
        self.arguments: tuple[str, ...] = ()
        """Names of what the body takes, in order."""
        self.reads: tuple[str, ...] = ()
        """Those of the decoder that attends to its answer; empty without one."""
        self.table = PositionTable()
        self.stack: str | None = None
        """The kind of the host's stack, of an encoder-decoder."""
        self.reads_tasks = False
        """Whether `begin` is registered."""
        self.takes_ids = False
        """Whether the body takes ids alone: what their table answers is put in its place."""
        self.maker: MaskMaker | None = None
        """The model's own maker of masks, behind `masks_for_generate`."""

    def hook(self, host: nn.Module) -> None:
        """Registers `before` and `after`."""
        self.arguments = tuple(inspect.signature(host.forward).parameters)
        self.table = PositionTable.of(host)
        self.handles = [
            host.register_forward_pre_hook(self.before, with_kwargs=True),
            host.register_forward_hook(self.after),
        ]
        self.takes_ids = "inputs_embeds" not in self.arguments
        if self.takes_ids:
            self.handles.append(_table(host).register_forward_hook(self.embed))

    def take(self, model: nn.Module, name: str, graft: Graft) -> None:
        """See `Site.take`: also follows the answer to the decoder that reads it."""
        assert isinstance(graft.place, EmbeddingPlace)
        assert isinstance(graft.delta, EmbeddingDelta)
        super().take(model, name, graft)
        self.stack = graft.place.stack
        self.extend_reader(model, graft.place)
        if self.maker is None and "past_key_values" in self.arguments and not self.reads:
            self.maker = MaskMaker(model, self.masks_for_generate)
            self.handles.append(self.maker)
        if graft.delta.tasks and not self.reads_tasks:
            self.reads_tasks = True
            self.handles += [
                model.register_forward_pre_hook(self.begin, with_kwargs=True, prepend=True),
                model.register_forward_hook(self.end, always_call=True),
            ]

    def extend_reader(self, model: nn.Module, place: EmbeddingPlace) -> None:
        """Registers `extend` on the decoder that attends to what the host answers, once."""
        if place.reader is not None and not self.reads:
            decoder = model.get_submodule(place.reader)
            self.reads = tuple(inspect.signature(decoder.forward).parameters)
            self.handles.append(decoder.register_forward_pre_hook(self.extend, with_kwargs=True))

    def masks_for_generate(self, **given: Any) -> Any:
        """Returns what `generate` gives a model with a cache of fixed size for a mask."""
        assert self.maker is not None
        holds_prompt = hasattr(given.get("past_key_values"), MARK)
        if holds_prompt or self._lengthens_now():
            return given.get("attention_mask")
        return self.maker.before(**given)

    def begin(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Takes `task_ids` out of what the whole model is given. A forward pre-hook of it."""
        if "task_ids" not in kwargs:
            return None
        self.active.given["tasks", thread_id()] = kwargs["task_ids"]
        return args, {name: value for name, value in kwargs.items() if name != "task_ids"}

    def end(self, model: nn.Module, args: Any, output: Any) -> None:
        """Forgets a pass's `task_ids`. A forward hook of the whole model."""
        self.active.given.pop(("tasks", thread_id()), None)

    def before(self, host: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Puts the prompt into what the body is given. A forward pre-hook.

        Raises:
            AdapterError: the body is given something that a prompt can't be put into.
        """
        for name in ("woven", "tokens"):
            self.kept.pop((name, thread_id()), None)
        given = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        cache = given.get("past_key_values")
        past = 0 if cache is None else _length(cache)
        marked = self._marked(host, given, past)
        if past:
            given = self._continued(given, getattr(cache, MARK, None))
        elif self._acts_now():
            ids = _ids(given)
            woven = self._woven(len(ids), ids.device)
            if woven is not None:
                return (), self._longer(host, given, ids, woven, marked)
        if marked is not None:
            return (), self._embedded(given, marked, past)
        return ((), given) if past else None

    def after(self, host: nn.Module, args: Any, output: Any) -> Any:
        """Takes the virtual tokens out of what the body answers. A forward hook."""
        found = self.kept.pop(("woven", thread_id()), None)
        if found is None:
            return None
        came_in, at = found
        for cache in caches_in(output):
            setattr(cache, MARK, came_in)
        if self.reads or self._keeps():
            return None
        return shorter(host, output, came_in.woven, at, came_in.length)

    def embed(self, table: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """Puts tokens, virtual ones too, in the place of what a table answers. A hook of it."""
        return self.kept.pop(("tokens", thread_id()), None)

    def extend(self, decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Lets a decoder's mask of what the encoder saw cover the prompt. A forward pre-hook.

        Raises:
            AdapterError: the encoder ran under another composition.
        """
        given = {**dict(zip(self.reads, args, strict=False)), **kwargs}
        states, mask = given.get("encoder_hidden_states"), given.get("encoder_attention_mask")
        woven = self._woven(len(states), states.device) if states is not None else None
        if states is None or woven is None:
            return None
        if mask is None:
            if woven.lengths is None:
                return None
            mask = states.new_ones(len(states), states.shape[1] - woven.most, dtype=torch.long)
        if mask.ndim != 2 or mask.shape[1] + woven.most != states.shape[1]:
            raise AdapterError(
                f"The decoder attends to {states.shape[1]} states of the encoder under a mask of "
                f"{tuple(mask.shape)} and a prompt of {woven.most}: run the encoder under the "
                "adapter that is active now, with a mask of (rows, tokens)."
            )
        at = woven.at(mask, len(mask), mask.device)
        return (), {**given, "encoder_attention_mask": woven.mask(mask, at)}

    def _marked(self, host: nn.Module, given: dict[str, Any], past: int) -> Tensor | None:
        """Returns the embedded tokens with virtual ones in markers' places; None without markers.

        Args:
            host: the body.
            given: what it is given.
            past: how many tokens its cache holds.
        """
        names = self.active.current().names
        deltas: list[Any] = [self._modules[name] for name in names if name in self._modules]
        markers: set[int] = {delta.marker for delta in deltas if delta.marker is not None}
        if not markers:
            return None
        ids = _ids(given)
        if past and not any((ids == marker).any() for marker in markers):
            return None
        tokens = _tokens(host, ids)
        for marker in markers:
            virtual = self._woven(len(ids), ids.device, marker)
            if virtual is not None:
                tokens = filled(tokens, ids, marker, virtual, may_lack=past > 0)
        return tokens

    def _embedded(self, given: dict[str, Any], tokens: Tensor, past: int) -> dict[str, Any]:
        """Returns arguments with embedded tokens instead of ids."""
        ids = given["input_ids"]
        rest = {**given, **self._entering(ids, tokens)}
        if given.get("position_ids") is None and self.table.padding is not None:
            rest["position_ids"] = self._unpadded(ids, past)
        return rest

    def _entering(self, ids: Tensor, tokens: Tensor) -> dict[str, Any]:
        """Returns the arguments that let embedded tokens in; `ids` are theirs if it takes ids."""
        if not self.takes_ids:
            return {"input_ids": None, "inputs_embeds": tokens}
        self.kept["tokens", thread_id()] = tokens
        return {"input_ids": ids}

    def _longer(
        self,
        host: nn.Module,
        given: dict[str, Any],
        ids: Tensor,
        woven: Woven,
        tokens: Tensor | None,
    ) -> dict[str, Any]:
        mask = given.get("attention_mask")
        check_mask(mask)
        cache = given.get("past_key_values")
        make_room(cache, host.config, woven.most)
        at = woven.at(mask, len(ids), ids.device)
        tokens = _tokens(host, ids) if tokens is None else tokens
        longer = woven.into(_fill(host, ids, woven), ids, at) if self.takes_ids else ids
        changed = self._entering(longer, woven.into(woven.prompt, tokens, at))
        limit = self.table.limit
        if limit is not None and ids.shape[1] + woven.most > limit:
            raise AdapterError(
                f"{ids.shape[1]} tokens and a prompt of {woven.most} are more than the {limit} "
                f"positions of this {type(host).__name__}: shorten the text, or the prompt."
            )
        if mask is None and woven.lengths is not None:
            mask = torch.ones_like(ids)
        if mask is not None:
            changed["attention_mask"] = self._mask(woven.mask(mask, at), cache)
            masks.woven(given.get("attention_mask"), changed["attention_mask"], self.stack)
        types = given.get("token_type_ids")
        if types is not None:
            none = types.new_zeros(len(ids), woven.most)
            changed["token_type_ids"] = woven.into(none, types.expand(len(ids), -1), at)
        positions = self._positions(given, ids, woven)
        if positions is not None:
            changed["position_ids"] = woven.positions(positions, at, mask)
        missed = woven.is_after_first and mask is not None and bool(is_empty(mask).any())
        self.kept["woven", thread_id()] = (CameIn(woven, ids.shape[1], missed), at)
        return {**given, **changed}

    def _mask(self, mask: Tensor, cache: Any) -> Tensor:
        """Returns a mask of a cache's length, unless the body counts tokens in it."""
        return mask if self.table.is_from_mask else fitted(mask, cache)

    def _positions(self, given: dict[str, Any], ids: Tensor, woven: Woven) -> Tensor | None:
        """Returns the positions that the base gives its tokens, None where it finds them itself."""
        positions = given.get("position_ids")
        if positions is not None:
            if positions.ndim != 2:
                found = tuple(positions.shape)
                raise AdapterError(f"A prompt takes position_ids of (rows, tokens), found {found}.")
            return positions
        if self.table.padding is not None:
            return self._unpadded(ids, 0)
        return self._counted(0, ids) if woven.lengths is not None else None

    def _unpadded(self, ids: Tensor, past: int) -> Tensor:
        """Returns positions as RoBERTa counts them: what isn't padding, told from the ids alone."""
        pad = self.table.padding or 0
        is_real = ids.ne(pad).int()
        return ((is_real.cumsum(1) + past) * is_real).long() + pad

    def _counted(self, start: int, ids: Tensor) -> Tensor | None:
        """Returns positions from `start` on, None where the body finds them itself."""
        if "position_ids" not in self.arguments or self.table.is_from_mask:
            return None
        return torch.arange(start, start + ids.shape[1], device=ids.device)[None]

    def _continued(self, given: dict[str, Any], mark: CameIn | None) -> dict[str, Any]:
        """Returns the arguments of a pass that goes on with a cache which may hold a prompt."""
        if mark is None:
            return given
        woven = mark.woven
        changed: dict[str, Any] = {}
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        check_mask(mask)
        ids = _ids(given)
        known = _length(given["past_key_values"]) - woven.most  # real tokens
        if mask is None and woven.lengths is not None:
            mask = ids.new_ones(len(ids), known + ids.shape[1])
        if mask is not None:
            at = woven.at(mask, len(mask), mask.device, mark.length)
            if mark.missed_first:
                _check_first(mark, at, mask)
            changed["attention_mask"] = self._mask(woven.mask(mask, at), given["past_key_values"])
            masks.woven(given.get("attention_mask"), changed["attention_mask"], self.stack)
        if positions is None and woven.lengths is not None:
            positions = self._counted(known, ids)
        if positions is not None:
            changed["position_ids"] = woven.later(positions)
        return {**given, **changed}


def _table(host: Any) -> nn.Module:
    return host.get_input_embeddings()


def _tokens(host: nn.Module, ids: Tensor) -> Tensor:
    return _table(host)(ids)


def _fill(host: Any, ids: Tensor, woven: Woven) -> Tensor:
    """Returns ids for virtual tokens that end no text, `(B, M)`."""
    return ids.new_full((len(ids), woven.most), int(host.config.eos_token_id == 0))


def _length(cache: Any) -> int:
    return int(cache.get_seq_length())


def _ids(given: dict[str, Any]) -> Tensor:
    """Returns the token ids that a body is given.

    Raises:
        AdapterError: there are none.
    """
    ids = given.get("input_ids")
    if ids is None or given.get("inputs_embeds") is not None:
        what = "inputs_embeds" if given.get("inputs_embeds") is not None else "neither"
        raise AdapterError(
            f"A prompt is put among the embeddings of input_ids, found {what}: pass input_ids "
            "alone, or gt.activate(model, None)."
        )
    return ids


def _check_first(came_in: CameIn, at: Tensor, mask: Tensor) -> None:
    """Raises AdapterError if a row's first token came after the prompt that was to follow it."""
    if bool((at != came_in.woven.at(mask, len(mask), mask.device)).any()):
        raise AdapterError(
            "A prompt after the first token can't follow it where a row's first "
            f"{came_in.length} tokens are padding alone: generate with a larger "
            "prefill_chunk_size."
        )


def check_mask(mask: Any) -> None:
    """Raises AdapterError unless a mask is one of rows and tokens, or None."""
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise AdapterError(
            f"A prompt takes an attention_mask of (rows, tokens), found {found}; pass "
            "the mask of tokens, or none."
        )


def shorter(
    host: nn.Module, output: Any, woven: Woven, at: Tensor, length: int, *, pools: bool = False
) -> Any:
    """Returns a body's answer without the virtual tokens' hidden states.

    Args:
        host: the body.
        output: its answer.
        woven: the virtual tokens.
        at: before which token of each row they came in.
        length: how many real tokens there are.
        pools: whether to pool once more, though the first token is where it was.
    """

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            is_states = value.ndim == 3 and value.shape[1] == length + woven.most
            return woven.out_of(value, at) if is_states else value
        return tuple(map(cut, value)) if type(value) is tuple else value

    if isinstance(output, tuple | list):
        return tuple(map(cut, output))
    made = {name: cut(value) for name, value in output.items()}
    pooler: Any = host._modules.get("pooler")
    moved = pools or woven.lengths is not None or not woven.is_after_first
    if made.get("pooler_output") is not None and pooler is not None and moved:
        made["pooler_output"] = pooler(made["last_hidden_state"])  # of the first real token
    return type(output)(**made)
