"""Every command of README and docs runs as it is typed, in a fresh folder, cut to a few steps.

One that stands on several pages runs on the first; runs and texts that an earlier page made lie in
the folder of each. Where a page shows the output of a command, the command prints it, but for
figures, and for thoughts and verdicts of a model that these few steps have not taught anything.
With the folder of a run of README's first command in QUIETSTAR_DEMO these are compared, too.
"""

import doctest
import json
import os
import re
import shutil
import subprocess
import sys
from glob import glob
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from test_docs import PAGES, ROOT, blocks, commands, our_arguments, shown_outputs
from tiny import MARKERS, plain_model, run_config

from quietstar.cli import main as cli
from quietstar.config.loading import save_config
from quietstar.data import load_tokenizer
from quietstar.training.run import run_training


def is_script(words):
    """Whether it is a file of the page itself."""
    return len(words) == 2 and words[0] == "python" and words[1].endswith(".py")


OURS = [
    (page, where, words)
    for page in PAGES
    for where, words in commands()
    if where.startswith(f"{page.relative_to(ROOT)}:")
    and (our_arguments(words) is not None or is_script(words))
]
SHOWN = shown_outputs()
DEMO = os.environ.get("QUIETSTAR_DEMO")
FIGURE = r"(?:< )?[+−-]?\d[\d,.]*(?:e[+−-]\d+)?%?(?: (?:s|min) left)?"
BOX = "[\u2500-\u257f]+"
LEARNED = (
    r"⟨.*?⟩ \S+",  # a thought and what follows
    r"(?<= by P\(gold answer\): )\w.*",  # the verdict
    r"(?s)\n *note: .*?(?=\n +\w+, by |\Z)",  # what to do about a gain that is none
)
"""What a model says, and what is said of it, after its training."""
FRAGMENTS = "..."
"""Stands in a command for the rest of the reader's own."""
ELSEWHERE = {
    "--thoughts.sampler": "remote_thoughts:Remote",
    "--tasks": "commonsense_qa_jsonl",
    "--controls": "3",
}
"""Have tests of their own: `test_remote_sampler`, `test_harness`, `test_controls`."""
QUESTIONS = [{"prompt": f"What is {n} and 1?", "answer": f" {n + 1}"} for n in range(6)]
PAIRS = [{**line, "chosen": "yes", "rejected": f"no {n}"} for n, line in enumerate(QUESTIONS)]
WRITTEN = ("mine.yaml", "student.yaml")
"""Configs of the reader's own that no page shows."""
OUTPUTS = ("--out", "--report", "--html")
SMALL = {
    "training.max_steps": 2, "training.eval_steps": 0, "training.global_batch_size": 2,
    "training.micro_batch_size": 2, "training.cpu_threads": 1, "training.mixed_precision": "no",
    "data.eval_sequences": 2, "logging.thought_steps": 0, "logging.report_to": "[]",
}  # fmt: skip
ON_DEMO = {"data.task_options.size": 300}
ON_TINY = {
    "model.name_or_path": "TINY", "model.dtype": "float32", "data.seq_len": 48,
    "thoughts.length": 3, "thoughts.lookahead": 2, "thoughts.stop": "[]",
    "thoughts.num_thoughts": 2,
}  # fmt: skip
"""What takes the place of a large model, its texts and its thoughts."""


def comparable(text):
    """The text without what differs among machines and trainings."""
    for pattern in (BOX, *(() if DEMO else LEARNED)):
        text = re.sub(pattern, "", text)
    return re.sub(FIGURE, "0", text.replace(" --model.name_or_path TINY", ""))


def check_output(expected, printed, where):
    """Compare what a page shows, where ``...`` stands for anything, with what was printed."""
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    expected, printed = comparable(expected), comparable(printed)
    assert doctest.OutputChecker().check_output(expected, printed, flags), (
        f"{where} shows\n{expected}\nand prints\n{printed}"
    )


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def cut(arguments):
    """The command with small settings after the reader's own, where they are not the point."""
    name, *words = arguments
    words = [word.removeprefix("/scratch/") for word in words]
    given = {word for word in words if word.startswith("--")}
    if "--plan" in given:
        words += ["--model.name_or_path", "TINY"] if "configs/smollm2_math.yaml" in words else []
    elif name == "train":
        config = words[words.index("--config") + 1] if "--config" in words else None
        is_demo = config in (None, "configs/demo.yaml")
        small = SMALL | (ON_DEMO if is_demo else ON_TINY)
        if config in WRITTEN:  # small as it is
            small = {}
        if config == "configs/gsm8k_thoughts.yaml":
            small |= {"data.train": "gsm8k_train.jsonl", "data.eval_fraction": 0.5}
        own = {"--training.output_dir", "--loss.teacher", "--data.train"} & given
        if "--training.max_steps" in given:
            place = words.index("--training.max_steps")
            del words[place : place + 2]
        if "--model.name_or_path" in given:
            small.pop("model.name_or_path", None)
        return [name, *words, "--overwrite", *(  # the run of an earlier command
            word for key, value in small.items() if f"--{key}" not in own
            for word in (f"--{key}", str(value))
        )]  # fmt: skip
    if name == "init":
        words += ["--model", "TINY"]
    if name == "eval":
        limit = "64" if {"demo", "questions.yaml"} & {*words} else "3"
        words += ["--device", "cpu", "--limit", limit] if "--limit" not in given else []
        needs_folder = "--data-dir" not in given and words[words.index("--tasks") + 1] == "gsm8k"
        words += ["--data-dir", "DIR"] if needs_folder else []
    if name == "judge" and "--max-new-tokens" not in given and "--compare" in given:
        words += ["--max-new-tokens", "3"]
    if name == "report":
        words = [path for word in words for path in (sorted(glob(word)) or [word])]
    most = {"--rationale": 4, "--max-new-tokens": 3}
    return [name, *(
        str(min(most[before], int(word))) if before in most else word
        for before, word in zip(["", *words[:-1]], words, strict=True)
    )]  # fmt: skip


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """What a reader has before the first command of a page: models, runs and texts."""
    folder = tmp_path_factory.mktemp("material")
    base = plain_model(max_position_embeddings=1024, eos_token_id=256)
    for name in ("TINY", "JUDGE", "BASE"):
        base.save_pretrained(folder / name)
        load_tokenizer("bytes").save_pretrained(folder / name)
    (folder / "HuggingFaceTB").mkdir()
    (folder / "HuggingFaceTB" / "SmolLM2-135M-Instruct").symlink_to(folder / "TINY")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "eval").symlink_to(ROOT / "eval")
    (folder / "DIR").mkdir()
    write_lines(folder / "texts.jsonl", [{"text": f"text {n} " * 12} for n in range(40)])
    shutil.copy(folder / "texts.jsonl", folder / "openstax.jsonl")
    gsm8k = [{"question": f"{n} and 1?", "answer": f"It is.\n#### {n + 1}"} for n in range(12)]
    for name in ("gsm8k_test.jsonl", "DIR/gsm8k_test.jsonl", "gsm8k_train.jsonl"):
        write_lines(folder / name, gsm8k)
    choices = [{"label": label, "text": label.lower()} for label in "ABC"]
    question = {"question": {"stem": "which?", "choices": choices}, "answerKey": "B"}
    write_lines(folder / "DIR/commonsenseqa_validation.jsonl", [question] * 4)
    for name in ("test.jsonl", "mine.jsonl"):
        write_lines(folder / name, QUESTIONS)
    choices = [{**line, "choices": [" yes", line["answer"]]} for line in QUESTIONS]
    write_lines(folder / "choices.jsonl", choices)
    own = [{"problem": line["prompt"], **dict.fromkeys(("solution", "answer"), line["answer"])}
           for line in QUESTIONS * 4]  # fmt: skip
    for name in ("questions.jsonl", "problems.jsonl", "held_out.jsonl"):
        write_lines(folder / name, own)
    write_lines(folder / "pairs.jsonl", PAIRS)
    write_lines(folder / "preferences.jsonl", PAIRS)
    for name in ("prompts.jsonl", "others.jsonl"):
        write_lines(folder / name, [{"prompt": line["prompt"]} for line in QUESTIONS[:3]])
    data = {"data__train": str(folder / "texts.jsonl"), "data__seq_len": 32}
    config = run_config(folder, **data, training__max_steps=1)
    model = {"name_or_path": str(folder / "TINY"), "config": None, "tokenizer": None}
    config = config.model_copy(update={"model": config.model.model_copy(update=model)})
    save_config(config, folder / "mine.yaml")
    tree = yaml.safe_load((folder / "mine.yaml").read_text())
    tree["training"]["output_dir"] = "runs/own"
    (folder / "mine.yaml").write_text(yaml.safe_dump(tree))
    tree["loss"], tree["thoughts"] = {"objective": "distill"}, {"length": 2, **MARKERS}
    (folder / "student.yaml").write_text(yaml.safe_dump(tree))
    run_training(config)
    runs = ["x", "a", "b", "mine", "teacher", "fast", "demo_controls/seed-0/own"]
    for name in ("untrained", *(f"runs/{name}" for name in runs)):
        shutil.copytree(config.training.output_dir, folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        if DEMO:
            shutil.copytree(DEMO, "runs/demo")
        else:
            assert not cli.main(cut(["train"]))  # the first command of README: runs/demo
    return folder


def contents():
    """The files whose content stands in the docs."""
    for page in PAGES:
        text = page.read_text("utf-8")
        yield from re.findall(r"<!-- (\w+\.py) -->\n```python\n(.*?)```", text, re.S)
        for code in blocks(page, "yaml"):
            if name := re.match(r"# (\w+\.yaml)\n", code):
                yield name[1], code


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", sorted({page for page, _, _ in OURS}), ids=lambda page: str(page.relative_to(ROOT))
)
def test_the_commands_of_a_page_run_one_after_the_other(
    page, material, tmp_path, monkeypatch, capsys
):
    shutil.copytree(material, tmp_path, symlinks=True, dirs_exist_ok=True)
    for name, code in contents():
        (tmp_path / name).write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("COLUMNS", "100")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for number, (owner, where, words) in enumerate(OURS):
        arguments = our_arguments(words)
        if owner == page and is_script(words):
            # In a process of its own, for its arithmetic is in bfloat16.
            subprocess.run([sys.executable, words[1]], check=True, env=environment)
            continue
        is_elsewhere = any(ELSEWHERE.get(a) == b for a, b in pairwise(words))
        is_again = any(words == earlier for _, _, earlier in OURS[:number])
        if owner != page or FRAGMENTS in words or is_elsewhere:
            continue
        if is_again and where not in SHOWN:
            continue
        files = [words[i + 1] for i, word in enumerate(words) if word in OUTPUTS]
        for name in files:  # of an earlier example
            for path in map(Path, glob(f"{name.partition('.')[0]}.*")):
                path.unlink()
            shutil.rmtree(name, ignore_errors=True)
        for seed in "01" if any("$seed" in word for word in words) else "0":
            typed = [word.replace("$seed", seed) for word in arguments]
            capsys.readouterr()
            assert not cli.main(cut(typed)), where
        assert all(Path(name).exists() for name in files), where
        is_trained = arguments[0] == "train" and "--plan" not in arguments
        if DEMO and is_trained:  # into the folder of README's first command
            shutil.rmtree("runs/demo")
            shutil.copytree(DEMO, "runs/demo")
        if where in SHOWN:
            check_output(SHOWN[where], capsys.readouterr().out, where)
