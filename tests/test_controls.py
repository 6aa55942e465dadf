"""Controls: what each changes, equal compute, and the comparison's statistics by hand."""

import json

import pytest
from launching import launch, marked
from test_stages import staged_config
from tiny import plain_model, read_metrics, run_config

from quietstar.config.loading import load_config, save_config
from quietstar.errors import UserError
from quietstar.reports import write_report
from quietstar.training.controls import (
    TRAINED,
    check_comparable,
    matched_steps,
    run_controls,
    summarize,
    variant,
)
from quietstar.training.run import run_training


def last_stage(folder, **changes):
    return list(staged_config(folder, **changes).stage_configs().values())[-1]


def test_each_variant_changes_one_thing(tmp_path):
    stage = last_stage(tmp_path)
    start = tmp_path / "start"
    full, no_thoughts, equal_tokens, pause, no_reinforce = (
        variant(name, stage, start, 5, tmp_path / name, 31) for name in TRAINED
    )
    assert full.model.name_or_path == str(start)
    assert full.training.seed == 5
    assert full.thoughts == stage.thoughts
    assert full.loss == stage.loss
    assert no_thoughts.loss.objective == "next_token"
    assert equal_tokens.loss.objective == "next_token"
    assert (no_thoughts.training.max_steps, equal_tokens.training.max_steps) == (31, 3)
    assert (pause.thoughts.sampler, pause.loss.policy_weight) == ("pause", 0.0)
    assert pause.training.max_steps == full.training.max_steps
    assert no_reinforce.loss == stage.loss.model_copy(update={"policy_weight": 0.0})
    assert no_reinforce.thoughts == stage.thoughts


def test_equal_flops_are_those_that_the_run_has_counted(tmp_path):
    # 3 steps of 4 texts of 20 tokens, all of which think, T 2, A 1, K 2: for a token of text
    # 1 + 2 * 4 tokens forward and backward, and 2 * 2 forward: 3 * (9 + 4 / 3) = 31 steps.
    record = {"kind": "train", "seconds": 0.3, "text_tokens_per_second": 80 / 0.3,
              "thought_tokens_per_second": 320 / 0.3}  # fmt: skip
    assert matched_steps(last_stage(tmp_path), [record] * 3, 2) == 31
    # 2.5 of 20 tokens think, and thoughts have 1.5 tokens on average (ragged ones): 30 sampled
    # tokens and 20 thoughts, whose markers are 3 tokens: 3 * (80 + 30 + 60 + 10) / 80 = 6.75.
    record = {"kind": "train", "seconds": 2.0, "text_tokens_per_second": 40.0,
              "thought_tokens_per_second": 15.0, "positions_per_text": 2.5}  # fmt: skip
    held_out = {"kind": "eval", "step": 0}
    assert matched_steps(last_stage(tmp_path), [held_out, record], 3) == 7
    # A reference reads 80 tokens of text forward: 3 * (180 + 80 / 3) / 80 = 7.75; where thoughts
    # are compared with it 80 more for drawing and 90 in thoughts: 3 * (180 + 250 / 3) / 80 = 9.875;
    # with two inner epochs 170 more are learned: 3 * (350 + 250 / 3) / 80 = 16.25.
    rlp = {"loss__objective": "rlp", "loss__reference": "base"}
    assert matched_steps(last_stage(tmp_path, **rlp), [record], 3) == 8
    rlp["loss__kl_weight"] = 0.1
    assert matched_steps(last_stage(tmp_path, **rlp), [record], 3) == 10
    rlp["training__inner_epochs"] = 2
    assert matched_steps(last_stage(tmp_path, **rlp), [record], 3) == 17


def test_a_run_counts_what_equal_flops_are_made_of(tmp_path):
    config = staged_config(tmp_path / "run", training__save_steps=0)
    stage = variant("full", list(config.stage_configs().values())[-1], None, 0, tmp_path / "run")
    run_training(stage, more_runs=True)
    assert matched_steps(stage, read_metrics(tmp_path / "run"), 2) == 31


def results(full, other):
    def of(accuracy, right=None):
        more = {} if right is None else {"right_thoughts": {"before": 0.1, "after": right}}
        pair = {"with_thoughts": accuracy, "without_thoughts": accuracy, "n": 10}
        return {"accuracy": pair, **more}

    names = (*TRAINED[1:], "first_thoughts")
    return {"full": of(full, 0.9), **{name: of(other) for name in names}}


def test_means_and_intervals_over_seeds():
    summary = summarize({0: results(0.9, 0.2), 1: results(1.0, 0.1), 2: results(0.8, 0.3)})
    full = summary["variants"][0]
    # Mean 0.9, standard error 0.1 / sqrt(3), t(0.975, 2) = 4.3027.
    assert full["mean"] == pytest.approx(0.9)
    assert full["ci95"] == pytest.approx([0.9 - 0.24841, 0.9 + 0.24841], abs=1e-5)
    assert full["right_thoughts"] == [0.9, 0.9, 0.9]
    assert summary["variants"][1]["right_thoughts"] is None
    # Differences 0.7, 0.9, 0.5 of the same seeds.
    assert summary["differences"][0]["mean"] == pytest.approx(0.7)
    assert summary["differences"][0]["ci95"] == pytest.approx(
        [0.7 - 0.49683, 0.7 + 0.49683], abs=1e-5
    )


def test_one_seed_has_no_interval():
    summary = summarize({0: results(0.9, 0.2)})
    assert summary["variants"][0]["ci95"] is None


@pytest.mark.slow
def test_controls_of_a_tiny_run(tmp_path):
    config = staged_config(tmp_path / "run", training__save_steps=0)
    root = run_controls(config, 1, on_report=write_report)
    assert root == tmp_path / "run_controls"
    assert "<html" in (root / "report.html").read_text(encoding="utf-8")
    summary = json.loads((root / "controls.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in summary["variants"]] == [*TRAINED, "first_thoughts"]
    assert len(summary["differences"]) == 5
    steps = {
        name: load_config(root / "seed-0" / name / "config.yaml").training.max_steps
        for name in TRAINED
    }
    assert steps == {"full": 3, "no_thoughts": 31, "equal_tokens": 3, "pause": 3, "no_reinforce": 3}
    stamp = (root / "seed-0" / "pause" / "metrics.jsonl").stat().st_mtime_ns
    run_controls(staged_config(tmp_path / "run", training__save_steps=0), 1)
    assert (root / "seed-0" / "pause" / "metrics.jsonl").stat().st_mtime_ns == stamp
    other = staged_config(tmp_path / "run", training__save_steps=0, thoughts__num_thoughts=3)
    with pytest.raises(UserError, match=r"thoughts.num_thoughts was 2, is 3"):
        run_controls(other, 1)


def on_a_base(folder, method):
    """Changes of `staged_config` for a pretrained model."""
    plain_model().save_pretrained(folder)
    return {"model__config": None, "model__name_or_path": str(folder), "tuning__method": method}


def test_what_cannot_be_compared_is_refused(tmp_path):
    text = run_config(tmp_path)
    with pytest.raises(UserError, match=r"--controls: data.format \(text\)"):
        check_comparable(text, text)
    config = staged_config(tmp_path)
    first = next(iter(config.stage_configs().values()))
    with pytest.raises(UserError, match="--controls: the last stage has"):
        check_comparable(config, first)
    config = staged_config(tmp_path, **on_a_base(tmp_path / "base", "prefix"))
    last = list(config.stage_configs().values())[-1]
    with pytest.raises(UserError, match=r"tuning.method \(prefix\) must be full, galore or ad"):
        check_comparable(config, last)


@pytest.mark.slow
def test_variants_start_from_the_merged_adapters_of_the_stages_before(tmp_path):
    changes = on_a_base(tmp_path / "base", "lora")
    config = staged_config(tmp_path / "run", training__save_steps=0, **changes)
    root = run_controls(config, 1) / "seed-0"
    merged = str(root / "start" / "merged")
    for name in TRAINED:
        saved = load_config(root / name / "config.yaml")
        assert (saved.model.name_or_path, saved.tuning.method) == (merged, "lora")
    # Before its first step, every variant predicts as the stages before left the model.
    before, *others = (
        next(record for record in read_metrics(root / name) if record["kind"] == "eval")
        for name in ("full", "no_thoughts", "pause")
    )
    last = [record for record in read_metrics(root / "start") if record["kind"] == "eval"][-1]
    for record in (before, *others):
        assert record["base_nll"] == pytest.approx(last["base_nll"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [marked("zero2")])
def test_controls_on_two_processes_give_those_of_one(strategy, tmp_path):
    """The variants run one after another in the same processes, and rank 0 alone writes."""
    folder = tmp_path / "two"
    config = staged_config(folder, training__save_steps=0, training__micro_batch_size=2)
    save_config(config, tmp_path / "config.yaml")
    launch(strategy, tmp_path / "config.yaml", folder, "--controls", "1")
    run_controls(config.model_copy(update={"training": config.training.model_copy(
        update={"output_dir": str(tmp_path / "one")})}), 1)  # fmt: skip
    two, one = (
        json.loads((tmp_path / name / "controls.json").read_text(encoding="utf-8"))
        for name in ("two_controls", "one_controls")
    )
    assert two == one
    assert [row["name"] for row in two["variants"]] == [*TRAINED, "first_thoughts"]
    equal = load_config(tmp_path / "two_controls" / "seed-0" / "no_thoughts" / "config.yaml")
    assert equal.training.max_steps == 31
    assert not list(tmp_path.rglob("*.partial"))
