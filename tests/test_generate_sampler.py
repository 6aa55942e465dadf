"""Thoughts by transformers' ``generate``: the tokens of the rollout, and a model left as it was."""

from types import SimpleNamespace

import by_generate
import pytest
import torch
from architectures import tiny_architecture
from by_generate import Generate
from tiny import (
    BYTES_VOCAB,
    GPT2,
    LLAMA,
    plain_model,
    random_texts,
    read_metrics,
    run_config,
    thinking_model,
)

from quietstar.backbone.output_head import find_output_head
from quietstar.backbone.run import embedding_weight
from quietstar.model.self_check import use_thinking_attention
from quietstar.sampling.samplers.rollout import Rollout
from quietstar.sampling.thoughts import Sampling, Texts
from quietstar.training.run import run_training

GENERATE = "by_generate:Generate"
OFTEN = [chr(c) for c in range(32, 72)]
SOME = torch.tensor([[1, 4, 6], [0, 7, -1]])


def both(model, texts, **arguments):
    """Tokens of the rollout and of generation, at real positions: (places, thoughts, length)."""
    result = []
    for sampler in ("rollout", GENERATE):
        model.configure(model.thoughts.model_copy(update={"sampler": sampler}))
        batch = model.draw(texts, **arguments)
        result.append(batch.tokens[batch.positions >= 0])
        assert batch.lengths.sum() == (batch.tokens >= 0).sum()
    return result


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma2", "mistral", "qwen3", "gpt_neox",
                                  "cohere", "phi", "gpt_oss", "mixtral", "biogpt", "deepseek_v3",
                                  "olmo2", "gemma3_text", "smollm3"])  # fmt: skip
def test_it_draws_what_the_rollout_draws_in_every_architecture(name):
    base = tiny_architecture(name)
    use_thinking_attention(base)
    head = find_output_head(base)
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(2, embedding_weight(base).shape[1], generator=generator)
    model = SimpleNamespace(
        causal_lm=base, output_head=head, start_vectors=start, vocab_size=head.num_logits,
        passes_together=False,
    )  # fmt: skip
    ids = random_texts(2, 9, vocab=head.num_logits)
    ids[1, 6:] = 0  # padding
    texts = Texts(ids, ids, None, torch.tensor([5, 2]))
    spec = Sampling(num_thoughts=2, thought_length=4, temperature=3.0, seed=3)
    own, other = (sampler.sample(model, texts, None, spec) for sampler in (Rollout(), Generate()))
    assert torch.equal(own.tokens, other.tokens)
    assert own.tokens.unique().numel() > 10


@pytest.mark.parametrize("positions", [None, SOME])
@pytest.mark.parametrize("temperature", [None, 1.0])
@pytest.mark.parametrize("num_thoughts", [1, 3])
@pytest.mark.parametrize("stop", [[], OFTEN])
def test_every_way_to_sample_gives_the_thoughts_of_the_rollout(
    positions, temperature, num_thoughts, stop
):
    model = thinking_model(
        plain_model(eos_token_id=256), thoughts={"length": 5, "stop": stop}
    ).eval()
    own, other = both(
        model, random_texts(2, 9), positions=positions, num_thoughts=num_thoughts,
        temperature=temperature, seed=4, sample_ids=torch.tensor([7, 3]),
    )  # fmt: skip
    assert torch.equal(own, other)
    assert bool((own == -1).any()) is bool(stop)


@pytest.mark.parametrize("filters", [{"top_p": 0.7}, {"top_k": 4}, {"top_p": 0.8, "top_k": 9}])
def test_filters_are_those_of_the_rollout(filters):
    own, other = both(thinking_model().eval(), random_texts(2, 9), temperature=0.8, **filters)
    assert torch.equal(own, other)


@pytest.mark.parametrize("fields", [LLAMA, GPT2])
def test_chunks_of_rows_change_nothing(fields, monkeypatch):
    model, texts = thinking_model(plain_model(fields)).eval(), random_texts(2, 9)
    own, other = both(model, texts, temperature=1.0, num_thoughts=2)
    monkeypatch.setattr(by_generate, "_CHUNK_TOKENS", 30)
    assert torch.equal(own, other)
    assert torch.equal(own, both(model, texts, temperature=1.0, num_thoughts=2)[1])


def test_padded_rows_of_the_vocabulary_are_never_drawn():
    base = plain_model(vocab_size=BYTES_VOCAB + 14, tie_word_embeddings=False)
    with torch.no_grad():
        base.lm_head.weight[BYTES_VOCAB:] = 10 * base.lm_head.weight[:14]
    own, other = both(thinking_model(base).eval(), random_texts(2, 20), temperature=1.0)
    assert torch.equal(own, other)
    assert other.max() < BYTES_VOCAB


@pytest.mark.parametrize("method", ["full", "lora", "houlsby"])
def test_a_step_in_train_mode_is_that_of_the_rollout_and_leaves_the_model_as_it_was(method):
    results = []
    for sampler in ("rollout", GENERATE):
        base = plain_model(eos_token_id=256)
        base.generation_config.repetition_penalty = 3.0
        base.generation_config.eos_token_id = list(range(100))
        thoughts, tuning = {"length": 4, "sampler": sampler}, {"method": method}
        torch.manual_seed(0)
        model = thinking_model(base, thoughts=thoughts, tuning=tuning).train()
        model.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
        model.causal_lm.model.layers[0].mlp.eval()
        settings, modes = base.generation_config, [m.training for m in model.modules()]
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name or "up" in name:  # else adapters do nothing yet
                    parameter.normal_(std=0.3)
        loss = model(random_texts(2, 9), seed=1).loss
        loss.backward()
        assert base.generation_config is settings
        assert [m.training for m in model.modules()] == modes
        results.append((loss, [p.grad for p in model.parameters()]))
    (own, own_gradients), (other, gradients) = results
    assert torch.equal(own, other)
    for a, b in zip(own_gradients, gradients, strict=True):
        assert (a is b is None) or torch.equal(a, b)


def test_a_run_with_it_is_that_of_the_rollout(tmp_path):
    losses = {}
    for sampler in ("rollout", GENERATE):
        config = run_config(
            tmp_path, thoughts__sampler=sampler, thoughts__stop=OFTEN, thoughts__length=4,
            thoughts__positions="random", training__max_steps=2, training__micro_batch_size=3,
            training__output_dir=str(tmp_path / sampler),
        )  # fmt: skip
        run_training(config)
        losses[sampler] = [record["loss"] for record in read_metrics(tmp_path / sampler, "train")]
    assert losses[GENERATE] == losses["rollout"]
