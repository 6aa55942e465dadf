"""Every supported architecture against the per-position loop of `reference`."""

from dataclasses import dataclass

import pytest
import torch
from architectures import SUPPORTED, tiny_architecture
from conftest import fixed_init_
from reference import Reference, run_reference
from torch import Tensor

from quietstar import QuietStarForCausalLM
from quietstar.attention import passes
from quietstar.attention.layout import NO_TOKEN
from quietstar.config import MixingHeadConfig, ThoughtsConfig, loss_config
from quietstar.model.scoring import read_thoughts
from quietstar.model.self_check import use_thinking_attention
from quietstar.sampling.thoughts import Texts, ThoughtBatch

TOLERANCE = 1e-5  # relative; float32 rounds to 6e-8, and the sums here have some 100 terms
# Attention is peaked, so its gradients are differences of large numbers, and rounding moves with
# the alignment of memory: the float32 loop itself is up to 1.1e-5 (granite, whose default scale of
# the scores is 1) from the loop in float64, as far as ours. A wrong mask or scale is off by 1e-2.
GRADIENT_TOLERANCE = 3e-5

# T = A = K = 2 and 6 tokens: longer than the window (4) that tiny copies have.
LENGTH = 6
LOSS = loss_config(
    base_weight=0.5,
    mixed_weight=0.7,
    thought_weight=0.3,
    policy_weight=1.0,
    reward="thought",
)


@dataclass(frozen=True)
class Comparison:
    """Worst relative errors, float32.

    Attributes:
        forward: By table: states, log-probabilities, loss.
        gradient: By parameter.
        path: ``flash``, ``dense``, or ``flash, dense`` (by layer).
    """

    forward: dict[str, float]
    gradient: dict[str, float]
    path: str


def build(
    name: str, loss=LOSS, length: int = 2, lookahead: int = 2, num_markers=(1, 1), base=None
) -> QuietStarForCausalLM:
    """A tiny Quiet-STaR model of an architecture; two rows of its vocabulary are padding."""
    base = tiny_architecture(name) if base is None else base
    use_thinking_attention(base)
    vocab_size = base.get_input_embeddings().weight.shape[0] - 2
    model = QuietStarForCausalLM(
        base,
        ThoughtsConfig(length=length, lookahead=lookahead, num_thoughts=2),
        MixingHeadConfig(floor=0.05),
        loss,
        vocab_size,
        num_markers=num_markers,
    )
    fixed_init_(model.mixing_head)
    generator = torch.Generator().manual_seed(2)
    for vector in (model.start_embedding, model.end_embedding):
        torch.nn.init.normal_(vector, generator=generator)
    return model.eval()


def compare(
    model: QuietStarForCausalLM,
    lengths: list[int],
    labels: Tensor | None = None,
    thoughts: ThoughtBatch | None = None,
) -> Comparison:
    """Run the model and the loop on the same texts and thoughts.

    Args:
        model: From `build`.
        lengths: Real tokens of each text.
        labels: As of the model's forward.
        thoughts: Instead of sampled ones.
    """
    input_ids, mask = batch(model, lengths)
    paths: set[str] = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "choose_kernel", _recording(passes.choose_kernel, paths))
        output = model(
            input_ids, mask, labels, sample_ids=torch.arange(len(lengths)), thoughts=thoughts
        )
    model.zero_grad()
    output.loss.backward()
    expected = run_reference(model, input_ids, lengths, output.thoughts.transpose(1, 2), labels)
    expected.loss.backward()
    pairs = _tables(model, input_ids, mask, labels, output.thoughts, expected)
    pairs["loss"] = (output.loss.detach(), expected.loss.detach())
    return Comparison(
        {name: relative_error(*pair) for name, pair in pairs.items()},
        gradient_errors(model, expected.model),
        ", ".join(sorted(paths, reverse=True)),
    )


def batch(model: QuietStarForCausalLM, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Texts padded on the right, and their mask."""
    generator = torch.Generator().manual_seed(1)
    shape = (len(lengths), max(lengths))
    input_ids = torch.randint(0, model.vocab_size, shape, generator=generator)
    return input_ids, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def _recording(choose_kernel, paths: set[str]):
    def choose(*args, **keywords):
        kernel = choose_kernel(*args, **keywords)
        paths.add("dense" if kernel is None else "flash")
        return kernel

    return choose


@torch.no_grad()
def _tables(
    model: QuietStarForCausalLM,
    input_ids: Tensor,
    mask: Tensor,
    labels: Tensor | None,
    thoughts: Tensor,
    expected: Reference,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs (ours, the loop's) of every table, where there is something to compare."""
    states, _ = read_thoughts(model, input_ids, thoughts, None)
    # Scored at temperature 1: the policy's log-probabilities are compared where it is 1 too.
    scored = model.score(input_ids, thoughts, mask, labels)
    assert torch.equal(scored.valid.permute(2, 0, 1), expected.valid)
    valid, real = expected.valid, expected.real
    by_thought = valid.unsqueeze(1).expand_as(expected.mixing_weight)
    is_token = thoughts.permute(3, 2, 0, 1) != NO_TOKEN
    sampled = valid.any(0) & is_token
    written = real & is_token
    pairs = {
        "text": (states.text[real], expected.text[real]),
        "policy": (states.policy[written], expected.policy[written]),
    }
    reached = expected.reached.unsqueeze(1).expand(states.ahead.shape[:-1])
    pairs["ahead"] = (states.ahead[reached], expected.ahead[reached])
    base = scored.base_logprobs.permute(2, 0, 1)
    pairs["base_logprobs"] = (base[valid], expected.base_logprobs[valid])
    for name in ("mixing_weight", "thought_logprobs", "mixed_logprobs"):
        ours = getattr(scored, name).permute(3, 2, 0, 1)
        pairs[name] = (ours[by_thought], getattr(expected, name)[by_thought])
    if model.objective.settings.estimator != "paper":
        ours = scored.logprobs.permute(3, 2, 0, 1)
        pairs["policy_logprobs"] = (ours[sampled], expected.policy_logprobs[sampled])
    return pairs


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """Largest difference over the largest entry of the reference; infinite for NaN."""
    error = ((ours - reference).abs().max() / reference.abs().max()).item()
    return error if error == error else float("inf")


def gradient_errors(model: torch.nn.Module, reference: torch.nn.Module) -> dict[str, float]:
    """The same for the gradient of every parameter."""
    expected = {name: _gradient(p) for name, p in reference.named_parameters()}
    largest = max(g.abs().max().item() for g in expected.values())
    errors = {}
    for name, parameter in model.named_parameters():
        difference = (_gradient(parameter) - expected[name]).abs().max().item()
        own = expected[name].abs().max().item()
        # Small gradients are sums of large ones that cancel: their rounding is that of the large
        # ones, whose scale is left three digits to spare. What is all rounding has the full scale:
        # a key bias without rotary embeddings adds the same to all scores of a query, so that its
        # gradient is zero (BioGPT: 4e-16 in float64, 3e-7 in float32, here and in the loop).
        scale = largest if own < 1e-6 * largest else max(own, 1e-3 * largest)
        error = difference / scale
        errors[name] = error if error == error else float("inf")
    return errors


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def check(comparison: Comparison, gradient_tolerance: float = GRADIENT_TOLERANCE) -> None:
    wrong = {name: e for name, e in comparison.forward.items() if not e < TOLERANCE}
    assert not wrong, wrong
    wrong = {name: e for name, e in comparison.gradient.items() if not e < gradient_tolerance}
    assert not wrong, wrong


@pytest.mark.parametrize("name", SUPPORTED)
def test_states_losses_and_gradients_equal_the_per_position_loop(name):
    check(compare(build(name), [LENGTH, LENGTH - 2]))


def early_thoughts(model: QuietStarForCausalLM, lengths: list[int]) -> ThoughtBatch:
    """Sampled thoughts that are cut anywhere, also to nothing; some keep their whole length."""
    input_ids, mask = batch(model, lengths)
    drawn = model.draw(input_ids, mask, num_thoughts=2, temperature=1.0)
    generator = torch.Generator().manual_seed(6)
    most = drawn.tokens.shape[-1]
    cut = torch.randint(0, most + 1, drawn.lengths.shape, generator=generator)
    assert set(cut.flatten().tolist()) == set(range(most + 1)), "every length is there"
    texts = Texts(drawn.input_ids, drawn.labels, None, drawn.sample_ids)
    return ThoughtBatch.of_texts(texts, drawn.positions, drawn.tokens, cut)


@pytest.mark.parametrize("name", SUPPORTED)
def test_thoughts_that_end_early_equal_the_per_position_loop(name):
    model = build(name, length=3)
    lengths = [LENGTH, LENGTH - 2]
    check(compare(model, lengths, thoughts=early_thoughts(model, lengths)))


@pytest.mark.parametrize("learn_chunk_tokens", [None, 1, 60])
def test_thoughts_that_end_early_do_so_in_any_groups(learn_chunk_tokens):
    model = build("llama", length=3)
    model.learn_chunk_tokens = learn_chunk_tokens
    lengths = [LENGTH, LENGTH - 2]
    check(compare(model, lengths, thoughts=early_thoughts(model, lengths)))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_it_does_so_for_texts_without_padding(name):
    check(compare(build(name), [LENGTH, LENGTH]))


@pytest.mark.parametrize("estimator", ["leave_one_out", "paper"])
@pytest.mark.parametrize("reward", ["mixed", "thought"])
@pytest.mark.parametrize("name", ["qwen3", "gemma2"])  # fused head; soft-capped logits
def test_it_does_so_for_every_estimator_and_reward(name, reward, estimator):
    loss = loss_config(policy_weight=1.0, estimator=estimator, reward=reward)
    check(compare(build(name, loss), [LENGTH, LENGTH - 2]))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_it_does_so_where_some_tokens_are_no_targets(name):
    model = build(name)
    labels = batch(model, [LENGTH, LENGTH - 2])[0].clone()
    labels[0, :3] = -100  # position 0 has no target left: its thoughts earn and teach nothing
    labels[1, 2] = -100
    check(compare(model, [LENGTH, LENGTH - 2], labels))


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "gpt_oss"])
def test_greedy_thoughts_are_the_most_likely_tokens_of_the_loop(name):
    model = build(name)
    lengths = [LENGTH, LENGTH - 2]
    input_ids, mask = batch(model, lengths)
    thoughts = model.draw(input_ids, mask, num_thoughts=2, temperature=None).tokens
    expected = run_reference(model, input_ids, lengths, thoughts.transpose(1, 2))
    ours = thoughts.permute(3, 2, 0, 1)
    assert torch.equal(ours[..., expected.real], expected.policy_argmax[..., expected.real])
