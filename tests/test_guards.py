"""Guards: each fires at its figure, once a stage, also after a resume, and may end a run."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from launching import launch
from tiny import read_metrics, run_config

from quietstar.config.loading import save_config
from quietstar.config.tree import fields
from quietstar.data import load_tokenizer
from quietstar.errors import UserError
from quietstar.model.outputs import QuietStarOutput, ThoughtMetrics
from quietstar.training import guards, reporter
from quietstar.training.guards import GUARDS, GuardState
from quietstar.training.reporter import Reporter
from quietstar.training.run import run_training
from quietstar.training.stages import plan_stages

HEALTHY = {
    "train": {
        "base_nll": 2.0, "mixed_nll": 1.9, "mixing_weight": 0.1, "entropy": 2.0,
        "distinct_token_ratio": 0.9, "identical_fraction": 0.1, "policy_reward_std": 0.5,
        "policy_reward": 0.5,
        "no_signal_fraction": 0.1, "thought_length": 8.0, "truncated_fraction": 0.5,
        "thought_logprob": -2.0,
    },
    "eval": {"base_nll": 2.0, "mixed_nll": 1.9, "thought_nll": 2.5, "gain": 0.1,
             "gain_of_content": 0.05, "gold_probability_without_thoughts": 0.1,
             "gold_probability_with_thoughts": 0.3, "gold_probability_swapped": 0.2},
}  # fmt: skip
BAD = {
    "thought_length": {"thought_length": 1.9},
    "truncated_fraction": {"truncated_fraction": 0.95},
    "entropy": {"entropy": 0.01},
    "identical_fraction": {"identical_fraction": 0.95},
    "distinct_token_ratio": {"distinct_token_ratio": 0.2},
    "reward": {"policy_reward": 0.05},
    "reward_std": {"policy_reward_std": 0.004},
    "no_signal_fraction": {"no_signal_fraction": 0.95},
    "mixing_weight": {"mixing_weight": -0.001},
    "thought_nll": {"thought_nll": 3.1},
    "gain_of_content": {"gain_of_content": -0.001},
    "content_of_answers": {"gold_probability_swapped": 0.31},
    "divergence": {"base_nll": 3.1, "thought_nll": 3.1},
}
ONCE = {"thoughts__positions": "answer_start", "data__format": "qa"}
WATCHED_WITH = {"reward": {"loss__reward": "prob"}, "content_of_answers": ONCE}
"""Settings without which a guard is not watched."""
BY_NAME = {guard.name: guard for guard in GUARDS}


def fed(state, source, *changes, begin=1):
    """Names of the guards that fire at each of some records that differ from healthy ones."""
    records = enumerate(changes, begin)
    return [[g.name for g in state.see(source, s, HEALTHY[source] | c)] for s, c in records]


@pytest.mark.parametrize("name", BY_NAME)
def test_a_guard_fires_at_its_own_figure_and_no_other_does(name, tmp_path):
    guard, state = BY_NAME[name], GuardState(run_config(tmp_path, **WATCHED_WITH.get(name, {})))
    ok = 30 if guard.source == "train" else 2
    fired = fed(state, guard.source, *[{}] * ok, *[BAD[name]] * 5)
    at = {"train": ok + 4, "eval": ok + guard.in_a_row - 1}[guard.source]
    assert fired == [[]] * at + [[name]] * (ok + 5 - at)


def test_one_odd_step_or_evaluation_does_not_warn(tmp_path):
    for guard in GUARDS:
        config = run_config(tmp_path, **WATCHED_WITH.get(guard.name, {}))
        state, odd = GuardState(config), BAD[guard.name]
        if guard.source == "train" or guard.in_a_row > 1:
            assert fed(state, guard.source, *[{}] * 30, odd, {}, {}, odd, {}) == [[]] * 35


def test_the_first_steps_and_the_evaluation_before_them_are_silent(tmp_path):
    state = GuardState(run_config(tmp_path), first_step=100)
    bad = BAD["entropy"]
    assert fed(state, "train", *[bad] * 21, begin=101) == [[]] * 20 + [["entropy"]]
    state = GuardState(run_config(tmp_path), first_step=100)
    bad = BAD["gain_of_content"]
    assert fed(state, "eval", bad, bad, bad, begin=100) == [[], [], ["gain_of_content"]]


PAUSE = {"thoughts__sampler": "pause", "loss__policy_weight": 0.0}
COLLAPSED = ("entropy", "identical_fraction", "distinct_token_ratio", "reward_std",
             "no_signal_fraction")  # fmt: skip
CONTENT = ("gain_of_content", "content_of_answers")


@pytest.mark.parametrize(
    ("settings", "source", "names"),
    [
        (PAUSE, "train", COLLAPSED),  # they are all the same
        (PAUSE, "eval", CONTENT),
        (PAUSE | ONCE, "eval", CONTENT),
        (ONCE, "eval", ("gain_of_content",)),
        ({}, "eval", ("content_of_answers",)),
        ({"mixing_head__fixed_weight": 0.0}, "train", ("mixing_weight",)),
    ],
)
def test_what_means_nothing_in_a_stage_is_not_watched(tmp_path, settings, source, names):
    state = GuardState(run_config(tmp_path, **settings))
    bad = {key: value for name in names for key, value in BAD[name].items()}
    assert fed(state, source, *[{}] * 9, *[bad] * 40) == [[]] * 49


def test_content_is_watched_where_thoughts_help(tmp_path):
    """And by the probability of the answer only where that is not too small."""
    no_gain = BAD["gain_of_content"] | {"gain": -0.1}
    assert fed(GuardState(run_config(tmp_path)), "eval", *[no_gain] * 5) == [[]] * 5
    once = run_config(tmp_path, **ONCE)
    no_gain = BAD["content_of_answers"] | {"gold_probability_without_thoughts": 0.3}
    small = {key: 1e-3 * x for key, x in HEALTHY["eval"].items() if key.startswith("gold_")}
    for bad in (no_gain, small | {"gold_probability_swapped": 4e-4}):
        assert fed(GuardState(once), "eval", *[bad] * 5) == [[]] * 5


def held_out(made, capsys, **figures):
    """What is printed of a held-out evaluation: the legend and the two lines of headings."""
    made.evaluation(0, figures)
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()[:3]]


def test_a_table_of_held_out_figures_has_those_that_say_most(tmp_path, capsys):
    answers = {"accuracy_without_thoughts": 0.1, "accuracy_with_thoughts": 0.4}
    figures = HEALTHY["eval"] | answers | {"accuracy_swapped": 0.2}
    once = run_config(tmp_path, **ONCE)
    assert held_out(make_reporter(tmp_path, once), capsys, **figures) == [
        "held out: probability of the answer, accuracies as shares",
        "step P(gold) P(gold) P(gold) accuracy accuracy accuracy",
        "without with swapped without with swapped",
    ]
    of_tokens = [
        "held out: NLLs and gains in nats/token, accuracies as shares",
        "step gain of gain of accuracy accuracy accuracy",
        "thinking content without with swapped",
    ]
    assert held_out(make_reporter(tmp_path), capsys, **figures) == of_tokens
    long = {key: 1e-9 for key in figures if key.startswith("gold_")}
    assert held_out(make_reporter(tmp_path, once), capsys, **(figures | long)) == of_tokens
    plain = {"base_nll": 2.0, "gold_probability_without_thoughts": 0.1,
             "accuracy_without_thoughts": 0.1}  # fmt: skip
    assert held_out(make_reporter(tmp_path, once), capsys, **plain)[1:] == [
        "step NLL accuracy", "without without",
    ]  # fmt: skip


def test_figures_that_are_missing_or_no_number_fire_nothing(tmp_path):
    state = GuardState(run_config(tmp_path))
    for step in range(1, 40):
        assert state.see("train", step, {"entropy": None, "reward_std": float("nan")}) == []
    assert state.value(BY_NAME["entropy"]) is None
    assert fed(GuardState(), "eval", {}, {"mixed_nll": float("nan")}) == [[], ["divergence"]]


def test_a_base_prediction_that_nothing_depends_on_may_be_unlearned():
    worse = BAD["divergence"] | {"mixing_weight": 1.0}
    assert fed(GuardState(), "eval", {}, worse) == [[], []]
    assert fed(GuardState(), "eval", {}, worse | {"mixed_nll": 3.0}) == [[], ["divergence"]]


def test_remedies_are_keys_that_exist_and_have_an_effect(tmp_path):
    known = fields()
    for guard in GUARDS:
        for keys in guard.remedies.values():
            assert set(keys) <= set(known)
    guard, config = BY_NAME["no_signal_fraction"], run_config(tmp_path)
    assert guard.describe(0.95, config).endswith(
        "Raise thoughts.temperature or thoughts.num_thoughts or mixing_head.floor."
    )
    fixed = run_config(tmp_path, mixing_head__fixed_weight=0.5)
    assert "mixing_head.floor" not in guard.describe(0.95, fixed)


def make_reporter(tmp_path, config=None, stage=0):
    config = config or run_config(tmp_path, training__max_steps=100)
    (tmp_path / "run").mkdir(exist_ok=True)
    stages = plan_stages(config)
    made = Reporter(config, Accelerator(cpu=True), load_tokenizer("bytes"), stages)
    made.begin_stage(stages[stage], [])
    return made


def report(made, step, **changes):
    one, means = torch.tensor(1), HEALTHY["train"] | changes
    metrics = ThoughtMetrics({name: (torch.tensor(v), one) for name, v in means.items()})
    made.step_begins()
    made.step_ends(step, 1.0, {"total": 1.0}, 0.1, QuietStarOutput(metrics=metrics))


def test_a_guard_that_fires_is_said_and_recorded_once(tmp_path, capsys):
    made = make_reporter(tmp_path)
    for step in range(1, 40):
        report(made, step, **(BAD["entropy"] if step > 25 else {}))
    said = [x for x in capsys.readouterr().out.splitlines() if x.startswith("warning:")]
    (record,) = read_metrics(tmp_path / "run", "guard")
    assert (record["name"], record["source"], record["step"]) == ("entropy", "train", 30)
    assert record["value"] == pytest.approx(0.01)
    assert said == [f"warning: step 30: {record['message']}"]
    assert "almost no entropy (0.010 nats a token)" in record["message"]
    assert made.collapse == f"entropy: {record['message']}"
    records, num_damaged = reporter.read_metrics(made.path)
    assert (len(records), num_damaged) == (40, 0)


@pytest.mark.parametrize("step", [28, 30, 33])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(step, tmp_path, capsys):
    made = make_reporter(tmp_path)
    for at in range(1, 40):
        report(made, at, **(BAD["entropy"] if at > 25 else {}))
    whole = read_metrics(tmp_path / "run")
    again = make_reporter(tmp_path)
    again.go_on(again.stage, step)
    assert [r["step"] for r in read_metrics(tmp_path / "run", "guard")] == [30] * (step >= 30)
    for at in range(step + 1, 40):
        report(again, at, **BAD["entropy"])
    records = read_metrics(tmp_path / "run")
    assert [(r["kind"], r["step"]) for r in records] == [(r["kind"], r["step"]) for r in whole]
    assert capsys.readouterr().out.count("almost no entropy") == 1 + (step < 30)


def test_a_guard_record_of_an_evaluation_that_comes_again_is_dropped(tmp_path):
    made = make_reporter(tmp_path)
    made.evaluation(0, HEALTHY["eval"])
    made.evaluation(100, HEALTHY["eval"] | BAD["divergence"])
    assert len(read_metrics(tmp_path / "run", "guard")) == 1
    again = make_reporter(tmp_path)
    again.go_on(again.stage, 100)
    assert read_metrics(tmp_path / "run", "guard") == []
    again.evaluation(100, HEALTHY["eval"] | BAD["divergence"])
    assert [r["name"] for r in read_metrics(tmp_path / "run", "guard")] == ["divergence"]


def test_records_of_guards_without_a_name_are_damaged(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"kind": "guard", "step": 1}) + "\n", encoding="utf-8")
    assert reporter.read_metrics(path) == ([], 1)


def test_a_run_may_end_at_its_collapse_and_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(guards, "UNCHECKED", {"train": 2, "eval": 0})
    always = replace(BY_NAME["entropy"], limit=100.0)
    monkeypatch.setattr(guards, "GUARDS", (always,))
    run_training(run_config(tmp_path, training__max_steps=6))  # only warns
    assert (tmp_path / "run" / "final").is_dir()
    shutil.rmtree(tmp_path / "run")

    config = run_config(tmp_path, training__max_steps=6, training__stop_on_collapse=True)
    pages = []
    with pytest.raises(UserError, match=r"training.stop_on_collapse: step 3: entropy: ") as error:
        run_training(config, on_report=lambda folder, status: pages.append(status))
    assert "\n" not in str(error.value)
    assert "step-000003" in str(error.value)
    assert pages[-1] == "stopped, step 3 of 6"
    assert [r["step"] for r in read_metrics(tmp_path / "run", "guard")] == [3]
    assert not (tmp_path / "run" / "final").exists()
    run_training(config, resume="auto")
    assert [r["step"] for r in read_metrics(tmp_path / "run", "train")] == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "run" / "final").is_dir()


@pytest.mark.slow
def test_two_ranks_end_together_at_a_collapse(tmp_path):
    config = run_config(tmp_path, training__max_steps=9, training__eval_steps=1,
                        training__stop_on_collapse=True, optim__learning_rate=5.0,
                        data__eval_sequences=6)  # fmt: skip
    save_config(config, tmp_path / "config.yaml")
    said = "training.stop_on_collapse: step"
    launch("ddp", tmp_path / "config.yaml", tmp_path / "run", refused=said)
    (record,) = read_metrics(tmp_path / "run", "guard")
    assert record["name"] == "divergence"
    step = record["step"]
    assert step < 9
    assert (tmp_path / "run" / "checkpoints" / f"step-{step:06d}" / "manifest.json").exists()
    assert read_metrics(tmp_path / "run", "train")[-1]["step"] == step
