"""What rewards may ask the model that trains: log-probabilities, continuations, its judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from quietstar.attention.layout import IGNORE_INDEX, NO_TOKEN
from quietstar.backbone.run import plain_pass
from quietstar.data.tokenizer import decode_behind
from quietstar.errors import UserError
from quietstar.generation.continuations import Writing, continue_thoughts
from quietstar.losses.next_token import next_token_loss
from quietstar.losses.weights import Continuations
from quietstar.sampling.thoughts import ThoughtBatch

TOKENS_AT_ONCE = 2**14
"""Tokens of texts that run at once, padding included."""


@dataclass(frozen=True)
class LivePolicy:
    """The model that trains, as the rewards of a step ask it (`ThoughtScores`).

    Attributes:
        model: The model that trains, a `QuietStarForCausalLM`.
        seed: Seed of the noise of continuations.
    """

    model: Any
    seed: int = 0

    def logprob(self, prompts: Sequence[str], completions: Sequence[str]) -> Tensor:
        """Compute log p(completion | prompt)."""
        return text_logprobs(self.model, prompts, completions)

    def continuations(
        self,
        thoughts: ThoughtBatch,
        num_tokens: int | None,
        temperature: float | None,
        stop: Sequence[str] | None,
    ) -> Continuations:
        """Continue after thoughts."""
        model: Any = self.model
        tokenizer = self._tokenizer("continuations")
        default = Writing(model.thoughts.lookahead) if model.judge is None else model.judge.writing
        most = default.num_tokens if num_tokens is None else num_tokens
        heat = default.temperature if temperature is None else temperature
        ends = default.stop if stop is None else stop
        if most < 1:
            raise UserError(
                f"scores.continuations: num_tokens ({most}) must be at least 1. Set it so."
            )
        tokens = continue_thoughts(model, thoughts, most, heat, self.seed)
        places = (thoughts.positions >= 0).nonzero()
        text, place = places.T
        rows = tokens[text, place]  # (entries, thoughts, new)
        kept = [[t for t in row if t != NO_TOKEN] for row in rows.flatten(0, 1).tolist()]
        texts = [_until(written, ends) for written in decode_behind(tokenizer, kept)]
        num_thoughts = rows.shape[1]
        prompts, targets = [], []
        ids, labels = thoughts.input_ids.tolist(), thoughts.labels.tolist()
        for row, position in zip(
            text.tolist(), thoughts.positions[text, place].tolist(), strict=True
        ):
            prompts.append(ids[row][: position + 1])
            behind = labels[row][position + 1 :]
            targets.append(
                behind[: behind.index(IGNORE_INDEX)] if IGNORE_INDEX in behind else behind
            )
        return Continuations(
            prompts=tokenizer.batch_decode(prompts, skip_special_tokens=True),
            texts=[texts[n : n + num_thoughts] for n in range(0, len(texts), num_thoughts)],
            targets=[_until(true, ends) for true in decode_behind(tokenizer, targets)],
            places=places,
            like=thoughts.lengths,
        )

    def judge(
        self, prompts: Sequence[str], candidates: Sequence[Sequence[str]]
    ) -> list[list[float]]:
        """Ask the judge of the run."""
        if self.model.judge is None:
            raise UserError(
                "scores.judge: the model has no judge. Set judge.model in the config of the run, "
                "or in your own loop model.judge to a quietstar.judging.Critic."
            )
        return self.model.judge(prompts, candidates)

    def records(self, thoughts: ThoughtBatch) -> list[dict[str, Any]]:
        """Return the raw record of each text."""
        if self.model.records is None:
            raise UserError(
                "scores.records: the model knows no records. In your own loop set model.records to "
                "a function from the sample_ids of texts to their records."
            )
        return self.model.records(thoughts.sample_ids.tolist())

    def decode(self, thoughts: ThoughtBatch) -> list[list[str]]:
        """Return the texts of thoughts, by entry."""
        text, place = (thoughts.positions >= 0).nonzero().T
        return self.model.decode_thoughts(thoughts.tokens[text, place])

    def _tokenizer(self, name: str) -> Any:
        if self.model.tokenizer is None:
            raise UserError(f"scores.{name}: the model has no tokenizer. Give it one (tokenizer=).")
        return self.model.tokenizer


def _until(text: str, stop: Sequence[str]) -> str:
    """What stands before the first of some texts; all of it where there is none."""
    return text[: min((text.find(x) for x in stop if x in text), default=len(text))]


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
