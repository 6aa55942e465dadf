"""Evaluations compared item by item: metrics by hand, what is left out, and what is refused."""

import json

import numpy as np
import pytest
from scipy import stats
from test_report import Page

from quietstar.cli import main as cli
from quietstar.errors import UserError
from quietstar.evaluation.controls import WITH, WITHOUT
from quietstar.reports.paired import compare_evaluations, write_paired

SETTINGS = {"model": "runs/x", "weights": "0", "dtype": "float32", "limit": None}


def write_evaluation(path, right, *, variant=WITHOUT, task="sums.jsonl", tokens=2, main="nll",
                     more=(), **settings):  # fmt: skip
    """An evaluation whose items are right or not; its other metrics follow from that."""
    lines: list[dict] = [{"settings": {**SETTINGS, **settings}}]
    for number, is_right in enumerate(right):
        shares = np.atleast_1d(is_right).astype(float)
        metrics = {"nll": 2.0 - shares, "gold_probability": 0.1 + 0.5 * shares, "accuracy": shares}
        line = {"task": task, "item": number, "variant": variant, "answer": f" {number}.",
                "metrics": {name: values.tolist() for name, values in metrics.items()},
                "nll": [1.0] * tokens}  # fmt: skip
        if variant == WITHOUT:
            line["groups"] = {"steps": str(2 + number % 2)}
        lines.append({**line, **(more[number] if more else {})})
    items = path.with_suffix(".items.jsonl")
    items.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = {"tasks": {task: {"main_metric": main, "n": len(right)}}, "environment": {},
              "config": {**lines[0]["settings"], "batch_size": 4}}  # fmt: skip
    path.write_text(json.dumps(result))
    return path


def one_task(paths):
    (task,) = compare_evaluations(paths)["tasks"].values()
    return task


def test_differences_are_paired_by_item_and_tested(tmp_path):
    before = [1] * 6 + [0] * 34
    after = [0] * 2 + [1] * 4 + [1] * 15 + [0] * 19
    paths = [
        write_evaluation(tmp_path / "plain.json", before),
        write_evaluation(tmp_path / "thinks.json", after, variant=WITH),
    ]
    result = compare_evaluations(paths)
    task = result["tasks"]["sums.jsonl"]
    first, second = task["evaluations"]
    assert (task["n"], task["main_metric"], result["num_tests"]) == (40, "gold_probability", 1)
    assert (first["variant"], second["variant"]) == (WITHOUT, WITH)
    assert first["scores"]["accuracy"] == 6 / 40
    change = second["difference"]
    assert change["accuracy"] == pytest.approx(13 / 40)
    assert (change["accuracy_gained"], change["accuracy_lost"]) == (15, 2)
    assert change["accuracy_p_value"] == pytest.approx(stats.binomtest(2, 17).pvalue)
    assert change["gold_probability"] == pytest.approx(0.5 * 13 / 40)
    assert change["nll"] == pytest.approx(-13 / 40)
    assert second["verdict"] == "better"
    assert "difference" not in first
    # Groups are those that the evaluation without thoughts knows: even and odd items.
    groups = {group["label"]: group for group in task["groups"]["steps"]}
    assert groups["2"]["n"] == 20
    assert groups["2"]["accuracy"] == [np.mean(before[::2]), np.mean(after[::2])]


def test_the_order_of_files_decides_the_sign(tmp_path):
    low = write_evaluation(tmp_path / "low.json", [0] * 30)
    high = write_evaluation(tmp_path / "high.json", [1] * 20 + [0] * 10)
    assert one_task([low, high])["evaluations"][1]["verdict"] == "better"
    assert one_task([high, low])["evaluations"][1]["verdict"] == "worse"
    assert one_task([low, high])["evaluations"][1]["difference"]["accuracy"] == pytest.approx(2 / 3)


def test_p_values_are_corrected_for_their_number(tmp_path):
    first = write_evaluation(tmp_path / "a.json", [0] * 40)
    others = [write_evaluation(tmp_path / f"{count}.json", [1] * count + [0] * (40 - count))
              for count in (6, 12)]  # fmt: skip
    rows = one_task([first, *others])["evaluations"][1:]
    p_values = [row["difference"]["p_value"] for row in rows]
    assert [row["difference"]["p_holm"] for row in rows] == [
        pytest.approx(max(p_values[0], 2 * p_values[1])), pytest.approx(2 * p_values[1])
    ]  # fmt: skip


def test_several_thoughts_of_an_item_are_averaged_and_vote(tmp_path):
    samples = [[1, 0, 0, 1]] * 15 + [[0, 0, 0, 0]] * 15
    votes = [{"votes": {"maj@1": 0.5, "maj@4": 0.25, "pass@4": 1.0}}] * 15
    votes += [{"votes": {"maj@1": 0.0, "maj@4": 0.0, "pass@4": 0.0}}] * 15
    paths = [
        write_evaluation(tmp_path / "a.json", [0] * 30),
        write_evaluation(tmp_path / "b.json", samples, variant=WITH, more=votes),
        write_evaluation(tmp_path / "c.json", samples, variant=WITH, more=votes),
    ]
    change = one_task(paths[:2])["evaluations"][1]["difference"]
    assert change["accuracy"] == 0.25
    assert change["accuracy_test"] == "permutation, paired"
    assert "accuracy_gained" not in change
    assert "maj@4" not in change  # which the first has not
    scores = one_task(paths[1:])["evaluations"][0]["scores"]
    assert (scores["maj@4"], scores["pass@4"]) == (0.125, 0.5)
    assert "maj@1" not in scores
    json.dumps(scores, allow_nan=False)


def test_what_cannot_be_compared_is_left_out(tmp_path):
    long = write_evaluation(tmp_path / "long.json", [0, 1] * 30)
    short = write_evaluation(tmp_path / "short.json", [1, 1] * 15, tokens=3, limit=30)
    task = one_task([long, short])
    row = task["evaluations"][1]
    assert task["n"] == 30
    assert row["settings"] == {"limit": "30"}
    # Other tokens: their mean is another metric.
    assert {"accuracy", "gold_probability"} <= set(row["scores"])
    assert "nll" not in row["scores"]


def test_the_only_task_of_each_may_be_called_otherwise(tmp_path):
    bare = write_evaluation(tmp_path / "bare.json", [0] * 30, task="bare.jsonl")
    shown = write_evaluation(tmp_path / "shown.json", [1] * 30, task="shown.jsonl", variant=WITH)
    task = compare_evaluations([bare, shown])["tasks"]["bare.jsonl"]
    assert task["evaluations"][1]["difference"]["accuracy"] == 1.0
    assert task["groups"]["steps"][0]["accuracy"] == [0.0, 1.0]


def test_the_page_says_who_is_better_and_what_differs(tmp_path):
    first = write_evaluation(tmp_path / "plain.json", [0] * 30)
    second = write_evaluation(
        tmp_path / "thinks.json", [1] * 24 + [0] * 6, variant=WITH, dtype="bfloat16",
        more=[{"thought_length": 4.0, "truncated_fraction": 0.0}] * 30,
    )  # fmt: skip
    result = compare_evaluations([first, second])
    page = Page(write_paired(tmp_path / "page.html", result).read_text("utf-8"))
    assert "thinks against plain: better (right only in thinks: 24, only in plain: 0)" in page.text
    assert "only in plain: 0), P(gold answer) 0.5000 against 0.1000" in page.text
    assert "note: thinks: dtype bfloat16, unlike the first" in page.text
    assert "with thoughts, 4.0 tokens of thought" in page.text
    assert "By steps" in page.text


def test_settings_of_thoughts_are_no_difference_to_a_model_without_them(tmp_path):
    first = write_evaluation(tmp_path / "plain.json", [0] * 30, samples=1)
    settings = {"samples": 2, "generic": "Hm.", "seed": 1}
    second = write_evaluation(tmp_path / "thinks.json", [1] * 30, variant=WITH, **settings)
    assert one_task([first, second])["evaluations"][1]["settings"] == {"seed": "1"}


def test_the_command_prints_writes_and_never_replaces_what_it_reads(tmp_path, capsys):
    first = write_evaluation(tmp_path / "plain.json", [0] * 30)
    second = write_evaluation(tmp_path / "thinks.json", [1] * 24 + [0] * 6, dtype="bfloat16")
    out = tmp_path / "both.json"
    assert cli.main(["report", str(first), str(second), "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "thinks against plain: better (right only in thinks: 24, only in plain: 0)" in printed
    assert "note: thinks: dtype bfloat16, unlike the first" in printed
    assert json.loads(out.read_text())["tasks"]["sums.jsonl"]["n"] == 30
    for target in (first, first.with_suffix(".items.jsonl")):
        content = target.read_bytes()
        arguments = ["report", str(first), str(second), "--json", str(target), "--force"]
        assert cli.main(arguments) == 2
        assert target.read_bytes() == content


def test_what_is_no_evaluation_is_refused_in_one_line(tmp_path, capsys):
    first = write_evaluation(tmp_path / "a.json", [0] * 30)
    alone = write_evaluation(tmp_path / "alone.json", [0] * 30)
    alone.with_suffix(".items.jsonl").unlink()
    other = write_evaluation(tmp_path / "other.json", [0] * 30)
    items = other.with_suffix(".items.jsonl")
    items.write_text(items.read_text().replace('" 7."', '" 8."'))
    changed = write_evaluation(tmp_path / "changed.json", [0] * 30)
    changed.write_text(changed.read_text().replace("float32", "bfloat16"))
    empty = tmp_path / "empty.json"
    empty.write_text("{}")
    two = write_evaluation(tmp_path / "two.json", [0] * 30)
    text = two.read_text().replace('{"sums.jsonl"', '{"x": {"main_metric": "nll"}, "y.jsonl"')
    two.write_text(text)
    (tmp_path / "run").mkdir()
    for files, expected in (
        ([first], "is one evaluation, and there is no other to compare it with"),
        ([first, first], "is given twice"),
        ([first, tmp_path / "run"], "is no file of an evaluation"),
        ([first, alone], "has no alone.items.jsonl next to it"),
        ([first, other], "item 7 has the answer ' 8.', and in"),
        ([first, changed], "were made with another dtype (float32, now bfloat16)"),
        ([first, empty], "cannot be read (tasks: Field required)"),
        ([first, tmp_path / "none.json"], "No such file"),
        ([first, two], "shares no task with all others"),
    ):
        assert cli.main(["report", *map(str, files)]) == 2
        error = capsys.readouterr().err
        assert expected in error
        assert error.count("\n") == 1
    with pytest.raises(UserError, match="shares no item"):
        compare_evaluations([first, write_evaluation(tmp_path / "none.json", [])])
