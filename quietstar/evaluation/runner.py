"""Scores the items of tasks, batch by batch, in every variant, and keeps those finished."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from quietstar.data.tokenizer import padding_id
from quietstar.errors import UserError
from quietstar.evaluation import controls, scoring, tasks, votes
from quietstar.evaluation.controls import CONTROLS, PAUSE, SHUFFLED, SWAPPED, WITH, WITHOUT
from quietstar.evaluation.scoring import Protocol
from quietstar.evaluation.tasks import Candidates, EncodedItem, Item, Task
from quietstar.model.quiet_star import QuietStarForCausalLM

Key = tuple[str, int, str]
"""Task, number of the item, variant."""


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
        data = b"" if overwrite or not path.exists() else path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if not whole:
            path.write_text(json.dumps({"settings": settings}) + "\n", encoding="utf-8")
            return
        if len(whole) < len(data):  # an interrupt cut the last line off
            path.write_bytes(whole)
        previous: dict[str, Any] = {}
        fields: dict[str, type] = {"settings": dict}
        for number, line in enumerate(whole.splitlines(), 1):
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
            if number == 1:
                previous = record["settings"]
                fields = {"task": str, "item": int, "variant": str, "metrics": dict}
            else:
                self.records[record["task"], record["item"], record["variant"]] = record
        keys = {*previous, *settings}
        keys = sorted(key for key in keys if previous.get(key) != settings.get(key))
        if keys:
            changes = [f"{key} ({previous.get(key)}, now {settings.get(key)})" for key in keys]
            raise UserError(
                f"{path}: its items were made with another {', '.join(changes)}; give another "
                "--out, or --overwrite to begin anew"
            )

    def has(self, task: str, numbers: Sequence[int], variants: Sequence[str]) -> bool:
        """Say whether all of these are finished."""
        return all((task, n, variant) in self.records for n in numbers for variant in variants)

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        """Keep finished items; of a batch that was cut short some are there already."""
        new = {(r["task"], r["item"], r["variant"]): r for r in records}
        new = {key: record for key, record in new.items() if key not in self.records}
        self.records |= new
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in new.values())

    def of(self, task: str, variant: str, count: int) -> list[dict[str, Any]]:
        """Give the records of all items of a task, in order."""
        return [self.records[task, number, variant] for number in range(count)]


@dataclass(frozen=True)
class Runner:
    """Scores the items of tasks and stores them."""

    model: QuietStarForCausalLM  # with a lookahead of one
    tokenizer: PreTrainedTokenizerBase
    protocol: Protocol
    store: ItemStore

    def num_batches(self, task: Task, count: int) -> int:
        """Count how often `run` will advance."""
        return len(self._batches(task, range(count))) * len(self._phases(task))

    def run(self, task: Task, items: Sequence[Item], advance: Callable[[], object]) -> int:
        """Score all items; returns how many were shortened.

        Swapped thoughts are left out where a single item would have to swap with another one.

        Raises:
            UserError: An answer cannot be scored with this tokenizer.
        """
        if task.kind == "votes":
            for batch in self._batches(task, list(enumerate(items))):
                for variant in self._phases(task)[0]:
                    if not self.store.has(task.name, [number for number, _ in batch], [variant]):
                        self.store.add(self._vote(task, batch, variant))
                advance()
            return 0
        once = scoring.thinks_once(self.model, self.protocol.positions)
        encoded = tasks.encode(task, items, self.tokenizer, self.model.max_text_length,
                               self.protocol.text_tokens, once)  # fmt: skip
        candidates = tasks.find_candidates(task, encoded, self.tokenizer)
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

    def _batches(self, task: Task, items: Sequence[Any]) -> list[Sequence[Any]]:
        size = self.protocol.batch_size
        if task.kind == "votes":
            size = max(1, size // self.protocol.votes)
        return [items[start : start + size] for start in range(0, len(items), size)]

    def _score(
        self,
        task: Task,
        items: Sequence[EncodedItem],
        variants: Sequence[str],
        candidates: Candidates | None,
        count: int,
    ) -> list[dict[str, Any]]:
        """Score a batch of a task of ``count`` items in several variants."""
        counts, thinking = [one.num_scored for one in items], [one.num_thinking for one in items]
        pad = padding_id(self.tokenizer)
        batch = tasks.answer_batch([one.ids for one in items], counts, pad, thinking)
        batch = batch.to(self.model.device)
        numbers, seed = [one.number for one in items], self.protocol.seed
        records, thoughts = [], {}
        if {WITH, SHUFFLED, PAUSE} & {*variants}:
            own = self.model.sample(
                batch.ids, num_thoughts=self.protocol.samples, positions=batch.thinking,
                temperature=self.protocol.thought_temperature,
                sample_ids=torch.tensor(numbers, device=batch.ids.device), seed=seed,
            )  # fmt: skip
            thoughts = {WITH: own, PAUSE: controls.pause_tokens(own, self.model.pause_token_id)}
            if SHUFFLED in variants:
                thoughts[SHUFFLED] = controls.shuffle_tokens(own, numbers, seed)
        if SWAPPED in variants:
            donors = controls.derangement(count, seed).tolist() if count > 1 else []
            swapped = []
            for one in items:  # with another item, or between the positions of a plain text
                donor = one.number if one.swaps_within else donors[one.number]
                other = torch.tensor(self.store.records[task.name, donor, WITH]["thoughts"])
                if one.swaps_within:
                    other = controls.swap_positions(other, one.number)
                swapped.append(controls.fit_thoughts(other, batch.thinking.shape[1]))
            thoughts[SWAPPED] = torch.stack(swapped).to(batch.ids.device)
        for variant in variants:
            if variant == WITHOUT:
                scores = scoring.predict_plain(self.model, batch, candidates)
            else:
                scores = scoring.predict_thinking(self.model, batch, candidates, thoughts[variant])
            metrics = scoring.item_metrics(scores, batch, candidates)
            nll = (-scores.logprobs.cpu().double()).mean(1).tolist()  # (B, P), over thoughts
            for row, one in enumerate(items):
                predicted = scores.predicted[row, :, : one.num_scored].cpu()
                record = {
                    "task": task.name, "item": one.number, "variant": variant, "id": one.item.id,
                    "answer": one.item.answer,
                    "predicted": self.tokenizer.batch_decode(predicted),
                    "metrics": {name: values[row].tolist() for name, values in metrics.items()},
                    "nll": nll[row][: one.num_scored],
                }  # fmt: skip
                if variant == WITHOUT:
                    record["tokens"] = self.tokenizer.batch_decode([[i] for i in one.scored_ids])
                    record["position"] = len(one.ids) - one.num_scored
                if variant == WITH:
                    tokens = thoughts[WITH][row, :, : one.num_thinking].tolist()
                    record["thoughts"] = tokens
                    record["thought_texts"] = [self.tokenizer.batch_decode(k) for k in tokens]
                records.append(record)
        return records

    def _vote(
        self, task: Task, batch: Sequence[tuple[int, Item]], variant: str
    ) -> list[dict[str, Any]]:
        records = []
        chains = votes.generate_chains(
            self.model, self.tokenizer, batch, self.protocol, variant == WITH
        )
        for (number, item), texts in zip(batch, chains, strict=True):
            answers = [votes.read_number(text) for text in texts]
            metrics = votes.vote_metrics(answers, item.answer)
            records.append({
                "task": task.name, "item": number, "variant": variant, "id": item.id,
                "answer": item.answer, "predicted": answers,
                "metrics": {name: [value] for name, value in metrics.items()}, "chains": texts,
            })  # fmt: skip
        return records
