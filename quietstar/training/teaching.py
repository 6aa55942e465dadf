"""A teacher's predictions on disk: written once by `quietstar teach`, read by many students.

A folder has ``teacher.json`` (what taught, and how) and ``predictions.sqlite``, which has of every
text, by a digest of its tokens, where the teacher thought and its predictions as `TeacherTargets`
has them. An interrupted call goes on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from quietstar.attention.layout import NO_POSITION
from quietstar.data import Batch, TrainData
from quietstar.errors import UserError, reading
from quietstar.losses.distillation import TeacherTargets
from quietstar.model.quiet_star import QuietStarForCausalLM
from quietstar.model.scoring import teach
from quietstar.system.files import file_kind, write_json
from quietstar.system.store import Store

SETTINGS_FILE, STORE_FILE = "teacher.json", "predictions.sqlite"
FORMAT_VERSION = 2
TEXTS_AT_ONCE = 1024
"""Texts that are written together."""
_CHECKED_STEPS = 32
_DAMAGED = "Write a new one by quietstar teach."


def text_keys(batch: Batch) -> list[str]:
    """Return digests of the tokens of a batch's texts, by which their predictions are found."""
    texts = zip(batch.input_ids, batch.attention_mask, strict=True)
    contents = (ids[mask].numpy().astype("<i4").tobytes() for ids, mask in texts)
    return [hashlib.sha256(content).hexdigest()[:32] for content in contents]


class TeacherFolder:
    """Reads predictions of a teacher by text.

    Args:
        folder: What `quietstar teach` wrote.
        name: Key or option that named it, to begin messages with.

    Attributes:
        settings: Content of ``teacher.json``.

    Raises:
        UserError: There is no such folder, or a damaged one.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._where, self._folder = f"{name} ({folder})", folder
        path = folder / SETTINGS_FILE
        if not path.is_file():
            raise UserError(
                f"{self._where}: holds no predictions of a teacher ({SETTINGS_FILE} is missing)."
                " Write them by quietstar teach --model DIR --out FOLDER."
            )
        with reading(self._where, _DAMAGED):
            self.settings = json.loads(path.read_text(encoding="utf-8"))
            names = ("format_version", "vocab_size", "positions")
            version, *_ = (self.settings[name] for name in names)
            if version != FORMAT_VERSION:
                raise UserError(
                    f"{self._where}: is of format {version}, and this quietstar reads format "
                    f"{FORMAT_VERSION}. {'Upgrade it.' if version > FORMAT_VERSION else _DAMAGED}"
                )
            self._store = Store(folder / STORE_FILE)
            len(self._store)  # reads it

    def check(self, data: TrainData, steps: range, batch_size: int) -> None:
        """Refuse a run before its first step if texts of these steps were not taught.

        It looks at up to `_CHECKED_STEPS` of them, evenly spaced back from the last: an interrupted
        teacher lacks the texts from some step on, and one of other texts lacks all.
        """
        apart = -(-len(steps) // _CHECKED_STEPS)
        for step in reversed(steps[::-1][::apart]):
            self._keys(data.batch(step, batch_size, range(batch_size)), step)

    def _keys(self, batch: Batch, step: int | None = None) -> list[str]:
        """Return the keys of a batch's texts, all of which the teacher has read."""
        keys = text_keys(batch)
        if missing := sum(key not in self._store for key in keys):
            where = "this step" if step is None else f"step {step + 1}"
            raise UserError(
                f"{self._where}: has predictions for {len(self._store):,} texts, but for "
                f"{missing} of the {len(keys)} of {where} there are none. Write them by "
                f"quietstar teach --out {self._folder} with the data section, seed and steps of "
                "this run; what is there already is kept."
            )
        return keys

    def find(self, batch: Batch) -> TeacherTargets:
        """Return the predictions for the texts of a batch; both are on the host.

        Raises:
            UserError: The teacher has not read one of them.
        """
        keys = self._keys(batch)
        with reading(self._where, _DAMAGED):
            rows = [load(self._store[key]) for key in keys]
        is_everywhere = self.settings["positions"] == "all"
        places = max(1, *(len(row["positions"]) for row in rows))  # where none thinks, one pads
        if is_everywhere:
            places = batch.input_ids.shape[1]

        def padded(name: str, value: int = 0) -> Tensor:
            whole = pad_sequence([row[name] for row in rows], True, value)
            more = places - whole.shape[1]
            return pad(whole, (0, 0) * (whole.ndim - 2) + (0, more), value=value)

        return TeacherTargets(
            None if is_everywhere else padded("positions", NO_POSITION).long(),
            padded("tokens").long(),
            padded("logprobs"),
            padded("rest"),
            padded("true_logprobs"),
            num_tokens=torch.zeros((), dtype=torch.long),
        )


def write_teacher(
    model: QuietStarForCausalLM,
    data: TrainData,
    steps: range,
    folder: Path,
    *,
    batch_size: int,
    micro_batch_size: int,
    seed: int,
    top: int,
    settings: dict[str, Any],
    advance: Callable[[], object] = lambda: None,
) -> tuple[int, int]:
    """Have a model that thinks predict the texts of a run, and keep what it predicts.

    Texts that are there already are passed over, so the same call goes on where one was ended.

    Args:
        model: Teacher, which thinks by its own settings.
        data: Texts of the run.
        steps: Steps of the run whose texts are taught, of ``batch_size`` sequences each.
        folder: Where to write.
        batch_size: Sequences of a step.
        micro_batch_size: Sequences at once.
        seed: Seed of the thoughts' noise, with the texts' places in the run.
        top: Most likely tokens that are kept of each prediction.
        settings: What else ``teacher.json`` says of the teacher; another call's must be the same.
        advance: Called after every micro-batch.

    Returns:
        How many texts the folder holds, and how many of them are new.

    Raises:
        UserError: The folder is of another teacher, or cannot be written.
    """
    thoughts = model.thoughts
    is_everywhere = thoughts.positions == "all"
    content = {
        "format_version": FORMAT_VERSION,
        "top_tokens": min(top, model.output_head.num_logits),
        "lookahead": 1 if is_everywhere else thoughts.lookahead,
        "positions": thoughts.positions,
        "seed": seed,
        **settings,
    }
    if file_kind(folder) == "none":
        folder.mkdir(parents=True)
        write_json(folder / SETTINGS_FILE, content)
    elif not (folder / SETTINGS_FILE).is_file():
        raise UserError(f"--out ({folder}): holds something else already. Give a new folder.")
    store = Store(folder / STORE_FILE, writable=True)
    known = TeacherFolder(folder, "--out")
    changed = {key: known.settings.get(key) for key in content}
    if changed := {key: was for key, was in changed.items() if was != content[key]}:
        short = "top_tokens", "lookahead", "positions", "seed", "vocab_size"
        how = [f"{key} {was}, now {content[key]}" if key in short else key
               for key, was in changed.items()]  # fmt: skip
        raise UserError(
            f"--out ({folder}): was written with other settings ({'; '.join(how)}). Give a new"
            " folder."
        )
    count, pieces = len(store), dict[str, bytes]()
    try:
        for step in steps:
            for start in range(0, batch_size, micro_batch_size):
                some = range(start, min(start + micro_batch_size, batch_size))
                batch = data.batch(step, batch_size, some)
                keys, new = text_keys(batch), dict[str, int]()
                for row, key in enumerate(keys):
                    if key not in pieces and key not in store:
                        new.setdefault(key, row)
                if new:
                    pieces |= _teach(model, batch, new, seed, top)
                advance()
                if len(pieces) >= TEXTS_AT_ONCE:
                    store.add(pieces)
                    pieces = {}
    finally:  # an interrupt, too, keeps the texts that were taught
        store.add(pieces)
    return len(store), len(store) - count


def _teach(
    model: QuietStarForCausalLM, batch: Batch, texts: dict[str, int], seed: int, top: int
) -> dict[str, bytes]:
    """Return the predictions for some texts of a batch, given by key with their rows."""
    index, device = torch.tensor([*texts.values()]), model.device
    result = teach(
        model,
        batch.input_ids[index].to(device),
        batch.attention_mask[index].to(device),
        batch.labels[index].to(device),
        answers=batch.answers[index].to(device),
        marked=batch.marked[index].to(device),
        sample_ids=batch.sample_ids[index].to(device),
        seed=seed,
        top=top,
    )
    pieces = {}
    for n, (key, row) in enumerate(texts.items()):
        if result.positions is None:
            positions = torch.arange(int(batch.attention_mask[row].sum()))
        else:
            positions = result.positions[n][result.positions[n] >= 0].cpu()
        parts = {"positions": positions.int()}
        for name in ("tokens", "logprobs", "rest", "true_logprobs"):
            part = getattr(result, name)[n, : len(positions)].cpu()
            parts[name] = (part.int() if name == "tokens" else part.float()).contiguous()
        pieces[key] = save(parts)
    return pieces
