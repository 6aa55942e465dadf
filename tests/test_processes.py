"""Commands on two processes give what they give on one."""

import json
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from launching import wrap
from tiny import plain_model, run_config, thinking_model
from torch.distributed import TCPStore

from quietstar.data import build_data, load_tokenizer
from quietstar.errors import UserError
from quietstar.system import watch
from quietstar.system.processes import Processes
from quietstar.training.agreement import check_agreement

ROOT = Path(__file__).parents[1]
COMMANDS = """
import atexit
import os
import sys
import torch
from quietstar.cli.main import main

# Called last of all: an open process group may abort the interpreter's end.
atexit.register(lambda: torch.distributed.is_initialized() and os._exit(9))
model, out, text, prompts = sys.argv[1:]
drawn = ["--seed", "3", "--thought-temperature", "1"]
for call in (
    ["generate", "--model", model, "--prompts", prompts, "--batch-size", "2", "--show-thoughts",
     "--max-new-tokens", "4", "--temperature", "0.8", *drawn],
    ["generate", "--model", model, "--prompt", "one two", "--max-new-tokens", "3"],
    ["generate", "--model", model, "--inspect-file", text, "--context", "64", "--controls",
     "--num-thoughts", "2", "--out", f"{out}/thoughts.json", *drawn],
):
    code = main([*call, "--device", "cpu"])
    assert not code, code
"""


def test_two_processes_write_and_read_as_one(tmp_path):
    model = thinking_model(plain_model(max_position_embeddings=128, eos_token_id=256))
    model.save_pretrained(tmp_path / "model", load_tokenizer("bytes"))
    (tmp_path / "prompts.txt").write_text("one two\nthree\nfour five six\nseven\neight\n")
    lines = [f"line {n} of a text, which is read in parts\n" for n in range(8)]
    (tmp_path / "text.txt").write_text("".join(lines))
    (tmp_path / "commands.py").write_text(COMMANDS)
    found = {}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        script = [tmp_path / "commands.py", tmp_path / "model", tmp_path / name]
        script += [tmp_path / part for part in ("text.txt", "prompts.txt")]
        # One thread each: how a sum is split among threads decides its last bits on some CPUs.
        call, environment = wrap("one" if name == "one" else "ddp", list(map(str, script)))
        environment["PYTHONPATH"] = str(ROOT)
        done = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        thoughts = json.loads((tmp_path / name / "thoughts.json").read_text())
        found[name] = (done.stdout.replace(f"/{name}/", "/"), thoughts)
    assert found["one"] == found["two"]
    assert len(found["one"][1]["tokens"]) > 300
    assert found["one"][0].count("⟨") >= 20


def test_a_piece_that_fails_ends_the_work():
    def work(piece):
        raise UserError(f"piece {piece}")

    with pytest.raises(UserError, match="piece 0"):
        list(Processes().share([0, 1], work))


def facts_of(config, monkeypatch, gathered=None):
    """What a rank with this config has in common with ``gathered``, the facts of another one."""
    own = []

    def gather(_, work):
        own.append(work())
        return [gathered or own[0], own[0]]

    monkeypatch.setattr(Processes, "gather", gather)
    data = build_data(config.data, load_tokenizer("bytes"), config.training.seed)
    check_agreement(config, Processes(0, 2), [data])
    return own[0]


def test_ranks_compare_the_content_of_texts_and_models(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(b"0" * 2**21)
    more = {"model__name_or_path": str(tmp_path / "model"), "model__config": None}
    config = run_config(tmp_path, **more)
    first = facts_of(config, monkeypatch)
    assert facts_of(config, monkeypatch, first) == first
    weights.write_bytes(b"0" * (2**21 - 1) + b"1")
    with pytest.raises(UserError, match=r"differ: the content of model.name_or_path is 2,097,152"):
        facts_of(config, monkeypatch, first)
    weights.write_bytes(b"0" * 2**21)
    texts = tmp_path / "texts.jsonl"
    texts.write_text(texts.read_text().replace("7 plus 4 is 11", "7 plus 4 is 12"))
    with pytest.raises(UserError, match=r"differ: the content of data.train is 1,428 bytes, ") as e:
        facts_of(config, monkeypatch, first)
    assert "\n" not in str(e.value)


def test_ranks_with_other_versions_are_warned_and_go_on(tmp_path, monkeypatch, caplog):
    first = facts_of(run_config(tmp_path), monkeypatch)
    assert not caplog.records
    facts_of(run_config(tmp_path), monkeypatch, first | {"the version of torch": "1.0"})
    assert [r.getMessage()[:46] for r in caplog.records] == [
        "the version of torch is 1.0 on rank 0 and " + first["the version of torch"][:4]
    ]


@pytest.fixture
def two_watches(monkeypatch):
    """Ranks 0 and 1 of a launch, in one process; the exit codes that they would end it with."""
    server = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    monkeypatch.setattr(watch, "BEAT_SECONDS", 0.1)
    exits = []
    monkeypatch.setattr(watch.os, "_exit", exits.append)
    ranks = [watch._Watch(rank, 2, 3) for rank in (0, 1)]
    yield ranks, exits
    for rank in ranks:
        rank.stop()


def test_a_rank_is_silent_when_it_beats_no_more_and_not_when_it_has_left(
    two_watches, monkeypatch, caplog
):
    (_, one), exits = two_watches
    monkeypatch.setattr(watch, "_watch", one)
    time.sleep(4)
    assert not exits
    watch.stop_watching()
    time.sleep(4)
    assert not exits
    assert not caplog.records


def test_the_first_rank_that_fails_is_the_reason_on_the_others(two_watches, monkeypatch):
    (zero, one), _ = two_watches
    monkeypatch.setattr(watch, "_watch", zero)
    assert watch.first_failure() is None
    monkeypatch.setattr(watch, "_watch", one)
    assert watch.first_failure("no space") is None  # its own
    monkeypatch.setattr(watch, "_watch", zero)
    assert watch.first_failure() == "rank 1 has failed: no space"
    assert watch.first_failure("another reason") == "rank 1 has failed: no space"
    assert watch.first_failure("no space") is None  # of all alike


def test_a_store_that_is_gone_ends_a_launch_that_nobody_can_watch(two_watches, caplog):
    (zero, _), exits = two_watches
    hang = SimpleNamespace(add=lambda key, n: zero.has_left.wait(), check=lambda keys: False)
    zero.store = hang
    time.sleep(5)
    assert 2 in exits
    said = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert any("the launch ends: rank 0 (its store at localhost:" in text for text in said)
