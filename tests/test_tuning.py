"""Ways to tune: what shall train trains, nothing else moves, and what was saved is what loads."""

import copy

import peft
import pytest
import torch
from tiny import GPT2, LLAMA, plain_model, random_texts, randomise_own_weights, think
from transformers import AutoModelForCausalLM, DynamicCache

from quietstar import QuietStarForCausalLM
from quietstar.config import OptimConfig, ThoughtsConfig, TuningConfig, loss_config
from quietstar.data import load_tokenizer
from quietstar.errors import UserError
from quietstar.model.merging import merge
from quietstar.model.self_check import use_thinking_attention
from quietstar.model.tuning import apply_tuning
from quietstar.training.optimizer import build_optimizer

ON_CPU = ("full", "lora", "rslora", "dora", "ia3", "houlsby", "mlp_adapter", "prompt", "prefix")
METHODS = (*ON_CPU, "qlora", "galore")
ADDED = ("lora_", "ia3_", ".adapter.", "virtual_tokens")
OPTIONS = {"houlsby": {"adapter_size": 3}, "mlp_adapter": {"adapter_size": 3},
           "prompt": {"num_virtual_tokens": 4}, "prefix": {"num_virtual_tokens": 4},
           "galore": {"rank": 4}}  # fmt: skip
# 4-bit layers want sizes that are multiples of their block.
WIDE = {"hidden_size": 64, "intermediate_size": 128}
SHAPES = {"llama": {**LLAMA, **WIDE}, "gpt2": {**GPT2, "n_embd": 64}}


@pytest.fixture(scope="module", params=SHAPES)
def base_folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model = plain_model(SHAPES[request.param])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.4)
    model.save_pretrained(folder)
    load_tokenizer("bytes").save_pretrained(folder)
    return folder


def make(folder, method, unfreeze=(), **options):
    model = QuietStarForCausalLM.from_base(
        str(folder),
        thoughts=ThoughtsConfig(length=2, lookahead=2),
        loss=loss_config(policy_weight=1.0),
        tuning=TuningConfig(
            method=method, lora_r=2, unfreeze=[*unfreeze], options=OPTIONS.get(method, {}) | options
        ),
    )
    randomise_own_weights(model)
    return model


def train(model, steps):
    optimizer = build_optimizer(model, OptimConfig(learning_rate=1e-2), model.tuning)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(random_texts(4, 9)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("method", METHODS)
def test_what_shall_train_moves_and_nothing_else(method, base_folder, tmp_path):
    if method == "qlora" and "gpt2" in base_folder.name:
        pytest.skip("GPT-2's Conv1D layers are not quantized")
    model = make(base_folder, method)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    losses = train(model, 20)
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        assert (not torch.equal(parameter, before[name])) == parameter.requires_grad, name
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    of_model = {n for n in trained if n.startswith("language_model.")}
    added = {n for n in before if any(mark in n for mark in ADDED)}
    whole = {n for n in before if n.startswith("language_model.")}
    assert of_model == (whole if method in ("full", "galore") else added)
    assert of_model

    model.eval().save_pretrained(tmp_path, load_tokenizer("bytes"))
    loaded = QuietStarForCausalLM.from_pretrained(tmp_path)
    texts = random_texts(2, 9)
    a, b = (think(m, texts, num_thoughts=2, temperature=1.0, seed=3) for m in (model, loaded))
    assert torch.equal(a.tokens, b.tokens)
    assert torch.equal(a.mixed_logprobs, b.mixed_logprobs)
    assert torch.equal(model.score_plain(texts).logprobs, loaded.score_plain(texts).logprobs)
    if method not in ("full", "galore"):
        assert not list(tmp_path.rglob("model.safetensors"))
        assert not any(p.requires_grad for p in loaded.language_model.parameters())
        again = QuietStarForCausalLM.from_pretrained(tmp_path, trainable=True)
        assert {n for n, p in again.named_parameters() if p.requires_grad} == trained


@pytest.mark.parametrize("method", ["lora", "houlsby", "prefix"])
def test_parameters_are_unfrozen_beside_and_saved(method, base_folder, tmp_path):
    model = (
        make(base_folder, method, unfreeze=["*.1.*norm*.weight", "*.1.ln_*.weight"][:1])
        if "llama" in base_folder.name
        else make(base_folder, method, unfreeze=["h.1.ln_*.weight"])
    )
    beside = {
        n for n, p in model.named_parameters()
        if p.requires_grad and n.startswith("language_model.") and not any(m in n for m in ADDED)
    }  # fmt: skip
    assert len(beside) == 2
    train(model, 2)
    model.eval().save_pretrained(tmp_path)
    loaded = QuietStarForCausalLM.from_pretrained(tmp_path)
    texts = random_texts(2, 9)
    assert torch.equal(model.score_plain(texts).logprobs, loaded.score_plain(texts).logprobs)


def test_the_mlp_of_a_prefix_trains_and_is_folded_when_saved(base_folder, tmp_path):
    """What is loaded is a prefix like any other, bit for bit, and trains on as one."""
    model = make(base_folder, "prefix", encoder_hidden_size=5)
    losses = train(model, 20)
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path)
    loaded = QuietStarForCausalLM.from_pretrained(tmp_path, trainable=True)
    assert loaded.tuning.options == {"num_virtual_tokens": 4}
    names = {n.rsplit("virtual_tokens.")[-1] for n, p in loaded.named_parameters()
             if p.requires_grad and n.startswith("language_model.")}  # fmt: skip
    assert names == {"keys", "values"}
    texts = random_texts(2, 9)
    assert torch.equal(model.score_plain(texts).logprobs, loaded.score_plain(texts).logprobs)
    assert train(loaded, 3)


def test_a_pattern_that_fits_nothing_is_named(base_folder):
    with pytest.raises(UserError, match=r"tuning.unfreeze: 'layers.77.\*' fits no parameter"):
        make(base_folder, "lora", unfreeze=["layers.77.*"])


def test_4bit_gradients_still_flow_after_a_rollout(base_folder):
    if "gpt2" in base_folder.name:
        pytest.skip("GPT-2's Conv1D layers are not quantized")
    model = make(base_folder, "qlora").eval()
    think(model, random_texts())  # a forward pass without gradient, in eval mode
    model.train()
    model(random_texts(4, 9)).loss.backward()
    matrices = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
    assert matrices
    assert all(grad is not None and grad.abs().max() > 0 for grad in matrices)


# --- Virtual tokens against other ways to compute them --------------------------------------------


VIRTUAL = {
    "prompt": {"method": "prompt", "options": {"num_virtual_tokens": 3}},
    "prefix": {"method": "prefix", "options": {"num_virtual_tokens": 3}},
    "mlp": {"method": "prefix", "options": {"num_virtual_tokens": 3, "encoder_hidden_size": 5}},
}


def tuned(method):
    base = plain_model(num_attention_heads=4, num_key_value_heads=2, dtype=torch.float64)
    use_thinking_attention(base)
    oracle = copy.deepcopy(base)
    apply_tuning(base, TuningConfig(**VIRTUAL[method]))
    base.to(torch.float64)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if "virtual_tokens" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return base, oracle


def through_oracle(base, oracle, method, embeddings):
    """Final states of one sequence after the virtual tokens, by transformers' own means."""
    if method == "prompt":
        virtual = base.virtual_tokens.embeddings[None]
        out = oracle.model(inputs_embeds=torch.cat([virtual, embeddings], 1), use_cache=False)
        return out.last_hidden_state[:, 3:]
    cache = DynamicCache()
    for index, layer in enumerate(base.model.layers):
        keys, values = layer.self_attn.virtual_tokens()
        cache.update(keys[None], values[None], index)
    positions = torch.arange(3, 3 + embeddings.shape[1])[None]
    out = oracle.model(inputs_embeds=embeddings, past_key_values=cache, position_ids=positions)
    return out.last_hidden_state


@pytest.mark.parametrize("chosen", [None, torch.tensor([[1, 4, -1]])])
@pytest.mark.parametrize("method", VIRTUAL)
def test_texts_and_thoughts_see_the_virtual_tokens(method, chosen):
    from quietstar.backbone.run import plain_pass, run_text
    from quietstar.backbone.teacher_forced import embed_blocks, teacher_forced
    from quietstar.sampling.rollout import policy_states

    base, oracle = tuned(method)
    embed = base.get_input_embeddings()
    texts = random_texts(1, 6)
    places = range(6) if chosen is None else [1, 4]
    width = 6 if chosen is None else 3
    generator = torch.Generator().manual_seed(2)
    thoughts = torch.randint(0, 256, (2, 2, 1, width), generator=generator)
    start, end = torch.randn(2, 1, 16, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        blocks = embed_blocks(base, start, end, texts, thoughts, 2, chosen)
        states = teacher_forced(base, run_text(base, texts), blocks)
        plain = plain_pass(base, texts)
        rolled = policy_states(base, start, texts, thoughts, chosen)
        text = through_oracle(base, oracle, method, embed(texts))
        torch.testing.assert_close(states.text, text)
        torch.testing.assert_close(plain, text)
        for column, place in enumerate(places):
            for k in range(2):
                inner, after = thoughts[:, k, :, column].T, texts[:, place + 1 : place + 2]
                sequence = torch.cat(
                    [embed(texts[:, : place + 1]), start[None], embed(inner),
                     end[None], embed(after)], 1
                )  # fmt: skip
                block = through_oracle(base, oracle, method, sequence)[0, place + 1 :]
                torch.testing.assert_close(states.policy[:, k, 0, column], block[:2])
                torch.testing.assert_close(rolled[:, k, 0, column], block[:2])
                ahead = states.ahead[: len(block) - 3, k, 0, column]
                torch.testing.assert_close(ahead, block[3:])


@pytest.mark.parametrize(("method", "count"), [("prompt", 1), ("prefix", 4), ("mlp", 7)])
def test_gradients_reach_the_virtual_tokens(method, count):
    model = QuietStarForCausalLM.from_base(
        plain_model(), tokenizer=load_tokenizer("bytes"),
        thoughts=ThoughtsConfig(length=2, lookahead=2), tuning=TuningConfig(**VIRTUAL[method]),
    )  # fmt: skip
    texts = random_texts(2, 9)
    for thinks in (True, False):
        model.zero_grad()
        model(texts, think=thinks).loss.backward()
        learned = [p for n, p in model.named_parameters() if "virtual_tokens" in n]
        assert len(learned) == count
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in learned)


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "ia3"])
def test_merged_models_think_the_same_and_load_as_plain_ones(method, base_folder, tmp_path):
    beside = "norm.weight" if "llama" in base_folder.name else "ln_f.weight"
    model = make(base_folder, method, unfreeze=[beside])
    train(model, 2)
    model.eval().save_pretrained(tmp_path / "saved", load_tokenizer("bytes"))
    merge(tmp_path / "saved", tmp_path / "merged")
    merged = QuietStarForCausalLM.from_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged" / "language_model")
    texts = random_texts(2, 9)
    thoughts = model.draw(texts)
    a, b = (m.score(texts, thoughts) for m in (model, merged))
    assert torch.allclose(a.mixed_logprobs, b.mixed_logprobs, atol=1e-4)
    assert torch.equal(plain(texts).logits, merged.causal_lm(texts).logits)
    with pytest.raises(UserError, match="already holds something"):
        merge(tmp_path / "saved", tmp_path / "merged")


def test_what_cannot_be_merged_is_refused_with_the_reason(base_folder, tmp_path):
    for method, reason in (("full", "whole model already"), ("prompt", "has virtual tokens")):
        make(base_folder, method).save_pretrained(tmp_path / method)
        with pytest.raises(UserError, match=reason):
            merge(tmp_path / method, tmp_path / "out")


def test_lora_adapters_of_peft_load_as_usual(base_folder, tmp_path):
    model = make(base_folder, "dora")
    model.save_pretrained(tmp_path)
    assert peft.PeftConfig.from_pretrained(tmp_path / "language_model").use_dora
