"""Launches of several processes: the death or the mistake of one ends all, and is named."""

import os
import signal
import subprocess
import time
from contextlib import suppress

import psutil
import pytest
from launching import ROOT, command, marked
from tiny import read_metrics, run_config

from quietstar.config.loading import save_config

SECONDS = 60  # within which all processes are gone


def ranks_of(process):
    """The ranks that a launcher has started, by number."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            environment = child.environ()
        except psutil.Error:
            continue
        if "train.py" in " ".join(child.cmdline()) and "LOCAL_RANK" in environment:
            found[int(environment["RANK"])] = child
    return found


@pytest.fixture
def start(tmp_path):
    """Starts a launch of many steps; returns it once it has done some of them."""
    launched = []

    def begin(strategy):
        save_config(run_config(tmp_path, training__max_steps=10_000), tmp_path / "config.yaml")
        call, environment = command(strategy, tmp_path / "config.yaml", tmp_path / "run")
        process = subprocess.Popen(
            call, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        launched.append(process)
        metrics, until = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 300
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < 4:
            assert process.poll() is None, process.stderr.read()[-2000:]
            assert time.monotonic() < until, "no step was done"
            time.sleep(0.1)
        return process

    yield begin
    for process in launched:
        with suppress(psutil.NoSuchProcess):
            for one in psutil.Process(process.pid).children(recursive=True):
                one.kill()
        process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [marked("ddp"), marked("fsdp2")])
def test_a_rank_that_dies_ends_all_and_is_named(start, strategy):
    process = start(strategy)
    ranks = ranks_of(process)
    assert sorted(ranks) == [0, 1]
    began = time.monotonic()
    os.kill(ranks[1].pid, signal.SIGKILL)
    _, told = process.communicate(timeout=SECONDS)
    assert time.monotonic() - began < SECONDS
    assert process.returncode != 0
    assert not any(rank.is_running() for rank in ranks.values())
    assert "Signal 9 (SIGKILL)" in told
    assert "rank      : 1" in told or "local_rank: 1" in told


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_stops_all_after_the_same_step(tmp_path, start, rank):
    process = start("ddp")
    began = time.monotonic()
    os.kill(ranks_of(process)[rank].pid, signal.SIGTERM)
    _, told = process.communicate(timeout=SECONDS)
    assert time.monotonic() - began < SECONDS
    who = "a signal to another process" if rank else "SIGTERM"
    assert f"quietstar: {who} asked for an end; step" in told, told[-2000:]
    step = int((tmp_path / "run" / "preempted").read_text())
    assert (tmp_path / "run" / "checkpoints" / f"step-{step:06d}" / "manifest.json").exists()
    assert read_metrics(tmp_path / "run", "train")[-1]["step"] == step
