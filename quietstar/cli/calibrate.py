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

from quietstar.cli.devices import device_option, find_device
from quietstar.config import DataConfig
from quietstar.config.loading import load_config
from quietstar.data import Batch, build_data, load_tokenizer
from quietstar.errors import UserError
from quietstar.evaluation.loading import load_thinker
from quietstar.generation.calibration import (
    Measured,
    Setting,
    fit_probes,
    measure,
    score_tokens,
    stream_seconds,
    threshold_at,
    try_gate,
)
from quietstar.generation.gates import GATE_FILE, Gate, GateKind, Probe
from quietstar.model.quiet_star import QuietStarForCausalLM
from quietstar.training.folder import CONFIG_FILE
from quietstar.training.setup import quiet_libraries

KINDS: tuple[GateKind, ...] = ("entropy", "weight", "gain")
SHOWN_SHARES = (0.02, 0.05, 0.1, 0.25, 0.5)
"""Of the tokens that think, for the five thresholds of the table."""
TRIED = 200
"""Thresholds among which the best is looked for."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, save the gate beside the model.

    Raises:
        UserError: A wrong argument, or no such model or text.
    """
    args = _parser().parse_args(arguments)
    quiet_libraries()
    check(args)
    model = load_thinker(args.model, True, args.dtype, "Give the folder of a saved one.")
    model.to(find_device(args.device))
    if model.max_text_length is not None:
        args.seq_len = min(args.seq_len, model.max_text_length)
    batches = held_out(args)
    shown = track(range(len(batches)), "thinking", console=Console(stderr=True), transient=True)
    steps = iter(shown)
    measured = measure(model, batches, lambda: next(steps, None))
    fitted = measured.where(measured.text % 2 == 0)
    tried = measured.where(measured.text % 2 == 1)
    if len(fitted.text) < 100 or len(tried.text) < 100:
        raise UserError(
            f"--data: {len(measured.text)} tokens of {len(batches)} batches are too few to fit a "
            "gate; give more --sequences"
        )
    probes = fit_probes(fitted)
    length = model.thoughts.length
    texts = stream_texts(batches, args.timed_tokens, model)
    rows = ends(tried, length) + [
        row for kind in KINDS for row in sweep(kind, tried, probes, length)
    ]
    seconds = [mean_seconds(model, texts, row.gate) for row in [rows[0], *rows]][1:]
    chosen = choose(args, tried, probes, length)
    Console().print(table(rows, seconds))
    report(args, rows, seconds, chosen)
    return 0


def check(args: argparse.Namespace) -> None:
    """Refuse wishes that cannot be.

    Raises:
        UserError: They are.
    """
    if args.speed is not None and args.speed <= 1:
        raise UserError(f"--speed: {args.speed} must be above 1: so many times faster than always")
    if args.quality is not None and args.quality < 0:
        raise UserError(f"--quality: {args.quality} must be 0 or more: how much may be lost")
    if args.speed is not None and args.quality is not None:
        raise UserError("--speed: does not go with --quality; leave one out")


def held_out(args: argparse.Namespace) -> list[Batch]:
    """Texts of ``--data``, or the held-out ones of the run that the model is from.

    Raises:
        UserError: There are none.
    """
    tokenizer = load_tokenizer(args.model)
    seed = 0
    if args.data is not None:
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


def mean_seconds(model: QuietStarForCausalLM, texts: Sequence[torch.Tensor], gate: Gate) -> float:
    """Seconds a token over texts that are decoded one after the other."""
    weights = [text.shape[1] for text in texts]
    times = [stream_seconds(model, text, gate) for text in texts]
    return sum(t * w for t, w in zip(times, weights, strict=True)) / sum(weights)


def stream_texts(
    batches: Sequence[Batch], tokens: int, model: QuietStarForCausalLM
) -> list[torch.Tensor]:
    """Texts of so many tokens together, (1, seq) each, that are decoded to measure speed."""
    texts = []
    for batch in batches:
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
            left = tokens - sum(text.shape[1] for text in texts)
            text = ids[mask.bool()][: max(left, 0)]
            if len(text) > 2:
                texts.append(text[None].to(model.device))
    return texts


def ends(measured: Measured, length: int) -> list[Setting]:
    """Always and never."""
    nothing = torch.zeros_like(measured.entropy)
    return [
        try_gate(Gate("always", -1.0), measured, nothing, length),
        try_gate(Gate("never", 1.0), measured, nothing, length),
    ]


def sweep(
    kind: GateKind,
    measured: Measured,
    probes: dict[str, Probe],
    length: int,
    shares: Sequence[float] = SHOWN_SHARES,
) -> list[Setting]:
    """What a gate gives where so many tokens think."""
    scores = score_tokens(kind, measured, probes)
    gates = [Gate(kind, threshold_at(scores, share), probes) for share in shares]
    return [try_gate(gate, measured, scores, length) for gate in gates]


def choose(
    args: argparse.Namespace, measured: Measured, probes: dict[str, Probe], length: int
) -> Setting:
    """The best gate for the wish.

    Of those fast enough the one that loses least, or the fastest of those that lose little enough.
    """
    shares = [step / TRIED for step in range(TRIED + 1)]
    kinds = KINDS if args.gate == "best" else (args.gate,)
    settings = [row for kind in kinds for row in sweep(kind, measured, probes, length, shares)]
    always = ends(measured, length)[0]

    def lost(row: Setting) -> float:
        if always.accuracy is not None and row.accuracy is not None:
            return always.accuracy - row.accuracy
        return row.nll - always.nll

    if args.speed is not None:
        fast = [row for row in settings if always.passes / row.passes >= args.speed]
        if not fast:
            raise UserError(
                f"--speed: {args.speed} cannot be: with thoughts of {length} tokens a model that "
                f"never thinks is {always.passes:.0f} times faster; set it lower"
            )
        return min(fast, key=lambda row: (lost(row), row.passes))
    allowed = 0.01 if args.quality is None else args.quality
    return min((r for r in settings if lost(r) <= allowed), key=lambda r: (r.passes, lost(r)))


def table(rows: Sequence[Setting], seconds: Sequence[float]) -> Table:
    """Speed against quality."""
    shown = Table(title="gates on held-out text", title_justify="left", box=box.SIMPLE_HEAD)
    has_answers = rows[0].accuracy is not None
    headings = ("threshold", "thinking", "NLL", *(("accuracy",) if has_answers else ()),
                "tokens/s", "speed-up")  # fmt: skip
    shown.add_column("gate")
    for heading in headings:
        shown.add_column(heading, justify="right")
    for row, second in zip(rows, seconds, strict=True):
        plain = row.gate.kind in ("always", "never")
        cells = ["" if plain else f"{row.gate.threshold:.4f}", f"{row.share:.1%}", f"{row.nll:.4f}"]
        cells += [f"{row.accuracy:.3f}"] if row.accuracy is not None else []
        cells += [f"{1 / second:.1f}", f"{seconds[0] / second:.2f}"]
        shown.add_row(row.gate.kind, *cells)
    return shown


def report(
    args: argparse.Namespace, rows: Sequence[Setting], seconds: Sequence[float], chosen: Setting
) -> None:
    """Save the chosen gate, and write what was measured."""
    console = Console(highlight=False, soft_wrap=True)
    told = {"share": chosen.share, "nll": chosen.nll, "accuracy": chosen.accuracy,
            "passes_a_token": chosen.passes}  # fmt: skip
    chosen.gate.save(args.model, **told)
    accuracy = "" if chosen.accuracy is None else f", accuracy {chosen.accuracy:.3f}"
    always = rows[0]
    console.print(
        f"chosen: {chosen.gate.kind} above {chosen.gate.threshold:.4f}: {chosen.share:.1%} of the "
        f"tokens think, {always.passes / chosen.passes:.2f} times fewer passes, NLL "
        f"{chosen.nll:.4f}{accuracy}; saved in {Path(args.model) / GATE_FILE}"
    )
    if chosen.share == 0:
        console.print(
            "note: it never thinks: on these texts thoughts gain less than --quality lets be lost; "
            "set it lower, or --speed"
        )
    figures: list[dict[str, Any]] = [
        {"gate": r.gate.kind, "threshold": r.gate.threshold, "share": r.share, "nll": r.nll,
         "accuracy": r.accuracy, "passes_a_token": r.passes, "tokens_per_second": 1 / s}
        for r, s in zip(rows, seconds, strict=True)
    ]  # fmt: skip
    if args.json:
        chosen_figures = {"gate": chosen.gate.kind, "threshold": chosen.gate.threshold, **told}
        result = {"rows": figures, "chosen": chosen_figures}
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if args.plot:
        from quietstar.reports.calibration import write_plot

        console.print(f"plot: {write_plot(Path(args.plot), figures)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "quietstar calibrate",
        description="Finds where thinking pays on held-out text, and saves a gate beside the model "
        "(quietstar generate --gate calibrated).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="folder of a saved Quiet-STaR model")
    add("--data", help="held-out text; without it that of the run which the model is from")
    add("--gate", choices=(*KINDS, "best"), default="best", help="kind of score")
    add("--speed", type=float, help="so many times fewer passes than with always; loses least")
    add("--quality", type=float,
        help="fastest that loses at most so much accuracy (or nats); default 0.01")  # fmt: skip
    add("--seq-len", type=int, default=128, help="of texts of --data")
    add("--sequences", type=int, default=64, help="texts; half fit the probes, half try the gates")
    add("--batch-size", type=int, default=8)
    add("--timed-tokens", type=int, default=64, help="decoded with each gate to measure speed")
    add("--dtype", default="auto")
    add("--device", type=device_option, help="by default a GPU if there is one")
    add("--json", metavar="FILE", help="figures")
    add("--plot", metavar="FILE.html", help="speed against quality")
    return parser
