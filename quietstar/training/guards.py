"""Guards: metrics that show when thoughts collapse or training goes wrong, and what helps."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal

from quietstar.config import Config
from quietstar.config.effects import keys_without_effect
from quietstar.evaluation.controls import LEAST_PROBABILITY

Metrics = Mapping[str, float]
Source = Literal["train", "eval"]
WINDOW: dict[Source, int] = {"train": 5, "eval": 1}
"""Records whose mean is judged, so that one odd step does not warn; as many are the first ones."""
FEWEST = {"train": 3, "eval": 1}
"""Records without which nothing is judged."""
UNCHECKED = {"train": 20, "eval": 0}
"""First steps of a stage that are not judged: a head of activation none starts at weight zero."""


@dataclass(frozen=True)
class Guard:
    """A metric with a threshold, and what is said beyond it."""

    name: str  # in metrics.jsonl, on the page and in the docs
    title: str  # the metric in words
    source: Source  # records that it is read from: training steps or held-out evaluations
    keys: tuple[str, ...]  # their metrics that it needs
    value: Callable[[Metrics, Metrics], float]  # of those now and the stage's first records
    side: Literal["at most", "at least"]  # of the limit on which it is bad
    limit: float  # at and beyond which the metric is bad
    form: str  # format of the metric and of its limit
    message: str  # what a bad metric means, with ``{}`` for the metric
    remedies: Mapping[str, tuple[str, ...]]  # keys of the config by what to do with them
    in_a_row: int = 1  # bad records one after the other that make it fire
    # In which metrics it is judged, and the same in words.
    condition: tuple[Callable[[Metrics], bool], str] = (lambda now: True, "")
    unless: Callable[[Config], bool] = lambda config: False  # a stage's with which it is not judged
    is_collapse: bool = True  # whether it ends a run with `training.stop_on_collapse`

    def is_bad(self, value: float) -> bool:
        """Return True beyond the limit; NaN is."""
        return not (value > self.limit if self.side == "at most" else value < self.limit)

    def describe(self, value: float, config: Config) -> str:
        """Say what a bad metric means, and which keys that have an effect in a stage may help."""
        idle = keys_without_effect(config)
        phrases = []
        for verb, keys in self.remedies.items():
            if useful := [key for key in keys if key not in idle]:
                phrases.append(f"{verb} {' or '.join(useful)}")
        remedy = ", or ".join(phrases)
        return f"{self.message.format(value)}. {remedy[:1].upper()}{remedy[1:]}."

    @property
    def threshold(self) -> str:
        """When it fires, in words."""
        rows = f", at {self.in_a_row} evaluations in a row" if self.in_a_row > 1 else ""
        limit = format(self.limit, ".0%" if self.form.endswith("%") else "g")
        return f"{self.side} {limit}{self.condition[1]}{rows}"


def _share_of_first(key: str) -> Callable[[Metrics, Metrics], float]:
    return lambda now, first: now[key] / first[key] if first[key] > 0 else 1.0


def _plain(key: str) -> Callable[[Metrics, Metrics], float]:
    return lambda now, first: now[key]


def _pauses(config: Config) -> bool:
    return config.thoughts.sampler == "pause"


def _thinks_once(config: Config) -> bool:
    return config.thoughts.positions == "answer_start"


def measures_answers(config: Config, metrics: Metrics) -> bool:
    """Return True where the probability of answers says more than the NLL of next tokens.

    With one thought for a whole answer, NLLs and gains are about its first token alone, which may
    be just a space. But of the probability of a long answer nothing is left.
    """
    probabilities = (x for key, x in metrics.items() if key.startswith("gold_probability_"))
    is_large = max(probabilities, default=0.0) >= LEAST_PROBABILITY
    return _thinks_once(config) and "gain" in metrics and is_large


def _compares_no_thoughts(config: Config) -> bool:
    estimator = getattr(config.loss, "estimator", "leave_one_out")
    return _pauses(config) or estimator in ("no_baseline", "running_mean")


def _rise(now: Metrics, first: Metrics) -> float:
    """Return how far a held-out NLL has risen, the worse of both; NaN is the worst.

    With a mixing weight of 1 nothing depends on the base prediction, which may be unlearned.
    """
    keys = [key for key in ("mixed_nll", "base_nll") if key in now]
    if now.get("mixing_weight", 0.0) >= 1:
        keys = keys[:1]
    rises = [now[key] - first[key] for key in keys]
    return max(rises, key=lambda rise: (math.isnan(rise), rise))


GUARDS = (
    Guard(
        "thought_length", "mean length of a thought, as a share of the stage's first", "train",
        ("thought_length",), _share_of_first("thought_length"), "at most", 0.25, ".0%",
        "thoughts have shrunk to {:.0%} of their length at the start of the stage: the model learns"
        " to do without them",
        {"lower": ("loss.thought_weight", "loss.mixed_weight", "optim.learning_rate"),
         "raise": ("loss.policy_weight",)},
        unless=lambda config: bool(config.thoughts.schedule),
    ),
    Guard(
        "truncated_fraction", "thoughts that are cut at thoughts.length", "train",
        ("truncated_fraction",), _plain("truncated_fraction"), "at least", 0.9, ".0%",
        "{:.0%} of the thoughts are cut before they end, so that few of them say what they are for",
        {"raise": ("thoughts.length",), "add a text to": ("thoughts.stop",),
         "change": ("thoughts.start_init",)},
        is_collapse=False,
    ),
    Guard(
        "entropy", "entropy of the thought tokens, nats/token", "train",
        ("entropy",), _plain("entropy"), "at most", 0.05, ".3f",
        "thoughts have almost no entropy ({:.3f} nats a token): they collapse to one text",
        {"raise": ("loss.entropy_weight", "thoughts.temperature"),
         "lower": ("loss.policy_weight", "optim.learning_rate")},
        unless=_pauses,
    ),
    Guard(
        "identical_fraction", "positions whose thoughts are all the same", "train",
        ("identical_fraction",), _plain("identical_fraction"), "at least", 0.9, ".0%",
        "at {:.0%} of the positions all thoughts are the same, so REINFORCE has no signal",
        {"raise": ("thoughts.temperature", "thoughts.num_thoughts", "loss.entropy_weight")},
        unless=_pauses,
    ),
    Guard(
        "distinct_token_ratio", "distinct tokens of a thought over its length", "train",
        ("distinct_token_ratio",), _plain("distinct_token_ratio"), "at most", 0.3, ".2f",
        "thoughts repeat themselves ({:.2f} distinct tokens a token)",
        {"raise": ("loss.entropy_weight",),
         "lower": ("loss.policy_weight", "optim.learning_rate")},
        unless=_pauses,
    ),
    Guard(
        "reward", "reward that is a probability, as a share of the stage's first", "train",
        ("policy_reward",), _share_of_first("policy_reward"), "at most", 0.2, ".0%",
        "the reward has fallen to {:.0%} of what it was at the start of the stage: thoughts get"
        " worse",
        {"lower": ("optim.learning_rate", "loss.policy_weight"),
         "raise": ("training.global_batch_size", "thoughts.num_thoughts")},
        unless=lambda config: _pauses(config)
        or getattr(config.loss, "reward", "") not in ("prob", "mean_prob"),
    ),
    Guard(
        "reward_std", "standard deviation of the reward, as a share of the stage's first", "train",
        ("policy_reward_std",), _share_of_first("policy_reward_std"), "at most", 0.01, ".1%",
        "rewards of a position's thoughts differ by {:.1%} of what they did at the start of the"
        " stage: thoughts have lost their influence, or are alike",
        {"raise": ("thoughts.temperature", "thoughts.num_thoughts", "mixing_head.floor")},
        unless=_pauses,
    ),
    Guard(
        "no_signal_fraction", "positions whose thoughts all have the same reward", "train",
        ("no_signal_fraction",), _plain("no_signal_fraction"), "at least", 0.9, ".0%",
        "at {:.0%} of the positions all thoughts have the same reward, so none of them is"
        " reinforced",
        {"raise": ("thoughts.temperature", "thoughts.num_thoughts", "mixing_head.floor")},
        unless=_compares_no_thoughts,
    ),
    Guard(
        "mixing_weight", "mixing weight, in absolute value", "train",
        ("mixing_weight",), lambda now, first: abs(now["mixing_weight"]), "at most", 0.002, ".4f",
        "the mixing weight fell to {:.4f}: thoughts no longer reach the prediction",
        {"set": ("mixing_head.floor", "mixing_head.warmup_steps"),
         "raise": ("loss.thought_weight",)},
        unless=lambda config: config.mixing_head.fixed_weight is not None,
    ),
    Guard(
        "thought_nll", "the thought's own NLL above the base, nats/token", "eval",
        ("thought_nll", "base_nll"), lambda now, first: now["thought_nll"] - now["base_nll"],
        "at least", 1.0, "+.3f",
        "the thought's own prediction stays {:.3f} nats a token worse than the one without a"
        " thought: thoughts lead the model astray",
        {"raise": ("loss.thought_weight",), "change": ("thoughts.end_init",)},
        in_a_row=2, is_collapse=False,
    ),
    Guard(
        "gain_of_content", "gain of content, nats/token", "eval",
        ("gain", "gain_of_content"), _plain("gain_of_content"), "at most", 0.0, "+.4f",
        "thinking helps, but swapped thoughts help as much (gain of content {:+.4f} nats a token):"
        " what helps is not what thoughts say",
        {"raise": ("loss.policy_weight", "thoughts.num_thoughts", "data.min_context"),
         "change": ("thoughts.start_init",)},
        in_a_row=2, condition=(lambda now: now["gain"] > 0, " with a gain above 0"),
        unless=lambda config: _pauses(config) or _thinks_once(config), is_collapse=False,
    ),
    Guard(
        "content_of_answers", "P(gold answer) with thoughts minus that with swapped ones", "eval",
        ("gold_probability_with_thoughts", "gold_probability_without_thoughts",
         "gold_probability_swapped"),
        lambda now, first: (
            now["gold_probability_with_thoughts"] - now["gold_probability_swapped"]
        ), "at most", 0.0, "+.4f",
        "thoughts make the answer likelier, but swapped ones as much (P(gold answer) changes by"
        " {:+.4f} with the model's own): what helps is not what thoughts say",
        {"raise": ("loss.policy_weight", "thoughts.num_thoughts"),
         "change": ("thoughts.start_init",)},
        in_a_row=2,
        condition=(
            lambda now: now["gold_probability_with_thoughts"] >= LEAST_PROBABILITY
            and now["gold_probability_with_thoughts"] > now["gold_probability_without_thoughts"],
            f" with one of {LEAST_PROBABILITY:g} or more, above that without thoughts",
        ),
        unless=lambda config: _pauses(config) or not _thinks_once(config), is_collapse=False,
    ),
    Guard(
        "divergence",
        "rise of the mixed or the base NLL (with a mixing weight of 1 the mixed one alone) "
        "since the stage began, nats/token", "eval",
        ("base_nll",), _rise, "at least", 1.0, "+.3f",
        "a held-out NLL has risen by {:.3f} nats a token since the stage began: training diverges",
        {"lower": ("optim.learning_rate", "optim.max_grad_norm")},
    ),
)  # fmt: skip


@dataclass
class GuardState:
    """What the guards know of one stage."""

    config: Config | None = None  # of the stage; None to read metrics only
    first_step: int = 0  # steps of the run before the stage
    fired: set[str] = field(default_factory=set)  # guards that are judged no more
    _first: dict[tuple[Source, str], list[float]] = field(default_factory=dict)
    _now: dict[tuple[Source, str], deque[float]] = field(default_factory=dict)
    _bad: dict[str, int] = field(default_factory=dict)  # records in a row

    def see(self, source: Source, step: int, metrics: Mapping[str, Any]) -> list[Guard]:
        """Take in a record, and return the guards that fire at it; they are judged again.

        Args:
            source: Kind of the record.
            step: Steps of the run.
            metrics: Its metrics; what is no float is passed over, and in training what is not
                finite.
        """
        for key, value in metrics.items():
            if not isinstance(value, float) or (source == "train" and not math.isfinite(value)):
                continue
            self._now.setdefault((source, key), deque(maxlen=WINDOW[source])).append(value)
            first = self._first.setdefault((source, key), [])
            if len(first) < WINDOW[source]:
                first.append(value)
        if step - self.first_step <= UNCHECKED[source]:
            return []
        firing = []
        for guard in GUARDS:
            if guard.source != source or not all(key in metrics for key in guard.keys):
                continue
            self._bad[guard.name] = self._bad.get(guard.name, 0) + 1 if self.is_bad(guard) else 0
            if self._bad[guard.name] >= guard.in_a_row and guard.name not in self.fired:
                firing.append(guard)
        return firing

    def value(self, guard: Guard) -> float | None:
        """Return a guard's metric now; None before its records are there."""
        now, first = self._means(self._now, guard), self._means(self._first, guard)
        return guard.value(now, first) if all(key in now for key in guard.keys) else None

    def watches(self, guard: Guard) -> bool:
        """Return True where a guard's metric means something in the stage."""
        return self.config is None or not guard.unless(self.config)

    def is_beyond(self, guard: Guard) -> bool:
        """Return True where a guard's metric now is beyond its limit, be it of too few records."""
        value, now = self.value(guard), self._means(self._now, guard)
        if value is None or not self.watches(guard):
            return False
        return guard.condition[0](now) and guard.is_bad(value)

    def is_bad(self, guard: Guard) -> bool:
        """Return True where it is beyond its limit in enough records to be judged."""
        fewest = min(len(self._now.get((guard.source, key), ())) for key in guard.keys)
        return fewest >= FEWEST[guard.source] and self.is_beyond(guard)

    @staticmethod
    def _means(series: Mapping[tuple[Source, str], Any], guard: Guard) -> dict[str, float]:
        """Return the means of all metrics of the guard's records."""
        return {key: fmean(x) for (source, key), x in series.items() if source == guard.source}
