"""Trained prompts as prefixes: what a decoder keeps of them is the same for every text.

    P (m, d)  --[base, once]-->  keys and values (m, kv) of every attention  =  a prefix

In a causal decoder virtual tokens in front see no text, so their keys and values needn't be
computed with each. A text of n tokens then costs n tokens instead of m + n.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from graftune.adapter import Planned, attach_planned, head_grafts
from graftune.anatomy import Anatomy
from graftune.attached import Adapter, plain_model, state_of
from graftune.composition import check_names
from graftune.errors import AdapterError, SettingsError
from graftune.methods._attentions import attentions
from graftune.methods._soft_prompts import SoftPrompt, embedded, prompt_of
from graftune.methods.prefix import PrefixTuning
from graftune.sites.base import EmbeddingDelta, EmbeddingPlace
from graftune.sites.caches import has_windows, keys_and_values
from graftune.sites.plan import Plan
from graftune.sites.positions import shifts


def as_prefix(
    model: nn.Module, name: str, new_name: str, *, task: int | str | None = None
) -> Adapter:
    """Attaches a prefix that answers as a trained prompt does, and activates it.

    The text's tokens stand later by the prompt's length, as behind the prompt; the logits are the
    same up to rounding. Rows padded on the left are as alone where they are told positions, as
    `generate` does. A head is copied. It is saved as any prefix, for HF PEFT too.

    Args:
        model: what the prompt is attached to.
        name: the prompt's: of PromptTuning, PTuning or MultitaskPromptTuning.
        new_name: the prefix's.
        task: whose prompt, where the adapter has several tasks.

    Raises:
        AdapterError: it isn't such a prompt, or no prefix can answer the same; the message why.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> import graftune as gt
        >>> tiny = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(**tiny, num_attention_heads=2, vocab_size=9))
        >>> prompt = gt.attach(model, gt.PromptTuning(length=4), "prompt")
        >>> gt.as_prefix(model, "prompt", "prefix").method.length
        4
    """
    model = plain_model(model)
    state = state_of(model)
    check_names(name, state.adapters)
    adapter = state.adapters[name]
    method, tensors = _prefix(adapter, task)
    heads = adapter.head_names
    tensors |= {key: own for key, own in adapter.state_dict().items() if key in _of_heads(adapter)}

    def plan(parts: Anatomy) -> Planned:
        grafts = method.plan(model, parts, empty=True)
        return Planned(method, grafts + head_grafts(model, heads, grafts, empty=True), heads)

    made = attach_planned(model, method, new_name, plan)
    made.load_state_dict(tensors)
    return made


def _of_heads(adapter: Adapter) -> set[str]:
    """Returns the names of what an adapter has beside its prompt."""
    prompt = {name for name, _ in embedded(adapter)[0].tensors()}
    return {name for name, _ in adapter.named_tensors()} - prompt


def _prefix(adapter: Adapter, task: int | str | None) -> tuple[PrefixTuning, dict[str, Tensor]]:
    """Returns the prefix's settings and its tensors."""
    _check(adapter, task)
    model, tokens = adapter.model, prompt_of(adapter, task)
    place: Any = embedded(adapter)[0].place
    body: Any = model.get_submodule(place.module)
    with state_of(model).active.pinned(Plan.of(None)):
        dtype = next(body.parameters()).dtype
        kept = keys_and_values(body, {"inputs_embeds": tokens[None].to(dtype)})
    method = PrefixTuning(
        length=len(tokens),
        hidden=None,
        sublayers=("attention",),
        shift_positions=True,
        train_head=adapter.head_names or False,
    )
    tensors: dict[str, Tensor] = {}
    for one in attentions(method.name, model, adapter.anatomy, ("attention",), None):
        host: Any = model.get_submodule(one.place.module)
        key, value = kept[host.layer_idx]
        tensors |= {f"{one.place.key}.key": key, f"{one.place.key}.value": value}
    return method, tensors


def _check(adapter: Adapter, task: int | str | None) -> None:
    """Raises AdapterError unless a prefix can answer as an adapter does."""
    model: Any = adapter.model
    if not isinstance(adapter.method, SoftPrompt):
        raise _refusal(adapter, f"it is {adapter.method.name}, which has no prompt")
    kinds = [stack.kind for stack in adapter.anatomy.stacks]
    if kinds != ["decoder"]:
        raise _refusal(
            adapter,
            f"this {type(model).__name__} isn't a decoder alone, and elsewhere a prompt sees the "
            "text, so that what is kept of it isn't the same for every text",
        )
    graft = embedded(adapter)[0]
    delta: Any = graft.delta
    assert isinstance(delta, EmbeddingDelta)
    if (
        not isinstance(graft.place, EmbeddingPlace)
        or delta.is_after_first
        or delta.marker is not None
    ):
        raise _refusal(
            adapter,
            "it isn't in front of the text, so that it sees some of it, and some of it doesn't see "
            'the prompt (position="front")',
        )
    if task is None and delta.tasks > 1:
        raise _refusal(adapter, f"it has {delta.tasks} tasks, each its own prompt (task=)")
    if has_windows(model.config):
        raise _refusal(
            adapter,
            "this model has layers with a sliding window, which hides a prompt from later tokens "
            "and no prefix",
        )
    try:
        shifts(adapter.method.name, model, adapter.anatomy, delta.length)
        found = list(attentions(adapter.method.name, model, adapter.anatomy, ("attention",), None))
    except SettingsError as error:
        raise _refusal(adapter, str(error)) from error
    if len(found) != len(adapter.anatomy.blocks):
        raise _refusal(adapter, "some blocks keep something else than keys and values")


def _refusal(adapter: Adapter, why: str) -> AdapterError:
    return AdapterError(f'as_prefix can\'t take "{adapter.name}": {why}.')
