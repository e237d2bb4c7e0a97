"""The hidden-prompt site: virtual tokens behind the embedding layer, where the blocks begin.

    ids, pixels ──[embeddings]── [E_1 ; P ; E_2 ..] ── blocks ── [h_1 ; h_P ; h_2 ..] ──── h

So images have them too (VPT, shallow), and text that gets them here gives them no position and no
norm, as AdapterHub's prompts have none. Real tokens stay as the embedding layer made them. Where
blocks add biases to their scores by place (BEiT), those of virtual tokens are 0.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn

from graftune.anatomy import Anatomy, Stack, table
from graftune.anatomy.modules import leaf, parent
from graftune.errors import AdapterError, SettingsError
from graftune.sites import masks
from graftune.sites.base import Graft, HiddenPlace, Site, base_modules
from graftune.sites.embedding import EmbeddingSite, check_mask, shorter
from graftune.sites.kept import thread_id

_BIASES = re.compile("(relative|shared)_position_bias")


class HiddenPromptSite(EmbeddingSite):
    """Deltas among what the embedding layer of one body answers."""

    def hook(self, host: nn.Module) -> None:
        """Registers `before` and `after`."""
        self.arguments = tuple(inspect.signature(host.forward).parameters)
        self.handles = [
            host.register_forward_pre_hook(self.before, with_kwargs=True),
            host.register_forward_hook(self.after),
        ]

    _watches: bool = False
    """Whether `weave` is registered, and `narrow` and `widen`."""

    def take(self, model: nn.Module, name: str, graft: Graft) -> None:
        """See `Site.take`: also puts its virtual tokens into what the embedding layer answers."""
        assert isinstance(graft.place, HiddenPlace)
        Site.take(self, model, name, graft)
        if self._watches:
            return
        self._watches = True
        layer = model.get_submodule(graft.place.embeddings)
        self.handles.append(layer.register_forward_hook(self.weave))
        host = model.get_submodule(graft.place.module)
        for path, module in base_modules(host).items():
            if _BIASES.fullmatch(leaf(path)):
                self.handles += [
                    module.register_forward_pre_hook(self.narrow, with_kwargs=True),
                    module.register_forward_hook(self.widen),
                ]

    def before(self, host: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Lets the mask cover the virtual tokens. A forward pre-hook of the body."""
        self.kept.pop(("woven", thread_id()), None)
        if not self._acts_now():
            return None
        given = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        first = next(value for value in given.values() if isinstance(value, Tensor))
        woven = self._woven(len(first), first.device)
        if woven is None:
            return None
        if woven.lengths is not None:
            raise AdapterError("Virtual tokens behind the embedding layer are as many in each row.")
        mask = given.get("attention_mask")
        check_mask(mask)
        at = woven.at(mask, len(first), first.device)
        self.kept["woven", thread_id()] = (woven, at, None)
        if mask is not None:
            given["attention_mask"] = woven.mask(mask, at)
            masks.woven(mask, given["attention_mask"])
        return (), given

    def weave(self, layer: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """Puts the virtual tokens among the embedded ones. A hook of the embedding layer."""
        found = self.kept.get(("woven", thread_id()))
        if found is None or found[2] is not None:
            return None
        woven, at, _ = found
        self.kept["woven", thread_id()] = (woven, at, output.shape[1])
        return woven.into(woven.prompt, output, at)

    def narrow(self, biases: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Tells what makes biases by place of the real tokens alone. A forward pre-hook of it."""
        found = self.kept.get(("woven", thread_id()))
        if found is None or "dim_size" not in kwargs:
            return None
        return args, {**kwargs, "dim_size": kwargs["dim_size"] - found[0].most}

    def widen(self, biases: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """Gives virtual tokens biases of 0 in `(1, heads, n, n)`. A forward hook."""
        found = self.kept.get(("woven", thread_id()))
        if found is None:
            return None
        at, most = int(found[0].is_after_first), found[0].most
        for side in (2, 3):
            shape = list(output.shape)
            shape[side] = most
            before, rest = (
                output.narrow(side, 0, at),
                output.narrow(side, at, output.shape[side] - at),
            )
            output = torch.cat([before, output.new_zeros(shape), rest], dim=side)
        return output

    def after(self, host: nn.Module, args: Any, output: Any) -> Any:
        """Takes the virtual tokens out again, unless heads are to read them. A forward hook."""
        found = self.kept.pop(("woven", thread_id()), None)
        if found is None:
            return None
        woven, at, length = found
        return None if self._keeps() else shorter(host, output, woven, at, length, pools=True)


def hidden_entrance(method: str, model: nn.Module, anatomy: Anatomy, stack: Stack) -> HiddenPlace:
    """Returns the body whose embedding layer virtual tokens come behind, and that layer.

    Args:
        method: whose errors they are.
        model: the base.
        anatomy: what it is made of.
        stack: that of the body.

    Raises:
        SettingsError: the model's isn't known to take them.
    """
    if anatomy.model_type not in table.HIDDEN_PROMPTS:
        raise SettingsError(
            f"{method}: virtual tokens behind the embedding layer are known to fit models of type "
            f"{', '.join(table.HIDDEN_PROMPTS)}, found {anatomy.model_type}."
        )
    path = stack.blocks[0].path
    while path and "embeddings" not in model.get_submodule(path := parent(path))._modules:
        pass
    has_norm = "pre_layrnorm" in model.get_submodule(path)._modules  # CLIP's, before its blocks
    last = "pre_layrnorm" if has_norm else "embeddings"
    return HiddenPlace(path, f"{path}.{last}" if path else last)
