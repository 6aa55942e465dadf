"""Generation that thinks before each new token, with transformers' own arguments.

`transformers` prepares everything (generation config, logits processors, stopping criteria); only
its decoding loop is replaced, through ``custom_generate``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.utils.generic import ModelOutput

from quietstar.attention.layout import text_lookahead
from quietstar.backbone.run import num_virtual
from quietstar.errors import UserError
from quietstar.generation.gates import Gate
from quietstar.sampling.decoding import Decoder, Thinking
from quietstar.sampling.thoughts import Sampling


@dataclass
class ThinkingOutput(ModelOutput):
    """Output of generation: transformers' own fields, and the thoughts.

    Attributes:
        sequences: Token ids of prompts and what was generated.
        thoughts: Tokens of the thoughts before each new token, -1 where none was made.
        scores: Processed scores of each new token, (batch, vocab); with ``output_scores``.
        logits: Mixed logits of each new token, (batch, vocab); with ``output_logits``.
    """

    sequences: Int[Tensor, "batch seq"]
    thoughts: Int[Tensor, "batch new thoughts length"] | None = None
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None


class ThinkingStreamer(BaseStreamer):
    """A streamer that also gets the thoughts, each before the token that it led to."""

    def think(self, thoughts: Int[Tensor, "batch thoughts length"]) -> None:
        """Take the thoughts of the next token; -1 where none was made."""
        raise NotImplementedError


def generate(
    model: Any,
    inputs: Int[Tensor, "batch seq"],
    sampling: Sampling,
    think: bool | Gate,
    streamer: BaseStreamer | None,
    arguments: dict[str, Any],
) -> Any:
    """Generate texts; arguments and result are those of `QuietStarForCausalLM.generate`.

    Raises:
        UserError: Beams were asked for, or a text leaves no room.
    """
    gate = think if isinstance(think, Gate) else Gate("always" if think else "never")

    def decode(
        causal_lm: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **others: Any,
    ) -> Any:
        _check(model, generation_config, None if gate.kind == "never" else sampling)
        mask = others.get("attention_mask")
        real = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
        decoder = Decoder(
            model.causal_lm, model.output_head, model.start_embedding, model.end_embedding,
            sampling, input_ids[:, :-1], real[:, :-1],
            torch.arange(len(input_ids), device=input_ids.device),
            model.pause_token_id if model.thoughts.sampler == "pause" else None,
        )  # fmt: skip
        loop = _Loop(model, decoder, gate, logits_processor, stopping_criteria, generation_config)
        return loop.run(input_ids, streamer)

    causal_lm: Any = model.causal_lm
    return causal_lm.generate(inputs, custom_generate=decode, streamer=streamer, **arguments)


def _check(model: Any, config: GenerationConfig, sampling: Sampling | None) -> None:
    if (config.num_beams or 1) > 1:
        raise UserError(
            f"num_beams: {config.num_beams} cannot be: beams are not thought about. Set "
            "num_beams=1, with do_sample=True for variety."
        )
    positions = getattr(model.causal_lm.config.get_text_config(), "max_position_embeddings", None)
    # The last token is only predicted: the one before it is the last with a thought behind it.
    block = num_virtual(model.causal_lm) - 1
    block += 0 if sampling is None else sampling.thought_length + 2
    if positions is not None and config.max_length + block > positions:
        raise UserError(
            f"max_length: texts of {config.max_length} tokens, with their thoughts, need "
            f"{config.max_length + block} positions and the model has {positions}; set "
            f"max_new_tokens so that texts have at most {positions - block} tokens"
        )


class _Loop:
    """Greedy or sampled decoding of a batch of texts."""

    def __init__(
        self,
        model: Any,
        decoder: Decoder,
        gate: Gate,
        processor: LogitsProcessorList,
        stopping: StoppingCriteriaList,
        config: GenerationConfig,
    ) -> None:
        self.model, self.decoder, self.gate = model, decoder, gate
        self.processor, self.stopping, self.config = processor, stopping, config
        self.scores: list[Tensor] = []
        self.logits: list[Tensor] = []
        self.thoughts: list[Tensor] = []

    def run(self, input_ids: Tensor, streamer: BaseStreamer | None) -> Any:
        open_rows = torch.ones_like(input_ids[:, 0], dtype=torch.bool)
        pad = getattr(self.config, "_pad_token_tensor", None)
        while True:
            tokens, thoughts = self._next(input_ids)
            if pad is not None:  # rows that have ended
                tokens = torch.where(open_rows, tokens, pad.to(tokens.device))
            input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
            if isinstance(streamer, ThinkingStreamer):
                streamer.think(thoughts.cpu())
            if streamer is not None:
                streamer.put(tokens.cpu())
            scores: Any = tuple(self.scores) if self.config.output_scores else None
            open_rows = open_rows & ~self.stopping(input_ids, scores)
            if not open_rows.any():
                break
        if streamer is not None:
            streamer.end()
        return self._output(input_ids)

    def _next(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Think and choose the next token of every row; also returns the thoughts."""
        logits, thoughts = self._predict(input_ids[:, -1])
        scores = self.processor(input_ids, logits)  # pyright: ignore[reportArgumentType]
        if self.config.return_dict_in_generate:
            self.thoughts.append(thoughts)
            if self.config.output_logits:
                self.logits.append(logits)
            if self.config.output_scores:
                self.scores.append(scores)
        if not self.config.do_sample:
            return scores.argmax(-1), thoughts
        return torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1), thoughts

    def _predict(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Predict the next tokens; also returns their thoughts, -1 where none was made."""
        decoder, model = self.decoder, self.model
        appended = decoder.append(tokens, opens=self.gate.kind != "never")
        states, base = appended.states, appended.logits
        sampling = decoder.sampling
        shape = (len(tokens), sampling.num_thoughts, sampling.thought_length)
        if self.gate.kind == "never":
            return base, tokens.new_empty(len(tokens), 0, sampling.thought_length)
        rows = None
        if self.gate.kind != "always":
            rows = self.gate.decide(states, base).nonzero().squeeze(1)
            rows = None if len(rows) == len(tokens) else rows
        if rows is not None and not len(rows):
            return base, tokens.new_full(shape, -1)
        thinking = decoder.think(appended, rows)
        if rows is None:
            return next_logits(model, states, base, thinking), thinking.tokens
        mixed = next_logits(model, states[rows], base[rows], thinking)
        thoughts = tokens.new_full(shape, -1).index_copy(0, rows, thinking.tokens)
        return base.index_copy(0, rows, mixed), thoughts

    def _output(self, input_ids: Tensor) -> Any:
        if not self.config.return_dict_in_generate:
            return input_ids
        return ThinkingOutput(
            sequences=input_ids,
            thoughts=torch.stack(self.thoughts, dim=1),
            scores=tuple(self.scores) if self.config.output_scores else None,
            logits=tuple(self.logits) if self.config.output_logits else None,
        )


def next_logits(
    model: Any,
    states: Float[Tensor, "rows width"],
    base: Float[Tensor, "rows vocab"],
    thinking: Thinking,
) -> Float[Tensor, "rows vocab"]:
    """Mix the logits of the next token, in float32; several thoughts are averaged as probabilities.

    Args:
        model: Model with mixing head and output head.
        states: States of the newest tokens.
        base: Logits of the plain model from these states.
        thinking: Thoughts behind these tokens.
    """
    weight = model.mixing_head(
        text_lookahead(states[:, None], 1, None), thinking.ahead[None, :, :, None]
    )
    weight = weight[0, :, :, 0, None]  # (K, B, 1)
    mixed = torch.lerp(base, model.output_head.logits(thinking.ahead), weight)
    if len(mixed) == 1:
        return mixed[0]
    return mixed.log_softmax(-1).logsumexp(0) - math.log(len(mixed))
