"""Combinations that cannot work are refused with the reason, before anything is loaded."""

from unittest.mock import create_autospec

import pytest
import torch
from accelerate import Accelerator
from pydantic import ValidationError
from tiny import run_config

from quietstar.distributed import Strategy
from quietstar.distributed.sharded import DeepSpeedStrategy, FSDP2Strategy, wants_fsdp
from quietstar.errors import UserError


def strategy_on(kind, device):
    accelerator = create_autospec(Accelerator, instance=True)
    accelerator.device = torch.device(device)
    return kind(accelerator)


@pytest.mark.parametrize(
    ("kind", "device", "method", "words"),
    [
        (Strategy, "mps", "qlora", "qlora has no 4-bit weights on mps, only on cpu, cuda, xpu"),
        (
            DeepSpeedStrategy,
            "cuda",
            "qlora",
            "4-bit weights, which cannot be sharded under deepspeed",
        ),
        (DeepSpeedStrategy, "cpu", "galore", "projects whole gradients, which are sharded"),
        (FSDP2Strategy, "cpu", "galore", "projects whole gradients, which are sharded"),
        (FSDP2Strategy, "cuda", "qlora", "cannot be sharded under fsdp2"),
    ],
)
def test_ways_to_tune_that_cannot_work_are_refused(kind, device, method, words, tmp_path):
    config = run_config(tmp_path, tuning__method=method, model__name_or_path="x",
                        model__config=None, model__tokenizer=None)  # fmt: skip
    with pytest.raises(UserError, match=words):
        strategy_on(kind, device).check(config)


@pytest.mark.parametrize("name", ["paged_adamw_32bit", "paged_adamw_8bit"])
def test_paged_moments_are_for_one_gpu(name, tmp_path):
    config = run_config(tmp_path, optim__name=name)
    for kind, device, where in (
        (Strategy, "cpu", "on cpu"),
        (Strategy, "mps", "on mps"),
        (DeepSpeedStrategy, "cuda", "under deepspeed"),
        (FSDP2Strategy, "cuda", "under fsdp2"),
    ):
        with pytest.raises(UserError, match=rf"optim\.name: {name} keeps .* cannot work {where}"):
            strategy_on(kind, device).check(config)
    strategy_on(Strategy, "cuda").check(config)
    with pytest.raises(ValidationError, match=r"does not go with tuning\.method: galore"):
        run_config(tmp_path, optim__name=name, tuning__method="galore")


def test_others_are_not(tmp_path):
    config = run_config(tmp_path)
    for kind in (Strategy, DeepSpeedStrategy, FSDP2Strategy):
        strategy_on(kind, "mps").check(config)


def test_fsdp_wants_one_dtype_for_all_that_trains(tmp_path):
    config = run_config(tmp_path, model__dtype="bfloat16")
    with pytest.raises(UserError, match=r"Set model\.dtype: float32"):
        strategy_on(FSDP2Strategy, "cuda").check(config)


def test_fsdp1_is_refused(monkeypatch):
    assert not wants_fsdp()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert wants_fsdp()
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(UserError, match=r"fsdp_version: 1 is not supported; set 2"):
        wants_fsdp()
