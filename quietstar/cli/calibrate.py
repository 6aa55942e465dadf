"""``quietstar calibrate``: the threshold of a gate for a wanted speed or quality."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from quietstar.cli import options
from quietstar.cli.options import Parser
from quietstar.config import DataConfig
from quietstar.config.loading import load_config
from quietstar.data import Batch, build_data, load_tokenizer
from quietstar.errors import UserError, visible
from quietstar.evaluation.calibration import (
    GateResult,
    Measured,
    fit_probes,
    measure_tokens,
    score_tokens,
    stream_seconds,
    threshold_at,
    try_gate,
)
from quietstar.generation.gates import GATE_FILE, Gate, GateKind, Probe
from quietstar.training.checkpoint import CONFIG_FILE

KINDS: tuple[GateKind, ...] = ("entropy", "weight", "gain")
TABLE_FRACTIONS = (0.02, 0.05, 0.1, 0.25, 0.5)
"""Fractions of the tokens that think, for the five thresholds of the table."""
TRIED = 200
"""Thresholds among which the best is searched."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, save the gate beside the model.

    Raises:
        UserError: An option, the model or the text is wrong.
    """
    args = _parser().read(arguments)
    if args.speed is not None and args.quality is not None:
        raise UserError("--speed: does not go with --quality; leave one out")
    model = options.load_model(args, True, "Give the folder of a saved one.")
    if model.max_text_length is not None:
        args.seq_len = min(args.seq_len, model.max_text_length)
    batches = _held_out(args)
    bar = track(range(len(batches)), "thinking", console=Console(stderr=True), transient=True)
    steps = iter(bar)
    measured = measure_tokens(model, batches, lambda: next(steps, None))
    fitted = measured.where(measured.text % 2 == 0)
    tried = measured.where(measured.text % 2 == 1)
    if len(fitted.text) < 100 or len(tried.text) < 100:
        raise UserError(
            f"--data: {len(measured.text)} tokens of {len(batches)} batches are too few to fit a "
            "gate; give more --sequences"
        )
    probes = fit_probes(fitted)
    length = model.thoughts.length
    texts: list[torch.Tensor] = []  # (1, seq) each, decoded one after the other to measure speed
    for batch in batches:
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
            left = args.timed_tokens - sum(text.shape[1] for text in texts)
            text = ids[mask.bool()][: max(left, 0)]
            if len(text) > 2:
                texts.append(text[None].to(model.device))
    rows = _ends(tried, length) + [
        row for kind in KINDS for row in _sweep(kind, tried, probes, length)
    ]
    weights = [text.shape[1] for text in texts]
    seconds = []  # per token
    for row in [rows[0], *rows]:  # the first warms up
        times = [stream_seconds(model, text, row.gate) for text in texts]
        seconds.append(sum(t * w for t, w in zip(times, weights, strict=True)) / sum(weights))
    chosen = _choose(args, tried, probes, length)
    Console().print(_table(rows, seconds[1:]))
    _report(args, rows, seconds[1:], chosen)
    return 0


def _held_out(args: argparse.Namespace) -> list[Batch]:
    """Return texts of ``--data``, or the held-out ones of the run that the model is from."""
    tokenizer = load_tokenizer(args.model, trust_remote_code=False)
    seed = 0
    if args.data is not None:
        if not args.data:
            raise UserError("--data: names nothing; give a file or a data set of the hub")
        data = DataConfig(train=args.data, eval_fraction=0.5, seq_len=args.seq_len)
    else:
        path = Path(args.model).resolve().parent / CONFIG_FILE
        if not path.exists():
            raise UserError(f"--data: is not given, and there is no {path}; give held-out text")
        stage = list(load_config(str(path), []).stage_configs().values())[-1]
        data, seed = stage.data, stage.training.seed
    data = data.model_copy(update={"eval_sequences": args.sequences})
    _, held, _ = build_data(data, tokenizer, seed)
    return list(held.batches(args.batch_size))


def _ends(measured: Measured, length: int) -> list[GateResult]:
    """Return the gates that always and never think."""
    nothing = torch.zeros_like(measured.entropy)
    return [
        try_gate(Gate("always", -1.0), measured, nothing, length),
        try_gate(Gate("never", 1.0), measured, nothing, length),
    ]


def _sweep(
    kind: GateKind,
    measured: Measured,
    probes: dict[str, Probe],
    length: int,
    fractions: Sequence[float] = TABLE_FRACTIONS,
) -> list[GateResult]:
    """Return what a kind of gate gives where these fractions of the tokens think."""
    scores = score_tokens(kind, measured, probes)
    gates = [Gate(kind, threshold_at(scores, fraction), probes) for fraction in fractions]
    return [try_gate(gate, measured, scores, length) for gate in gates]


def _choose(
    args: argparse.Namespace, measured: Measured, probes: dict[str, Probe], length: int
) -> GateResult:
    """Return the gate that loses least of those fast enough for ``--speed``.

    Without ``--speed``: the fastest of those that lose little enough for ``--quality``.
    """
    fractions = [step / TRIED for step in range(TRIED + 1)]
    kinds = KINDS if args.gate == "best" else (args.gate,)
    settings = [row for kind in kinds for row in _sweep(kind, measured, probes, length, fractions)]
    always = _ends(measured, length)[0]

    def lost(row: GateResult) -> float:
        if always.accuracy is not None and row.accuracy is not None:
            return always.accuracy - row.accuracy
        return row.nll - always.nll

    if args.speed is not None:
        fast = [row for row in settings if always.passes / row.passes >= args.speed]
        if not fast:
            raise UserError(
                f"--speed ({args.speed:g}): is out of reach: with thoughts of {length} tokens a "
                f"model that never thinks is {always.passes:.0f} times faster; set it lower"
            )
        return min(fast, key=lambda row: (lost(row), row.passes))
    allowed = 0.01 if args.quality is None else args.quality
    return min((r for r in settings if lost(r) <= allowed), key=lambda r: (r.passes, lost(r)))


def _table(rows: Sequence[GateResult], seconds: Sequence[float]) -> Table:
    """Return speed against quality."""
    table = Table(title="gates on held-out text", title_justify="left", box=box.SIMPLE_HEAD)
    has_answers = rows[0].accuracy is not None
    headings = ("threshold", "thinking", "NLL", *(("accuracy",) if has_answers else ()),
                "tokens/s", "speed-up")  # fmt: skip
    table.add_column("gate")
    for heading in headings:
        table.add_column(heading, justify="right")
    for row, second in zip(rows, seconds, strict=True):
        plain = row.gate.kind in ("always", "never")
        cells = [
            "" if plain else f"{row.gate.threshold:.4f}",
            f"{row.think_fraction:.1%}",
            f"{row.nll:.4f}",
        ]
        cells += [f"{row.accuracy:.3f}"] if row.accuracy is not None else []
        cells += [f"{1 / second:.1f}", f"{seconds[0] / second:.2f}"]
        table.add_row(row.gate.kind, *cells)
    return table


def _report(
    args: argparse.Namespace,
    rows: Sequence[GateResult],
    seconds: Sequence[float],
    chosen: GateResult,
) -> None:
    """Save the chosen gate, and write what was measured."""
    console = Console(highlight=False)

    def say(line: str) -> None:
        console.print(Text(visible(line)), soft_wrap=True)

    def figures_of(row: GateResult) -> dict[str, Any]:
        return {"share": row.think_fraction, "nll": row.nll, "accuracy": row.accuracy,
                "passes_a_token": row.passes}  # fmt: skip

    chosen.gate.save(args.model, **figures_of(chosen))
    accuracy = "" if chosen.accuracy is None else f", accuracy {chosen.accuracy:.3f}"
    say(
        f"chosen: {chosen.gate.kind} above {chosen.gate.threshold:.4f}: "
        f"{chosen.think_fraction:.1%} of the tokens think, "
        f"{rows[0].passes / chosen.passes:.2f} times fewer passes, NLL {chosen.nll:.4f}{accuracy}; "
        f"saved in {Path(args.model) / GATE_FILE}"
    )
    if chosen.think_fraction == 0:
        say(
            "note: it never thinks: on these texts thoughts gain less than --quality allows to "
            "lose; set it lower, or --speed"
        )
    figures = [
        {"gate": row.gate.kind, "threshold": row.gate.threshold, **figures_of(row),
         "tokens_per_second": 1 / second}
        for row, second in zip(rows, seconds, strict=True)
    ]  # fmt: skip
    gate = {"gate": chosen.gate.kind, "threshold": chosen.gate.threshold, **figures_of(chosen)}
    if args.json is not None:
        result = {"rows": figures, "chosen": gate}
        options.write_text(args.json, json.dumps(result, indent=2) + "\n")
    if args.plot is not None:
        from quietstar.reports.evaluation import write_gates

        say(f"plot: {write_gates(args.plot, figures, gate)}")


def _parser() -> Parser:
    parser = Parser(
        "quietstar calibrate",
        "Finds where thinking pays on held-out text, and saves a gate beside the model\n"
        "(quietstar generate --gate calibrated).",
    )
    options.add_model(parser)
    add = parser.add_argument
    add("--data", metavar="FILE", help="held-out text; default: that of the run of the model")
    add("--gate", choices=(*KINDS, "best"), default="best", help="kind of score")
    add("--speed", type=options.number(1.0, above=True), metavar="X",
        help="lose least among gates with X times fewer passes than thinking always")  # fmt: skip
    add("--quality", type=options.number(), metavar="LOSS",
        help="be fastest among gates that lose at most this accuracy (or nats); "
        "default: 0.01")  # fmt: skip
    add(
        "--seq-len",
        type=options.whole(2),
        default=128,
        metavar="N",
        help="length of texts of --data",
    )
    add("--sequences", type=options.whole(2), default=64, metavar="N",
        help="texts; half fit the probes, half try the gates")  # fmt: skip
    add("--batch-size", type=options.COUNT, default=8, metavar="N", help="texts at once")
    add("--timed-tokens", type=options.whole(3), default=64, metavar="N",
        help="tokens decoded with each gate to measure speed")  # fmt: skip
    add("--json", type=options.output_file(), metavar="FILE", help="all figures")
    add("--plot", type=options.output_file(), metavar="FILE.html", help="speed against quality")
    return parser
