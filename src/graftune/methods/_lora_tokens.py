"""Rows of an embedding that are trained for chosen tokens, in it and in whatever is tied to it."""

from __future__ import annotations

import torch
from torch import nn

from graftune.anatomy import Anatomy
from graftune.errors import SettingsError, nearest
from graftune.methods import _low_rank as low_rank
from graftune.sites import hosts
from graftune.sites.base import Graft, LinearPlace


def token_embedding(model: nn.Module, module: str) -> tuple[str, nn.Embedding]:
    """Returns the embedding that a whole name or the end of one means, and its path.

    Raises:
        SettingsError: if it means none or several.
    """
    known = {n: m for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    found = [n for n in known if n == module or n.endswith(f".{module}")]
    if len(found) != 1:
        raise SettingsError(
            f'LoRA: trainable_tokens names "{module}", which means {len(found) or "no"} '
            f"embedding{'s' if len(found) > 1 else ''}; there are {', '.join(known) or 'none'}."
            f"{nearest(module, known)}"
        )
    return found[0], known[found[0]]


def token_grafts(
    model: nn.Module, anatomy: Anatomy, module: str, ids: tuple[int, ...]
) -> list[Graft]:
    """Returns the grafts of rows of their own for tokens, in an embedding and what is tied to it.

    Raises:
        SettingsError: if the module is no embedding, or an id isn't in it.
    """
    path, host = token_embedding(model, module)
    wrong = [i for i in ids if not 0 <= i < host.num_embeddings]
    if wrong or len(set(ids)) != len(ids) or not ids:
        raise SettingsError(
            f"LoRA: trainable_tokens needs different ids from 0 to {host.num_embeddings - 1}, "
            f"found {wrong or list(ids)}."
        )
    at = torch.tensor(ids, device=host.weight.device)
    options = hosts.delta_options(host)
    rows = host.weight.detach()[at].to(**options, copy=True)  # type: ignore[call-overload]
    delta = low_rank.TokenRows(at, rows)
    grafts = [Graft(LinearPlace(path, "tokens"), delta)]
    for name, module_ in model.named_modules():
        tied = isinstance(module_, nn.Embedding) and module_.weight is host.weight
        if tied and name != path:
            grafts.append(Graft(LinearPlace(name, "tokens"), low_rank.TokenTwin(delta)))
    output = anatomy.output_embeddings
    if output is not None and model.get_submodule(output).weight is host.weight:
        grafts.append(Graft(LinearPlace(output, "tokens"), low_rank.TokenColumns(delta)))
    return grafts
