"""Folders that commit a423a34 (version 0.1.0) wrote: models load, runs go on as they would have.

``saved_by_0.1.0/`` holds the final model of a run of six steps, its checkpoint after step 3, what
that version recorded (``recorded.jsonl``), and what its model thought (``expected.json``).
"""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from quietstar import QuietStarForCausalLM
from quietstar.config.loading import load_config
from quietstar.errors import ConfigError
from quietstar.training.run import run_training

SAVED = Path(__file__).with_name("saved_by_0.1.0")


def test_a_saved_model_thinks_what_it_thought():
    model = QuietStarForCausalLM.from_pretrained(SAVED / "final")
    assert model.thoughts.position_fraction == 0.5
    thoughts = model.think(
        torch.arange(40, 60)[None], num_thoughts=2, temperature=1.0, seed=5
    )  # fmt: skip
    expected = json.loads((SAVED / "expected.json").read_text())
    assert thoughts.tokens[0, :, :8].tolist() == expected["tokens"]
    mixed = torch.tensor(expected["mixed"])
    torch.testing.assert_close(thoughts.mixed_logprobs[0, :, :8, 0], mixed, rtol=1e-4, atol=1e-5)


def test_a_run_goes_on_from_its_checkpoint(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(SAVED / "run", tmp_path / "run")
    shutil.copy(SAVED / "text.jsonl", tmp_path)
    caplog.set_level(logging.WARNING, logger="quietstar.config")  # commands of other tests set it
    config = load_config(tmp_path / "run" / "config.yaml")
    assert (config.optim.learning_rate, config.training.max_steps) == (0.01, 6)
    assert "optim.lr -> optim.learning_rate" in caplog.text
    run_training(config, resume="auto")
    losses = {
        name: [
            record["loss"]
            for record in map(json.loads, path.read_text().splitlines())
            if record["kind"] == "train" and record["step"] > 3
        ]
        for name, path in (
            ("before", SAVED / "recorded.jsonl"),
            ("now", tmp_path / "run" / "metrics.jsonl"),
        )
    }
    assert losses["now"] == pytest.approx(losses["before"], rel=1e-4)


def test_a_config_of_ones_own_by_old_names_is_refused_with_the_new_ones(tmp_path):
    (tmp_path / "mine.yaml").write_text("optim: {lr: 0.1}\ntraining: {steps: 3}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "mine.yaml")
    assert "optim.lr: renamed; write optim.learning_rate" in str(caught.value)
    assert "training.steps: renamed; write training.max_steps" in str(caught.value)
