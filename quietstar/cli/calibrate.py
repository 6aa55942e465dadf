"""``quietstar calibrate``: the threshold of a gate for a wanted speed or quality."""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import load

from quietstar.cli import options
from quietstar.cli.options import BATCH, Parser, number, whole
from quietstar.config import Config, DataConfig
from quietstar.config.loading import load_config
from quietstar.data import Batch, build_data, load_tokenizer
from quietstar.errors import UserError
from quietstar.evaluation import calibration
from quietstar.evaluation.calibration import GateResult, try_gate
from quietstar.generation.gates import GATE_FILE, PROBED, PROBES_FILE, Gate, GateKind, check_gate
from quietstar.registry import trusting_nothing
from quietstar.system.files import check_output, file_kind, write_json
from quietstar.system.processes import join_launch
from quietstar.system.signals import held
from quietstar.training.run_dir import CONFIG_FILE

KINDS: tuple[GateKind, ...] = ("entropy", "weight", "gain")
TABLE_FRACTIONS = (0.02, 0.05, 0.1, 0.25, 0.5)
"""Fractions of the tokens that think, for the five thresholds of the table."""
SEQ_LEN = 128
TRIED = 200
"""Thresholds among which the best is searched."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, save the gate; a wrong option, model or text is a `UserError`."""
    parser = _parser()
    args = parser.read(arguments)
    parser.warn_idle(args, {"--seq-len": None if args.data else "without --data"})
    if args.speed is not None and args.quality is not None:
        raise UserError("--speed: does not go with --quality; leave one out")
    run = None if args.data is not None else _run_config(args.model)
    parser.check(args, _run_inputs(args.model, run))
    _check_gate(args)
    processes = join_launch(args.device)
    model = options.load_model(args, True, "Give the folder of a saved one.")
    fixed = model.mixing_head.fixed_weight
    check_gate(args.gate, fixed)
    kinds: list[GateKind] = [kind for kind in KINDS if fixed is None or kind != "weight"]
    length, most = model.thoughts.length, model.max_text_length
    if args.speed is not None and args.speed > 1 + length:
        raise UserError(
            f"--speed ({args.speed:g}): is out of reach: with thoughts of {length} tokens a model "
            f"that never thinks is {1 + length} times faster; set it lower"
        )
    if args.seq_len is None:
        args.seq_len = SEQ_LEN if most is None else min(SEQ_LEN, most)
    elif most is not None and args.seq_len > most:
        raise UserError(f"--seq-len ({args.seq_len}): must be at most {most}, what the model takes")
    batches = _held_out(args, run)
    with options.progress("thinking", len(batches), shown=processes.is_main) as advance:
        measured = calibration.measure_tokens(model, batches, advance, processes)
    if not processes.is_main:
        return 0
    fitted = measured.where(measured.text % 2 == 0)
    tried = measured.where(measured.text % 2 == 1)
    if len(fitted.text) < 100 or len(tried.text) < 100:
        raise UserError(
            f"--data: {len(measured.text)} tokens of {len(batches)} batches are too few to fit a "
            "gate; give more --sequences"
        )
    probes = calibration.fit_probes(fitted)

    def sweep(kind: GateKind, fractions: Sequence[float]) -> list[GateResult]:
        """Try the gates of a kind at which these fractions of the tokens think."""
        scores = calibration.score_tokens(kind, tried, probes)
        thresholds = [calibration.threshold_at(scores, fraction) for fraction in fractions]
        gates = [Gate(kind, threshold, probes) for threshold in thresholds]
        return [try_gate(gate, tried, scores, length) for gate in gates]

    zeros = torch.zeros_like(tried.entropy)
    rows = [try_gate(Gate(kind, threshold), tried, zeros, length)
            for kind, threshold in (("always", -1.0), ("never", 1.0))]  # fmt: skip
    rows += [row for kind in kinds for row in sweep(kind, TABLE_FRACTIONS)]
    seconds = _seconds_per_token(args, model, batches, rows)
    fractions = [step / TRIED for step in range(TRIED + 1)]
    wanted = kinds if args.gate == "best" else [args.gate]
    settings = [row for kind in wanted for row in sweep(kind, fractions)]
    chosen = _choose(args, rows[0], settings)
    Console().print(_table(rows, seconds))
    _report(args, rows, seconds, chosen)
    return 0


def _check_gate(args: argparse.Namespace) -> None:
    """Refuse a model's folder that cannot be written, or whose gate files are not of a gate."""
    folder = Path(args.model).expanduser()
    if not folder.is_dir():
        return  # the model's loader says so
    for name in (GATE_FILE, PROBES_FILE):
        path = check_output(folder / name, "--model", force=True)
        if file_kind(path) == "file" and not args.force and not _is_gate_file(path):
            check_output(path, "--model")
    for option, path in (("--json", args.json), ("--plot", args.plot)):
        if path in (folder.resolve() / GATE_FILE, folder.resolve() / PROBES_FILE):
            raise UserError(f"{option} ({path}): is where the gate is saved. Give another name.")


def _is_gate_file(path: Path) -> bool:
    """Say whether a file is one of those that an earlier calibration wrote."""
    try:
        if path.name == PROBES_FILE:
            names = set(load(path.read_bytes()))
            return names <= {f"{name}.{part}" for name in PROBED for part in ("weight", "bias")}
        return {"kind", "threshold"} <= set(json.loads(path.read_bytes()))
    except (ValueError, TypeError, OSError, RecursionError, SafetensorError):
        return False


def _seconds_per_token(
    args: argparse.Namespace, model: Any, batches: Sequence[Batch], rows: Sequence[GateResult]
) -> list[float]:
    """Decode the first texts one after the other with each gate."""
    texts: list[torch.Tensor] = []  # (1, seq) each
    for batch in batches:
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
            left = args.timed_tokens - sum(text.shape[1] for text in texts)
            text = ids[mask.bool()][: max(left, 0)]
            if len(text) > 2:
                texts.append(text[None].to(model.device))
    if not texts:
        raise UserError(
            "--data: none of its texts has three tokens, on which a gate's speed is measured"
        )
    weights = [text.shape[1] for text in texts]
    seconds = []
    for row in [rows[0], *rows]:  # the first warms up
        times = [calibration.stream_seconds(model, text, row.gate) for text in texts]
        seconds.append(sum(t * w for t, w in zip(times, weights, strict=True)) / sum(weights))
    return seconds[1:]


def _run_file(model: str) -> Path:
    """Name the config of the run that a model is from; it may be missing."""
    return Path(os.path.realpath(model)).parent / CONFIG_FILE


def _run_config(model: str) -> Config | None:
    """Read the config of the last stage of the run that a model is from, if there is one."""
    if not _run_file(model).exists():
        return None
    with trusting_nothing():
        return list(load_config(_run_file(model)).stage_configs().values())[-1]


def _run_inputs(model: str, run: Config | None) -> dict[str, Path]:
    """Name what is read of the run that a model is from, beside the model itself."""
    if run is None:
        return {}
    data = {"data.train": run.data.train, "data.eval": run.data.eval}
    return {
        "the config of the run": _run_file(model),
        **{f"{key} of the run": Path(name) for key, name in data.items() if name},
    }


def _held_out(args: argparse.Namespace, run: Config | None) -> list[Batch]:
    """Return texts of ``--data``, or the held-out ones of the run that the model is from."""
    seed = 0
    if args.data is not None:
        if not args.data:
            raise UserError("--data: names nothing; give a file or a data set of the hub")
        data = DataConfig(train=args.data, eval_fraction=0.5, seq_len=args.seq_len)
    elif run is not None:
        data, seed = run.data, run.training.seed
    else:
        raise UserError(
            f"--data: is not given, and there is no {_run_file(args.model)}; give held-out text"
        )
    data = data.model_copy(update={"eval_sequences": args.sequences})
    try:
        _, held, _ = build_data(
            data, load_tokenizer(args.model, trust_remote_code=args.trust_remote_code), seed
        )
        return list(held.batches(args.batch_size))
    except UserError as problem:  # of a part that knows the key of a config only
        raise UserError(str(problem).replace("data.train: ", "--data: ")) from problem


def _choose(
    args: argparse.Namespace, always: GateResult, settings: Sequence[GateResult]
) -> GateResult:
    """Return the gate that loses least of those fast enough for ``--speed``.

    Without ``--speed``: the fastest of those that lose little enough for ``--quality``.
    """

    def lost(row: GateResult) -> float:
        if always.accuracy is not None and row.accuracy is not None:
            return always.accuracy - row.accuracy
        return row.nll - always.nll

    if args.speed is not None:
        fast = [row for row in settings if always.passes / row.passes >= args.speed]
        return min(fast, key=lambda row: (lost(row), row.passes))
    allowed = 0.01 if args.quality is None else args.quality
    return min((r for r in settings if lost(r) <= allowed), key=lambda r: (r.passes, lost(r)))


def _table(rows: Sequence[GateResult], seconds: Sequence[float]) -> Table:
    """Return speed against quality."""
    accuracy = () if rows[0].accuracy is None else ("accuracy",)
    headings = ("gate", "threshold", "thinking", "NLL", *accuracy, "tokens/s", "speed-up")
    table = options.table(headings, left=("gate",), title="gates on held-out text")
    for row, second in zip(rows, seconds, strict=True):
        plain = row.gate.kind in ("always", "never")
        table.add_row(
            row.gate.kind, "" if plain else f"{row.gate.threshold:.4f}",
            f"{row.think_fraction:.1%}", f"{row.nll:.4f}",
            *(() if row.accuracy is None else (f"{row.accuracy:.3f}",)),
            f"{1 / second:.1f}", f"{seconds[0] / second:.2f}",
        )  # fmt: skip
    return table


def _report(
    args: argparse.Namespace, rows: Sequence[GateResult], seconds: Sequence[float],
    chosen: GateResult,
) -> None:  # fmt: skip
    """Save the chosen gate, and write what was measured."""

    def figures_of(row: GateResult) -> dict[str, Any]:
        return {"share": row.think_fraction, "nll": row.nll, "accuracy": row.accuracy,
                "passes_a_token": row.passes}  # fmt: skip

    def with_gate(row: GateResult) -> dict[str, Any]:
        return {"gate": row.gate.kind, "threshold": row.gate.threshold, **figures_of(row)}

    with held():
        chosen.gate.save(args.model, **figures_of(chosen))
    accuracy = "" if chosen.accuracy is None else f", accuracy {chosen.accuracy:.3f}"
    options.say(
        f"chosen: {chosen.gate.kind} above {chosen.gate.threshold:.4f}: "
        f"{chosen.think_fraction:.1%} of the tokens think, "
        f"{rows[0].passes / chosen.passes:.2f} times fewer passes, NLL {chosen.nll:.4f}{accuracy}; "
        f"saved in {Path(args.model) / GATE_FILE}"
    )
    if chosen.think_fraction == 0:
        options.say(
            "note: it never thinks: on these texts thoughts gain less than --quality allows to "
            "lose; set it lower, or --speed"
        )
    figures = [
        {**with_gate(row), "tokens_per_second": 1 / second}
        for row, second in zip(rows, seconds, strict=True)
    ]
    if args.json is not None:
        write_json(args.json, {"rows": figures, "chosen": with_gate(chosen)})
    if args.plot is not None:
        from quietstar.reports.evaluation import write_gates

        options.say(f"plot: {write_gates(args.plot, figures, with_gate(chosen))}")


def _parser() -> Parser:
    parser = Parser(
        "quietstar calibrate",
        "Finds where thinking pays on held-out text, and saves a gate beside the model\n"
        "(quietstar generate --gate calibrated).",
    )
    options.add_model(parser)
    value = parser.value
    value("--data", str, None, "FILE", "held-out text; default: that of the run of the model")
    kinds = (*KINDS, "best")
    parser.add_argument("--gate", choices=kinds, default="best", help="kind of score")
    value("--speed", number(1.0, 1e6, "no thought is longer", above=True), None, "X",
          "lose least among gates with X times fewer passes than thinking always")  # fmt: skip
    value("--quality", number(0.0, 100.0, "no loss is higher"), None, "LOSS",
          "be fastest among gates that lose at most this accuracy (or nats); "
          "default: 0.01")  # fmt: skip
    value("--seq-len", whole(2, 10**6, "no model reads more"), None, "N",
          f"length of texts of --data; default: {SEQ_LEN}, or what the model takes")  # fmt: skip
    value("--sequences", whole(2, 10**6, "no memory holds more"), 64, "N",
          "texts; half fit the probes, half try the gates")  # fmt: skip
    value("--batch-size", BATCH, 8, "N", "texts at once")
    value("--timed-tokens", whole(3, 10**6, "it would take days"), 64, "N",
          "tokens decoded with each gate to measure speed")  # fmt: skip
    parser.output("--json", "all figures")
    parser.output("--plot", "page: speed against quality", ".html", metavar="FILE.html")
    return parser
