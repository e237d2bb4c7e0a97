import errno

import pytest

from graftune.cli import ending
from graftune.errors import DataError, SettingsError, TrainingError


def end(error, capsys, **options):
    """Returns the exit code, stdout and stderr of a command that raises `error`."""

    def command(**_):
        raise error

    with pytest.raises(ending.typer.Exit) as ended:
        ending.ends_well(command)(**options)
    shown = capsys.readouterr()
    return ended.value.exit_code, shown.out, shown.err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (SettingsError("r is 0, expected 1 or more."), 2, "error: r is 0, expected 1 or more.\n"),
        (DataError("no rows."), 2, "error: no rows.\n"),
        (TrainingError("the loss is nan."), 1, "error: the loss is nan.\n"),
        (KeyboardInterrupt("Stopped; go on with X."), 130, "Stopped; go on with X.\n"),
        (KeyboardInterrupt(), 130, "Stopped.\n"),
        (OSError(errno.ENOSPC, "No space", "/x/y"), 1, 'error: the disk is full: "/x/y"; '),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 1, 'denied: "/x".\n'),
        (RuntimeError("CUDA out of memory.\nTried"), 1, "smaller --batch-size"),
        (KeyError("odd"), 1, "error: unexpected KeyError: 'odd' (--debug shows where).\n"),
    ],
)
def test_an_error_is_one_sentence_and_a_code(capsys, error, code, said):
    found, out, err = end(error, capsys)
    assert found == code
    assert out == ""
    assert said in err
    assert "Traceback" not in err
    assert len(err.splitlines()) == 1


def test_debug_shows_the_traceback(capsys):
    assert "Traceback" in end(DataError("no rows."), capsys, debug=True)[2]


def test_with_json_the_error_is_json_as_well(capsys):
    code, out, err = end(DataError("no rows."), capsys, as_json=True)
    assert code == 2
    assert ending.json.loads(out) == {
        "error": {"kind": "DataError", "message": "no rows.", "exit_code": 2}
    }
    assert err == "error: no rows.\n"


def test_a_closed_pipe_is_left_to_the_caller():
    def command():
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        ending.ends_well(command)()
