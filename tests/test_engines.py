"""Combinations that cannot work are refused with the reason, before anything is loaded."""

from unittest.mock import create_autospec

import pytest
import torch
from accelerate import Accelerator
from tiny import run_config

from quietstar.distributed import Engine
from quietstar.distributed.fsdp import FullyShardEngine, wants_fsdp
from quietstar.distributed.zero import DeepSpeedEngine
from quietstar.errors import UserError


def engine_on(kind, device):
    accelerator = create_autospec(Accelerator, instance=True)
    accelerator.device = torch.device(device)
    return kind(accelerator)


@pytest.mark.parametrize(
    ("kind", "device", "method", "words"),
    [
        (Engine, "mps", "qlora", "qlora has no 4-bit weights on mps, only on cpu, cuda, xpu"),
        (DeepSpeedEngine, "cuda", "qlora", "4-bit weights, which cannot be cut under deepspeed"),
        (DeepSpeedEngine, "cpu", "galore", "projects whole gradients, which lie in pieces"),
        (FullyShardEngine, "cpu", "galore", "projects whole gradients, which lie in pieces"),
        (FullyShardEngine, "cuda", "qlora", "cannot be cut under fsdp2"),
    ],
)
def test_ways_to_tune_that_cannot_work_are_refused(kind, device, method, words, tmp_path):
    config = run_config(tmp_path, tuning__method=method, model__name_or_path="x",
                        model__config=None, model__tokenizer=None)  # fmt: skip
    with pytest.raises(UserError, match=words):
        engine_on(kind, device).check(config)


def test_others_are_not(tmp_path):
    config = run_config(tmp_path)
    for kind in (Engine, DeepSpeedEngine, FullyShardEngine):
        engine_on(kind, "mps").check(config)


def test_fsdp_wants_one_type_for_all_that_trains(tmp_path):
    config = run_config(tmp_path, model__dtype="bfloat16")
    with pytest.raises(UserError, match=r"Set model\.dtype: float32"):
        engine_on(FullyShardEngine, "cuda").check(config)


def test_fsdp1_is_refused(monkeypatch):
    assert not wants_fsdp()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert wants_fsdp()
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(UserError, match=r"fsdp_version: 1 is not supported; set 2"):
        wants_fsdp()
