"""Command lines of all commands with values that nobody should give: refused, in one line each."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import plain_model, run_config, thinking_model, write_texts

from quietstar.cli import main as cli
from quietstar.config.loading import save_config
from quietstar.data import load_tokenizer
from quietstar.errors import UserError
from quietstar.evaluation import runner
from quietstar.evaluation.runner import ItemStore, open_store
from quietstar.system import locks

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"
NASTY = ("", " ", "nan", "-inf", "-1", "0", "1", "2", "1e308", "1e-300", str(2**63), "9" * 400,
         "\u0663", "\udcff", "\x1b]0;pwned\x07", "[/b][link=x]", "a\nquietstar: error: forged",
         "\u202e", "null", "{}", "--", "mine.html", "./x/../mine.html", "link.html", "pipe",
         "folder", "model", "no/such", "~nobody/x", "/dev/null", "/proc/self/mem",
         "x" * 300)  # fmt: skip
COMMON = ("--model", "--ema", "--dtype", "--device")
GENERATION = (*COMMON, "--max-new-tokens", "--gate", "--control", "--num-thoughts",
              "--thought-temperature", "--thought-top-p", "--thought-top-k", "--temperature",
              "--top-p", "--seed")  # fmt: skip
COMMANDS = {
    "generate": (["generate", "--model", "model", "--prompt", "two and", "--max-new-tokens", "2"],
                 (*GENERATION, "--prompt", "--prompts", "--batch-size", "--show-thoughts",
                  "--chat", "--inspect")),
    "chat": (["generate", "--chat", "--model", "model", "--max-new-tokens", "2"],
             (*GENERATION, "--system")),
    "inspect": (["generate", "--model", "model", "--inspect", "two and"],
                (*COMMON, "--inspect", "--inspect-file", "--out", "--compare", "--num-thoughts",
                 "--thought-temperature", "--seed", "--context", "--controls", "--force")),
    "eval": (["eval", "--model", "model", "--tasks", "own.jsonl", "--thoughts", "off"],
             (*COMMON, "--tasks", "--thoughts", "--positions", "--separator", "--include-path",
              "--data-dir", "--limit", "--batch-size", "--seed", "--samples",
              "--thought-temperature", "--thought-top-p", "--thought-top-k", "--votes",
              "--temperature", "--max-new-tokens", "--text-tokens", "--out", "--out-items",
              "--report", "--controls")),
    "plan": (["train", "--plan", "--config", "plan.yaml"],
             ("--config", "--engine", "--processes", "--memory", "--json", "--thoughts.length",
              "--data.seq_len", "--model.config.num_hidden_layers")),
}  # fmt: skip
"""By what is done: a line that works, and the options that are spoilt."""
READ = {"--prompt": "--prompts", "--inspect": "--inspect-file"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands")
    base = plain_model(max_position_embeddings=128, eos_token_id=256)
    tokenizer = load_tokenizer("bytes")
    tokenizer.chat_template = TEMPLATE
    thinking_model(base, thoughts={"length": 2}).save_pretrained(folder / "model", tokenizer)
    write_texts(folder / "texts.jsonl")
    (folder / "own.jsonl").write_text('{"prompt": "one", "answer": " two"}\n')
    (folder / "prompts.txt").write_text("two\n" * 1000)
    (folder / "mine.html").write_text("years of work")
    (folder / "link.html").symlink_to("mine.html")
    os.mkfifo(folder / "pipe")
    (folder / "folder").mkdir()
    save_config(run_config(folder), folder / "plan.yaml")
    return folder


@pytest.fixture
def work(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # as on most clusters
    monkeypatch.setattr("builtins.input", lambda *_: (_ for _ in ()).throw(EOFError))
    return folder


def contents(folder):
    """What must stay as it is, by name."""
    of_model = (p.relative_to("model") for p in Path("model").rglob("*") if p.is_file())
    names = ("own.jsonl", "mine.html", "plan.yaml", "texts.jsonl", *sorted(of_model))
    paths = [folder / n if (folder / n).exists() else folder / "model" / n for n in names]
    kept = {path: path.read_bytes() for path in paths}
    return kept, (folder / "link.html").is_symlink(), (folder / "pipe").is_fifo()


def check(code, err, most=1):
    """One line that says what is wrong, or none; ``most`` where several keys of a config are."""
    assert code in (None, 0, 1, 2), err
    assert "Traceback" not in err
    assert "a fault of quietstar" not in err
    assert not set(err) & set("\x07\u202e\udcff")
    problems = [line for line in err.splitlines() if line.startswith("quietstar: error: ")]
    assert (code == 2) <= len(problems) <= most * (code == 2), err


@pytest.mark.parametrize("command", COMMANDS)
def test_whatever_is_given_ends_in_one_line_and_changes_no_file(command, work, capsys):
    line, spoilt = COMMANDS[command]

    @settings(max_examples=40, deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.lists(st.tuples(st.sampled_from(spoilt), st.sampled_from(NASTY)), min_size=1,
                    max_size=2))  # fmt: skip
    def ends(given):
        before, present = contents(work), set(work.rglob("*"))
        call = list(line)
        for option, value in given:
            if option in READ.values():  # in place of the text itself
                text = next(name for name, other in READ.items() if other == option)
                call = [word for word in call if word not in (text, "two and")]
            if option in ("--chat", "--show-thoughts", "--force", "--controls"):
                call = [*call, option]
                continue
            if option in call:  # in place of its value
                place = call.index(option)
                call = call[:place] + call[place + 2 :]
            call = [*call, option, value]
        if command == "inspect" and "--force" in call:
            call = [word.replace("mine.html", "other.html") for word in call]
        code = cli.main(call)
        check(code, capsys.readouterr().err, len(given) if command == "plan" else 1)
        assert contents(work) == before
        assert not list(work.rglob("*.partial"))
        for path in set(work.rglob("*")) - present:  # which the next case could read
            if path.is_file():
                path.unlink()

    ends()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model.config.num_hidden_layers", "1000000"], "num_hidden_layers"),
        (["--model.config.num_attention_heads", "0"], "model"),
        (["--model.config.hidden_size", "0"], "model"),
        (["--model.config.hidden_act", "no_such"], "no_such"),
        (["--thoughts.length", "100000000"], "thoughts"),
        (["--thoughts.num_thoughts", "100000000"], "num_thoughts"),
        (["--data.seq_len", "100000000"], "seq_len"),
        (["--training.micro_batch_size", "100000000"], "batch_size"),
    ],
)  # fmt: skip
def test_a_plan_of_absurd_sizes_ends_at_once(work, capsys, arguments, words):
    start = time.monotonic()
    assert cli.main(["train", "--plan", "--config", "plan.yaml", *arguments]) == 2
    assert time.monotonic() - start < 20
    err = capsys.readouterr().err
    check(2, err)
    assert words in err


# --- Options without effect -----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("call", "idle"),
    [
        ("generate --no-thoughts --num-thoughts 3 --thought-temperature 1 --seed 5 --batch-size 2",
         "--batch-size --num-thoughts --thought-temperature --seed"),
        ("generate --top-p 0.5 --seed 5", "--top-p --seed"),
        ("generate --thought-top-p 0.5 --thought-top-k 5", "--thought-top-p --thought-top-k"),
        ("generate --thought-temperature 1 --thought-top-p 0.5 --thought-top-k 5", ""),
        ("eval --thought-top-p 0.5", "--thought-top-p"),
        ("generate --temperature 1 --top-p 0.5 --seed 5", ""),
        ("generate --thought-temperature 1 --num-thoughts 2 --seed 5", ""),
        ("eval --votes 3 --temperature 1 --max-new-tokens 9 --data-dir . --include-path . "
         "--samples 2 --text-tokens 9 --untrained --force",
         "--votes --temperature --max-new-tokens --samples --untrained --data-dir --include-path "
         "--text-tokens --force"),
        ("eval --separator x", ""),
        ("generate --system x --context 9", "--system --context"),
        ("chat --batch-size 2 --out x.html", "--batch-size --out"),
        ("inspect --seed 5 --force", "--seed --force"),
        ("inspect --gate entropy:1 --temperature 1", "--gate --temperature"),
        ("plan --force --processes 1", "--force"),
    ],
)  # fmt: skip
def test_an_option_without_effect_is_warned_of(work, caplog, call, idle):
    command, *more = call.split()
    assert cli.main([*COMMANDS[command][0], *more]) in (None, 0)
    said = [r.getMessage() for r in caplog.records if "has no effect" in r.getMessage()]
    assert " ".join(line.partition(":")[0] for line in said) == idle


def test_an_option_is_given_once(work, capsys):
    assert cli.main(["generate", "--model", "model", "--prompt", "a", "--model=other"]) == 2
    assert "--model: is given 2 times; give it once" in capsys.readouterr().err


def test_a_prompt_that_leaves_no_room_is_told_apart_from_too_many_new_tokens(work, capsys):
    call = ["generate", "--model", "model", "--prompt"]
    assert cli.main([*call, "two and", "--max-new-tokens", "200"]) == 2
    assert "--max-new-tokens (200): must be at most 118, since" in capsys.readouterr().err
    assert cli.main([*call, "two and " * 40]) == 2
    assert "the prompt (320 tokens): must have fewer than 125" in capsys.readouterr().err


# --- Files that are read --------------------------------------------------------------------------
LINES = {
    "deep": ('{"text": ' + "[" * 100_000, "nested too deeply"),
    "huge number": ('{"text": "a", "n": ' + "9" * 5000 + "}", "4300"),
    "no UTF-8": (b'{"text": "\xff"}', "no UTF-8"),
    "NULs": (b"\x00" * 40, "no valid JSON"),
    "NaN": ('{"text": "a", "n": NaN}', "NaN is no number"),
    "a field twice": ('{"text": "a", "text": "b"}', "the name 'text' stands twice"),
    "a list": ("[1]", "must be an object"),
}


@pytest.mark.parametrize("case", LINES)
def test_a_line_that_is_no_record_is_named_and_nothing_is_changed(work, tmp_path, capsys, case):
    line, words = LINES[case]
    line = line if isinstance(line, bytes) else line.encode()
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "some words of a text"}\n' + line + b"\n")
    assert cli.main(["eval", "--model", "model", "--tasks", str(path)]) == 2
    err = capsys.readouterr().err
    check(2, err)
    assert f"{path}, line 2: cannot be read" in err
    assert words in err
    items = tmp_path / "items.jsonl"
    content = json.dumps({"settings": {}}).encode() + b"\n" + line + b"\nhalf a li"
    items.write_bytes(content)
    call = ["eval", "--model", "model", "--tasks", "own.jsonl", "--out-items", str(items)]
    assert cli.main(call) == 2
    err = capsys.readouterr().err
    check(2, err)
    assert f"--out-items ({items}), line 2: cannot be read" in err
    assert items.read_bytes() == content


@pytest.mark.parametrize(
    "content", [b"one line without an end", b"1,2\n3,4\n5,6", b"\n", b"\x00\n"]
)
def test_a_file_of_the_user_is_never_cut(work, tmp_path, capsys, content):
    path = tmp_path / "data.csv"
    path.write_bytes(content)
    call = ["eval", "--model", "model", "--tasks", "own.jsonl", "--out-items", str(path)]
    assert cli.main(call) == 2
    check(2, capsys.readouterr().err)
    assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["data.csv"]  # and no lock
    call[-1] = "own.jsonl"
    assert cli.main([*call, "--force"]) == 2
    assert "is also the file of own.jsonl, which is read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "option"),
    [("generate", "--prompts"), ("generate", "--inspect-file"), ("eval", "--tasks")],
)
def test_only_text_files_of_a_sensible_size_are_read(work, tmp_path, capsys, command, option):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "binary.txt").write_bytes(b"GIF89a\x00\x00")
    with (tmp_path / "huge.txt").open("wb") as file:
        file.truncate(17 * 2**20)
    (tmp_path / "folder.txt").mkdir()
    reasons = {"pipe": "no regular file", "binary": "is NUL", "huge": "more than 16 MiB",
               "folder": "it is a folder", "gone": "No such file"}  # fmt: skip
    for name, words in reasons.items():
        path = tmp_path / f"{name}.txt"
        assert cli.main([command, "--model", "model", option, str(path)]) == 2
        err = capsys.readouterr().err
        check(2, err)
        assert f"{option} ({path}): cannot be read" in err
        assert words in err


@pytest.mark.parametrize("what", ["no/such", "pipe", "own.jsonl", ""])
@pytest.mark.parametrize("option", ["--data-dir", "--include-path"])
def test_a_folder_must_be_there(work, capsys, option, what):
    call = ["eval", "--model", "model", "--tasks", "own.jsonl", option, what]
    assert cli.main(call) == 2
    assert capsys.readouterr().err.startswith(f"quietstar: error: {option} ({what}): ")


@pytest.mark.parametrize(
    "choices",
    [[1, 2], [{"label": "A", "text": "x"}] * 2, {"label": 5, "text": []}, {"label": ["A"]}, "AB"],
)
def test_choices_of_any_form_are_told_of(work, tmp_path, capsys, choices):
    record = {"question": {"stem": "Who?", "choices": choices}, "answerKey": "A"}
    (tmp_path / "commonsenseqa_validation.jsonl").write_text(json.dumps(record) + "\n")
    call = ["eval", "--model", "model", "--tasks", "commonsense_qa", "--data-dir", str(tmp_path)]
    assert cli.main(call) == 2
    err = capsys.readouterr().err
    check(2, err)
    assert "line 1" in err


# --- An evaluation's files ------------------------------------------------------------------------
def evaluation(work, tmp_path, *more, out="o.json"):
    files = ["--out", str(tmp_path / out), "--report", str(tmp_path / "o.html")]
    return cli.main(["eval", "--model", "model", "--tasks", "own.jsonl", *files, *more])


def test_the_same_evaluation_goes_on_and_another_is_refused(work, tmp_path, capsys):
    assert evaluation(work, tmp_path) == 0
    figures, page = (tmp_path / "o.json").read_bytes(), (tmp_path / "o.html").read_bytes()
    assert evaluation(work, tmp_path) == 0
    assert (tmp_path / "o.json").read_bytes() == figures
    assert evaluation(work, tmp_path, "--controls", "--thoughts", "both", "--batch-size", "3") == 0
    kept = {path: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    assert evaluation(work, tmp_path, "--seed", "1", out="p.json") == 2
    assert "--report" in capsys.readouterr().err
    assert evaluation(work, tmp_path, "--seed", "1") == 2
    assert "another seed (0, now 1)" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in kept} == kept
    assert evaluation(work, tmp_path, "--seed", "1", "--force") == 0
    assert json.loads((tmp_path / "o.json").read_text())["config"]["seed"] == 1
    assert page != (tmp_path / "o.html").read_bytes()


def test_a_second_process_is_told_who_writes_the_items(tmp_path):
    path = tmp_path / "items.jsonl"
    with open_store(path, {}, False):
        code = (
            "import sys; from pathlib import Path; from quietstar.cli.main import run_command;"
            "from quietstar.evaluation.runner import open_store;"
            f"sys.exit(run_command(lambda _: open_store(Path({str(path)!r}), {{}}, False)"
            ".__enter__() and 0, []))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert f"is in use by process {os.getpid()} on" in done.stderr


def test_who_has_just_taken_a_lock_is_named_once_the_name_is_written(tmp_path):
    path, (read, write) = tmp_path / "quietstar.lock", os.pipe()
    if (pid := os.fork()) == 0:  # a lock is taken, and only then signed
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.write(write, b"x")
        time.sleep(0.3)
        os.write(descriptor, b'{"pid": 4242, "host": "elsewhere", "since": 0}')
        time.sleep(60)
        os._exit(0)
    try:
        os.read(read, 1)
        with pytest.raises(UserError, match="is in use by process 4242 on elsewhere"):
            locks.locked(path, "runs/x", "Wait for its end.").__enter__()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(read)
        os.close(write)


def test_a_lock_that_is_given_back_names_nobody(tmp_path):
    path = tmp_path / "quietstar.lock"
    with locks.locked(path, "runs/x", "Wait for its end."):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert path.read_text() == ""


def test_what_is_no_lock_is_named(tmp_path):
    (tmp_path / "a.lock").write_text("mine")
    os.mkfifo(tmp_path / "b.lock")
    reasons = {"a": r"a\.lock is no lock of quietstar\. Move it away\.$",
               "b": r"cannot be locked \(.*b\.lock: it is no regular file\)"}  # fmt: skip
    for name, words in reasons.items():
        with pytest.raises(UserError, match=words), open_store(tmp_path / name, {}, False):
            pass
    assert (tmp_path / "a.lock").read_text() == "mine"


def finished(number):
    return {"task": "t", "item": number, "variant": "v", "metrics": {"nll": [1.0]}}


def test_a_full_disk_keeps_the_finished_items_and_the_same_command_goes_on(tmp_path, monkeypatch):
    path = tmp_path / "items.jsonl"
    store = ItemStore(path, {})
    assert not path.exists()
    store.add([finished(0)])
    whole = path.read_bytes()

    def fail(path, text):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(runner, "append", fail)
        with pytest.raises(ValueError, match=r"No space left.* The 1 finished scores are kept"):
            store.add([finished(1)])
    assert path.read_bytes() == whole
    again = ItemStore(path, {})
    again.add([finished(1)])
    assert len(ItemStore(path, {}).records) == 2
    path.write_bytes(path.read_bytes() + b'{"task": "t", "it')
    assert len(ItemStore(path, {}).records) == 2
    assert path.read_bytes().endswith(b"}\n")


@pytest.mark.parametrize(
    "change",
    [{"item": -1}, {"item": 1.5}, {"metrics": {}}, {"metrics": {"nll": ["x"]}},
     {"metrics": {"nll": [1.0, 2.0]}}, {"metrics": {"acc": [1.0]}}, {"metrics": {"nll": [1e999]}},
     {"metrics": {"nll": [1e308]}}, {"metrics": {"nll": [-9.0]}}, {"nll": [1e308]}, {"nll": [-9.0]},
     {"item": 0},
     {"nll": [1.0], "tokens": ["a", "b"]}, {"thoughts": [[[1, 2], [3]]]}, {"thoughts": [[[-2]]]}],
)  # fmt: skip
def test_a_changed_record_is_told_of(tmp_path, change):
    path = tmp_path / "items.jsonl"
    records = [{"settings": {}}, finished(0), {**finished(1), **change}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(ValueError, match=r"line 3: cannot be read .* or --force to begin anew"):
        ItemStore(path, {})


# --- Figures that are not finite ------------------------------------------------------------------
@pytest.fixture(scope="module")
def overflowing(folder):
    """A model whose weights are finite, and whose logits are not."""
    path = folder / "overflowing"
    base = plain_model(max_position_embeddings=128, eos_token_id=256, tie_word_embeddings=False)
    thinking_model(base, thoughts={"length": 2}).save_pretrained(path, load_tokenizer("bytes"))
    for name in path.rglob("*.safetensors"):
        tensors = load_file(name)
        for key in tensors:
            if "lm_head" in key:
                tensors[key] = torch.full_like(tensors[key], 3e38)
        save_file(tensors, name, metadata={"format": "pt"})
    return path


@pytest.mark.parametrize(
    "call",
    [["eval", "--tasks", "own.jsonl", "--out", "nan.json"],
     ["generate", "--prompt", "two and", "--max-new-tokens", "4"],
     ["generate", "--prompt", "two", "--temperature", "1", "--max-new-tokens", "4"],
     ["generate", "--inspect", "two and", "--out", "nan.html"]],
    ids=" ".join,
)  # fmt: skip
def test_figures_that_are_not_finite_are_an_error(work, overflowing, capsys, call):
    assert cli.main([call[0], "--model", str(overflowing), *call[1:]]) == 2
    err = capsys.readouterr().err
    check(2, err)
    assert "is no finite number" in err
    if call[0] == "eval":
        assert "own.jsonl, item 0" in err
        assert "without_thoughts" in err
    assert not [
        name for name in os.listdir(work) if name.startswith("nan.") and not name.endswith(".lock")
    ]


# --- Chat templates -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
         "takes more than"),
        ("{{ 9 ** (9 ** 9) }}", "takes more than"),
        ("{{ 'x' * 20000000 }}", "characters"),
        ("{{ 'x' | center(5000000000) }}", "memory"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ messages[7].content }}", "fails"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails"),
    ],
)  # fmt: skip
def test_a_template_that_fails_or_never_ends_is_one_line(
    work, tmp_path, capsys, monkeypatch, template, words
):
    monkeypatch.setattr("quietstar.system.limits.SECONDS", 3.0)
    call = ["generate", "--chat", "--model", str(with_template(tmp_path / "model", template))]
    assert cli.main(call) == 2
    err = capsys.readouterr().err
    check(2, err)
    assert words in err
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


def test_a_tokenizer_that_panics_over_a_text_is_one_line(work, tmp_path, capsys):
    model = with_template(tmp_path / "model", "")
    for path in model.rglob("tokenizer.json"):
        content = json.loads(path.read_text())
        pattern = {"Regex": "(x+x+)+y"}  # which backtracks until the library gives up
        content["pre_tokenizer"] = {
            "type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False
        }  # fmt: skip
        path.write_text(json.dumps(content))
    assert cli.main(["generate", "--model", str(model), "--prompt", "x" * 40]) == 2
    err = capsys.readouterr().err
    check(2, err)
    assert "a tokenizer fails over a text (Onig: Regex search error" in err


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
         "{% endif %}[{{ messages[0].content }}]", "System role not supported"),
        ("{% for m in messages if m.role != 'system' %}[{{ m.content }}]{% endfor %}", "leaves"),
    ],
)  # fmt: skip
def test_a_template_without_system_turns_refuses_the_option(
    work, tmp_path, capsys, template, words
):
    call = ["generate", "--chat", "--model", str(with_template(tmp_path / "model", template))]
    assert cli.main(call) == 0
    capsys.readouterr()
    assert cli.main([*call, "--system", "be kind"]) == 2
    err = capsys.readouterr().err
    check(2, err)
    assert "--system: the chat template of this model takes no system turns" in err
    assert words in err


def with_template(path, template):
    tokenizer = load_tokenizer("bytes")
    tokenizer.chat_template = template
    thinking_model(plain_model(eos_token_id=256)).save_pretrained(path, tokenizer)
    return path


# --- Files that are written -----------------------------------------------------------------------
def test_force_replaces_nothing_that_is_read(work, tmp_path, capsys):
    base, lora = str(tmp_path / "base"), str(tmp_path / "lora")
    plain_model().save_pretrained(base)
    thinking_model(base, tuning={"method": "lora"}).save_pretrained(lora, load_tokenizer("bytes"))
    shutil.copytree("model", tmp_path / "run" / "final")
    shutil.copy("texts.jsonl", tmp_path / "mine.jsonl")
    shutil.copytree("model", tmp_path / "cache")
    (tmp_path / "run" / "final" / "config.json").unlink()
    (tmp_path / "run" / "final" / "config.json").symlink_to(tmp_path / "cache" / "config.json")
    data = str(tmp_path / "mine.jsonl")
    evaluate, model = ["eval", "--tasks", "own.jsonl", "--model"], str(tmp_path / "run" / "final")
    inspect = ["generate", "--inspect", "two and", "--model"]
    plan = ["train", "--plan", "--config", "plan.yaml"]
    calls = [
        [*evaluate, model, "--out", f"{model}/quietstar.json"],
        [*evaluate, model, "--out-items", f"{model}/language_model/model.safetensors"],
        [*evaluate, model, "--report", f"{model}/tokenizer.json"],
        [*evaluate, model, "--out", str(tmp_path / "cache" / "config.json")],
        [*inspect, model, "--out", f"{model}/quietstar.json"],
        [*inspect, lora, "--out", f"{base}/config.json"],
        [*inspect, "model", "--compare", model, "--out", f"{model}/quietstar.json"],
        [*plan, "--model.tokenizer", model, "--json", f"{model}/tokenizer.json"],
        [*plan, "--data.train", data, "--json", data],
    ]  # fmt: skip
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for call in calls:
        assert cli.main([*call, "--force"]) == 2, call
        err = capsys.readouterr().err
        check(2, err)
        assert "which is read" in err, call
    assert {path: path.read_bytes() for path in before} == before


# --- What is printed ------------------------------------------------------------------------------
def test_no_name_of_a_file_is_markup_or_moves_the_cursor(work, tmp_path, capsys):
    name = tmp_path / "[b] [x] \x1b]0;pwned\x07 [red]b\nquietstar: error: forged.jsonl"
    name.write_text('{"prompt": "one", "answer": " two"}\n')
    out = tmp_path / "runs[draft] [" / "b]" / "o\x1b[2J.json"
    assert cli.main(["eval", "--model", "model", "--tasks", str(name), "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert out.exists()
    assert not set(said.out + said.err) & set("\x1b\x07")
    assert "runs[draft] [/b]/o" in said.out
    assert "[b] [x]" in " ".join(said.out.split())  # a long path is wrapped
    assert not [line for line in said.out.splitlines() if line.startswith("quietstar: error")]


# --- Signals --------------------------------------------------------------------------------------
CALLS = {
    "eval": ["eval", "--tasks", "demo.jsonl", "--out", "stopped.json", "--batch-size", "1"],
    "generate": ["generate", "--prompts", "prompts.txt", "--batch-size", "1",
                 "--max-new-tokens", "110"],
    "inspect": ["generate", "--inspect", "two and " * 2000, "--out", "stopped.html"],
    "chat": ["generate", "--chat"],
    "plan": ["train", "--plan", "--training.learn_chunk_tokens", "20",
             "--training.micro_batch_size", "8"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "name", "code"),
    [*((command, "SIGTERM", 75) for command in CALLS), ("eval", "SIGINT", 130),
     ("chat", "SIGINT", 130), ("generate", "SIGUSR1", 75)],
)  # fmt: skip
def test_a_signal_ends_a_command_soon_and_leaves_nothing_half_written(folder, command, name, code):
    if command == "eval":
        rows = [{"text": "words of a text " * 5 + str(n)} for n in range(3000)]
        (folder / "demo.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = ["--config", "plan.yaml"] if command == "plan" else ["--model", "model"]
    start = (
        "import sys, time; from quietstar.cli import main\n"
        "from quietstar.evaluation import scoring\n"
        "load = scoring.load_onto_device\n"
        "def told(*arguments, **keywords):\n"
        "    model = load(*arguments, **keywords)\n"
        "    print('loaded', flush=True)\n"
        "    return model\n"
        "scoring.load_onto_device = told\n"
        "if '--plan' in sys.argv: print('loaded', flush=True)\n"
        "sys.exit(main.main(sys.argv[1:]))"
    )
    before = set(os.listdir(folder))
    call = [sys.executable, "-c", start, *CALLS[command], *model]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(call, cwd=folder, text=True, env=environment, **pipes) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert "loaded" in process.stdout.readline()
        time.sleep(1.0)
        asked = time.monotonic()
        process.send_signal(getattr(signal, name))
        err = process.stderr.read()
        assert process.wait(30) == code, err
        assert time.monotonic() - asked < 20  # 5 are promised; other tests may run beside this one
    assert "Traceback" not in err
    made = set(os.listdir(folder)) - before
    assert not [n for n in made if n.endswith((".partial", ".html")) or n == "stopped.json"]
    items = folder / "stopped.items.jsonl"
    if items.exists():
        for line in items.read_text().split("\n")[:-1]:
            json.loads(line)
        assert items.read_text().endswith("\n")


# --- lm-evaluation-harness ------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "--limit", "x"], "--limit/-L: invalid float value"),
        (["run", "--no-such", "1"], "unrecognized arguments"),
        (["run", "--model", "quietstar", "--tasks", "no_such_task"], "no_such_task"),
        (["run", "--model", "quietstar", "--tasks", "arc_easy", "--model_args", "thoughts=maybe"],
         "fails (TypeError: "),
        (["validate", "--tasks", "no_such_task"], "the harness ends"),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_errors_of_the_harness_are_one_line(work, monkeypatch, capsys, arguments, words):
    pytest.importorskip("lm_eval")
    monkeypatch.setattr("sys.argv", ["quietstar"])
    assert cli.main(["eval", "lm-eval", *arguments]) == 2
    said = capsys.readouterr().err.splitlines()  # with lines of the harness's own log
    (problem,) = [line for line in said if line.startswith("quietstar: error: ")]
    assert words in problem
