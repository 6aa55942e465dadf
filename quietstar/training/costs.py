"""What steps and evaluations of a stage cost, counted in tokens that the model runs.

The counts depend on the config alone, so all processes and every resume agree on what follows from
them: how many held-out texts an evaluation reads, and how the time of one part of a run predicts
that of another.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from statistics import median
from typing import NamedTuple

from quietstar.config import Config
from quietstar.data.batches import EVAL_SEQUENCES
from quietstar.sampling.positions import most_positions
from quietstar.training.stages import Stage, plan_stages

SAMPLES = 4
"""Sampled thoughts at every position, of which an evaluation counts the right ones."""
FEWEST, MOST = 16, 512
"""Held-out texts that a run chooses: fewer would show nothing at all, and with more the 95%
interval of a share, which is at most 9 points wide, hardly shrinks."""
SHARE = 0.5
"""Of a stage's training, what its evaluations may cost: half by this count, since greedy thoughts
take more time per token than those that are learned from, of which a pass has more."""
PASS_TOKENS = 16
"""What any pass of the model costs for reading its weights, in tokens."""
MARKERS = 2
"""Tokens around a thought, about."""
RECENT = 20
"""Steps whose times say how long the next ones take."""


class Costs(NamedTuple):
    """What a stage costs, in tokens of a forward pass (a backward pass counts as two)."""

    step: float
    text: float  # of an evaluation, with its controls
    num_evaluations: int  # before the first step and after the last one, too


def costs_of(stage: Stage) -> Costs:
    """Count what the steps and evaluations of a stage cost."""
    config, loss, thoughts = stage.config, stage.config.loss, stage.config.thoughts
    training, length = config.training, config.data.seq_len
    share = PASS_TOKENS / min(training.micro_batch_size, training.global_batch_size)
    places = most_positions(thoughts.positions, thoughts.position_fraction, length)
    if thoughts.positions == "answer_start":
        places = 1
    block = thoughts.length + thoughts.lookahead + MARKERS - 1

    def draw(count: int) -> float:
        passes = 0 if thoughts.sampler == "pause" else thoughts.length + 1
        return passes * (count * places + share)

    def read(count: int) -> float:
        return count * places * block + share

    plain = length + share
    step, text, count = 3 * plain, plain, thoughts.num_thoughts
    if stage.thinks:
        objective = stage.objective
        if objective.student != "plain":
            step = training.inner_epochs * 3 * (plain + read(count)) + draw(count)
            if objective.reads_reference(loss.reward):
                step += plain + read(count)
        if objective.student is not None and getattr(loss, "teacher", None) is None:
            step += plain + draw(count) + read(count)
    if stage.has_thoughts:
        text += draw(1) + read(1)
        if training.eval_controls:
            text += plain + len(training.eval_controls) * read(1)
        if config.data.rationale_field is not None:
            text += draw(SAMPLES)
    return Costs(training.global_batch_size * step, text, evaluations_after(config, -1))


def evaluations_after(config: Config, step: int) -> int:
    """Count the evaluations of a stage after the one at ``step``; -1 counts all."""
    every, last = config.training.eval_steps, config.training.max_steps
    return sum(at > step for at in range(0, last, every or last)) + (last > step)


def with_eval_sequences(config: Config, held_out: Mapping[str, int | None] | None = None) -> Config:
    """Set `data.eval_sequences` where the config leaves it to the run.

    All evaluations of a stage cost at most `SHARE` of its training, unless even `FEWEST` texts cost
    more. Of raw text, each of whose tokens is scored, `EVAL_SEQUENCES` suffice. A stream that holds
    out its head keeps the key unset: where training begins must not depend on how long it takes.

    Args:
        config: Config of a whole run.
        held_out: By stage, `data.eval_sequences` of the run that is resumed, which stays.
    """
    stages, common = dict(config.stages), config.data
    for stage in plan_stages(config):
        data, costs = stage.config.data, costs_of(stage)
        if held_out and stage.name in held_out:
            number = held_out[stage.name]
        elif data.streaming and data.eval is None:
            number = None
        else:
            training = costs.step * stage.config.training.max_steps
            number = int(SHARE * training / (costs.num_evaluations * costs.text))
            most = EVAL_SEQUENCES if data.format == "text" else MOST
            number = max(FEWEST, min(most, number))
        if data.eval_sequences is not None or number is None:
            continue
        if not stages:
            common = common.model_copy(update={"eval_sequences": number})
        else:
            of_data = stages[stage.name].get("data", {}) | {"eval_sequences": number}
            stages[stage.name] = stages[stage.name] | {"data": of_data}
    return config.model_copy(update={"data": common, "stages": stages})


def describe_evaluations(stage: Stage, num_texts: int) -> list[str]:
    """Say how many evaluations a stage has and what they cost, with a notice where that is much."""
    costs, steps = costs_of(stage), stage.config.training.max_steps
    in_steps = num_texts * costs.text / costs.step
    lines = [
        f"{costs.num_evaluations} evaluations of {num_texts} held-out texts, each of which takes "
        f"about as long as {in_steps:.2g} training steps"
    ]
    ratio = in_steps * costs.num_evaluations / steps
    if ratio > 1 and num_texts > FEWEST:
        lines.append(
            f"notice: data.eval_sequences ({stage.config.data.eval_sequences or num_texts}): "
            f"evaluations take about {ratio:.2g} times as long as the training; null takes fewer"
        )
    return lines


class TimeLeft:
    """Predicts how long a run still takes, by its own steps and evaluations so far.

    What was not timed yet, such as the evaluations before the first one and all of later stages, is
    predicted by its cost from what was.

    Attributes:
        times: Seconds of the newest steps (``step``) and evaluations (``evaluation``), by kind and
            number of the stage.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._stages = stages
        self._costs: list[dict[str, float]] = []
        for stage in stages:
            costs, number = costs_of(stage), stage.config.data.eval_sequences or EVAL_SEQUENCES
            self._costs.append({"step": costs.step, "evaluation": number * costs.text})
        self.times = defaultdict[tuple[str, int], deque[float]](lambda: deque(maxlen=RECENT))

    def __call__(self, index: int, steps_done: int, evaluated: int) -> float | None:
        """Return the seconds from now to the end of the run; None while nothing was timed.

        Args:
            index: Number of the stage.
            steps_done: Steps of the stage that are done.
            evaluated: Step of the stage at which the last evaluation ended, -1 before the first.
        """
        if not any(self.times.values()):
            return None
        rate, total = 0.0, 0.0
        for number, stage in enumerate(self._stages):
            costs, seconds = self._costs[number], dict[str, float]()
            for kind in ("evaluation", "step"):  # steps say most about what comes
                if times := self.times[kind, number]:
                    seconds[kind] = median(times)
                    rate = seconds[kind] / costs[kind]
            if number >= index:
                is_now = number == index
                steps = stage.config.training.max_steps - (steps_done if is_now else 0)
                count = evaluations_after(stage.config, evaluated if is_now else -1)
                total += steps * seconds.get("step", rate * costs["step"])
                total += count * seconds.get("evaluation", rate * costs["evaluation"])
        return total


def duration(seconds: float) -> str:
    """Format ``5025`` as ``1 h 24 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
