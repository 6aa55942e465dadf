"""Many processes: the trajectory of one, whatever the engine, and resuming bit for bit.

Launched as users do, two ranks on CPUs. DeepSpeed's tests run where it is installed.
"""

import importlib.util
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
from safetensors.torch import load_file
from tiny import plain_model, read_metrics, run_config

from quietstar.config_io import save_config
from quietstar.data import load_tokenizer

ROOT = Path(__file__).parents[1]
ENGINES = ["ddp", "zero1", "zero2", "zero3"]
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)


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


def launch(engine, config, output_dir, *arguments):
    """Run the config in two processes of an engine; returns the run folder."""
    train = ["train.py", "--config", str(config), "--training.output_dir", str(output_dir)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if engine == "one":
        command = [sys.executable, *train]
    elif engine == "ddp":
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *train]
        environment["ACCELERATE_USE_CPU"] = "true"
    else:
        file = f"configs/accelerate/{engine}_cpu.yaml"
        module = "accelerate.commands.accelerate_cli"
        command = [sys.executable, "-m", module, "launch", "--config_file", file, *train]
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return output_dir


def marked(engine):
    return pytest.param(engine, marks=() if engine == "ddp" else needs_deepspeed)


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
        folder, training__steps=10, training__micro_batch_size=2, training__save_every=5,
        training__eval_every=5, data__eval_sequences=6, loss__policy_weight=1.0,
        optim__lr=1e-3, **more,
    )  # fmt: skip
    save_config(config, folder / "config.yaml")
    return (
        request.param,
        folder / "config.yaml",
        launch("one", folder / "config.yaml", folder / "one"),
    )


@pytest.mark.slow
@pytest.mark.parametrize("engine", [marked(engine) for engine in ENGINES])
def test_two_ranks_give_the_trajectory_of_one(engine, one, tmp_path):
    _, config, whole = one
    folder = launch(engine, config, tmp_path / "run")
    for kind, keys in (("train", ("loss", "grad_norm_total")), ("eval", ("base_nll", "mixed_nll"))):
        ours, theirs = read_metrics(folder, kind), read_metrics(whole, kind)
        assert len(ours) == len(theirs)
        for record, wanted in zip(ours, theirs, strict=True):
            for key in keys:
                assert record[key] == pytest.approx(wanted[key], rel=1e-5), (record["step"], key)
    for name, weight in load_file(whole / "final" / "quietstar.safetensors").items():
        other = load_file(folder / "final" / "quietstar.safetensors")[name]
        torch.testing.assert_close(other, weight, rtol=1e-4, atol=1e-5)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_a_run_in_pieces_resumes_bit_for_bit(engine, one, tmp_path):
    tuning, config, _ = one
    if tuning != "full":
        pytest.skip("once is enough")
    whole = launch(engine, config, tmp_path / "whole")
    part = tmp_path / "part"
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoints" / "step-000010")
    launch(engine, config, part, "--resume", "auto")
    a, b = (load_file(folder / "final" / "model.safetensors") for folder in (whole, part))
    assert all(torch.equal(a[name], b[name]) for name in a)
