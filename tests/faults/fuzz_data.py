"""Malformed texts and items, and files that are none."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

from cases import Case
from material import command
from spoiling import (
    ESCAPES,
    NESTED,
    generator,
    replace_entry,
    spoil_bytes,
)

FORMATS = {"texts.jsonl": "text", "qa.jsonl": "qa", "chats.jsonl": "chat", "text.txt": "text"}


@generator("train/data", "eval/data", "generate/data", "inspect/data")
def _data(rng: random.Random, work: Path, run: str) -> Case:
    """A file of texts, or of items, that is no such file, or holds something else."""
    if run == "train":
        name = rng.choice(list(FORMATS))
        line = command("train", "--data.train", name, "--data.format", FORMATS[name])
        if name == "chats.jsonl":
            line += ["--model.tokenizer", "full"]
        if rng.random() < 0.3:
            shutil.copy(work / name, work / f"held_{name}")
            line += ["--data.eval", f"held_{name}"]
            name = f"held_{name}"
    elif run in ("generate", "inspect"):
        name = "text.txt"
        (work / name).write_text("two and two\nfour and\n")
        option = (
            {"prompts": name, "prompt": None}
            if run == "generate"
            else {"inspect_file": name, "inspect": None}
        )
        line = command(run, **option)
    else:
        name = rng.choice(("items.jsonl", "text.txt"))
        line = command(run, tasks=name)
    path = work / name
    several, refuse = run == "train", None
    kind = rng.random()
    if kind < 0.15:
        what = replace_entry(rng, path)
        refuse = True
    elif kind < 0.4:
        what = spoil_bytes(rng, path)
    elif path.suffix == ".txt":
        texts: list[tuple[str, bytes, bool | None]] = [
            ("white space", b" \n\t\n", None if run == "eval" else True),
            ("surrogate", b"a \xed\xa0\x80 b\n" * 9, True),
            ("escapes", ("\x1b]0;pwned\x07\x1b[2J\u202e " * 20).encode(), None),
            (
                "one long line",
                b"word " * (3_000 if run in ("inspect", "generate") else 300_000),
                None,
            ),
            ("one character", b"x", None if run == "generate" else True),
            ("UTF-16", "two and two".encode("utf-16"), True),
            ("NULs", b"\0" * 2000, None),
        ]
        what, data, refuse = rng.choice(texts)
        path.write_bytes(data)
    else:
        what, refuse = _spoil_record(rng, path)
    return Case(f"data: {what}", line, refuse, several=several)


def _spoil_record(rng: random.Random, path: Path) -> tuple[str, bool | None]:
    lines = path.read_text().splitlines()
    place = rng.randrange(min(3, len(lines)))  # an evaluation may read only the first ones
    record = json.loads(lines[place])
    field = rng.choice(list(record))
    kinds: dict[str, tuple[Any, bool | None]] = {
        "a list": ("[1, 2]", True),
        "a number": ("17", True),
        "null": ("null", None),
        "a text": ('"text"', True),
        "cut": (lines[place][: rng.randrange(1, len(lines[place]))], True),
        "two on a line": (lines[place] * 2, True),
        "nested": ("[" * NESTED + "]" * NESTED, True),
        "nested field": (f'{{"{field}": {"[" * NESTED + "]" * NESTED}}}', True),
        "many digits": (f'{{"{field}": {"9" * 6000}}}', True),
        "single quotes": (str(record), True),
        "no such field": (json.dumps({k: v for k, v in record.items() if k != field}), True),
        "a hostile field": (json.dumps({rng.choice(ESCAPES): 1}), True),
        "a number in the field": (json.dumps({**record, field: rng.choice((3, 1.5, True))}), True),
        "a list in the field": (json.dumps({**record, field: [1]}), True),
        "an object in the field": (json.dumps({**record, field: {"a": rng.choice(ESCAPES)}}), True),
        "NaN in the field": (json.dumps({**record, field: math.nan}), True),
        "null in the field": (json.dumps({**record, field: None}), None),
        "nothing in the field": (json.dumps({**record, field: ""}), None),
        "a surrogate": (f'{{"{field}": "a \\ud800 b"}}', True),
        "escapes": (json.dumps({**record, field: rng.choice(ESCAPES) * 3}), None),
        "the field twice": (lines[place][:-1] + f', "{field}": "another"}}', None),
        "a long text": (json.dumps({**record, field: "word " * 400_000}), None),
        "a long word": (json.dumps({**record, field: "x" * 1_000_000}), None),
        "bytes": (json.dumps({**record, field: "\x00\x01"}), None),
    }
    what, refuse = rng.choice(list(kinds)), None
    lines[place], refuse = kinds[what]
    if field == "messages" and what in ("escapes", "a long text", "a long word", "bytes",
                                        "nothing in the field"):  # fmt: skip
        refuse = None
    if rng.random() < 0.1:
        lines, what, refuse = lines[:1], "a single record", None
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogatepass")
    return f"{path.name}, line {place + 1}, {field}: {what}", refuse


@generator("train/folder-of-data")
def _data_folder(rng: random.Random, work: Path, run: str) -> Case:
    """A folder, or a parquet file, as data."""
    (work / "many").mkdir()
    kind = rng.choice(
        (
            "empty",
            "only images",
            "loop",
            "parquet cut",
            "parquet flipped",
            "parquet",
            "parquet of numbers",
            "unreadable",
            "a bad one among good ones",
        )
    )
    refuse: bool | None = True
    target = "many"
    if kind == "only images":
        (work / "many" / "x.png").write_bytes(b"\x89PNG")
    elif kind == "loop":
        (work / "many" / "again").symlink_to(".")
        shutil.copy(work / "texts.jsonl", work / "many")
        refuse = None
    elif kind.startswith("parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        target = "many/x.parquet"
        values: list[Any] = (
            [1.5] * 50 if "numbers" in kind else [f"text number {n} of 50" for n in range(50)]
        )
        pq.write_table(pa.table({"text": values}), work / target)
        refuse = "numbers" in kind
        if kind.endswith(("cut", "flipped")):
            data = bytearray((work / target).read_bytes())
            if kind.endswith("cut"):
                del data[rng.randrange(len(data)) :]
                refuse = True
            else:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
                refuse = None
            (work / target).write_bytes(data)
    elif kind == "unreadable":
        shutil.copy(work / "texts.jsonl", work / "many")
        (work / "many").chmod(0)
    elif kind == "a bad one among good ones":
        shutil.copy(work / "texts.jsonl", work / "many" / "a.jsonl")
        (work / "many" / "b.jsonl").write_text('{"text": 3}\n')
    return Case(f"data folder: {kind}", command("train", "--data.train", target), refuse,
                several=True)  # fmt: skip
