"""Goes through the items of a task, batch by batch, in the variants that are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quietstar.data.tokenizer import padding_id
from quietstar.evaluation.encoding import (
    AnswerBatch,
    Candidates,
    EncodedItem,
    encode,
    find_candidates,
)
from quietstar.evaluation.scoring import (
    Predictions,
    batch_of,
    donated,
    donors,
    item_metrics,
    predict_plain,
    predict_thinking,
    shuffle_within,
)
from quietstar.evaluation.store import ItemStore
from quietstar.evaluation.tasks import Item, Task
from quietstar.evaluation.votes import Voting, generate_chains, read_number, vote_metrics
from quietstar.model.quiet_star import QuietStarForCausalLM

WITHOUT, WITH = "without_thoughts", "with_thoughts"
CONTROLS = ("shuffled", "pause", "other")
"""A thought's own tokens in another order; a constant token; the thoughts of another item."""


@dataclass(frozen=True)
class Protocol:
    """How items are scored.

    Attributes:
        variants: Of `WITHOUT`, `WITH` and `CONTROLS`.
        batch_size: Items (chains, where there are votes) at once.
        samples: Thoughts of each item whose scores are averaged.
        thought_temperature: Of thoughts; None takes the most likely tokens.
        seed: Of thoughts, votes, controls and resampling.
        votes: Of a chain of thought.
        temperature: Of the chains.
        max_new_tokens: Of a chain.
        text_tokens: Read of a text without a prompt.
    """

    variants: tuple[str, ...]
    batch_size: int = 16
    samples: int = 1
    thought_temperature: float | None = None
    seed: int = 0
    votes: int = 8
    temperature: float = 0.9
    max_new_tokens: int = 384
    text_tokens: int = 256


class Runner:
    """Scores the items of tasks and stores them.

    Args:
        model: That thinks, with a lookahead of one.
        tokenizer: Its own.
        protocol: How.
        store: Where finished items are.
    """

    def __init__(
        self,
        model: QuietStarForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        protocol: Protocol,
        store: ItemStore,
    ) -> None:
        self.model, self.tokenizer, self.protocol, self.store = model, tokenizer, protocol, store
        self.pad = padding_id(tokenizer)

    def num_batches(self, task: Task, count: int) -> int:
        """How often `run` will advance."""
        return len(list(self._batches(task, list(range(count))))) * len(self._phases(task))

    def run(self, task: Task, items: Sequence[Item], advance: Callable[[], object]) -> int:
        """Score all items; returns how many were shortened.

        Raises:
            UserError: An answer that cannot be scored with this tokenizer.
        """
        if task.kind == "votes":
            self._run_votes(task, items, advance)
            return 0
        longest = self.model.max_text_length
        encoded = encode(task, items, self.tokenizer, longest, self.protocol.text_tokens)
        candidates = find_candidates(task, encoded, self.tokenizer)
        by_length = sorted(encoded, key=lambda one: (-len(one.ids), one.number))
        for phase in self._phases(task):
            for batch in self._batches(task, by_length):
                numbers = [one.number for one in batch]
                if not self.store.has(task.name, numbers, phase):
                    self.store.add(self._score(task, batch, phase, candidates, len(items)))
                advance()
        return sum(one.num_cut > 0 for one in encoded)

    def _phases(self, task: Task) -> list[list[str]]:
        """Variants that are made together; another item's thoughts must be there before."""
        variants = [v for v in self.protocol.variants if task.kind != "votes" or v not in CONTROLS]
        first = [variant for variant in variants if variant != "other"]
        return [first, ["other"]] if "other" in variants else [first]

    def _batches(self, task: Task, items: Sequence[Any]) -> Iterator[Sequence[Any]]:
        size = self.protocol.batch_size
        if task.kind == "votes":
            size = max(1, size // self.protocol.votes)
        for start in range(0, len(items), size):
            yield items[start : start + size]

    # --- Scored tokens ----------------------------------------------------------------------------

    def _score(
        self,
        task: Task,
        items: Sequence[EncodedItem],
        variants: Sequence[str],
        candidates: Candidates | None,
        count: int,
    ) -> list[dict[str, Any]]:
        batch = batch_of(items, self.pad, self.model.device)
        records, own = [], None
        if any(variant in variants for variant in (WITH, "shuffled", "pause")):
            own = self._own_thoughts(items, batch)
        for variant in variants:
            if variant == WITHOUT:
                predictions = predict_plain(self.model, batch, candidates)
            else:
                thoughts = self._thoughts(variant, task, items, batch, own, count)
                predictions = predict_thinking(self.model, batch, candidates, thoughts)
            records += self._records(task, variant, items, batch, predictions, candidates)
        return records

    def _own_thoughts(self, items: Sequence[EncodedItem], batch: AnswerBatch) -> Tensor:
        numbers = torch.tensor([one.number for one in items], device=batch.ids.device)
        return self.model.sample(
            batch.ids, num_thoughts=self.protocol.samples, positions=batch.positions,
            temperature=self.protocol.thought_temperature, sample_ids=numbers,
            seed=self.protocol.seed,
        )  # fmt: skip

    def _thoughts(
        self,
        variant: str,
        task: Task,
        items: Sequence[EncodedItem],
        batch: AnswerBatch,
        own: Tensor | None,
        count: int,
    ) -> Tensor:
        seed, numbers = self.protocol.seed, [one.number for one in items]
        if variant == "other":
            given = donors(count, seed)
            kept = [self.store.records[task.name, given[n], WITH]["thoughts"] for n in numbers]
            thoughts = [torch.tensor(thought) for thought in kept]
            return donated(thoughts, batch.positions.shape[1]).to(batch.ids.device)
        assert own is not None, "all other variants begin with the model's own thoughts"
        if variant == "shuffled":
            return shuffle_within(own, numbers, seed)
        return torch.full_like(own, self.model.pause_token_id) if variant == "pause" else own

    def _records(
        self,
        task: Task,
        variant: str,
        items: Sequence[EncodedItem],
        batch: AnswerBatch,
        predictions: Predictions,
        candidates: Candidates | None,
    ) -> list[dict[str, Any]]:
        metrics = {k: v.tolist() for k, v in item_metrics(predictions, batch, candidates).items()}
        nll = (-predictions.logprobs.double()).mean(1).tolist()  # (B, P), over thoughts
        predicted = predictions.predicted.cpu()
        records = []
        for row, one in enumerate(items):
            places = slice(0, one.num_scored)
            record = {
                "task": task.name, "item": one.number, "variant": variant, "id": one.item.id,
                "answer": one.item.answer,
                "predicted": [self.tokenizer.decode(k) for k in predicted[row, :, places]],
                "metrics": {name: values[row] for name, values in metrics.items()},
                "nll": nll[row][places],
            }  # fmt: skip
            if variant == WITHOUT:
                record["tokens"] = self._texts(one.ids[len(one.ids) - one.num_scored :])
                record["position"] = len(one.ids) - one.num_scored
            if variant == WITH and predictions.thoughts is not None:
                thoughts = predictions.thoughts[row, :, places]
                record["thoughts"] = thoughts.tolist()
                record["thought_texts"] = [self._texts(sample) for sample in thoughts.tolist()]
            records.append(record)
        return records

    def _texts(self, tokens: Sequence[Any]) -> list[str]:
        return self.tokenizer.batch_decode([t if isinstance(t, list) else [t] for t in tokens])

    # --- Votes ------------------------------------------------------------------------------------

    def _run_votes(self, task: Task, items: Sequence[Item], advance: Callable[[], object]) -> None:
        p = self.protocol
        voting = Voting(p.votes, p.temperature, p.max_new_tokens, p.thought_temperature, p.seed)
        variants = [variant for variant in p.variants if variant in (WITHOUT, WITH)]
        for batch in self._batches(task, list(enumerate(items))):
            numbers = [number for number, _ in batch]
            for variant in variants:
                if self.store.has(task.name, numbers, [variant]):
                    continue
                asked = [item for _, item in batch]
                chains = generate_chains(
                    self.model, self.tokenizer, asked, numbers, voting, variant == WITH
                )
                pairs = zip(batch, chains, strict=True)
                self.store.add([_voted(task, variant, n, one, told) for (n, one), told in pairs])
            advance()


def _voted(task: Task, variant: str, number: int, item: Item, chains: list[str]) -> dict[str, Any]:
    numbers = [read_number(chain) for chain in chains]
    metrics = {name: [value] for name, value in vote_metrics(numbers, item.answer).items()}
    return {
        "task": task.name, "item": number, "variant": variant, "id": item.id,
        "answer": item.answer, "predicted": numbers, "metrics": metrics, "chains": chains,
    }  # fmt: skip
