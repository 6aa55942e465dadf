"""Ways to spoil a file, and the register of what generates malformed inputs."""

from __future__ import annotations

import json
import math
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cases import Case

GENERATORS: dict[str, Callable[[random.Random, Path], Case]] = {}
NESTED = 20_000
ESCAPES = ("\x1b]0;pwned\x07\x1b[2J", "a\nquietstar: error: forged", "\u202ereversed", "\x9b2J",
           "[/b][link=http://evil]x", "</script><script>x()</script>")  # fmt: skip


def generator(*names: str) -> Callable[[Any], Any]:
    """Register a generator under ``command/kind``; it gets the command as its third argument."""

    def register(function: Any) -> Any:
        for name in names:
            run = name.partition("/")[0]
            GENERATORS[name] = lambda rng, work, run=run: function(rng, work, run)
        return function

    return register


def spoil_bytes(rng: random.Random, path: Path) -> str:
    """Change a file's bytes; says how."""
    data = path.read_bytes()
    place = rng.randrange(max(1, len(data)))
    kinds = {
        "empty": lambda: b"",
        "cut": lambda: data[:place],
        "cut by one byte": lambda: data[:-1],
        "a byte flipped": lambda: (
            data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]
        ),
        "no UTF-8 inside": lambda: data[:place] + b"\xff\xfe\xc3\x28" + data[place:],
        "NULs inside": lambda: data[:place] + b"\x00" * 64 + data[place:],
        "a piece twice": lambda: data[:place] + data[place // 2 :],
        "a piece gone": lambda: data[: place // 2] + data[place:],
        "random": lambda: rng.randbytes(rng.choice((1, 100, 5000))),
        "compressed": lambda: b"\x1f\x8b\x08\x00" + rng.randbytes(200),
    }
    kind = rng.choice(list(kinds))
    path.write_bytes(kinds[kind]())
    return f"{path.name}: {kind}" + (f" at {place}" if "at" not in kind else "")


def replace_entry(rng: random.Random, path: Path) -> str:
    """Put something else than a readable file in a file's place; says what."""
    kind = rng.choice(("missing", "a folder", "a link to itself", "a dangling link", "a pipe",
                       "unreadable"))  # fmt: skip
    if kind == "unreadable":
        path.chmod(0)
        return f"{path.name}: unreadable"
    path.unlink()
    if kind == "a folder":
        path.mkdir()
    elif kind == "a link to itself":
        path.symlink_to(path.name)
    elif kind == "a dangling link":
        path.symlink_to("nothing-here")
    elif kind == "a pipe":
        os.mkfifo(path)
    return f"{path.name}: {kind}"


ODD_VALUES: tuple[Any, ...] = (
    *(None, "", "x", "258", True, False, -1, 0, 1, 3, -5, 1.5, 10**6, 10**9, 10**18, 10**30),
    *(1e308, math.nan, math.inf, [], ["a"], {}, {"a": 1}, [[[]]], *ESCAPES),
)


def spoil_json(rng: random.Random, path: Path) -> str:
    """Change an entry of a JSON file; says how."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    where, parent, key = path.name, None, None
    node: Any = tree
    while isinstance(node, dict | list) and node and (parent is None or rng.random() < 0.7):
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        parent, node, where = node, node[key], f"{where}.{key}"[:120]
    if parent is None:
        path.write_text("[]")
        return f"{where}: a list"
    kind = rng.random()
    if kind < 0.2:
        del parent[key]
        how = "gone"
    elif kind < 0.3:
        name = rng.choice(ESCAPES)
        if isinstance(parent, dict):
            parent[name] = parent.pop(key)
        how = f"named {name!r}"
    else:
        parent[key] = rng.choice(ODD_VALUES)
        how = repr(parent[key])
    path.write_text(json.dumps(tree))
    return f"{where}: {how}"


def odd_json(rng: random.Random, path: Path) -> str:
    """Put JSON of another kind in a file's place; says what."""
    kind = rng.choice(("[]", "null", "3", '"text"', "{}", "nested", "digits", "twice", "comment"))
    text = path.read_text(encoding="utf-8")
    texts = {
        "nested": '{"a":' * NESTED + "1" + "}" * NESTED,
        "digits": '{"vocab_size": ' + "9" * 5000 + "}",
        "twice": text.rstrip() + text,
        "comment": "// a comment\n" + text,
    }
    path.write_text(texts.get(kind, kind))
    return f"{path.name}: {kind}"


def read_tensors(path: Path) -> tuple[dict[str, Any], bytes]:
    """Return header and data of a safetensors file."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def write_tensors(path: Path, header: dict[str, Any], data: bytes) -> None:
    """Write a safetensors file of a header and data, whether they fit or not."""
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def spoil_tensors(rng: random.Random, path: Path) -> tuple[str, bool | None]:
    """Change what a safetensors file says; returns how, and whether nobody may take it."""
    header, data = read_tensors(path)
    names = sorted(name for name in header if name != "__metadata__")
    name = rng.choice(names)
    begin, end = header[name]["data_offsets"]
    kind = rng.choice(("renamed", "gone", "not a number", "infinite", "transposed", "one number",
                       "another type", "outside", "overlapping", "huge header", "hostile name",
                       "an extra tensor", "no tensors", "huge shape"))  # fmt: skip
    refuse: bool | None = True
    if kind == "renamed":
        header[name + "x"] = header.pop(name)
    elif kind == "hostile name":
        header[name + rng.choice(ESCAPES)] = header.pop(name)
    elif kind in ("gone", "no tensors"):
        gone = names if kind == "no tensors" else [name]
        kept, parts, place = {}, [], 0
        for other in names:
            if other not in gone:
                a, b = header[other]["data_offsets"]
                kept[other] = {**header[other], "data_offsets": [place, place + b - a]}
                parts.append(data[a:b])
                place += b - a
        header, data = kept, b"".join(parts)
    elif kind in ("not a number", "infinite"):
        value = struct.pack("<f", math.nan if kind == "not a number" else math.inf)
        place = begin + 4 * rng.randrange((end - begin) // 4)
        if header[name]["dtype"] != "F32":
            refuse = None
        data = data[:place] + value + data[place + 4 :]
        refuse = refuse if kind == "not a number" else None
    elif kind == "transposed":
        shape = header[name]["shape"]
        refuse = True if shape != shape[::-1] else None
        header[name]["shape"] = shape[::-1]
    elif kind == "one number":
        header[name]["shape"] = [1]
    elif kind == "huge shape":
        header[name]["shape"] = [2**40, 2**40]
    elif kind == "another type":
        header[name]["dtype"], refuse = rng.choice(("I32", "F16", "BF16", "F99", "F64")), None
    elif kind == "outside":
        header[name]["data_offsets"] = [begin, end + 10**9]
    elif kind == "overlapping":
        header[name]["data_offsets"] = [0, end - begin]
        refuse = True if begin else None
    elif kind == "an extra tensor":
        header["extra"] = {"dtype": "F32", "shape": [1], "data_offsets": [len(data), len(data) + 4]}
        data, refuse = data + b"\0" * 4, None
    write_tensors(path, header, data)
    if kind == "huge header":
        content = path.read_bytes()
        path.write_bytes(struct.pack("<Q", rng.choice((2**63, 2**40, 10**8))) + content[8:])
    return f"{path.name}: {name} {kind}", refuse
