"""How every command ends: one sentence and an exit code for what went wrong, no traceback."""

from __future__ import annotations

import errno
import functools
import json
import sys
import traceback
from collections.abc import Callable
from typing import Any

import typer

from graftune import processes
from graftune.errors import GraftuneError, TrainingError

RUN_FAILED = 1
WRONG_SETTINGS = 2
INTERRUPTED = 130
LOST = ("Connection closed by peer", "Connection reset by peer", "NCCL", "Broken pipe")
"""What collectives say once a process is gone."""


def ends_well(command: Callable[..., None]) -> Callable[..., None]:
    """Returns the command with its errors turned into a sentence on stderr and an exit code.

    With `debug=True` the traceback is shown as well, with `as_json=True` the error is printed as
    JSON on standard output too.
    """

    @functools.wraps(command)
    def run(**options: Any) -> None:
        try:
            command(**options)
        except typer.Exit:
            raise
        except KeyboardInterrupt as stopped:
            message = str(stopped) or "Stopped."
            raise _end(stopped, message, INTERRUPTED, options) from None
        except GraftuneError as error:
            code = RUN_FAILED if isinstance(error, TrainingError) else WRONG_SETTINGS
            raise _end(error, str(error), code, options) from None
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            raise _end(error, _os_sentence(error), RUN_FAILED, options) from None
        except Exception as error:
            raise _end(error, _bug_sentence(error), RUN_FAILED, options) from None

    return run


def _end(error: BaseException, message: str, code: int, options: dict[str, Any]) -> typer.Exit:
    if not processes.is_first_to_fail():
        return typer.Exit(code)
    if options.get("debug"):
        traceback.print_exception(error)
    if processes.rank():
        message = f"process {processes.rank()} of {processes.count()}: {message}"
    if options.get("as_json"):
        kind = type(error).__name__
        print(json.dumps({"error": {"kind": kind, "message": message, "exit_code": code}}))
    print(message if code == INTERRUPTED else f"error: {message}", file=sys.stderr)
    return typer.Exit(code)


def _os_sentence(error: OSError) -> str:
    where = f': "{error.filename}"' if error.filename else ""
    if error.errno == errno.ENOSPC:
        return f"the disk is full{where}; nothing that was written before is damaged."
    return f"{error.strerror or error}{where}."


def _bug_sentence(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no message"
    if isinstance(error, MemoryError) or "out of memory" in text.lower():
        return f"out of memory ({text}); try a smaller --batch-size or --max-length."
    if processes.count() > 1 and any(word in text for word in LOST):
        return (
            "another process of this run ended, and its own message, if it had time for one, says "
            "why; go on from the last checkpoint with --resume."
        )
    return f"unexpected {type(error).__name__}: {text} (--debug shows where)."
