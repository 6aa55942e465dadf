"""The stub of docs/samplers.md: a server in a process of its own draws the trainer's thoughts."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import random_texts, run_config

from quietstar.cli import main as cli
from quietstar.config.loading import save_config
from quietstar.errors import UserError
from quietstar.training.build import build_model, find_tokenizer

ROOT = Path(__file__).resolve().parents[1]
STUB = (ROOT / "docs" / "remote_thoughts.py").read_text(encoding="utf-8")
OFTEN = [chr(c) for c in range(32, 72)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The working directory of both machines."""
    folder = tmp_path_factory.mktemp("remote")
    (folder / "remote_thoughts.py").write_text(STUB, encoding="utf-8")
    config = run_config(
        folder, thoughts__stop=OFTEN, thoughts__length=4, thoughts__positions="random",
        thoughts__position_fraction=0.5,
    )  # fmt: skip
    save_config(config, folder / "run.yaml")
    os.environ["THOUGHT_SERVER_KEY"] = "secret"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield folder, config
    del os.environ["THOUGHT_SERVER_KEY"]


@pytest.fixture(scope="module")
def server(folder):
    """The process of a server, started as users do, and its address."""
    command = [sys.executable, "remote_thoughts.py", "run.yaml", "127.0.0.1:0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=folder[0], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process, process.stdout.readline().split()[-1]
        process.kill()


@pytest.fixture
def environment(folder, server, monkeypatch):
    """Environment of the trainer, in the folder."""
    monkeypatch.chdir(folder[0])
    monkeypatch.setenv("THOUGHT_SERVER", server[1])
    monkeypatch.setenv("THOUGHT_SERVER_TIMEOUT", "60")
    return monkeypatch


def train(config, sampler, steps=4, seed=0):
    """Loss and thoughts of some steps of two micro-batches, from the run's first weights."""
    torch.manual_seed(seed)
    config = config.model_copy(
        update={"thoughts": config.thoughts.model_copy(update={"sampler": sampler})}
    )
    model = build_model(config, find_tokenizer(config)).train()
    optimizer, results = torch.optim.AdamW(model.parameters(), lr=3e-2), []
    for step in range(steps):
        for part in range(2):
            ids = random_texts(2, 9, seed=10 * step + part)
            output = model(ids, sample_ids=torch.tensor([2 * step, 2 * step + 1]), seed=3)
            output.loss.backward()
            results.append((output.loss.item(), output.thoughts.tolist()))
        optimizer.step()
        optimizer.zero_grad()
    return results, model


def test_thoughts_and_losses_are_those_of_the_local_rollout(folder, environment):
    config = folder[1]
    local, _ = train(config, "rollout")
    remote, model = train(config, "remote_thoughts:Remote")
    assert remote == local
    assert model.sampler.number == 4  # once a step, not once a micro-batch
    model.sampler.connection.close()  # the next trainer
    environment.setenv("THOUGHT_SERVER_EVERY", "3")
    older, model = train(config, "remote_thoughts:Remote")
    assert model.sampler.number == 2
    assert older[:2] == local[:2]
    assert older[2:] != local[2:]  # thoughts of the first weights
    arguments = {"num_thoughts": 3, "temperature": 0.7, "top_p": 0.8, "seed": 5}
    model.sampler.steps = 3  # so that the weights follow
    sampled = model.draw(random_texts(2, 7), **arguments).tokens
    model.configure(model.thoughts.model_copy(update={"sampler": "rollout"}))
    assert torch.equal(sampled, model.draw(random_texts(2, 7), **arguments).tokens)
    assert (sampled == -1).any()


def test_another_key_or_other_weights_are_refused(folder, environment):
    environment.setenv("THOUGHT_SERVER_KEY", "wrong")
    with pytest.raises(UserError, match=r"gives no thoughts \(digest"):
        train(folder[1], "remote_thoughts:Remote", steps=1)
    environment.setenv("THOUGHT_SERVER_KEY", "secret")
    _, model = train(folder[1], "remote_thoughts:Remote", steps=1)
    model.sampler.number += 5
    model.sampler.every = 9
    with pytest.raises(UserError, match="it says: UserError: it has weights 1, not 6"):
        model(random_texts(2, 9))


def test_a_run_without_its_server_ends_in_one_line(folder, environment, capsys):
    call = ["train", "--config", "run.yaml", "--thoughts.sampler", "remote_thoughts:Remote",
            "--training.output_dir", "none"]  # fmt: skip
    environment.delenv("THOUGHT_SERVER")
    assert cli.main(call) == 2
    assert "THOUGHT_SERVER: is not set" in capsys.readouterr().err
    environment.setenv("THOUGHT_SERVER", "127.0.0.1:1")
    assert cli.main(call) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert "THOUGHT_SERVER (127.0.0.1:1): gives no thoughts (Connection refused)" in errors[0]


def test_a_server_that_hangs_or_dies_is_one_line(folder, environment, server):
    process, _ = server
    _, model = train(folder[1], "remote_thoughts:Remote", steps=1)
    process.send_signal(signal.SIGSTOP)
    model.sampler.timeout = 1
    with pytest.raises(UserError, match=r"gives no thoughts \(no answer within 1 seconds\)"):
        model(random_texts(2, 9))
    process.send_signal(signal.SIGCONT)
    model.sampler.timeout = 60
    model(random_texts(2, 9))  # on a new connection
    process.kill()  # the server of this file: this test is its last
    process.wait()
    began = time.perf_counter()
    for _ in range(2):  # on the connection there was, and on none
        with pytest.raises(
            UserError, match=r"THOUGHT_SERVER \(127.*: gives no thoughts \("
        ) as error:
            model(random_texts(2, 9))
        assert "\n" not in str(error.value)
    assert time.perf_counter() - began < 5
