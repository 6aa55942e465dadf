"""Objectives (``loss.objective``): a file each, named as the objective.

An objective turns rewards and scores into weights: the advantage of every thought, and what the
NLL of every true token counts. It owns its settings, a pydantic model whose fields are keys of the
config's ``loss`` section.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

from torch import Tensor

from quietstar.config import Section
from quietstar.losses.weights import Student, ThoughtScores, ThoughtWeights


class Objective:
    """What all objectives share; the defaults are those of one that only reinforces thoughts.

    Args:
        settings: Settings of the objective, or of a config's whole ``loss`` section.
    """

    Settings: ClassVar[type[Section]] = Section
    """Keys of the ``loss`` section that belong to the objective."""
    thinks: ClassVar[bool] = True
    """Whether thoughts are sampled at all."""
    student: Literal["plain", "thinking"] | None = None
    """Who learns from a thinking teacher: the model without thoughts (`student_loss`), or with its
    own (`weigh`, with ``scores.divergence``). None: there is no teacher."""
    top_tokens: int = 1
    """Most likely tokens of each of the teacher's predictions that are kept one by one."""
    needs_thought: bool = True
    """Whether `weigh` weighs or reads the thought's own prediction."""
    base_weight: float = 0.0
    """Weight of the NLL of all next tokens without a thought."""
    entropy_weight: float = 0.0
    """Weight of a bonus on the entropy of thought tokens."""
    token_weighting: str = "constant"
    """Weight of a thought's token in the policy term: constant (1 / T), sum (1), or mean (1 / the
    thought's own length)."""
    target_weighting: str = "mean"
    """Weight of a true token: mean (1 / lookahead) or sum (1)."""
    clip_low: float | None = None
    """How far a thought token's probability may fall, as a fraction of what it was when drawn,
    before it is reinforced no more; None for any."""
    clip_high: float | None = None
    """The same for how far it may rise."""
    kl_weight: float = 0.0
    """Weight of the divergence of thought tokens from the reference."""
    reference: str = "current"
    """Which weights are the reference: current, ema, or base."""
    needs_log_ratio: bool = False
    """Whether `weigh` reads ``scores.log_ratio``."""
    needs_running: bool = False
    """Whether `weigh` reads ``scores.running``."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    def weigh(self, reward: Tensor, scores: ThoughtScores) -> ThoughtWeights:
        """Turn rewards (batch, positions, thoughts) into advantages and weights, without gradient.

        Called for some texts and positions at a time, always with all thoughts of a position.
        """
        raise NotImplementedError

    def student_loss(self, rows: Student) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a plain student beside its teacher, but for ``base_weight``.

        Returns the scalar, and figures of the rows by their names in metrics.jsonl, (rows,).
        """
        raise NotImplementedError

    def policy_temperature(self, sampling_temperature: float) -> float:
        """Temperature inside the log-probability of the policy term."""
        return sampling_temperature

    def reads_reference(self, reward: str) -> bool:
        """Tell whether anything compares with the reference, the reward of this name included."""
        return self.reference != "current"

    @staticmethod
    def problems(config: Any) -> Iterable[tuple[tuple[str, ...], str]]:
        """Yield broken rules between the objective's settings and the rest of a config.

        Each is the dotted keys in the rule, the one to change first, and a message with the values,
        the rule, the reason and the remedy.
        """
        return ()

    @staticmethod
    def unused(loss: Any) -> Iterable[tuple[str, str]]:
        """Yield the dotted keys of a ``loss`` section that change nothing, each with the reason.

        A reason continues the words "has no effect", as in ``with loss.policy_weight: 0``.
        """
        return ()
