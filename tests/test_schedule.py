"""Thoughts whose length and lookahead change over a stage: `thoughts.schedule`."""

import json

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from tiny import read_metrics, run_config

from quietstar.config import ThoughtsConfig
from quietstar.errors import UserError
from quietstar.training.run import run_training
from quietstar.training.stages import scheduled

POINTS = [{"step": 2, "length": 3}, {"step": 3, "length": 2, "lookahead": 1}]
SHORTER = {
    "thoughts__length": 5,
    "thoughts__lookahead": 3,
    "thoughts__schedule": POINTS,
    "training__max_steps": 4,
}


def run(folder, resume=None, **changes):
    folder.mkdir(exist_ok=True)
    run_training(run_config(folder, **changes), resume=resume)
    return folder / "run"


def limits(folder):
    records = read_metrics(folder, "train")
    return [(record["length_limit"], record["lookahead"]) for record in records]


def thoughts_at(step, **changes):
    thoughts = scheduled(ThoughtsConfig(**changes), step)
    return thoughts.length, thoughts.lookahead


def test_points_say_lengths_and_lookaheads():
    points = [{"step": 2, "length": 8}, {"step": 4, "length": 2, "lookahead": 4}]
    given = {"length": 16, "lookahead": 8, "schedule": points}
    wanted = [(16, 8), (16, 8), (8, 8), (8, 8), (2, 4), (2, 4)]
    assert [thoughts_at(step, **given) for step in range(6)] == wanted
    given["schedule"] = [{"step": 0, "length": 2}, {"step": 4, "length": 6}]  # begins lower
    assert [thoughts_at(step, **given) for step in (0, 3, 4, 100)] == [(2, 8)] * 2 + [(6, 8)] * 2


def test_a_run_thinks_as_scheduled_and_saves_its_last_thoughts(tmp_path):
    folder = run(tmp_path, **SHORTER)
    assert limits(folder) == [(5, 3), (5, 3), (3, 3), (2, 1)]
    saved = json.loads((folder / "final" / "quietstar.json").read_text())["thoughts"]
    assert (saved["length"], saved["lookahead"], saved["schedule"]) == (2, 1, [])
    speeds = [r["thought_tokens_per_second"] * r["seconds"] for r in read_metrics(folder, "train")]
    text = [r["text_tokens_per_second"] * r["seconds"] for r in read_metrics(folder, "train")]
    drawn = [2 * x * limit for x, (limit, _) in zip(text, limits(folder), strict=True)]
    assert speeds == pytest.approx(drawn)


@pytest.mark.parametrize("positions", ["all", "random"])
def test_micro_batches_change_nothing(tmp_path, positions):
    given = {**SHORTER, "thoughts__positions": positions, "data__loss_on": "answer"}
    given |= {"data__format": "qa", "data__train": write_questions(tmp_path / "qa.jsonl")}
    whole, parts = (
        read_metrics(run(tmp_path / str(size), **given, training__micro_batch_size=size), "train")
        for size in (8, 3)
    )
    for ours, theirs in zip(parts, whole, strict=True):
        for key in ("loss", "base_nll", "mixed_nll", "policy_reward"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6)


def write_questions(path):
    """Answers of one token after longer questions: the lookahead says where it pays to think."""
    rows = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a in range(5) for b in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_a_run_resumes_bit_for_bit_between_two_points(tmp_path):
    more = {**SHORTER, "training__save_steps": 1, "training__save_total_limit": 9}
    whole = run(tmp_path / "whole", **more)
    checkpoint = whole / "checkpoints" / "step-000002"
    part = run(tmp_path / "part", resume=str(checkpoint), **more)
    assert limits(part) == limits(whole)[2:]
    ours, theirs = (
        load_file(x / "final" / "language_model" / "model.safetensors") for x in (part, whole)
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"thoughts__schedule": [{"step": 1}]}, "must hold points such as"),
        ({"thoughts__schedule": [{"length": 1}]}, "must hold points such as"),
        ({"thoughts__schedule": [{"step": 1, "length": 0}]}, "of at least 1"),
        ({"thoughts__schedule": POINTS[::-1]}, "in the order of their steps"),
        ({"thoughts__schedule": [{"step": 1, "length": 9}]}, r"thoughts.length \(2\) must be at"),
        ({"thoughts__schedule": [{"step": 1, "lookahead": 9}]}, r"lookahead \(2\) must be at"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, changes, problem):
    with pytest.raises(ValidationError, match=problem):
        run_config(tmp_path, **changes)


def test_a_stop_text_must_fit_the_shortest_thoughts(tmp_path):
    with pytest.raises(UserError, match=r"takes at least 3 tokens, but thoughts.length \(2\)"):
        run(tmp_path, **SHORTER, thoughts__stop=["abc"])
    assert not (tmp_path / "run").exists()
