"""What a model writes after thoughts, for rewards that read it."""

import pytest
import torch
from test_parity import build
from tiny import plain_model, random_texts, thinking_model, tuning_by

from quietstar.attention.layout import text_lookahead
from quietstar.config import ThoughtsConfig
from quietstar.errors import UserError
from quietstar.generation import continuations
from quietstar.generation.continuations import continue_thoughts
from quietstar.model.scoring import read_thoughts
from quietstar.rewards import asks_policy
from quietstar.sampling.noise import keyed_uniform
from quietstar.sampling.rollout import sample_logits
from quietstar.sampling.thoughts import Sampling, Texts, ThoughtBatch

LENGTH, NEW, SEED = 3, 4, 7
POSITIONS = torch.tensor([[0, 4], [5, -1], [2, 8]])
LENGTHS = torch.tensor([[[3, 1], [2, 3]], [[3, 3], [0, 0]], [[1, 2], [3, 0]]])


def some_thoughts(model, ends_early=True):
    ids = random_texts(3, 9, vocab=model.vocab_size)
    texts = Texts(ids, ids, None, torch.tensor([11, 5, 8]))
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, model.vocab_size, (3, 2, 2, LENGTH), generator=generator)
    lengths = LENGTHS if ends_early else torch.full_like(LENGTHS, LENGTH)
    return ThoughtBatch.of_texts(texts, POSITIONS, tokens, lengths)


def endless(model):
    """Take away what would end a continuation."""
    model.tokenizer = None
    model.causal_lm.generation_config.eos_token_id = None


def expected_token(model, thoughts, text, place, k, written, temperature):
    """The next token after a thought and what was written, by the pass that training learns by."""
    position, index = int(thoughts.positions[text, place]), len(written)
    ids = torch.cat([thoughts.input_ids[text, : position + 1], written])[None]
    thought = thoughts.tokens[text, place, k].view(1, 1, 1, LENGTH)
    padded = torch.cat([ids, ids[:, :1]], 1)  # a lookahead ends inside its text
    states, weight = read_thoughts(
        model, padded, thought, torch.tensor([[position]]), lookahead=index + 1
    )
    head = model.output_head
    text_states = text_lookahead(states.text, index + 1, torch.tensor([[position]]))
    base = text_states.gather(head.logits(text_states.rows))[-1, 0, 0]
    mixed = torch.lerp(base, head.logits(states.ahead[-1, 0, 0, 0]), weight[-1, 0, 0, 0])
    sample_id, at = thoughts.sample_ids[text : text + 1], torch.tensor([[position]])
    noise = keyed_uniform(SEED, sample_id, 2, LENGTH + index, at)[k]
    return sample_logits(mixed[None, : model.vocab_size], noise, Sampling(2, LENGTH, temperature))[
        0, 0
    ]


def assert_continues(model, thoughts, temperature=1.0):
    written = continue_thoughts(model, thoughts, NEW, temperature, SEED)
    assert written.shape == (3, 2, 2, NEW)
    with torch.no_grad():
        for text, place, k in torch.cartesian_prod(*map(torch.arange, (3, 2, 2))).tolist():
            row = written[text, place, k]
            if thoughts.positions[text, place] < 0:
                assert (row == -1).all()
                continue
            for index in range(NEW):
                token = expected_token(model, thoughts, text, place, k, row[:index], temperature)
                assert token == row[index], (text, place, k, index)
    return written


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mistral", "gpt_oss", "deepseek_v3"])
def test_a_continuation_is_drawn_from_what_training_learns(name):
    model = build(name).eval()
    model.configure(ThoughtsConfig(length=LENGTH, lookahead=2, num_thoughts=2))
    endless(model)
    assert_continues(model, some_thoughts(model))


@pytest.mark.parametrize("changes", [
    {"head": {"fixed_weight": 1.0}},
    {"head": {"fixed_weight": 0.3}},
    {"tuning": tuning_by("prefix")},
    {"tuning": {"method": "lora"}},
], ids=["thought alone", "fixed", "prefix", "lora"])  # fmt: skip
def test_it_follows_the_head_and_the_adapters(changes):
    model = thinking_model(thoughts={"length": LENGTH}, **changes)
    endless(model)
    sampled = assert_continues(model, some_thoughts(model))
    likely = assert_continues(model, some_thoughts(model, ends_early=False), temperature=None)
    assert not torch.equal(sampled, likely)


def test_it_does_not_depend_on_how_many_run_at_once(monkeypatch):
    model = thinking_model(thoughts={"length": LENGTH})
    thoughts = some_thoughts(model)
    together = continue_thoughts(model, thoughts, NEW, 1.0, SEED)
    alone = continue_thoughts(model, thoughts.part(slice(2, 3), slice(None)), NEW, 1.0, SEED)
    monkeypatch.setattr(continuations, "CACHED_TOKENS", 1)
    assert torch.equal(together, continue_thoughts(model, thoughts, NEW, 1.0, SEED))
    assert torch.equal(together[2:], alone)
    assert not torch.equal(together, continue_thoughts(model, thoughts, NEW, 1.0, SEED + 1))


def test_it_ends_behind_the_end_of_the_text():
    model = thinking_model(plain_model(), thoughts={"length": LENGTH})
    thoughts = some_thoughts(model)
    endless(model)
    whole = continue_thoughts(model, thoughts, NEW, 1.0, SEED)
    model.causal_lm.generation_config.eos_token_id = [int(whole[0, 0, 0, 1])]
    cut = continue_thoughts(model, thoughts, NEW, 1.0, SEED)
    assert cut[0, 0, 0].tolist() == [int(whole[0, 0, 0, 0]), -1, -1, -1]
    others = (whole != whole[0, 0, 0, 1]).all(-1)
    assert others.sum() > 5
    assert torch.equal(cut[others], whole[others])


def test_a_batch_without_positions_has_none():
    model = thinking_model(thoughts={"length": LENGTH})
    nowhere = some_thoughts(model)
    nowhere.positions.fill_(-1)
    try:
        assert (continue_thoughts(model, nowhere, NEW) == -1).all()
    finally:
        POSITIONS.copy_(torch.tensor([[0, 4], [5, -1], [2, 8]]))


def test_what_the_model_has_no_positions_for_is_refused():
    model = thinking_model(thoughts={"length": LENGTH})
    room = model.causal_lm.config.max_position_embeddings
    with pytest.raises(UserError, match=rf"continuation of {room} tokens .*judge.continuation"):
        continue_thoughts(model, some_thoughts(model), room)


# --- In a reward ----------------------------------------------------------------------------------
def test_a_reward_reads_what_follows_behind_thoughts():
    model, seen = thinking_model(thoughts={"positions": "random"}), []

    @asks_policy
    def correct(thoughts, scores):
        answers = scores.continuations(thoughts, 3, stop=["e"])
        seen.append((thoughts, answers))
        return answers.table([
            [float(text[:1] == target[:1]) for text in texts]
            for texts, target in zip(answers.texts, answers.targets, strict=True)
        ])  # fmt: skip

    model.reward, model.reward_name = correct, "mine"
    ids = torch.tensor([list(b"one plus two is three"), list(b"abcdefghijklmnopqrstu")])
    labels = ids.clone()
    labels[:, 16:] = -100
    model(ids, labels=labels, seed=5).loss.backward()
    ((thoughts, answers),) = seen
    written = continue_thoughts(model, thoughts, 3, 1.0, seed=5)
    for n, (text, place) in enumerate(answers.places.tolist()):
        position = int(thoughts.positions[text, place])
        whole = bytes(ids[text].tolist()).decode()
        assert answers.prompts[n] == whole[: position + 1]
        assert answers.targets[n] == whole[position + 1 : 16].partition("e")[0]
        for k, said in enumerate(answers.texts[n]):
            tokens = [t for t in written[text, place, k].tolist() if t >= 0]
            assert said == model.tokenizer.decode(tokens).partition("e")[0]
    assert len(answers.prompts) == int((thoughts.positions >= 0).sum())


@pytest.mark.parametrize("numbers", [[], [[7.0]], [[1.0]] * 4, [[1.0, 2.0, 3.0]] * 4])
def test_a_table_has_a_number_for_every_text(numbers):
    model = thinking_model(thoughts={"positions": "random"})

    @asks_policy
    def wrong(thoughts, scores):
        return scores.continuations(thoughts).table(numbers)

    model.reward, model.reward_name = wrong, "mine"
    with pytest.raises(UserError, match=r"table of continuations: got \d+ numbers in \d rows"):
        model(random_texts())


def test_later_updates_keep_what_an_outside_reward_said():
    model, calls = thinking_model(), []

    @asks_policy
    def outside(thoughts, scores):
        calls.append(1)
        return torch.rand(thoughts.lengths.shape, generator=torch.Generator().manual_seed(1))

    model.reward, model.reward_name = outside, "mine"
    texts = random_texts()
    first = model(texts)
    again = model(texts, thoughts=first.drawn)
    assert calls == [1]
    rewards = [x.metrics.means()["policy_reward"] for x in (first, again)]
    assert rewards[0] == rewards[1] > 0
    model.learn_chunk_tokens = 8  # in groups
    calls.clear()
    grouped = model(
        texts,
        thoughts=first.drawn.__class__(**{**vars(first.drawn), "reward": None, "advantage": None}),
    )
    assert calls
    calls.clear()
    model(texts, thoughts=grouped.drawn)
    assert not calls
