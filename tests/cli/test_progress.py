import io

from rich.console import Console

from graftune.cli.progress import Lines, Live, watcher
from graftune.tasks.result import Silent
from tests.compare.results import result

PLAN = {
    "method": "LoRA", "base": "demo:minilm", "train_rows": 944, "total_steps": 200,
    "parameters": {"trainable": 301071, "share": 0.0133},
}  # fmt: skip


def state(step):
    return {
        "step": step, "total": 200, "loss": 1 / step, "lr": 1e-3, "seconds_left": 200 - step,
        "peak_memory_bytes": 8e8,
    }  # fmt: skip


def watch(one):
    one.on_note("Found the columns text and label.")
    one.on_start(PLAN)
    for step in range(1, 201):
        one.on_step(state(step))
    one.on_eval({"step": 200, "epoch": 1.0, "eval_loss": 0.5, "eval_accuracy": 0.9})
    one.on_end(result())


def test_without_a_terminal_a_run_is_a_few_plain_lines(capsys):
    watch(Lines())
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    assert shown.out == ""
    assert lines[0] == "Found the columns text and label."
    assert lines[1] == (
        "LoRA on demo:minilm, 301,071 parameters (1.3 % of the base): 944 rows, 200 steps"
    )
    assert lines[2] == "step 20/200  loss 0.0500  rate 1.0e-03  left 3 min 0 s  peak 800 MB"
    assert lines[-1] == "step 200: validation loss 0.5, accuracy 90.0 %"
    assert len(lines) == 13


def test_on_a_terminal_loss_rate_time_and_memory_are_drawn():
    screen = io.StringIO()
    live = Live()
    live._console = Console(file=screen, force_terminal=True, width=160, highlight=False)
    watch(live)
    drawn = screen.getvalue()
    for said in ("200/200", "loss 0.0050", "rate 1.0e-03", "peak 800 MB", "accuracy 90.0 %"):
        assert said in drawn


def test_markup_in_names_is_shown_as_it_is():
    screen = io.StringIO()
    live = Live()
    live._console = Console(file=screen, force_terminal=True, width=160, highlight=False)
    live.on_note("the column [bold] is odd")
    assert "[bold]" in screen.getvalue()


def test_quiet_shows_nothing(capsys):
    assert isinstance(watcher(quiet=True), Silent)
    watch(watcher(quiet=True))
    assert capsys.readouterr().err == ""
