"""Runs killed at any moment go on to the same weights, bit for bit.

``QUIETSTAR_KILLS=20 pytest tests/test_killed.py`` kills more often.
"""

import os
import random
import subprocess
import time

import psutil
import pytest
import torch
from launching import ROOT, command, launch, marked
from safetensors.torch import load_file
from tiny import run_config

from quietstar.config.loading import save_config

KILLS = int(os.environ.get("QUIETSTAR_KILLS", "2"))
STEPS, SAVE_EVERY = 60, 5
SAVING = -1  # the moment inside a save


def moments():
    """Steps after which to kill, two of many (one of few) inside a save."""
    chance = random.Random(0)
    in_saves = 2 if KILLS > 5 else 1
    return [SAVING] * in_saves + [chance.randrange(STEPS) for _ in range(KILLS - in_saves)]


def kill_all(process):
    """SIGKILL to the launcher and all ranks, which live in sessions of their own."""
    everyone = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for one in everyone:
        one.kill()
    psutil.wait_procs(everyone, timeout=10)
    process.wait()


def steps_done(folder):
    metrics = folder / "metrics.jsonl"
    return metrics.read_text().count('"kind": "train"') if metrics.exists() else 0


def start_and_kill(engine, config, folder, moment, delay):
    """Returns the steps that were done."""
    call, environment = command(engine, config, folder)
    with subprocess.Popen(
        call, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        while process.poll() is None:
            if moment == SAVING and list(folder.glob("checkpoints/*.partial")):
                break
            if moment != SAVING and steps_done(folder) >= moment:
                time.sleep(delay)
                break
            time.sleep(0.001)
        assert process.poll() is None, "it ended before it was killed"
        kill_all(process)
    return steps_done(folder)


def final_weights(folder):
    files = sorted((folder / "final").glob("*.safetensors"))
    return {f"{file.name}:{n}": w for file in files for n, w in load_file(file).items()}


@pytest.fixture(scope="module", params=[marked("one"), marked("zero2")])
def whole(request, tmp_path_factory):
    """Engine, config file and run folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp(request.param)
    config = run_config(folder, training__max_steps=STEPS, training__save_steps=SAVE_EVERY,
                        training__micro_batch_size=4, optim__learning_rate=1e-3)  # fmt: skip
    save_config(config, folder / "config.yaml")
    return (
        request.param,
        folder / "config.yaml",
        launch(request.param, folder / "config.yaml", folder / "whole"),
    )


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(KILLS))
def test_a_killed_run_ends_with_the_weights_of_a_whole_one(whole, trial, tmp_path):
    engine, config, folder = whole
    delay = random.Random(trial).random() * 0.05
    done = start_and_kill(engine, config, tmp_path / "run", moments()[trial], delay)
    if moments()[trial] == SAVING:
        assert list((tmp_path / "run" / "checkpoints").glob("*.partial")), "killed after the save"
    launch(engine, config, tmp_path / "run", "--resume", "auto")
    ours, theirs = final_weights(tmp_path / "run"), final_weights(folder)
    assert ours.keys() == theirs.keys()
    assert ours
    for name, weight in theirs.items():
        assert torch.equal(ours[name], weight), f"{name}, killed after {done} steps"
