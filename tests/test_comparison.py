"""Runs compared over seeds: what is a group, its intervals by hand, and what is refused."""

import json
from pathlib import Path

import pytest
from test_report import Page
from test_stages import staged_config
from tiny import run_config

from quietstar.cli import main as cli
from quietstar.config.loading import save_config
from quietstar.errors import UserError
from quietstar.reports.comparison import CURVES, compare_runs, write_comparison
from quietstar.training.run import run_training


def write_run(folder, gain, seed, *, guards=(), **changes):
    """A run of 25 steps: its config, and what it reported at the start, a late step and the end."""
    folder.mkdir(parents=True)
    changes = {"training__max_steps": 25, "training__output_dir": str(folder), **changes}
    changes.setdefault("data__train", "texts.jsonl")
    save_config(run_config(folder, training__seed=seed, **changes), folder / "config.yaml")
    held_out = {"gain": gain, "gain_of_content": gain / 2, "accuracy_swapped": 0.5}
    records = [
        {"kind": "eval", "step": 0, "gain": 9.0, "mixed_nll": 1.5},
        {"kind": "train", "step": 21, "seconds": 2.0, "entropy": 1.0},
        *({"kind": "guard", "step": 21, "name": name, "message": "low"} for name in guards),
        {"kind": "train", "step": 25, "seconds": 4.0, "entropy": 1.0},
        {"kind": "eval", "step": 25, **held_out, "mixed_nll": 1.5},
    ]
    lines = [json.dumps({"stage": "train", **record}) + "\n" for record in records]
    (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def test_runs_that_differ_in_their_seed_are_a_group_with_an_interval(tmp_path):
    gains = {0: 0.9, 1: 1.0, 2: 0.8}
    runs = [write_run(tmp_path / f"demo-seed{s}", gain, s) for s, gain in gains.items()]
    other = write_run(
        tmp_path / "other", 0.1, 0, thoughts__num_thoughts=3, logging__logging_steps=2
    )
    demo, one = compare_runs([runs[2], other, runs[0], runs[1]])["groups"]
    assert (demo["name"], demo["seeds"], demo["settings"]) == ("demo", [0, 1, 2], {})
    # Mean 0.9, standard error 0.1 / sqrt(3), t(0.975, 2) = 4.3027.
    gain = demo["metrics"]["gain"]
    assert gain == {"n": 3, "mean": pytest.approx(0.9), "values": [0.9, 1.0, 0.8],
                    "ci95": pytest.approx([0.9 - 0.24841, 0.9 + 0.24841], abs=1e-5)}  # fmt: skip
    assert demo["metrics"]["gain_of_content"]["values"] == [0.45, 0.5, 0.4]
    assert demo["metrics"]["training_seconds"]["mean"] == 25 * 3.0
    assert (one["name"], one["seeds"]) == ("other", [0])
    assert one["settings"] == {"thoughts.num_thoughts": "3"}
    assert one["metrics"]["gain"]["ci95"] is None


def test_the_reward_in_training_is_a_curve_of_means(tmp_path):
    run = write_run(tmp_path / "run", 0.1, 0, training__max_steps=25)
    lines = [{"stage": "train", "kind": "train", "step": step, "policy_reward": step % 3 / 4}
             for step in range(1, 26)]  # fmt: skip
    last = (run / "metrics.jsonl").read_text().splitlines()[-1]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + last)
    (group,) = compare_runs([run])["groups"]
    steps, values = group["curves"][0]["policy_reward"]
    assert steps == [4, 7, 10, 13, 16, 19, 22, 25]
    assert values == [pytest.approx(0.25)] * 8
    page = Page(write_comparison(tmp_path / "page.html", compare_runs([run])).read_text("utf-8"))
    assert "Reward of the objective" in page.text
    assert "In training, smoothed" in page.text


def test_warnings_are_those_that_the_runs_gave(tmp_path):
    runs = [
        write_run(tmp_path / "a", 0.1, 0, guards=["entropy"]),
        write_run(tmp_path / "b", 0.1, 1, guards=["entropy", "divergence"]),
        write_run(tmp_path / "c", 0.1, 2),
    ]
    (group,) = compare_runs(runs)["groups"]
    assert group["warnings"] == {"divergence": 1, "entropy": 2}


def test_a_run_with_code_of_the_users_own_is_compared_without_running_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    run = write_run(tmp_path / "brief", 0.1, 0)
    config = (run / "config.yaml").read_text()
    assert "reward: thought" in config
    assert "objective: quiet_star" in config
    (run / "config.yaml").write_text(config.replace("reward: thought", "reward: gone:brevity"))
    (group,) = compare_runs([run])["groups"]
    assert group["metrics"]["gain"]["mean"] == 0.1
    (run / "config.yaml").write_text(
        config.replace("objective: quiet_star", "objective: of_a_run:Mine")
    )
    (tmp_path / "of_a_run.py").write_text(
        "from quietstar.objectives.quiet_star import QuietStar\nclass Mine(QuietStar): pass\n"
    )
    with pytest.raises(UserError, match=r"of_a_run:Mine.*names code.*--trust-code"):
        compare_runs([run])
    (group,) = compare_runs([run], trust_code=True)["groups"]
    assert group["metrics"]["gain"]["mean"] == 0.1


def test_the_page_shows_thoughts_of_each_run(tmp_path):
    runs = [
        write_run(tmp_path / "a", 0.1, 0),
        write_run(tmp_path / "b", 0.2, 0, thoughts__num_thoughts=3),
    ]
    for run, thought in zip(runs, ("much where", ". . ."), strict=True):
        entry = {"stage": "train", "step": 25, "samples": [{"before": "now", "thought": thought}]}
        (run / "thoughts.jsonl").write_text(json.dumps(entry) + "\n")
    page = Page(write_comparison(tmp_path / "page.html", compare_runs(runs)).read_text("utf-8"))
    assert "a now much where" in page.text
    assert "b now . . ." in page.text


def test_models_that_lie_in_folders_of_the_seed_are_the_same_setting(tmp_path):
    runs = [
        write_run(tmp_path / f"seed-{seed}" / "full", 0.1, seed,
                  model__config=None, model__name_or_path=f"x/seed-{seed}/start")
        for seed in (1, 12)
    ]  # fmt: skip
    (group,) = compare_runs(runs)["groups"]
    assert (group["name"], group["seeds"]) == ("full", [1, 12])


def test_what_is_no_finished_run_is_refused_in_one_line(tmp_path, capsys):
    run = write_run(tmp_path / "run", 0.1, 0)
    twin = write_run(tmp_path / "twin", 0.1, 0, training__save_steps=7)
    longer = write_run(tmp_path / "longer", 0.1, 0, training__max_steps=30)
    damaged = write_run(tmp_path / "damaged", 0.1, 0)
    (damaged / "config.yaml").write_text("thoughts: [")
    for folders, expected in (
        ([run, tmp_path], "has no config.yaml, so it is no run"),
        ([run, twin], f"has the settings and the seed (0) of {run}"),
        ([run, longer], "is evaluated up to step 25 of 30"),
        ([run, damaged], ""),
    ):
        assert cli.main(["report", *map(str, folders)]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"quietstar: error: RUN ({folders[-1]}): {expected}")
        assert err.count("\n") == 1


def test_the_command_prints_the_table_and_writes_the_figures(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    runs = [str(write_run(tmp_path / f"demo-{seed}", 0.1, seed)) for seed in (0, 1)]
    assert cli.main(["report", *runs, "--json", str(tmp_path / "all.json")]) == 0
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if "gain of content" in line)
    assert row.split()[-4:] == ["+0.0500", "+0.0500", "to", "+0.0500"]
    assert "warnings: none" in out
    assert json.loads((tmp_path / "all.json").read_text()) == compare_runs([*map(Path, runs)])


def test_the_page_compares_curves_and_says_which_run_is_best(tmp_path, capsys):
    runs = [write_run(tmp_path / f"demo-{seed}", 0.1 + seed / 1000, seed) for seed in (0, 1, 2)]
    runs += [write_run(tmp_path / f"<b>-{seed}", 0.3, seed, thoughts__num_thoughts=3)
             for seed in (0, 1)]  # fmt: skip
    out = tmp_path / "page.html"
    assert cli.main(["report", *map(str, runs), "--out", str(out)]) == 0
    assert "page: " in capsys.readouterr().out
    page = Page(out.read_text("utf-8"))
    assert page.open == []
    assert page.charts == {"gain_of_content", "gain", "mixed_nll"} - {"gain_of_content"}
    assert (
        "<b>: gain of content +0.1500 nats/token; demo: gain of content +0.0505 nats/token;"
        in page.text
    )
    assert "thoughts.num_thoughts: 3" in page.text
    assert page.text.count("demo <b> gain") == 0
    assert "<b>, seed 1, step 25: +0.3000" in page.texts


@pytest.mark.parametrize(
    ("seeds", "spread", "rest"),
    [
        (2, 0.1, "too few seeds to tell them apart."),
        (2, 0.001, "their 95% intervals do not overlap."),
        (3, 0.1, "their 95% intervals overlap."),
    ],
)
def test_the_verdict_needs_three_seeds_to_say_that_intervals_overlap(tmp_path, seeds, spread, rest):
    runs = [
        write_run(tmp_path / f"{name}-{seed}", gain + spread * seed, seed, **settings)
        for name, gain, settings in (("a", 0.1, {}), ("b", 0.3, {"thoughts__num_thoughts": 3}))
        for seed in range(seeds)
    ]
    page = Page(write_comparison(tmp_path / "page.html", compare_runs(runs)).read_text("utf-8"))
    assert rest in page.text


def test_a_run_that_does_not_think_is_compared_by_what_it_has(tmp_path):
    plain = write_run(tmp_path / "plain", 0.1, 0, loss__objective="next_token")
    metrics = [
        {"kind": "eval", "stage": "train", "step": step, "accuracy_without_thoughts": 0.7,
         "base_nll": 1.25}
        for step in (0, 25)
    ]  # fmt: skip
    (plain / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in metrics))
    result = compare_runs([write_run(tmp_path / "thinks", 0.1, 0), plain])
    page = Page(write_comparison(tmp_path / "page.html", result).read_text("utf-8"))
    verdict = "plain: NLL without thoughts 1.2500 nats/token; thinks: NLL with thoughts 1.5000"
    assert verdict in page.text
    assert "Held out, a line for each seed. plain: without thoughts." in page.text
    assert "plain, seed 0, step 25: 1.2500" in page.texts
    assert CURVES["mixed_nll"][1] == CURVES["gain"][1] == "nats/token"


def test_a_student_is_compared_without_thoughts(tmp_path):
    student = write_run(tmp_path / "student", 0.1, 0, loss__objective="distill")
    metrics = [
        {"kind": "eval", "stage": "train", "step": step, "base_nll": 1.25, "mixed_nll": 0.5,
         "accuracy_without_thoughts": 0.25, "accuracy_with_thoughts": 0.75}
        for step in (0, 25)
    ]  # fmt: skip
    (student / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in metrics))
    result = compare_runs([student])
    page = Page(write_comparison(tmp_path / "page.html", result).read_text("utf-8"))
    assert "student: accuracy 25.0%" in page.text
    assert "student, seed 0, step 25: 25.0%" in page.texts
    assert "student, seed 0, step 25: 1.2500" in page.texts
    assert not any("step 25: 75.0%" in t or "step 25: 0.5000" in t for t in page.texts)


def test_the_page_of_one_run_is_written_anew(tmp_path, capsys):
    run = write_run(tmp_path / "run", 0.1, 0)
    assert cli.main(["report", str(run)]) == 0
    assert str(run / "report.html") in capsys.readouterr().out
    assert "Quiet-STaR report" in (run / "report.html").read_text("utf-8")
    assert cli.main(["report", str(run), "--out", str(tmp_path / "x.html")]) == 2
    assert "Give more runs" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "give the folder of a run" in capsys.readouterr().err


def test_a_real_run_of_several_stages_is_read(tmp_path):
    config = staged_config(tmp_path / "run", training__save_steps=0)
    run_training(config, more_runs=True)
    (group,) = compare_runs([tmp_path / "run"])["groups"]
    end = json.loads((tmp_path / "run" / "results.json").read_text())["held_out"]["after"]
    for key in ("accuracy_with_thoughts", "gain_of_content", "mixed_nll"):
        assert group["metrics"][key]["values"] == [end[key]]
    assert group["metrics"]["training_seconds"]["mean"] > 0
