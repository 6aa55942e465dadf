"""DDP, ZeRO and FSDP2 over NCCL, on as many GPUs as there are."""

import os
import subprocess
import sys

import pytest
import torch
from launching import ROOT, marked
from tiny import read_metrics, run_config

from quietstar.config.loading import save_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ONE_BILLION = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}


def launch_on_gpus(strategy, config, folder):
    """Run the config on all GPUs (``single``: one); returns its training metrics."""
    save_config(config, folder / "config.yaml")
    processes = 1 if strategy == "single" else torch.cuda.device_count()
    module = "accelerate.commands.accelerate_cli"
    file = ["--config_file", f"configs/accelerate/{strategy}.yaml"]
    call = [sys.executable, "-m", module, "launch", *file, "--num_processes", str(processes)]
    call += ["train.py", "--config", str(folder / "config.yaml")]
    call += ["--training.output_dir", str(folder / strategy)]
    done = subprocess.run(call, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return read_metrics(folder / strategy, "train")


@pytest.mark.parametrize("strategy", [marked(e) for e in ("ddp", "fsdp2", "zero2", "zero3")])
def test_strategies_give_the_losses_of_one_gpu(strategy, tmp_path):
    micro = 8 // torch.cuda.device_count()
    config = run_config(tmp_path, training__micro_batch_size=micro, loss__policy_weight=1.0)
    whole = launch_on_gpus("single", config, tmp_path)
    ours = launch_on_gpus(strategy, config, tmp_path)
    for record, wanted in zip(ours, whole, strict=True):
        for key in ("loss", "grad_norm_total"):
            assert record[key] == pytest.approx(wanted[key], rel=1e-4), (record["step"], key)


@pytest.mark.parametrize("strategy", [marked(e) for e in ("fsdp2", "zero3")])
def test_a_billion_parameters_train_in_bfloat16(strategy, tmp_path):
    size = torch.cuda.device_count()
    config = run_config(
        tmp_path, model__config=ONE_BILLION, training__mixed_precision="bf16",
        optim__learning_rate=1e-4,
        training__global_batch_size=size, training__micro_batch_size=1, data__seq_len=64,
    )  # fmt: skip
    losses = [record["loss"] for record in launch_on_gpus(strategy, config, tmp_path)]
    assert all(loss < 20 for loss in losses), losses
    assert losses[-1] < losses[0]
