"""The page of an evaluation, and all pages with charts in a browser."""

import json

import pytest
from test_inspection import browser, opened  # noqa: F401  (browser is a fixture)
from test_report import FILES, HOSTILE, THOUGHTS, Page, followed

from quietstar.reports import charts, pages, write_report
from quietstar.reports.evaluation import write_page
from quietstar.reports.run import CHARTS
from quietstar.reports.run_files import parse_metrics

METRICS = {"accuracy": 1.0, "gold_probability": 0.5, "nll": -0.3}


def variant(accuracy):
    values = {name: accuracy * scale for name, scale in METRICS.items()}
    bounds = {f"{name}_ci95": [accuracy * scale - 0.02, accuracy * scale + 0.03]
              for name, scale in METRICS.items()}  # fmt: skip
    return values | {f"{name}_stderr": 0.03 for name in METRICS} | bounds | {"n": 128}


def difference(value, low, high, p_value):
    result = {"ci95": [low / 2, high / 2], "p_value": p_value}
    for name, scale in METRICS.items():
        result[name] = value * scale
        result[f"{name}_ci95"] = sorted((low * scale, high * scale))
        result[f"{name}_p_value"] = p_value
    return result


def group(label, gain):
    return {"label": label, "n": 25, "gain": gain, "gain_ci95": [gain - 0.1, gain + 0.1]}


def item_group(label, gain):
    metrics = {name: gain * scale for name, scale in METRICS.items()}
    bounds = {f"{name}_ci95": [value - 0.1, value + 0.1] for name, value in metrics.items()}
    means = {name: abs(scale) / 3 for name, scale in METRICS.items()}
    return {"label": label, "n": 25, "without_thoughts": means, "with_thoughts": means,
            "gain": metrics | bounds, "gain_of_content": metrics | bounds}  # fmt: skip


def example(number, thought="16 - 7 = 9"):
    prompt = f"Q: {number} ducks lay eggs.\n" + "How many dollars does she make? " * 6 + "\nA:"
    return {"id": str(number), "prompt": prompt, "answer": "18", "thought": thought,
            "predicted": " 18", "with": 0.8, "without": 0.1}  # fmt: skip


VOTES = {"maj@8": {"mean": 0.5, "ci95": [0.4, 0.6]}, "pass@8": {"mean": 0.75, "ci95": None}}
TASK = {
    "n": 128,
    "main_metric": "gold_probability",
    "without_thoughts": variant(0.3),
    "with_thoughts": variant(0.41) | {"votes": VOTES, "samples": {"n": 8}},
    "difference": difference(0.11, 0.05, 0.17, 0.0004),
    "controls": {"shuffled": variant(0.39), "pause": variant(0.32), "swapped": variant(0.31)},
    "gain_of_content": difference(0.1, 0.04, 0.16, 0.002),
    "gain_over_shuffled": difference(0.02, -0.02, 0.06, 0.3),
    "gain_over_pause": difference(0.09, 0.03, 0.15, 0.004),
    "gates": [
        {
            "share": share,
            "entropy": 3.0 - 3 * share,
            "nll": 2.1 - share / 9,
            "passes": 1 + 8 * share,
        }
        for share in (0.0, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0)
    ],
    "breakdown": {
        "difficulty": [group("0 to 1", 0.1), group("1 to 9", 0.3)],
        "kind": [group("digits", 0.2)],
        "position": [group("0 to 15", 0.1), group(HOSTILE, 0.2)],
    },
    "groups": {
        "steps of the solution": [item_group("2", 0.1), item_group("10", 0.2)],
        "all alike": [item_group("1", 0.1)],
    },
    "examples": {
        "right": [example(1), example(2)],
        "wrong": [example(3, HOSTILE)],
        "helped": [example(4, "9 + 9") | {"is_right": False}],
        "hurt": [],
    },
    "warnings": ["2 items were longer than the model takes and were cut"],
    "verdict": "better with thoughts, and because of what they say",
}
RESULT = {
    "tasks": {"commonsense_qa": TASK, HOSTILE: TASK | {"breakdown": {}, "verdict": HOSTILE}},
    "environment": {"dtype": "float32", "device": "cpu", "torch": "2.9"},
    "config": {"seed": 0, "data_dir": None, "controls": True},
}


def test_the_page_of_an_evaluation_answers_first_and_shows_every_metric(tmp_path):
    page = Page(write_page(tmp_path / "new" / "e.html", HOSTILE, RESULT).read_text("utf-8"))
    assert page.open == []
    assert "what they say (by P(gold answer)) accuracy: 41.0% with" in page.text
    assert "41.0% with thoughts, 30.0% without, 31.0% with swapped thoughts. 128" in page.text
    assert "128 items; below each number is its 95% interval. Note: 2" in page.text
    drawn = "Without thoughts 0.1500 Without thoughts: 0.1500 (95% CI 0.1300 to 0.1800)"
    assert page.text.index(drawn) < page.text.index("metric without with")  # chart, then table
    assert "With swapped thoughts 0.1550" in page.text
    assert "swapped thoughts each item with the thought of another 0.1550" in page.text
    main = "P(gold answer) 0.1500 0.1300 to 0.1800 0.2050 0.1850 to 0.2350"
    assert f"{main} +0.0550 +0.0250 to +0.0850 < 0.001" in page.text
    assert "pause tokens one constant token in place of every thought token 0.3200" in page.text
    assert "controls yes" in page.text
    assert "data_dir" not in page.text
    assert "maj@8 of the sampled thoughts: 0.500 (0.400 to 0.600)" in page.text
    assert "pass@8 of the sampled thoughts: 0.750" in page.text
    assert "By steps of the solution" in page.text
    assert "10: with thoughts n 25, 0.3333 without, 0.3333 with +0.2000" in page.text
    assert "By all alike" not in page.text
    assert page.text.count("16 - 7 = 9 18 ✓ correct 0.1000 0.8000") == 2 * len(RESULT["tasks"])
    assert "18 ✗ wrong ground truth: 18" in page.text
    # A breakdown of one group says nothing that the whole does not say.
    groups = {f"task{n}-groups0-{metric}" for n in (1, 2) for metric in ("accuracy",
              "gold_probability")}  # fmt: skip
    assert page.charts == {"task1", "task1-difficulty", "task1-position", "task2"} | groups
    own = "0 to 1: with thoughts n 25 +0.1000"
    assert f"{own} 0 to 1: with thoughts: +0.1000 (95% CI +0.0000 to +0.2000)" in page.text
    assert page.text.count("Items that thoughts help and hurt most") == len(RESULT["tasks"])


def test_a_likelihood_is_drawn_as_what_it_gains_over_no_thoughts(tmp_path):
    task = TASK | {"main_metric": "nll", "breakdown": {"position": [
        {**group("a", 0.1), "gain_of_content": 0.4, "gain_of_content_ci95": [0.3, 0.5]},
        group("b", 0.2)]}}  # fmt: skip
    page = Page(write_page(tmp_path / "e.html", "m", RESULT | {"tasks": {"t": task}}).read_text())
    assert "Without thoughts −0.0900 +0.0000" in page.text
    assert "With thoughts −0.1230 +0.0330" in page.text
    assert "With swapped thoughts −0.0930 +0.0030" in page.text
    content = "with swapped thoughts content +0.4000, 95% CI +0.3000 to +0.5000 −0.3000"
    assert content in page.text


def test_a_difference_that_is_no_chance_never_reads_as_zero(tmp_path):
    task = TASK | {"difference": difference(0.00006, 0.00002, 0.0001, 0.0004)}
    page = Page(write_page(tmp_path / "e.html", "m", RESULT | {"tasks": {"t": task}}).read_text())
    assert "+3e−05 +1e−05 to +0.0001 < 0.001" in page.text
    few = RESULT | {"tasks": {"t": TASK | {"n": 2, "with_thoughts": variant(0.5)}}}
    page = Page(write_page(tmp_path / "g.html", "m", few).read_text())
    assert "accuracy: 1 of 2 with thoughts" in page.text


def test_no_text_of_an_evaluation_becomes_markup_or_script(tmp_path):
    page = Page(write_page(tmp_path / "e.html", HOSTILE, RESULT).read_text("utf-8"))
    assert page.scripts == [pages.asset("page.js")]
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)


def test_the_page_of_texts_has_a_table_of_gates_and_a_command(tmp_path):
    page = Page(write_page(tmp_path / "e.html", "m", RESULT).read_text("utf-8"))
    assert "quietstar generate --gate entropy:2.70" in page.text
    assert "think where the entropy is above tokens NLL passes/token" in page.text
    assert "2.250 nats 25.0% 2.0722 3.00" in page.text
    task = {name: value for name, value in TASK.items() if name != "gates"}
    page = Page(write_page(tmp_path / "f.html", "m", RESULT | {"tasks": {"t": task}}).read_text())
    assert "entropy" not in page.text


def test_runs_of_earlier_versions_are_read_by_the_names_of_today():
    line = {"kind": "eval", "step": 1, "accuracy_exchanged": 0.1, "reward_spread": 0.2,
            "alike": 0.3, "distinct": 0.4}  # fmt: skip
    (record,) = parse_metrics(json.dumps(line))
    assert dict(record.metrics) == {
        "accuracy_swapped": 0.1,
        "reward_std": 0.2,
        "identical_fraction": 0.3,
        "distinct_token_ratio": 0.4,
    }


def test_few_held_out_points_are_not_joined_across_a_training_line():
    entries = [{"kind": "train", "step": n, "mixing_weight": 0.1} for n in range(30)]
    (chart,) = (chart for chart in CHARTS if chart.name == "mixing-weight")
    for count, line in ((2, ""), (5, "thick")):
        held_out = [{"kind": "eval", "step": n, "mixing_weight": 0.1} for n in range(count)]
        records = parse_metrics("\n".join(map(json.dumps, entries + held_out)))
        _, marked = charts.draw_curves(chart, records)["panels"][0]["traces"]
        assert marked["line"] == line


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_pages_with_charts_in_a_browser(tmp_path, browser, scheme, width):  # noqa: F811
    for name, text in (FILES | followed(*THOUGHTS)).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    paths = [
        write_report(tmp_path),
        write_page(tmp_path / "e.html", "model", RESULT),
    ]
    for path in paths:
        errors = []
        page = opened(browser, path, errors, viewport={"width": width, "height": 900},
                      color_scheme=scheme)  # fmt: skip
        seen = "all => all.filter(plot => plot.getBoundingClientRect().height > 100).length"
        assert page.eval_on_selector_all(".plot", seen) == page.locator(".plot").count() > 0
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        if path.name == "report.html":
            row = page.locator("#thoughts tbody tr:visible")
            assert "thought of step 190" in row.inner_text()  # of one row, else this raises
            page.locator("#thoughts input").fill("0")
            assert "thought of step 0" in row.inner_text()
        if width == 1280:
            widths = "all => all.map(box => box.scrollWidth - box.clientWidth)"
            assert max(page.eval_on_selector_all(".scroll", widths)) <= 1, path
        assert errors == []
        page.close()
