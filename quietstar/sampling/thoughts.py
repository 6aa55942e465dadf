"""What a sampler is given and what it gives: texts, a specification, and thoughts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from quietstar.attention.layout import NO_TOKEN
from quietstar.backbone.run import TextRun
from quietstar.config import ThoughtsConfig
from quietstar.errors import UserError
from quietstar.sampling.stopping import StopTexts


@dataclass(frozen=True)
class Sampling:
    """How thoughts are drawn.

    Attributes:
        num_thoughts: Thoughts at each position, K.
        thought_length: Tokens of a thought, T: the most, with ``stop``.
        temperature: Divides the logits; None takes the most likely token.
        seed: Seed of the keyed noise.
        stop: Says when a thought ends early; None where none does.
        top_p: Draw among the most likely tokens that together reach this probability; None: all.
        top_k: Draw among so many of the most likely tokens; None: all.

    Raises:
        UserError: A number that cannot be.
    """

    num_thoughts: int
    thought_length: int
    temperature: float | None
    seed: int = 0
    stop: StopTexts | None = None
    top_p: float | None = None
    top_k: int | None = None

    @classmethod
    def by(cls, spec: ThoughtsConfig, stop: StopTexts | None, **changes: Any) -> Sampling:
        """Draw by a config's section ``thoughts``, but for some changes."""
        settings: dict[str, Any] = {
            "num_thoughts": spec.num_thoughts, "thought_length": spec.length,
            "temperature": spec.temperature, "top_p": spec.top_p, "top_k": spec.top_k,
        }  # fmt: skip
        return cls(stop=stop, **settings | changes)

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.num_thoughts < 1:
            raise UserError(f"num_thoughts ({self.num_thoughts}): must be at least 1. Set it so.")
        temperature = self.temperature
        if temperature is not None and not 0 < temperature < math.inf:
            raise UserError(
                f"temperature ({temperature}): must be above 0 and finite. None takes the most "
                "likely tokens."
            )
        if not -(2**63) <= self.seed < 2**63:
            raise UserError(f"seed ({self.seed}): must fit into 64 bits. Give a smaller one.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(
                f"top_p ({self.top_p}): must be above 0 and at most 1. None draws among all tokens."
            )
        if self.top_k is not None and not (isinstance(self.top_k, int) and self.top_k >= 1):
            raise UserError(
                f"top_k ({self.top_k}): must be a whole number of at least 1. None draws among all "
                "tokens."
            )


@dataclass(frozen=True)
class Texts:
    """Texts to think about, padded on the right if at all.

    Attributes:
        input_ids: Token ids of the texts.
        labels: Token ids, -100 where a token is no target.
        answer_mask: Whether a token belongs to an answer; None where that is not known.
        sample_ids: Index of each text in the run; with the seed it keys the noise.
        run: Keys, values and states of the texts, where the model has run them already.
        marked: Whether to think before a token, by ``thoughts.positions`` pattern and field; None
            where that is not known.
        places: Positions at which to think, in the host's memory; None where the host does not know
            them, or they are all.
    """

    input_ids: Int[Tensor, "batch seq"]
    labels: Int[Tensor, "batch seq"]
    answer_mask: Bool[Tensor, "batch seq"] | None
    sample_ids: Int[Tensor, " batch"]
    run: TextRun | None = None
    marked: Bool[Tensor, "batch seq"] | None = None
    places: Int[np.ndarray, "batch positions"] | None = None


@dataclass(frozen=True)
class ThoughtBatch:
    """Thoughts at positions of texts: what a sampler gives and a learn pass takes.

    Attributes:
        input_ids, labels, answer_mask, sample_ids: As in `Texts`.
        positions: Position of each thought, ascending; -1 pads texts with fewer than others.
        tokens: Tokens of the thoughts; -1 after the last of one that ends early.
        lengths: Tokens of each thought, 0 to ``length``.
        sampling_logprobs: Log-probabilities of the tokens by the policy that drew them, at the
            temperature at which it did. None means by the model that learns, as it is.
        reference_logprobs: The same by a reference model; None without one.
        reference_text: Log-probabilities of the next token after every text position by a reference
            model without thoughts, 0 where there is no target; None without one.
        advantage: Advantage of each thought, which later updates of a step keep; None where the
            objective is to say it.
        reward: What a ``loss.reward`` that asks the model said of each thought: its first update of
            a step writes here what the later ones keep. None for other rewards.
        everywhere: Whether the positions are all of the text; None where that is not known.
    """

    input_ids: Int[Tensor, "batch seq"]
    labels: Int[Tensor, "batch seq"]
    answer_mask: Bool[Tensor, "batch seq"] | None
    sample_ids: Int[Tensor, " batch"]
    positions: Int[Tensor, "batch positions"]
    tokens: Int[Tensor, "batch positions thoughts length"]
    lengths: Int[Tensor, "batch positions thoughts"]
    sampling_logprobs: Float[Tensor, "batch positions thoughts length"] | None = None
    reference_logprobs: Float[Tensor, "batch positions thoughts length"] | None = None
    reference_text: Float[Tensor, "batch seq"] | None = None
    advantage: Float[Tensor, "batch positions thoughts"] | None = None
    reward: Float[Tensor, "batch positions thoughts"] | None = None
    everywhere: bool | None = None

    @classmethod
    def of_texts(
        cls,
        texts: Texts,
        positions: Int[Tensor, "batch positions"] | None,
        tokens: Int[Tensor, "batch positions thoughts length"],
        lengths: Int[Tensor, "batch positions thoughts"] | None = None,
        sampling_logprobs: Float[Tensor, "batch positions thoughts length"] | None = None,
    ) -> ThoughtBatch:
        """Put texts and their thoughts together.

        Without ``positions`` the thoughts are at all of them. Without ``lengths`` each ends before
        its first -1, if there is one; with them, what lies after becomes -1.

        Raises:
            UserError: Lengths that do not fit the tokens.
        """
        everywhere = None if positions is not None else True
        if positions is None:
            seq = torch.arange(texts.input_ids.shape[1], device=texts.input_ids.device)
            positions = seq.expand(texts.input_ids.shape)
        if lengths is None:
            lengths = (tokens != NO_TOKEN).sum(-1)
        else:
            if lengths.shape != tokens.shape[:3]:
                raise UserError(
                    f"lengths of shape {tuple(lengths.shape)} do not fit tokens of "
                    f"{tuple(tokens.shape)}. Give one for each thought."
                )
            place = torch.arange(tokens.shape[3], device=tokens.device)
            tokens = tokens.where(place < lengths.unsqueeze(-1), NO_TOKEN)
        return cls(
            texts.input_ids, texts.labels, texts.answer_mask, texts.sample_ids, positions,
            tokens, lengths, sampling_logprobs, everywhere=everywhere,
        )  # fmt: skip

    def part(self, texts: slice, places: slice) -> ThoughtBatch:
        """Take some texts and some of their positions."""
        drawn, reference, text = (
            self.sampling_logprobs, self.reference_logprobs, self.reference_text
        )  # fmt: skip
        return ThoughtBatch(
            self.input_ids[texts],
            self.labels[texts],
            None if self.answer_mask is None else self.answer_mask[texts],
            self.sample_ids[texts],
            self.positions[texts, places],
            self.tokens[texts, places],
            self.lengths[texts, places],
            None if drawn is None else drawn[texts, places],
            None if reference is None else reference[texts, places],
            None if text is None else text[texts],
            None if self.advantage is None else self.advantage[texts, places],
            None if self.reward is None else self.reward[texts, places],
        )

    def token_major(self) -> Int[Tensor, "length thoughts batch positions"]:
        """The tokens in the order in which blocks are laid out."""
        return rearrange(self.tokens, "b p k t -> t k b p").contiguous()


class ThoughtSampler(Protocol):
    """Draws thoughts; a class that is made without arguments."""

    def sample(
        self, model: Any, texts: Texts, positions: Tensor | None, spec: Sampling
    ) -> ThoughtBatch:
        """Draw ``spec.num_thoughts`` thoughts of ``spec.thought_length`` tokens a position.

        Thoughts may end early: ``tokens`` are -1 after their last.

        Args:
            model: `QuietStarForCausalLM` that thinks.
            texts: Texts, perhaps with their run.
            positions: Positions, (batch, positions), -1 after the last; None for all.
            spec: Number, length, seed and distribution of the thoughts.
        """
        ...
