"""``launch/slurm.sh`` with stand-ins for SLURM's commands: a warning saves and requeues the job."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import ROOT, needs_deepspeed
from tiny import read_metrics, run_config

from quietstar.config.loading import save_config

SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
SLURM_NODEID=0 exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in
  show) echo localhost ;;
  requeue) echo "$2" >> "$REQUEUED" ;;
esac
"""


def cluster(folder):
    """Environment of a job on one machine with two processes."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {
        "PATH": path,
        "OMP_NUM_THREADS": "1",
        "REQUEUED": str(folder / "requeued"),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_GPUS_ON_NODE": "2",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_ID": str(os.getpid()),
    }


@needs_deepspeed
@pytest.mark.slow
def test_a_job_near_its_time_limit_saves_and_goes_back_into_the_queue(tmp_path):
    config = run_config(tmp_path, training__max_steps=400, training__micro_batch_size=4)
    save_config(config, tmp_path / "config.yaml")
    run = tmp_path / "run"
    job = ["bash", "launch/slurm.sh", "zero2_cpu", str(tmp_path / "config.yaml")]
    job += ["--training.output_dir", str(run)]
    # Another job's training on the same machine: its command line looks the same.
    code = "import sys, time; print(flush=True); time.sleep(300)"
    (tmp_path / "train.py").write_text(code)
    other = subprocess.Popen(
        ["python", "train.py", "--config", "x"], cwd=tmp_path, stdout=subprocess.PIPE,
        env=cluster(tmp_path),
    )  # fmt: skip
    assert other.stdout.readline()
    with (
        other,
        subprocess.Popen(
            job, cwd=ROOT, env=cluster(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process,
    ):
        while not (run / "metrics.jsonl").exists() or len(read_metrics(run, "train")) < 3:
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.1)
        process.send_signal(signal.SIGUSR1)
        said = process.communicate(timeout=120)[0].decode()
        assert other.poll() is None, "the warning went to another job, too"
        other.kill()
    assert process.returncode == 0, said
    step = int((run / "preempted").read_text())
    assert f"saved at step {step}; back into the queue" in said
    assert (run / "checkpoints" / f"step-{step:06d}" / "manifest.json").exists()
    assert (tmp_path / "requeued").read_text() == f"{os.getpid()}\n"

    # The same job again: it goes on, ends, and is not requeued.
    job += ["--training.max_steps", str(step + 2), "--allow-changes", "true"]
    done = subprocess.run(job, cwd=ROOT, env=cluster(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (run / "final").exists()
    assert (tmp_path / "requeued").read_text() == f"{os.getpid()}\n"
