"""`graftune plan`: memory, time and disk of a training before it is run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftune.cli.options import AsJson, Debug

if TYPE_CHECKING:
    from graftune.planning import Plan
    from graftune.planning.fitting import Fit
    from graftune.planning.measuring import Measured
    from graftune.planning.skeletons import Base

_BASE, _METHOD, _TRAINING, _ASK = "Base", "Method", "Training", "Question"


def plan(
    config: Annotated[
        Path | None,
        typer.Argument(help="Settings file (YAML), as for train; flags change what it says."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Base model as for train, or a config.json alone.", rich_help_panel=_BASE
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="As for train, or image-classification; else the base's own.",
            rich_help_panel=_BASE,
        ),
    ] = None,
    labels: Annotated[
        int | None, typer.Option(help="Outputs of a new head (2).", rich_help_panel=_BASE)
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="Method; `graftune methods` lists them.", rich_help_panel=_METHOD),
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", help="A method's setting, as method.r=16.", rich_help_panel=_METHOD),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Rows of a batch (8).", rich_help_panel=_TRAINING)
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            "--length", "--max-length", help="Tokens of a row (512).", rich_help_panel=_TRAINING
        ),
    ] = None,
    target_length: Annotated[
        int | None,
        typer.Option(help="Tokens of an encoder-decoder's answer (64).", rich_help_panel=_TRAINING),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Height and width of images.", rich_help_panel=_TRAINING)
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16.", rich_help_panel=_TRAINING),
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(help="int8, nf4 or fp4.", rich_help_panel=_TRAINING)
    ] = None,
    double_quant: Annotated[
        bool | None,
        typer.Option(
            "--double-quant", help="Scales too, of nf4 or fp4.", rich_help_panel=_TRAINING
        ),
    ] = None,
    loss_chunk: Annotated[
        int | None,
        typer.Option(help="Tokens of logits computed at once.", rich_help_panel=_TRAINING),
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(help="By transformers' name, as adafactor.", rich_help_panel=_TRAINING),
    ] = None,
    accumulation: Annotated[
        int | None, typer.Option(help="Batches of one step (1).", rich_help_panel=_TRAINING)
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--gradient-checkpointing",
            help="Compute activations twice.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    offload: Annotated[
        str | None,
        typer.Option(
            help="optimizer, activations, parameters; several with commas.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="cpu or cuda, here or not; else what is here.", rich_help_panel=_ASK),
    ] = None,
    fit: Annotated[
        str | None,
        typer.Option(help="Find the settings that fit, as 8GiB or 24GB.", rich_help_panel=_ASK),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Training rows, for the file of --out.", rich_help_panel=_ASK),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Write the settings as a file for train.", rich_help_panel=_ASK),
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Also train a few steps and compare.", rich_help_panel=_ASK),
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Tell what a training needs before it is run.

    Memory by part, time, disk: one step of the model with the method is run on tensors that have
    shapes alone, so no weights are loaded and no GPU is needed.

    \b
    Examples:
      graftune plan --base demo:minilm --method lora --batch-size 32 --length 128
      graftune plan --base ./llama/config.json --set method.r=16 --device cuda --fit 24GB
      graftune plan --base ./model --fit 8GiB --data mail.csv --out run.yaml
      graftune plan run.yaml --check
    """
    from graftune.planning.asking import ask

    given = {
        "batch_size": batch_size, "length": length, "target_length": target_length,
        "image_size": image_size, "labels": labels, "precision": precision, "quantize": quantize,
        "double_quant": double_quant, "optimizer": optimizer, "accumulation": accumulation,
        "gradient_checkpointing": gradient_checkpointing, "offload": offload, "device": device,
        "loss_chunk": loss_chunk,
    }  # fmt: skip
    flags = {"base": base, "task": task, "method": method, "data": data}
    answer = ask(config, flags, change or [], given, budget=fit, out=out)
    measured = _checked(answer.plan, answer.base) if check else None
    if as_json:
        _print_json(answer.plan, answer.fit, measured, out)
        return
    _show(answer.plan, answer.fit, measured)
    if out is not None:
        print(f"\nnext  graftune train {out}")


def _checked(plan: Plan, base: Base) -> Measured:
    from graftune.planning.measuring import measure

    return measure(plan, base.config)


def _print_json(plan: Plan, fit: Fit | None, measured: Measured | None, out: Path | None) -> None:
    from dataclasses import asdict

    from graftune.cli import screen

    found: dict[str, Any] = plan.to_dict()
    if fit is not None:
        found["fit"] = {key: value for key, value in fit.to_dict().items() if key != "plan"}
    if measured is not None:
        found["measured"] = asdict(measured)
    if out is not None:
        found["out"] = str(out)
    screen.print_json(found)


def _show(plan: Plan, fit: Fit | None, measured: Measured | None) -> None:
    from graftune.cli import screen
    from graftune.compare.report import words

    total = plan.peak_bytes or 1
    rows = [
        [part, _gib(size), f"{size / total:.0%}", _gib(plan.host_parts[part])]
        for part, size in plan.parts.items()
        if size or plan.host_parts[part]
    ]
    rows.append(["peak", _gib(plan.peak_bytes), "100%", _gib(plan.host_bytes)])
    columns = [f"memory ({plan.settings.device})", "device", "share", "host"]
    screen.print_table(columns, rows, title=f"{plan.model}, {plan.method.name}")
    time = words.moment(plan.seconds_per_step)
    pairs = [
        ("settings", _settings(plan)),
        ("trained", f"{words.number(plan.trained_parameters)} parameters of "
                    f"{words.number(plan.base_parameters)}, in {plan.adapter_dtype}"),
        ("step", f"{plan.flops / 1e12:.3g} TFLOP, about {time}" if plan.seconds_per_step
                 else f"{plan.flops / 1e12:.3g} TFLOP"),
        ("disk", f"adapter {words.size(plan.adapter_disk_bytes)}, checkpoint "
                 f"{words.size(plan.checkpoint_disk_bytes)}, base "
                 f"{words.size(plan.base_disk_bytes)}"),
    ]  # fmt: skip
    if fit is not None:
        changed = ", ".join(fit.changes) or "nothing, it fits as it is"
        pairs.append(("fits", f"{_gib(fit.budget_bytes)}; changed: {changed} ({fit.tried} tried)"))
    if measured is not None:
        off = plan.rise_bytes / max(measured.rise_bytes, 1) - 1
        pairs.append(
            ("check", f"above the loaded model: planned {_gib(plan.rise_bytes)}, measured "
                      f"{_gib(measured.rise_bytes)} ({off:+.0%}); a step took "
                      f"{words.moment(measured.seconds_per_step)}")
        )  # fmt: skip
    print()
    screen.print_pairs(pairs)


def _settings(plan: Plan) -> str:
    chosen = plan.settings
    said = [f"batch {chosen.batch_size} × {chosen.accumulation}", f"{chosen.length} tokens"]
    said += [chosen.precision, chosen.optimizer]
    if chosen.quantize:
        said.append(f"{chosen.quantize} twice" if chosen.double_quant else chosen.quantize)
    said += ["gradient checkpointing"] * chosen.gradient_checkpointing
    said += [f"logits of {chosen.loss_chunk} tokens at once"] * bool(chosen.loss_chunk)
    return ", ".join([*said, *(f"{word} on the host" for word in chosen.offload)])


def _gib(size: int) -> str:
    """Returns bytes in binary units, as memory is sold."""
    if not size:
        return "–"
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
