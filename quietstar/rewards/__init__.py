"""Rewards of thoughts (``loss.reward``): a file each, named as the reward.

A reward is a pure function of `ThoughtBatch` and `ThoughtScores`. It returns a number for every
thought, (batch, positions, thoughts), and runs without gradient on some texts and some of their
positions at a time, always with all thoughts of a position.

A function of texts, with the signature of TRL's reward functions, is a reward too (`of_texts`), and
several rewards with weights are one: ``loss.reward: 0.2*my_rewards:brevity + my_rewards:correct``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from quietstar import registry
from quietstar.errors import UserError
from quietstar.losses.weights import ThoughtScores
from quietstar.sampling.thoughts import ThoughtBatch


@runtime_checkable
class Reward(Protocol):
    """What a reward is.

    One that does not read ``scores.thought`` may say so (`without_thought`): where nothing else
    reads it either, it is not computed, and ``scores.thought`` is None.
    """

    def __call__(self, thoughts: ThoughtBatch, scores: ThoughtScores) -> Tensor:
        """Return the reward of every thought, (batch, positions, thoughts)."""
        ...


R = TypeVar("R", bound=Any)


def asks_policy(reward: R) -> R:
    """Say of a reward that it calls ``scores.logprob``, ``continuations`` or ``judge``.

    It is then called once for all positions that learn together (all of a micro-batch where weights
    are sharded), and at the same moment on all ranks: what it asks is batched, and engines that
    shard the weights can answer. Later updates from the same thoughts keep what it said.
    """
    reward.asks_policy = True
    return reward


def without_thought(reward: R) -> R:
    """Say of a reward that it does not read ``scores.thought``."""
    reward.reads_thought = False
    return reward


def find_reward(name: str) -> Reward:
    """Find the reward that ``loss.reward`` names: one, or several with weights.

    Raises:
        UserError: There is none of this name, or it cannot be called as rewards are.
    """
    made = []
    for weight, part in registry.weighted_parts(name):
        found = registry.find("loss.reward", part)
        made.append((weight, part, of_texts(found) if registry.reads_texts(found) else found))
    if len(made) == 1 and made[0][0] == 1:
        return made[0][2]

    def weighted(thoughts: ThoughtBatch, scores: ThoughtScores) -> Tensor:
        total = thoughts.lengths.new_zeros(thoughts.lengths.shape, dtype=scores.mixed.dtype)
        for weight, part, reward in made:
            with registry.running("loss.reward", part):
                total = total + weight * reward(thoughts, scores)
        return total

    rewards, total = [reward for *_, reward in made], weighted
    if any(getattr(reward, "asks_policy", False) for reward in rewards):
        total = asks_policy(total)
    if not any(getattr(reward, "reads_thought", True) for reward in rewards):
        total = without_thought(total)
    return total


def reads_records(name: str) -> bool:
    """Tell whether a reward of this name may read the records that texts are made of."""
    own = (part for _, part in registry.weighted_parts(name) if ":" in part)
    found = [registry.find("loss.reward", part) for part in own]
    return any(registry.reads_texts(f) or getattr(f, "asks_policy", False) for f in found)


def of_texts(function: Callable[..., Any]) -> Reward:
    """Make a reward of a function of texts, as TRL's: ``f(prompts, completions, **columns)``.

    It is called with lists of as many entries as there are thoughts, by the names of its
    parameters, and returns a number for each (None counts as 0):

    - ``completions``: what the model writes after its thought, at most ``thoughts.lookahead``
      tokens (with a judge ``judge.continuation``), or up to the end of the text;
    - ``prompts``: the text before the thought;
    - ``thoughts``: what the thought says;
    - every other name: this field of the record that the text was made of; ``**columns`` are all.
    """
    parameters = inspect.signature(function).parameters.values()
    wanted = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    needed = {p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
    needed -= {p.name for p in parameters if p.default is not p.empty}

    @asks_policy
    @without_thought
    def reward(thoughts: ThoughtBatch, scores: ThoughtScores) -> Tensor:
        written = scores.continuations(thoughts)
        counts = [len(texts) for texts in written.texts]
        if not counts:
            return written.table([])
        given: dict[str, list[Any]] = {}
        if takes_all or wanted - {"prompts", "completions", "thoughts"}:
            records = scores.records(thoughts)
            of_entry = [records[text] for text in written.places[:, 0].tolist()]
            names = {name for record in of_entry for name in record}
            if missing := needed - names - {"prompts", "completions", "thoughts"}:
                raise UserError(
                    f"loss.reward: reads {', '.join(sorted(missing))}, which is no field of the "
                    f"records (they have {', '.join(sorted(names))}). Rename the parameter."
                )
            for name in names if takes_all else names & wanted:
                pairs = zip(of_entry, counts, strict=True)
                given[name] = [record.get(name) for record, n in pairs for _ in range(n)]
        flat = {
            "prompts": [p for p, n in zip(written.prompts, counts, strict=True) for _ in range(n)],
            "completions": [text for texts in written.texts for text in texts],
        }
        if takes_all or "thoughts" in wanted:
            flat["thoughts"] = [text for texts in scores.decode(thoughts) for text in texts]
        given |= {name: texts for name, texts in flat.items() if takes_all or name in wanted}
        values = function(**given)
        if len(values) != sum(counts):
            raise UserError(
                f"loss.reward: returned {len(values)} numbers for {sum(counts)} completions. "
                "Return a list with one for each."
            )
        numbers = iter(0.0 if value is None else float(value) for value in values)
        return written.table([[next(numbers) for _ in range(n)] for n in counts])

    return reward
