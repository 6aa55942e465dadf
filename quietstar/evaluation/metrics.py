"""What each held-out metric is called: the same in the terminal and on all pages."""

from __future__ import annotations

from typing import NamedTuple

from quietstar.evaluation.controls import CONTROL_NAMES, GAINS, MADE, SWAPPED, WITH, WITHOUT


class Metric(NamedTuple):
    """Name and form of a metric; only those with a heading are columns of a run in a terminal."""

    label: str
    unit: str = ""
    form: str = ".4f"  # on pages
    heading: str = ""  # the label in two short lines
    column_form: str = ".3f"  # below that heading


_KINDS = {WITHOUT: ("without thoughts", "without"), WITH: ("with thoughts", "with"),
          **{name: (f"with {text}", name) for name, text in CONTROL_NAMES.items()}}  # fmt: skip
METRICS = {
    "accuracy": Metric("accuracy", "", ".1%"),
    "accuracy_norm": Metric("accuracy by byte", "", ".1%"),
    "exact_match": Metric("exact match", "", ".1%"),
    "gold_probability": Metric("P(gold answer)"),
    "gold_logprob": Metric("log P(gold answer)", "nats"),
    "published_accuracy": Metric("P, as published"),
    "token_accuracy": Metric("accuracy of tokens", "", ".1%"),
    "nll": Metric("NLL", "nats/token"),
    "base_nll": Metric("NLL without thoughts", "nats/token", ".4f", "NLL\nwithout", ".4f"),
    "mixed_nll": Metric("NLL with thoughts", "nats/token", ".4f", "NLL\nwith", ".4f"),
    "thought_nll": Metric("NLL of the thought alone", "nats/token", ".4f", "NLL\nthought", ".4f"),
    "swapped_mixed_nll": Metric("NLL with swapped thoughts", "nats/token"),
    "gain": Metric("gain of thinking", "nats/token", "+.4f", "gain of\nthinking", "+.4f"),
    GAINS[SWAPPED]: Metric("gain of content", "nats/token", "+.4f", "gain of\ncontent", "+.4f"),
    **{GAINS[name]: Metric(f"gain over {CONTROL_NAMES[name]}", "nats/token", "+.4f",
                           f"gain over\n{name}", "+.4f") for name in MADE},
    "mixing_weight": Metric("mixing weight", "", ".4f", "mixing\nweight", ".4f"),
    **{f"gold_probability_{kind}": Metric(f"P(gold answer) {text}", "", ".4f", f"P(gold)\n{short}")
       for kind, (text, short) in _KINDS.items()},
    **{f"accuracy_{kind}": Metric(f"accuracy {text}", "", ".1%", f"accuracy\n{short}")
       for kind, (text, short) in _KINDS.items()},
    "right_thoughts": Metric("correct thoughts", "", ".1%", "correct\nthoughts"),
    "thought_length": Metric("length of thoughts", "tokens", ".1f"),
    "distinct_token_ratio": Metric("distinct tokens", "", ".2f"),
    "entropy": Metric("entropy of thoughts", "nats/token", ".2f"),
    "training_seconds": Metric("training steps", "seconds", ".1f"),
}  # fmt: skip
"""By key in metrics.jsonl and in the files of evaluations."""


def label_of(key: str) -> str:
    """Return the label with its unit, or the key of a metric that is not declared."""
    metric = METRICS.get(key)
    if metric is None:
        return key
    return f"{metric.label}, {metric.unit}" if metric.unit else metric.label
