"""Launches of several processes: the death or the mistake of one ends all, and is named."""

import json
import os
import signal
import subprocess
import time
from contextlib import suppress

import psutil
import pytest
from launching import ROOT, command, marked, wrap
from tiny import read_metrics, run_config, write_texts

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

    def begin(strategy, **changes):
        config = run_config(tmp_path, training__max_steps=10_000, **changes)
        save_config(config, tmp_path / "config.yaml")
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


@pytest.mark.slow
def test_a_rank_that_is_stopped_ends_all_and_is_named(start):
    rank = 0  # the one that writes; by hand 1, too
    process = start("ddp", training__rank_timeout=14)
    ranks = ranks_of(process)
    began = time.monotonic()
    ranks[rank].suspend()
    ranks[1 - rank].wait(SECONDS)
    assert 10 < time.monotonic() - began < 60
    ranks[rank].resume()  # or the launcher waits half a minute before it kills it
    _, told = process.communicate(timeout=SECONDS)
    assert process.returncode != 0
    name = f"rank {rank} (process {ranks[rank].pid} on "
    lines = [line for line in told.splitlines() if line.startswith("quietstar: ")]
    assert f"warning: waiting for {name}" in lines[0]
    assert f"error: the launch ends: {name}" in lines[1]
    assert ", silent for 14 s (training.rank_timeout). See what stopped it" in lines[1]


def launch_with_faults(strategy, folder, **faults):
    """Run ``config.yaml`` of a folder, with faults as `watched` describes; return how it ended."""
    script = [str(ROOT / "tests" / "faults" / "watched.py"), "--config", f"{folder}/config.yaml"]
    call, environment = wrap(strategy, script)
    environment |= {"PYTHONPATH": str(ROOT), **faults}
    return subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [marked(name) for name in ("ddp", "zero2")])
def test_ranks_that_differ_are_told_before_anything_is_written(tmp_path, strategy):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_texts(tmp_path / name / "texts.jsonl", count=40 - (name == "two"))
    config = run_config(tmp_path, data__train="texts.jsonl")
    save_config(config, tmp_path / "config.yaml")
    changes = {"training.seed": 1, "optim.learning_rate": 0.5, "training.max_steps": 9}
    more = [part for key, value in changes.items() for part in (f"--{key}", str(value))]
    folders = {f"FAULTS_FOLDER_{n}": str(tmp_path / name) for n, name in enumerate(("one", "two"))}
    done = launch_with_faults(strategy, tmp_path, FAULTS_RANK_1=json.dumps(more), **folders)
    assert done.returncode != 0
    line = next(line for line in done.stderr.splitlines() if line.startswith("quietstar: error:"))
    assert "optim.learning_rate is 0.01 on rank 0 and 0.5 on rank 1" in line
    assert "training.max_steps is 3 on rank 0 and 9 on rank 1" in line
    assert "training.seed is 0 on rank 0 and 1 on rank 1" in line
    assert "the content of data.train is 1,428 bytes, " in line
    assert "exitcode  : 2" in done.stderr or "exitcode: 2" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "one", "two"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [marked("ddp"), marked("fsdp2")])
def test_a_full_disk_of_one_rank_is_the_reason_on_all(tmp_path, strategy):
    config = run_config(tmp_path, training__save_steps=1)
    save_config(config, tmp_path / "config.yaml")
    size = "8000" if strategy == "ddp" else "20000"  # less than the random state, or than shards
    done = launch_with_faults(strategy, tmp_path, FAULTS_BYTES_1=size)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "quietstar: error: " in line]
    assert lines
    for line in lines:
        assert "/checkpoints/step-000001: cannot be written by rank 1 (" in line
        assert "gloo" not in line
