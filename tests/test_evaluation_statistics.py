"""Statistics of evaluations: intervals and tests against values worked out otherwise."""

import itertools
import math

import numpy as np
import pytest

from quietstar.evaluation.runner import majority, vote_metrics
from quietstar.evaluation.statistics import (
    break_down,
    by_group,
    choose_main_metric,
    correct_for_many,
    difference,
    differences,
    draw_examples,
    interval,
    items_needed,
    kind_of,
    means,
    sweep_entropy,
    verdict,
    warnings,
)
from quietstar.evaluation.tasks import Item, find_task, read_answer, read_number


def column(values):
    return np.array(values, dtype=float)[:, None]


def test_right_or_wrong_is_tested_by_the_exact_mcnemar_test():
    after, before = column([1] * 9 + [0] * 11), column([0] * 7 + [1] * 2 + [0] * 10 + [1])
    found = difference(after, before, seed=0)
    tail = sum(math.comb(8, k) for k in (0, 1)) / 2**8  # 7 gained, 1 lost
    assert found["p_value"] == pytest.approx(2 * tail)
    assert found["test"] == "McNemar, exact"
    assert found["value"] == pytest.approx(6 / 20)


def test_probabilities_are_tested_by_a_paired_permutation():
    gaps = np.array([0.3, 0.1, 0.25, -0.05, 0.2])
    found = difference(column(gaps + 0.5), column(np.full(5, 0.5)), seed=0)
    signs = itertools.product((1, -1), repeat=5)
    extreme = [abs((gaps * sign).mean()) >= gaps.mean() - 1e-12 for sign in signs]
    assert found["p_value"] == pytest.approx(sum(extreme) / len(extreme))


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    held = 0
    for trial in range(120):
        gaps = rng.normal(0.1, 1.0, 40)
        low, high = difference(column(gaps), column(np.zeros(40)), seed=trial)["ci95"]
        held += low <= 0.1 <= high
    assert 105 <= held <= 120  # 0.95 * 120 = 114


def test_the_spread_over_thoughts_is_told_apart_from_that_over_items():
    rng = np.random.default_rng(0)
    items = rng.normal(0, 2.0, (4000, 1))
    found = means({"nll": items + rng.normal(0, 0.5, (4000, 8))}, "nll")
    spread = found["samples"]["nll"]
    assert spread["stdev_between_items"] == pytest.approx(2.0, rel=0.05)
    assert spread["stdev_between_thoughts"] == pytest.approx(0.5, rel=0.05)
    assert found["stderr"] == pytest.approx(math.sqrt((4 + 0.25 / 8) / 4000), rel=0.05)


def test_shares_have_exact_intervals_and_other_means_bootstrapped_ones():
    low, high = interval(np.array([1.0] * 3 + [0.0] * 17), seed=0)

    def at_least(count, share):
        return sum(math.comb(20, k) * share**k * (1 - share) ** (20 - k) for k in range(count, 21))

    assert at_least(3, low) == pytest.approx(0.025)
    assert 1 - at_least(4, high) == pytest.approx(0.025)
    low, high = interval(np.zeros(20), seed=0)
    assert (low, high) == (0, pytest.approx(1 - 0.025 ** (1 / 20)))
    values = np.random.default_rng(0).normal(1, 0.5, 200)
    low, high = interval(values, seed=0)
    assert (low, high) == pytest.approx((values.mean() - 0.069, values.mean() + 0.069), abs=0.01)
    assert interval(values[:1], seed=0) is None


def test_one_item_and_equal_items_have_no_interval_to_speak_of():
    one = difference(column([0.5]), column([0.25]), seed=0)
    assert (one["value"], one["ci95"], one["p_value"]) == (0.25, None, None)
    same = difference(column([0.5, 0.6]), column([0.5, 0.6]), seed=0)
    assert (same["ci95"], same["p_value"], same["items_needed"]) == ((0.0, 0.0), 1.0, None)
    tiny = difference(column([0.0, 1e-49]), column([0.0, 0.0]), seed=0)
    assert tiny["ci95"] == (tiny["value"], tiny["value"])


def test_how_many_items_a_difference_takes():
    gaps = np.array([1.0, -1.0] * 50) + 0.1
    assert items_needed(gaps) == math.ceil((2.8016 / 0.1 * gaps.std(ddof=1)) ** 2) == 793
    found = {
        "n": 100, "main_metric": "accuracy", "truncated": 0,
        "difference": {"accuracy": 0.1, "ci95": (-0.1, 0.3), "p_value": 0.3, "items_needed": 793},
    }  # fmt: skip
    assert "100 items are too few" in warnings(found)[0]
    assert "about 793" in warnings(found)[0]
    assert warnings(found | {"n": 1000}) == []


@pytest.mark.parametrize(
    ("gain", "content", "words"),
    [
        ((0.01, 0.2), (0.02, 0.1), "because of what they say"),
        ((0.01, 0.2), (-0.02, 0.1), "swapped thoughts help as much"),
        ((-0.01, 0.2), (0.02, 0.1), "no difference that 50 items can tell"),
        ((-0.3, -0.1), (0.02, 0.1), "thoughts make it worse"),
    ],
)
def test_the_verdict_says_it_in_words(gain, content, words):
    found = {
        "n": 50, "main_metric": "gold_probability",
        "difference": {"gold_probability": sum(gain) / 2, "ci95": gain, "p_value": 0.01},
        "gain_of_content": {"gold_probability": sum(content) / 2, "ci95": content, "p_value": 0.01},
    }  # fmt: skip
    assert words in verdict(found)
    change = {"nll": -sum(gain) / 2, "ci95": (-gain[1], -gain[0]), "p_value": 0.01}
    of_content = {"nll": sum(content) / 2, "ci95": content, "p_value": 0.01}
    lower = {"n": 50, "main_metric": "nll", "difference": change, "gain_of_content": of_content}
    assert words in verdict(lower)


@pytest.mark.parametrize(("share", "says"), [(0.0, "no answer is right"), (0.01, "better with")])
def test_nothing_is_claimed_where_no_answer_is_right(share, says):
    found = {
        "n": 50, "main_metric": "gold_probability",
        "difference": {"gold_probability": 0.01, "ci95": (0.005, 0.02), "p_value": 0.001},
        "with_thoughts": {"gold_probability": 0.02, "accuracy": share},
        "without_thoughts": {"gold_probability": 0.01, "accuracy": 0.0},
    }  # fmt: skip
    assert says in verdict(found)


def test_a_gain_is_positive_where_own_thoughts_are_better_whatever_the_metric():
    own, control = column([0.2, 0.4, 0.1]), column([0.5, 0.5, 0.5])
    values = ({"nll": own, "accuracy": own}, {"nll": control, "accuracy": control})
    gains = differences(*values, "nll", seed=0, as_gain=True)
    plain = differences(*values, "nll", seed=0)
    assert gains["nll"] == pytest.approx(0.8 / 3) == -plain["nll"] == -gains["accuracy"]
    assert gains["ci95"] == pytest.approx(tuple(-x for x in plain["ci95"][::-1]), abs=0.05)


# --- Votes ----------------------------------------------------------------------------------------


def test_votes_are_means_over_all_subsets():
    numbers = ["3", "3", "5", None, "7", "5"]
    subsets = list(itertools.combinations(numbers, 3))
    wins = 0.0
    for subset in subsets:
        counts = {n: subset.count(n) for n in subset if n is not None}
        best = [n for n in counts if counts[n] == max(counts.values())]
        wins += ("3" in best) / len(best)
    assert majority(numbers, "3", 3) == pytest.approx(wins / len(subsets))
    found = vote_metrics(numbers, "3")
    assert next(iter(found)) == "maj@6"
    assert found["maj@1"] == pytest.approx(2 / 6)
    assert found["maj@6"] == 0.5  # 3 and 5 are tied
    some = sum("3" in subset for subset in itertools.combinations(numbers, 4))
    assert found["pass@4"] == pytest.approx(some / 15)
    assert vote_metrics(["5"] * 8, "3")["pass@4"] == 0.0
    assert vote_metrics([None], "3") == {"maj@1": 0.0}


@pytest.mark.parametrize(
    ("chain", "number"),
    [(" 18.", "18"), (" $1,800 a day 7", "1800"), (" -3", "-3"), (" 007", "7"), (" none", None)],
)
def test_the_first_integer_of_a_final_answer_is_read(chain, number):
    assert read_number(chain) == number


@pytest.mark.parametrize(
    ("task", "text", "answer"),
    [
        ("gsm8k", " 1,800 dollars\n7", "1800"),
        ("gsm8k", " none", None),
        ("commonsense_qa", " (B) bank. C", "B"),
        ("commonsense_qa", " Bank", None),
        ("own.jsonl", " a b \nmore", "a b"),
        ("own.jsonl", " (x) ", " (x)"),
    ],
)
def test_answers_are_read_by_the_kind_of_the_task(task, text, answer):
    item = Item("0", "question", " (x)", "place", labels=("A", "B", "C"))
    assert read_answer(find_task(task), item, text) == answer


# --- Breakdown ------------------------------------------------------------------------------------


def item_records(groups, base, own, swapped):
    """Records of items with one metric in three variants."""
    variants = {"without_thoughts": base, "with_thoughts": own, "swapped": swapped}
    return {
        variant: [
            {"id": str(number), "answer": "18", "groups": group, "prompt": f"question {number}",
             "metrics": {"accuracy": [value]}, "predicted": ["18"], "thought_texts": [["9"]]}
            for number, (group, value) in enumerate(zip(groups, values, strict=True))
        ]
        for variant, values in variants.items()
    }  # fmt: skip


def metric_values(records):
    return {
        variant: {"accuracy": np.array([record["metrics"]["accuracy"] for record in rows])}
        for variant, rows in records.items()
    }


def test_gains_within_groups_of_items():
    groups = [{"steps": str(n % 11), "kind": "ab"[n % 2]} for n in range(44)]
    own, base = [float(n % 2) for n in range(44)], [0.0] * 44
    records = item_records(groups, base, own, [0.5] * 44)
    found = by_group(records, metric_values(records), seed=0)
    first, second = found["kind"]
    assert (first["label"], first["n"], second["label"]) == ("a", 22, "b")
    assert second["with_thoughts"]["accuracy"] == second["gain"]["accuracy"] == 1.0
    assert second["gain_of_content"]["accuracy"] == 0.5
    assert first["gain_of_content"]["accuracy"] == -0.5
    assert second["gain"]["accuracy_ci95"] == (1.0, 1.0)
    # Eleven numbers are too many for groups of their own.
    assert found["steps"][0]["label"] == "0 to 1"
    assert sum(group["n"] for group in found["steps"]) == 44
    few = item_records([{"steps": str(n)} for n in (10, 2, 10)], base[:3], own[:3], base[:3])
    steps = by_group(few, metric_values(few), seed=0)["steps"]
    assert [(group["label"], group["n"]) for group in steps] == [("2", 1), ("10", 2)]


def test_examples_are_drawn_at_random_and_not_chosen():
    own = [float(n % 3 == 0) for n in range(60)]
    records = item_records([{}] * 60, [0.25] * 60, own, own)
    drawn = draw_examples(records, "accuracy", seed=0)
    assert {kind: len(examples) for kind, examples in drawn.items()} == {
        "right": 10, "wrong": 10, "helped": 5, "hurt": 5,
    }  # fmt: skip
    for kind in ("right", "wrong"):
        numbers = [int(example["id"]) for example in drawn[kind]]
        assert all((n % 3 == 0) == (kind == "right") for n in numbers)
        assert numbers != sorted(numbers)
    assert drawn["right"][0]["without"] == 0.25
    assert drawn == draw_examples(records, "accuracy", seed=0)
    assert drawn != draw_examples(records, "accuracy", seed=1)


@pytest.mark.parametrize("main", ["accuracy", "nll"])
def test_the_items_that_thoughts_change_most_are_those_of_the_largest_gains(main):
    gains = [0.1 * ((7 * n) % 12 - 4) for n in range(12)]  # five fall, the others rise or stay
    own = [1 + gain * (1 if main == "accuracy" else -1) for gain in gains]
    records = item_records([{}] * 12, [1.0] * 12, own, own)
    for variant in records.values():
        for record in variant:
            record["metrics"] = {main: record["metrics"]["accuracy"]}
    drawn = draw_examples(records, main, seed=0)
    found = [[gains[int(example["id"])] for example in drawn[kind]] for kind in ("helped", "hurt")]
    assert found == [sorted(gains)[:-6:-1], sorted(gain for gain in gains if gain < 0)]


def test_gains_by_difficulty_kind_and_place():
    rng = np.random.default_rng(0)
    base = rng.exponential(2.0, 500)
    hard = base > np.quantile(base, 0.8)
    nll = {"without_thoughts": base, "with_thoughts": base - hard, "swapped": base - 0.25 * hard}
    records = {
        variant: [{"tokens": ["1", " a"] * 5, "position": 0, "nll": row} for row in of_all]
        for variant, of_all in ((name, values.reshape(50, 10)) for name, values in nll.items())
    }
    found = break_down(records, seed=0)
    assert [round(group["gain"], 3) for group in found["difficulty"]] == [0, 0, 0, 0, 1]
    assert [round(group["gain_of_content"], 3) for group in found["difficulty"]] == [
        0,
        0,
        0,
        0,
        0.75,
    ]
    assert [group["n"] for group in found["kind"]] == [250, 250]
    for group in found["kind"]:
        assert group["gain_ci95"][0] < group["gain"] < group["gain_ci95"][1]
    assert sum(group["n"] for group in found["position"]) == 500


def test_gates_by_entropy_give_what_their_tokens_give():
    plain = [{"nll": [1.0, 2.0], "entropy": [0.4, 0.1]}, {"nll": [3.0, 4.0], "entropy": [0.3, 0.2]}]
    thought = [[[7] * 5] * 2]  # one thought before each token, of five tokens
    mixed = [{"nll": [0.5, 2.5], "thoughts": thought}, {"nll": [1.0, 5.0], "thoughts": thought}]
    rows = sweep_entropy({"without_thoughts": plain, "with_thoughts": mixed})
    none, *few, quarter, half, every = (tuple(row.values()) for row in rows)
    assert list(rows[0]) == ["share", "entropy", "nll", "passes"]
    assert none == pytest.approx((0.0, 0.4, 10 / 4, 1.0))
    assert quarter == pytest.approx((0.25, 0.325, 9.5 / 4, 2.25))  # the first token alone
    assert half == pytest.approx((0.5, 0.25, 7.5 / 4, 3.5))  # and the third
    assert every == pytest.approx((1.0, 0.0, 9 / 4, 6.0))
    assert [row[0] for row in few] == [0.25] * 3  # a share that four tokens do not have
    entropies = [row["entropy"] for row in rows]
    assert entropies == sorted(entropies, reverse=True)


@pytest.mark.parametrize(
    ("text", "kind"),
    [(" 42", "digits"), (" word", "words"), ("é", "words"), (" $", "punctuation"),
     ("\n\n", "white space"), (" कि", "words")],
)  # fmt: skip
def test_kinds_of_tokens(text, kind):
    assert kind_of(text) == kind


def test_p_values_are_corrected_for_the_number_of_tests_and_verdicts_follow():
    def change(p_value):
        return {"nll": -0.1, "ci95": (-0.2, -0.05), "p_value": p_value}

    gain = {"nll": 0.1, "ci95": (0.05, 0.2), "p_value": 0.001}
    one = {"n": 50, "main_metric": "nll", "difference": change(0.02), "gain_of_content": gain}
    two = {"n": 50, "main_metric": "nll", "difference": change(0.01)}
    three = {"n": 50, "main_metric": "nll", "difference": change(None)}
    assert "because of what they say" in verdict(one)
    correct_for_many({"one": one, "two": two, "three": three})
    assert one["difference"]["p_holm"] == pytest.approx(0.02)
    assert two["difference"]["p_holm"] == pytest.approx(0.02)
    assert gain["p_holm"] == pytest.approx(0.003)
    assert "p_holm" not in three["difference"]
    assert {task["num_tests"] for task in (one, two, three)} == {3}
    tasks = {str(n): {**two, "difference": change(0.02)} for n in range(3)}
    correct_for_many(tasks)
    assert [task["difference"]["p_holm"] for task in tasks.values()] == pytest.approx([0.06] * 3)
    assert tasks["0"]["verdict"] == "no difference that 50 items can tell"


def test_nothing_is_concluded_from_a_handful_of_items():
    found = {
        "n": 19, "main_metric": "accuracy", "truncated": 0,
        "difference": {"accuracy": 0.9, "ci95": (0.5, 1.0), "p_value": 1e-4, "items_needed": 40},
    }  # fmt: skip
    assert verdict(found) == "19 items are too few to say whether thoughts help"
    assert warnings(found) == []
    assert "better with thoughts" in verdict(found | {"n": 20})


@pytest.mark.parametrize(("share", "decides"), [(0.4, "gold_probability"), (4e-4, "nll")])
def test_the_probability_of_answers_decides_unless_none_is_left(share, decides):
    """Where the NLL may say the opposite, of a model that is sure of its wrong answers."""
    answers = {"nll": column([2.0, 3.0]), "gold_probability": column([0.0, share])}
    values = {"without_thoughts": answers | {"gold_probability": column([0.0, 0.0])},
              "with_thoughts": answers}  # fmt: skip
    assert choose_main_metric("nll", values) == decides
    assert choose_main_metric("gold_probability", values) == "gold_probability"
    assert choose_main_metric("nll", {"with_thoughts": {"nll": column([1.0])}}) == "nll"
    of_choices = {
        "with_thoughts": answers | {"accuracy": column([1, 0]), "accuracy_norm": column([1, 0])}
    }
    assert choose_main_metric("nll", of_choices) == "accuracy"
