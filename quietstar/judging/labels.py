"""Pairs of candidates in a file, the preferences a judge gives them, and what these say of it."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from quietstar.data.tokenizer import check_unicode
from quietstar.errors import UserError, reading, reason_of
from quietstar.evaluation.runner import settings_changes
from quietstar.evaluation.statistics import interval
from quietstar.evaluation.tasks import parse_object, read_objects
from quietstar.judging.judge import Comparison
from quietstar.system.files import append, file_kind, write_json, write_whole
from quietstar.system.inputs import open_input
from quietstar.system.locks import locked
from quietstar.system.signals import held

MAX_SETTINGS_BYTES = 2**20
"""A larger file is none of settings."""
Probability = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class Pair:
    """Two candidates for a prompt.

    Attributes:
        prompt: What the candidates answer or continue.
        first: A candidate; the one that the file says was chosen, if it does.
        second: The other candidate; the rejected one, if the file says so.
        is_labeled: Whether the file says which was chosen.
        where: Place in the file.
    """

    prompt: str
    first: str
    second: str
    is_labeled: bool
    where: str


def read_pairs(path: Path, limit: int | None) -> tuple[list[Pair], str]:
    """Read the first ``limit`` pairs of a JSONL file, or all; also returns a hash of their lines.

    A line has ``prompt``, and ``candidates`` (two) or ``chosen`` and ``rejected``.

    Raises:
        UserError: The file cannot be read, has no pairs, or a line is none.
    """
    pairs, digest = [], hashlib.sha256()
    for record, line, where in itertools.islice(read_objects(path, f"--pairs ({path})"), limit):
        pairs.append(_read_pair(record, where))
        digest.update(line)
    if not pairs:
        raise UserError(f"--pairs ({path}): has no pairs. Give a file with one on every line.")
    return pairs, digest.hexdigest()[:16]


def _read_pair(record: Mapping[str, Any], where: str) -> Pair:
    texts = [record.get("prompt")]
    if is_labeled := "candidates" not in record:
        texts += [record.get("chosen"), record.get("rejected")]
    elif not isinstance(record["candidates"], list) or len(record["candidates"]) != 2:
        raise UserError(f"{where}: candidates must be a list of two texts. Mend the line.")
    elif "chosen" in record or "rejected" in record:
        raise UserError(
            f"{where}: has both candidates and chosen or rejected, and must have one of them. Mend "
            "the line."
        )
    else:
        texts += record["candidates"]
    names = ("prompt", "chosen", "rejected") if is_labeled else ("prompt", *["candidates"] * 2)
    for name, text in zip(names, texts, strict=True):
        if name not in record:
            known = ", ".join(record)[:200] or "nothing"
            raise UserError(
                f"{where}: must have the texts prompt and candidates (two), or prompt, chosen and "
                f"rejected; it has {known}. Mend the line."
            )
        if not isinstance(text, str):
            raise UserError(
                f"{where}: {name} holds {type(text).__name__}, and must be plain text. Mend the "
                "line; of a conversation give the texts."
            )
        check_unicode(text, where)
    prompt, first, second = map(str, texts)
    for name, text in zip(("chosen", "rejected"), (first, second), strict=True):
        if not text.strip():
            what = name if is_labeled else f"candidate {1 + (name == 'rejected')}"
            raise UserError(f"{where}: {what} is empty, and must be a text. Mend the line.")
    return Pair(prompt, first, second, is_labeled, where)


class Label(BaseModel):
    """A line of the file of preferences, as trainers of preferences read it (plain texts).

    Attributes:
        prompt: That of the pair.
        chosen: Candidate that the judge prefers; the first if it prefers none.
        rejected: Candidate that the judge does not prefer; the second if it prefers none.
        soft_label: Probability that ``chosen`` is preferred.
        margin: Log odds of that.
        probabilities: The same with ``chosen`` shown first, and second.
        mass: Probability of both labels together in these orders; empty for equal candidates.
        rationales: What the judge wrote before in these orders; empty if not asked for.
        is_cut: Whether the judge read the prompt without its beginning.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    prompt: str
    chosen: str
    rejected: str
    soft_label: Probability
    margin: FiniteFloat
    probabilities: Annotated[list[Probability], Field(min_length=2, max_length=2)]
    mass: list[FiniteFloat]
    rationales: list[str]
    is_cut: bool

    @classmethod
    def of(cls, pair: Pair, comparison: Comparison) -> Label:
        """Turn a comparison so that it is about the preferred candidate."""
        first_shown_first, first_shown_second = comparison.by_order
        mass, rationales = [*comparison.mass], [*comparison.rationales]
        if comparison.probability >= 0.5:
            return cls(
                prompt=pair.prompt, chosen=pair.first, rejected=pair.second,
                soft_label=comparison.probability, margin=comparison.margin,
                probabilities=[first_shown_first, first_shown_second],
                mass=mass, rationales=rationales, is_cut=comparison.is_cut,
            )  # fmt: skip
        return cls(
            prompt=pair.prompt, chosen=pair.second, rejected=pair.first,
            soft_label=1 - comparison.probability, margin=-comparison.margin,
            probabilities=[1 - first_shown_second, 1 - first_shown_first],
            mass=mass[::-1], rationales=rationales[::-1], is_cut=comparison.is_cut,
        )  # fmt: skip


class LabelFile:
    """The file of preferences, which grows in the order of the pairs, and one of their settings.

    The settings, and at the end the summary, have a file of their own, so that every line of the
    preferences is an example. Nothing is written or replaced before the first lines are finished.

    Attributes:
        labels: Those that are finished.

    Args:
        path: File of preferences.
        summary_path: File of settings and summary.
        settings: What decides the preferences.
        pairs: The pairs, in the order of the lines.
        unit: Lines that are written at once; of fewer at the end, all are made again, so that a
            file is the same whether it was interrupted or not.
        force: Whether to begin anew, whatever the files hold.

    Raises:
        UserError: The file was made under other settings, or by something else.
    """

    def __init__(
        self,
        path: Path,
        summary_path: Path,
        settings: Mapping[str, Any],
        pairs: Sequence[Pair],
        unit: int,
        force: bool = False,
    ) -> None:
        self.path, self.summary_path, self.settings = path, summary_path, settings
        self.labels: list[Label] = []
        remedy = "Give another --out, or --force to begin anew."
        is_new = force or file_kind(path) == "none" or path.stat().st_size == 0
        self._is_begun = not is_new
        if not force:
            self._check_settings(is_new, remedy)
        if is_new:
            return
        where = f"--out ({path})"
        with reading(where, remedy), open_input(path) as file:
            lines = file.read().split(b"\n")
        for number, line in enumerate(lines[:-1], 1):
            with reading(f"{where}, line {number}", remedy):
                label = Label.model_validate(parse_object(line))
                if number > len(pairs) or not _is_of(label, pairs[number - 1]):
                    raise ValueError(f"it is none of pair {number}")
                self.labels.append(label)
        if len(self.labels) < len(pairs):
            del self.labels[len(self.labels) // unit * unit :]
        kept = b"".join(line + b"\n" for line in lines[: len(self.labels)])
        if len(kept) < len(b"\n".join(lines)):
            write_whole(path, kept)

    def _check_settings(self, is_new: bool, remedy: str) -> None:
        """Refuse lines of other settings, and a file of settings that is something else."""
        if file_kind(self.summary_path) == "none":
            if not is_new:
                raise UserError(
                    f"--out ({self.path}): exists without its settings ({self.summary_path}), so "
                    f"this command did not begin it. {remedy}"
                )
            return
        where = f"--summary ({self.summary_path})"
        with reading(where, remedy), open_input(self.summary_path) as file:
            previous = parse_object(file.read(MAX_SETTINGS_BYTES))
            if set(previous) != {"judge", "summary"} or not isinstance(previous["judge"], dict):
                raise ValueError("it holds no settings of a judge")
            changes = settings_changes(previous["judge"], self.settings)
        if changes and not is_new:
            raise UserError(f"--out ({self.path}): was made with another {changes}. {remedy}")

    def add(self, labels: Sequence[Label]) -> None:
        """Append finished lines, all or none of them.

        Raises:
            UserError: They cannot be written.
        """
        rows = (json.dumps(x.model_dump(), ensure_ascii=False, allow_nan=False) for x in labels)
        if not self._is_begun:  # the lines first: old ones must not stand next to new settings
            write_whole(self.path, "")
            write_json(self.summary_path, {"judge": self.settings, "summary": None})
            self._is_begun = True
        try:
            with held():
                append(self.path, "".join(row + "\n" for row in rows))
        except OSError as problem:
            raise UserError(
                f"--out ({self.path}): cannot be written ({reason_of(problem)}). The "
                f"{len(self.labels)} finished lines are kept in it: free some space, and start the "
                "same command again."
            ) from problem
        self.labels += labels

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the summary next to the settings."""
        write_json(self.summary_path, {"judge": self.settings, "summary": summary})


def _is_of(label: Label, pair: Pair) -> bool:
    candidates = sorted((label.chosen, label.rejected))
    return label.prompt == pair.prompt and candidates == sorted((pair.first, pair.second))


@contextmanager
def open_labels(path: Path, *others: Any) -> Iterator[LabelFile]:
    """Open a `LabelFile` of these arguments, and keep other processes from it.

    Raises:
        UserError: Another process writes it, or `LabelFile` refuses it.
    """
    lock = path.with_name(f"{path.name}.lock")
    is_new = file_kind(lock) == "none"
    with locked(lock, f"--out ({path})", "Wait for its end, or give another --out."):
        try:
            yield LabelFile(path, *others)
        except UserError:  # which leaves nothing behind
            if is_new:
                lock.unlink(missing_ok=True)
            raise


def summarize_labels(labels: Sequence[Label], pairs: Sequence[Pair]) -> dict[str, Any]:
    """Compute what the preferences say of the judge.

    Returns:
        ``pairs``, ``equal`` (the same text twice), ``cut``; of the judged pairs ``same_slot`` (the
        share in which it gives the same number in both orders: position bias), its ``same_slot_ci``
        and ``slot_2`` (the share of these with number 2), ``mass`` (mean probability of both
        numbers), and, where the file says what was chosen, ``agreement`` with ``agreement_ci``.
        Shares of nothing are None.
    """
    judged = [(x, p) for x, p in zip(labels, pairs, strict=True) if x.chosen != x.rejected]
    # Chosen is number 1 where it is shown first, and 2 where it is shown second.
    sides = np.array([x.probabilities for x, _ in judged]).reshape(-1, 2) - 0.5
    same = sides.prod(1) < 0
    agrees = [
        0.5 if x.soft_label == 0.5 else float(x.chosen == p.first)
        for x, p in judged if p.is_labeled
    ]  # fmt: skip
    summary: dict[str, Any] = {
        "pairs": len(labels),
        "equal": len(labels) - len(judged),
        "cut": sum(x.is_cut for x in labels),
        "slot_2": float((sides[same, 1] > 0).mean()) if same.any() else None,
        "mass": float(np.mean([x.mass for x, _ in judged])) if judged else None,
    }
    for name, values in (("same_slot", same.astype(float)), ("agreement", np.array(agrees))):
        summary[name] = float(values.mean()) if len(values) else None
        summary[f"{name}_ci"] = interval(values, 0)
    return summary
