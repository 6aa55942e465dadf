"""The device that is asked for, or one line that says that it is not there."""

import pytest
import torch

from benchmarks import step
from quietstar.backbone.devices import find_device
from quietstar.cli import main as cli
from quietstar.errors import UserError


def test_by_default_a_gpu_or_the_cpu():
    assert find_device() == ("cuda" if torch.cuda.is_available() else "cpu")
    assert find_device("cpu") == "cpu"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cuda:77", r"[^\n]+"),
        ("meta", "torch cannot compute there"),
        ("hip", "torch cannot compute there"),
        ("gpu", "torch knows no device of this name"),
        ("", "torch knows no device of this name"),
    ],
)
def test_a_device_that_cannot_be_used(name, reason):
    with pytest.raises(UserError, match=rf"^device '{name}' cannot be used \({reason}\); try cpu$"):
        find_device(name)


@pytest.mark.parametrize("command", ["eval", "generate", "teach"])
def test_every_command_refuses_it_before_a_model_is_loaded(command, capsys):
    assert cli.main([command, "--device", "cuda:77"]) == 2
    assert "--device (cuda:77): device 'cuda:77' cannot be used" in capsys.readouterr().err


def test_a_benchmark_refuses_it_too(capsys):
    assert cli.run_command(step.main, ["--device", "cuda:77"]) == 2
    assert "--device (cuda:77): device 'cuda:77' cannot be used" in capsys.readouterr().err
