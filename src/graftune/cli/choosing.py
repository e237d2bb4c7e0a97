"""`--method auto`: a method is chosen before anything else is done, and why is said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from graftune import processes

if TYPE_CHECKING:
    from graftune.tasks.settings import RunSettings


def with_method(
    settings: RunSettings, memory: str | None, *, resume: bool
) -> tuple[RunSettings, tuple[str, ...]]:
    """Returns settings that name a method, and why it was chosen; () where the user named it.

    A run that is resumed keeps what it was begun with.

    Raises:
        SettingsError: nothing fits, or a memory is given and nothing is to be chosen.
    """
    from graftune.errors import SettingsError
    from graftune.tasks import workspace

    if settings.method_name.lower() != "auto":
        if memory is not None:
            raise SettingsError(
                f"--memory goes with --method auto; the method is {settings.method_name}. "
                "`graftune plan --fit` finds settings for a method."
            )
        return settings, ()
    if resume and settings.out and (settings.run_dir / workspace.SETTINGS).is_file():
        return workspace.read_settings(settings.run_dir), ()
    from graftune.planning.auto import chosen_for

    found = chosen_for(settings, memory)
    if resume and (found.settings.run_dir / workspace.SETTINGS).is_file():
        return workspace.read_settings(found.settings.run_dir), ()
    return found.settings, found.choice.reasons


def tell(reasons: Sequence[str], quiet: bool) -> None:
    """Says on standard error why a method was chosen."""
    import sys

    if not quiet and processes.is_first():
        for reason in reasons:
            print(reason, file=sys.stderr)
