"""Where an adapter lies: a local folder, or one fetched from the model hub."""

from __future__ import annotations

import re
from pathlib import Path

from graftune.errors import FormatError
from graftune.formats import directory
from graftune.formats.adapterhub.folder import FILES

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def located(path: str | Path) -> Path:
    """Returns the local folder of an adapter, fetching it if it is "owner/name" on the hub.

    Raises:
        FormatError: there is no such folder and it can't be fetched.
    """
    place = Path(path)
    if place.exists() or not _HUB_ID.fullmatch(str(path)):
        return place
    return _fetched(str(path))


def _fetched(name: str) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    files = [directory.CONFIG, directory.WEIGHTS, directory.PICKLE, directory.OWN, *FILES]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=files))
    except errors.RepositoryNotFoundError as error:
        raise FormatError(f'no folder "{name}" here and no such adapter on the hub.') from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        raise FormatError(
            f'no folder "{name}" here, and the hub can\'t be reached for it '
            f"({type(error).__name__}): fetch it while online, or give a local folder."
        ) from error
