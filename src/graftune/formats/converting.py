"""One adapter in the form of another program."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from graftune.errors import FormatError, SettingsError, nearest
from graftune.formats import peft_types, saving
from graftune.formats.adapterhub import writing as adapterhub

if TYPE_CHECKING:
    from graftune.adapter import Adapter

FORMS = ("own", "peft", "adapterhub")
"""Ours, which is HF PEFT's wherever PEFT has the method; PEFT's or nothing; AdapterHub's."""


def write(adapter: Adapter, path: str | Path, form: str) -> Path:
    """Writes an adapter's directory in one of `FORMS` and returns its path.

    Args:
        adapter: any that can be saved.
        path: a new or empty folder.
        form: whose.

    Raises:
        SettingsError: there is no such form.
        FormatError: the other program can't compute the adapter, with the reason; or the path is
            in use or can't be written.
    """
    if form not in FORMS:
        raise SettingsError(
            f'form is "{form}", expected one of {", ".join(FORMS)}.{nearest(form, FORMS)}'
        )
    target = Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FormatError(f'"{path}" exists and is not empty; name a new folder.')
    if form == "adapterhub":
        return adapterhub.save(adapter, target)
    if form == "peft" and peft_types.writer(adapter) is None:
        why = peft_types.obstacle(adapter)
        raise FormatError(f'Adapter "{adapter.name}" in HF PEFT\'s form: {why}.')
    return saving.save(adapter, target)
