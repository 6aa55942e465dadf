"""Two models, or one with and without thoughts, on the same prompts: what they write, who wins."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from quietstar.data.tokenizer import check_unicode, pad_left, padding_id
from quietstar.errors import UserError, reading
from quietstar.evaluation.runner import settings_changes
from quietstar.evaluation.scoring import refuse_not_finite
from quietstar.evaluation.statistics import interval
from quietstar.evaluation.tasks import parse_object, read_objects
from quietstar.generation.generate import most_tokens
from quietstar.judging.labels import Label, Pair
from quietstar.system.files import file_kind, write_json
from quietstar.system.inputs import open_input

NOTHING = "(no text)"
"""What a judge is shown in place of a text without any."""
Write = Callable[[Sequence[str], int], list[str]]
"""Continues some prompts, by noise of a seed."""


@dataclass(frozen=True)
class Contestant:
    """A model that continues prompts.

    Attributes:
        name: Folder of the model.
        thinks: Whether it thinks, if it is one that does.
        weights: What tells its weights from others.
    """

    name: str
    thinks: bool
    weights: str


def read_prompts(path: Path, limit: int | None) -> list[str]:
    """Read the field ``prompt`` of the first ``limit`` lines of a JSONL file, or of all.

    Raises:
        UserError: The file cannot be read, has no prompts, or a line has none.
    """
    prompts: list[str] = []
    for record, _, where in itertools.islice(read_objects(path, f"--prompts ({path})"), limit):
        prompt = record.get("prompt")
        if not isinstance(prompt, str) or not prompt:
            raise UserError(f"{where}: has no text prompt. Mend the line.")
        prompts.append(check_unicode(prompt, where))
    if not prompts:
        raise UserError(f"--prompts ({path}): has no prompts. Give a file with one on every line.")
    return prompts


def check_room(
    prompts: Sequence[str],
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    contestant: Contestant,
) -> None:
    """Refuse prompts after which a contestant cannot write so many tokens.

    Raises:
        UserError: One is too long for the model.
    """
    most = most_tokens(model, thinks=contestant.thinks)
    for number, prompt in enumerate(prompts, 1):
        count = len(tokenizer(prompt)["input_ids"])  # pyright: ignore[reportArgumentType]
        if most is not None and count + max_new_tokens > most:
            raise UserError(
                f"--prompts, prompt {number} ({prompt[:40]!r}...): has {count} tokens, "
                f"and with {max_new_tokens} new ones (--max-new-tokens) there must be at most "
                f"{most} for {contestant.name}. Shorten it, or leave it out."
            )


def writer(model: Any, tokenizer: PreTrainedTokenizerBase, thinks: bool, **sampling: Any) -> Write:
    """Make a function that continues prompts by a model, in their order.

    Args:
        model: `QuietStarForCausalLM`, perhaps of a plain model.
        tokenizer: The model's tokenizer.
        thinks: Whether to think, as the model was trained to.
        **sampling: ``max_new_tokens`` and ``temperature`` (0 takes the most likely tokens).
    """

    def write(prompts: Sequence[str], seed: int) -> list[str]:
        rows: list[Any] = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        if not all(rows):
            empty = prompts[rows.index([])]
            raise UserError(
                f"--prompts ({empty[:80]!r}): has no token in a model's vocabulary. Leave it out."
            )
        pad, temperature = padding_id(tokenizer), sampling["temperature"]
        ids, mask = (x.to(model.device) for x in pad_left(rows, pad))
        decoding: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            decoding = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        torch.manual_seed(seed)
        made = model.generate(
            ids, attention_mask=mask, think=thinks, seed=seed,
            max_new_tokens=sampling["max_new_tokens"], pad_token_id=pad,
            logits_processor=refuse_not_finite(), **decoding,
        )  # fmt: skip
        return tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)

    return write


def write_candidates(
    path: Path,
    prompts: Sequence[str],
    contestants: Sequence[Contestant],
    settings: Mapping[str, Any],
    load: Callable[[Contestant], Write],
    batch_size: int,
    advance: Callable[[], object],
    force: bool = False,
) -> tuple[list[Pair], str]:
    """Have two contestants continue every prompt; also returns a hash of what they wrote.

    The texts are kept in a file after each batch, from which the same command goes on.

    Args:
        path: JSON file that keeps the texts.
        prompts: Prompts for both.
        contestants: Two of them.
        settings: What else decides the texts.
        load: Loads a contestant, which is done only if there is something left to write.
        batch_size: Prompts at once.
        advance: Called for every text.
        force: Whether to begin anew, whatever the file holds.

    Raises:
        UserError: The file holds other texts, or a model cannot be loaded or run.
    """
    digest = hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()[:16]
    settings = {**settings, "prompts": digest, "batch_size": batch_size}
    for number, contestant in enumerate(contestants, 1):
        settings |= {f"model {number}": contestant.weights, f"thoughts {number}": contestant.thinks}
    texts: list[list[str]] = [[], []]
    if file_kind(path) != "none" and not force:
        remedy = "Give another --out, or --force to begin anew."
        with reading(f"--out ({path})", remedy), open_input(path) as file:
            previous = parse_object(file.read())
            if set(previous) != {"settings", "texts"} or len(previous["texts"]) != 2:
                raise ValueError("it holds no texts of two models")
        texts = [list(map(str, column)) for column in previous["texts"]]
        # A model that has written nothing yet may be another one now.
        begun = [str(number) for number, column in enumerate(texts, 1) if column]
        same = [name for name in settings if name[-1] not in "12" or name[-1] in begun]
        old, new = ({name: x.get(name) for name in same} for x in (previous["settings"], settings))
        if changes := settings_changes(old, new):
            raise UserError(f"--out ({path}): was made with another {changes}. {remedy}")
    for number, (column, contestant) in enumerate(zip(texts, contestants, strict=True)):
        for _ in column:
            advance()
        write = None
        while len(column) < len(prompts):
            write = load(contestant) if write is None else write
            # The same noise wherever the command was interrupted, another one for each model.
            noise = np.random.SeedSequence([settings["seed"], number, len(column)])
            seed = int(noise.generate_state(1)[0])
            new_texts = write(prompts[len(column) : len(column) + batch_size], seed)
            column += new_texts
            write_json(path, {"settings": settings, "texts": texts})
            for _ in new_texts:
                advance()
        del write  # its weights are not needed beside the next ones
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    pairs = [
        Pair(prompt, first.strip() or NOTHING, second.strip() or NOTHING, False, f"prompt {n}")
        for n, (prompt, first, second) in enumerate(zip(prompts, *texts, strict=True), 1)
    ]
    return pairs, hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def summarize_contest(labels: Sequence[Label], pairs: Sequence[Pair]) -> dict[str, Any]:
    """Compute how the first contestant does against the second.

    Returns:
        ``win_rate`` (mean probability that its text is preferred, 0.5 for equal ones) with
        ``win_rate_ci``; ``preferred`` and ``not_preferred`` (pairs in which its probability is
        above and below one half); ``empty`` (texts without any, of each).
    """
    rates = np.array([probability_of_first(x, p) for x, p in zip(labels, pairs, strict=True)])
    return {
        "win_rate": float(rates.mean()),
        "win_rate_ci": interval(rates, 0),
        "preferred": int((rates > 0.5).sum()),
        "not_preferred": int((rates < 0.5).sum()),
        "empty": [sum(text == NOTHING for text in column)
                  for column in ([p.first for p in pairs], [p.second for p in pairs])],
    }  # fmt: skip


def probability_of_first(label: Label, pair: Pair) -> float:
    """Probability that the first text of a pair is preferred."""
    return label.soft_label if label.chosen == pair.first else 1 - label.soft_label
