"""Material that wants to run code, to leave its folder, or to write on the terminal or a page.

    python tests/faults/hostile.py
    python tests/faults/hostile.py --only pickle

Nothing runs (a canary file would be there), nothing outside is read, written or shown, and no
markup of a text reaches a page or a terminal.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import random
import shutil
import sys
import time
import zipfile
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cases
import forking
from cases import Case
from forking import say
from fuzz_models import with_model
from fuzz_runs import relist
from material import command, write_lines
from spoiling import read_tensors, write_tensors

CANARY = "canary"
MARKUP = "</script><script>evil()</script><img src=x onerror=evil()>"
MARKUP += "\" onload='evil()' {{7*7}} [b]x[/b][/z]"
ESCAPES = "\x1b]0;pwned\x07\x1b[2J\x1b]8;;http://evil\x07x\u202e"
HOSTILE = MARKUP + ESCAPES
CASES: dict[str, Callable[[random.Random, Path], Case]] = {}


class Trap:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return exec, (f"open({CANARY!r}, 'w').close()",)


def bare_pickle(path: Path) -> None:
    """Write a pickle that runs code."""
    path.write_bytes(pickle.dumps(Trap(), protocol=2))


def torch_pickle(path: Path) -> None:
    """Write what torch.save writes of an object that runs code."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({"weight": Trap()}, protocol=2))
        file.writestr("archive/version", "3\n")


EVIL = f"open({CANARY!r}, 'w').close()\n"
EVIL_MODEL = (
    EVIL + "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
    "class Model(LlamaForCausalLM): pass\nclass Config(LlamaConfig): pass\n"
    "class Tokenizer(PreTrainedTokenizerFast): pass\n"
)


def case(name: str) -> Callable[[Any], Any]:
    """Register a case."""

    def register(function: Any) -> Any:
        CASES[name] = function
        return function

    return register


def edit(path: Path, **changes: Any) -> None:
    """Set entries of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# --- Pickles --------------------------------------------------------------------------------------
def _pickle_cases() -> None:
    for run in ("generate", "chat", "eval", "inspect", "lm-eval", "train", "plan"):
        for kind in (bare_pickle, torch_pickle):

            def model(rng: random.Random, work: Path, run: str = run, kind: Any = kind) -> Case:
                name = "plain" if run in ("train", "plan") else "full"
                within = work / name / ("language_model" if name == "full" else "")
                (within / "model.safetensors").unlink()
                kind(within / "pytorch_model.bin")
                line, stdin = with_model(run, name)
                # A plan reads shapes from the config alone.
                return Case(
                    "pytorch_model.bin",
                    line,
                    None if run == "plan" else True,
                    stdin,
                    canary=CANARY,
                    several=run == "train",
                )

            CASES[f"pickle/{run}-model-{kind.__name__}"] = model
    for run in ("generate", "export", "eval"):
        for kind in (bare_pickle, torch_pickle):

            def adapter(rng: random.Random, work: Path, run: str = run, kind: Any = kind) -> Case:
                (work / "lora" / "language_model" / "adapter_model.safetensors").unlink()
                kind(work / "lora" / "language_model" / "adapter_model.bin")
                line, stdin = with_model(run, "lora")
                return Case("adapter_model.bin", line, True, stdin, canary=CANARY)

            CASES[f"pickle/{run}-adapter-{kind.__name__}"] = adapter
    names = (
        "optimizer.bin",
        "random_states_0.pkl",
        "custom_checkpoint_0.pkl",
        "scheduler.bin",
        "sampler.bin",
        "pytorch_model.bin",
        "trainable.safetensors",
        "scaler.pt",
        "model.bin",
    )
    for name in names:
        for kind in (bare_pickle, torch_pickle):

            def checkpoint(
                rng: random.Random, work: Path, name: str = name, kind: Any = kind
            ) -> Case:
                newest = work / "run" / "checkpoints" / "step-000004"
                kind(newest / name)
                relist(newest)
                vital = name in ("optimizer.bin", "trainable.safetensors")
                return Case(name, command("resume"), True if vital else None, canary=CANARY,
                            writes=("run/*",))  # fmt: skip

            CASES[f"pickle/resume-{name}-{kind.__name__}"] = checkpoint


_pickle_cases()


# --- Code that comes with a model -----------------------------------------------------------------
def _code_cases() -> None:
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model",
                "AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}  # fmt: skip
    for run in (
        "generate",
        "chat",
        "eval",
        "inspect",
        "export",
        "lm-eval",
        "train",
        "plan",
    ):
        for file in ("config.json", "tokenizer_config.json"):
            for terminal in (False, True):

                def code(
                    rng: random.Random, work: Path, run: str = run, file: str = file,
                    terminal: bool = terminal,
                ) -> Case:  # fmt: skip
                    name = "plain" if run in ("train", "plan", "export") else "full"
                    folder = work / name
                    changes: dict[str, Any] = {"auto_map": auto_map}
                    if file == "config.json":
                        changes["model_type"] = "evil"
                    else:
                        changes["tokenizer_class"] = "Tokenizer"
                    if name == "full" and file == "config.json":
                        edit(folder / file, **changes)
                        folder = folder / "language_model"
                    edit(folder / file, **changes)
                    (folder / "evil.py").write_text(EVIL_MODEL)
                    line, _ = with_model(run, "lora" if run == "export" else name)
                    # Whoever reads no code takes an ordinary tokenizer, and that is right, too.
                    refuse = None if file.startswith("tokenizer") else True
                    return Case(f"auto_map in {file}", line, refuse, b"y\ny\ny\n/quit\n",
                                several=True, canary=CANARY, terminal=terminal,
                                codes=(1,) if run == "plan" else ())  # fmt: skip

                where = "terminal" if terminal else "pipe"
                CASES[f"code/{run}-{file}-{where}"] = code


_code_cases()


@case("code/sampler-named-by-a-model")
def _(rng: random.Random, work: Path) -> Case:
    path = work / "full" / "quietstar.json"
    thoughts = json.loads(path.read_text())["thoughts"]
    edit(path, thoughts={**thoughts, "sampler": "evil:Sampler"})
    (work / "evil.py").write_text(EVIL + "class Sampler: pass\n")
    return Case("thoughts.sampler", command("generate"), True, canary=CANARY)


@case("code/objective-named-by-a-run-resumed")
def _(rng: random.Random, work: Path) -> Case:
    path = work / "run" / "config.yaml"
    path.write_text(path.read_text().replace("objective: quiet_star", "objective: evil:Evil"))
    (work / "evil.py").write_text(EVIL + "class Evil: pass\n")
    return Case("loss.objective of a run", command("resume"), True, canary=CANARY, several=True)


@case("code/library-named-by-an-adapter")
def _(rng: random.Random, work: Path) -> Case:
    edit(work / "lora" / "language_model" / "adapter_config.json",
         megatron_core="evil", megatron_config={"a": 1},
         auto_mapping={"base_model_class": "Evil", "parent_library": "evil"})  # fmt: skip
    (work / "evil.py").write_text(EVIL)
    line, _ = with_model("generate", "lora")
    return Case("megatron_core and parent_library", line, None, canary=CANARY)


@case("code/quantizer-named-by-a-model")
def _(rng: random.Random, work: Path) -> Case:
    edit(
        work / "full" / "language_model" / "config.json",
        quantization_config={
            "quant_method": "custom",
            "modules_to_not_convert": ["evil"],
            "load_in_8bit": True,
        },
    )
    return Case("quantization_config", command("generate"), True, canary=CANARY)


@case("code/attention-named-by-a-model")
def _(rng: random.Random, work: Path) -> Case:
    edit(work / "full" / "language_model" / "config.json", _attn_implementation="owner/kernel",
         attn_implementation="owner/kernel:evil")  # fmt: skip
    return Case("attn_implementation", command("generate"), None, canary=CANARY)


@case("code/generation-that-a-model-brings")
def _(rng: random.Random, work: Path) -> Case:
    (work / "full" / "custom_generate").mkdir()
    (work / "full" / "custom_generate" / "generate.py").write_text(
        EVIL + "def generate(*a, **k): pass\n"
    )
    edit(work / "full" / "language_model" / "generation_config.json", custom_generate="full")
    return Case("custom_generate", command("generate"), None, b"y\n", canary=CANARY)


@case("code/template-that-reaches-for-python")
def _(rng: random.Random, work: Path) -> Case:
    call = f"open({CANARY!r}, 'w')"
    (work / "full" / "chat_template.jinja").write_text(
        "{{ cycler.__init__.__globals__.__builtins__.exec(\"" + call + "\") }}"
        "{{ messages[0].content }}"
    )  # fmt: skip
    return Case("chat template", command("chat"), None, b"hello\n", canary=CANARY)


@case("code/tags-of-yaml")
def _(rng: random.Random, work: Path) -> Case:
    path = work / "run" / "config.yaml"
    path.write_text(path.read_text() + f"x: !!python/object/apply:os.system ['touch {CANARY}']\n")
    return Case("config.yaml of a run", command("resume"), True, canary=CANARY, several=True)


@case("code/python-beside-the-material")
def _(rng: random.Random, work: Path) -> Case:
    """The folder in which one stands is full of other people's Python."""
    for name in ("full", "harness", "run"):
        for module in ("sitecustomize.py", "numpy.py", "modeling_llama.py", "__init__.py"):
            (work / name / module).write_text(EVIL)
    return Case("modules in folders", command("generate"), False, canary=CANARY)


# --- Names that leave their folder ----------------------------------------------------------------
SECRET = "a secret of the user"


def _outside(work: Path) -> Path:
    folder = work.parent / "outside"
    folder.mkdir(exist_ok=True)
    folder.chmod(0o777)
    (folder / "secret.txt").write_text(SECRET + "\n")
    return folder


@case("leave/weights-by-an-index")
def _(rng: random.Random, work: Path) -> Case:
    outside = _outside(work)
    shutil.move(
        work / "full" / "language_model" / "model.safetensors", outside / "weights.safetensors"
    )
    header, _ = read_tensors(outside / "weights.safetensors")
    names = [name for name in header if name != "__metadata__"]
    index = {
        "metadata": {"total_size": 1},
        "weight_map": dict.fromkeys(names, "../../../outside/weights.safetensors"),
    }
    (work / "full" / "language_model" / "model.safetensors.index.json").write_text(
        json.dumps(index)
    )
    return Case("index outside", command("generate"), True)


@case("leave/weights-by-an-absolute-index")
def _(rng: random.Random, work: Path) -> Case:
    outside = _outside(work)
    shutil.move(
        work / "full" / "language_model" / "model.safetensors", outside / "weights.safetensors"
    )
    header, _ = read_tensors(outside / "weights.safetensors")
    names = [name for name in header if name != "__metadata__"]
    index = {
        "metadata": {},
        "weight_map": dict.fromkeys(names, str(outside / "weights.safetensors")),
    }
    (work / "full" / "language_model" / "model.safetensors.index.json").write_text(
        json.dumps(index)
    )
    return Case("index outside, absolute", command("generate"), True)


def _manifest(name: str, text: str) -> None:
    def make(rng: random.Random, work: Path) -> Case:
        outside = _outside(work)
        newest = work / "run" / "checkpoints" / "step-000004"
        manifest = json.loads((newest / "manifest.json").read_text())
        path = text.format(outside=outside)
        try:
            data = (newest / path).read_bytes()[: 10**6]
        except OSError:
            data = b""
        manifest["files"][path] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (newest / "manifest.json").write_text(json.dumps(manifest))
        line = command("resume", resume=str(newest.relative_to(work)))
        return Case(f"manifest names {text}", line, True, hides=SECRET)

    CASES[f"leave/manifest-{name}"] = make


_manifest("upward", "../../../user_notes.txt")
_manifest("absolute", "{outside}/secret.txt")
_manifest("system", "/etc/passwd")
_manifest("process", "/proc/self/environ")
_manifest("folder", "../step-000002")
_manifest("empty", "")


@case("leave/checkpoint-that-is-not-listed")
def _(rng: random.Random, work: Path) -> Case:
    newest = work / "run" / "checkpoints" / "step-000004"
    (newest / "manifest.json").write_text(json.dumps({"algorithm": "sha256", "files": {}}))
    return Case("an empty manifest", command("resume", resume=str(newest.relative_to(work))), True)


@case("leave/file-that-is-not-listed")
def _(rng: random.Random, work: Path) -> Case:
    newest = work / "run" / "checkpoints" / "step-000004"
    bare_pickle(newest / "custom_checkpoint_1.pkl")
    line = command("resume", resume=str(newest.relative_to(work)))
    return Case("a file beside the manifest", line, True, canary=CANARY)


@case("leave/old-checkpoint-that-is-a-link")
def _(rng: random.Random, work: Path) -> Case:
    archive = work / "archive"
    shutil.move(work / "run" / "checkpoints" / "step-000002", archive)
    (work / "run" / "checkpoints" / "step-000002").symlink_to("../../archive")
    line = command("resume", "--training.save_steps", "1", "--training.save_total_limit", "1")
    return Case("an archived checkpoint", line, None, writes=("run/*",))


@case("leave/weights-by-a-link-in-a-checkpoint")
def _(rng: random.Random, work: Path) -> Case:
    newest = work / "run" / "checkpoints" / "step-000004"
    outside = _outside(work)
    shutil.move(newest / "optimizer.bin", outside / "optimizer.bin")
    (newest / "optimizer.bin").symlink_to(outside / "optimizer.bin")
    return Case("a link out of a checkpoint", command("resume"), None, writes=("run/*",))


def _link(name: str) -> None:
    def make(rng: random.Random, work: Path) -> Case:
        path = work / "run" / name
        if path.is_dir():
            shutil.rmtree(path)
            (work / "mine").mkdir()
            (work / "mine" / "thesis.tex").write_text("mine")
            path.symlink_to("../mine")
        else:
            path.unlink(missing_ok=True)
            path.symlink_to("../user_notes.txt")
        return Case(
            f"run/{name} is a link", command("resume"), None, writes=("run/*",), several=True
        )

    CASES[f"leave/run-{name}-is-a-link"] = make


for _name in (
    "config.yaml",
    "metrics.jsonl",
    "report.html",
    "results.json",
    "samples.json",
    "final",
    "quietstar-run.json",
    "quietstar.lock",
    "preempted",
    "final.partial",
    "config.yaml.partial",
    "tensorboard",
):
    _link(_name)


@case("leave/partial-names-that-are-links")
def _(rng: random.Random, work: Path) -> Case:
    for name in ("o.json.partial", "o.json.new", ".o.json"):
        (work / name).symlink_to("user_notes.txt")
    return Case("links where a file is written", command("inspect", "--out", "o.json"), None)


@case("leave/base-of-an-adapter-upward")
def _(rng: random.Random, work: Path) -> Case:
    outside = _outside(work)
    edit(work / "lora" / "quietstar.json", base_model_name_or_path=str(outside / "secret.txt"))
    line, _ = with_model("generate", "lora")
    return Case("base is a file", line, True, hides=SECRET)


# --- Texts ----------------------------------------------------------------------------------------
class Elements(HTMLParser):
    """The tags of a page with the names of their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.add(" ".join([tag, *sorted({name for name, _ in attributes})]))
        for name, value in attributes:
            if name in ("href", "src", "action") and value and "evil" in value:
                self.found.add(f"{tag} {name}={value}")


def _texts(work: Path, text: str) -> None:
    """Put a text everywhere into the data."""
    write_lines(
        work / "texts.jsonl", [{"text": f"{text} number {n} of some texts"} for n in range(40)]
    )
    write_lines(
        work / "items.jsonl",
        [{"prompt": f"{n} {text}", "answer": f" {text[:20]} {n}", "id": text} for n in range(4)],
    )


def _page_cases() -> None:
    for terminal in (False, True):
        for run in ("train", "eval", "inspect", "generate"):

            def make(
                rng: random.Random, work: Path, run: str = run, terminal: bool = terminal,
                text: str = HOSTILE,
            ) -> Case:  # fmt: skip
                _texts(work, text)
                name = text.replace("/", "_").replace("\x00", "")[:100]
                more = ["--model.config.max_position_embeddings", "256", "--data.seq_len", "60"]
                if run == "train":
                    shutil.move(work / "texts.jsonl", work / f"{name}.jsonl")
                    more += ["--data.train", f"{name}.jsonl", "--thoughts.end_init", text]
                    line = command("train", *more, "--logging.thought_steps", "1")
                elif run == "eval":
                    shutil.move(work / "items.jsonl", work / f"{name.replace(',', ' ')}.jsonl")
                    shutil.copytree(work / "full", work / f"m{name}")
                    line = command(
                        "eval",
                        "--report",
                        "page.html",
                        "--out",
                        "new.json",
                        "--controls",
                        tasks=f"{name.replace(',', ' ')}.jsonl",
                        model=f"m{name}",
                    )
                elif run == "inspect":
                    shutil.copytree(work / "full", work / f"m{name}")
                    options = {"inspect": text[:100], "model": f"m{name}"}
                    line = command(
                        "inspect", *([] if terminal else ["--out", "page.html"]), **options
                    )
                else:
                    line = command("generate", "--show-thoughts", prompt=text[:100])
                return Case(
                    f"texts of {run}",
                    line,
                    False,
                    several=True,
                    terminal=terminal,
                )

            CASES[f"text/{run}-{'terminal' if terminal else 'pipe'}"] = make


_page_cases()


@case("text/names-of-a-tokenizer")
def _(rng: random.Random, work: Path) -> Case:
    path = work / "full" / "tokenizer.json"
    tree = json.loads(path.read_text())
    for token in tree["added_tokens"]:
        if token["id"] == 256:
            token["content"] = HOSTILE
    tree["added_tokens"] = [{**token, "special": False} for token in tree["added_tokens"]]
    path.write_text(json.dumps(tree))
    return Case("tokens", command("inspect", inspect=f"two {HOSTILE} two"), None, terminal=True)


@case("text/entries-of-a-model")
def _(rng: random.Random, work: Path) -> Case:
    header, data = read_tensors(work / "full" / "quietstar.safetensors")
    name = next(name for name in header if name != "__metadata__")
    header[name + ESCAPES] = header.pop(name)
    write_tensors(work / "full" / "quietstar.safetensors", header, data)
    return Case("a tensor's name", command("generate"), True, terminal=True)


@case("text/names-of-stages")
def _(rng: random.Random, work: Path) -> Case:
    path = work / "new.yaml"
    stages = {HOSTILE: {"training": {"max_steps": 1}}, "b": {"training": {"max_steps": 1}}}
    path.write_text(path.read_text() + "stages: " + json.dumps(stages) + "\n")
    return Case("a stage's name", command("train"), None, several=True, terminal=True)


@case("text/fields-of-records")
def _(rng: random.Random, work: Path) -> Case:
    (work / "texts.jsonl").write_text(
        json.dumps({ESCAPES + "\nquietstar: error: forged": 1}) + "\n"
    )
    return Case("a field's name", command("train"), True, terminal=True)


@case("text/keys-of-a-config")
def _(rng: random.Random, work: Path) -> Case:
    path = work / "new.yaml"
    path.write_text(path.read_text() + json.dumps(ESCAPES) + ": 1\n")
    return Case("a key", command("train"), True, terminal=True)


@case("text/files-of-a-manifest")
def _(rng: random.Random, work: Path) -> Case:
    newest = work / "run" / "checkpoints" / "step-000004"
    manifest = {"algorithm": "sha256", "files": {ESCAPES: {"size": 1, "sha256": "x"}}}
    (newest / "manifest.json").write_text(json.dumps(manifest))
    return Case("a file's name", command("resume"), None, terminal=True, writes=("run/*",))


@case("text/records-of-a-run")
def _(rng: random.Random, work: Path) -> Case:
    path = work / "run" / "metrics.jsonl"
    line = json.dumps(
        {"kind": "eval", "stage": HOSTILE, "step": 4, HOSTILE: 1.0, "base_nll": HOSTILE}
    )
    path.write_text(path.read_text() + line + "\n")
    return Case("metrics.jsonl", command("resume"), None, terminal=True, writes=("run/*",))


def check_pages(good: Path, base: Path) -> list[dict[str, Any]]:
    """Compare the elements of pages of hostile texts with those of harmless ones."""
    records = []
    for run, page in (
        ("train", "new/report.html"),
        ("eval", "page.html"),
        ("inspect", "page.html"),
    ):
        found = []
        for text in ("a harmless text", HOSTILE):
            place = Path(forking.new_place("page-"))
            work = Path(shutil.copytree(good, place / "work", symlinks=True))
            made = CASES[f"text/{run}-pipe"](random.Random(0), work)
            if text != HOSTILE:
                shutil.rmtree(work)
                shutil.copytree(good, work, symlinks=True)
                maker: Any = CASES[f"text/{run}-pipe"]
                made = maker(random.Random(0), work, text=text)
            outcome = forking.Child(made.arguments, work, as_root=True).wait(120)
            path = work / page
            found.append(
                Elements(path.read_text(errors="replace")).found if path.exists() else None
            )
            last = outcome
            shutil.rmtree(place, ignore_errors=True)
        verdicts = {}
        if None in found:
            verdicts["code"] = f"no page: exit {last.code} {last.err[-200:]}"
        elif foreign := sorted(found[1] - found[0]):
            verdicts["raw"] = f"foreign elements: {foreign}"
        records.append({
            "name": f"page/{run}", "command": run, "what": "elements of a page", "arguments": [],
            "verdicts": verdicts, "err": "", "out": "", "code": last.code,
        })  # fmt: skip
    return records


def main() -> int:
    """Run the cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="beginning of the names of cases")
    parser.add_argument("--every", type=int, default=1, help="only every so many-th case")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", action="store_true")
    args = parser.parse_args()
    forking.preload()
    import material

    base = forking.new_place()
    material.build(base / "good")
    records = []
    began = time.monotonic()
    for place, (name, make) in enumerate(CASES.items()):
        if not name.startswith(args.only or "") or place % args.every:
            continue
        folder = base / f"case-{place}"
        folder.mkdir()
        record = cases.run_case(make, random.Random(0), base / "good", folder)
        records.append(record | {"name": name, "command": name.partition("/")[0]})
        if not args.keep:
            cases.clear(folder)
    if "page/".startswith(args.only or "page/"):
        records += check_pages(base / "good", base)
    cases.report(records, args.json)
    failed = sum(bool(record["verdicts"]) for record in records)
    say(f"{len(records)} cases in {time.monotonic() - began:.0f} s, {failed} failed")
    if not args.keep:
        cases.clear(base)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
