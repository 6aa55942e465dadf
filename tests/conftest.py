"""Fixtures: tiny models with deterministic weights."""

import os
from collections.abc import Callable

import numpy as np
import pytest
import torch
from tiny import MARKERS
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from quietstar import QuietStarForCausalLM
from quietstar.config import MixingHeadConfig, ThoughtsConfig, fields, loss_config
from quietstar.config.tree import loss_class
from quietstar.data import byte_tokenizer

torch.set_num_threads(1)  # the models are so small that a second thread only costs
os.environ["OMP_NUM_THREADS"] = "1"  # of the commands that tests start, too
transformers_logging.set_verbosity_error()


@torch.no_grad()
def fixed_init_(module: torch.nn.Module) -> None:
    """Give every parameter its weights by numpy's frozen stream (NEP 19), not by torch's.

    Matrices have unit gain, the mixing head's last layer is not zero, biases and norms are not
    neutral: a wrong gradient shows everywhere.
    """
    stream = np.random.RandomState(0)
    for name, parameter in module.named_parameters():
        noise = torch.from_numpy(stream.standard_normal(tuple(parameter.shape)))
        if name.endswith(("start_embedding", "end_embedding")) or "embed" in name:
            parameter.copy_(noise)
        elif name.endswith(("text_layer.bias", "middle_layer.bias")):
            parameter.copy_(0.1 * noise)  # what it is now, torch's stream has drawn
        elif parameter.ndim < 2:
            parameter.add_(0.1 * noise)
        else:
            parameter.copy_(noise * parameter.shape[-1] ** -0.5)


@pytest.fixture(autouse=True)
def _keys_of_built_in_objectives():
    """Forget the keys that objectives of a test's own have added: they stay in the process."""
    known = len(fields())
    yield
    if len(fields()) != known:
        loss_class.cache_clear()
        fields.cache_clear()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, 258 in all; no download."""
    return byte_tokenizer()


@pytest.fixture
def make_model(tokenizer) -> Callable[..., QuietStarForCausalLM]:
    """Builds a tiny Quiet-STaR model on a two-layer Llama with grouped-query attention.

    Keywords are the sections of `QuietStarForCausalLM.from_base`; ``base`` replaces the Llama.
    """

    def make(base=None, **sections) -> QuietStarForCausalLM:
        if base is None:
            base = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=len(tokenizer),
                    hidden_size=32,
                    intermediate_size=48,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    max_position_embeddings=128,
                )
            )
        settings = {
            "thoughts": ThoughtsConfig(length=3, lookahead=2, num_thoughts=2, **MARKERS),
            "mixing_head": MixingHeadConfig(),
            "loss": loss_config(policy_weight=1.0),
        }
        model = QuietStarForCausalLM.from_base(base, tokenizer=tokenizer, **(settings | sections))
        fixed_init_(model)
        return model.eval()

    return make


@pytest.fixture
def quiet_star(make_model) -> QuietStarForCausalLM:
    """A tiny Quiet-STaR model: T = 3, A = 2, K = 2, sigmoid head that is not zero."""
    return make_model()
