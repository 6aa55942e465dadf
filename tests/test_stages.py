"""Runs of several stages: config, order, weights handed on, resume between and inside stages."""

import json
import os
import signal
from statistics import fmean

import pytest
import torch
from safetensors.torch import load_file
from tiny import LLAMA, read_metrics

from quietstar.backbone.loading import load_base
from quietstar.config import Config
from quietstar.config.loading import load_config
from quietstar.data import build_data, load_tokenizer
from quietstar.errors import ConfigError, Preempted, UserError
from quietstar.model.quiet_star import QuietStarForCausalLM
from quietstar.reports import write_report
from quietstar.training import loop
from quietstar.training.build import notices
from quietstar.training.run import run_training
from quietstar.training.stages import plan_stages, stage_at


def staged_config(folder, **changes):
    """Two stages on a tiny synthetic task: 4 steps without thoughts, then 3 with."""
    tree = {
        "model": {"config": dict(LLAMA), "tokenizer": "synthetic:moves"},
        "data": {
            "train": "synthetic:moves",
            "format": "qa",
            "template": "{question} {answer}",
            "rationale_field": "rationale",
            "seq_len": 20,
            "eval_sequences": 8,
            "task_options": {"size": 64, "num_steps": 2},
        },
        "thoughts": {"length": 2, "lookahead": 1, "start_init": "—", "end_init": "—"},
        "optim": {"learning_rate": 0.01, "warmup_steps": 0},
        "training": {
            "global_batch_size": 4,
            "micro_batch_size": 4,
            "mixed_precision": "no",
            "cpu_threads": 1,
            "eval_steps": 0,
            "save_steps": 2,
            "save_total_limit": 20,
            "output_dir": str(folder),
        },
        "logging": {"report_to": [], "thought_steps": 0},
        "stages": {
            "pretrain": {"loss": {"objective": "next_token"}, "training": {"max_steps": 4}},
            "think": {"training": {"max_steps": 3}, "optim": {"learning_rate": 0.002}},
        },
    }
    for key, value in changes.items():
        section, name = key.split("__")
        tree.setdefault(section, {})[name] = value
    return Config.model_validate(tree)


def weights(folder):
    return {**load_file(folder / "final/language_model/model.safetensors"), **own_weights(folder)}


def own_weights(folder):
    return load_file(folder / "final/quietstar.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("staged") / "run"
    run_training(staged_config(folder), on_report=write_report)
    return folder


def test_steps_are_counted_over_the_whole_run(whole):
    train = read_metrics(whole, "train")
    assert [(r["stage"], r["step"]) for r in train] == [
        *(("pretrain", step) for step in (1, 2, 3, 4)),
        *(("think", step) for step in (5, 6, 7)),
    ]
    evals = [(r["stage"], r["step"]) for r in read_metrics(whole, "eval")]
    assert evals == [("pretrain", 0), ("pretrain", 4), ("think", 4), ("think", 7)]


def test_a_stage_starts_from_the_weights_of_the_one_before(whole):
    _, end, start, _ = read_metrics(whole, "eval")
    assert start["base_nll"] == pytest.approx(end["base_nll"], abs=1e-5)


def test_what_a_run_leaves(whole):
    results = json.loads((whole / "results.json").read_text(encoding="utf-8"))
    assert set(results["accuracy"]) >= {"with_thoughts", "without_thoughts", "n"}
    assert results["accuracy"]["n"] == 8
    assert set(results["right_thoughts"]) == {"before", "after"}
    samples = json.loads((whole / "samples.json").read_text(encoding="utf-8"))["samples"]
    assert len(samples) == 8
    assert samples[0]["before"].endswith("on")
    swapped = [one["swapped"] for one in samples]
    assert sorted(one["thought"] for one in swapped) == sorted(one["thought"] for one in samples)
    is_same = [
        one["thought"] == other["thought"] for one, other in zip(samples, swapped, strict=True)
    ]
    assert not all(is_same)
    own = [one["with_thoughts"]["probability"] for one in samples]
    assert is_same == [p == other["probability"] for p, other in zip(own, swapped, strict=True)]
    expected = read_metrics(whole, "eval")[-1]["gold_probability_swapped"]
    assert fmean(one["probability"] for one in swapped) == pytest.approx(expected, rel=1e-4)
    assert "<html" in (whole / "report.html").read_text(encoding="utf-8")


def test_the_vectors_start_as_the_learned_embedding_of_their_texts(whole, tmp_path):
    config = staged_config(tmp_path / "run")
    stages = {
        **config.stages,
        "think": {"optim": {"learning_rate": 1e-12, "embedding_learning_rate": 1e-12}},
    }
    stages["think"]["training"] = {"max_steps": 1}
    run_training(config.model_copy(update={"stages": stages}))
    saved = weights(tmp_path / "run")
    dash = saved["model.embed_tokens.weight"][_dash()]
    torch.testing.assert_close(saved["start_embedding"], dash, atol=1e-6, rtol=0)
    untrained = staged_config(tmp_path / "fresh").model_copy(update={"stages": {}})
    assert untrained.stage_configs().keys() == {"train"}


def _dash():
    from quietstar.data.synthetic import VOCABULARY

    return VOCABULARY.index("—")


@pytest.mark.parametrize("step", [2, 4, 6])
def test_resume_is_exact_inside_and_between_stages(whole, tmp_path, step):
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for checkpoint in (folder / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    run_training(staged_config(folder), resume="auto")
    assert same(weights(folder), weights(whole))
    kept = [
        {k: v for k, v in r.items() if k not in ("seconds", "peak_memory_mb")}
        for r in read_metrics(folder)
    ]
    expected = [r["step"] for r in read_metrics(whole)]
    assert [r["step"] for r in kept] == expected


def test_earlier_stages_keep_their_steps_on_resume(whole):
    changed = staged_config(whole)
    stages = {name: dict(part) for name, part in changed.stages.items()}
    stages["pretrain"] = {"loss": {"objective": "next_token"}, "training": {"max_steps": 5}}
    with pytest.raises(UserError, match=r"stages.pretrain.training.max_steps was 4, is 5"):
        run_training(changed.model_copy(update={"stages": stages}), resume="auto")


def test_other_stages_are_another_run_which_is_said_in_a_word(whole):
    config = staged_config(whole)
    with pytest.raises(UserError, match=r"--resume: stages were pretrain, .*, are none: that") as e:
        run_training(config.model_copy(update={"stages": {}}), resume="auto")
    assert "None" not in str(e.value)
    assert f"--config {whole / 'config.yaml'}" in str(e.value)


def test_the_folder_of_a_run_is_no_model(whole):
    for load in (load_tokenizer, load_base, QuietStarForCausalLM.from_pretrained):
        with pytest.raises(UserError, match=r"is the folder of a run. Give its model, .*final"):
            load(str(whole))


def test_a_run_killed_before_its_first_checkpoint_begins_anew(whole, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_bytes((whole / "config.yaml").read_bytes())
    (folder / "metrics.jsonl").write_text("", encoding="utf-8")
    (folder / "quietstar-run.json").write_bytes((whole / "quietstar-run.json").read_bytes())
    run_training(staged_config(folder), resume="auto")
    assert same(weights(folder), weights(whole))


@pytest.mark.parametrize("stage", ["pretrain", "think"])
def test_a_signal_at_either_side_of_a_boundary_loses_nothing(whole, tmp_path, monkeypatch, stage):
    folder, evaluate = tmp_path / "run", loop.evaluate

    def signaled(run):
        if run.stage.name == stage and run.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(run)

    config = staged_config(folder, training__save_steps=0)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", signaled)
        with pytest.raises(Preempted, match="step 4 is saved"):
            run_training(config)
    assert [f.name for f in (folder / "checkpoints").iterdir()] == ["step-000004"]
    run_training(config, resume="auto")
    places = [(r["kind"], r["stage"], r["step"]) for r in read_metrics(folder)]
    assert places == [(r["kind"], r["stage"], r["step"]) for r in read_metrics(whole)]
    assert same(weights(folder), weights(whole))


def test_stage_at_a_boundary_is_the_earlier_one(tmp_path):
    stages = plan_stages(staged_config(tmp_path))
    assert [stage.first_step for stage in stages] == [0, 4]
    assert [stage_at(stages, step).name for step in (0, 4, 5, 7)] == [
        "pretrain", "pretrain", "think", "think",
    ]  # fmt: skip


def test_pause_thoughts_are_constant(tmp_path):
    config = staged_config(tmp_path / "run")
    pause = {"thoughts": {"sampler": "pause"}, "loss": {"policy_weight": 0.0}}
    stages = {"think": {"training": {"max_steps": 2}, **pause}}
    run_training(config.model_copy(update={"stages": stages}))
    figures = read_metrics(tmp_path / "run", "eval")[-1]
    assert figures["gain_over_pause"] == pytest.approx(0.0, abs=1e-6)
    assert figures["gain_of_content"] == pytest.approx(0.0, abs=1e-6)


# --- Config ---------------------------------------------------------------------------------------


def write(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


BASE = """
model: {config: {model_type: llama}, tokenizer: bytes}
data: {train: "reasoning_gym:chain_sum", seq_len: 32}
"""
TWO = (
    BASE
    + """
stages:
  first:
    loss: {objective: next_token}
    training: {max_steps: 5}
  second:
    training: {max_steps: 7}
    thoughts: {length: 3}
"""
)


def test_a_stage_changes_its_keys_only(tmp_path):
    stages = load_config(write(tmp_path, TWO)).stage_configs()
    assert [s.training.max_steps for s in stages.values()] == [5, 7]
    assert [s.thoughts.length for s in stages.values()] == [8, 3]
    assert [s.data.seq_len for s in stages.values()] == [32, 32]


def test_the_command_line_wins_over_stages(tmp_path):
    path = write(tmp_path, TWO)
    overrides = ["--training.max_steps", "2", "--stages.second.thoughts.length", "4"]
    stages = load_config(path, overrides).stage_configs()
    assert [s.training.max_steps for s in stages.values()] == [2, 2]
    assert [s.thoughts.length for s in stages.values()] == [8, 4]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("thoughts: {lenght: 3}", "stages.second.thoughts.lenght: unknown key; did you mean"),
        ("thoughts: {length: 0}", "stages.second.thoughts.length: 0 must be greater"),
        ("model: {dtype: float32}", "stages.second.model.dtype: holds for the whole run"),
        ("training: {seed: 1}", "stages.second.training.seed: holds for the whole run"),
        ("thoughts: 3", "stages.second.thoughts: 3 must be a mapping of keys"),
        ("thoughts: {num_thoughts: 1}", "stages.second.thoughts.num_thoughts: thoughts.num"),
    ],
)
def test_mistakes_in_stages_are_named(tmp_path, text, expected):
    path = write(tmp_path, BASE + f"stages:\n  second:\n    {text}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert expected in str(caught.value)
    assert f"{path}:6: " in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--stages.third.thoughts.length", "3"], "names no stage (stages: first, second)"),
        (["--stages.second.thoughts.lenght", "3"], "did you mean --stages.second.thoughts.length"),
        (["--stages.second.model.dtype", "float32"], "write --model.dtype VALUE"),
    ],
)
def test_mistakes_in_overrides_of_stages_are_named(tmp_path, flags, expected):
    with pytest.raises(ConfigError, match="command line") as caught:
        load_config(write(tmp_path, TWO), flags)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"data__task_options": {"size": 64, "num_steps": 5}},
         "thoughts.length (2): shorter than the steps to an answer"),
        ({"thoughts__top_p": 1.0}, None),
        ({"thoughts__top_p": 0.9, "thoughts__top_k": 3},
         "thoughts.top_p (0.9) and thoughts.top_k (3): thought tokens are drawn from a truncated"),
    ],
)  # fmt: skip
def test_what_should_be_known_of_a_stage_is_said(tmp_path, changes, words):
    stage = plan_stages(staged_config(tmp_path, **changes))[-1]
    _, held_out, _ = build_data(stage.config.data, load_tokenizer("synthetic:moves"), 0)
    lines = notices(stage, held_out)
    assert len(lines) == (words is not None)
    assert all(words in line for line in lines)


def test_own_parts_of_later_stages_are_tried_before_the_first_step(tmp_path, monkeypatch):
    """And what they are tried on changes nothing."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "late_rewards.py").write_text(
        "def short(thoughts, scores):\n    return scores.mixed.sum((1, 2))\n\n\n"
        "def as_built_in(thoughts, scores):\n    from quietstar.rewards import thought\n"
        "    return thought.thought(thoughts, scores)\n"
    )
    bad = staged_config(tmp_path / "bad", loss__reward="late_rewards:short")
    with pytest.raises(UserError, match=r"late_rewards:short\): it returned a tensor of shape"):
        run_training(bad)
    assert not (tmp_path / "bad" / "metrics.jsonl").exists()
    own = run_training(staged_config(tmp_path / "own", loss__reward="late_rewards:as_built_in"))
    built_in = run_training(staged_config(tmp_path / "built_in", loss__reward="thought"))
    assert same(weights(own.parent), weights(built_in.parent))
