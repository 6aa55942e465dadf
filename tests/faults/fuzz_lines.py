"""Malformed command lines and talks, and files that cannot be written."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from pathlib import Path

from cases import Case
from fuzz_models import QS
from material import COMMANDS, command
from spoiling import (
    ESCAPES,
    NESTED,
    ODD_VALUES,
    generator,
    spoil_bytes,
)

COUNTS = (
    "0",
    "-1",
    "1.5",
    "x",
    "",
    "1e3",
    "9" * 30,
    "nan",
    "\u0663",
    "1_000",
    "0x10",
    "+-1",
    "[1]",
)
NUMBERS = ("-1", "nan", "inf", "-inf", "x", "", "1e999", "0x1", "1,5")
MODELS = ("nosuch", "/nosuch", "~/nosuch", "texts.jsonl", "run", "", "owner/nosuch", "a" * 300,
          "full/model.safetensors", "https://example.org/x", "./", "..", "full\udcff", "a\nb",
          "\x1b[2Jx")  # fmt: skip
WORDS = ("nosuch", "", "ON", "3")
DEVICES = ("nosuch", "cuda:99", "cuda", "", "mps", "meta", "cpu:7", "3")
OPTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "generate": {
        "--max-new-tokens": COUNTS,
        "--num-thoughts": (*COUNTS, "10000000"),
        "--temperature": NUMBERS,
        "--thought-temperature": NUMBERS,
        "--thought-top-p": NUMBERS,
        "--thought-top-k": COUNTS,
        "--top-p": (*NUMBERS, "0", "2"),
        "--batch-size": COUNTS,
        "--gate": (
            "nosuch",
            "entropy",
            "entropy:",
            "entropy:x",
            "entropy:nan",
            "entropy:-1",
            "gain:1",
            ":",
            "entropy:1:2",
            "calibrated",
            "always:x",
            "",
        ),
        "--device": DEVICES,
        "--dtype": WORDS,
        "--model": MODELS,
    },
    "chat": {
        "--max-new-tokens": COUNTS,
        "--temperature": NUMBERS,
        "--device": DEVICES,
        "--model": MODELS,
        "--num-thoughts": COUNTS,
    },
    "eval": {
        "--tasks": (
            "",
            ",",
            "nosuch",
            "items.jsonl,items.jsonl",
            "nosuch.jsonl",
            "gsm8k",
            "../x.txt",
            "run",
            "texts.jsonl\x1b[2J",
            "items.jsonl,nosuch",
            "gsm8k_cot",
            "commonsense_qa",
        ),
        "--thoughts": WORDS,
        "--positions": WORDS,
        "--limit": COUNTS,
        "--batch-size": COUNTS,
        "--samples": (*COUNTS, "4", "10000000"),
        "--thought-temperature": NUMBERS,
        "--thought-top-p": NUMBERS,
        "--thought-top-k": COUNTS,
        "--votes": COUNTS,
        "--temperature": NUMBERS,
        "--max-new-tokens": COUNTS,
        "--text-tokens": COUNTS,
        "--model": MODELS,
        "--include-path": ("nosuch", "texts.jsonl", ""),
        "--device": DEVICES,
        "--dtype": WORDS,
    },
    "inspect": {
        "--num-thoughts": (*COUNTS, "4", "10000000"),
        "--thought-temperature": NUMBERS,
        "--model": MODELS,
        "--context": (*COUNTS, "1", "100000"),
        "--compare": MODELS,
        "--inspect": ("", " ", "x"),
        "--inspect-file": ("texts.jsonl", "nosuch"),
        "--dtype": WORDS,
    },
    "export": {
        "--model": (*MODELS, "full", "plain"),
        "--out": (
            "",
            "lora",
            "full",
            "texts.jsonl",
            "texts.jsonl/x",
            "readonly/x",
            "x" * 300,
            "run",
            "link.json",
            "a\0b",
        ),
    },
    "plan": {
        "--engine": WORDS,
        "--processes": (*COUNTS, "9999999"),
        "--memory": (*NUMBERS, "0"),
        "--config": ("nosuch.yaml", "", "texts.jsonl", "run", "x" * 300, "user_notes.txt"),
    },
    "train": {
        "--config": (
            "nosuch.yaml",
            "",
            "texts.jsonl",
            "run",
            "x" * 300,
            "user_notes.txt",
            "/dev/null",
        ),
        "--resume": ("nosuch", "", "texts.jsonl", "run", "full", "..", "x" * 300),
        "--controls": (*COUNTS, "100000"),
        "--allow-changes": ("maybe", "1", "yes"),
        "--overwrite": ("maybe", "1", "yes"),
        "--model.name_or_path": MODELS,
        "--model.tokenizer": ("nosuch", "texts.jsonl", "run", "", "x" * 300),
        "--logging.report_to": ("[nosuch]", "[wandb, nosuch]", "nosuch", "[[]]"),
        "--thoughts.sampler": (
            "nosuch",
            "os:system",
            "a:b:c",
            ":",
            "nosuch:x",
            "../x:y",
            "json:dumps",
        ),
        "--loss.objective": ("nosuch", "os:system", "nosuch:x", "json:JSONDecoder", ":"),
        "--loss.reward": ("nosuch", "os:nosuch", "nosuch:x", "os:sep", "a b:c"),
    },
    "lm-eval": {
        "--tasks": ("nosuch", "", ","),
        "--model_args": (
            "pretrained=nosuch",
            "pretrained=full,thoughts=maybe",
            "pretrained=full,num_thoughts=0",
            "x",
            "",
            "pretrained=full,nosuch=1",
            "pretrained=full,thought_temperature=-1",
            "pretrained=full,thought_temperature=1,thought_top_p=2",
            "pretrained=full,thought_temperature=1,thought_top_k=0",
            "pretrained=full,dtype=nosuch",
            "pretrained=full,num_thoughts=2",
            "pretrained=full,seed=-1",
            "pretrained=full,positions=x",
            "thoughts=on",
        ),
        "--limit": ("-1", "x"),
        "--batch_size": ("-1", "x", "0"),
        "--include_path": ("nosuch", "texts.jsonl"),
    },
}
RIGHT = {("eval", "--samples", "4"), ("inspect", "--num-thoughts", "4")}  # refused: greedy


@generator(*(f"{name}/options" for name in OPTIONS))
def _options(rng: random.Random, work: Path, run: str) -> Case:
    """A value that an option cannot take."""
    option = rng.choice(sorted(OPTIONS[run]))
    value = rng.choice(OPTIONS[run][option])
    if "link.json" in value:
        (work / "link.json").symlink_to("texts.jsonl")
    if "readonly" in value:
        (work / "readonly").mkdir(mode=0o555)
    line = command(run)
    if option in line:
        place = line.index(option)
        line[place + 1] = value
    else:
        if run == "inspect" and option == "--inspect-file":
            line = command(run, inspect=None)
        line += [f"{option}={value}"] if rng.random() < 0.3 else [option, value]
    refuse: bool | None = True
    if (run, option, value) in RIGHT or (option == "--device" and value in ("cpu:7", "meta", "3")):
        refuse = None
    if value == "+-1":
        refuse = True
    if (option, value) in (
        ("--inspect", "x"),
        ("--model", "full"),
        ("--inspect-file", "texts.jsonl"),
        ("--model.tokenizer", "run"),
        ("--controls", "100000"),
    ):
        refuse = None
    if run == "export" and (option, value) == ("--model", "full"):
        refuse = True
    if run == "train" and option == "--config" and value == "/dev/null":
        refuse = True
    if run == "lm-eval":
        refuse = None if option == "--limit" or "num_thoughts=2" in value else True
    if run in ("train", "plan") and value == "" and option in ("--allow-changes", "--overwrite"):
        refuse = None
    stdin = b"hi\n" if run == "chat" else b""
    several = run in ("train", "plan", "lm-eval")
    return Case(
        f"{option} {value[:40]!r}",
        line,
        refuse,
        stdin,
        several=several,
        codes=(1,) if run == "plan" else (),
    )


@generator(*(f"{name}/line" for name in COMMANDS))
def _line(rng: random.Random, work: Path, run: str) -> Case:
    """A command line with something too much, or too little."""
    line = command(run)
    options = [i for i, word in enumerate(line) if word.startswith("--")]
    kind = rng.choice(
        (
            "unknown option",
            "unknown key",
            "no value",
            "a word too much",
            "surrogate",
            "dashes",
            "abbreviated",
            "misspelt",
        )
    )
    place = rng.choice(options) if options else 1
    refuse: bool | None = True
    if kind == "unknown option":
        line += [
            rng.choice(("--nosuch", "--no-such=3", "-x", "--" + "x" * 500, "--\x1b[2J", "--a\nb"))
        ]
    elif kind == "unknown key":
        line += ["--nosuch.key", "3"]
    elif kind == "no value":
        line = [*line[:place], *line[place + 2 :], line[place]]
    elif kind == "a word too much":
        line += [rng.choice(("word", "x.yaml", "", "\x1b]0;x\x07", "3"))]
    elif kind == "surrogate":
        line[place + 1] = line[place + 1] + "\udcff"
        refuse = None
    elif kind == "dashes":
        line += rng.choice((["--"], ["-"], ["---"], ["--="], ["--", "x"]))
        refuse = None
    elif kind == "abbreviated":
        line[place] = line[place][:-1]
    else:
        word = line[place]
        line[place] = word[:3] + word[4:] if len(word) > 5 else word + "s"
    stdin = b"hi\n" if run == "chat" else b""
    several = run in ("train", "plan", "resume", "lm-eval")
    return Case(
        kind,
        line,
        None if run == "lm-eval" else refuse,
        stdin,
        several=several,
        writes=("run/*",) if run == "resume" else (),
        codes=(1,) if run == "plan" else (),
    )


OUTPUTS = {
    "eval": (("--out", ".json"), ("--out-items", ".jsonl"), ("--report", ".html")),
    "inspect": (("--out", ".json"), ("--out", ".html")),
    "plan": (("--json", ".json"),),
}


@generator(*(f"{name}/output" for name in OUTPUTS))
def _output(rng: random.Random, work: Path, run: str) -> Case:
    """A file to write that cannot be written, or that holds something of the user's."""
    option, suffix = rng.choice(OUTPUTS[run])
    mine = work / f"mine{suffix}"
    mine.write_text('{"mine": 1}\n{"mine": 2}')  # without a newline at its end
    kind = rng.choice(
        (
            "mine",
            "one line",
            "folder",
            "unwritable folder",
            "under a file",
            "long",
            "link",
            "dangling link",
            "link in its folder",
            "device",
            "pipe",
            "empty name",
            "dot",
            "no user",
            "hostile",
            "markup",
            "input",
            "twin",
            "unwritable file",
            "other suffix",
            "new folder",
            "slash",
            "full device",
        )
    )
    value, refuse, as_root = f"mine{suffix}", True, False
    more: list[str] = []
    if kind == "one line":
        mine.write_text('{"mine": 1}')
    elif kind == "folder":
        value = "harness"
        if suffix != ".json":
            (work / f"d{suffix}").mkdir()
            value = f"d{suffix}"
    elif kind == "unwritable folder":
        (work / "readonly").mkdir(mode=0o555)
        value = f"readonly/x{suffix}"
    elif kind == "unwritable file":
        mine.chmod(0o444)
    elif kind == "under a file":
        value = f"texts.jsonl/x{suffix}"
    elif kind == "long":
        value = "x" * 300 + suffix
    elif kind == "link":
        (work / f"link{suffix}").symlink_to("texts.jsonl")
        value = f"link{suffix}"
    elif kind == "dangling link":
        (work / f"link{suffix}").symlink_to("nothing")
        value = f"link{suffix}"
        refuse = None
    elif kind == "link in its folder":
        (work / "real").mkdir()
        (work / "linked").symlink_to("real")
        value, refuse = f"linked/x{suffix}", False
    elif kind in ("device", "full device"):
        as_root = os.geteuid() == 0
        value = f"device{suffix}"
        if as_root:
            os.mknod(work / value, 0o666 | 0o020000, os.makedev(1, 3 if kind == "device" else 7))
        else:
            value = "/dev/null"
    elif kind == "pipe":
        os.mkfifo(work / f"pipe{suffix}")
        value = f"pipe{suffix}"
    elif kind == "empty name":
        value = ""
    elif kind == "dot":
        value = rng.choice((".", "..", "/", "harness/.."))
    elif kind == "no user":
        value = f"~nosuchuser/x{suffix}"
    elif kind == "hostile":
        value, refuse = rng.choice(("a\x1b]0;x\x07", "a\nb", "a\u202eb", "a\udcff")) + suffix, None
    elif kind == "markup":
        value, refuse = rng.choice(("a[b]x[/b]", "a[/x]", "[link=x]", "[draft]")) + suffix, False
    elif kind == "input":
        value = {"eval": "items.jsonl", "inspect": "full/config.json", "plan": "new.yaml"}[run]
    elif kind == "twin":
        other = [o for o, _ in OUTPUTS[run] if o != option]
        if not other:
            value, refuse = f"fresh{suffix}", False
        else:
            more = [other[0], "./full/../same" + suffix]
            value = "same" + suffix
    elif kind == "other suffix":
        value, refuse = "fresh.exe", None
    elif kind == "new folder":
        value, refuse = f"a/b/c{suffix}", False
    elif kind == "slash":
        value, refuse = "fresh/", None
    return Case(f"{option} {kind}", command(run, option, value, *more), refuse, as_root=as_root,
                several=run == "plan")  # fmt: skip


@generator("eval/items")
def _items(rng: random.Random, work: Path, run: str) -> Case:
    """Items of an earlier evaluation that are spoilt or of another one."""
    path = work / "figures.items.jsonl"
    lines = path.read_text().splitlines()
    place = rng.randrange(len(lines))
    record = json.loads(lines[place])
    kind = rng.choice(
        (
            "cut",
            "bytes",
            "entry",
            "list",
            "nested",
            "hostile",
            "other settings",
            "entry of metrics",
            "without settings",
            "half a line",
            "nan",
        )
    )
    refuse: bool | None = True
    if kind == "cut":
        path.write_text("\n".join(lines)[: rng.randrange(len("\n".join(lines)))])
        refuse = None
    elif kind == "bytes":
        kind, refuse = spoil_bytes(rng, path), None
    elif kind == "entry":
        record[rng.choice(list(record))] = rng.choice(ODD_VALUES)
        refuse = None
    elif kind == "entry of metrics":
        name = rng.choice(list(record.get("metrics") or record["settings"]))
        (record.get("metrics") or record["settings"])[name] = rng.choice(ODD_VALUES)
        refuse = None
    elif kind == "list":
        record = [1]
    elif kind == "hostile":
        record = {rng.choice(ESCAPES): 1}
    elif kind == "without settings":
        lines, record = lines[1:], json.loads(lines[1])
        place = 0
    elif kind == "nan":
        record["metrics"] = {"nll": [math.nan]}
        refuse = None
    if kind in ("entry", "list", "hostile", "nan", "entry of metrics", "without settings"):
        lines[place] = json.dumps(record)
        path.write_text("\n".join(lines) + "\n")
    elif kind == "nested":
        lines[place] = "[" * NESTED
        path.write_text("\n".join(lines) + "\n")
    elif kind == "half a line":
        path.write_text("\n".join(lines)[:-20])
        refuse = None
    more = ["--limit", "2"] if kind == "other settings" else []
    return Case(f"items: {kind}", command("eval", "--out", "figures.json", *more), refuse,
                writes=("figures*",))  # fmt: skip


@generator(*(f"{name}/good" for name in COMMANDS))
def _good(rng: random.Random, work: Path, run: str) -> Case:
    """What works, so that a refusal means something."""
    stdin = b"hello\n/thoughts\n/reset\n/quit\n" if run == "chat" else b""
    return Case("nothing wrong", command(run), False, stdin,
                writes=("run/*",) if run == "resume" else ())  # fmt: skip


@generator("chat/talk")
def _talk(rng: random.Random, work: Path, run: str) -> Case:
    """A template, or turns, that fail."""
    path = work / "full" / "chat_template.jinja"
    templates = [
        ("{{ raise_exception('no system') }}", True),
        ("{% for x in range(99999) %}{% for y in range(99999) %}{% endfor %}{% endfor %}", True),
        ("{{ messages[0].nosuch.nosuch }}", True),
        ("{% if %}", True),
        ("", True),
        ("{{ 1/0 }}", True),
        ("{{ ''.__class__.__mro__ }}", None),
        ("{{ messages }}", None),
        ("{{ 'x' * 10**9 }}", True),
        ("{{ messages[0].content }}" * 1000, None),
        ("\x1b[2J{{ messages[0].content }}", None),
        ("{% include '/etc/passwd' %}", True),
        ("{{ cycler.__init__.__globals__.os.system('touch canary') }}", None),
    ]
    what, refuse, more, stdin = "turns", None, [], b"hello\n"
    if rng.random() < 0.6:
        what, refuse = rng.choice(templates)
        path.write_text(what)
    else:
        stdin = rng.choice(
            (
                b"\0\n",
                b"\xff\xfe\n",
                b"a\x1b]0;x\x07\n",
                b"x" * 100_000 + b"\n",
                b"\n\n\n",
                b"/nosuch\n",
                b"no newline",
                b"\xed\xa0\x80\n",
                b"/reset\n/reset\n",
            )
        )
        what = f"turns {stdin[:30]!r}"
    if rng.random() < 0.2:
        more = ["--system", rng.choice(("be brief", "\udcff", "\x1b[2J", ""))]
        refuse = None
    return Case(
        f"chat: {what[:60]}",
        command("chat", *more),
        refuse,
        stdin,
        canary="canary",
        hides="root:x:0",
    )


@generator(
    "train/terminal",
    "eval/terminal",
    "inspect/terminal",
    "generate/terminal",
    "plan/terminal",
    "resume/terminal",
)
def _terminal(rng: random.Random, work: Path, run: str) -> Case:
    """Texts of files on a real terminal."""
    text = rng.choice(ESCAPES)
    quoted = json.dumps(text)
    refuse: bool | None = None
    line = command(run)
    kind = rng.randrange(4)
    if run in ("train", "plan") and kind == 0:
        (work / "new.yaml").write_text((work / "new.yaml").read_text() + f"{quoted}: 1\n")
        refuse = True
    elif run in ("train", "plan") and kind == 1:
        stages = {text: {"training": {"max_steps": 1}}, "b": {"training": {"max_steps": 1}}}
        added = "stages: " + json.dumps(stages) + "\n"
        (work / "new.yaml").write_text((work / "new.yaml").read_text() + added)
    elif run in ("train", "resume", "plan"):
        path = work / "texts.jsonl"
        record = {"text": text * 4} if kind == 2 else {text: 1}
        path.write_text(json.dumps(record) + "\n" + path.read_text())
        refuse = True if kind == 3 and run == "train" else None
    elif kind == 0:
        path = work / "full" / QS
        tree = json.loads(path.read_text())
        tree["thoughts"][text] = tree["dtype"] = text
        path.write_text(json.dumps(tree))
        refuse = True
    elif kind == 1:
        name = f"m{text}".replace("/", "_")
        shutil.copytree(work / "full", work / name)
        line = command(run, model=name)
    elif run == "eval":
        name = f"i{text}.jsonl".replace("/", "_").replace(",", "")
        (work / name).write_text(
            json.dumps({"prompt": text, "answer": text}) + "\n" + (work / "items.jsonl").read_text()
        )
        line = command(run, tasks=name)
        if kind == 3:
            line += ["--report", f"r{text}.html".replace("/", "_")]
    elif run == "inspect":
        line = command(run, inspect=f"two {text} two")
        if kind == 3:
            line += ["--out", f"o{text}.json".replace("/", "_")]
    else:
        line = command(run, prompt=f"two {text} two")
    return Case(
        f"terminal {kind}: {text!r}",
        line,
        refuse,
        several=True,
        terminal=True,
        writes=("run/*",) if run == "resume" else (),
        codes=(1,) if run == "plan" else (),
    )
