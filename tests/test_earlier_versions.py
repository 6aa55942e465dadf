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
from tiny import plain_model, random_texts, randomise_own_weights, think, thinking_model, tuning_by

from quietstar import QuietStarForCausalLM
from quietstar.config.loading import load_config
from quietstar.data import load_tokenizer
from quietstar.errors import ConfigError, UserError
from quietstar.model.mixing_head import MixingHead
from quietstar.training.run import run_training

SAVED = Path(__file__).with_name("saved_by_0.1.0")


def test_a_saved_model_thinks_what_it_thought():
    model = QuietStarForCausalLM.from_pretrained(SAVED / "final")
    assert model.thoughts.position_fraction == 0.5
    thoughts = think(
        model, torch.arange(40, 60)[None], num_thoughts=2, temperature=1.0, seed=5
    )  # fmt: skip
    expected = json.loads((SAVED / "expected.json").read_text())
    assert thoughts.tokens[0, :8].transpose(0, 1).tolist() == expected["tokens"]
    mixed = torch.tensor(expected["mixed"])
    torch.testing.assert_close(thoughts.mixed_logprobs[0, :8, :, 0].T, mixed, rtol=1e-4, atol=1e-5)


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


def of_0_2(folder, model, **changes):
    """Saves a model, and has its settings say what version 0.2.0 said."""
    model.save_pretrained(folder, load_tokenizer("bytes"))
    path = folder / "quietstar.json"
    settings = json.loads(path.read_text())
    settings["thoughts"] |= {"position_count": None, "scoring_model": None,
                             "schedule_type": "stepped", "schedule_min_gain": None}  # fmt: skip
    settings["mixing_head"] |= {"activation": "sigmoid", "hidden_size": None}
    options = settings["tuning"].pop("options")
    settings["tuning"] |= {
        "adapter_size": 64, "num_virtual_tokens": 16, "encoder_hidden_size": None,
        "galore_rank": 128, "galore_update_proj_gap": 200, "galore_scale": 0.25, **options,
    }  # fmt: skip
    for section, values in changes.items():
        settings[section] |= values
    path.write_text(json.dumps(settings))
    return folder


def thinks_alike(model, loaded):
    texts = random_texts(2, 9)
    ours, theirs = (think(m.eval(), texts, num_thoughts=2, seed=3) for m in (model, loaded))
    assert torch.equal(ours.tokens, theirs.tokens)
    assert torch.equal(ours.mixed_logprobs, theirs.mixed_logprobs)


@pytest.mark.parametrize("method", ["full", "prompt", "prefix", "houlsby"])
def test_a_model_that_0_2_saved_thinks_what_it_thought(method, tmp_path):
    plain_model().save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    model = thinking_model(base, tuning=tuning_by(method), thoughts={"positions": "random"})
    randomise_own_weights(model)
    schedule = {"position_count": 3, "schedule_type": "linear", "schedule_min_gain": 0.9}
    loaded = QuietStarForCausalLM.from_pretrained(of_0_2(tmp_path / "m", model, thoughts=schedule))
    thinks_alike(model, loaded)
    assert loaded.thoughts.position_fraction == 3
    assert loaded.tuning.method_options == model.tuning.method_options


@pytest.mark.parametrize(
    ("hidden", "initial_weight", "activation"),
    [(8, 0.12, "sigmoid"), (None, 0.0, "none"), (40, 0.0, "none")],
)
def test_a_head_of_0_2_keeps_its_width_and_its_last_layer(
    hidden, initial_weight, activation, tmp_path
):
    model = thinking_model(head={"initial_weight": initial_weight})
    if hidden is not None:
        model.mixing_head = MixingHead(16, model.mixing_head_config, hidden)
    randomise_own_weights(model)
    head = {"activation": activation, "hidden_size": hidden}
    folder = of_0_2(tmp_path / "m", model, mixing_head=head)
    loaded = QuietStarForCausalLM.from_pretrained(folder)
    thinks_alike(model, loaded)
    assert loaded.mixing_head.sigmoid == (activation == "sigmoid")
    loaded.save_pretrained(tmp_path / "again", load_tokenizer("bytes"))
    thinks_alike(model, QuietStarForCausalLM.from_pretrained(tmp_path / "again"))


@pytest.mark.parametrize(
    ("section", "values"),
    [("thoughts", {"scoring_model": "small"}), ("mixing_head", {"activation": "no\nsuch"})],
)
def test_a_model_that_asks_for_what_is_gone_is_refused_in_one_line(section, values, tmp_path):
    folder = of_0_2(tmp_path / "m", thinking_model(), **{section: values})
    ((name, _),) = values.items()
    with pytest.raises(UserError, match=rf"quietstar.json: {section}.{name} \(.*is gone") as caught:
        QuietStarForCausalLM.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_a_config_of_ones_own_by_old_names_is_refused_with_the_new_ones(tmp_path):
    (tmp_path / "mine.yaml").write_text("optim: {lr: 0.1}\ntraining: {steps: 3}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "mine.yaml")
    assert "optim.lr: renamed; write optim.learning_rate" in str(caught.value)
    assert "training.steps: renamed; write training.max_steps" in str(caught.value)
