"""Runs as users launch them: one process, or two ranks of a strategy, on CPUs."""

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)


def marked(strategy):
    """The strategy as a test's parameter."""
    return pytest.param(strategy, marks=needs_deepspeed if "zero" in strategy else ())


def command(strategy, config, output_dir, *arguments):
    """Command and environment of a training run."""
    train = ["train.py", "--config", str(config), "--training.output_dir", str(output_dir)]
    return wrap(strategy, [*train, *arguments])


def wrap(strategy, script):
    """The script's command and environment under a launcher; ``zero2x1`` is one process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    name, world = strategy.split("x") if "x" in strategy else (strategy, "2")
    if name == "one":
        return [sys.executable, *script], environment
    if name in ("ddp", "fsdp2"):
        environment |= {"ACCELERATE_USE_CPU": "true"}
        environment |= {"ACCELERATE_USE_FSDP": str(name == "fsdp2").lower()}
        call = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", world]
        call += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        return [*call, *script], environment
    file = ["--config_file", f"configs/accelerate/{name}_cpu.yaml", "--num_processes", world]
    with socket.socket() as probe:  # others may launch beside
        probe.bind(("localhost", 0))
        file += ["--main_process_port", str(probe.getsockname()[1])]
    module = "accelerate.commands.accelerate_cli"
    return [sys.executable, "-m", module, "launch", *file, *script], environment


def launch(strategy, config, output_dir, *arguments, refused=None):
    """Run the config to its end, or to the refusal; returns the run folder."""
    call, environment = command(strategy, config, output_dir, *arguments)
    done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True)
    if refused is not None:
        assert done.returncode != 0
        assert refused in done.stderr
        return output_dir
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return output_dir
