"""Code that comes with a model runs because the user says so, never because a folder does."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml
from tiny import plain_model, run_config, write_texts

from quietstar.cli.main import main as quietstar
from quietstar.config.loading import save_config
from quietstar.data import byte_tokenizer

MODEL = """
import os, pathlib
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
if "CANARY" in os.environ:
    pathlib.Path(os.environ["CANARY"]).touch()
class MineConfig(LlamaConfig):
    model_type = "mine"
class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
class MineTokenizer(PreTrainedTokenizerFast): ...
"""
GENERATE = ["generate", "--prompt", "2 + 3", "--max-new-tokens", "2"]


def edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def in_a_process(*arguments):
    call = [sys.executable, "-m", "quietstar", *map(str, arguments)]
    return subprocess.run(call, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def strangers(tmp_path_factory):
    """Folders of a finished run whose model needs code of its own, and which was trained so."""
    home = tmp_path_factory.mktemp("theirs")
    os.environ["HF_MODULES_CACHE"] = str(home / "modules")
    base = home / "base"
    plain_model().save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    (base / "mine.py").write_text(MODEL)
    code = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"}
    edit(base / "config.json", model_type="mine", architectures=["MineForCausalLM"], auto_map=code)
    edit(base / "tokenizer_config.json", tokenizer_class="MineTokenizer",
         auto_map={"AutoTokenizer": [None, "mine.MineTokenizer"]})  # fmt: skip
    config = run_config(
        home, model__config=None, model__tokenizer=None, model__name_or_path=str(base),
        training__max_steps=1, training__save_steps=1,
    )  # fmt: skip
    save_config(config, home / "own.yaml")
    train = ["train", "--config", home / "own.yaml"]
    refused = in_a_process(*train)
    assert refused.returncode == 2
    assert "If you trust it: --trust-remote-code" in refused.stderr
    trained = in_a_process(*train, "--model.trust_remote_code", "true")
    assert trained.returncode == 0, trained.stderr
    checkpoint = home / "run" / "checkpoints" / "step-000001"
    exported = in_a_process(*GENERATE, "--model", checkpoint, "--trust-remote-code")
    assert exported.returncode == 0, exported.stderr
    for name, lacking in {
        "final": (),
        "models": ["final"],
        "checkpoints": ["final", "models"],
    }.items():
        shutil.copytree(home / "run", home / name)
        for part in lacking:
            shutil.rmtree(home / name / part)
    assert yaml.safe_load((home / "final" / "config.yaml").read_text())["model"][
        "trust_remote_code"
    ]
    return home


@pytest.mark.parametrize("shape", ["final", "models", "checkpoints"])
def test_no_command_runs_code_of_a_strangers_run(strangers, shape, tmp_path, monkeypatch, capsys):
    canary = tmp_path / "canary"
    monkeypatch.setenv("CANARY", str(canary))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "questions.jsonl").write_text('{"question": "1 + 1 =", "answer": "2"}\n')
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1 + 1 ="}\n')
    pair = {"prompt": "1 + 1 =", "chosen": "2", "rejected": "3"}
    (tmp_path / "pairs.jsonl").write_text(f"{json.dumps(pair)}\n" * 4)
    run, base, texts = (
        str(strangers / shape),
        str(strangers / "base"),
        write_texts(tmp_path / "t.jsonl"),
    )
    own = ["--config", str(strangers / "own.yaml"), "--data.train", texts]
    commands = [
        GENERATE,
        ["generate", "--chat"],
        ["eval", "--tasks", "questions.jsonl", "--out", "eval"],
        ["generate", "--inspect", "two and two"],
        ["export", "--out", "merged"],
        ["teach", *own, "--out", "teacher"],
        ["judge", "--pairs", "pairs.jsonl"],
        ["judge", "--prompts", "prompts.jsonl", "--compare", run, run],
        ["reward-model", "--pairs", "pairs.jsonl", "--out", "reward"],
        ["eval", "lm-eval", "run", "--model", "quietstar", "--tasks", "x", "--model_args",
         f"pretrained={run}"],
        ["train", *own, "--model.name_or_path", run],
        ["train", "--plan", *own, "--model.name_or_path", run],
        ["train", "--config", f"{run}/config.yaml", "--training.output_dir", "again"],
        ["train", "--config", f"{run}/config.yaml", "--resume", "auto"],
        ["train", "--plan", "--config", f"{run}/config.yaml"],
        ["report", run],
        ["report", run, run],
    ]  # fmt: skip
    for command in commands:
        takes_model = command[0] not in ("report", "train") and "lm-eval" not in command
        models = [run] if shape != "final" else [run, base]  # which is the same for all
        for model in models if takes_model else [None]:
            line = [*command, "--model", model] if model else command
            code = quietstar(line)
            said = capsys.readouterr()
            assert command == ["report", run] or code not in (0, 70), (line, code, said.err)
            assert "Traceback" not in said.err, line
            assert not canary.exists(), line


@pytest.mark.parametrize("key", ["loss.objective", "loss.reward", "thoughts.sampler"])
def test_no_command_runs_a_part_that_the_config_of_a_run_names(key, tmp_path, monkeypatch, capsys):
    module, canary = f"theirs_{key.replace('.', '_')}", tmp_path / "canary"
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / f"{module}.py").write_text(f"open({str(canary)!r}, 'w')\nclass Part: ...\n")
    config = tmp_path / "run" / "config.yaml"
    config.parent.mkdir()
    save_config(run_config(tmp_path), config)
    (config.parent / "metrics.jsonl").touch()  # as a run has
    fields, (section, name) = yaml.safe_load(config.read_text()), key.split(".")
    fields[section][name] = f"{module}:Part"
    config.write_text(yaml.safe_dump(fields))
    again = ["train", "--config", str(config), "--training.output_dir", "again"]
    for command in (
        again,
        [*again, "--plan"],
        ["teach", "--config", str(config), "--model", "none", "--out", "taught"],
        ["eval", "--config", str(config), "--model", "none", "--tasks", "demo"],
    ):
        assert quietstar(command) == 2, command
        assert not canary.exists(), command
    capsys.readouterr()
    assert quietstar(again) == 2
    said = capsys.readouterr().err
    assert key in said
    assert f"{module}:Part" in said
    assert "names code, which is not run" in said
    quietstar([*again, "--model.trust_remote_code", "true"])
    assert canary.exists()


def test_the_user_may_trust_a_run(strangers, tmp_path):
    for shape in ("final", "models", "checkpoints"):
        done = in_a_process(*GENERATE, "--model", strangers / shape, "--trust-remote-code")
        assert done.returncode == 0, done.stderr
