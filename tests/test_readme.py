"""README's promises: its main command runs, its files exist, its list is the tested one."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from architectures import SUPPORTED
from tiny import plain_model

from quietstar.config.loading import load_config
from quietstar.data import load_tokenizer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_first_two_commands_install_and_run_or_test():
    run, test = (block.strip() for block in code_blocks("bash")[:2])
    assert run == "pip install -e . && accelerate launch train.py"
    assert test == 'pip install -e ".[dev]" && pytest -n 2 --dist loadfile'


@pytest.mark.slow
def test_the_main_command_trains_and_saves_a_model(tmp_path):
    accelerate = Path(sys.executable).with_name("accelerate")
    output = tmp_path / "run"
    command = [accelerate, "launch", ROOT / "train.py", "--training.output_dir", output]
    # The main job itself, with few steps; what it reaches is in README's table.
    command += [
        "--training.max_steps",
        "2",
        "--data.task_options.size",
        "300",
        "--data.eval_sequences",
        "16",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (output / "final" / "quietstar.safetensors").exists()
    assert (output / "report.html").exists()
    assert "gain of" in done.stdout


@pytest.mark.slow
def test_a_mistake_under_accelerate_launch_is_one_line_before_what_the_launcher_says(tmp_path):
    accelerate = Path(sys.executable).with_name("accelerate")
    mistake = [ROOT / "train.py", "--thoughts.lenght", "8"]
    for quiet in ([], ["--quiet"]):
        command = [accelerate, "launch", *quiet, *mistake]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode == 1
        ours, _, launcher = done.stderr.partition("did you mean --thoughts.length?\n")
        assert ours.splitlines()[-1].startswith("quietstar: error: command line: --thoughts.lenght")
        assert "Traceback" not in ours
        assert ("Traceback" in launcher) == (
            not quiet
        )  # accelerate's own, unless it is told not to


def test_every_link_and_config_that_readme_names_exists():
    names = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    names += re.findall(r"configs/[\w/]+\.yaml", README)
    assert names
    for name in names:
        assert (ROOT / name).exists(), name


def test_the_number_of_architectures_is_that_of_the_tested_ones():
    assert f"tested on [{len(SUPPORTED)} architectures](tests/architectures.py)" in README


def test_it_is_a_page():
    assert len(README.split()) <= 1000


def test_the_python_example_compiles():
    for block in code_blocks("python"):
        compile(block, "README.md", "exec")


def test_the_trainer_of_the_example_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain_model(max_position_embeddings=128, eos_token_id=256).save_pretrained("model")
    load_tokenizer("bytes").save_pretrained("model")
    (code,) = (block for block in code_blocks("python") if "QuietStarTrainer(" in block)
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    code = code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", "model")
    small = "max_steps=1, per_device_train_batch_size=2, seq_len=32, mixed_precision='no'"
    code = code.replace("length=48", f"length=3, {small}")
    records = [{"question": f"{n} and 1 is", "answer": str(n + 1)} for n in range(9)]
    exec(compile(code, "README.md", "exec"), {"dataset": records, "__name__": "example"})
    assert (tmp_path / "runs").exists()


def test_the_generate_command_fits_the_demo_as_typed():
    (command,) = re.findall(r"quietstar generate --model runs/demo .*", README)
    arguments = shlex.split(command)
    prompt = arguments[arguments.index("--prompt") + 1]
    new = int(arguments[arguments.index("--max-new-tokens") + 1])
    think = load_config(ROOT / "configs/demo.yaml").stage_configs()["think"]
    assert think.model.config is not None
    positions = think.model.config["max_position_embeddings"]
    assert len(prompt.split()) + new + think.thoughts.length + 1 <= positions
