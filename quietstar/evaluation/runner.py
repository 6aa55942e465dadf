"""Scores the items of tasks, batch by batch, in every variant, and keeps those finished.

Votes over chains of thought follow the published zero-shot evaluation: ``Let's think step by
step.``, a chain of at most so many tokens, then ``Therefore, the answer (arabic numerals) is`` and
the first integer after it.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import combinations, groupby
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Int
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteriaList, StopStringCriteria

from quietstar.attention.layout import NO_TOKEN
from quietstar.backbone.run import run_text
from quietstar.checks import ROUNDING
from quietstar.config.messages import closest, did_you_mean
from quietstar.data.tokenizer import pad_left, padding_id
from quietstar.errors import UserError, reading, reason_of
from quietstar.evaluation import controls, scoring, tasks
from quietstar.evaluation.controls import (
    CONTROLS,
    GENERIC,
    PAUSE,
    SHUFFLED,
    SWAPPED,
    WITH,
    WITHOUT,
)
from quietstar.evaluation.scoring import Protocol
from quietstar.evaluation.tasks import TASKS, Candidates, EncodedItem, Item, Task
from quietstar.losses.next_token import next_token_entropy
from quietstar.model.outputs import decode_thoughts
from quietstar.model.quiet_star import QuietStarForCausalLM
from quietstar.system.files import append, file_kind, write_whole
from quietstar.system.inputs import open_input
from quietstar.system.locks import locked
from quietstar.system.processes import ALONE, Processes
from quietstar.system.signals import held

FINAL_ANSWER = "\nTherefore, the answer (arabic numerals) is"
ANSWER_TOKENS = 12
EXACT = "exact_match"
"""Metric of one answer that a pattern finds in a generated text."""
STOP = ("Q:", "\n\n\n")
MAX_SUBSETS = 20_000
"""Up to so many subsets of the votes are all counted; of more, so many are drawn."""


FREE_SETTINGS = ("variants", "batch_size")
"""Settings that may differ between evaluations whose items are in one file."""


class _Header(BaseModel):
    """First line of a file of items."""

    model_config = ConfigDict(strict=True, extra="forbid")
    settings: dict[str, Any]


MOST = 1e30
"""Largest metric of an item: squares and sums of such numbers are still finite."""
RANGES = {"nll": (-ROUNDING, MOST), "gold_logprob": (-MOST, ROUNDING)} | dict.fromkeys(
    ("gold_probability", "accuracy", "accuracy_norm", "token_accuracy", "published_accuracy"),
    (-ROUNDING, 1 + ROUNDING),
)
"""Least and largest values of metrics; others, as of the harness, have a range of their own."""
Value = Annotated[float, Field(ge=-MOST, le=MOST, allow_inf_nan=False)]
Nll = Annotated[float, Field(ge=-ROUNDING, le=MOST, allow_inf_nan=False)]


class _Line(BaseModel):
    """A finished item in one variant, as far as figures are made of it."""

    model_config = ConfigDict(strict=True, extra="allow")
    task: str
    item: NonNegativeInt
    variant: str
    metrics: Annotated[dict[str, Annotated[list[Value], Field(min_length=1)]], Field(min_length=1)]
    nll: list[Nll] = []
    tokens: list[str] = []
    entropy: list[Value] = []
    position: NonNegativeInt = 0
    thoughts: list[list[list[Annotated[int, Field(ge=NO_TOKEN)]]]] = []
    votes: dict[str, Value] = {}
    groups: dict[str, str] = {}
    id: str = ""
    answer: str = ""
    prompt: str = ""
    predicted: list[Any] = []
    thought_texts: list[Annotated[list[str], Field(min_length=1)]] = []
    thought_length: Value | None = None
    truncated_fraction: Value | None = None

    @property
    def shape(self) -> tuple[Any, ...]:
        """What all items of a task and variant have in common: metrics, how many of each, votes."""
        counts = sorted((name, len(values)) for name, values in self.metrics.items())
        return (*counts, *self.votes)

    def check(self, scored: dict[tuple[str, int], int], shapes: dict[Any, Any]) -> None:
        """Compare with the lines before, which ``scored`` and ``shapes`` are made of.

        Raises:
            ValueError: One of the lines was changed.
        """
        for name, (low, high) in RANGES.items():
            if not all(low <= value <= high for value in self.metrics.get(name, ())):
                raise ValueError(f"its metric {name} is not from {low:g} to {high:g}")
        if len({len(texts) for texts in self.thoughts}) > 1 or (
            len({len(tokens) for texts in self.thoughts for tokens in texts}) > 1
        ):
            raise ValueError("its thoughts differ in length")
        if self.tokens and len(self.tokens) != len(self.nll):
            raise ValueError("its tokens and their NLL differ in number")
        if self.entropy and len(self.entropy) != len(self.nll):
            raise ValueError("its tokens and their entropy differ in number")
        if scored.setdefault((self.task, self.item), len(self.nll)) != len(self.nll):
            raise ValueError("its variants differ in their number of tokens")
        if shapes.setdefault((self.task, self.variant), self.shape) != self.shape:
            raise ValueError("its metrics are not those of the other items")


def settings_changes(previous: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """List the settings in which two evaluations differ, with their values; empty if in none."""
    names = sorted({*previous, *now} - {*FREE_SETTINGS})
    return ", ".join(
        f"{name} ({str(previous.get(name))[:80]}, now {str(now.get(name))[:80]})"
        for name in names
        if previous.get(name) != now.get(name)
    )


@contextmanager
def open_store(path: Path | None, settings: Mapping[str, Any], force: bool) -> Iterator[ItemStore]:
    """Open the file of items, and keep other processes from it; without a path all in memory.

    Raises:
        UserError: Another process writes it, or it was made under other settings.
    """
    if path is None:
        yield ItemStore(None, settings)
        return
    lock = path.with_name(f"{path.name}.lock")
    is_new = file_kind(lock) == "none"
    with locked(lock, f"--out-items ({path})", "Wait for its end, or give another --out."):
        try:
            yield ItemStore(path, settings, force)
        except UserError:  # which leaves nothing behind
            if is_new:
                lock.unlink(missing_ok=True)
            raise


Records = dict[tuple[str, int, str], dict[str, Any]]
"""Records of finished items, by task, number and variant."""


def _parse_items(data: bytes, where: str, remedy: str) -> tuple[dict[str, Any], Records]:
    """Parse the whole lines of a file of items into its settings and its records.

    Raises:
        UserError: A line is none of an evaluation's, or contradicts another.
    """
    settings, records, scored, shapes = {}, {}, {}, {}
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n"), 1):
        with reading(f"{where}, line {number}", remedy):
            record = tasks.parse_object(line)
            if number == 1:
                settings = _Header.model_validate(record).settings
                continue
            checked = _Line.model_validate(record)
            checked.check(scored, shapes)
            key = checked.task, checked.item, checked.variant
            if records.setdefault(key, record) is not record:
                raise ValueError(f"item {checked.item} stands twice as {checked.variant}")
    return settings, records


def read_items(path: Path, where: str, remedy: str) -> tuple[dict[str, Any], Records]:
    """Read the settings and the records of a file of items.

    Args:
        path: Path of the file.
        where: What an error blames, such as ``RUN (a.json)``.
        remedy: What the user can do, as a sentence.

    Raises:
        UserError: It cannot be read, or is no file of items.
    """
    with reading(where, remedy), open_input(path) as file:
        data = file.read()
    return _parse_items(data[: data.rfind(b"\n") + 1] or data, where, remedy)


class ItemStore:
    """Records of finished items, in memory and, with a path, in a JSONL file that only grows.

    The first line says under which settings the others were made. A file of other settings or with
    other content is not touched; ``force`` replaces it when the first items are finished.

    Raises:
        UserError: The file was made under other settings, or is no file of an evaluation.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any], force: bool = False) -> None:
        self.path = path
        self.records: Records = {}
        self._header = json.dumps({"settings": settings}) + "\n"
        self._is_begun = path is not None and not force and file_kind(path) != "none"
        if path is None or not self._is_begun:
            return
        where, remedy = f"--out-items ({path})", "Give another file, or --force to begin anew."
        with reading(where, remedy), open_input(path) as file:
            data = file.read()
        if self._header.startswith(
            data.decode(errors="replace")
        ):  # empty, or cut in its first line
            self._is_begun = False
            return
        whole = data[: data.rfind(b"\n") + 1]
        previous, self.records = _parse_items(whole or data, where, remedy)
        with reading(f"{where}, line 1", remedy):
            changes = settings_changes(previous, settings)
        if changes:
            raise UserError(
                f"{where}: its items were made with another {changes}. Give another --out, or "
                "--force to begin anew."
            )
        if len(whole) < len(data):  # an interrupt cut the last line off
            write_whole(path, whole)

    def has(self, task: str, numbers: Sequence[int], variants: Sequence[str]) -> bool:
        """Say whether all of these are finished."""
        return all((task, n, variant) in self.records for n in numbers for variant in variants)

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        """Keep finished items; of a batch that was cut short some are there already."""
        new = {(r["task"], r["item"], r["variant"]): r for r in records}
        new = {key: record for key, record in new.items() if key not in self.records}
        if self.path is not None and new:
            lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in new.values())
            with held():  # so that the lines are whole
                self._write(self.path, lines)
        self.records |= new

    def _write(self, path: Path, lines: str) -> None:
        """Append lines, all or none of them."""
        if not self._is_begun or file_kind(path) == "none":
            write_whole(path, self._header + lines)
            self._is_begun = True
            return
        try:
            append(path, lines)
        except OSError as problem:
            raise UserError(
                f"--out-items ({path}): cannot be written ({reason_of(problem)}). The "
                f"{len(self.records)} finished scores are kept in it: free some space, and start "
                "the same command again."
            ) from problem


@dataclass(frozen=True)
class Runner:
    """Scores the items of tasks and stores them."""

    model: QuietStarForCausalLM  # with a lookahead of one
    tokenizer: PreTrainedTokenizerBase
    protocol: Protocol
    store: ItemStore
    processes: Processes = ALONE  # each scores every so many-th batch

    def num_batches(self, task: Task, items: Sequence[Item]) -> int:
        """Count how often `run` will advance."""
        phases = self._phases(task)
        times = len(phases[0]) if task.kind == "votes" else len(phases)
        units = [list(item.choices) or [item.answer] for item in items]  # a row for each choice
        return len(self._batches(task, units)) * times

    def run(self, task: Task, items: Sequence[Item], advance: Callable[[], object]) -> int:
        """Score all items; returns how many were shortened.

        Swapped thoughts are left out where a single item would have to swap with another one.

        Raises:
            UserError: An answer cannot be scored with this tokenizer.
        """
        if task.kind == "votes":
            batches = self._batches(task, list(enumerate(items)))
            self._share(
                [(batch, variant) for batch in batches for variant in self._phases(task)[0]],
                lambda work: self.store.has(task.name, [number for number, _ in work[0]], work[1:]),
                lambda work: self._vote(task, *work),
                advance,
            )
            return 0
        once = scoring.thinks_once(self.model, self.protocol.positions)
        encoded = tasks.encode(task, items, self.tokenizer, self.model.max_text_length,
                               self.protocol.text_tokens, once)  # fmt: skip
        candidates = tasks.find_candidates(task, encoded, self.tokenizer)
        units = [list(rows) for _, rows in groupby(encoded, key=lambda one: one.number)]
        by_length = sorted(units, key=lambda rows: (-max(len(r.ids) for r in rows), rows[0].number))
        can_swap = len(units) > 1 or encoded[0].swaps_within
        are_answers = all(item.prompt for item in items)
        for phase in self._phases(task):
            variants = [variant for variant in phase if variant != SWAPPED or can_swap]
            arguments = (variants, candidates, len(items), are_answers)
            self._share(
                self._batches(task, by_length),
                lambda batch, variants=variants: self.store.has(
                    task.name, [rows[0].number for rows in batch], variants
                ),
                lambda batch, arguments=arguments: self._score(
                    task, [one for rows in batch for one in rows], *arguments
                ),
                advance,
            )
        return len({one.number for one in encoded if one.num_cut > 0})

    def _share(
        self,
        batches: Sequence[Any],
        is_done: Callable[[Any], bool],
        score: Callable[[Any], list[dict[str, Any]]],
        advance: Callable[[], object],
    ) -> None:
        """Score the batches that are not done, one on each process at a time.

        All processes keep all records, since thoughts are swapped between any items.
        """
        missing = [batch for batch in batches if not is_done(batch)]
        for _ in range(len(batches) - len(missing)):
            advance()
        for records in self.processes.share(missing, score):
            self.store.add(records)
            advance()

    def _phases(self, task: Task) -> list[list[str]]:
        """List variants that are made together; the thoughts to swap with must be there before."""
        variants = list(self.protocol.variants)
        if task.kind == "votes":  # which swaps thoughts as they come
            return [variants]
        first = [variant for variant in variants if variant != SWAPPED]
        return [first, [SWAPPED]] if SWAPPED in variants else [first]

    def _batches(self, task: Task, items: Sequence[Any]) -> list[Sequence[Any]]:
        size = self.protocol.batch_size
        if task.kind == "votes":
            size = max(1, size // self.protocol.votes)
        elif items and isinstance(items[0], list):  # choices of one item stay together
            size = max(1, size // max(len(rows) for rows in items))
        swaps = task.kind == "votes" and SWAPPED in self.protocol.variants
        size = max(size, 2) if swaps else size
        batches = [items[start : start + size] for start in range(0, len(items), size)]
        if swaps and len(batches) > 1 and len(batches[-1]) < 2:  # no other to swap with
            batches[-2:] = [[*batches[-2], *batches[-1]]]
        return batches

    def _score(
        self,
        task: Task,
        items: Sequence[EncodedItem],
        variants: Sequence[str],
        candidates: Candidates | None,
        count: int,
        are_answers: bool,
    ) -> list[dict[str, Any]]:
        """Score a batch of a task of ``count`` items in several variants.

        ``are_answers`` says of the whole task whether its items have prompts.
        """
        counts, thinking = [one.num_scored for one in items], [one.num_thinking for one in items]
        pad = padding_id(self.tokenizer)
        batch = tasks.answer_batch([one.ids for one in items], counts, pad, thinking)
        batch = batch.to(self.model.device)
        numbers, seed = [one.number for one in items], self.protocol.seed
        records, generic = [], []
        # Of generic and blank thoughts only the positions count.
        own = batch.thinking[:, None, :, None]  # (B, 1, P, 1)
        with torch.no_grad():
            text = run_text(self.model.causal_lm, batch.ids) if {*variants} - {WITHOUT} else None
        entropy: list[list[float]] = []
        if text is not None and not are_answers:  # each token has a thought of its own
            places = batch.positions.clamp(min=0).unsqueeze(-1)  # (B, P, 1)
            states = text.states.take_along_dim(places, 1)
            entropy = next_token_entropy(states, self.model.output_head).tolist()
        if {WITH, SHUFFLED, PAUSE} & {*variants}:
            own = self.model.draw(
                batch.ids, num_thoughts=self.protocol.samples, positions=batch.thinking,
                temperature=self.protocol.thought_temperature,
                top_p=self.protocol.thought_top_p, top_k=self.protocol.thought_top_k,
                sample_ids=torch.tensor(numbers, device=batch.ids.device), seed=seed, text=text,
            ).tokens.transpose(1, 2)  # fmt: skip
        if GENERIC in variants:
            generic = controls.generic_tokens(
                self.tokenizer, self.model.thoughts.length, self.protocol.generic, "--generic"
            )
        thoughts = {WITH: own}
        for control in {*variants} - {WITHOUT, WITH, SWAPPED}:
            thoughts[control] = controls.make_thoughts(
                control, own, numbers, self.model.pause_token_id, generic, seed
            )
        if SWAPPED in variants:
            donors = controls.derangement(count, seed).tolist() if count > 1 else []
            swapped = []
            for one in items:  # with another item, or between the positions of a plain text
                donor = one.number if one.swaps_within else donors[one.number]
                other = torch.tensor(self.store.records[task.name, donor, WITH]["thoughts"])
                if other.ndim != 3 or not other.numel() or other.max() >= self.model.vocab_size:
                    raise UserError(
                        f"--out-items ({self.store.path}): the thoughts of item {donor} of "
                        f"{task.name} are none of this model. Begin anew with --force."
                    )
                if one.swaps_within:
                    other = controls.swap_positions(other, one.number)
                swapped.append(controls.fit_thoughts(other, batch.thinking.shape[1]))
            thoughts[SWAPPED] = torch.stack(swapped).to(batch.ids.device)
        for variant in variants:
            if variant == WITHOUT:
                scores = scoring.predict_plain(self.model, batch, candidates)
            else:
                given = thoughts[variant]
                scores = scoring.predict_thinking(self.model, batch, candidates, given, text)
            metrics = scoring.item_metrics(scores, batch, candidates, are_answers)
            chosen = None
            if items[0].choice is not None:
                logprobs = metrics["gold_logprob"]
                of_choices, chosen = scoring.choice_metrics(items, logprobs)
                metrics = {"nll": metrics["nll"], **of_choices}
            for name, values in metrics.items():
                for row in (~values.isfinite().all(1)).nonzero()[:1, 0].tolist():
                    where = f"{task.name}, item {numbers[row]} ({items[row].item.where})"
                    raise scoring.not_finite(f"{where}, {variant}", name, values[row].tolist())
            nll = (-scores.logprobs.cpu().double()).mean(1).tolist()  # (B, P), over thoughts
            made = []
            for row, one in enumerate(items):
                if not one.is_answer:
                    continue
                predicted = scores.predicted[row, :, : one.num_scored].cpu()
                record = {
                    "task": task.name, "item": one.number, "variant": variant, "id": one.item.id,
                    "answer": one.item.answer,
                    "predicted": self.tokenizer.batch_decode(predicted)
                    if chosen is None
                    else chosen[row],
                    "metrics": {name: values[row].tolist() for name, values in metrics.items()},
                    "nll": nll[row][: one.num_scored],
                }  # fmt: skip
                if variant == WITHOUT:
                    record["tokens"] = self.tokenizer.batch_decode([[i] for i in one.scored_ids])
                    record["position"] = len(one.ids) - one.num_scored
                    record["groups"] = dict(one.item.groups)
                    if entropy:
                        record["entropy"] = entropy[row][: one.num_scored]
                if variant == WITH:
                    record["prompt"] = one.item.prompt
                    tokens = thoughts[WITH][row, :, : one.num_thinking]
                    record["thoughts"] = tokens.tolist()
                    if self.model.may_end_early:
                        record |= self._lengths(tokens)
                    record["thought_texts"] = decode_thoughts(self.tokenizer, tokens)
                made.append(record)
            if variant == WITH and self._votes(task):
                own_rows = [one for one in items if one.is_answer]
                if chosen is None:
                    answers = self._answers(items, thoughts[WITH])
                    read = [
                        [tasks.read_answer(task, one.item, text) for text in texts]
                        for one, texts in zip(own_rows, answers, strict=True)
                    ]
                else:
                    answers = read = list(chosen.values())
                for one, texts, votes, record in zip(own_rows, answers, read, made, strict=True):
                    votes = vote_metrics(votes, one.item.answer)
                    record |= {"answers": texts, "votes": votes}
            records += made
        return records

    def _votes(self, task: Task) -> bool:
        """Say whether the answers after an item's thoughts vote: one thought gives one answer."""
        once = scoring.thinks_once(self.model, self.protocol.positions)
        return once and self.protocol.samples > 1

    def _answers(
        self, items: Sequence[EncodedItem], thoughts: Int[Tensor, "batch thoughts 1 length"]
    ) -> list[list[str]]:
        """Write the most likely answer after every thought, of at most `ANSWER_TOKENS` tokens."""
        count, pad = thoughts.shape[1], padding_id(self.tokenizer)
        rows = [one.ids[: -one.num_scored] for one in items for _ in range(count)]
        ids, mask = (x.to(self.model.device) for x in pad_left(rows, pad))
        generated = self.model.generate(
            ids, attention_mask=mask, thoughts=thoughts.flatten(0, 1), do_sample=False,
            max_new_tokens=ANSWER_TOKENS, pad_token_id=pad,
            logits_processor=scoring.refuse_not_finite(),
        )  # fmt: skip
        new = generated[:, ids.shape[1] :]
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [texts[start : start + count] for start in range(0, len(texts), count)]

    def _lengths(self, thoughts: Int[Tensor, "thoughts positions length"]) -> dict[str, float]:
        """Compute the mean length of an item's thoughts, and how many were cut at the last token.

        Both have the names of docs/metrics.md.
        """
        lengths = (thoughts != NO_TOKEN).sum(-1)
        is_cut = lengths == thoughts.shape[-1]
        if self.model.stop is not None:
            is_cut &= ~self.model.stop.is_ended(thoughts)
        return {
            "thought_length": lengths.double().mean().item(),
            "truncated_fraction": is_cut.double().mean().item(),
        }

    def _vote(
        self, task: Task, batch: Sequence[tuple[int, Item]], variant: str
    ) -> list[dict[str, Any]]:
        """Generate chains of thought with their final answers, several for each item.

        The first item's number keys the noise, so the same batch gives the same chains again.
        """
        protocol, longest = self.protocol, self.model.max_text_length
        most = None if longest is None else longest - 1
        if most is not None and max(protocol.max_new_tokens, ANSWER_TOKENS) > most:
            few = most < ANSWER_TOKENS
            remedy = "use a model that takes more" if few else f"set at most {most}"
            raise UserError(
                f"--max-new-tokens: {protocol.max_new_tokens} leaves no room for a prompt, because "
                f"the model takes texts of {longest} tokens, thoughts apart; {remedy}"
            )
        torch.manual_seed(1_000_003 * protocol.seed + batch[0][0])
        prompts = [item.prompt for _, item in batch for _ in range(protocol.votes)]
        texts_of_stop, stop = STOP, None
        if task.extract is not None:
            texts_of_stop = () if protocol.stop is None else (protocol.stop,)
        if texts_of_stop:
            stop = StoppingCriteriaList([StopStringCriteria(self.tokenizer, list(texts_of_stop))])
        chains = self._continue(prompts, protocol.max_new_tokens, variant, stop)
        for text in texts_of_stop:
            chains = [chain.partition(text)[0] for chain in chains]
        if task.extract is None:
            chains = [chain.rstrip() + FINAL_ANSWER for chain in chains]
            questions = [prompt + chain for prompt, chain in zip(prompts, chains, strict=True)]
            endings = self._continue(questions, ANSWER_TOKENS, variant, None)
            chains = [chain + ending for chain, ending in zip(chains, endings, strict=True)]
        records = []
        for place, (number, item) in enumerate(batch):
            texts = chains[place * protocol.votes : (place + 1) * protocol.votes]
            if task.extract is None:
                answers = [tasks.read_number(text.rpartition(FINAL_ANSWER)[2]) for text in texts]
                metrics = vote_metrics(answers, item.answer)
            else:
                answers = [tasks.extract_answer(task.extract, text) for text in texts]
                metrics = vote_metrics(answers, tasks.without_separators(item.answer.strip()))
                metrics = {EXACT if name == "maj@1" else name: x for name, x in metrics.items()}
            records.append({
                "task": task.name, "item": number, "variant": variant, "id": item.id,
                "prompt": item.prompt, "answer": item.answer, "predicted": answers,
                "metrics": {name: [value] for name, value in metrics.items()}, "chains": texts,
            })  # fmt: skip
        return records

    def _continue(
        self, texts: Sequence[str], new: int, variant: str, stop: StoppingCriteriaList | None
    ) -> list[str]:
        rows: list[Any] = [self.tokenizer.encode(text) for text in texts]
        if self.model.max_text_length is not None:
            rows = [row[-(self.model.max_text_length - new) :] for row in rows]
        pad, temperature = padding_id(self.tokenizer), self.protocol.temperature
        ids, mask = (x.to(self.model.device) for x in pad_left(rows, pad))
        decoding: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            decoding = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        replace = None
        if variant in CONTROLS:
            generic = controls.generic_tokens(
                self.tokenizer, self.model.thoughts.length, self.protocol.generic, "--generic"
            )
            replace = controls.replacement(
                variant, self.model.pause_token_id, generic, self.protocol.votes,
                "evaluate two items at least, or leave --controls out",
            )  # fmt: skip
        generated = self.model.generate(
            ids, attention_mask=mask, think=variant != WITHOUT, max_new_tokens=new,
            replace_thoughts=replace,
            thought_temperature=self.protocol.thought_temperature,
            thought_top_p=self.protocol.thought_top_p, thought_top_k=self.protocol.thought_top_k,
            seed=self.protocol.seed,
            pad_token_id=pad, stopping_criteria=stop, logits_processor=scoring.refuse_not_finite(),
            **decoding,
        )  # fmt: skip
        return self.tokenizer.batch_decode(generated[:, ids.shape[1] :], skip_special_tokens=True)


# --- What the votes say ---------------------------------------------------------------------------
def vote_metrics(numbers: Sequence[str | None], gold: str) -> dict[str, float]:
    """Compute ``maj@k`` and ``pass@k`` of an item, for k a power of two and for all votes.

    Unbiased: means over all choices of k of the votes (pass@k as in arXiv 2107.03374, eq. 1).
    A chain without a number does not vote; tied answers share the vote.
    """
    count = len(numbers)
    ks = sorted({1, count, *(2**i for i in range(count.bit_length()) if 2**i <= count)})
    right = sum(number == gold for number in numbers)
    metrics = {f"maj@{k}": majority(numbers, gold, k) for k in reversed(ks)}
    wrong = {k: math.comb(count - right, k) / math.comb(count, k) for k in ks if k > 1}
    return metrics | {f"pass@{k}": 1.0 - chance for k, chance in wrong.items()}


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


# --- Tasks of lm-evaluation-harness ---------------------------------------------------------------
@dataclass(frozen=True)
class HarnessTask:
    """A task, or a group of tasks, of the harness."""

    name: str  # that the harness knows it by
    include: str | None = None  # folder with task files of the user's own
    kind = "harness"
    main_metric = ""

    def run(
        self,
        args: Mapping[str, Any],
        protocol: Protocol,
        limit: int | None,
        data_dir: str | None,
        store: ItemStore,
    ) -> int:
        """Score all items in every variant that is not finished yet; returns their number.

        ``args`` are those of the model class: ``pretrained``, ``dtype``, ``device``, ``untrained``.
        ``limit`` counts the items of each task of a group; ``data_dir`` is for tasks that read
        files (``metadata``).

        Raises:
            UserError: The task has no metric of single items.
        """
        from lm_eval import evaluator

        from quietstar.evaluation import harness

        model_class: Any = harness.QuietStarLM  # the harness's decorators hide their types
        evaluate: Any = evaluator.simple_evaluate
        variants = list(protocol.variants)
        for variant in variants:
            if store.has(self.name, [0], [variant]):
                continue
            with harness.one_line_errors(f"--tasks ({self.name})"):
                model = model_class(
                    thoughts="off" if variant == WITHOUT else "on",
                    control=variant if variant in CONTROLS else None, generic=protocol.generic,
                    num_thoughts=protocol.samples,
                    thought_temperature=protocol.thought_temperature,
                    thought_top_p=protocol.thought_top_p, thought_top_k=protocol.thought_top_k,
                    seed=protocol.seed,
                    positions=protocol.positions, batch_size=protocol.batch_size, **args,
                )  # fmt: skip
                results = evaluate(
                    model=model, tasks=[self.name], limit=limit, log_samples=True,
                    bootstrap_iters=0, task_manager=_index_tasks(self.include, data_dir),
                )  # fmt: skip
            samples = [
                sample
                for _, of_task in sorted(results["samples"].items())
                for sample in sorted(of_task, key=lambda s: (s["doc_id"], str(s.get("filter"))))
            ]
            records = []
            for number, sample in enumerate(samples):
                values = [(name, sample[name]) for name in sample["metrics"]]
                for name, value in values:
                    if isinstance(value, float) and not math.isfinite(value):
                        where = f"{self.name}, item {number} (document {sample['doc_id']})"
                        raise scoring.not_finite(f"{where}, {variant}", name, value)
                predicted = json.dumps(sample["filtered_resps"], default=str)
                records.append({
                    "task": self.name, "item": number, "variant": variant,
                    "id": str(sample["doc_id"]), "answer": str(sample["target"]),
                    "prompt": str(sample["arguments"][0][0]),
                    "predicted": json.loads(predicted, parse_constant=str),
                    # A metric that is no number of a single item is left out.
                    "metrics": {k: [float(v)] for k, v in values if isinstance(v, int | float)},
                })  # fmt: skip
            if not records or not records[0]["metrics"]:
                raise UserError(
                    f"--tasks: {self.name} has no metric of single items, so nothing can be "
                    "paired; run it with quietstar eval lm-eval"
                )
            store.add(records)
        return sum(key[0] == self.name and key[2] == variants[-1] for key in store.records)


@cache
def _index_tasks(include: str | None, data_dir: str | None = None) -> Any:
    """Read the harness's thousands of task files, which takes many seconds, once."""
    from lm_eval.tasks import TaskManager

    metadata: dict[str, Any] = {} if data_dir is None else {"data_dir": data_dir}
    return TaskManager(include_path=include, metadata=metadata)


def find_harness_task(name: str, include: str | None) -> HarnessTask:
    """Find a task of the harness by its name.

    Raises:
        UserError: The harness has no such task, or is not installed.
    """
    known = []
    if find_spec("lm_eval") is not None:
        with reading(f"--include-path ({include})", "Mend its task files."):
            known = list(_index_tasks(include).all_tasks)
    if name in known:
        return HarnessTask(name, include)
    meant = did_you_mean(closest(name, [*TASKS, *known]))
    harness = "those of lm-evaluation-harness" if known else (
        "with pip install 'quietstar[lm-eval]' those of lm-evaluation-harness"
    )  # fmt: skip
    raise UserError(
        f"--tasks: there is no task {name}{meant}; known: {', '.join(TASKS)}, FILE.jsonl with "
        f"prompt and answer, or text, FILE.txt, and {harness}"
    )
