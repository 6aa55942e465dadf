"""The console command: help, exit codes, and that mistakes end in one line without torch."""

import os
import re
import subprocess
import sys
import types
from functools import partial
from pathlib import Path

import pytest

import quietstar.reports  # noqa: F401  (before `runs` replaces what it imports)
from quietstar import __version__
from quietstar.cli import main as cli
from quietstar.cli.options import Parser
from quietstar.config import SECTIONS, fields
from quietstar.config.loading import load_config
from quietstar.config.messages import type_text
from quietstar.errors import UserError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def runs(monkeypatch):
    """Puts a recorder in the place of the training loop."""
    calls = []
    module = types.ModuleType("quietstar.training.run")
    module.run_training = lambda config, resume, allow_changes, overwrite, on_report: calls.append(
        (config, resume, *["overwrite"] * overwrite)
    )
    monkeypatch.setitem(sys.modules, "quietstar.training", types.ModuleType("quietstar.training"))
    monkeypatch.setitem(sys.modules, "quietstar.training.run", module)
    return calls


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)


def run_train_py(*arguments, **environment):
    variables = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK")}
    return subprocess.run(
        [sys.executable, "train.py", *arguments],
        cwd=ROOT,
        env={**variables, **environment},
        capture_output=True,
        text=True,
    )


def test_a_wrong_key_ends_in_one_line_and_exit_code_2():
    result = run_train_py("--thoughts.lenght", "8")
    assert result.returncode == 2
    assert result.stdout.count("\n") == 1  # what it would have done
    assert result.stderr == (
        "quietstar: error: command line: --thoughts.lenght: unknown key;"
        " did you mean --thoughts.length?\n"
    )


def test_a_script_that_starts_it_goes_on_after_a_mistake(tmp_path):
    script = tmp_path / "accelerate_jobs.sh"
    script.write_text(f"{sys.executable} {ROOT / 'train.py'} --xyzzy 2>/dev/null; echo code $?\n")
    call = ["bash", str(script), "launch"]
    done = subprocess.run(call, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "code 2")


def test_the_launcher_learns_the_error_that_it_reports_last(tmp_path, monkeypatch):
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    assert cli.main(["train", "--xyzzy", "1", "--yzzyx", "2"]) == 2
    failure = ProcessFailure(0, 1234, 2, str(path))
    report = str(ChildFailedError("train.py", {0: failure})).splitlines()
    line = report[-2]  # the last one is a rule
    assert line.strip().startswith("traceback : command line: --xyzzy: unknown key")
    assert "--yzzyx" in line


def test_each_problem_is_a_line_with_the_prefix(capsys):
    assert (
        cli.main(
            ["train", "--thoughts.length", "0", "--optim.learning_rate", "0", "--resume", "no"]
        )
        == 2
    )
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("quietstar: error: ") for line in lines)


def test_warnings_are_lines_like_errors(runs, capsys):
    assert cli.main(["train", "--loss.objective", "next_token", "--loss.reward", "prob"]) is None
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("quietstar: warning: ") for line in lines)
    assert any("loss.reward" in line for line in lines)


def test_a_wrong_config_fails_before_transformers_is_imported():
    code = (
        "import sys; from quietstar.cli.main import main;"
        "assert main(['train', '--optim.learning_rate', '0']) == 2; "
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_train_without_config_runs_the_demo(runs):
    assert cli.main(["train"]) is None
    assert runs == [(load_config("demo"), None)]


def test_train_hands_over_config_overrides_and_resume(runs, tmp_path):
    arguments = ["--config=smollm2_math", "--data.train", "x.txt", "--resume", "auto"]
    assert cli.main(["train", *arguments, "--training.torch_compile", "--local_rank=0"]) is None
    overrides = ["--data.train=x.txt", "--training.torch_compile=true"]
    assert runs == [(load_config("smollm2_math", overrides), "auto")]
    assert cli.main(["train", f"--resume={tmp_path}"]) is None
    assert runs[1][1] == str(tmp_path)
    assert cli.main(["train", "--overwrite"]) is None
    assert runs[2] == (load_config("demo"), None, "overwrite")
    assert cli.main(["train", "--overwrite=false"]) is None
    assert runs[3] == (load_config("demo"), None)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "no command is given"),
        (["trian"], "there is no command trian (did you mean train?); known: "),
        (["train", "--config"], "--config: has no value; write --config FILE"),
        (["train", "--resume", "--overwrite"], "--resume: has no value"),
        (["train", "--allow-changes", "maybe"], "--allow-changes (maybe): must be true or false"),
        (["train", "--controls", "0"], "--controls (0): must be a whole number of at least 1"),
        (["train", "--resume", "runs/no/such"], "--resume (runs/no/such): there is no such folder"),
        (["export", "--model", "a"], "--out: must be given (see quietstar export --help)"),
        (["export", "a", "--out", "b", "--model", "c"], "a: belongs to no option (see"),
        (["eval", "--model=m", "--tasks=gsm8k", "--force", "a"], "a: belongs to no option (see"),
        (
            ["eval", "--model=m", "--tasks=gsm8k", "--controls", "swapped", "blank"],
            "blank: belongs to no option; --controls takes one value: join a list by commas",
        ),
        (["generate", "--modl", "a"], "--modl: unknown option; did you mean --model?"),
        (["generate", "--show-thoughts=1"], "--show-thoughts: takes no value"),
        (["generate", "--model", "m"], "there is nothing to do; give one of --prompt, --prompts"),
        (
            ["generate", "--model", "m", "--chat", "--prompt", "a"],
            "--prompt and --chat do not go together; give one of",
        ),
        (["train", "--plan", "--resume", "auto"], "--resume: does not go with --plan"),
        (["train", "--help", "nosuch"], "--help (nosuch): is no section; give one of model, "),
        (["eval", "--thoughts", "maybe"], "--thoughts (maybe): must be one of off, on, both"),
        (["train", "--config", "no_such_file"], "--config: there is no file no_such_file"),
    ],
)
def test_a_mistake_in_the_command_ends_with_exit_code_2(arguments, expected, runs, capsys):
    assert cli.main(arguments) == 2
    assert expected in capsys.readouterr().err
    assert not runs


@pytest.mark.parametrize(("old", "new"), cli.RENAMED.items())
def test_an_old_command_is_one_line_that_names_the_new_one(old, new, capsys):
    assert cli.main([old, "--model", "m"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"quietstar: error: {old}: is no command any more; instead: ")
    assert line.endswith(new)
    assert old not in cli.COMMANDS
    assert new.split()[0] in cli.COMMANDS or new.startswith("python -m benchmarks.step")


def test_mistakes_found_by_the_loop_end_the_same_way(runs, monkeypatch, capsys):
    def fail(config, resume, allow_changes, overwrite, on_report):
        raise UserError("runs/tiny already holds a run")

    monkeypatch.setattr(sys.modules["quietstar.training.run"], "run_training", fail)
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err == "quietstar: error: runs/tiny already holds a run\n"


def test_a_fault_of_ours_is_one_line_that_names_a_file_with_the_traceback(
    runs, monkeypatch, capsys
):
    def fail(config, resume, allow_changes, overwrite, on_report):
        raise ValueError("a fault of\nthe program\x1b[2J")

    monkeypatch.setattr(sys.modules["quietstar.training.run"], "run_training", fail)
    assert cli.main(["train"]) == cli.EXIT_FAULT == 70
    err = capsys.readouterr().err
    told = (
        "quietstar: error: a fault of quietstar, not of yours (ValueError: a fault of the program"
    )
    assert err.startswith(told)
    assert (err.count("\n"), "\x1b" in err) == (1, False)
    path = Path(err.rpartition(" ")[2].strip())
    text = path.read_text()
    assert "Traceback" in text
    assert "in fail" in text
    path.unlink()


def fail(error, *arguments, **options):
    raise error


RAISED = fail.__code__.co_firstlineno + 1


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (OSError(28, "No space left on device", "/runs/x"), 2, "/runs/x: No space left on device"),
        (OSError(28, "No space left on device"), 74, "<stdout>: No space left on device"),
        (MemoryError(), 2, "out of memory: it does not fit into memory. Lower"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 2, "out of m"),
        (RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:123"), 2, "another process"),
        (BrokenPipeError(32, "Broken pipe"), 141, None),
        (SystemExit(0), 2, f"line {RAISED} of {__file__} ended the command before its work"),
        (type("PanicException", (BaseException,), {})("Onig"), 2, "a tokenizer fails over a text"),
    ],
)
def test_what_the_machine_lacks_is_said(runs, monkeypatch, capfd, error, code, told):
    monkeypatch.setattr(sys.modules["quietstar.training.run"], "run_training", partial(fail, error))
    monkeypatch.setattr("os.dup2", lambda *descriptors: None)
    assert cli.main(["train"]) == code
    err = capfd.readouterr().err
    assert err == "" if told is None else err.startswith(f"quietstar: error: {told}")


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("train --config nosuch 2>&-", 2),
        ("train --config nosuch 2>/dev/full", 2),
        ("train --config nosuch 0<&- 1>&- 2>&-", 2),
        ("train --help >/dev/full", 74),
        ("--version >/dev/full", 74),
        ("--version >&-", 0),
    ],
)
def test_exit_codes_stay_the_same_where_nothing_can_be_printed(command, code):
    line = f"{sys.executable} -m quietstar {command}"
    result = subprocess.run(["sh", "-c", line], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == code
    told = "" if code != 74 else "quietstar: error: <stdout>: No space left on device"
    assert result.stderr.startswith(told)
    assert result.stderr.count("\n") == bool(told)


def test_an_interrupt_ends_with_exit_code_130(runs, monkeypatch):
    def interrupt(config, resume, allow_changes, overwrite, on_report):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["quietstar.training.run"], "run_training", interrupt)
    assert cli.main(["train"]) == 130


def test_help_is_a_screen_that_names_every_key_and_no_value():
    result = run_train_py("--help", COLUMNS="80")
    assert result.returncode == 0
    assert result.stdout.isascii()
    lines = [line.rstrip() for line in result.stdout.splitlines()]
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 80
    _, _, named = result.stdout.partition("keys, as --SECTION.KEY:")
    found, section = set(), ""
    for line in named.splitlines()[1:]:
        section = line[:14].strip() or section
        found |= {f"{section}.{key.strip()}" for key in line[14:].split(",") if key.strip()}
    assert found == set(fields())


def explained(text):
    """Options that a help explains, one a line."""
    return {line.split()[0] for line in text.splitlines() if line.startswith("  --")}


def test_help_of_all_explains_every_key_with_type_default_and_bounds_in_80_columns():
    result = run_train_py("--help", "all", COLUMNS="80")
    assert result.returncode == 0
    assert result.stdout.isascii()
    assert max(len(line.rstrip()) for line in result.stdout.splitlines()) <= 80
    options = {"--config", "--preset", "--resume", "--allow-changes", "--overwrite", "--controls",
               "--plan", "--engine", "--processes", "--memory", "--json", "--force"}  # fmt: skip
    assert explained(result.stdout) == {f"--{key}" for key in fields()} | options
    words = " ".join(result.stdout.split())
    for key, field in fields().items():
        assert f"--{key} " in words
        assert type_text(fields()[key]) in words
        assert " ".join(field["description"].split()[:3]) in words
    assert "integer >= 1 and <= 1048576; default 8" in words
    assert "number >= 0 and < 1; default 0.05" not in words
    assert "number > 0 and <= 0.9; default 0.05" in words


@pytest.mark.parametrize("section", SECTIONS)
def test_help_of_a_section_explains_its_keys_and_no_other(section, capsys):
    assert not cli.main(["train", "--help", section])
    own = {f"--{key}" for key in fields() if key.startswith(f"{section}.")}
    assert explained(capsys.readouterr().out) == own


def test_help_has_the_defaults_of_the_objective_that_is_named(capsys):
    assert not cli.main(["train", "--loss.objective", "distill", "--help", "loss"])
    words = " ".join(capsys.readouterr().out.split())
    assert "those of distill" in words
    assert re.search(r"--loss.reference .{0,300}default base\)", words)
    assert "--loss.form" not in words


def test_help_and_version_of_the_command(capsys):
    assert not cli.main(["--help"])
    assert "train" in capsys.readouterr().out
    assert not cli.main(["--version"])
    assert capsys.readouterr().out == f"quietstar {__version__}\n"


NUMBERS = [
    ("generate", "--temperature", "nan"),
    ("generate", "--temperature", "-1"),
    ("generate", "--thought-temperature", "inf"),
    ("generate", "--top-p", "0"),
    ("generate", "--thought-top-p", "0"),
    ("eval", "--thought-top-p", "1.1"),
    ("eval", "--thought-top-k", "0"),
    ("generate", "--top-p", "1.1"),
    ("generate", "--seed", "-1"),
    ("generate", "--seed", str(2**63)),
    ("generate", "--num-thoughts", "0"),
    ("generate", "--num-thoughts", str(10**6)),
    ("generate", "--max-new-tokens", "9" * 5000),
    ("generate", "--batch-size", "0"),
    ("generate", "--num-thoughts", "1.5"),
    ("generate", "--context", "1"),
    ("eval", "--limit", "0"),
    ("eval", "--seed", "-3"),
    ("eval", "--votes", "x"),
    ("train", "--memory", "nan"),
    ("train", "--processes", "1.5"),
    ("train", "--processes", "\u0663"),
    ("train", "--memory", "1e308"),
    ("generate", "--temperature", "1e-30"),
    ("generate", "--temperature", "1_0"),
    ("generate", "--seed", "\u0663"),
    ("generate", "--batch-size", ""),
    ("eval", "--seed", str(2**32)),
    ("eval", "--limit", str(10**8)),
    ("eval", "--text-tokens", "1"),
    ("eval", "--thought-temperature", "1e308"),
    ("generate", "--context", str(10**9)),
]


@pytest.mark.parametrize(("command", "option", "value"), NUMBERS)
def test_numbers_out_of_range_are_refused_in_one_line_at_once(command, option, value, capsys):
    assert cli.main([command, option, value]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"quietstar: error: {option} ({value}): must be a ")
    assert line.endswith(". Give another value.")


@pytest.mark.parametrize("command", ["export", "eval", "teach", "generate", "train"])
def test_a_nul_character_is_refused_in_one_line(command, capsys):
    assert cli.main([command, "--model", "a", "--out", "a\0b"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("quietstar: error: ")


OUTPUTS = [
    (["generate", "--model", "none", "--inspect", "a text"], "--out"),
    (["train", "--plan"], "--json"),
]


@pytest.mark.parametrize(("call", "option"), OUTPUTS)
def test_files_that_cannot_be_written_are_refused_before_the_work(call, option, tmp_path, capsys):
    mine = tmp_path / "mine.html"
    mine.write_text("years of work")
    (tmp_path / "link.html").symlink_to(mine)
    os.mkfifo(tmp_path / "pipe.html")
    (tmp_path / "folder.html").mkdir()
    bad = {
        str(mine): "exists. Give another name, or --force",
        str(tmp_path / "link.html"): "is a symbolic link",
        str(tmp_path / "pipe.html"): "is no regular file",
        str(tmp_path / "folder.html"): "is a folder",
        str(mine / "x.html"): "cannot be written",
        f"{tmp_path}/{'x' * 300}.html": "cannot be written",
        "": "names no file",
        f"{tmp_path}/x.html.partial": "must",
    }
    for path, words in bad.items():
        assert cli.main([*call, option, path]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"quietstar: error: {option} ({path}): {words}")
    for path in list(bad)[1:4]:
        assert cli.main([*call, option, path, "--force"]) == 2
    assert mine.read_text() == "years of work"
    assert (tmp_path / "link.html").is_symlink()


def test_two_outputs_are_two_files_and_none_that_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parser = Parser("x", None)
    parser.output("--json", "figures")
    parser.output("--plot", "a page")
    parser.value("--data", str, None, "FILE", "what is read")
    Path("a").write_text("mine")
    os.link("a", "hard")
    Path("folder").symlink_to(".")
    read = parser.read
    assert read(["--json", "a", "--force", "--plot", "b"]).json == tmp_path / "a"
    for one, other in (("b", "./b"), ("b", "folder/b"), ("b", "B"), ("é", "e\u0301")):
        with pytest.raises(UserError, match=r"--plot \(.*is also --json"):
            read(["--json", one, "--plot", other])
    with pytest.raises(UserError, match="is also --json"):
        read(["--json", "a", "--plot", "hard", "--force"])
    for name in ("a", "hard", "folder/a"):
        with pytest.raises(UserError, match=r"--json .*: is also --data, which is read"):
            read(["--data", "a", "--json", name, "--force"])
    assert Path("a").read_text() == "mine"


def test_an_error_is_one_line_whatever_is_in_it(capsys):
    def fail(arguments):
        raise UserError("key \x1b]0;title\x07\x1b[2J\nquietstar: error: forged \u202e\u2028\udcff")

    assert cli.run_command(fail, []) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert printed.startswith("quietstar: error: key \\x1b]0;title\\x07\\x1b[2J quietstar: error:")
    assert not set(printed) & set("\x1b\x07\u202e\u2028\udcff")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_a_file_that_cannot_be_written_is_named_though_the_system_does_not(capsys):
    def fill(arguments):
        Path("/dev/full").write_text("x" * 100_000)

    assert cli.run_command(fill, []) == 2
    said = "quietstar: error: /dev/full: No space left on device. Free"
    assert capsys.readouterr().err.startswith(said)


def test_options_stand_among_the_keys_of_a_config(runs, capsys):
    negative = ["--optim.learning_rate", "-5e-3", "--config", "demo", "--data.train", "- a b"]
    assert cli.main(["train", *negative]) == 2
    assert "learning_rate: -0.005 must be" in capsys.readouterr().err
    arguments = ["--thoughts.length", "9", "--config", "demo", "--resume=auto"]
    assert cli.main(["train", *arguments]) is None
    assert runs == [(load_config("demo", ["--thoughts.length", "9"]), "auto")]


@pytest.mark.parametrize(
    ("module", "extra", "arguments"),
    [
        ("lm_eval", "lm-eval", ["eval", "lm-eval", "ls"]),
    ],
)
def test_a_missing_package_is_one_line_that_names_its_extra(module, extra, arguments):
    code = (
        f"import sys; sys.modules[{module!r}] = None; from quietstar.cli.main import main;"
        f"sys.exit(main({arguments}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2, done.stderr
    assert f"pip install 'quietstar[{extra}]'" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


EXTRA_MODULES = ("reasoning_gym", "lm_eval", "bitsandbytes", "galore_torch",
                 "deepspeed", "psutil")  # fmt: skip


def test_the_demo_needs_required_packages_only(tmp_path):
    arguments = ["train", "--training.max_steps", "1", "--data.task_options.size", "100"]
    arguments += ["--data.eval_sequences", "8", "--training.output_dir", str(tmp_path / "run")]
    code = f"""
import sys
from importlib.machinery import PathFinder

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] in {EXTRA_MODULES}
        return None if hidden else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding
from quietstar.cli.main import main
sys.exit(main({arguments}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "report.html").exists()
    assert list((tmp_path / "run" / "tensorboard").rglob("events.*"))


def test_required_packages_are_few_and_every_extra_in_an_error_exists():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    required = re.search(r"^dependencies = \[\n(.*?)^\]", project, re.S | re.M).group(1)
    assert 10 < len(required.splitlines()) <= 17
    extras = re.search(r"^\[project.optional-dependencies\]\n(.*?)^\[", project, re.S | re.M).group(
        1
    )
    names = set(re.findall(r"^([\w-]+) = ", extras, re.M))
    package = "".join(file.read_text("utf-8") for file in (ROOT / "quietstar").rglob("*.py"))
    named = set(re.findall(r"quietstar\[([\w-]+)\]", package)) | set(cli.EXTRAS.values())
    assert {"lm-eval", "tasks"} <= named <= names


def test_lines_break_between_words_on_a_terminal_and_stay_whole_in_a_file(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    path = "/a/folder/with/a/long/name/that/no/line/of/forty/holds.yaml"
    words = ["train", "--config", path]
    assert cli.main(words) == 2
    whole = capsys.readouterr().err
    assert whole.count("\n") == 1
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert cli.main(words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert " ".join(lines) == whole.strip()
    assert all(len(line) <= 40 for line in lines if path not in line)
    assert len(lines) > 2
