"""Generation that thinks before new tokens, with transformers' own arguments.

`transformers` prepares everything (generation config, logits processors, stopping criteria); only
its decoding loop is replaced, through ``custom_generate``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.utils.generic import ModelOutput

from quietstar.attention.layout import NO_TOKEN, text_lookahead
from quietstar.backbone.run import num_virtual
from quietstar.checks import check_ids, raise_failed
from quietstar.errors import UserError
from quietstar.generation.gates import Gate
from quietstar.sampling.decoding import Decoder
from quietstar.sampling.thoughts import Sampling

Replace = Callable[[Tensor], Tensor]
"""Makes other thoughts, (rows, thoughts or 1, at most as many tokens), of drawn ones."""


@dataclass
class ThinkingOutput(ModelOutput):
    """Output of generation: transformers' own fields, and the thoughts before each new token."""

    sequences: Int[Tensor, "batch seq"]  # prompts and what was generated
    thoughts: Int[Tensor, "batch new thoughts length"] | None = None  # -1 where none was made
    scores: tuple[Tensor, ...] | None = None  # processed, (batch, vocab); with output_scores
    logits: tuple[Tensor, ...] | None = None  # mixed, (batch, vocab); with output_logits


class ThinkingStreamer(BaseStreamer):
    """A streamer that also gets the thoughts, each before the token that it led to."""

    def think(self, thoughts: Int[Tensor, "batch thoughts length"]) -> None:
        """Take the thoughts of the next token; -1 where none was made."""
        raise NotImplementedError


@torch.no_grad()
def generate(
    model: Any,
    inputs: Int[Tensor, "batch seq"] | None = None,
    *,
    think: bool | Gate = True,
    num_thoughts: int = 1,
    thought_temperature: float | None = None,
    thought_top_p: float | None = None,
    thought_top_k: int | None = None,
    seed: int = 0,
    streamer: BaseStreamer | None = None,
    replace_thoughts: Replace | None = None,
    thoughts: Int[Tensor, "texts thoughts length"] | None = None,
    **arguments: Any,
) -> Any:
    """Generate texts, thinking before new tokens.

    Thoughts are dropped after use; the text is never run twice.

    Args:
        model: `QuietStarForCausalLM`, of which this is a method.
        inputs: Texts, padded on the left if at all; also as ``input_ids``.
        think: True: as the model was trained, once before the first new token with
            ``thoughts.positions: answer_start``, and otherwise before each. False: what the plain
            model generates. A `Gate`: texts think where it says so.
        num_thoughts: At a time; their predictions are averaged.
        thought_temperature: Of thoughts; None takes the most likely tokens. (``temperature`` is
            that of the text, as in transformers.)
        thought_top_p: Of thoughts: sample among the most likely tokens that together reach this
            probability. (``top_p`` is that of the text.)
        thought_top_k: Of thoughts: sample among so many of the most likely tokens.
        seed: Seed of the thoughts' noise.
        streamer: Is given each new token.
        replace_thoughts: Makes of the thoughts of some texts, (texts, thoughts, length), -1 after
            the end of each, others of the same shape, fewer tokens or one for all; the model reads
            them in place of its own. `quietstar.evaluation.controls` has some.
        thoughts: Read before the first new token in place of any that would be drawn, -1 after the
            end of each; only for a model that thinks once (or ``Gate("once")``).
        **arguments: Those of transformers' ``generate``: ``attention_mask``, ``max_new_tokens``,
            ``do_sample``, ``top_p``, ``num_return_sequences``, ``generation_config``, ...

    Returns:
        Token ids, (batch * num_return_sequences, prompt and new); with ``return_dict_in_generate``
        a `ThinkingOutput`, with the thoughts.

    Raises:
        UserError: No texts, beams, more tokens than the model has positions, or thoughts are given
            where the model thinks more than once.
    """
    inputs = arguments.pop("input_ids", None) if inputs is None else inputs
    if inputs is None:
        raise UserError("inputs: no texts are given; write generate(input_ids, ...)")
    check_ids(inputs, "inputs", model.num_embeddings)
    given, replace = thoughts, replace_thoughts
    sampling = Sampling.by(
        model.thoughts, model.stop, temperature=thought_temperature, top_p=thought_top_p,
        num_thoughts=num_thoughts if given is None else given.shape[1], top_k=thought_top_k,
        seed=seed,
    )  # fmt: skip
    if isinstance(think, Gate):
        gate = think
    else:  # as the model was trained
        once = model.thoughts.positions == "answer_start"
        gate = Gate(("once" if once else "always") if think else "never")
    if given is not None:
        _check_given(model, given, gate, len(inputs))

    def decode(
        causal_lm: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **others: Any,
    ) -> Any:
        config = generation_config
        _check(model, config, input_ids.shape[1], thinks=gate.kind != "never")
        decoder = new_decoder(model, sampling, input_ids[:, :-1], others.get("attention_mask"))
        pad = getattr(config, "_pad_token_tensor", None)
        predict = partial(predict_next, model, decoder, gate, replace=replace)
        if gate.kind == "once":
            predict = _Once(model, decoder, given, replace)
        kept_thoughts, kept_logits, kept_scores = [], [], []
        open_rows = torch.ones_like(input_ids[:, 0], dtype=torch.bool)
        while open_rows.any():
            logits, thoughts = predict(input_ids[:, -1])
            scores: Any = logits_processor(input_ids, logits)  # pyright: ignore[reportArgumentType]
            if config.return_dict_in_generate:
                kept_thoughts.append(thoughts)
                kept_logits += [logits] if config.output_logits else []
                kept_scores += [scores] if config.output_scores else []
            if config.do_sample:
                tokens = torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
            else:
                tokens = scores.argmax(-1)
            if pad is not None:  # rows that have ended
                tokens = torch.where(open_rows, tokens, pad.to(tokens.device))
            input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
            if isinstance(streamer, ThinkingStreamer):
                streamer.think(thoughts.cpu())
            if streamer is not None:
                streamer.put(tokens.cpu())
            open_rows = open_rows & ~stopping_criteria(input_ids, tuple(kept_scores) or None)
        if streamer is not None:
            streamer.end()
        if not config.return_dict_in_generate:
            return input_ids
        outputs = (tuple(column) or None for column in (kept_scores, kept_logits))
        return ThinkingOutput(input_ids, torch.stack(kept_thoughts, dim=1), *outputs)

    output = model.causal_lm.generate(
        inputs, custom_generate=decode, streamer=streamer, **arguments
    )  # fmt: skip
    raise_failed()
    return output


def _check_given(model: Any, given: Tensor, gate: Gate, batch: int) -> None:
    """Refuse thoughts that do not fit the texts, the model, or the way in which it thinks."""
    if gate.kind != "once":
        raise UserError(
            f'thoughts: are read before the first new token alone, and think is "{gate.kind}". '
            'Set think=Gate("once").'
        )
    if given.ndim != 3 or len(given) != batch or given.shape[-1] > model.thoughts.length:
        raise UserError(
            f"thoughts: must have the shape ({batch}, thoughts, at most {model.thoughts.length}), "
            f"not {tuple(given.shape)}"
        )


def _check(model: Any, config: GenerationConfig, prompt: int, thinks: bool) -> None:
    """Refuse beams, and texts that with a prompt of so many tokens would leave no room."""
    if (config.num_beams or 1) > 1:
        raise UserError(
            f"num_beams: {config.num_beams} cannot be: beams are not thought about. Set "
            "num_beams=1, with do_sample=True for variety."
        )
    positions, most = _positions(model), most_tokens(model, thinks)
    if most is None or config.max_length <= most:
        return
    if prompt >= most:
        raise UserError(
            f"the prompt ({prompt} tokens): must have fewer than {most}, as many as the model's "
            f"{positions} positions hold beside a thought. Give a shorter one."
        )
    raise UserError(
        f"max_new_tokens ({config.max_length - prompt}): must be at most {most - prompt}, since "
        f"the prompt has {prompt} tokens, and the model's {positions} positions hold texts of "
        f"{most} tokens beside a thought. Set it lower."
    )


def _positions(model: Any) -> int | None:
    return getattr(model.causal_lm.config.get_text_config(), "max_position_embeddings", None)


def most_tokens(model: Any, thinks: bool) -> int | None:
    """Count the tokens that a prompt and its continuation may have; None for any number."""
    positions = _positions(model)
    # The last token is only predicted: the one before it is the last with a thought after it.
    block = model.block_length - model.thoughts.lookahead + 1 if thinks else 0
    return None if positions is None else positions - block - num_virtual(model.causal_lm) + 1


def new_decoder(
    model: Any, sampling: Sampling, input_ids: Int[Tensor, "batch seq"], mask: Tensor | None = None
) -> Decoder:
    """Make a decoder of texts padded on the left, all their tokens but the newest."""
    real = torch.ones_like(input_ids) if mask is None else mask[:, : input_ids.shape[1]]
    rows = torch.arange(len(input_ids), device=input_ids.device)
    pause = model.pause_token_id if model.thoughts.sampler == "pause" else None
    return Decoder(
        model.causal_lm, model.output_head, model.start_vectors, model.end_vectors,
        sampling, input_ids, real.bool(), rows, pause,
    )  # fmt: skip


def predict_next(
    model: Any,
    decoder: Decoder,
    gate: Gate,
    tokens: Int[Tensor, " batch"],
    replace: Replace | None = None,
) -> tuple[Float[Tensor, "batch vocab"], Int[Tensor, "batch thoughts length"]]:
    """Append the newest tokens, think where the gate says so, and predict the next ones.

    ``replace`` makes other thoughts of the drawn ones, which are read in their place. Returns
    logits in float32, and the thoughts, -1 where none was made.
    """
    appended, sampling = decoder.append(tokens, opens=gate.kind != "never"), decoder.sampling
    states, base = appended.states, appended.logits
    if gate.kind == "never":
        return base, tokens.new_empty(len(tokens), 0, sampling.thought_length)
    if gate.kind == "always":  # nobody waits to hear which rows these are
        rows, some = torch.arange(len(tokens), device=tokens.device), None
    else:
        rows = gate.decide(base).nonzero().squeeze(1)
        some = None if len(rows) == len(tokens) else rows
    none = tokens.new_full((len(tokens), sampling.num_thoughts, sampling.thought_length), -1)
    if not len(rows):
        return base, none
    ahead, thoughts = decoder.think(appended, some)
    if replace is not None:
        other = replace(thoughts).expand(-1, sampling.num_thoughts, -1)
        missing = sampling.thought_length - other.shape[-1]
        thoughts = torch.nn.functional.pad(other, (0, missing), value=NO_TOKEN)
        ahead = decoder.read(thoughts, some)
    mixed = next_logits(model, states[rows], base[rows], ahead)
    return base.index_copy(0, rows, mixed), none.index_copy(0, rows, thoughts)


class _Once:
    """Predicts token after token as `predict_next` does, all with a thought before the first.

    The thought reaches as many tokens as in training (``thoughts.lookahead``); those beyond are the
    plain model's.
    """

    def __init__(
        self, model: Any, decoder: Decoder, given: Tensor | None, replace: Replace | None
    ) -> None:
        self.model, self.decoder, self.given, self.replace = model, decoder, given, replace
        self.behind: Decoder | None = None  # the texts as they go on after the thoughts
        self.count = 0  # tokens predicted

    def __call__(
        self, tokens: Int[Tensor, " batch"]
    ) -> tuple[Float[Tensor, "batch vocab"], Int[Tensor, "batch thoughts length"]]:
        model, decoder, sampling = self.model, self.decoder, self.decoder.sampling
        appended = decoder.append(tokens, opens=self.count == 0)
        states, base = appended.states, appended.logits
        none = tokens.new_full((len(tokens), sampling.num_thoughts, sampling.thought_length), -1)
        self.count += 1
        if self.count == 1:
            thoughts = self.given
            if thoughts is None:
                _, thoughts = decoder.think(appended)
            if self.replace is not None:
                thoughts = self.replace(thoughts).expand(-1, sampling.num_thoughts, -1)
            ahead = decoder.read(thoughts)
            self.behind = decoder.go_on(thoughts)
            none[..., : thoughts.shape[-1]] = thoughts
            return next_logits(model, states, base, ahead), none
        if self.count > model.thoughts.lookahead or self.behind is None:
            self.behind = None  # frees its cache
            return base, none
        ahead = self.behind.append(tokens.repeat_interleave(sampling.num_thoughts), opens=False)
        ahead = rearrange(ahead.states, "(b k) d -> k b d", k=sampling.num_thoughts)
        return next_logits(model, states, base, ahead), none


def next_logits(
    model: Any,
    states: Float[Tensor, "rows width"],
    base: Float[Tensor, "rows vocab"],
    ahead: Float[Tensor, "thoughts rows width"],
) -> Float[Tensor, "rows vocab"]:
    """Mix the plain logits from the states of the newest tokens with those after the thoughts.

    In float32; several thoughts are averaged as probabilities.
    """
    text = text_lookahead(states[:, None], 1, None)
    weight = model.mixing_head(text, ahead[None, :, :, None])[0, :, :, 0, None]  # (K, B, 1)
    mixed = torch.lerp(base, model.output_head.logits(ahead), weight)
    if len(mixed) == 1:
        return mixed[0]
    return mixed.log_softmax(-1).logsumexp(0) - math.log(len(mixed))
