"""What HF PEFT and we write of one method, and how the one becomes the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from graftune import adapter as adapters
from graftune.adapter import Planned
from graftune.anatomy.modules import is_in
from graftune.errors import FormatError, nearest
from graftune.formats.filling import fill, own_method
from graftune.formats.peft_common import NO_RULES, PREFIX, common_config, own_values, without_prefix
from graftune.formats.peft_settings import TASK_HEADS, names, saved_modules, targeted_modules
from graftune.sites.base import Graft, LinearPlace, base_modules

if TYPE_CHECKING:
    from graftune.adapter import Adapter
    from graftune.anatomy import Anatomy
    from graftune.formats.directory import Directory
    from graftune.methods.base import Method

_COMMON = {
    **NO_RULES,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "inference_mode": True,
    "peft_type": None,
    "peft_version": None,
    "revision": None,
    "task_type": None,
}


class PeftType:
    """One of HF PEFT's methods.

    A subclass says what its settings mean and what its tensors are called; whichever of PEFT's
    settings it doesn't list is refused by name, since a setting that is silently ignored gives
    silently wrong results.
    """

    name: ClassVar[str]
    """PEFT's `peft_type`."""
    method: ClassVar[str]
    """The name of our method."""
    also: ClassVar[tuple[str, ...]] = ()
    """Names of others of ours that compute the same."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """Settings that are followed, with what a config that lacks one means by it."""
    without_effect: ClassVar[tuple[str, ...]] = ()
    """Settings that don't change what trained weights compute."""
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Settings that are refused unless they have one of these values, beside None and False."""

    def obstacle(self, adapter: Adapter) -> str | None:
        """Returns why PEFT can't compute an adapter of this method, None where it can."""
        return None

    def settings(self, adapter: Adapter) -> dict[str, Any]:
        """Returns PEFT's settings of an adapter, without those that all its methods have."""
        raise NotImplementedError

    def method_of(
        self, config: Mapping[str, Any], modules: Sequence[str], heads: Sequence[str]
    ) -> Method:
        """Returns PEFT's settings as ours.

        Args:
            config: checked, every key filled in.
            modules: the modules that it means on this model, by whole name.
            heads: the modules that it saves whole.
        """
        raise NotImplementedError

    def kept(self, method: Method) -> Method:
        """Returns a method that plans what the file holds, where it isn't all that was trained."""
        return method

    def file_tensors(self, model: nn.Module, grafts: Sequence[Graft]) -> dict[str, Tensor]:
        """Returns the tensors of an adapter's own deltas under PEFT's names, heads left out."""
        raise NotImplementedError

    def own_tensors(
        self, model: nn.Module, grafts: Sequence[Graft], tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Returns a file's tensors under our names; a name that it doesn't know stays as it is.

        Args:
            model: the base.
            grafts: empty, of the places that the settings mean.
            tensors: by PEFT's names, without its prefix.
        """
        raise NotImplementedError

    def key(self, name: str) -> str:
        """Returns what a tensor of `tensors` is called in the file, PEFT's prefix with it."""
        return PREFIX + name

    def named(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns a file's tensors by the names that `key` was given."""
        return without_prefix(tensors)

    def modules(self, grafts: Sequence[Graft]) -> list[str]:
        """Returns the modules that an adapter changes, its own values left out."""
        found = [g.place.module for g in grafts if isinstance(g.place, LinearPlace)]
        return list(dict.fromkeys(found))

    def config(self, adapter: Adapter) -> dict[str, Any]:
        """Returns the content of adapter_config.json."""
        common = common_config(adapter, self.modules(adapter.grafts))
        return {**common, "peft_type": self.name, **self.settings(adapter)}

    def tensors(self, adapter: Adapter) -> dict[str, Tensor]:
        """Returns the tensors of an adapter's file, without PEFT's prefix."""
        heads = own_values(adapter, self.modules(adapter.grafts))
        return self.file_tensors(adapter.model, adapter.grafts) | heads

    def checked(self, config: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Returns a config with every known key filled in.

        Raises:
            FormatError: a setting is unknown, or not supported.
        """
        full = {**_COMMON, **self.defaults}
        known = {*full, *self.without_effect, *self.neutral}
        version = f"PEFT {config.get('peft_version') or 'of unknown version'}"
        for key, value in config.items():
            if value in (None, False, [], {}) or key in full or key in self.without_effect:
                continue
            if key not in self.neutral:
                raise FormatError(
                    f'{where}: setting "{key}" ({value!r:.60}), written by {version}, is unknown '
                    f"here.{nearest(key, known)}"
                )
            if value not in self.neutral[key]:
                raise FormatError(
                    f'{where}: setting "{key}" ({value!r:.60}), written by {version}, is not '
                    f"supported for {self.name}."
                )
        return full | {k: v for k, v in config.items() if k in full and v is not None}

    def load(
        self,
        model: nn.Module,
        found: Directory,
        tensors: Mapping[str, Tensor],
        where: str,
        name: str,
    ) -> Adapter:
        """Attaches an adapter from a directory of PEFT's, or of ours in PEFT's form.

        Raises:
            FormatError: settings or tensors can't be; the message names them.
            BaseMismatchError: it was made for another base.
        """
        config = self.checked(found.config, where)
        modules = base_modules(model)
        added = TASK_HEADS.get(str(config["task_type"]), ())
        config["modules_to_save"] = [*names(config["modules_to_save"]), *added]
        saved = saved_modules(config, modules)
        heads, method = tuple(saved), None
        if found.own is None:
            method = self.read(model, config, saved, where)
        else:
            method, heads = own_method(found), tuple(found.own.get("heads", ()))
        named = self.named(tensors)

        def plan(parts: Anatomy) -> Planned:
            grafts = self.kept(method).plan(model, parts, empty=True)
            grafts += adapters.head_grafts(model, heads, grafts, empty=True)
            given = self.own_tensors(model, grafts, named)
            fill(grafts, _without_repeats(model, given, grafts, saved), where, found)
            return Planned(method, grafts, heads)

        return adapters.attach_planned(model, method, name, plan)

    def read(
        self, model: nn.Module, config: Mapping[str, Any], heads: Sequence[str], where: str
    ) -> Method:
        """Returns the method that a config of PEFT's own means on a model.

        Args:
            model: the base.
            config: checked, every key filled in.
            heads: the modules that it saves whole.
            where: whose config.

        Raises:
            FormatError: it means nothing on this model, or something that can't be had here.
        """
        places = targeted_modules(config, base_modules(model))
        if not places:
            raise FormatError(
                f"{where}: its target_modules {config['target_modules']!r:.80} name no module of "
                "this model."
            )
        return self.method_of(config, places, heads)


def _without_repeats(
    model: nn.Module, given: dict[str, Tensor], grafts: Sequence[Graft], saved: Sequence[str]
) -> dict[str, Tensor]:
    """Returns tensors without buffers and second names of what is saved whole: the base's own."""
    wanted = {key for graft in grafts for key, _ in graft.tensors()}
    base = {**dict(model.named_buffers()), **dict(model.named_parameters(remove_duplicate=False))}
    return {
        name: tensor
        for name, tensor in given.items()
        if name in wanted or not (is_in(name, saved) and name in base)
    }
