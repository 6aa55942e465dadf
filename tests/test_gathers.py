"""A rollout gathers sharded weights once for each layer and pass, and sends nothing else."""

from collections import Counter
from unittest.mock import create_autospec

import pytest
import torch
from accelerate import Accelerator
from tiny import plain_model, random_texts, thinking_model
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from quietstar.distributed import ModelProxy, WrappedModule
from quietstar.distributed.sharded import FSDP2Strategy

LAYERS, LENGTH = 3, 4


@pytest.fixture(params=["no", "bf16"])
def sharded(request):
    """A model sharded over two processes, the other of which is only pretended."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    model = thinking_model(plain_model(num_hidden_layers=LAYERS), thoughts={"length": LENGTH})
    accelerator = create_autospec(Accelerator, instance=True)
    accelerator.device, accelerator.num_processes = torch.device("cpu"), 2
    accelerator.mixed_precision = request.param
    yield FSDP2Strategy(accelerator).shard(WrappedModule(model))
    torch.distributed.destroy_process_group()


class Sent(TorchDispatchMode):
    """Counts the operators that exchange something between processes, and the bytes of each."""

    def __init__(self):
        super().__init__()
        self.counts, self.sizes = Counter(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            self.counts[func.name()] += 1
            self.sizes.append(args[0].nbytes)
        return func(*args, **(kwargs or {}))


def test_a_rollout_gathers_each_layer_once_a_pass(sharded, request):
    half = "bf16" in request.node.callspec.id
    with Sent() as sent, torch.autocast("cpu", torch.bfloat16, enabled=half):
        ModelProxy(sharded).draw(random_texts(2, 9), num_thoughts=2)
    # The text, the start token and every thought token but the last; the outer weights once.
    assert sent.counts == {"c10d::_allgather_base_": LAYERS * (1 + LENGTH) + 1}
    numel = sum(p.numel() for p in sharded.model.causal_lm.model.layers[0].parameters())
    assert sent.sizes.count(numel * (2 if half else 4)) == LAYERS * (1 + LENGTH)
