"""The docs' promises: every command parses as it is typed, every snippet compiles, links lead."""

import re
import runpy
import shlex
import shutil
from importlib import import_module
from pathlib import Path

import pytest
import yaml

import quietstar
from quietstar import QuietStarForCausalLM
from quietstar.cli import main as cli
from quietstar.cli import options
from quietstar.config import fields
from quietstar.config.loading import load_config
from quietstar.errors import UserError
from quietstar.training import controls, memory_plan, run

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
OTHERS = (
    *("pip", "pytest", "cd", "cp", "export", "for", "do", "done", "mkdocs", "ruff", "git"),
    "inspect",
)
"""First words of commands that are not ours."""
LM_EVAL = ["quietstar", "eval", "lm-eval"]


STUB = "docs/remote_thoughts.py"
"""What a page has the reader copy."""
WRITTEN = "written.yaml"


class Parsed(Exception):
    """A command line that would have been run."""


def blocks(page, language):
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", page.read_text("utf-8"), re.M | re.S)


def typed(page, block):
    """Every command of a block of shell: where it stands, and its words."""
    for line in block.replace("\\\n", " ").splitlines():
        for part in re.split(r"\s+(?:&&|\|)\s+|;\s+", line.strip()):
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words = words[1:]
            if words:
                yield f"{page.relative_to(ROOT)}: {part[:70]}", words


def commands():
    """Every command of every page."""
    return [c for page in PAGES for block in blocks(page, "bash") for c in typed(page, block)]


def shown_outputs():
    """What pages show as output, by where its command stands: the last one of the block before."""
    found = {}
    code = r"((?:(?! *```).*\n)*?) *```\n"
    for page in PAGES:
        text = page.read_text("utf-8")
        for block, output in re.findall(rf"^ *```bash\n{code}\n *```text\n{code}", text, re.M):
            (*_, (where, _)) = typed(page, block)
            assert where not in found, where
            found[where] = output
    return found


def our_arguments(words):
    """What the command line of `quietstar` gets; None for another program."""
    if words[:3] == LM_EVAL:  # the harness's own command line
        return None
    if words[0] == "quietstar":
        return words[1:]
    if "quietstar" in words and words[words.index("quietstar") - 1] == "-m":
        return words[words.index("quietstar") + 1 :]
    for script, name in (("train.py", "train"), ("eval/run.py", "eval")):
        if script in words:
            return [name, *words[words.index(script) + 1 :]]
    return None


@pytest.fixture
def parsing(tmp_path, monkeypatch):
    """A folder with the files of the tutorials, in which commands are parsed and not run."""

    def read(parser, arguments):
        known = [option for action in parser._actions for option in action.option_strings]
        for word in arguments:
            name = word.partition("=")[0]
            if name.startswith("--") and name not in known:
                raise UserError(f"{name}: unknown option")
        args, unknown = options.Parser.parse_known_args(parser, arguments)
        if unknown:
            raise UserError(f"{unknown[0]}: belongs to no option")
        raise Parsed(vars(args))

    def stop(*arguments, **more):
        raise Parsed(arguments)

    monkeypatch.setattr(options.Parser, "read", read)
    monkeypatch.setattr(memory_plan, "estimate_run", stop)
    monkeypatch.setattr(QuietStarForCausalLM, "from_pretrained", stop)
    monkeypatch.setattr(run, "run_training", stop)
    monkeypatch.setattr(controls, "run_controls", stop)
    for page in PAGES:
        text = page.read_text("utf-8")
        for name, code in re.findall(r"<!-- (\w+\.py) -->\n```python\n(.*?)```", text, re.S):
            (tmp_path / name).write_text(code)
    shutil.copy(ROOT / STUB, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    written = yaml.safe_load((ROOT / "configs/smollm2_math.yaml").read_text())
    written["data"]["train"] = "texts.jsonl"
    (tmp_path / WRITTEN).write_text(yaml.safe_dump(written))


def existing_config(arguments):
    """The arguments with a config of the test in the place of one that a reader has written."""
    words = list(arguments)
    for place, word in enumerate(words[:-1]):
        if word == "--config" and not (ROOT / words[place + 1]).exists():
            words[place + 1] = WRITTEN
    return [re.sub(r"\$\w+", "0", word) for word in words if word != "..."]


@pytest.mark.parametrize(("where", "words"), commands(), ids=lambda value: str(value)[:90])
def test_a_command_parses_as_it_is_typed(where, words, parsing):
    arguments = our_arguments(words)
    if arguments is not None:
        with pytest.raises(Parsed):
            cli._dispatch(existing_config(arguments))
        return
    if words[:2] == ["python", "-m"] and words[2].startswith("benchmarks."):
        module = import_module(words[2])
        with pytest.raises(Parsed):
            module.main(words[3:])
        return
    script = next((word for word in words if word.endswith((".sh", ".py"))), None)
    if script is not None:
        assert (ROOT / script).exists() or Path(script).exists(), where
        return
    assert Path(words[0]).name in OTHERS or words[:3] == LM_EVAL, where


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_snippets_are_python_and_yaml(page, tmp_path):
    for code in blocks(page, "python"):
        compile(code, str(page), "exec")


HOOKS = runpy.run_path(str(ROOT / "docs/hooks.py"))
MADE = {*HOOKS["PAGES"].values(), *HOOKS["GENERATED"]}


def test_reference_pages_name_every_key_command_and_public_name():
    pages = {page: make() for page, make in HOOKS["GENERATED"].items() if "parity" not in page}
    assert all(f"\n| `{key}` | " in pages["reference/config.md"] for key in fields())
    for name in ("train", "eval", "report", "judge", "reward-model", "teach", "generate", "init"):
        assert f"\n## quietstar {name}\n" in pages["reference/commands.md"]
    assert all(
        f".{name}\n" in pages["reference/python.md"] + "\n"
        for name in quietstar.__all__
        if name != "__version__"
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.S)
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        name, _, heading = target.partition("#")
        path = (page.parent / name) if name else page
        if not path.exists() and page.parent != ROOT:  # a page that hooks make for the site
            assert path.resolve().relative_to(ROOT / "docs").as_posix() in MADE, target
            continue
        assert path.exists(), target
        if heading and path.suffix == ".md":
            titles = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}
            assert heading in slugs, target


def test_the_config_of_the_questions_tutorial_is_one(tmp_path):
    (code,) = (
        block
        for block in blocks(ROOT / "docs/tutorials/your-questions.md", "yaml")
        if "questions.jsonl" in block
    )
    (tmp_path / "questions.yaml").write_text(code)
    config = load_config(tmp_path / "questions.yaml")
    assert config.loss.objective == "verifree"
    assert config.thoughts.positions == "answer_start"
