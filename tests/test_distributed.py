"""Many processes: the trajectory of one, whatever the strategy, and resuming bit for bit.

Launched as users do, two ranks on CPUs. DeepSpeed's tests run where it is installed.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from launching import ROOT, launch, marked
from safetensors.torch import load_file
from tiny import plain_model, read_metrics, run_config

from quietstar.config.loading import save_config
from quietstar.data import load_tokenizer

STRATEGIES = ["ddp", "fsdp2", "zero1", "zero2", "zero3"]


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "accelerate").glob("*.yaml")), ids=str)
def test_files_of_launchers_are_what_accelerate_reads(path):
    text = yaml.safe_load(path.read_text(encoding="utf-8"))
    config = ClusterConfig.from_yaml_file(str(path))
    assert config.num_processes == (1 if path.stem == "single" else 2 if "cpu" in path.stem else 8)
    if "deepspeed_config" in text:
        assert config.distributed_type == "DEEPSPEED"
        file = ROOT / text["deepspeed_config"]["deepspeed_config_file"]
        stage = json.loads(file.read_text(encoding="utf-8"))["zero_optimization"]["stage"]
        assert path.stem.startswith(f"zero{stage}")
        assert text.get("use_cpu", False) == path.stem.endswith("_cpu")


@pytest.fixture(scope="module", params=["full", "lora"])
def one(request, tmp_path_factory):
    """Name of the tuning, config file, and run folder of one process that accumulates."""
    folder = tmp_path_factory.mktemp(request.param)
    more = {}
    if request.param == "lora":
        plain_model().save_pretrained(folder / "base")
        load_tokenizer("bytes").save_pretrained(folder / "base")
        model = {"model__name_or_path": str(folder / "base"), "model__config": None}
        more = {**model, "model__tokenizer": None, "tuning__method": "lora"}
    config = run_config(
        folder, training__max_steps=10, training__micro_batch_size=2, training__save_steps=5,
        training__eval_steps=5, data__eval_sequences=6, loss__policy_weight=1.0,
        optim__learning_rate=1e-3, **more,
    )  # fmt: skip
    save_config(config, folder / "config.yaml")
    return (
        request.param,
        folder / "config.yaml",
        launch("one", folder / "config.yaml", folder / "one"),
    )


def assert_same_trajectory(folder, whole):
    for kind, keys in (("train", ("loss", "grad_norm_total")), ("eval", ("base_nll", "mixed_nll"))):
        ours, theirs = read_metrics(folder, kind), read_metrics(whole, kind)
        assert len(ours) == len(theirs)
        for record, wanted in zip(ours, theirs, strict=True):
            for key in set(keys) & set(wanted):
                assert record[key] == pytest.approx(wanted[key], rel=1e-5), (record["step"], key)
    for name, weight in load_file(whole / "final" / "quietstar.safetensors").items():
        other = load_file(folder / "final" / "quietstar.safetensors")[name]
        torch.testing.assert_close(other, weight, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [marked(strategy) for strategy in STRATEGIES])
def test_two_ranks_give_the_trajectory_of_one(strategy, one, tmp_path):
    _, config, whole = one
    assert_same_trajectory(launch(strategy, config, tmp_path / "run"), whole)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [marked(strategy) for strategy in ("fsdp2", "zero2", "zero3")])
def test_a_sharded_run_resumes_bit_for_bit(strategy, one, tmp_path):
    tuning, config, _ = one
    if tuning != "full":
        pytest.skip("once is enough")
    whole = launch(strategy, config, tmp_path / "whole")
    part = tmp_path / "part"
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoints" / "step-000010")
    launch(strategy, config, part, "--resume", "auto")
    a, b = (load_file(folder / "final" / "model.safetensors") for folder in (whole, part))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [marked(strategy) for strategy in ("ddp", "fsdp2", "zero2")])
def test_another_number_of_processes_goes_on_where_the_strategy_can(strategy, one, tmp_path):
    tuning, config, whole = one
    if tuning != "full":
        pytest.skip("once is enough")
    part = tmp_path / "part"
    if strategy == "ddp":  # from one process to two
        shutil.copytree(whole, part)
        shutil.rmtree(part / "checkpoints" / "step-000010")
        assert_same_trajectory(launch("ddp", config, part, "--resume", "auto"), whole)
        launch(
            "fsdp2",
            config,
            part,
            "--resume",
            "auto",
            refused="was written under one process or DDP",
        )
        return
    launch(strategy, config, part)
    shutil.rmtree(part / "checkpoints" / "step-000010")
    if strategy == "fsdp2":
        launch("fsdp2x1", config, part, "--resume", "auto")
        assert_same_trajectory(part, whole)
    else:
        launch("zero2x1", config, part, "--resume", "auto", refused="Launch 2, or train under")


STAGES = """
stages:
  reads:
    loss: {objective: next_token}
    training: {max_steps: 3}
  thinks:
    thoughts: {length: 3}
    training: {max_steps: 4}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy", [marked(strategy) for strategy in ("ddp", "fsdp2", "zero2", "zero3")]
)
def test_stages_on_two_ranks_give_those_of_one(strategy, tmp_path):
    """The two vectors are read from sharded embeddings and written into sharded vectors."""
    config = run_config(tmp_path, training__micro_batch_size=2, training__save_steps=2,
                        loss__policy_weight=1.0, data__eval_sequences=6)  # fmt: skip
    file = tmp_path / "config.yaml"
    save_config(config, file)
    written = file.read_text()
    assert "\nstages: {}\n" in written
    file.write_text(written.replace("\nstages: {}\n", STAGES))
    whole = launch("one", file, tmp_path / "one")
    assert_same_trajectory(launch(strategy, file, tmp_path / "two"), whole)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [marked(strategy) for strategy in ("fsdp2", "zero2")])
def test_the_script_for_cpus_starts_two_processes(strategy, tmp_path):
    call = ["bash", "launch/cpu.sh", strategy, "configs/tiny.yaml", "--training.max_steps", "2"]
    call += ["--training.save_steps", "2", "--training.output_dir", str(tmp_path / "run")]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000002"
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    assert state["num_processes"] == 2


def test_the_script_for_cpus_names_what_it_knows():
    call = ["bash", "launch/cpu.sh", "zero9", "configs/tiny.yaml"]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "there is no configs/accelerate/zero9_cpu.yaml; known: ddp fsdp2" in done.stderr
