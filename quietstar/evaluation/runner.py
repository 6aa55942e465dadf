"""Scores the items of tasks, batch by batch, in every variant, and keeps those finished."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quietstar.data.tokenizer import padding_id
from quietstar.errors import UserError
from quietstar.evaluation.controls import (
    CONTROLS,
    PAUSE,
    SHUFFLED,
    SWAPPED,
    WITH,
    WITHOUT,
    derangement,
    fit_thoughts,
    pause_tokens,
    shuffle_tokens,
    swap_positions,
)
from quietstar.evaluation.scoring import (
    Predictions,
    batch_of,
    item_metrics,
    predict_plain,
    predict_thinking,
    thinks_once,
)
from quietstar.evaluation.tasks import (
    AnswerBatch,
    Candidates,
    EncodedItem,
    Item,
    Task,
    encode,
    find_candidates,
)
from quietstar.evaluation.votes import Voting, generate_chains, read_number, vote_metrics
from quietstar.model.quiet_star import QuietStarForCausalLM

Key = tuple[str, int, str]
"""Task, number of the item, variant."""


@dataclass(frozen=True)
class Protocol:
    """How items are scored.

    Attributes:
        variants: Some of `WITHOUT`, `WITH` and `CONTROLS`.
        batch_size: Items (chains, where there are votes) at once.
        samples: Thoughts of each item, over which scores are averaged.
        thought_temperature: Sampling temperature of thoughts; None takes the most likely tokens.
        seed: Seed of thoughts, votes, controls and resampling.
        votes: Chains of thought of an item.
        temperature: Sampling temperature of the chains.
        max_new_tokens: Tokens of a chain.
        text_tokens: Tokens that are read of a text without a prompt.
        positions: Where answers are thought about (`scoring.POSITIONS`).
        separator: Text between prompt and answer of the user's own records.
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
    positions: str = "trained"
    separator: str = ""


class ItemStore:
    """Records of finished items, in memory and, with a path, in a JSONL file that only grows.

    The first line says under which settings the others were made.

    Args:
        path: Path of the file; None keeps nothing.
        settings: Settings of this evaluation.
        overwrite: Begin anew.

    Raises:
        UserError: The file was made under other settings, or is no file of an evaluation.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any], overwrite: bool) -> None:
        self.path = path
        self.records: dict[Key, dict[str, Any]] = {}
        if path is None:
            return
        if overwrite or not path.exists() or b"\n" not in path.read_bytes():
            path.write_text(json.dumps({"settings": settings}) + "\n", encoding="utf-8")
            return
        first, *rest = self._lines(path)
        check_settings(path, first["settings"], settings)
        for record in rest:
            self.records[record["task"], record["item"], record["variant"]] = record

    @staticmethod
    def _lines(path: Path) -> list[dict[str, Any]]:
        """Read all whole lines; what an interrupt cut off is cut off the file too."""
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            path.write_bytes(whole)
        lines = []
        for number, line in enumerate(whole.splitlines(), 1):
            fields = {"task": str, "item": int, "variant": str, "metrics": dict}
            if number == 1:
                fields = {"settings": dict}
            try:
                record = json.loads(line)
                valid = all(isinstance(record.get(key), kind) for key, kind in fields.items())
            except (ValueError, AttributeError):
                valid, record = False, {}
            if not valid:
                raise UserError(
                    f"--out-items: {path}, line {number} is no line of an evaluation; remove it, "
                    "give another file, or --overwrite to begin anew"
                )
            lines.append(record)
        return lines

    def has(self, task: str, numbers: Sequence[int], variants: Sequence[str]) -> bool:
        """Say whether all of these are finished."""
        return all((task, n, variant) in self.records for n in numbers for variant in variants)

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        """Keep finished items; of a batch that was cut short some are there already."""
        records = [r for r in records if (r["task"], r["item"], r["variant"]) not in self]
        for record in records:
            self.records[record["task"], record["item"], record["variant"]] = record
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)

    def __contains__(self, key: Key) -> bool:
        """Say whether an item is finished in a variant."""
        return key in self.records

    def of(self, task: str, variant: str, count: int) -> list[dict[str, Any]]:
        """Give the records of all items of a task, in order."""
        return [self.records[task, number, variant] for number in range(count)]


def check_settings(path: Path, previous: Any, current: Mapping[str, Any]) -> None:
    """Refuse items that were made under other settings.

    Raises:
        UserError: Some setting differs.
    """
    keys = sorted(key for key in {*previous, *current} if previous.get(key) != current.get(key))
    if keys:
        changes = ", ".join(f"{key} ({previous.get(key)}, now {current.get(key)})" for key in keys)
        raise UserError(
            f"{path}: its items were made with another {changes}; give another --out, or "
            "--overwrite to begin anew"
        )


class Runner:
    """Scores the items of tasks and stores them.

    Args:
        model: Model that thinks, with a lookahead of one.
        tokenizer: Tokenizer of the model.
        protocol: How items are scored.
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
        """Count how often `run` will advance."""
        return len(list(self._batches(task, list(range(count))))) * len(self._phases(task))

    def run(self, task: Task, items: Sequence[Item], advance: Callable[[], object]) -> int:
        """Score all items; returns how many were shortened.

        Swapped thoughts are left out where a single item would have to swap with another one.

        Raises:
            UserError: An answer cannot be scored with this tokenizer.
        """
        if task.kind == "votes":
            self._run_votes(task, items, advance)
            return 0
        once = thinks_once(self.model, self.protocol.positions)
        encoded = encode(task, items, self.tokenizer, self.model.max_text_length,
                         self.protocol.text_tokens, once)  # fmt: skip
        candidates = find_candidates(task, encoded, self.tokenizer)
        by_length = sorted(encoded, key=lambda one: (-len(one.ids), one.number))
        can_swap = len(encoded) > 1 or encoded[0].swaps_within
        for phase in self._phases(task):
            variants = [variant for variant in phase if variant != SWAPPED or can_swap]
            for batch in self._batches(task, by_length):
                if not self.store.has(task.name, [one.number for one in batch], variants):
                    self.store.add(self._score(task, batch, variants, candidates, len(items)))
                advance()
        return sum(one.num_cut > 0 for one in encoded)

    def _phases(self, task: Task) -> list[list[str]]:
        """List variants that are made together; the thoughts to swap with must be there before."""
        variants = [v for v in self.protocol.variants if task.kind != "votes" or v not in CONTROLS]
        first = [variant for variant in variants if variant != SWAPPED]
        return [first, [SWAPPED]] if SWAPPED in variants else [first]

    def _batches(self, task: Task, items: Sequence[Any]) -> Iterator[Sequence[Any]]:
        size = self.protocol.batch_size
        if task.kind == "votes":
            size = max(1, size // self.protocol.votes)
        for start in range(0, len(items), size):
            yield items[start : start + size]

    def _score(
        self,
        task: Task,
        items: Sequence[EncodedItem],
        variants: Sequence[str],
        candidates: Candidates | None,
        count: int,
    ) -> list[dict[str, Any]]:
        batch = batch_of(items, self.pad, self.model.device)
        numbers, seed = [one.number for one in items], self.protocol.seed
        records, thoughts = [], {}
        if {WITH, SHUFFLED, PAUSE} & {*variants}:
            own = self.model.sample(
                batch.ids, num_thoughts=self.protocol.samples, positions=batch.thinking,
                temperature=self.protocol.thought_temperature,
                sample_ids=torch.tensor(numbers, device=batch.ids.device), seed=seed,
            )  # fmt: skip
            thoughts = {WITH: own, PAUSE: pause_tokens(own, self.model.pause_token_id)}
            if SHUFFLED in variants:
                thoughts[SHUFFLED] = shuffle_tokens(own, numbers, seed)
        if SWAPPED in variants:
            thoughts[SWAPPED] = self._swapped(task, items, batch, count)
        for variant in variants:
            if variant == WITHOUT:
                predictions = predict_plain(self.model, batch, candidates)
            else:
                predictions = predict_thinking(self.model, batch, candidates, thoughts[variant])
            records += self._records(task, variant, items, batch, predictions, candidates)
        return records

    def _swapped(
        self, task: Task, items: Sequence[EncodedItem], batch: AnswerBatch, count: int
    ) -> Tensor:
        """Thoughts of another item, or of other positions of a plain text, from the store."""
        seed, swapped = self.protocol.seed, []
        donors = derangement(count, seed).tolist() if count > 1 else []
        for one in items:
            donor = one.number if one.swaps_within else donors[one.number]
            thoughts = torch.tensor(self.store.records[task.name, donor, WITH]["thoughts"])
            if one.swaps_within:
                everywhere = torch.ones(1, thoughts.shape[1], dtype=torch.bool)
                thoughts = swap_positions(thoughts[None], everywhere, [one.number])[0]
            swapped.append(fit_thoughts(thoughts, batch.thinking.shape[1]))
        return torch.stack(swapped).to(batch.ids.device)

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
        nll = (-predictions.logprobs.cpu().double()).mean(1).tolist()  # (B, P), over thoughts
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
                record["tokens"] = self.tokenizer.batch_decode([[i] for i in one.scored_ids])
                record["position"] = len(one.ids) - one.num_scored
            if variant == WITH and predictions.thoughts is not None:
                thoughts = predictions.thoughts[row, :, : one.num_thinking].tolist()
                record["thoughts"] = thoughts
                record["thought_texts"] = [self.tokenizer.batch_decode(k) for k in thoughts]
            records.append(record)
        return records

    def _run_votes(self, task: Task, items: Sequence[Item], advance: Callable[[], object]) -> None:
        p = self.protocol
        voting = Voting(p.votes, p.temperature, p.max_new_tokens, p.thought_temperature, p.seed)
        for batch in self._batches(task, list(enumerate(items))):
            numbers, questions = [n for n, _ in batch], [item for _, item in batch]
            for variant in (v for v in p.variants if v in (WITHOUT, WITH)):
                if self.store.has(task.name, numbers, [variant]):
                    continue
                records = []
                chains = generate_chains(
                    self.model, self.tokenizer, questions, numbers, voting, variant == WITH
                )
                for number, item, texts in zip(numbers, questions, chains, strict=True):
                    answers = [read_number(text) for text in texts]
                    values = vote_metrics(answers, item.answer)
                    records.append({
                        "task": task.name, "item": number, "variant": variant, "id": item.id,
                        "answer": item.answer, "predicted": answers,
                        "metrics": {name: [value] for name, value in values.items()},
                        "chains": texts,
                    })  # fmt: skip
                self.store.add(records)
            advance()
