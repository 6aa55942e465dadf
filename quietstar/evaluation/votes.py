"""Chains of thought, sampled several times: majority votes and pass@k.

After the published zero-shot evaluation: ``Let's think step by step.``, a chain of at most so many
tokens, then ``Therefore, the answer (arabic numerals) is`` and the first integer behind it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteriaList, StopStringCriteria

from quietstar.data.tokenizer import pad_left, padding_id
from quietstar.errors import UserError
from quietstar.evaluation.scoring import Protocol
from quietstar.evaluation.tasks import Item
from quietstar.model.quiet_star import QuietStarForCausalLM

FINAL_ANSWER = "\nTherefore, the answer (arabic numerals) is"
ANSWER_TOKENS = 12
STOP = ("Q:", "\n\n\n")
MAX_SUBSETS = 20_000
"""Up to so many subsets of the votes are all counted; of more, so many are drawn."""


def generate_chains(
    model: QuietStarForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[tuple[int, Item]],
    protocol: Protocol,
    think: bool,
) -> list[list[str]]:
    """Generate what follows the prompt of numbered items, once a vote, the final answer included.

    The first item's number keys the noise, so the same batch gives the same chains again.

    Raises:
        UserError: The chains leave no room for a prompt.
    """
    longest = model.max_text_length
    most = None if longest is None else longest - 1
    if most is not None and max(protocol.max_new_tokens, ANSWER_TOKENS) > most:
        remedy = "use a model that takes more" if most < ANSWER_TOKENS else f"set at most {most}"
        raise UserError(
            f"--max-new-tokens: {protocol.max_new_tokens} leaves no room for a prompt, because the "
            f"model takes texts of {longest} tokens, thoughts apart; {remedy}"
        )
    torch.manual_seed(1_000_003 * protocol.seed + items[0][0])
    decoding: dict[str, Any] = {"do_sample": False}
    if protocol.temperature > 0:
        decoding = {
            "do_sample": True, "temperature": protocol.temperature, "top_k": 0, "top_p": 1.0
        }  # fmt: skip

    def continued(texts: Sequence[str], new: int, stop: StoppingCriteriaList | None) -> list[str]:
        rows: list[Any] = [tokenizer.encode(text) for text in texts]
        if longest is not None:
            rows = [row[-(longest - new) :] for row in rows]
        pad = padding_id(tokenizer)
        ids, mask = (x.to(model.device) for x in pad_left(rows, pad))
        generated = model.generate(
            ids, attention_mask=mask, think=think, max_new_tokens=new,
            thought_temperature=protocol.thought_temperature, seed=protocol.seed,
            pad_token_id=pad, stopping_criteria=stop, **decoding,
        )  # fmt: skip
        return tokenizer.batch_decode(generated[:, ids.shape[1] :], skip_special_tokens=True)

    prompts = [item.prompt for _, item in items for _ in range(protocol.votes)]
    stop = StoppingCriteriaList([StopStringCriteria(tokenizer, list(STOP))])
    chains = continued(prompts, protocol.max_new_tokens, stop)
    for text in STOP:
        chains = [chain.partition(text)[0] for chain in chains]
    chains = [chain.rstrip() + FINAL_ANSWER for chain in chains]
    questions = [prompt + chain for prompt, chain in zip(prompts, chains, strict=True)]
    answers = continued(questions, ANSWER_TOKENS, None)
    texts = [chain + answer for chain, answer in zip(chains, answers, strict=True)]
    return [texts[i : i + protocol.votes] for i in range(0, len(texts), protocol.votes)]


# --- What the votes say ---------------------------------------------------------------------------


def read_number(chain: str) -> str | None:
    """Read the first integer of the final answer, without thousands separators."""
    match = re.search(r"-?\d+", chain.rpartition(FINAL_ANSWER)[2].replace(",", ""))
    return None if match is None else str(int(match.group()))


def vote_metrics(numbers: Sequence[str | None], gold: str) -> dict[str, float]:
    """Compute ``maj@k`` and ``pass@k`` of an item, for k a power of two and for all votes.

    Unbiased: means over all choices of k of the votes (pass@k as in arXiv 2107.03374, eq. 1).
    A chain without a number does not vote; tied answers share the vote.
    """
    count = len(numbers)
    ks = sorted({1, count, *(2**i for i in range(count.bit_length()) if 2**i <= count)})
    right = sum(number == gold for number in numbers)
    metrics = {f"maj@{k}": majority(numbers, gold, k) for k in reversed(ks)}
    return metrics | {f"pass@{k}": pass_at(right, count, k) for k in ks if k > 1}


def majority(numbers: Sequence[str | None], gold: str, k: int) -> float:
    """Compute the chance that the majority of k of the answers is right."""
    if math.comb(len(numbers), k) <= MAX_SUBSETS:
        subsets = list(combinations(range(len(numbers)), k))
    else:
        generator = np.random.default_rng(0)
        subsets = [generator.choice(len(numbers), k, replace=False) for _ in range(MAX_SUBSETS)]
    wins = 0.0
    for subset in subsets:
        counts = Counter(numbers[i] for i in subset if numbers[i] is not None)
        most = max(counts.values(), default=0)
        if most and counts[gold] == most:
            wins += 1 / sum(count == most for count in counts.values())
    return wins / len(subsets)


def pass_at(right: int, count: int, k: int) -> float:
    """Compute the chance that at least one of k of the answers is right."""
    return 1.0 - math.comb(count - right, k) / math.comb(count, k)
