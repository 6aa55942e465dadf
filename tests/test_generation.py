"""Thinking before each new token: equal to the slow way, which runs everything again each time."""

import copy
import re

import pytest
import torch
from reference import _embed, _run, mixing_weight
from test_parity import build
from tiny import GPT2, LLAMA, plain_model, random_texts, think, thinking_model, tuning_by
from transformers import TextStreamer
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList

from quietstar import QuietStarForCausalLM
from quietstar.cli import main as cli
from quietstar.config import ThoughtsConfig, TuningConfig
from quietstar.data import load_tokenizer
from quietstar.errors import UserError
from quietstar.evaluation.controls import CONTROLS
from quietstar.generation.gates import Gate
from quietstar.generation.generate import most_tokens
from quietstar.model.merging import merge

LENGTH, NEW = 3, 5


def slow_step(model, text):
    """Greedy thought and mixed logits after a text, one ordinary sequence at a time."""
    prefix = _embed(model, text)
    base_states, base_logits = _run(model, prefix)
    block = model.start_embedding[None]
    thought = []
    for _ in range(model.thoughts.length):
        logits = _run(model, torch.cat([prefix, block]))[1][-1, : model.vocab_size]
        thought.append(logits.argmax(-1))
        block = torch.cat([block, _embed(model, thought[-1][None])])
    block = torch.cat([block, model.end_embedding[None]])
    states, logits = _run(model, torch.cat([prefix, block]))
    weight = mixing_weight(model, base_states[-1], states[-1])
    return torch.stack(thought), (1 - weight) * base_logits[-1] + weight * logits[-1]


@torch.no_grad()
def slow_generate(model, text, new):
    model = copy.deepcopy(model)
    model.causal_lm.set_attn_implementation("eager")
    thoughts, every = [], []
    for _ in range(new):
        thought, logits = slow_step(model, text)
        thoughts.append(thought)
        every.append(logits)
        text = torch.cat([text, logits.argmax(-1)[None]])
    return text, torch.stack(thoughts), torch.stack(every)


def left_padded(lengths, vocab=256):
    """Prompts, their batch, and its mask."""
    prompts = [random_texts(1, n, vocab, seed=n)[0] for n in lengths]
    width = max(lengths)
    batch = torch.stack([torch.cat([p.new_full((width - len(p),), 7), p]) for p in prompts])
    mask = torch.stack([torch.arange(width) >= width - n for n in lengths]).long()
    return prompts, batch, mask


def generated(model, batch, mask, **arguments):
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    return model.generate(batch, attention_mask=mask, **(settings | arguments))


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "gemma2", "mistral", "qwen3", "gpt_oss", "cohere2", "gpt_neox"]
)
def test_generation_equals_the_slow_way_token_by_token(name):
    model = build(name)
    model.configure(ThoughtsConfig(length=LENGTH))
    prompts, batch, mask = left_padded([7, 1, 4, 9, 2], model.vocab_size)
    out = generated(model.eval(), batch, mask)
    for row, prompt in enumerate(prompts):
        text, thoughts, logits = slow_generate(model, prompt, NEW)
        assert out.sequences[row, -NEW - len(prompt) :].tolist() == text.tolist()
        assert torch.equal(out.thoughts[row, :, 0], thoughts)
        for step, wanted in enumerate(logits):
            torch.testing.assert_close(out.logits[step][row], wanted, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("fields", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("method", ["lora", "houlsby", "ia3"])
def test_adapters_generate_as_the_slow_way(fields, method):
    model = thinking_model(plain_model(fields), thoughts={"length": LENGTH},
                           tuning={"method": method, "lora_r": 2})  # fmt: skip
    prompts, batch, mask = left_padded([3, 6])
    out = generated(model.eval(), batch, mask)
    for row, prompt in enumerate(prompts):
        text, _, _ = slow_generate(model, prompt, NEW)
        assert out.sequences[row, -NEW - len(prompt) :].tolist() == text.tolist()


STOP = {"stop": [chr(c) for c in range(32, 72)]}
LONG = STOP | {"length": 12, "start_init": "ab", "end_init": "xyz"}  # texts are done at their times


@pytest.mark.parametrize("thoughts", [{}, STOP, LONG], ids=["whole", "early", "long"])
@pytest.mark.parametrize("num_thoughts", [1, 2])
@pytest.mark.parametrize("method", ["full", "prompt", "prefix"])
@pytest.mark.parametrize("temperature", [None, 1.0])
def test_generation_thinks_what_think_thinks(method, temperature, num_thoughts, thoughts):
    """Also with virtual tokens, several thoughts, sampled ones (noise is keyed), early ends."""
    torch.manual_seed(0)  # adapters and virtual tokens do not depend on the tests before
    model = thinking_model(thoughts={"length": LENGTH} | thoughts, tuning=tuning_by(method))
    prompts, batch, mask = left_padded([5, 2, 8])
    out = generated(model.eval(), batch, mask, num_thoughts=num_thoughts,
                    thought_temperature=temperature, seed=3)  # fmt: skip
    assert (out.thoughts == -1).any() == bool(thoughts)
    for row, prompt in enumerate(prompts):
        text = out.sequences[row, -NEW - len(prompt) :]
        seen = think(model, text[None], num_thoughts=num_thoughts, temperature=temperature, seed=3,
                     sample_ids=torch.tensor([row]))  # fmt: skip
        places = slice(len(prompt) - 1, len(text) - 1)
        assert torch.equal(out.thoughts[row], seen.tokens[0, places])
        mixed = seen.mixed_logprobs[0, places, :, 0].exp().mean(1).log()
        for step, token in enumerate(text[len(prompt) :]):
            logprob = out.logits[step][row].log_softmax(-1)[token]
            torch.testing.assert_close(logprob, mixed[step], rtol=1e-5, atol=2e-5)


def test_without_thinking_it_is_the_plain_model():
    model = thinking_model().eval()
    _, batch, mask = left_padded([5, 1, 8])
    ours = generated(model, batch, mask, think=False)
    plain = model.causal_lm.generate(
        batch, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    assert torch.equal(ours.sequences, plain)
    assert ours.thoughts.shape == (3, NEW, 0, model.thoughts.length)


class Forbid(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores.index_fill(-1, torch.arange(128), float("-inf"))


def test_arguments_of_transformers_are_heeded(capsys):
    model = thinking_model().eval()
    tokenizer = load_tokenizer("bytes")
    batch = random_texts(1, 4)
    plain = {"attention_mask": torch.ones_like(batch), "pad_token_id": 0}
    whole = model.generate(batch, max_new_tokens=6, eos_token_id=None, do_sample=False, **plain)
    assert whole.shape == (1, 10)
    # ends at the end-of-text token
    stopped = model.generate(
        batch, max_new_tokens=6, eos_token_id=int(whole[0, 5]), do_sample=False, **plain
    )
    assert stopped.tolist() == whole[:, :6].tolist()
    # logits processors, several sequences, sampling by transformers' seed
    settings = {"max_new_tokens": 3, "do_sample": True, "num_return_sequences": 4, "top_p": 0.9}
    settings |= {"logits_processor": LogitsProcessorList([Forbid()]), "eos_token_id": None}
    torch.manual_seed(0)
    first = model.generate(input_ids=batch, **settings, **plain)
    torch.manual_seed(0)
    assert torch.equal(first, model.generate(batch, **settings, **plain))
    assert first.shape == (4, 7)
    assert (first[:, 4:] >= 128).all()
    assert len({tuple(row) for row in first.tolist()}) > 1
    # streamers
    capsys.readouterr()
    model.generate(batch, streamer=TextStreamer(tokenizer), max_new_tokens=6, eos_token_id=None,
                   do_sample=False, **plain)  # fmt: skip
    assert tokenizer.decode(whole[0]).strip() in capsys.readouterr().out


def test_rows_that_ended_are_padded_and_do_not_disturb_others():
    model = thinking_model().eval()
    _, batch, mask = left_padded([4, 6])
    alone = generated(model, batch[1:], mask[1:]).sequences[0]
    end = int(generated(model, batch, mask).sequences[0, -NEW])
    assert end not in alone[-NEW:]
    both = generated(model, batch, mask, eos_token_id=end).sequences
    assert both[0, -NEW:].tolist() == [end, *[0] * (NEW - 1)]
    assert torch.equal(both[1], alone)


def test_the_cache_grows_with_the_text_and_not_with_thoughts():
    from quietstar.sampling.decoding import Decoder
    from quietstar.sampling.thoughts import Sampling

    model = thinking_model(plain_model(max_position_embeddings=512)).eval()
    text = random_texts(1, 9)
    decoder = Decoder(
        model.causal_lm, model.output_head, model.start_vectors, model.end_vectors,
        Sampling(2, 4, None), text[:, :-1], torch.ones(1, 8, dtype=torch.bool), torch.arange(1),
    )  # fmt: skip
    sizes = set()
    for _ in range(200):
        decoder.think(decoder.append(text[:, 0], opens=True))
        sizes |= {(k.shape[2:], v.shape[2:]) for k, v in decoder.cache.blocks.values()}
    assert sizes == {((2, 6, 8), (2, 6, 8))}
    assert {k.shape[2] for k, _ in decoder.cache.text.values()} == {8 + 2 * (128 + 6)}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_beams": 3}, "num_beams: 3 cannot be"),
        ({"max_new_tokens": 80}, r"max_new_tokens \(80\): must be at most .* texts of 61 tokens"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(arguments, words):
    model = thinking_model().eval()
    batch = random_texts(1, 4)
    with pytest.raises(UserError, match=words):
        model.generate(batch, attention_mask=torch.ones_like(batch), pad_token_id=0, **arguments)


def test_texts_are_needed():
    with pytest.raises(UserError, match="no texts are given"):
        thinking_model().eval().generate(max_new_tokens=2)


def test_pause_thoughts_are_pauses():
    model = thinking_model(thoughts={"sampler": "pause", "length": LENGTH}).eval()
    _, batch, mask = left_padded([3])
    assert (generated(model, batch, mask).thoughts == model.pause_token_id).all()


def test_a_merged_model_generates_the_same(tmp_path):
    plain_model().save_pretrained(tmp_path / "base")
    load_tokenizer("bytes").save_pretrained(tmp_path / "base")
    model = QuietStarForCausalLM.from_base(
        str(tmp_path / "base"), tuning=TuningConfig(method="lora"),
        thoughts=ThoughtsConfig(length=LENGTH),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(tmp_path / "model", load_tokenizer("bytes"))
    merge(tmp_path / "model", tmp_path / "merged")
    _, batch, mask = left_padded([5, 3])
    one, other = (
        generated(QuietStarForCausalLM.from_pretrained(tmp_path / name), batch, mask)
        for name in ("model", "merged")
    )
    assert torch.equal(one.sequences, other.sequences)
    assert torch.equal(one.thoughts, other.thoughts)
    torch.testing.assert_close(one.logits, other.logits, rtol=1e-4, atol=1e-4)


# --- Gates ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_some_texts_of_a_batch_think_and_others_do_not(name):
    """Every token is that of the slow way with a thought where the gate asks for one."""
    model = build(name)
    model.configure(ThoughtsConfig(length=LENGTH))
    prompts, batch, mask = left_padded([7, 1, 4, 9, 2], model.vocab_size)
    model.eval()
    always = generated(model, batch, mask)
    every = torch.stack(always.logits).log_softmax(-1)
    gate = Gate("entropy", -(every.exp() * every).sum(-1).median().item())
    out = generated(model, batch, mask, think=gate)
    slow = copy.deepcopy(model)
    slow.causal_lm.set_attn_implementation("eager")
    thought_somewhere = []
    for row, prompt in enumerate(prompts):
        text = prompt
        for new in range(NEW):
            with torch.no_grad():
                _, base = _run(slow, _embed(slow, text))
                thinks = bool(gate.decide(base[-1:].float()))
                thought, logits = slow_step(slow, text)
            thought_somewhere.append(thinks)
            assert out.thoughts[row, new, 0].tolist() == (
                thought.tolist() if thinks else [-1] * LENGTH
            )
            wanted = logits if thinks else base[-1]
            assert torch.allclose(out.logits[new][row], wanted, atol=1e-4)
            text = torch.cat([text, out.sequences[row, -NEW + new][None]])
    assert 0 < sum(thought_somewhere) < len(thought_somewhere)


def test_gates_at_their_ends_are_always_and_never():
    model = thinking_model(thoughts={"length": LENGTH}).eval()
    _, batch, mask = left_padded([5, 3])
    for threshold, thinks in ((-1e9, True), (1e9, False)):
        mine = generated(model, batch, mask, think=Gate("entropy", threshold))
        assert torch.equal(mine.sequences, generated(model, batch, mask, think=thinks).sequences)
        assert bool((mine.thoughts == -1).all()) is not think


def test_a_gate_asks_for_the_entropy_in_nats_and_knows_its_kinds():
    logits = torch.tensor([[0.0, 0.0, float("-inf")], [0.0, -30.0, -30.0]])  # ln 2, and about 0
    for threshold, expected in ((0.69, [True, False]), (0.7, [False] * 2), (-1.0, [True] * 2)):
        assert Gate("entropy", threshold).decide(logits).tolist() == expected
    gate = Gate("always")
    for kind in ("sometimes", "gain"):
        vars(gate)["kind"] = kind  # given to the class, it is refused by the tests' type checker
        with pytest.raises(UserError, match=f"there is no gate '{kind}'; known: always, never, on"):
            gate.__post_init__()


# --- Thoughts of a control in place of the model's own --------------------------------------------
@pytest.mark.parametrize("early", [False, True])
def test_reading_its_own_thoughts_again_changes_nothing(early):
    stop = [chr(code) for code in range(32, 127)] if early else []
    model = thinking_model(thoughts={"length": LENGTH, "stop": stop}).eval()
    _, batch, mask = left_padded([5, 3])
    own = generated(model, batch, mask, num_thoughts=2, thought_temperature=1.0)
    again = generated(
        model, batch, mask, num_thoughts=2, thought_temperature=1.0, replace_thoughts=lambda x: x
    )
    assert torch.equal(own.sequences, again.sequences)
    assert torch.equal(own.thoughts, again.thoughts)
    assert bool((own.thoughts == -1).any()) == early


@pytest.mark.parametrize("tokens", [[-1], [7], [7, 9, 8]])
def test_the_next_token_is_predicted_with_the_thoughts_that_are_given(tokens):
    model = thinking_model(thoughts={"length": 3, "lookahead": 1}).eval()
    ids = random_texts(2, 6)
    given = torch.tensor(tokens).expand(2, 1, -1)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), pad_token_id=0, max_new_tokens=1, do_sample=False,
        output_logits=True, return_dict_in_generate=True, replace_thoughts=lambda own: given,
    )  # fmt: skip
    next_token = out.sequences[:, -1:]
    text = torch.cat([ids, next_token], 1)
    positions = torch.full((2, 1), 5)
    scores = model.score(text, given.unsqueeze(1), positions=positions, lookahead=1)
    assert torch.equal(scores.mixed_predicted[:, 0, 0], next_token)
    logprob = out.logits[0].log_softmax(-1).gather(1, next_token)
    torch.testing.assert_close(logprob, scores.mixed_logprobs[:, 0, 0], rtol=1e-4, atol=1e-5)
    assert out.thoughts[0, 0, 0].tolist() == tokens + [-1] * (3 - len(tokens))


def test_the_command_generates_with_each_control(tmp_path, capsys):
    base = plain_model(max_position_embeddings=128, eos_token_id=256)
    model = thinking_model(base, thoughts={"length": 3})
    model.save_pretrained(tmp_path / "model", load_tokenizer("bytes"))
    (tmp_path / "prompts.txt").write_text("two\nthree\n", encoding="utf-8")

    def run(*arguments):
        line = ["generate", "--model", str(tmp_path / "model"), "--device", "cpu",
                "--max-new-tokens", "1", *arguments]  # fmt: skip
        return cli.main(line), capsys.readouterr()

    prompts = ("--prompts", str(tmp_path / "prompts.txt"), "--show-thoughts")
    shown = {None: run(*prompts)[1].out}
    for control in CONTROLS:
        code, said = run(*prompts, "--control", control)
        assert code == 0
        shown[control] = said.out
    thoughts = {name: re.findall("⟨(.*?)⟩", text, re.DOTALL) for name, text in shown.items()}
    assert thoughts["swapped"] == thoughts[None][::-1]
    assert thoughts[None][0] != thoughts[None][1]
    assert thoughts["generic"] == [" I "] * 2
    said = run(*prompts, "--control", "generic", "--generic", "Yes.")[1].out
    assert re.findall("⟨(.*?)⟩", said) == ["Yes"] * 2
    assert thoughts["pause"] == ["---"] * 2
    assert thoughts["blank"] == []
    for arguments, expected in (
        (("--prompt", "two", "--control", "swapped"), "--control (swapped): takes the thoughts of"),
        ((*prompts, "--batch-size", "1", "--control", "swapped"), "the last batch is a single"),
        ((*prompts, "--control", "generic", "--generic", ""), "--generic ('')"),
        ((*prompts, "--gate", "entropy:1", "--control", "swapped"), "and no --gate"),
        (("--prompt", "two", "--control", "mixed"), "--control (mixed): must be one of shuffled"),
        (("--prompt", "a", "--no-thoughts", "--control", "blank"), "--no-thoughts: does not go"),
    ):
        code, said = run(*arguments)
        assert code == 2
        assert said.err.count("\n") == 1
        assert expected in said.err


# --- One thought before an answer -----------------------------------------------------------------
REACH = 3
ONCE = {"positions": "answer_start", "length": LENGTH, "lookahead": REACH}


def expected_logprobs(model, text, start, thoughts):
    """Log-probabilities of the tokens from ``start`` on, by the thoughts before the first of them.

    As training and evaluation score them: ``REACH`` tokens with the thoughts, the others plainly.
    """
    plain = model.score_plain(text[None]).logprobs[0, start - 1 : -1]
    place = torch.tensor([[start - 1]])
    scores = model.score(text[None], thoughts[None, None], positions=place, lookahead=REACH)
    mixed = scores.mixed_logprobs[0, 0]  # (K, A)
    mixed = mixed.exp().mean(0).log()
    return torch.cat([mixed, plain[REACH:]])


def assert_answers_as_scored(model, prompts, out):
    for row, prompt in enumerate(prompts):
        text, thoughts = out.sequences[row, -NEW - len(prompt) :], out.thoughts[row]
        assert (thoughts[1:] == -1).all(), "only the first new token has thoughts"
        expected = expected_logprobs(model, text, len(prompt), thoughts[0])
        for step, token in enumerate(text[len(prompt) :]):
            logprob = out.logits[step][row].log_softmax(-1)[token]
            torch.testing.assert_close(logprob, expected[step], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("num_thoughts", [1, 2])
@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "gemma2", "mistral", "gpt_oss", "cohere2", "deepseek_v3"]
)
def test_a_model_that_thinks_before_answers_does_so_once(name, num_thoughts):
    model = build(name).eval()
    model.configure(ThoughtsConfig(**ONCE))
    prompts, batch, mask = left_padded([7, 1, 4], model.vocab_size)
    out = generated(model, batch, mask, num_thoughts=num_thoughts, thought_temperature=1.0)
    assert_answers_as_scored(model, prompts, out)


@pytest.mark.parametrize("thoughts", [{}, STOP, LONG], ids=["whole", "early", "long"])
@pytest.mark.parametrize("num_thoughts", [1, 2])
@pytest.mark.parametrize("method", ["full", "prompt", "prefix"])
def test_an_answer_follows_its_thought_wherever_that_ends(method, num_thoughts, thoughts):
    model = thinking_model(thoughts=ONCE | thoughts, tuning=tuning_by(method)).eval()
    prompts, batch, mask = left_padded([5, 2, 8])
    out = generated(model, batch, mask, num_thoughts=num_thoughts, thought_temperature=1.0, seed=3)
    assert (out.thoughts[:, 0] == -1).any() == bool(thoughts)
    assert_answers_as_scored(model, prompts, out)
    seen = model.draw(batch[2:], num_thoughts=num_thoughts, temperature=1.0, seed=3,
                      positions=None, sample_ids=torch.tensor([2]))  # fmt: skip
    assert torch.equal(out.thoughts[2, 0], seen.tokens[0, -1])


@pytest.mark.parametrize("replaced", [False, True], ids=["given", "replaced"])
def test_an_answer_follows_thoughts_that_are_given(replaced):
    model = thinking_model(thoughts=ONCE).eval()
    prompts, batch, mask = left_padded([5, 2, 8])
    given = torch.tensor([[[3, 4, 5]], [[9, -1, -1]], [[-1, -1, -1]]])
    named = {"replace_thoughts": lambda own: given} if replaced else {"thoughts": given}
    out = generated(model, batch, mask, **named)
    assert torch.equal(out.thoughts[:, 0], given)
    assert_answers_as_scored(model, prompts, out)
    blank = generated(model, batch, mask, replace_thoughts=lambda own: own[:, :, :1] * 0 - 1)
    assert (blank.thoughts == -1).all()
    assert torch.equal(blank.sequences[2], out.sequences[2])


def test_every_token_thinks_where_that_is_asked_for():
    model = thinking_model(thoughts=ONCE).eval()
    _, batch, mask = left_padded([5, 2])
    asked = generated(model, batch, mask, think=Gate("always"))
    model.configure(model.thoughts.model_copy(update={"positions": "all"}))
    assert torch.equal(asked.thoughts, generated(model, batch, mask).thoughts)
    assert (asked.thoughts >= 0).all()


@pytest.mark.parametrize(
    ("positions", "shape", "words"),
    [
        ("all", (2, 1, 3), 'thoughts: are read before the first new token alone, and think is "al'),
        ("answer_start", (1, 1, 3), r"must have the shape \(2, thoughts, at most 3\), not \(1, 1"),
        ("answer_start", (2, 1, 4), r"not \(2, 1, 4\)"),
    ],
)
def test_given_thoughts_that_do_not_fit_are_refused(positions, shape, words):
    model = thinking_model(thoughts=ONCE | {"positions": positions}).eval()
    _, batch, mask = left_padded([5, 2])
    with pytest.raises(UserError, match=words):
        generated(model, batch, mask, thoughts=torch.zeros(shape, dtype=torch.long))


def test_the_command_thinks_as_the_model_was_trained(tmp_path, capsys, caplog):
    base = plain_model(max_position_embeddings=128, eos_token_id=256)
    model = thinking_model(base, thoughts=ONCE)
    model.save_pretrained(tmp_path / "model", load_tokenizer("bytes"))

    def count(*arguments, folder="model", new=("--max-new-tokens", 4)):
        line = ["generate", "--model", tmp_path / folder, "--device", "cpu", "--prompt", "two",
                *new, "--show-thoughts", *arguments]  # fmt: skip
        assert cli.main([str(word) for word in line]) == 0
        return capsys.readouterr().out.count("⟨")

    assert (count(), count("--positions", "every")) == (1, 4)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "final").symlink_to(tmp_path / "model")
    assert count(folder="run") == 1, "a run stands for its model"
    # The model has 128 positions: 128 tokens after a prompt never fit, and are no default.
    assert count(new=()) == 1
    assert most_tokens(model, thinks=True) == 128 - (1 + LENGTH + 1) + 1
    assert count("--gate", "entropy:0", "--positions", "every") == 4
    anywhere = ONCE | {"positions": "one_random"}
    model = thinking_model(base, thoughts=anywhere)
    model.save_pretrained(tmp_path / "model", load_tokenizer("bytes"))
    assert (count(), count("--positions", "once")) == (4, 1)
    assert "--positions: has no effect with --gate" in caplog.text
