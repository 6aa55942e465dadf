"""``python -m benchmarks.memory``: what a run takes, beside what ``quietstar train --plan`` says.

The run is the real one, cut to a few steps, in a fresh process: load, evaluate, train, save. On a
CPU glibc maps every block apart in it: its heap, full of holes, would hold several times what is
alive.
"""

from __future__ import annotations

import tempfile
from importlib import import_module

import torch
from accelerate.utils import patch_environment
from rich.table import Table

from benchmarks.options import add_json, report_result, run
from benchmarks.peak_memory import PeakMemory
from benchmarks.processes import in_fresh_process
from quietstar.cli.options import Parser, whole
from quietstar.config.loading import load_config
from quietstar.training.build import quiet_libraries
from quietstar.training.memory_plan import estimate_run
from quietstar.training.run import run_training

MAPPED_APART = {"MALLOC_MMAP_THRESHOLD_": "262144"}
"""Of glibc, for a process that starts: larger blocks go back to the system when they are freed."""
_MIB = 2**20


def main(arguments: list[str]) -> int:
    """Run the benchmark, print a table, write JSON if asked."""
    parser = _parser()
    args, overrides = parser.parse_known_args(arguments)
    parser.check(args)
    shortened = [*overrides, "--training.max_steps", str(args.steps)]
    with tempfile.TemporaryDirectory() as folder:
        shortened += ["--training.output_dir", f"{folder}/run", "--training.save_steps", "0"]
        config = load_config(args.config, shortened)
        heap = {} if args.heap else MAPPED_APART
        with patch_environment(**heap):
            measured = in_fresh_process(measure_run, args.config, shortened)
    quiet_libraries()
    estimate = estimate_run(config, "single", 1)
    on_gpu = torch.cuda.is_available()
    planned = (estimate.total if on_gpu else estimate.total_on_cpu) / _MIB
    table = Table(title=f"memory of {args.config}")
    for column in ("planned MiB", "measured MiB", "planned / measured"):
        table.add_column(column, justify="right")
    table.add_row(f"{planned:,.0f}", f"{measured:,.0f}", f"{planned / measured:.2f}")
    figures = {"planned_mb": planned, "measured_mb": measured, "ratio": planned / measured}
    return report_result(table, figures, args.json)


def _parser() -> Parser:
    parser = Parser("python -m benchmarks.memory", __doc__)
    parser.usage = "%(prog)s --config FILE [--steps N] [--heap] [--json FILE] [--KEY VALUE ...]"
    parser.add_argument("--config", required=True, help="of a run, as for quietstar train")
    parser.add_argument("--steps", type=whole(1), default=4, help="of the run")
    parser.add_argument("--heap", action="store_true", help="measure with the heap's holes")
    add_json(parser)
    return parser


def measure_run(config_file: str, overrides: list[str]) -> float:
    """Most MiB that the run takes, in this process: on a GPU of the GPU's, else resident ones."""
    import_module("datasets")  # as `quietstar train --plan` counts: above the imported process
    with PeakMemory() as memory:
        run_training(load_config(config_file, overrides))
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / _MIB
    return memory.mb


if __name__ == "__main__":
    run(main)
