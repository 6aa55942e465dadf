"""Commands on two processes give what they give on one."""

import json
import subprocess
from pathlib import Path

import pytest
from launching import wrap
from tiny import plain_model, thinking_model

from quietstar.data import load_tokenizer
from quietstar.errors import UserError
from quietstar.system.processes import Processes

ROOT = Path(__file__).parents[1]
COMMANDS = """
import atexit
import os
import sys
import torch
from quietstar.cli.main import main

# Called last of all: an open process group may abort the interpreter's end.
atexit.register(lambda: torch.distributed.is_initialized() and os._exit(9))
model, out, texts, text, prompts = sys.argv[1:]
drawn = ["--seed", "3", "--temperature", "0.8"]
for call in (
    ["generate", "--model", model, "--prompts", prompts, "--batch-size", "2", "--show-thoughts",
     "--max-new-tokens", "4", "--thought-temperature", "1", *drawn],
    ["generate", "--model", model, "--prompt", "one two", "--max-new-tokens", "3"],
    ["inspect", "--model", model, "--text-file", text, "--context", "64", "--controls",
     "--num-thoughts", "2", "--out", f"{out}/thoughts.json", *drawn],
    ["calibrate", "--model", model, "--data", texts, "--seq-len", "32", "--sequences", "12",
     "--batch-size", "2", "--timed-tokens", "3", "--json", f"{out}/gates.json"],
):
    code = main([*call, "--device", "cpu"])
    assert not code, code
"""


def test_two_processes_write_read_and_calibrate_as_one(tmp_path):
    model = thinking_model(plain_model(max_position_embeddings=128, eos_token_id=256))
    model.save_pretrained(tmp_path / "model", load_tokenizer("bytes"))
    (tmp_path / "prompts.txt").write_text("one two\nthree\nfour five six\nseven\neight\n")
    lines = [f"line {n} of a text, which is read in parts\n" for n in range(40)]
    (tmp_path / "text.txt").write_text("".join(lines[:8]))
    records = "".join(json.dumps({"text": line}) + "\n" for line in lines)
    (tmp_path / "texts.jsonl").write_text(records)
    (tmp_path / "commands.py").write_text(COMMANDS)
    found = {}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        script = [tmp_path / "commands.py", tmp_path / "model", tmp_path / name]
        script += [tmp_path / part for part in ("texts.jsonl", "text.txt", "prompts.txt")]
        # One thread each: how a sum is split among threads decides its last bits on some CPUs.
        call, environment = wrap("one" if name == "one" else "ddp", list(map(str, script)))
        environment["PYTHONPATH"] = str(ROOT)
        done = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        gates = json.loads((tmp_path / name / "gates.json").read_text())
        for row in gates["rows"]:
            del row["tokens_per_second"]
        printed = done.stdout.partition("gates on held-out text")[0].replace(f"/{name}/", "/")
        thoughts = json.loads((tmp_path / name / "thoughts.json").read_text())
        found[name] = (printed, thoughts, gates)
    assert found["one"] == found["two"]
    assert len(found["one"][1]["tokens"]) > 300
    assert found["one"][0].count("⟨") >= 20


def test_a_piece_that_fails_ends_the_work():
    def work(piece):
        raise UserError(f"piece {piece}")

    with pytest.raises(UserError, match="piece 0"):
        list(Processes().share([0, 1], work))
