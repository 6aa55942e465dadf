"""Chains of thought, sampled several times: majority votes and pass@k.

After the published zero-shot evaluation: ``Let's think step by step.``, a chain of at most so many
tokens, then ``Therefore, the answer (arabic numerals) is`` and the first integer behind it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteriaList, StopStringCriteria

from quietstar.data.tokenizer import pad_left, padding_id
from quietstar.evaluation.tasks import Item
from quietstar.model.quiet_star import QuietStarForCausalLM

FINAL_ANSWER = "\nTherefore, the answer (arabic numerals) is"
ANSWER_TOKENS = 12
STOP = ("Q:", "\n\n\n")
MOST_SUBSETS = 20_000
"""Up to so many subsets of the votes are all counted, else so many are drawn."""


@dataclass(frozen=True)
class Voting:
    """How chains are generated.

    Attributes:
        votes: Chains of each item.
        temperature: Of their tokens; 0 takes the most likely.
        max_new_tokens: Of a chain, without the final answer.
        thought_temperature: Of the thoughts; None takes the most likely tokens.
        seed: Of both.
    """

    votes: int
    temperature: float
    max_new_tokens: int
    thought_temperature: float | None
    seed: int


def generate_chains(
    model: QuietStarForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    numbers: Sequence[int],
    voting: Voting,
    think: bool,
) -> list[list[str]]:
    """What follows the prompt of every item, once a vote, the final answer included.

    The first item's number keys the noise, so the same batch gives the same chains again.
    """
    torch.manual_seed(1_000_003 * voting.seed + numbers[0])
    prompts = [item.prompt for item in items for _ in range(voting.votes)]
    stop = StoppingCriteriaList([StopStringCriteria(tokenizer, list(STOP))])
    chains = _continue(model, tokenizer, prompts, voting, think, voting.max_new_tokens, stop)
    chains = [_before_stop(chain).rstrip() + FINAL_ANSWER for chain in chains]
    asked = [prompt + chain for prompt, chain in zip(prompts, chains, strict=True)]
    answers = _continue(model, tokenizer, asked, voting, think, ANSWER_TOKENS, None)
    texts = [chain + answer for chain, answer in zip(chains, answers, strict=True)]
    return [texts[i : i + voting.votes] for i in range(0, len(texts), voting.votes)]


def _continue(
    model: QuietStarForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    voting: Voting,
    think: bool,
    max_new_tokens: int,
    stop: StoppingCriteriaList | None,
) -> list[str]:
    longest = model.max_text_length
    room = None if longest is None else longest - max_new_tokens
    rows: list[Any] = [tokenizer(text)["input_ids"] for text in texts]
    rows = [row if room is None else row[-room:] for row in rows]
    pad = padding_id(tokenizer)
    ids, mask = (x.to(model.device) for x in pad_left(rows, pad))
    how: dict[str, Any] = {"do_sample": False}
    if voting.temperature > 0:
        how = {"do_sample": True, "temperature": voting.temperature, "top_k": 0, "top_p": 1.0}
    generated: Tensor = model.generate(
        ids, attention_mask=mask, think=think, max_new_tokens=max_new_tokens,
        thought_temperature=voting.thought_temperature, seed=voting.seed,
        pad_token_id=pad, stopping_criteria=stop,
        **how,
    )  # fmt: skip
    return tokenizer.batch_decode(generated[:, ids.shape[1] :], skip_special_tokens=True)


def _before_stop(chain: str) -> str:
    ends = [chain.find(stop) for stop in STOP if stop in chain]
    return chain[: min(ends)] if ends else chain


# --- What the votes say ---------------------------------------------------------------------------


def read_number(chain: str) -> str | None:
    """The first integer of the final answer, without thousands separators."""
    found = re.search(r"-?\d+", chain.rpartition(FINAL_ANSWER)[2].replace(",", ""))
    return None if found is None else str(int(found.group()))


def vote_metrics(numbers: Sequence[str | None], gold: str) -> dict[str, float]:
    """``maj@k`` and ``pass@k`` of an item, for k a power of two and for all votes.

    Unbiased: means over all choices of k of the votes (pass@k as in arXiv 2107.03374, eq. 1).
    A chain without a number does not vote; tied answers share the vote.
    """
    count = len(numbers)
    ks = sorted({1, count, *(2**i for i in range(count.bit_length()) if 2**i <= count)})
    right = sum(number == gold for number in numbers)
    metrics = {f"maj@{k}": majority(numbers, gold, k) for k in reversed(ks)}
    return metrics | {f"pass@{k}": pass_at(right, count, k) for k in ks if k > 1}


def majority(numbers: Sequence[str | None], gold: str, k: int) -> float:
    """Chance that the majority of k of the answers is right."""
    if math.comb(len(numbers), k) <= MOST_SUBSETS:
        chosen = list(combinations(range(len(numbers)), k))
    else:
        generator = np.random.default_rng(0)
        chosen = [generator.choice(len(numbers), k, replace=False) for _ in range(MOST_SUBSETS)]
    return sum(_vote([numbers[i] for i in subset], gold) for subset in chosen) / len(chosen)


def _vote(numbers: Sequence[str | None], gold: str) -> float:
    counts = Counter(number for number in numbers if number is not None)
    most = max(counts.values(), default=0)
    winners = [number for number, count in counts.items() if count == most]
    return 1 / len(winners) if gold in winners else 0.0


def pass_at(right: int, count: int, k: int) -> float:
    """Chance that at least one of k of the answers is right."""
    return 1.0 - math.comb(count - right, k) / math.comb(count, k)
