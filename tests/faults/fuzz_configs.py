"""Malformed configs: values, keys, architectures, and YAML as text."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

from cases import Case
from material import command
from spoiling import (
    NESTED,
    generator,
    spoil_bytes,
)


def config_lines(rng: random.Random, run: str, *more: str) -> list[str]:
    """Return a command line of train or plan with a config."""
    return command("plan" if run == "plan" else "train", *more)


def set_key(text: str, key: str, value: str) -> str:
    """Write a config in which a key of a section has this YAML value."""
    section, _, name = key.partition(".")
    import yaml

    tree = yaml.safe_load(text)
    tree.setdefault(section, {})[name] = "@@"
    return yaml.safe_dump(tree, sort_keys=False).replace("'@@'", "@@").replace("@@", value)


def bad_values(schema: dict[str, Any], rng: random.Random) -> list[str]:
    """Return YAML values that a key must refuse, by its JSON schema."""
    members = schema.get("anyOf", [schema])
    types = {member.get("type") for member in members}
    words = [w for m in members for w in m.get("enum", [m["const"]] if "const" in m else [])]
    bad = []
    if "null" not in types:
        bad.append("null")
    if not types & {"object"}:
        bad.append("{a: 1}")
    if not types & {"array"}:
        bad += ["[1, 2]", "[[[]]]"]
    numbers = types & {"integer", "number"}
    if numbers:
        bad += [".nan", ".inf", "-.inf", '"7"', "1 2", "0x", "2024-01-01", "1e999"]
        for member in members:
            if "minimum" in member:
                bad.append(repr(member["minimum"] - 1))
            if "exclusiveMinimum" in member:
                bad.append(repr(member["exclusiveMinimum"]))
            if "maximum" in member:
                bad.append(repr(member["maximum"] + 1))
            if "exclusiveMaximum" in member:
                bad.append(repr(member["exclusiveMaximum"]))
    if "integer" in types and "number" not in types:
        bad += ["1.5", "1.0e+30", "9" * 400]
    if types == {"boolean"}:
        bad += ["yes", "1", '"true"']
    if "string" in types and not words:
        bad += ["3", "true", '""']
    if words:
        bad += ["nosuch", words[0] + "x", words[0].upper()]
    if "array" in types:
        bad += ["a", "3", "[1]", "{a: b}"]
    if "object" in types:
        bad += ["a", "3", "[1]", "{1: 2}" if rng.random() < 0.5 else "3"]
    return bad


FREE_TEXT = ("data.template",)  # the empty text breaks a rule of its own


@generator("train/value", "plan/value")
def _value(rng: random.Random, work: Path, run: str) -> Case:
    from quietstar.config import fields

    key = rng.choice(sorted(k for k in fields() if k not in ("training.output_dir",)))
    value = rng.choice(bad_values(fields()[key], rng))
    what = f"{key}: {value[:40]}"
    if rng.random() < 0.5 and not value.startswith('"'):
        if value in ("3", "true", '""') or value.isdigit():
            refuse = None  # the command line reads text where a key takes text
        else:
            refuse = None if "string" in json.dumps(fields()[key]) else True
        if key.startswith("logging.report_to"):
            refuse = None
        return Case(what + " (command line)", config_lines(rng, run, f"--{key}", value), refuse,
                    several=True, codes=(1,) if run == "plan" else ())  # fmt: skip
    (work / "new.yaml").write_text(set_key((work / "new.yaml").read_text(), key, value))
    return Case(what, config_lines(rng, run), True, several=True)


@generator("train/huge", "plan/huge")
def _huge(rng: random.Random, work: Path, run: str) -> Case:
    """A size that no machine holds; no bound of a single key says so."""
    from quietstar.config import fields

    free = ("steps", "seed", "limit", "epsilon", "beta", "gap", "scale", "alpha")
    keys = [
        key for key, schema in fields().items()
        if "integer" in json.dumps(schema) and not any(word in key for word in free)
    ]  # fmt: skip
    key = rng.choice(sorted(keys))
    value = str(rng.choice((10**5, 10**7, 10**9, 10**12, 2**31, 2**32, 2**63 - 1, 2**63, 10**20)))
    more = [f"--{key}", value]
    if key.startswith("tuning."):
        method = {"lora_r": "lora"}
        base = [
            "--model.config",
            "null",
            "--model.name_or_path",
            "plain",
            "--model.tokenizer",
            "null",
        ]
        more += ["--tuning.method", method.get(key.partition(".")[2], "prefix"), *base]
    must = key in ("thoughts.length", "thoughts.lookahead", "thoughts.num_thoughts", "data.seq_len",
                   "data.min_context")  # fmt: skip
    refuse = True if must and int(value) >= 10**9 and run != "plan" else None
    return Case(f"{key} {value}", config_lines(rng, run, *more), refuse, several=True,
                codes=(1,) if run == "plan" else ())  # fmt: skip


@generator("train/seed", "eval/seed", "generate/seed", "inspect/seed")
def _seed(rng: random.Random, work: Path, run: str) -> Case:
    value = rng.choice((-1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64, 10**30))
    option = "--training.seed" if run == "train" else "--seed"
    more = ["--thought-temperature", "1"] if run in ("eval", "generate") else []
    refuse = True if value < 0 or value >= 2**64 else None
    return Case(f"seed {value}", command(run, *more, option, str(value)), refuse,
                several=run == "train")  # fmt: skip


@generator("train/typo", "plan/typo")
def _typo(rng: random.Random, work: Path, run: str) -> Case:
    """A key that does not exist, or stands where it cannot."""
    from quietstar.config import fields

    key = rng.choice(sorted(fields()))
    section, _, name = key.partition(".")
    place = rng.randrange(len(name) + 1)
    letter = rng.choice("abxyz_")
    wrong = name[:place] + letter + name[place + rng.randrange(2) :]
    text = (work / "new.yaml").read_text()
    kind = rng.randrange(7)
    if kind == 0 and f"{section}.{wrong}" not in fields():
        return Case(
            f"--{section}.{wrong}",
            config_lines(rng, run, f"--{section}.{wrong}", "1"),
            True,
            several=True,
        )
    if kind == 1:
        text += f"{section}x: {{{name}: 1}}\n"
    elif kind == 2:
        text += f"{name}: 1\n"
    elif kind == 3:
        value = rng.choice(("{a: {model: {dtype: float32}}}", "{a: {thoughts: 3}}", "[1]", "3",
                            "{a: {thoughts: {lenght: 3}}}", "{a: {training: {output_dir: x}}}",
                            "{a: {thoughts: {length: 0}}}", "{a: null, b: 3}",
                            "{a: {nosuch: {length: 1}}}"))  # fmt: skip
        text += f"stages: {value}\n"
    elif kind == 4:
        text = text.replace(
            "max_position_embeddings", rng.choice(("max_positions", "max_position_embedding"))
        )
    elif kind == 5:
        typo = rng.choice(("hiden_size", "hidden_sizes", "n_layers"))
        text = text.replace("    hidden_size: 16", f"    hidden_size: 16\n    {typo}: 16")
    else:
        text = set_key(text, f"{section}.{wrong}x", "1")
    (work / "new.yaml").write_text(text)
    return Case(
        f"a misplaced or misspelt {key} ({kind})", config_lines(rng, run), True, several=True
    )


@generator("train/architecture", "plan/architecture")
def _architecture(rng: random.Random, work: Path, run: str) -> Case:
    key, value, refuse = rng.choice(ARCHITECTURES)
    text = (work / "new.yaml").read_text()
    text = re.sub(rf"\n    {key}: .*", "", text) if f"    {key}: " in text else text
    text = text.replace("  config:\n", f"  config:\n    {key}: {value}\n", 1)
    (work / "new.yaml").write_text(text)
    return Case(
        f"model.config.{key}: {value}",
        config_lines(rng, run),
        refuse,
        several=True,
        codes=(1,) if run == "plan" else (),
    )


ARCHITECTURES: list[tuple[str, str, bool | None]] = [
    *[
        ("hidden_size", v, True)
        for v in ("0", "-16", "17", "x", "null", "[16]", "1.5", "100000000")
    ],
    *[("num_hidden_layers", v, True) for v in ("-1", "x", "null", "1.5", "1000000", "[2]")],
    *[("num_hidden_layers", v, None) for v in ("0",)],
    *[("num_attention_heads", v, True) for v in ("0", "-2", "3", "x", "null", "1000")],
    *[("num_key_value_heads", v, True) for v in ("0", "3", "4", "-1", "x", "1000")],
    *[("intermediate_size", v, True) for v in ("-1", "x", "null", "1000000000000")],
    *[("max_position_embeddings", v, True) for v in ("0", "-1", "3", "x")],
    *[("vocab_size", v, True) for v in ("0", "-1", "10", "x", "1000000000000")],
    *[("hidden_act", v, True) for v in ("nosuch", "3", "null", "[silu]")],
    *[
        ("model_type", v, True)
        for v in (
            "t5",
            "bert",
            "nosuch",
            "3",
            "null",
            "[llama]",
            "__class__",
            "clip",
            "whisper",
            "../llama",
        )
    ],
    *[("head_dim", v, True) for v in ("-8", "x", "0", "7")],
    *[("rms_norm_eps", v, None) for v in ("x", "-1", ".nan", "1e30")],
    *[
        ("rope_parameters", v, None)
        for v in (
            "x",
            "{rope_type: nosuch}",
            "{rope_theta: 0}",
            "[1]",
            "{rope_type: yarn}",
            "{factor: x}",
        )
    ],
    *[("auto_map", v, True) for v in ("{AutoModelForCausalLM: evil.Model}", "x")],
    *[("quantization_config", v, True) for v in ("{quant_method: nosuch}", "{load_in_4bit: true}")],
    *[("attention_dropout", v, None) for v in ("2", "-1", "x")],
    *[("torch_dtype", v, None) for v in ("nosuch", "int8")],
    *[("initializer_range", v, None) for v in ("x", "-1", ".inf", "1e38")],
    *[("pad_token_id", v, None) for v in ("-1", "1000", "x")],
    *[("attn_implementation", v, None) for v in ("nosuch", "flash_attention_2")],
]


@generator("train/yaml", "plan/yaml")
def _yaml(rng: random.Random, work: Path, run: str) -> Case:
    """The text of a config, spoilt as text."""
    path = work / "new.yaml"
    text = path.read_text()
    lines = text.splitlines()
    place = rng.randrange(len(lines))
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}]\n"
        for a, b in zip("abcdefghij", "bcdefghijk", strict=True)
    )
    known: list[tuple[str, bytes, bool | None]] = [
        ("alias bomb", bomb.encode(), True),
        ("alias bomb in a value", (text + "".join(f"#\n{bomb}")).encode(), True),
        ("an alias to itself", (text + "stages: &s {a: *s}\n").encode(), True),
        ("a list as key", (text + "? [a, b]\n: 1\n").encode(), True),
        ("a mapping as key", (text + "{a: 1}: 2\n").encode(), True),
        ("a number as key", (text + "3: 4\n").encode(), True),
        (
            "a tag that calls",
            (text + "x: !!python/object/apply:os.system ['touch canary']\n").encode(),
            True,
        ),
        (
            "a tag in a value",
            text.replace("hidden_size: 16", "hidden_size: !!python/name:os.system").encode(),
            True,
        ),
        ("a key twice", (text + "optim: {learning_rate: 1.0}\n").encode(), True),
        ("two documents", (text + "---\n" + text).encode(), True),
        ("a merge key", (text + "<<: {a: 1}\n").encode(), True),
        ("nested lists", (b"a: " + b"[" * NESTED), True),
        ("nested mappings", (b"{a: " * NESTED), True),
        (
            "nested values",
            (text + "stages: " + "{a: " * 3000 + "1" + "}" * 3000 + "\n").encode(),
            True,
        ),
        ("a tab", text.replace("  tokenizer", "\ttokenizer").encode(), True),
        ("NUL", text.replace("bytes", "by\0tes").encode(), True),
        ("escape in a key", (text + 'optim2: 1\n"\\e]0;pwned\\a\\e[2J": 1\n').encode(), True),
        (
            "escape in a value",
            text.replace("tokenizer: bytes", 'tokenizer: "\\e[2Jx"').encode(),
            True,
        ),
        ("a forged line", (text + '"a\\nquietstar: error: forged": 1\n').encode(), True),
        ("only a comment", b"# nothing\n", True),
        ("empty", b"", True),
        ("a list", b"- a\n- b\n", True),
        ("a text", b"hello\n", True),
        ("a date", text.replace("seq_len: 12", "seq_len: 2023-99-99").encode(), True),
        ("UTF-16", text.encode("utf-16"), None),
        ("byte order mark", b"\xef\xbb\xbf" + text.encode(), False),
        ("CRLF", text.replace("\n", "\r\n").encode(), False),
        ("latin-1", text.replace("# A run", "# R\xfcn").encode("latin-1"), True),
        ("a huge number", text.replace("seq_len: 12", "seq_len: " + "9" * 6000).encode(), True),
        ("octal", text.replace("seq_len: 12", "seq_len: 0o14").encode(), None),
        ("a long key", (text + "x" * 100_000 + ": 1\n").encode(), True),
        (
            "a long value",
            text.replace("tokenizer: bytes", "tokenizer: " + "x" * 100_000).encode(),
            True,
        ),
        ("JSON", json.dumps({"a": 1}).encode(), True),
        ("a section without a space", text.replace("optim: {", "optim:{").encode(), True),
        ("a directive", b"%YAML 9.9\n---\n" + text.encode(), None),
    ]
    if rng.random() < 0.7:
        what, data, refuse = rng.choice(known)
        path.write_bytes(data)
    else:
        what, refuse = (
            rng.choice(("cut", "line gone", "line twice", "indented", "swapped", "bytes")),
            None,
        )
        if what == "cut":
            text = text[: rng.randrange(len(text))]
        elif what == "line gone":
            text = "\n".join(lines[:place] + lines[place + 1 :])
        elif what == "line twice":
            text = "\n".join(lines[: place + 1] + lines[place:])
        elif what == "indented":
            text = "\n".join(
                [*lines[:place], " " * rng.randrange(1, 4) + lines[place], *lines[place + 1 :]]
            )
        elif what == "swapped":
            rng.shuffle(lines)
            text = "\n".join(lines)
        path.write_text(text)
        if what == "bytes":
            what = spoil_bytes(rng, path)
    return Case(
        f"config: {what}",
        config_lines(rng, run),
        refuse,
        several=True,
        canary="canary",
        codes=(1,) if run == "plan" else (),
    )


@generator("train/options-of-data")
def _data_options(rng: random.Random, work: Path, run: str) -> Case:
    wrong = (
        [("num_steps", v, True) for v in ("0", "-1", "x", "1.5", "null", "1000000000", "[1]")]
        + [("held_out_share", v, True) for v in ("-1", "2", "x", ".nan", "1")]
        + [("num_moves", v, True) for v in ("0", "-1", "1", "100", "x", "1000000000")]
        + [("nosuch", "1", True), ("a.b", "1", True), ("held_out_share", "0", None)]
    )
    key, value, refuse = rng.choice(wrong)
    more = ["--data.train", "synthetic:moves", f"--data.task_options.{key}", value]
    more += ["--data.format", "qa", "--data.template", "{question} {answer}"]
    more += ["--data.task_options.size", "40"]
    more += [
        "--data.seq_len",
        "40",
        "--thoughts.length",
        "4",
        "--model.config.max_position_embeddings",
        "128",
    ]
    what = f"task_options.{key}: {value}"
    if rng.random() < 0.25:
        source = rng.choice(
            (
                "synthetic:nosuch",
                "reasoning_gym:nosuch",
                "synthetic:",
                "reasoning_gym:",
                "synthetic:../x",
                "nosuch.jsonl",
                "owner/nosuch",
                "~/x.jsonl",
                " ",
            )
        )
        more, refuse, what = ["--data.train", source], True, f"data.train {source}"
    return Case(what, config_lines(rng, run, *more), refuse, several=True)
