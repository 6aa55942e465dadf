"""Figures that say that training goes wrong, and what helps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Alarm:
    """A figure that says that training goes wrong, and what helps."""

    name: str
    is_bad: Callable[[float], bool]
    message: str


ALARMS = (
    Alarm(
        "entropy",
        lambda x: x < 0.05,
        "thoughts have almost no entropy ({value:.3f} nats a token): they collapse to one text. "
        "Raise loss.entropy_weight or thoughts.temperature, or lower loss.policy_weight.",
    ),
    Alarm(
        "distinct",
        lambda x: x < 0.3,
        "thoughts repeat themselves ({value:.2f} distinct tokens a token). "
        "Raise loss.entropy_weight or lower loss.policy_weight.",
    ),
    Alarm(
        "alike",
        lambda x: x > 0.9,
        "at {value:.0%} of the positions all thoughts are the same, so REINFORCE has no signal. "
        "Raise thoughts.temperature, thoughts.num_thoughts or loss.entropy_weight.",
    ),
    Alarm(
        "mixing_weight",
        lambda x: abs(x) < 0.002,
        "the mixing weight fell to {value:.4f}: thoughts no longer reach the prediction. "
        "Set mixing_head.floor or warmup_steps, or raise loss.thought_weight.",
    ),
)
SILENT_STEPS = 20
"""Steps before an alarm may sound: a head of activation none starts at weight zero."""


def sounding(figures: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """Name and message of every alarm that these figures set off."""
    for alarm in ALARMS:
        value = figures.get(alarm.name)
        if value is not None and alarm.is_bad(value):
            yield alarm.name, alarm.message.format(value=value)
