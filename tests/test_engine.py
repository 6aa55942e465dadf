"""The engine: who sees whom, one path against the other, and the model that it leaves intact."""

import copy
import re

import pytest
import torch
from architectures import tiny_architecture
from tiny import MARKERS, think
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from quietstar import QuietStarForCausalLM
from quietstar.attention import interface as attention
from quietstar.attention import layout, passes
from quietstar.attention.block_attention import block_attention
from quietstar.attention.blocks import ContiguousBlocks
from quietstar.attention.dense import ScoreRules, dense_block_attention
from quietstar.attention.interface import thinking_attention
from quietstar.attention.kernels import CpuFlash
from quietstar.attention.passes import BlockPass, TextPass
from quietstar.backbone.teacher_forced import ThoughtStates
from quietstar.config import MixingHeadConfig, ThoughtsConfig
from quietstar.model.scoring import read_thoughts
from quietstar.model.self_check import use_thinking_attention
from quietstar.sampling import rollout
from quietstar.sampling.thoughts import ThoughtBatch

UNCHANGED = 5e-6  # float32 rounding of states of unit scale: 1.1e-6 with some CPU kernels
CHANGED = 1e-4

LAYER = torch.nn.Identity()  # stands for the attention layer that calls; nothing is read from it


@pytest.fixture(params=["flash", "dense"])
def path(request, monkeypatch) -> str:
    """Run the test on the flash path, and on the dense one."""
    if request.param == "dense":
        monkeypatch.setattr(passes, "find_kernel", lambda *args: None)
    return request.param


def texts(batch_size: int, length: int, vocab_size: int = 256) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, vocab_size, (batch_size, length), generator=generator)


def random_thoughts(model: QuietStarForCausalLM, batch_size: int, length: int) -> Tensor:
    """(T, K, B, S)."""
    generator = torch.Generator().manual_seed(2)
    shape = (model.thoughts.length, model.thoughts.num_thoughts, batch_size, length)
    return torch.randint(0, model.vocab_size, shape, generator=generator)


@torch.no_grad()
def learn(model: QuietStarForCausalLM, input_ids: Tensor, thoughts: Tensor) -> ThoughtStates:
    return read_thoughts(model, input_ids, thoughts.permute(2, 3, 1, 0), None)[0]


def qkv(rows: int, heads: int, kv_heads: int, length: int, size: int, dtype=torch.float32):
    """Leaves (rows, H or Hkv, S, d), a few times larger than usual so that attention is peaked."""
    generator = torch.Generator().manual_seed(3)
    return [
        (2 * torch.randn(rows, n, length, size, generator=generator, dtype=dtype)).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    ]


# --- Who sees whom --------------------------------------------------------------------------------


def drawn_grid() -> Tensor:
    """The 0/1 grid in the docstring of `quietstar.attention.layout`, (queries, keys)."""
    lines = re.findall(r"^ *(?:text|w\d) +\d((?: +[1.])+)$", layout.__doc__, flags=re.MULTILINE)
    return torch.tensor([[mark == "1" for mark in line.split()] for line in lines])


def joint(q, k, v, rules, layer=LAYER):
    """Text and blocks of one text and K = 1, of rows (text, w0, w1, ...) each (1, H, S, d)."""
    keys = {}
    text = TextPass(keys).attend(layer, q[:1], k[:1], v[:1], rules)
    length, block_length = q.shape[2], len(q) - 1
    blocks = ContiguousBlocks(1, 1, block_length, 0, length)
    block_pass = BlockPass(keys, blocks, length + block_length)
    return torch.cat([text, block_pass.attend(layer, q[1:], k[1:], v[1:], rules)])


def test_keys_influence_the_queries_that_the_drawn_grid_allows_and_no_others(path):
    grid = drawn_grid()
    assert grid.shape == (9, 9)
    # B = 1, K = 1: the rows are the text, w0 and w1, of 3 tokens each.
    q, k, v = qkv(rows=3, heads=2, kv_heads=1, length=3, size=4)
    out = joint(q, k, v, ScoreRules(scale=0.5))
    for tensor in (k, v):
        seen = torch.zeros(9, 9, dtype=torch.bool)
        for query in range(9):
            row, token = divmod(query, 3)
            (grad,) = torch.autograd.grad(
                out[row, :, token].square().sum(), tensor, retain_graph=True
            )
            seen[query] = grad.abs().sum((1, 3)).flatten() > 1e-4  # rounding stays below
        if tensor is k:  # a query that sees one key alone does not depend on its score
            assert torch.equal(seen, grid & (grid.sum(1, keepdim=True) > 1))
        else:
            assert torch.equal(seen, grid)


def test_a_thought_token_reaches_only_what_comes_after_it_in_its_own_thought(quiet_star, path):
    input_ids = texts(2, 5)
    thoughts = random_thoughts(quiet_star, 2, 5)
    before = learn(quiet_star, input_ids, thoughts)
    token, k, b, i = 1, 1, 0, 2
    thoughts[token, k, b, i] = (thoughts[token, k, b, i] + 1) % quiet_star.vocab_size
    after = learn(quiet_star, input_ids, thoughts)
    assert (after.text - before.text).abs().max() < UNCHANGED
    policy = (after.policy - before.policy).abs().amax(-1)  # (T, K, B, S)
    ahead = (after.ahead - before.ahead).abs().amax(-1)
    # Token 1 (from 0) is an input of the state that predicts token 2, and of all after it.
    assert (policy[token + 1 :, k, b, i] > CHANGED).all()
    assert (ahead[:, k, b, i] > CHANGED).all()
    policy[token + 1 :, k, b, i] = 0
    ahead[:, k, b, i] = 0
    assert policy.max() < UNCHANGED, "another token, thought, text or position saw it"
    assert ahead.max() < UNCHANGED, "another thought, text or position saw it"


def test_a_text_token_reaches_no_thought_before_it_but_through_the_lookahead(quiet_star, path):
    input_ids = texts(2, 5)
    thoughts = random_thoughts(quiet_star, 2, 5)
    before = learn(quiet_star, input_ids, thoughts)
    j, b = 3, 0
    input_ids[b, j] = (input_ids[b, j] + 1) % 256
    after = learn(quiet_star, input_ids, thoughts)
    text = (after.text - before.text).abs().amax(-1)
    policy = (after.policy - before.policy).abs().amax(-1)
    ahead = (after.ahead - before.ahead).abs().amax(-1)
    for i in range(5):
        assert (text[b, i] > CHANGED) == (i >= j)
        assert ((policy[:, :, b, i] > CHANGED) == (i >= j)).all()
        for a in range(2):  # the state a has been given the true tokens up to i + a
            assert ((ahead[a, :, b, i] > CHANGED) == (i + a >= j)).all()
    assert text[b, :j].max() < UNCHANGED
    assert policy[:, :, b, :j].max() < UNCHANGED
    for states in (text[1], policy[:, :, 1], ahead[:, :, 1]):
        assert states.max() < UNCHANGED, "another text of the batch saw it"


def test_padding_on_the_right_changes_no_real_state_and_no_loss(quiet_star, path):
    input_ids = texts(2, 6)
    thoughts = random_thoughts(quiet_star, 2, 6)
    whole = learn(quiet_star, input_ids, thoughts)
    short = learn(quiet_star, input_ids[1:, :4], thoughts[:, :, 1:, :4])
    assert (whole.text[1:, :4] - short.text).abs().max() < UNCHANGED
    assert (whole.policy[:, :, 1:, :4] - short.policy).abs().max() < UNCHANGED
    for a in range(2):  # the last true tokens of the short text are padding in the long one
        real = slice(0, 4 - a)
        assert (whole.ahead[a, :, 1:, real] - short.ahead[a, :, :, real]).abs().max() < UNCHANGED
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    loss = quiet_star(input_ids, mask, sample_ids=torch.arange(2)).loss
    input_ids[1, 4:] = 7
    other = quiet_star(input_ids, mask, sample_ids=torch.arange(2)).loss
    assert torch.equal(loss, other)


def test_padding_on_the_left_is_an_error(quiet_star):
    with pytest.raises(ValueError, match="padded on the right"):
        quiet_star(texts(1, 4), torch.tensor([[0, 1, 1, 1]]))


# --- One way against another ----------------------------------------------------------------------


def test_the_rollout_samples_from_the_states_of_the_learn_pass(quiet_star, path, monkeypatch):
    seen = []
    sample = rollout.sample_rows

    def record(states, *rest):
        seen.append(states)
        return sample(states, *rest)

    monkeypatch.setattr(rollout, "sample_rows", record)
    input_ids = texts(2, 6)
    with torch.no_grad():
        thoughts = quiet_star(input_ids).thoughts.permute(3, 2, 0, 1).contiguous()
    policy = learn(quiet_star, input_ids, thoughts).policy  # (T, K, B, S, D)
    assert len(seen) == quiet_star.thoughts.length
    first, *rest = seen  # the first token's is one for all thoughts of a position
    assert (first.view(2, 6, -1) - policy[0]).abs().max() < 5 * UNCHANGED
    assert (torch.stack(rest).view_as(policy[1:]) - policy[1:]).abs().max() < 5 * UNCHANGED


def block_leaves(batch_size, num_thoughts, block_length, heads, kv_heads, length, size, dtype):
    """Queries, keys and values of blocks, and keys and values of their texts."""
    rows = batch_size * (1 + (block_length - 1) * num_thoughts)
    blocks = qkv(rows, heads, kv_heads, length, size, dtype)
    _, *text = qkv(batch_size, heads, kv_heads, length, size, dtype)
    return [*blocks, *text], ContiguousBlocks(batch_size, num_thoughts, block_length, 0, length)


def both_paths(window: int | None = None):
    """Output and gradients of all tensors by flash and dense: B, K 2, W 3, grouped heads."""
    leaves, blocks = block_leaves(2, 2, 3, 4, 2, 5, 8, torch.float32)
    rules, results = ScoreRules(scale=0.3, window=window), []
    for dense in (False, True):
        q, k, v, *text = leaves
        if dense:
            out = dense_block_attention(q, k, v, tuple(text), blocks, rules)
        else:
            out = block_attention(q, k, v, tuple(text), blocks, rules.scale, CpuFlash())
        weights = torch.linspace(-1, 1, out.numel()).view_as(out)
        results.append((out, *torch.autograd.grad((out * weights).sum(), leaves)))
    return zip(*results, strict=True)


@pytest.mark.parametrize("window", [None, 8])  # 8 = S + W: nothing is out of sight
def test_the_dense_path_equals_the_flash_path_forward_and_backward(window):
    for flash, dense in both_paths(window):
        assert (flash - dense).abs().max() < 5e-6 * dense.abs().max()


def test_the_dense_path_differs_where_a_window_hides_something():
    out, *_ = both_paths(window=7)  # one pair: the last token of the last block and text token 0
    assert (out[0] - out[1]).abs().max() > CHANGED


def test_gradients_of_block_attention_pass_gradcheck():
    leaves, blocks = block_leaves(2, 2, 3, 2, 1, 2, 2, torch.float64)
    assert torch.autograd.gradcheck(
        lambda q, k, v, *text: block_attention(q, k, v, text, blocks, 0.5, CpuFlash()), leaves
    )


def test_gradients_of_the_dense_path_pass_gradcheck():
    leaves, blocks = block_leaves(2, 2, 3, 2, 1, 2, 2, torch.float64)
    sinks = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda q, k, v, a, b, s: dense_block_attention(
            q, k, v, (a, b), blocks, ScoreRules(0.5, 3.0, 3, s)
        ),
        [*leaves, sinks],
    )


@pytest.mark.parametrize(("window", "dense"), [(10, False), (9, True), (None, False)])
def test_a_window_takes_the_dense_path_only_where_it_hides_something(window, dense):
    leaves, blocks = block_leaves(1, 1, 4, 2, 1, 6, 4, torch.float32)  # S + W = 6 + 4
    q, k, v, *text = leaves
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        fake = lambda *args: calls.append(args) or args[0]  # noqa: E731
        patch.setattr(passes, "dense_block_attention", fake)
        block_pass = BlockPass({id(LAYER): tuple(text)}, blocks, 10)
        block_pass.attend(LAYER, q, k, v, ScoreRules(scale=0.5, window=window))
    assert bool(calls) == dense


def test_mixed_dtypes_of_autocast_are_computed_in_that_of_the_values_by_flash(monkeypatch):
    monkeypatch.delattr(passes, "dense_block_attention")
    q, k, v = qkv(rows=3, heads=2, kv_heads=1, length=4, size=8)
    exact, _ = thinking_attention(LAYER, q, k, v, None, thought_pass=TextPass())
    mixed, _ = thinking_attention(LAYER, q, k, v.bfloat16(), None, thought_pass=TextPass())
    assert mixed.dtype == torch.bfloat16
    assert (mixed - exact).abs().max() < 0.1  # peaked scores up to 10 keep 8 bits


def test_no_mask_is_built_in_a_pass(quiet_star, monkeypatch):
    monkeypatch.delattr(attention, "sdpa_mask")
    quiet_star(texts(2, 6))


# --- What is not understood is an error -----------------------------------------------------------


def test_an_unknown_attention_keyword_is_an_error_and_an_unset_one_is_not():
    q, k, v = qkv(rows=3, heads=2, kv_heads=1, length=4, size=8)
    learn = TextPass()
    with pytest.raises(ValueError, match="'alibi' is not understood"):
        thinking_attention(LAYER, q, k, v, None, thought_pass=learn, alibi=torch.ones(2))
    thinking_attention(LAYER, q, k, v, None, thought_pass=learn, alibi=None)


def test_attention_dropout_is_an_error():
    q, k, v = qkv(rows=3, heads=2, kv_heads=1, length=4, size=8)
    with pytest.raises(ValueError, match=r"attention dropout \(0.1\) must be 0"):
        thinking_attention(LAYER, q, k, v, None, dropout=0.1, thought_pass=TextPass())


# --- The model as it was --------------------------------------------------------------------------


@torch.no_grad()
def test_with_zero_mixing_weight_the_mixed_prediction_is_that_of_the_plain_model(make_model):
    model = make_model(mixing_head=MixingHeadConfig(initial_weight=0.0))
    torch.nn.init.zeros_(model.mixing_head.last_layer.weight)
    torch.nn.init.zeros_(model.mixing_head.last_layer.bias)
    plain = copy.deepcopy(model.causal_lm)
    plain.set_attn_implementation("eager")
    input_ids = texts(2, 6)
    result = think(model, input_ids, num_thoughts=2)
    assert (result.mixing_weight == 0).all()
    logprobs = plain(input_ids=input_ids).logits.log_softmax(-1)
    for a in (1, 2):
        for i in range(6 - a):
            expected = logprobs[:, i + a - 1].gather(1, input_ids[:, i + a, None])  # (B, 1)
            assert (result.base_logprobs[:, i, a - 1] - expected[:, 0]).abs().max() < 1e-5
            assert (result.mixed_logprobs[:, i, :, a - 1] - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss", "gpt2"])
@torch.no_grad()
def test_without_a_pass_the_model_is_a_plain_one(name):
    model = tiny_architecture(name)
    plain = copy.deepcopy(model)  # eager
    use_thinking_attention(model)
    input_ids = texts(2, 7, 60)
    mask = torch.tensor([[1] * 7, [0] * 3 + [1] * 4])  # padding on the left, as for generation
    for padding in (None, mask, mask.flip(1)):
        ours, expected = (
            m(input_ids=input_ids, attention_mask=padding).logits for m in (model, plain)
        )
        real = torch.ones_like(mask) if padding is None else padding
        error = (ours - expected)[real.bool()].abs().max()
        assert error < 1e-5 * expected.abs().max()
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    ours, expected = (
        m.generate(input_ids, attention_mask=mask, **settings) for m in (model, plain)
    )
    assert torch.equal(ours, expected)


# --- Training engines -----------------------------------------------------------------------------


def loss_and_gradients(model: QuietStarForCausalLM, input_ids: Tensor):
    model.zero_grad()
    loss = model(input_ids, sample_ids=torch.arange(len(input_ids))).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters()}


def test_every_parameter_gets_a_gradient(quiet_star):
    _, gradients = loss_and_gradients(quiet_star, texts(2, 6))
    assert [n for n, g in gradients.items() if g is None or not g.abs().max() > 0] == []


@pytest.mark.parametrize("window", [None, 4])
def test_activation_checkpointing_changes_no_bit_of_loss_and_gradients(make_model, window):
    base = tiny_architecture("mistral")
    base.config.sliding_window = window
    base.resize_token_embeddings(258)
    model = make_model(base).train()
    loss, gradients = loss_and_gradients(model, texts(2, 6))
    model.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    again, recomputed = loss_and_gradients(model, texts(2, 6))
    assert torch.equal(loss, again)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, recomputed[name]), name


def test_bfloat16_autocast_is_close_to_float32(quiet_star, path, monkeypatch):
    input_ids = texts(2, 6)
    thoughts = random_thoughts(quiet_star, 2, 6)  # the same: samples of rounded logits may differ
    given = thoughts.permute(2, 3, 1, 0)
    monkeypatch.setattr(quiet_star.sampler, "sample", lambda model, texts, positions, spec:
        ThoughtBatch.of_texts(texts, positions, given))  # fmt: skip
    loss, gradients = loss_and_gradients(quiet_star, input_ids)
    with torch.autocast("cpu", torch.bfloat16):
        rounded_loss, rounded = loss_and_gradients(quiet_star, input_ids)
    assert (rounded_loss - loss).abs() < 0.02 * loss.abs()  # bfloat16 keeps 8 bits
    for name, gradient in gradients.items():
        assert rounded[name].dtype == torch.float32
        cosine = torch.cosine_similarity(gradient.flatten(), rounded[name].flatten(), dim=0)
        assert cosine > (0.9 if "mixing" in name else 0.97), name  # differences of rounded logits


def test_the_rollout_runs_under_bfloat16_autocast(quiet_star):
    with torch.autocast("cpu", torch.bfloat16):
        output = quiet_star(texts(2, 6))
    assert output.thoughts.shape == (2, 6, 2, 3)
    assert torch.isfinite(output.loss)


def test_a_text_that_leaves_no_room_for_a_thought_is_an_error(make_model, tokenizer):
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=12,
        )
    )
    model = make_model(base, thoughts=ThoughtsConfig(length=3, lookahead=2, **MARKERS))
    model(texts(1, 6))  # 6 + 3 + 2 + 1 = 12
    with pytest.raises(ValueError, match="takes at most 6"):
        model(texts(1, 7))
