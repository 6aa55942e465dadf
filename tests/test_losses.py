"""The losses against plain torch, by hand, and by their properties.

Letters: B texts, S positions, K thoughts, T thought tokens, A lookahead, D width, V vocabulary.
"""

import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from states_loss import quiet_star_loss
from tiny import random_texts, thinking_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from quietstar.backbone.output_head import OutputHead
from quietstar.backbone.teacher_forced import ThoughtStates
from quietstar.config import loss_config
from quietstar.losses import cross_entropy
from quietstar.losses.cross_entropy import HeadGradients, Segment, objective
from quietstar.model.outputs import thought_metrics

IGNORE = -100
HEADS = {
    "plain": {},
    "scaled": {"scale": 0.7},
    "with bias": {"bias": True, "scale": 1.3},
    "soft-capped": {"softcap": 2.0, "scale": 1.2},
}


def make_head(width=5, vocab=11, *, bias=False, vocab_size=None, seed=0, dtype=None, **options):
    layer = nn.Linear(width, vocab, bias=bias, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return OutputHead(layer, layer.weight, layer.bias, vocab_size=vocab_size, **options)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def plain_logits(head, states, weight, bias):
    """Logits in float64 by the book."""
    logits = states.double() @ weight.double().T
    logits = (logits if bias is None else logits + bias.double()) * head.scale
    return logits if head.softcap is None else head.softcap * (logits / head.softcap).tanh()


# --- objective: rows against plain torch ----------------------------------------------------------


def make_segments(rows=300, width=5, vocab=11, vocab_size=9):
    """Rows of every kind."""
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(0, vocab, (3, rows), generator=generator)
    targets[:, ::7] = IGNORE
    targets[1] = targets[1].clamp(max=vocab_size - 1)
    weights = normal(3, rows, seed=2)
    states = [normal(rows, width, seed=3 + i).requires_grad_() for i in range(3)]
    return [
        Segment(states[0], targets[0], weights[0]),
        Segment(
            states[1],
            targets[1],
            weights[1],
            entropy_coefficients=weights[2].where(targets[1] != IGNORE, 0.0),
            temperature=3.0,
            sampled_only=True,
            wants_entropy=True,
        ),
        Segment(states[2], targets[2], coefficients=None),
    ]


def plain_objective(segments, head):
    """The same sum from log_softmax in float64, differentiable."""
    value, nlls, entropies = 0.0, [], []
    for segment in segments:
        logits = plain_logits(head, segment.states, head.weight, head.bias)
        if segment.other_states is not None:
            other = plain_logits(head, segment.other_states, head.weight, head.bias)
            share = segment.other_weight.double()[:, None]
            logits = (1 - share) * logits + share * other
        if segment.sampled_only:
            logits = logits[:, : head.vocab_size]
        logprobs = (logits / segment.temperature).log_softmax(-1)
        picked = logprobs.gather(1, segment.targets.clamp(min=0)[:, None]).squeeze(1)
        nll = -picked.where(segment.targets != IGNORE, 0.0)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        if segment.coefficients is not None:
            value = value + (segment.coefficients * nll).sum()
        if segment.entropy_coefficients is not None:
            value = value + (segment.entropy_coefficients * entropy).sum()
        nlls.append(nll)
        entropies.append(entropy)
    return value, nlls, entropies


def gradients(value, segments, head):
    leaves = [s.states for s in segments]
    leaves += [s.other_states for s in segments if s.other_states is not None]
    leaves += [s.other_weight for s in segments if s.other_weight is not None]
    leaves += list(head.module.parameters())
    return torch.autograd.grad(value, leaves, allow_unused=True)


def assert_same(actual, expected, tolerance=2e-5):
    """Largest difference, relative to the largest entry (float32 sums against float64)."""
    if actual is None or expected is None:
        given = actual if expected is None else expected
        assert given is None or not given.any()
        return
    error = (actual.double() - expected.double()).abs().max()
    assert error <= tolerance * max(1.0, expected.abs().max().item()), error


@pytest.mark.parametrize("chunk_rows", [96, 130, 2**20])
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_chunked_rows_equal_plain_torch_in_value_and_gradient(options, chunk_rows, monkeypatch):
    head = make_head(**options, vocab_size=9)
    segments = make_segments()
    if not head.is_linear:
        share = torch.rand(300, generator=torch.Generator().manual_seed(9)).requires_grad_()
        other = normal(300, 5, seed=8).requires_grad_()
        segments[0] = replace(segments[0], other_states=other, other_weight=share)
    monkeypatch.setattr(cross_entropy, "_CHUNK_ELEMENTS", chunk_rows * 11)
    value, results = objective(segments, head)
    expected, nlls, entropies = plain_objective(segments, head)
    assert_same(value, expected)
    for result, nll in zip(results, nlls, strict=True):
        assert_same(result.nll, nll)
    assert_same(results[1].entropy, entropies[1])
    # A factor in front, as in accumulation: backward multiplies.
    for actual, wanted in zip(
        gradients(2.5 * value, segments, head),
        gradients(2.5 * expected, segments, head),
        strict=True,
    ):
        assert_same(actual, wanted)


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_results_without_gradient_are_the_same(options):
    head = make_head(**options, vocab_size=9)
    segments = make_segments()
    value, results = objective(segments, head)
    with torch.no_grad():
        plain_value, plain_results = objective(segments, head)
    assert not plain_value.requires_grad
    assert torch.equal(value, plain_value)
    for a, b in zip(results, plain_results, strict=True):
        assert torch.equal(a.nll, b.nll)
        assert not a.nll.requires_grad


def differentiate_once(function, *inputs):
    """``function`` as gradcheck needs it: its gradient is taken once and may be read twice."""

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            leaves = [x.detach().requires_grad_() for x in inputs]
            with torch.enable_grad():
                value = function(*leaves)
            ctx.grads = torch.autograd.grad(value, leaves)
            return value.detach().double()

        @staticmethod
        def backward(ctx, grad):
            return tuple(grad * g for g in ctx.grads)

    return Once.apply(*inputs)


@pytest.mark.parametrize("softcap", [None, 2.0], ids=["fused", "recomputed"])
def test_objective_passes_gradcheck(softcap):
    def value(states, weight, bias):
        layer = nn.Linear(3, 4, dtype=torch.float64)
        del layer.weight, layer.bias
        layer.weight, layer.bias = weight, bias
        head = OutputHead(layer, weight, bias, 0.8, softcap)
        targets = torch.tensor([1, IGNORE, 3, 0])
        segment = Segment(
            states,
            targets,
            torch.tensor([0.5, 1.0, -2.0, 1.0]),
            entropy_coefficients=torch.tensor([0.3, -1.0, 0.0, 2.0]),
            temperature=1.5,
            wants_entropy=True,
        )
        return objective([segment], head)[0]

    shapes = ((4, 3), (4, 3), (4,))
    inputs = [
        normal(*s, seed=i, dtype=torch.float64).requires_grad_() for i, s in enumerate(shapes)
    ]
    # Values are float32 (1e-7), so steps are wide: an error of 1e-7 / 1e-2 + (1e-2)^2 is expected.
    assert torch.autograd.gradcheck(
        lambda *x: differentiate_once(value, *x), inputs, eps=1e-2, atol=5e-4, rtol=1e-3
    )


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_a_frozen_output_weight_gets_no_gradient(options):
    head = make_head(**options)
    head.module.requires_grad_(False)
    states = normal(70, 5).requires_grad_()
    reference = states.detach().clone().requires_grad_()
    segment = Segment(states, torch.arange(70) % 11, torch.ones(70))
    objective([segment], head)[0].backward()
    assert head.weight.grad is None
    plain_objective([replace(segment, states=reference)], head)[0].backward()
    assert_same(states.grad, reference.grad)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation gave."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("softcap", [None, 2.0], ids=["fused", "recomputed"])
def test_no_tensor_is_larger_than_a_chunk_of_logits(softcap, monkeypatch):
    rows, vocab, chunk_rows = 600, 5000, 120
    monkeypatch.setattr(cross_entropy, "_CHUNK_ELEMENTS", chunk_rows * vocab)
    head = make_head(width=4, vocab=vocab, softcap=softcap)
    states = normal(rows, 4).requires_grad_()
    segment = Segment(
        states,
        torch.arange(rows),
        torch.ones(rows),
        entropy_coefficients=torch.ones(rows),
        wants_entropy=True,
    )
    kept = []  # what the forward pass leaves for the backward pass
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x)
    with LargestTensor() as largest:
        with hooks:
            value = objective([segment], head)[0]
        assert sum(x.numel() for x in kept if x is not head.weight) < chunk_rows * vocab
        value.backward()
    assert states.grad is not None
    assert largest.numel == chunk_rows * vocab


@pytest.mark.parametrize(
    ("chunks", "products"),
    [((200, 200, 200, 100), [400, 300]), ((30, 600, 512), [30, 600, 512]), ((512, 1), [512, 1])],
)
def test_chunks_in_half_precision_make_few_products(chunks, products, monkeypatch):
    monkeypatch.setattr(cross_entropy, "_VOCABULARY_BLOCK", 16)
    sums = HeadGradients(make_head(width=6, vocab=40, bias=True), True, True)
    made, add_product = [], sums._add_product
    monkeypatch.setattr(sums, "_add_product", lambda *x: made.append(len(x[0])) or add_product(*x))
    weight, bias = torch.zeros(40, 6), torch.zeros(40)
    for number, rows in enumerate(chunks):
        size = 40 - 7 * (number % 2)  # the rows that may be sampled, now and then
        # Small whole numbers: exact in bfloat16, and so are their products.
        grad_logits = normal(rows, size, seed=number).round().clamp(-1, 1)
        states = (normal(rows, 6, seed=9) > 1.3).to(torch.bfloat16)
        found = sums.add(grad_logits, states, 2.0)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found.float(), grad_logits)
        weight[:size] += grad_logits.T @ states.float()
        bias[:size] += 2 * grad_logits.sum(0)
    totals = sums.totals()
    assert made == products
    assert torch.equal(totals[0], weight)
    assert torch.equal(totals[1], bias)


# --- quiet_star_loss against its formulas ---------------------------------------------------------


@dataclass
class Case:
    """Inputs of quiet_star_loss: B = 2, S = 5, K = 3, T = 2, A = 3, D = 4, V = 7."""

    text: torch.Tensor
    policy: torch.Tensor
    ahead: torch.Tensor
    weight: torch.Tensor
    thoughts: torch.Tensor
    labels: torch.Tensor
    head: OutputHead

    def leaves(self):
        return [self.text, self.policy, self.ahead, self.weight, *self.head.module.parameters()]

    def loss(self, config, temperature=1.0, **options):
        states = ThoughtStates(self.text, self.policy, self.ahead)
        args = (states, self.weight, self.thoughts, self.labels, self.head, config, temperature)
        return quiet_star_loss(*args, **options)

    def rows(self, rows):
        """Some of the texts."""
        return replace(
            self,
            text=self.text[rows],
            policy=self.policy[:, :, rows],
            ahead=self.ahead[:, :, rows],
            weight=self.weight[:, :, rows],
            thoughts=self.thoughts[:, :, rows],
            labels=self.labels[rows],
        )


def make_case(batch=2, **options):
    generator = torch.Generator().manual_seed(20)
    labels = torch.randint(0, 7, (batch, 5), generator=generator)
    labels[0, 2] = IGNORE  # no target inside the text
    labels[1, 4:] = IGNORE  # padding
    return Case(
        text=normal(batch, 5, 4, seed=21).requires_grad_(),
        policy=normal(2, 3, batch, 5, 4, seed=22).requires_grad_(),
        ahead=normal(3, 3, batch, 5, 4, seed=23).requires_grad_(),
        weight=torch.rand(3, 3, batch, 5, generator=generator).requires_grad_(),
        thoughts=torch.randint(0, 6, (2, 3, batch, 5), generator=generator),
        labels=labels,
        head=make_head(4, 7, vocab_size=6, **options),
    )


def baseline(estimator, rewards, k):
    if estimator == "no_baseline":
        return 0.0
    chosen = rewards if estimator == "paper" else rewards[:k] + rewards[k + 1 :]
    return sum(chosen) / len(chosen)


def thought_items(case):
    """Positions with a target among the next ones."""
    valid = [F.pad(case.labels[:, a:] != IGNORE, (0, a)) for a in range(1, len(case.weight) + 1)]
    return int(torch.stack(valid).any(0).sum())


def by_formula(case, config, temperature=1.0):
    """The loss, position by position, in float64: the formulas of the module docstring."""
    head = case.head

    def logits(states):
        return plain_logits(head, states, head.weight, head.bias)

    total = torch.zeros((), dtype=torch.float64)
    batch, length = case.labels.shape
    lookahead, num_thoughts = case.weight.shape[:2]
    labels = case.labels
    n = int((labels[:, 1:] != IGNORE).sum())
    m = thought_items(case)
    for b in range(batch):
        for i in range(length):
            ahead = [a for a in range(1, lookahead + 1) if i + a < length]
            valid = [a for a in ahead if labels[b, i + a] != IGNORE]
            if 1 in valid:
                base = logits(case.text[b, i]).log_softmax(-1)
                total = total - config.base_weight * base[labels[b, i + 1]] / n
            if not valid:
                continue
            rewards, logprobs, entropies = [], [], []
            for k in range(num_thoughts):
                reward = 0.0
                for a in valid:
                    w = case.weight[a - 1, k, b, i].double()
                    base = logits(case.text[b, i + a - 1])
                    own = logits(case.ahead[a - 1, k, b, i])
                    target = labels[b, i + a]
                    mixed = ((1 - w) * base + w * own).log_softmax(-1)[target]
                    own = own.log_softmax(-1)[target]
                    scale = lookahead * num_thoughts * m
                    total = total - config.mixed_weight * mixed / scale
                    total = total - config.thought_weight * own / scale
                    reward += (mixed if config.reward == "mixed" else own).item()
                rewards.append(reward)
                tokens = case.thoughts[:, k, b, i]
                policy = logits(case.policy[:, k, b, i])[:, : head.vocab_size]
                policy = (policy / temperature).log_softmax(-1)
                logprobs.append(policy.gather(1, tokens[:, None]).mean())
                entropies.append(-(policy.exp() * policy).sum(-1).mean())
            for k in range(num_thoughts):
                advantage = rewards[k] - baseline(config.estimator, rewards, k)
                if config.estimator == "paper":
                    advantage = max(advantage, 0.0)
                term = config.policy_weight * advantage * logprobs[k]
                term = term + config.entropy_weight * entropies[k]
                total = total - term / (num_thoughts * m)
    return total


CONFIGS = {
    "default": loss_config(policy_weight=1.0),
    "mixed reward": loss_config(policy_weight=2.0, reward="mixed", thought_weight=0.0),
    "paper": loss_config(policy_weight=1.0, estimator="paper", reward="mixed"),
    "no baseline": loss_config(policy_weight=0.5, estimator="no_baseline"),
    "entropy": loss_config(policy_weight=0.5, entropy_weight=0.7),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_loss_is_its_formula_in_value_and_gradient(options, config):
    case = make_case(**options)
    loss, _ = case.loss(config, temperature=3.0)
    expected = by_formula(case, config, temperature=3.0)
    assert_same(loss, expected, 1e-5)
    actual = torch.autograd.grad(loss, case.leaves(), allow_unused=True)
    wanted = torch.autograd.grad(expected, case.leaves(), allow_unused=True)
    for a, w in zip(actual, wanted, strict=True):
        assert_same(a, w, 1e-5)


@pytest.mark.parametrize("softcap", [None, 2.0], ids=["states", "logits"])
def test_mixing_passes_gradcheck(softcap):
    """The mixing weight, and both predictions, through the NLL of the mixed prediction."""
    config = loss_config(base_weight=0, mixed_weight=1, thought_weight=0, policy_weight=0)
    case = make_case(softcap=softcap, dtype=torch.float64)

    def value(text, ahead, weight):
        return replace(case, text=text, ahead=ahead, weight=weight).loss(config)[0]

    case = replace(case.rows([0]), policy=case.policy[:, :1, :1], thoughts=case.thoughts[:, :1, :1])
    few = (case.text, case.ahead[:2, :1], case.weight[:2, :1])  # A = 2, K = 1: fewer numbers
    inputs = [x.detach().double().requires_grad_() for x in few]
    # As above: float32 values need wide steps.
    assert torch.autograd.gradcheck(
        lambda *x: differentiate_once(value, *x), inputs, eps=1e-2, atol=5e-4, rtol=1e-3
    )


# --- By hand --------------------------------------------------------------------------------------


def test_rewards_gain_and_policy_loss_of_a_case_worked_out_by_hand():
    """S = 3, A = 2, K = 2, T = 1, V = D = 3, logits = states, mixing weight 1/2.

    Text tokens 0 1 2: position 0 has targets 1 and 2, position 1 has target 2, position 2 none.
    Base states are 0: p_base = 1/3. With weight 1/2 mixed logits are half the thought's logits, so
    logits 2 log(2, 1, 1) give mixed probabilities (1/2, 1/4, 1/4). With l = log 2 the mixed
    log-probabilities of the true tokens are

        position 0: thought 0: -l, -l     thought 1: -2l, -2l     (targets a = 1, 2)
        position 1: thought 0: -2l        thought 1: -l

    rewards      position 0: -2l, -4l     position 1: -2l, -l
    advantages   leave-one-out, position 0: 2l, -2l; position 1: -l, l
    N = 2 valid targets at a = 1.
    mixed        ((l + l) + (2l + 2l) + 2l + l) / (A K N) = 9l / 8
    policy       token log-probabilities -l for thought 0 and -2l for thought 1 (both positions):
                 -[2l (-l) - 2l (-2l) - l (-l) + l (-2l)] / (K N) = -[-2 + 4 + 1 - 2] l^2 / 4
                 = -l^2 / 4
    base_nll     log 3;    mixed_nll  a = 1 only: (l + 2l + 2l + l) / 4 = 3l/2
    gain         log 3 - 3l/2
    gain_beyond_next   the one target at a = 2: log 3 - (l + 2l) / 2
    reward       against the base: the sum of rewards is -9l; the base's log-probabilities are
                 -2 log 3 twice and -log 3 twice: (6 log 3 - 9l) / 4
    spread       standard deviations sqrt(2) l and l / sqrt(2); their mean 3 l / (2 sqrt(2))
    """
    likely = 2 * math.log(2)

    def ahead(a, k, i, token):
        table[a - 1, k, 0, i, token] = likely

    table = torch.zeros(2, 2, 1, 3, 3)
    ahead(1, 0, 0, 1), ahead(2, 0, 0, 2)  # the true tokens
    ahead(1, 1, 0, 0), ahead(2, 1, 0, 0)  # wrong ones: the true ones get 1/4
    ahead(1, 0, 1, 0), ahead(1, 1, 1, 2)
    policy = torch.zeros(1, 2, 1, 3, 3)
    policy[..., 0] = math.log(2)  # probabilities (1/2, 1/4, 1/4)
    case = Case(
        text=torch.zeros(1, 3, 3),
        policy=policy,
        ahead=table,
        weight=torch.full((2, 2, 1, 3), 0.5),
        thoughts=torch.tensor([0, 1]).view(1, 2, 1, 1).expand(1, 2, 1, 3),
        labels=torch.tensor([[0, 1, 2]]),
        head=identity_head(3),
    )
    bit = math.log(2)
    off = dict.fromkeys(("base_weight", "mixed_weight", "thought_weight", "policy_weight"), 0.0)
    mixed, _ = case.loss(loss_config(**off | {"mixed_weight": 1.0}, reward="mixed"))
    assert mixed.item() == pytest.approx(9 * bit / 8, rel=1e-6)
    loss, scored = case.loss(loss_config(**off | {"policy_weight": 1.0}, reward="mixed"))
    assert loss.item() == pytest.approx(-(bit**2) / 4, rel=1e-5)
    means = thought_metrics(scored).means()
    expected = {
        "base_nll": math.log(3),
        "mixed_nll": 3 * bit / 2,
        "gain": math.log(3) - 3 * bit / 2,
        "gain_beyond_next": math.log(3) - 3 * bit / 2,
        "mixing_weight": 0.5,
        "reward": (6 * math.log(3) - 9 * bit) / 4,
        "reward_std": 3 * bit / (2 * math.sqrt(2)),
        "policy_reward": -9 * bit / 4,
        "policy_reward_std": 3 * bit / (2 * math.sqrt(2)),
        "dropped_fraction": 0.0,
        "no_signal_fraction": 0.0,
        "identical_fraction": 0.0,
        "distinct_token_ratio": 1.0,
        "thought_logprob": -3 * bit / 2,
        "entropy": 3 * bit / 2,  # the estimate from the sampled tokens
    }
    assert means == pytest.approx(expected, rel=1e-5)
    # Where all thoughts of a position have the same reward, but for rounding of large ones.
    alike = scored.reward[..., :1] * torch.tensor([1.0, 1 + 3e-7]) * 100
    means = thought_metrics(replace(scored, reward=alike)).means()
    assert means["no_signal_fraction"] == 1.0


def identity_head(width):
    layer = nn.Linear(width, width, bias=False)
    layer.weight = nn.Parameter(torch.eye(width))
    return OutputHead(layer, layer.weight, None)


# --- Properties -----------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 2.0], ids=["linear", "soft-capped"])
@pytest.mark.parametrize("reward", ["mixed", "thought"])
def test_reward_gets_no_gradient(reward, softcap):
    config = loss_config(
        base_weight=0, mixed_weight=0, thought_weight=0, policy_weight=1, reward=reward
    )
    case = make_case(softcap=softcap)
    case.loss(config)[0].backward()
    assert case.policy.grad.any()
    for state in (case.text, case.ahead, case.weight):
        assert state.grad is None or not state.grad.any()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_positions_without_a_target_change_nothing(config):
    case = make_case()
    loss, scored = case.loss(config)
    loss.backward()
    valid = torch.zeros(3, 2, 5, dtype=torch.bool)
    for a in range(1, 4):
        valid[a - 1, :, : 5 - a] = case.labels[:, a:] != IGNORE
    assert torch.equal(scored.valid.movedim(-1, 0), valid)
    assert not case.ahead.grad.movedim(1, 0)[:, ~valid].any()
    assert not case.weight.grad.movedim(1, 0)[:, ~valid].any()
    assert not case.policy.grad[:, :, ~valid.any(0)].any()
    # Other numbers there, and two more columns of padding, give the same loss and figures.
    noisy = make_case()
    with torch.no_grad():
        noisy.ahead.movedim(1, 0)[:, ~valid] = 50.0
        noisy.policy[:, :, ~valid.any(0)] = -30.0
    padded = replace(
        noisy,
        text=pad(noisy.text, 1, 40.0),
        policy=pad(noisy.policy, 3, 40.0),
        ahead=pad(noisy.ahead, 3, 40.0),
        weight=pad(noisy.weight, 3, 0.9),
        thoughts=pad(noisy.thoughts, 3, 1),
        labels=pad(noisy.labels, 1, IGNORE),
    )
    padded_loss, padded_scored = padded.loss(config)
    assert padded_loss.item() == pytest.approx(loss.item(), rel=1e-6)
    figures = thought_metrics(padded_scored).means()
    assert figures == pytest.approx(thought_metrics(scored).means(), rel=1e-5)


def pad(x, axis, value):
    shape = list(x.shape)
    shape[axis] = 2
    return torch.cat([x, x.new_full(shape, value)], axis)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_parts_of_a_batch_with_the_same_num_items_add_up_to_the_whole(config):
    case = make_case(batch=4)
    num_items = (case.labels[:, 1:] != IGNORE).sum()
    whole, scored = case.loss(config)
    counts = {"num_items": num_items, "num_thought_items": thought_items(case)}
    parts = [case.rows(rows).loss(config, **counts) for rows in ([0], [1, 2, 3])]
    assert sum(loss for loss, _ in parts).item() == pytest.approx(whole.item(), rel=1e-6)
    sums = thought_metrics(parts[0][1]) + thought_metrics(parts[1][1])
    assert sums.means() == pytest.approx(thought_metrics(scored).means(), rel=1e-5)
    gradient = torch.autograd.grad(whole, case.text, retain_graph=True)[0]
    summed = torch.autograd.grad(sum(loss for loss, _ in parts), case.text)[0]
    assert_same(summed, gradient, 1e-6)


def test_padding_of_a_text_changes_neither_its_thoughts_nor_its_loss():
    model = thinking_model(loss={"policy_weight": 1.0})
    texts = random_texts(2, 8)
    padded = torch.cat([texts, torch.full((2, 3), 257)], 1)
    mask = torch.arange(11).expand(2, -1) < 8
    ids = torch.tensor([3, 4])
    plain = model(texts, sample_ids=ids)
    other = model(padded, attention_mask=mask, sample_ids=ids)
    assert torch.equal(plain.thoughts, other.thoughts[:, :8])
    assert other.loss.item() == pytest.approx(plain.loss.item(), rel=1e-5)
    assert other.metrics.means() == pytest.approx(plain.metrics.means(), rel=1e-4)
