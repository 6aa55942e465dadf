"""The report page: what it shows, what it leaves out, and that no text of a run can break it."""

import base64
import hashlib
import json
import math
from html.parser import HTMLParser

import pytest

from quietstar.errors import UserError
from quietstar.reports import charts, pages, write_report
from quietstar.reports.formats import show, wilson
from quietstar.reports.run import CHARTS
from quietstar.reports.run_files import RunFiles, parse_metrics
from quietstar.training.costs import duration

HOSTILE = "</script><script>alert(1)</script><img src=https://x.example/a onerror=alert(2)>"
HOSTILE += "{{ 7 * 7 }} \u2028 \ud800 & \" ' <b>"
VOID = ("meta", "link", "img", "br", "input", "hr", "col")


class Page(HTMLParser):
    """What a browser would make of the page: elements with attributes, their texts, scripts."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.open, self.scripts, self.texts = [], [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def ids(self):
        return [attributes["id"] for _, attributes in self.elements if "id" in attributes]

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    @property
    def charts(self):
        return {name.removeprefix("plot-") for name in self.ids if name.startswith("plot-")}


def train(step, stage, **metrics):
    return {"kind": "train", "stage": stage, "step": step, **metrics}


def evaluation(step, stage, **metrics):
    return {"kind": "eval", "stage": stage, "step": step, **metrics}


THINKING = {
    "base_nll": 1.5,
    "mixed_nll": 1.2,
    "thought_nll": 1.4,
    "gain": 0.3,
    "gain_of_content": 0.25,
    "gain_over_pause": 0.2,
    "mixing_weight": 0.4,
    "accuracy_without_thoughts": 0.31,
    "accuracy_with_thoughts": 0.92,
    "accuracy_exchanged": 0.12,
    "gold_probability_without_thoughts": 0.2,
    "gold_probability_with_thoughts": 0.8,
    "gold_probability_swapped": 0.1,
    "right_thoughts": 0.88,
}
RECORDS = [
    evaluation(0, "pretrain", base_nll=5.0, accuracy_without_thoughts=0.01),
    train(10, "pretrain", loss=2.0, base_nll=2.0, seconds=0.5, lr=0.1),
    evaluation(10, "pretrain", base_nll=2.0, accuracy_without_thoughts=0.3),
    evaluation(10, "think", **(THINKING | {"right_thoughts": 0.03, "gain_of_content": 0.0})),
    train(
        20,
        "think",
        **THINKING,
        reward=0.1,
        reward_spread=0.2,
        entropy=1.0,
        distinct=0.9,
        policy_reward=0.6,
    ),
    train(
        30,
        "think",
        **THINKING,
        reward=0.2,
        reward_spread=0.2,
        alike=0.1,
        entropy=0.9,
        thought_length=6.2,
        thought_length_p90=9.0,
        stop_fraction=0.8,
    ),
    evaluation(30, "think", **THINKING, reward=0.2),
]
RESULTS = {
    "accuracy": {
        "with_thoughts": 0.924,
        "without_thoughts": 0.312,
        "exchanged_thoughts": 0.12,
        "pause_thoughts": 0.33,
        "n": 500,
    },
    "right_thoughts": {"before": 0.03, "after": 0.88},
    "seconds": 5025,
}
SAMPLE = {
    "before": "17 + 25 = ",
    "thought": "7+5=12",
    "truth": "42",
    "without_thoughts": {"prediction": "41", "probability": 0.1},
    "with_thoughts": {"prediction": "42", "probability": 0.97},
    "mixing_weight": 0.8,
    "right_thought": True,
    "correct": True,
}
CONTROLS = {
    "seeds": [0, 1],
    "variants": [
        {
            "name": "full",
            "label": "Quiet-STaR",
            "accuracy": [0.9, 0.94],
            "mean": 0.92,
            "ci95": [0.88, 0.96],
            "right_thoughts": [0.8, 0.9],
        },
        {"name": "none", "label": "no thoughts", "accuracy": [0.3], "mean": 0.3, "ci95": None},
    ],
    "differences": [
        {"label": "Quiet-STaR minus no thoughts", "mean": 0.62, "ci95": [0.5, 0.7]},
        {"label": "no REINFORCE minus no thoughts", "mean": 0.01, "ci95": [-0.1, 0.1]},
    ],
}
FILES = {
    "config.yaml": "model:\n  name_or_path: tiny-llama\n",
    "metrics.jsonl": "".join(json.dumps(record) + "\n" for record in RECORDS),
    "results.json": json.dumps(RESULTS),
    "samples.json": json.dumps({"samples": [SAMPLE]}),
    "controls.json": json.dumps(CONTROLS),
}


@pytest.fixture
def report(tmp_path):
    """Writes the files into a folder, then the report of it; returns the page as parsed."""

    def make(files=FILES, name="my-run"):
        folder = tmp_path / name
        folder.mkdir()
        for file, text in files.items():
            (folder / file).write_text(text, encoding="utf-8")
        path = write_report(folder)
        assert path == folder / "report.html"
        return Page(path.read_bytes().decode("utf-8"))

    return make


def lines(*records):
    return {"metrics.jsonl": "".join(json.dumps(record) + "\n" for record in records)}


# --- What is shown --------------------------------------------------------------------------------


def test_a_full_folder_gives_every_section_and_chart(report):
    result = report(FILES | followed(*THOUGHTS))
    sections = ["glance", "thoughts", "guards", "curves", "controls", "samples", "evaluations",
                "config"]  # fmt: skip
    assert [name for name in result.ids if name in sections] == sections
    assert result.charts == {chart.name for chart in CHARTS} | {"now", "variants", "differences"}
    assert len(result.ids) == len(set(result.ids))
    assert result.open == []


def test_the_reward_of_an_objective_is_drawn_where_it_is_not_that_in_nats(report):
    for reward, is_drawn in ((0.5, False), (0.6, True)):
        steps = [train(step, "think", reward=0.5, policy_reward=reward) for step in range(1, 4)]
        drawn = report(lines(*steps), name=f"run-{reward}").charts
        assert ("objective-reward" in drawn) == is_drawn
        assert "reward" in drawn


def test_the_key_figures_stand_at_the_top(report):
    text = report().text
    top = text[: text.index("Markers: held out")]
    for metric in (
        "92.4%",
        "31.2%",
        "12.0%",
        "33.0%",
        "88.0% share of the sampled thoughts 3.0% before training",
        "500 held-out problems",
    ):
        assert metric in top
    assert "+61.2 points vs. no thoughts" in top
    assert "1 h 24 min" in top
    assert "tiny-llama" in top
    assert "pretrain → think" in top


def test_accuracy_comes_from_the_last_evaluation_without_results(report):
    text = report({"metrics.jsonl": FILES["metrics.jsonl"]}).text
    assert "Accuracy on held-out problems, step 30" in text
    assert "92.0%" in text
    assert "3.0% before training" in text


def test_no_own_and_swapped_thoughts_start_from_one_zero(report):
    records = [evaluation(1, "", base_nll=2.5, mixed_nll=2.5, gain=0.0),
               evaluation(5, "", base_nll=2.0, mixed_nll=1.9, swapped_mixed_nll=2.3, gain=0.1,
                          gain_of_content=0.4)]  # fmt: skip
    text = report(lines(*records)).text
    assert (
        "With thoughts NLL 1.900, 2.500 at step 1 +0.100 With thoughts: +0.100 "
        "Without thoughts NLL 2.000, 2.500 at step 1 +0.000 Without thoughts: +0.000 "
        "Swapped thoughts NLL 2.300 −0.300" in text
    )
    assert "step 5: swapped thoughts −0.3000" in text
    assert "step 5: without thoughts +0.0000" in text
    text = report(lines(evaluation(5, "", base_nll=2.0, mixed_nll=1.9, gain=0.1)), name="less").text
    assert "Swapped thoughts, and so the gain of content, were not measured." in text
    assert "Swapped thoughts were not measured here." in text


def test_samples_are_marked_in_words(report):
    text = report().text
    samples = text[text.index("17 + 25") :]
    assert samples.index("7+5=12 ✓ correct") < samples.index("41 ✗ wrong")
    assert samples.index("41 ✗ wrong") < samples.index("42 ✓ correct")
    assert "1 of 1 correct with thoughts, 0 without, 1 of 1 thoughts correct." in text


def test_a_long_text_before_a_sample_is_folded_to_its_end(report):
    before = "x" * 300 + "the end"
    files = FILES | {"samples.json": json.dumps({"samples": [SAMPLE | {"before": before}]})}
    result = report(files)
    assert before in result.texts
    assert any(t.startswith("…") and t.endswith("the end") and len(t) == 171 for t in result.texts)


def test_controls_are_listed_with_seeds_and_intervals(report):
    text = report().text
    full = "95% CI 88.0–96.0%, seeds 90.0% · 94.0%, correct thoughts 85.0% 92.0%"
    assert f"Quiet-STaR {full}" in text
    assert "no thoughts seeds 30.0% 30.0%" in text
    assert "Quiet-STaR minus no thoughts 95% CI +50.0 to +70.0, zero outside +62.0" in text
    assert "95% CI −10.0 to +10.0, zero inside +1.0" in text


def test_a_folder_of_controls_alone_is_enough(report):
    result = report({k: FILES[k] for k in ("controls.json", "config.yaml")})
    assert result.charts == {"variants", "differences"}
    assert "curves" not in result.ids


def drawn(chart, entries):
    return charts.draw_curves(chart, parse_metrics(lines(*entries)["metrics.jsonl"]))


def test_every_stage_has_a_panel_with_its_name_and_steps():
    chart = drawn(CHARTS[0], RECORDS)
    first, second = chart["panels"]
    assert (first["title"], second["title"]) == ("pretrain", "think")
    assert (first["share"], second["share"]) == (0.5, 1.0)  # one line in the first, three there
    steps = [{tuple(trace["x"]) for trace in panel["traces"]} for panel in (first, second)]
    assert steps == [{(0, 10)}, {(10, 30), (20, 30)}]
    names = [trace.label for trace in chart["legend"]]  # each once, in the order of the chart
    assert names == ["with thoughts", "without thoughts", "swapped thoughts"]


def test_a_loss_that_falls_from_far_above_does_not_set_the_axis():
    (chart,) = (chart for chart in CHARTS if chart.name == "nll")
    falling = [{"kind": "eval", "step": n, "base_nll": 50.0 if n < 3 else 1.0 + 0.01 * n}
               for n in range(12)]  # fmt: skip
    found = drawn(chart, falling)
    assert found["ticks"][0][1] == "1.04"
    assert found["ticks"][-1][1] == "1.1"
    marked = found["panels"][0]["traces"][0]["marked"]
    assert marked[0][2] == "step 4: without thoughts 1.0400"


def test_a_long_training_line_is_thinned_to_means_of_neighbours():
    steps = list(range(1, 1001))
    middles, means = charts.thinned(steps, [float(step) for step in steps])
    assert len(middles) <= charts.MAX_POINTS
    assert (middles[0], means[0]) == (4, 4.0)  # 1000 / 150 rounded up is 7: the mean of 1 to 7
    assert (middles[-1], means[-1]) == (997, 997.5)  # 1000 = 142 * 7 + 6: the mean of 995 to 1000


def test_a_page_is_small(report, tmp_path):
    steps = [train(n, "think", **THINKING, reward=0.1, entropy=1.0) for n in range(3000)]
    report(FILES | lines(*RECORDS, *steps), name="long")
    assert (tmp_path / "long" / "report.html").stat().st_size < 1_000_000


THOUGHTS = [
    {"stage": "think", "step": step, "samples": [SAMPLE | {"thought": f"thought of step {step}"}]}
    for step in range(0, 200, 10)
]


def followed(*records):
    return {"thoughts.jsonl": "".join(json.dumps(record) + "\n" for record in records) + '{"ste'}


def test_the_thoughts_in_a_text_are_shown_over_training(report):
    text = report(FILES | followed(*THOUGHTS)).text
    shown = text[text.index("Thoughts over training") :]
    steps = [n for n in range(0, 200, 10) if f"thought of step {n} ✓ correct 41 ✗ wrong" in shown]
    assert len(steps) == 12
    assert (steps[0], steps[-1]) == (0, 190)
    assert "With swapped thoughts" not in shown


def test_the_swapped_thought_stands_beside_the_own_one(report):
    other = {"swapped": {"thought": "1+1=2", "prediction": "40", "probability": 0.05}}
    second = THOUGHTS[1] | {"samples": [SAMPLE | other, SAMPLE | {"before": "more"}]}
    third = THOUGHTS[2] | {"samples": [SAMPLE | other, SAMPLE | {"before": "more"}]}
    result = report(FILES | followed(THOUGHTS[0], second, third))
    assert "7+5=12 ✓ correct 1+1=2 41 ✗ wrong P(gold) 10.0%" in result.text
    assert "42 ✓ correct P(gold) 97.0% 40 ✗ wrong P(gold) 5.0%" in result.text
    sliders = [a for tag, a in result.elements if tag == "input"]
    assert [slider["max"] for slider in sliders] == ["2", "1"]
    assert result.ids.index("thoughts") < result.ids.index("others") < result.ids.index("guards")


def test_thoughts_of_one_evaluation_show_no_course(report):
    damaged = [{**THOUGHTS[0], "step": "x"}, {**THOUGHTS[1], "samples": 3}]
    assert "Thoughts over training" not in report(FILES | followed(THOUGHTS[0], *damaged)).text


@pytest.mark.parametrize(
    ("metrics", "says"),
    [
        ({"gain": -0.01, "gain_of_content": 0.2}, "Thoughts do not help: the gain is −0.010 nats"),
        ({"gain": 0.1}, "gain +0.100 nats/token; the gain of content was not measured."),
        ({"gain": 0.1, "gain_of_content": 0.001}, "but swapped ones gain as much: it is not what"),
        ({"gain": 0.1, "gain_of_content": 0.05}, "+0.100 nats/token, swapped ones +0.050: what"),
        ({"gain": 0.139, "gain_of_content": 0.509},
         "Thoughts gain +0.139 nats/token, and swapped ones lose 0.370: what they say matters."),
        ({"accuracy_with_thoughts": 0.5, "accuracy_without_thoughts": 0.3, "accuracy_swapped": 0.1},
         "30.0% without; with swapped thoughts 10.0%, less than without: what the thoughts say"),
        ({"accuracy_with_thoughts": 0.9, "accuracy_without_thoughts": 0.1, "accuracy_swapped": 0.3},
         "Accuracy 90.0% with thoughts, 10.0% without; with swapped "
         "thoughts 30.0%, so 75% of the gain is what the thoughts say."),
        ({"accuracy_with_thoughts": 0.5, "accuracy_without_thoughts": 0.1, "accuracy_swapped": 0.5},
         "10.0% without, but swapped thoughts help as much: it is not what they say."),
        ({"base_nll": 1.0}, None),
    ],
)  # fmt: skip
def test_the_page_begins_with_the_result_in_a_sentence(report, metrics, says):
    result = report(
        lines(evaluation(5, "", base_nll=2.0, mixed_nll=1.9), evaluation(9, "", **metrics))
    )
    assert ("verdict" in [a.get("class") for _, a in result.elements]) == (says is not None)
    assert says is None or says in result.text


def test_a_difference_that_few_problems_cannot_tell_is_called_so(report):
    few = {"accuracy": {"with_thoughts": 0.6, "without_thoughts": 0.5, "n": 30}}
    text = report(FILES | {"results.json": json.dumps(few)}).text
    assert "a difference that 30 problems cannot tell from chance" in text


def test_a_share_of_very_few_problems_is_a_count_and_no_result(report):
    answers = {"accuracy_with_thoughts": 0.0, "accuracy_without_thoughts": 0.5}
    text = report(lines(evaluation(5, "", num_answers=2.0, base_nll=2.0, **answers))).text
    assert "2 held-out problems are too few to say whether thoughts help." in text
    assert "Accuracy on 2 held-out problems, step 5 With thoughts 0 of 2" in text
    assert "Without thoughts 1 of 2" in text
    assert "There are 2 of them, too few to tell." in text


def test_guards_are_listed_with_figure_threshold_and_where_they_fired(report):
    said = "thoughts have almost no entropy. Raise thoughts.temperature."
    fired = {"kind": "guard", "stage": "think", "step": 25, "name": "entropy", "message": said}
    damaged = [{**fired, "step": step} for step in (None, "x", -1, 1e999)]
    text = report(lines(*RECORDS, fired, {"kind": "guard"}, *damaged)).text
    text = text[text.index("Guards 1 of") : text.index("Markers: held out")]
    metrics = "entropy of the thought tokens, nats/token 0.950 at most 0.05"
    assert f"{metrics} ! fired at step 25, think {said}" in text
    assert text.count("fired at step") == 1
    assert "mixing weight, in absolute value 0.4000 at most 0.002 ✓ fine" in text
    assert "thought_length" in text


def test_a_figure_beyond_its_threshold_is_not_called_fine_though_no_guard_fired(report):
    records = [train(step, "a", entropy=0.01) for step in range(5)]
    text = report(lines(*records)).text
    assert "0.010 at most 0.05 beyond the threshold, not for long enough to warn" in text
    assert "None of 1 fired, 1 beyond the threshold" in text
    assert "fine" not in text
    text = report(lines(train(2, "a", truncated_fraction=1.0)), name="few").text
    assert "100% at least 90% beyond the threshold, not for long enough to warn" in text


ONCE = """\
model: {name_or_path: tiny-llama}
data: {train: texts.jsonl, format: qa}
thoughts: {positions: answer_start}
training: {output_dir: run}
"""


def test_one_thought_before_an_answer_is_told_by_the_answer(report):
    records = [evaluation(step, "train", **THINKING) for step in (0, 30)]
    fired = {"kind": "guard", "stage": "train", "step": 30, "name": "gain_of_content"}
    files = {**lines(*records, {**fired, "message": "An earlier version said so."})}
    text = report({**files, "config.yaml": ONCE}, name="once").text
    now = "P(gold answer), step 30 Mean over held-out problems. With thoughts 0.800"
    assert now in text
    assert "Swapped thoughts: 0.100" in text
    assert "Next tokens of held-out data" not in text
    assert text.count("of the first token of each answer alone") == 2
    assert "An earlier version said so." in text
    for metric in ("accuracy with", "P(gold answer) with", "P(gold answer) with swapped"):
        assert f"{metric} thoughts" in text
    other = report({**files, "config.yaml": ONCE.replace("answer_start", "all")}, name="all").text
    assert "Next tokens of held-out data, step 30" in other
    assert now not in other
    assert "of the first token of each answer alone" not in other


# --- What is left out -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "section"),
    [("config.yaml", "config"), ("samples.json", "samples"), ("controls.json", "controls")],
)
def test_a_missing_file_leaves_its_section_out(report, file, section):
    result = report({k: v for k, v in FILES.items() if k != file})
    assert section not in result.ids
    assert ("a", {"href": f"#{section}"}) not in result.elements
    assert "curves" in result.ids


def test_a_run_without_thoughts_has_only_its_own_charts(report):
    result = report(lines(*RECORDS[:3]))
    assert result.charts == {"accuracy", "nll"}
    assert "Gain" not in result.text
    assert "Swapped thoughts" not in result.text


def test_nulls_and_numbers_that_are_not_finite_count_as_missing(report):
    variant = {"name": "a", "accuracy": [None, math.nan], "mean": math.nan, "ci95": [0.1, math.inf]}
    sample = SAMPLE | {"right_thought": None, "mixing_weight": None, "truth": 42, "thought": None}
    files = lines({"kind": "eval", "step": 3, "base_nll": math.nan, "gain": None, "lr": "x"})
    files |= {
        "results.json": '{"accuracy": null, "right_thoughts": {"before": NaN}, "seconds": 1e999}',
        "controls.json": json.dumps({"variants": [variant], "differences": None}),
        "samples.json": json.dumps({"samples": [sample]}),
    }
    result = report(files)
    assert result.charts == set()
    assert "NaN" not in result.text
    assert "Weight" in result.text


# --- Damaged input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "end",
    ['{"kind": "eval", "step": 40, "base_n', "\n\n", "[]\n", "12\n", '{"kind": "eval"}\n', "\x00"],
)
def test_a_line_that_is_no_record_is_passed_over(report, end):
    result = report({"metrics.jsonl": FILES["metrics.jsonl"] + end})
    assert "step 30" in result.text


def test_a_line_cut_within_a_character_is_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(FILES["metrics.jsonl"].encode() + '{"kind": "eval", "stage": "ü'.encode()[:-1])
    assert len(RunFiles(tmp_path).records) == len(RECORDS)


def test_of_two_records_for_one_step_the_last_stays():
    twice = [evaluation(1, "a", gain=0.1), evaluation(2, "a"), evaluation(1, "a", gain=0.2)]
    records = parse_metrics(lines(*twice)["metrics.jsonl"])
    assert [(r.step, dict(r.metrics)) for r in records] == [(1, {"gain": 0.2}), (2, {})]


@pytest.mark.parametrize("kind", ["train", "eval"])
def test_one_record_is_enough(kind):
    (chart,) = (chart for chart in CHARTS if chart.name == "gain")
    (panel,) = drawn(chart, [{"kind": kind, "step": 7, **THINKING}])["panels"]
    assert panel["ticks"] == [(50.0, "7")]
    assert [len(trace["marked"]) for trace in panel["traces"]] == [1]


def test_a_folder_without_figures_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no metrics.jsonl and no controls.json") as error:
        write_report(tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / "metrics.jsonl").write_text('{"kind": "tr')
    with pytest.raises(UserError, match="no complete record yet"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("file", "text", "problem"),
    [
        ("results.json", '{"accuracy": ', "not valid JSON"),
        ("results.json", '{"accuracy": 3}', "accuracy: "),
        ("samples.json", "[1]", "content: "),
        ("samples.json", '{"samples": [{"correct": "perhaps"}]}', "samples.0.correct: "),
        ("controls.json", '{"seeds": ["a"]}', "seeds.0: "),
    ],
)
def test_a_damaged_file_is_named_in_one_line(report, file, text, problem):
    with pytest.raises(UserError) as error:
        report(FILES | {file: text})
    assert f"{file}: {problem}" in str(error.value)
    assert "\n" not in str(error.value)


# --- Hostile texts, and no network ----------------------------------------------------------------


def hostile(value):
    """The same structure with every text replaced."""
    if isinstance(value, dict):
        return {key: hostile(item) for key, item in value.items()}
    if isinstance(value, list):
        return [hostile(item) for item in value]
    return HOSTILE if isinstance(value, str) else value


def test_no_text_of_a_run_becomes_markup_or_script(report):
    plain = report()
    records = [record | {"stage": record["stage"] + HOSTILE} for record in RECORDS]
    records.append({"kind": "guard", "step": 9, **dict.fromkeys(("stage", "message"), HOSTILE),
                    "name": "entropy"})  # fmt: skip
    sample = hostile(SAMPLE) | {"before": HOSTILE * 9}
    files = lines(*records) | {
        "config.yaml": "model:\n  name_or_path: '" + HOSTILE.replace("'", "''")[:90] + "'\n",
        "results.json": FILES["results.json"],
        "samples.json": json.dumps({"samples": [sample]}),
        "controls.json": json.dumps(hostile(CONTROLS)),
    }
    files["config.yaml"] = files["config.yaml"].replace("\ud800", "")
    result = report(files, name="run <img src=x onerror=alert(3)> & co")
    tags = {tag for tag, _ in result.elements}
    assert tags <= {tag for tag, _ in plain.elements} | {"details", "summary"}
    assert result.scripts == plain.scripts
    assert not any(key.startswith("on") for _, found in result.elements for key in found)
    assert result.open == []
    assert "</script><script>alert(1)</script>" in result.text
    assert "{{ 7 * 7 }}" in result.text


def test_every_color_is_one_of_the_style_sheet():
    style = pages.asset("style.css")
    for color in {line.color for chart in CHARTS for line in chart.lines}:
        assert style.count(f"--{color}:") == 2  # light and dark


def test_nothing_is_loaded_from_a_network(report):
    result = report()
    for tag, attributes in result.elements:
        assert "src" not in attributes, tag
        assert attributes.get("href", "#").startswith(("#", "data:")), tag
    for name in ("style.css", "page.js", "thoughts.js"):
        source = pages.asset(name)
        assert not any(word in source for word in ("url(", "@import", "fetch(", "://"))


def test_the_policy_admits_only_the_scripts_of_the_page(report, monkeypatch):
    asset = pages.asset
    monkeypatch.setattr(
        pages, "asset", lambda name: "let a;\r\nlet b;\rlet c;" if ".js" in name else asset(name)
    )
    result = report()
    policies = [a["content"] for _, a in result.elements if "Content-Security" in str(a)]
    assert len(policies) == 1
    assert policies[0].startswith("default-src 'none';")
    (script,) = result.scripts
    assert "\r" not in script
    digest = hashlib.sha256(script.encode()).digest()
    assert f"'sha256-{base64.b64encode(digest).decode()}'" in policies[0]


# --- Numbers --------------------------------------------------------------------------------------


def test_numbers_as_texts():
    assert show(0.9244, ".1%") == "92.4%"
    assert show((0.1, 0.25), ".1%") == "10.0–25.0%"
    assert show(None) == "–"
    assert show(-0.0366, "+.4f") == "−0.0366"
    assert show(-0.00001, "+.4f") == "−1e−05"
    assert [duration(s) for s in (45.0, 2119.0, 5025.0)] == ["45 s", "35 min", "1 h 24 min"]


def test_the_interval_of_a_share_is_the_score_interval():
    # p = 1/2, n = 4, z² = 3.8415: middle 1/2, half z √(1/16 + z²/64) / (1 + z²/4) =
    # 1.95996 · √(0.0625 + 0.0600) / 1.96037 = 0.34996
    assert wilson(0.5, 4.0) == pytest.approx((0.15004, 0.84996), abs=2e-5)
    assert wilson(1.0, 10.0)[1] == pytest.approx(1.0)


def test_a_share_without_n_has_no_interval(report):
    files = lines(evaluation(1, "", accuracy_with_thoughts=0.1))
    assert wilson(0.5, None) is None
    text = report(files | {"results.json": '{"accuracy": {"with_thoughts": 0.5}}'}).text
    assert "Accuracy on held-out problems With thoughts 50.0% Curves" in text
