"""Log-probabilities of any texts by the model that trains, for rewards that ask for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from quietstar.attention.layout import IGNORE_INDEX
from quietstar.backbone.run import plain_pass
from quietstar.errors import UserError
from quietstar.losses.thought_loss import next_token_loss

TOKENS_AT_ONCE = 2**14
"""Tokens of texts that run at once, padding included."""


@torch.no_grad()
def text_logprobs(
    model: Any, prompts: Sequence[str], completions: Sequence[str]
) -> Float[Tensor, " texts"]:
    """Compute log p(completion | prompt), summed over the completion's tokens, nats.

    Without thoughts, without gradient. Prompt and completion are tokenized one by one, so that the
    completion's tokens do not depend on the prompt. Where weights are sharded, ranks whose texts
    need fewer passes than others' run passes that count for nothing: all must call this together.

    Args:
        model: `QuietStarForCausalLM` with a tokenizer.
        prompts: Texts that stand before the completions; may be empty where the tokenizer has a
            token that begins texts.
        completions: One text for each prompt, whose tokens are scored.

    Raises:
        UserError: No tokenizer, another number of completions, a completion without tokens, a
            prompt without any, or a text that is longer than the model reads.
    """
    texts = _encode(model, prompts, completions)
    order = sorted(range(len(texts)), key=lambda n: len(texts[n][0]), reverse=True)
    batches: list[list[int]] = []
    for n in order:
        if batches and (len(batches[-1]) + 1) * len(texts[batches[-1][0]][0]) <= TOKENS_AT_ONCE:
            batches[-1].append(n)
        else:
            batches.append([n])
    passes = torch.tensor(len(batches), device=model.device)
    if model.passes_together:
        torch.distributed.all_reduce(passes, torch.distributed.ReduceOp.MAX)
    logprobs = torch.zeros(len(texts), device=model.device)
    for index in range(int(passes)):
        if index >= len(batches):
            plain_pass(model.causal_lm, torch.zeros(1, 1, dtype=torch.long, device=model.device))
            continue
        rows = [texts[n] for n in batches[index]]
        ids = pad_sequence([torch.tensor(tokens) for tokens, _ in rows], batch_first=True)
        labels = pad_sequence(
            [torch.tensor([IGNORE_INDEX] * first + tokens[first:]) for tokens, first in rows],
            batch_first=True, padding_value=IGNORE_INDEX,
        )  # fmt: skip
        ids, labels = ids.to(model.device), labels.to(model.device)
        states = plain_pass(model.causal_lm, ids)
        _, result, _ = next_token_loss(states, labels, model.output_head)
        index_of = torch.tensor(batches[index], device=model.device)
        logprobs[index_of] = -result.nll.view(ids.shape).sum(1).to(logprobs.dtype)
    return logprobs


def _encode(
    model: Any, prompts: Sequence[str], completions: Sequence[str]
) -> list[tuple[list[int], int]]:
    """Tokens of each text, and how many of them are the prompt's."""
    tokenizer, longest = model.tokenizer, model.max_text_length
    if tokenizer is None:
        raise UserError("scores.logprob: the model has no tokenizer. Give it one (tokenizer=).")
    if isinstance(prompts, str) or isinstance(completions, str):
        raise UserError(
            "scores.logprob: prompts and completions must be lists of texts, not one text. Write "
            "scores.logprob([prompt], [completion])."
        )
    if len(prompts) != len(completions):
        raise UserError(
            f"scores.logprob: there are {len(prompts)} prompts and {len(completions)} completions, "
            "but each prompt has one. Give as many."
        )
    texts = []
    for prompt, completion in zip(prompts, completions, strict=True):
        before = tokenizer(prompt)["input_ids"] if prompt else []
        if before and before[-1] == tokenizer.eos_token_id:  # some tokenizers close every text
            before = before[:-1]
        if not before and tokenizer.bos_token_id is not None:
            before = [tokenizer.bos_token_id]
        behind = tokenizer(completion, add_special_tokens=False)["input_ids"]
        for name, text, tokens in (("prompt", prompt, before), ("completion", completion, behind)):
            if not tokens:
                raise UserError(
                    f"scores.logprob: the {name} {text!r} has no tokens, but needs one. Give a "
                    "longer text."
                )
        if longest is not None and len(before) + len(behind) > longest:
            raise UserError(
                f"scores.logprob: a text has {len(before) + len(behind)} tokens, but the model "
                f"reads at most {longest}. Shorten it."
            )
        texts.append((before + behind, len(before)))
    return texts
