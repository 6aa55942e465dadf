"""Judges against a plain loop of one sequence at a time; ``quietstar judge``; what is refused."""

import json
import logging
import math
import re
import sqlite3
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from architectures import tiny_architecture
from datasets import Dataset
from tiny import BYTES_VOCAB, GPT2, LLAMA, plain_model, thinking_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from quietstar.cli import main as cli
from quietstar.cli.options import load_model
from quietstar.data import load_tokenizer
from quietstar.errors import UserError
from quietstar.judging import Judge, Template, VerdictCache, load_template, scoring
from quietstar.judging.cache import Verdict
from quietstar.judging.judge import LEAST_MASS
from quietstar.judging.labels import Label, Pair, summarize_labels
from quietstar.judging.prompts import TEMPLATES, Prompts
from quietstar.reports.judging import CLEAR, write_judge_page

ENDING = "Best="
TEMPLATE = """
{% block preamble %}Judge well. {% endblock %}
{% block pair %}T:{{ prompt }} A:{{ first }} B:{{ second }} {% endblock %}
{% block pair_ending %}Best={% endblock %}
{% block rating %}T:{{ prompt }} A:{{ candidate }} {% endblock %}
{% block rating_ending %}Best={% endblock %}
{% block rationale %}Why:{% endblock %}
"""
CHAT = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}[assistant]"
PROMPTS = ["two", "a longer text", "of", "what", "one, two, three"]
FIRST = ["three", "end", "course", "now", "four"]
SECOND = ["4", "or not at all", "it", "then?", "zero"]
MIXED_FIRST, MIXED_SECOND = FIRST[:2] + SECOND[2:], SECOND[:2] + FIRST[2:]
VOCAB = 300


def joining_tokenizer(tens=True):
    """Bytes, and a space with a digit as one token; with ``tens`` also " 10" and "10"."""
    vocab = {character: byte for byte, character in bytes_to_unicode().items()}
    merges = [("Ġ", digit) for digit in "123456789"]
    merges += [("1", "0"), ("Ġ1", "0")] if tens else []
    for pair in merges:
        vocab["".join(pair)] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TOKENIZERS = {"bytes": load_tokenizer("bytes"), "joining": joining_tokenizer()}


def resized(name):
    """A tiny model of an architecture, whose own check has 61 tokens only."""
    model = tiny_architecture(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.resize_token_embeddings(VOCAB, mean_resizing=False)
        torch.nn.init.normal_(model.get_input_embeddings().weight[61:], std=0.5)
        torch.nn.init.normal_(model.get_output_embeddings().weight[61:], std=0.5)
    return model.eval()


MODELS = {
    "llama": lambda: plain_model(LLAMA, vocab_size=VOCAB, max_position_embeddings=512),
    "gpt2": lambda: plain_model(GPT2, vocab_size=VOCAB, n_positions=512),
    "gemma2": lambda: resized("gemma2"),  # soft caps, and a window of 4 tokens in a layer
    "qwen2": lambda: resized("qwen2"),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param]()


@pytest.fixture(scope="module")
def llama():
    return MODELS["llama"]()


def make_judge(model, tokenizer="bytes", ending=ENDING, **settings):
    template = Template("mine", TEMPLATE.replace(ENDING, ending))
    return Judge(model, TOKENIZERS.get(tokenizer, tokenizer), template, **settings)


# --- A plain loop ---------------------------------------------------------------------------------
@torch.no_grad()
def next_logprobs(model, ids):
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1)


def slow_rationale(model, tokenizer, text, num_tokens):
    ids, new = tokenizer(text)["input_ids"], []
    while len(new) < num_tokens:
        token = int(next_logprobs(model, ids + new).argmax())
        if token == model.generation_config.eos_token_id or token == tokenizer.eos_token_id:
            break
        new.append(token)
    return tokenizer.decode(new).partition(ENDING)[0].rstrip()


def slow_text(model, tokenizer, head, ending, num_tokens):
    """The text before the label, with a rationale if one is asked for."""
    if not num_tokens:
        return head + ending
    why = slow_rationale(model, tokenizer, head + "Why:", num_tokens)
    return f"{head}Why:{why}\n\n{ending}"


def slow_preference(model, tokenizer, prompt, first, second, ending=ENDING, num_tokens=0):
    """P("1") and P("2") with the candidates in this order."""
    head = f"Judge well. T:{prompt} A:{first} B:{second} "
    text = slow_text(model, tokenizer, head, ending, num_tokens)
    rows = [tokenizer(text + label)["input_ids"] for label in "12"]
    assert rows[0][:-1] == rows[1][:-1]
    logprobs = next_logprobs(model, rows[0][:-1])
    return [logprobs[row[-1]].exp().item() for row in rows]


def slow_rating(model, tokenizer, prompt, candidate, ending=ENDING, num_tokens=0):
    head = f"Judge well. T:{prompt} A:{candidate} "
    text = slow_text(model, tokenizer, head, ending, num_tokens)
    rows = [tokenizer(f"{text}{label}")["input_ids"] for label in range(1, 11)]
    before = rows[0][:-1]
    logprobs = next_logprobs(model, before)
    likely = [logprobs[row[len(before)]].exp().item() for row in rows]
    if len(rows[9]) == len(before) + 2:  # "1", and then "0"
        zero = next_logprobs(model, rows[0])[rows[9][-1]].exp().item()
        likely[9] = likely[0] * zero
        likely[0] *= 1 - zero
    return likely


SETTINGS = [("bytes", ENDING), ("joining", ENDING), ("joining", "Best: "), ("bytes", "Best: ")]


@pytest.mark.parametrize("rationale_tokens", [0, 4])
@pytest.mark.parametrize(("tokenizer", "ending"), SETTINGS)
def test_comparisons_are_those_of_a_plain_loop(model, tokenizer, ending, rationale_tokens):
    found = [
        make_judge(
            model, tokenizer, ending, batch_size=size, rationale_tokens=rationale_tokens
        ).compare(PROMPTS, FIRST, SECOND)
        for size in (1, 3, 64)
    ]
    tokens = TOKENIZERS[tokenizer]
    for number, (prompt, a, b) in enumerate(zip(PROMPTS, FIRST, SECOND, strict=True)):
        one, two = slow_preference(model, tokens, prompt, a, b, ending, rationale_tokens)
        one2, two2 = slow_preference(model, tokens, prompt, b, a, ending, rationale_tokens)
        by_order = one / (one + two), two2 / (one2 + two2)
        mean = sum(by_order) / 2
        for results in found:
            result = results[number]
            assert result.by_order == pytest.approx(by_order, abs=1e-5)
            assert result.probability == pytest.approx(mean, abs=1e-5)
            assert result.margin == pytest.approx(math.log(mean / (1 - mean)), abs=1e-4)
            assert result.mass == pytest.approx((one + two, one2 + two2), abs=1e-5)
            assert len(result.rationales) == (2 if rationale_tokens else 0)
            assert result.rationales == found[0][number].rationales


@pytest.mark.parametrize("rationale_tokens", [0, 4])
@pytest.mark.parametrize(("tokenizer", "ending"), SETTINGS)
def test_ratings_are_those_of_a_plain_loop(model, tokenizer, ending, rationale_tokens):
    found = [
        make_judge(
            model, tokenizer, ending, batch_size=size, rationale_tokens=rationale_tokens
        ).rate(PROMPTS, FIRST)
        for size in (1, 3)
    ]
    for number, (prompt, a) in enumerate(zip(PROMPTS, FIRST, strict=True)):
        likely = slow_rating(model, TOKENIZERS[tokenizer], prompt, a, ending, rationale_tokens)
        total = sum(likely)
        expected = sum(i * p for i, p in enumerate(likely, 1)) / total
        for results in found:
            result = results[number]
            assert result.probabilities == pytest.approx([p / total for p in likely], abs=1e-5)
            assert result.mass == pytest.approx(total, abs=1e-5)
            assert result.score == pytest.approx((expected - 5.5) / 4.5, abs=1e-5)


def test_a_model_that_keeps_states_runs_every_text_whole():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "vocab_size": VOCAB}
    model = plain_model({"model_type": "mamba", **sizes})
    for num_tokens in (0, 3):
        judge = make_judge(model, rationale_tokens=num_tokens, batch_size=4)
        for result, *texts in zip(
            judge.compare(PROMPTS, FIRST, SECOND), PROMPTS, FIRST, SECOND, strict=True
        ):
            one, two = slow_preference(model, TOKENIZERS["bytes"], *texts, num_tokens=num_tokens)
            assert result.by_order[0] == pytest.approx(one / (one + two), abs=1e-5)


def test_padding_does_not_shorten_what_a_layer_with_a_window_sees():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8,
             "num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 24,
             "max_position_embeddings": 512}  # fmt: skip
    # Tied, it would say its last token again, whatever it sees.
    model = plain_model({"model_type": "gemma2", **sizes}, vocab_size=VOCAB,
                        tie_word_embeddings=False)  # fmt: skip
    prompts = [*"abcdefgh", "a text that is longer than the window, and so are all paddings"]
    texts = prompts, ["x"] * 9, ["y"] * 9
    alone, together = (
        make_judge(model, rationale_tokens=6, batch_size=size).compare(*texts) for size in (1, 18)
    )
    assert [result.rationales for result in alone] == [result.rationales for result in together]


def test_a_rationale_is_written_and_read(llama):
    plain, thoughtful = make_judge(llama), make_judge(llama, rationale_tokens=4)
    (short,), (long,) = (j.compare(["two"], ["a"], ["b"]) for j in (plain, thoughtful))
    assert long.rationales[0] != long.rationales[1]
    for why, (a, b) in zip(long.rationales, [("a", "b"), ("b", "a")], strict=True):
        text = f"Judge well. T:two A:{a} B:{b} Why:"
        assert why == slow_rationale(llama, TOKENIZERS["bytes"], text, 4)
    assert abs(short.probability - long.probability) > 1e-4


def test_a_rationale_ends_where_the_judge_ends_it():
    model, tokenizer = MODELS["llama"](), TOKENIZERS["bytes"]
    judge = make_judge(model, rationale_tokens=6)
    head = "Judge well. T:two A:a B:b Why:"
    ids = tokenizer(head)["input_ids"]
    for _ in range(3):
        ids.append(int(next_logprobs(model, ids).argmax()))
    model.generation_config.eos_token_id = [256, ids[-1]]
    whole, ended = (
        j.compare(["two"], ["a"], ["b"])[0].rationales[0]
        for j in (judge, make_judge(model, rationale_tokens=6))
    )
    assert ended == tokenizer.decode(ids[len(tokenizer(head)["input_ids"]) : -1]).rstrip()
    assert len(ended) < len(whole)


def test_the_ten_excludes_the_one_where_it_is_two_tokens():
    model = plain_model(LLAMA, vocab_size=BYTES_VOCAB, max_position_embeddings=512)
    logits = torch.full((BYTES_VOCAB, BYTES_VOCAB), -30.0)
    logits[:, ord("1")] = math.log(0.9)
    logits[:, ord("7")] = math.log(0.1)
    logits[ord("1")] = -30.0
    logits[ord("1"), ord("0")] = math.log(0.75)
    logits[ord("1"), ord(".")] = math.log(0.25)
    real = model.forward

    def forward(input_ids, **settings):
        output = real(input_ids=input_ids, **settings)
        output.logits = logits[input_ids[:, -output.logits.shape[1] :]]
        return output

    model.forward = forward
    (rating,) = make_judge(model, batch_size=1).rate(["a"], ["b"])
    wanted = [0.9 * 0.25, *[0.0] * 5, 0.1, 0.0, 0.0, 0.9 * 0.75]
    assert rating.probabilities == pytest.approx(wanted, abs=1e-6)
    assert rating.expected == pytest.approx(0.225 + 0.7 + 6.75, abs=1e-5)


def test_a_chat_template_frames_the_question_and_the_ending_opens_the_answer(llama):
    tokenizer = load_tokenizer("bytes")
    tokenizer.chat_template = CHAT
    judge = make_judge(llama, tokenizer, rationale_tokens=3)
    (result,) = judge.compare(["two"], ["a"], ["b"])
    head = "[user]Judge well. T:two A:a B:b Why:\n[assistant]"
    why = slow_rationale(llama, tokenizer, head, 3)
    ids = tokenizer(f"{head}{why}\n\n{ENDING}")["input_ids"]
    one, two = next_logprobs(llama, ids)[list(b"12")].exp().tolist()
    assert result.by_order[0] == pytest.approx(one / (one + two), abs=1e-5)
    off = make_judge(llama, tokenizer, chat=False).compare(["two"], ["a"], ["b"])
    assert off == make_judge(llama).compare(["two"], ["a"], ["b"])
    with pytest.raises(UserError, match="no chat template"):
        make_judge(llama, chat=True)


def test_orders_exchanged_give_the_opposite(llama):
    judge = make_judge(llama)
    for one, other in zip(
        judge.compare(PROMPTS, FIRST, SECOND), judge.compare(PROMPTS, SECOND, FIRST), strict=True
    ):
        assert one.probability == pytest.approx(1 - other.probability, abs=1e-6)
        assert one.margin == pytest.approx(-other.margin, abs=1e-5)


def test_equal_candidates_are_not_judged(llama):
    steps = []
    judge = make_judge(llama)
    results = judge.compare(["a", "b"], ["x", "y"], ["x", "z"], advance=lambda: steps.append(1))
    assert (results[0].probability, results[0].is_equal, results[0].mass) == (0.5, True, ())
    assert not results[1].is_equal
    assert len(steps) == 4


def test_only_logits_of_the_needed_places_are_computed(llama):
    shapes = []
    handle = llama.lm_head.register_forward_hook(lambda *given: shapes.append(given[2].shape))
    make_judge(llama, batch_size=4).compare(PROMPTS, FIRST, SECOND)
    make_judge(llama, batch_size=4).rate(PROMPTS, FIRST)
    handle.remove()
    assert {shape[1] for shape in shapes} == {1, 2}


def test_the_shared_beginning_is_run_once(llama):
    counts = []
    handle = llama.model.embed_tokens.register_forward_hook(
        lambda *given: counts.append(given[1][0].shape)
    )
    judge = make_judge(llama, batch_size=2, rationale_tokens=3)
    judge.compare(PROMPTS, FIRST, SECOND)
    handle.remove()
    shared = len("Judge well. T:")
    assert counts[0] == (1, shared)
    texts = [len(f"{p} A:{a} B:{b} Why:") for p, a, b in zip(PROMPTS, FIRST, SECOND, strict=True)]
    # Labels and a rationale, for the longest pair, after what is shared.
    longest = max(texts)
    assert counts[1] == (2, longest)


def test_adapters_judge_as_they_are_switched(llama):
    peft = pytest.importorskip("peft")
    base = MODELS["llama"]()
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj", "lm_head"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.train()
    judge, asked = make_judge(model), (PROMPTS, FIRST, SECOND)
    with_adapter = judge.compare(*asked)
    assert model.training
    with model.disable_adapter():
        without = judge.compare(*asked)
    assert without == make_judge(llama).compare(*asked)
    assert (
        max(abs(a.probability - b.probability) for a, b in zip(with_adapter, without, strict=True))
        > 1e-3
    )
    slow = slow_preference(model.eval(), TOKENIZERS["bytes"], PROMPTS[0], FIRST[0], SECOND[0])
    assert with_adapter[0].by_order[0] == pytest.approx(slow[0] / sum(slow), abs=1e-5)
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(UserError, match="virtual tokens"):
        make_judge(peft.get_peft_model(MODELS["llama"](), prompt))


# --- The cache ------------------------------------------------------------------------------------
def test_hits_change_nothing_and_run_nothing(llama, tmp_path, monkeypatch):
    def make(**settings):
        settings = {"rationale_tokens": 3, "fingerprint": "a", **settings}
        return make_judge(llama, cache=VerdictCache(tmp_path), **settings)

    judge = make()
    fresh = judge.compare(PROMPTS, FIRST, SECOND)
    rated = judge.rate(PROMPTS, FIRST)
    assert fresh == make_judge(llama, rationale_tokens=3).compare(PROMPTS, FIRST, SECOND)
    runs = []
    monkeypatch.setattr(llama, "forward", lambda **given: runs.append(given))
    again = make(batch_size=2)
    assert again.compare(PROMPTS, FIRST, SECOND) == fresh
    assert again.rate(PROMPTS, FIRST) == rated
    assert not runs
    monkeypatch.undo()
    # What decides a verdict is part of the key.
    calls = []
    handle = llama.register_forward_pre_hook(lambda *_: calls.append(1))
    for settings in ({"fingerprint": "b"}, {"rationale_tokens": 2}, {"ending": "Now="}):
        before = len(calls)
        make(**settings).compare(PROMPTS[:1], FIRST[:1], SECOND[:1])
        assert len(calls) > before, settings
    handle.remove()


def write_many(folder, start):
    cache = VerdictCache(folder)
    for number in range(start, start + 40):
        cache.put({f"key {number}": Verdict((-1.0, -float(number)), "why")})


def test_several_processes_share_a_cache(tmp_path):
    context = get_context("fork")
    workers = [context.Process(target=write_many, args=(tmp_path, start)) for start in (0, 20)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    found = VerdictCache(tmp_path).get([f"key {n}" for n in range(70)], 2)
    assert {key: v.logprobs[1] for key, v in found.items()} == {
        f"key {n}": -float(n) for n in range(60)
    }


def test_a_damaged_or_foreign_cache_is_refused_in_one_line(llama, tmp_path):
    with pytest.raises(UserError, match="fingerprint"):
        make_judge(llama, cache=VerdictCache(tmp_path / "a"))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "judge.sqlite3").write_bytes(b"no database" * 100)
    with pytest.raises(UserError, match=r"--cache .* cannot be used \(file is not a database\)"):
        VerdictCache(tmp_path / "b")
    (tmp_path / "c").mkdir()
    with sqlite3.connect(tmp_path / "c" / "judge.sqlite3") as other:
        other.execute("CREATE TABLE mine (x)")
    with pytest.raises(UserError, match="is no cache of judges"):
        VerdictCache(tmp_path / "c")
    cache = VerdictCache(tmp_path / "d")
    for value in ('[[-1.0, NaN], ""]', '[[-1.0], ""]', '[[1.0, -1.0], ""]', "{}", "[]"):
        with cache._open() as database:
            database.execute("INSERT OR REPLACE INTO verdicts VALUES ('k', ?)", (value,))
        with pytest.raises(UserError, match="cannot be read"):
            cache.get(["k"], 2)


# --- What is refused ------------------------------------------------------------------------------
def test_a_tokenizer_whose_digits_are_no_tokens_is_refused(llama):
    vocab = {character: byte for byte, character in bytes_to_unicode().items()}
    merges = [("=", "1"), ("=", "2")]
    vocab |= {"=1": 256, "=2": 257}
    model = models.BPE(vocab=vocab, merges=merges)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    # "=1" and "=2" are single tokens, so the label gets a space before it.
    prompts = Prompts(made, Template("mine", TEMPLATE), uses_chat=False)
    assert prompts.answers("pair").gap == " "
    words = Tokenizer(models.WordLevel({"?": 0, "Judge": 1}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    judge = make_judge(llama, PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?"))
    with pytest.raises(UserError, match="'1' must be a token of its own") as caught:
        judge.compare(["a"], ["b"], ["c"])
    assert "\n" not in str(caught.value)


def test_empty_candidates_and_wrong_counts_are_refused(llama):
    judge = make_judge(llama)
    with pytest.raises(UserError, match="pair 2: candidate 2 is empty"):
        judge.compare(["a", "b"], ["c", "d"], ["e", " \n"])
    with pytest.raises(UserError, match="got 1, 2 texts"):
        judge.rate(["a"], ["b", "c"])


@pytest.mark.parametrize("rationale_tokens", [0, 5])
def test_long_prompts_lose_their_beginning(rationale_tokens):
    model = plain_model(LLAMA, vocab_size=VOCAB, max_position_embeddings=96)
    judge = make_judge(model, rationale_tokens=rationale_tokens)
    long = "".join(chr(97 + n % 26) for n in range(200))
    kept, short = judge.compare([long, "two"], ["a", "a"], ["b", "bcd"])
    assert (kept.is_cut, short.is_cut) == (True, False)
    room = 96 - len("Judge well. T: A:a B:b Best=")
    room -= len("Why:\n\n1") + rationale_tokens if rationale_tokens else 0
    (cut,) = judge.compare([long[-room:]], ["a"], ["b"])
    assert not cut.is_cut
    assert cut.by_order == pytest.approx(kept.by_order, abs=1e-6)
    assert judge.compare([long[-room - 1 :]], ["a"], ["b"])[0].is_cut
    with pytest.raises(UserError, match=r"line 7: takes .* even without its prompt"):
        judge.compare(["a"], ["b" * 96], ["c"], where=["line 7"])


def test_both_orders_lose_the_same():
    """Where the tokenizer joins a space and a digit, an order may take a token more."""
    model = plain_model(LLAMA, vocab_size=VOCAB, max_position_embeddings=96)
    template = Template("mine", TEMPLATE.replace("A:{{ first }}", "A: {{ first }}"))
    judge = Judge(model, TOKENIZERS["joining"], template)
    long = "".join(chr(97 + n % 26) for n in range(200))
    (cut,) = judge.compare([long], ["1"], ["b"])
    lengths = range(60, 96)
    uncut = [judge.compare([long[-n:]], ["1"], ["b"])[0] for n in lengths]
    kept = [result for result in uncut if not result.is_cut][-1]
    assert cut.is_cut
    assert cut.by_order == pytest.approx(kept.by_order, abs=1e-6)


def test_a_judge_that_does_not_answer_is_warned_of(caplog):
    model = plain_model(LLAMA, vocab_size=VOCAB, max_position_embeddings=512)
    bias = torch.zeros(VOCAB)
    bias[list(b"123456789")] = -30.0
    model.lm_head.register_forward_hook(lambda *given: given[2] + bias)
    judge = make_judge(model)
    with caplog.at_level(logging.WARNING):
        judge.compare(["a"], ["b"], ["c"])
        judge.compare(["a"], ["b"], ["c"])
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "% of its probability on the labels 1 to 2" in warning
    caplog.clear()
    bias[list(b"12")] = 30.0
    with caplog.at_level(logging.WARNING):
        make_judge(model).compare(["a"], ["b"], ["c"])
    assert not caplog.records


def test_figures_that_are_not_finite_end_in_one_line():
    model = plain_model(LLAMA, vocab_size=VOCAB, max_position_embeddings=512)
    model.lm_head.register_forward_hook(lambda *given: given[2] * math.nan)
    for settings in ({}, {"rationale_tokens": 2}):
        with pytest.raises(UserError, match="is no finite number"):
            make_judge(model, **settings).compare(["a"], ["b"], ["c"])


def test_the_template_of_the_docs_can_be_used():
    text = (Path(__file__).parents[1] / "docs/rlaif.md").read_text(encoding="utf-8")
    (source,) = re.findall(r"```\n({% block preamble %}.*?)```", text, flags=re.DOTALL)
    assert "Title 1: <a>" in Template("docs", source).render(
        ("pair",), {"prompt": "<p>", "first": "<a>", "second": "<b>"}
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_built_in_templates_hold_what_they_are_given(name):
    template = load_template(name)
    pair = template.render(("preamble", "pair"), {"prompt": "P%", "first": "A%", "second": "B%"})
    assert pair.index("P%") < pair.index("A%") < pair.index("B%")
    assert pair.endswith("\n\n")
    assert template.render(("pair_ending",), {}).endswith("=")
    with pytest.raises(UserError, match="'prompt' is undefined"):
        template.render(("pair",), {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("{% block rationale %}Why:{% endblock %}", ""), "has no block rationale"),
        (("{{ second }}", ""), "its block pair does not write second"),
        (("{{ second }}", "{{ other }}"), "'other' is undefined"),
        (("{{ second }}", "{{ second"), "line 3"),
        (("{{ second }}", "{{ second.__class__.__mro__ }}"), "unsafe"),
        (("{{ second }}", "{% include '/etc/passwd' %}"), "no loader"),
        (("{{ second }}", "{% for x in range(99999) %}{% for y in range(99999) %}"
          "{% endfor %}{% endfor %}"), "more than"),
    ],
)  # fmt: skip
def test_wrong_templates_end_in_one_line(tmp_path, monkeypatch, change, message):
    monkeypatch.setattr("quietstar.system.limits.SECONDS", 0.2)
    path = tmp_path / "mine.j2"
    path.write_text(TEMPLATE.replace(*change))
    with pytest.raises(UserError, match=message) as caught:
        load_template(str(path))
    assert "\n" not in str(caught.value)
    path.write_text(TEMPLATE)
    assert load_template(str(path)).source == TEMPLATE
    with pytest.raises(UserError, match="must be one of continuation"):
        load_template("summery")


# --- The command ----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    model = plain_model(LLAMA, vocab_size=BYTES_VOCAB, max_position_embeddings=512)
    model.save_pretrained(folder / "model")
    load_tokenizer("bytes").save_pretrained(folder / "model")
    (folder / "mine.j2").write_text(TEMPLATE)
    candidates = zip(PROMPTS, MIXED_FIRST, MIXED_SECOND, strict=True)
    rows = [{"prompt": p, "candidates": [a, b]} for p, a, b in candidates]
    rows += [{"prompt": "same", "chosen": "x", "rejected": "x"},
             {"prompt": "more", "chosen": "y", "rejected": "z", "id": 3}]  # fmt: skip
    write_lines(folder / "pairs.jsonl", rows)
    return folder


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run(folder, out, *more, **options):
    given = {"pairs": folder / "pairs.jsonl", "model": folder / "model", "device": "cpu",
             "out": out, "template": folder / "mine.j2", **options}  # fmt: skip
    call = [word for name, value in given.items() for word in (f"--{name}", value)]
    return cli.main(["judge", *map(str, (*call, *more))])


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_command_writes_what_trainers_of_preferences_read(folder, tmp_path, capsys):
    assert run(folder, tmp_path / "out.jsonl", "--rationale", 2) == 0
    printed = capsys.readouterr().out
    assert "position bias" in printed
    judge = Judge.load(str(folder / "model"), template=str(folder / "mine.j2"), rationale_tokens=2)
    wanted = judge.compare([*PROMPTS, "more"], [*MIXED_FIRST, "y"], [*MIXED_SECOND, "z"])
    rows = read_lines(tmp_path / "out.jsonl")
    assert [row["prompt"] for row in rows] == [*PROMPTS, "same", "more"]
    same = rows.pop(5)
    assert (same["chosen"], same["rejected"], same["soft_label"]) == ("x", "x", 0.5)
    candidates = zip([*MIXED_FIRST, "y"], [*MIXED_SECOND, "z"], strict=True)
    for row, want, (a, b) in zip(rows, wanted, candidates, strict=True):
        chosen = want.probability >= 0.5
        assert (row["chosen"], row["rejected"]) == ((a, b) if chosen else (b, a))
        sure = max(want.probability, 1 - want.probability)
        assert row["soft_label"] == pytest.approx(sure, abs=1e-6)
        assert row["margin"] == pytest.approx(abs(want.margin), abs=1e-5)
        ahead, behind = want.by_order
        by_order = [ahead, behind] if chosen else [1 - behind, 1 - ahead]
        assert row["probabilities"] == pytest.approx(by_order, abs=1e-6)
        assert row["rationales"] == list(want.rationales)[:: 1 if chosen else -1]
    assert any(row["chosen"] in MIXED_SECOND for row in rows)
    table = Dataset.from_json(str(tmp_path / "out.jsonl"), cache_dir=str(tmp_path / "cache"))
    kinds = [table.features[name].dtype for name in ("prompt", "chosen", "rejected", "soft_label")]
    assert kinds == ["string", "string", "string", "float64"]
    summary = json.loads((tmp_path / "out.judge.json").read_text())["summary"]
    assert (summary["pairs"], summary["equal"], summary["cut"]) == (7, 1, 0)
    assert summary["agreement"] == float(rows[-1]["chosen"] == "y")


def test_the_summary_counts_the_slots():
    def label(ahead, behind, chosen="a", rejected="b"):
        return Label(prompt="p", chosen=chosen, rejected=rejected, soft_label=(ahead + behind) / 2,
                     margin=0.0, probabilities=[ahead, behind], mass=[0.5, 0.7], rationales=[],
                     is_cut=False)  # fmt: skip

    pairs = [Pair("p", "a", "b", True, "here")] * 5
    # Twice number 2 whatever is there, once number 1, once the same candidate, once equal ones.
    labels = [label(0.4, 0.9), label(0.2, 0.9), label(0.8, 0.4), label(0.9, 0.6, "b", "a"),
              label(0.5, 0.5, "a", "a")]  # fmt: skip
    summary = summarize_labels(labels, pairs)
    assert (summary["pairs"], summary["equal"]) == (5, 1)
    assert summary["same_slot"] == 0.75
    assert summary["slot_2"] == pytest.approx(2 / 3)
    assert summary["same_slot_ci"] == pytest.approx((0.194, 0.994), abs=1e-3)
    assert summary["mass"] == pytest.approx(0.6)
    assert summary["agreement"] == 0.75


@pytest.mark.parametrize(("mass", "is_little"), [(0.5, False), (0.001, True)])
def test_the_page_lists_clear_preferences_and_warns_of_little_mass(mass, is_little, tmp_path):
    pairs, labels = [], []
    for text, p in (("undecided", 0.5), ("decided", 0.7)):
        pairs.append(Pair("p", text, "b", False, "here"))
        labels.append(Label(prompt="p", chosen=text, rejected="b", soft_label=p, margin=0.0,
                            probabilities=[p, p], mass=[mass, mass], rationales=[],
                            is_cut=False))  # fmt: skip
    settings = {"model": "m", "template_name": "t"}
    summary = summarize_labels(labels, pairs)
    path = write_judge_page(tmp_path / "page.html", labels, pairs, summary, settings)
    page = path.read_text(encoding="utf-8")
    assert ("decided" in page, "undecided" in page) == (True, False)
    assert ("Its verdicts say little: 0.1 % of its probability" in page) == is_little


@pytest.mark.parametrize("left", [0, 2, 3, 4])
def test_an_interrupted_file_goes_on_to_the_same(folder, tmp_path, monkeypatch, left):
    monkeypatch.setattr("quietstar.cli.judge.UNIT", 2)
    out, settings = tmp_path / "out.jsonl", ("--batch-size", 2)
    assert run(folder, out, *settings) == 0
    whole, summary = out.read_bytes(), (tmp_path / "out.judge.json").read_text()
    lines = whole.splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:left]) + lines[left][:9])  # killed amid a line
    judged = []
    real = Judge.compare
    monkeypatch.setattr(
        Judge, "compare",
        lambda self, prompts, *more, **settings: judged.extend(prompts)
        or real(self, prompts, *more, **settings),
    )  # fmt: skip
    assert run(folder, out, *settings) == 0
    assert out.read_bytes() == whole
    assert (tmp_path / "out.judge.json").read_text() == summary
    assert len(judged) == 7 - left // 2 * 2
    judged.clear()
    assert run(folder, out, *settings) == 0
    assert not judged
    assert out.read_bytes() == whole


def test_the_cache_of_the_command_spares_the_model(folder, tmp_path, monkeypatch):
    out, cache = tmp_path / "out.jsonl", ("--cache", tmp_path / "cache")
    assert run(folder, out, *cache) == 0
    first = out.read_bytes()
    monkeypatch.setattr("quietstar.judging.judge.Judge._run", None)
    assert run(folder, tmp_path / "again.jsonl", *cache, "--batch-size", 1) == 0
    assert (tmp_path / "again.jsonl").read_bytes() == first


def refusal(capsys, *call, **options):
    assert run(*call, **options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("quietstar: error: ")
    return line


def test_files_of_other_settings_or_of_others_are_refused(folder, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert run(folder, out, "--limit", 2) == 0
    before = out.read_bytes()
    capsys.readouterr()
    assert "made with another rationale (0, now 3)" in refusal(
        capsys, folder, out, "--limit", 2, "--rationale", 3
    )
    assert "made with another limit" in refusal(capsys, folder, out)
    assert "is also --pairs" in refusal(capsys, folder, folder / "pairs.jsonl")
    (tmp_path / "mine.jsonl").write_text("mine\n")
    assert "exists without its settings" in refusal(capsys, folder, tmp_path / "mine.jsonl")
    (tmp_path / "new.judge.json").write_text('{"mine": 1}')
    assert "holds no settings of a judge" in refusal(capsys, folder, tmp_path / "new.jsonl")
    rows = read_lines(out)
    write_lines(out, [rows[0], {**rows[1], "chosen": "other"}])
    assert "line 2: cannot be read (it is none of pair 2)" in refusal(
        capsys, folder, out, "--limit", 2
    )
    assert run(folder, out, "--limit", 2, "--force") == 0
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "no valid JSON"),
        ("[1]", "must be an object"),
        ('{"prompt": "a", "candidates": ["b"]}', "candidates must be a list of two texts"),
        ('{"prompt": "a", "candidates": ["b", 3]}', "candidates holds int, and must be plain"),
        ('{"prompt": "a", "candidates": ["b", "c"], "chosen": "b"}', "has both candidates and"),
        ('{"prompt": "a", "chosen": "b"}', "must have the texts prompt and candidates"),
        ('{"prompt": ["a"], "chosen": "b", "rejected": "c"}', "prompt holds list, and must be"),
        ('{"prompt": "a", "chosen": "b", "rejected": " "}', "rejected is empty"),
        ('{"prompt": "a", "candidates": ["", "c"]}', "candidate 1 is empty"),
        ('{"prompt": "a", "candidates": ["\\ud800", "c"]}', "half of a surrogate pair"),
    ],
)
def test_malformed_lines_are_named(folder, tmp_path, capsys, line, message):
    good = json.dumps({"prompt": "a", "candidates": ["b", "c"]})
    (tmp_path / "bad.jsonl").write_text(f"{good}\n\n{line}\n")
    said = refusal(capsys, folder, tmp_path / "out.jsonl", pairs=tmp_path / "bad.jsonl")
    assert message in said
    assert "bad.jsonl), line 3" in said
    assert not (tmp_path / "out.jsonl").exists()


def test_other_mistakes_end_in_one_line(folder, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    (tmp_path / "none.jsonl").write_text("\n")
    assert "has no pairs" in refusal(capsys, folder, out, pairs=tmp_path / "none.jsonl")
    assert "No such file" in refusal(capsys, folder, out, pairs=tmp_path / "x.jsonl")
    assert "no chat template" in refusal(capsys, folder, out, "--chat", "on")
    assert "--template (nothing)" in refusal(capsys, folder, out, template="nothing")
    assert "--model (" in refusal(capsys, folder, out, model=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["none.jsonl"]


# --- Prompts that several texts share -------------------------------------------------------------
LONG = [
    "a rather long prompt, of which there are two orders",
    "another one that is as long as this",
]


def grouped_verdicts(model, judge):
    """Ratings of several candidates, and pairs, of long prompts and of one without company."""
    prompts = [LONG[0]] * 3 + [LONG[1]] * 2 + ["short"]
    ratings = judge.rate(prompts, ["one", "two, and more", "3", "four", "five or so", "6"])
    pairs = judge.compare([*LONG, "x"], ["one", "two", "a"], ["1", "2 or more", "b"])
    orders = [p for pair in pairs for p in pair.by_order]
    return [x.expected for x in ratings] + orders, judge.tokens_run


def test_texts_about_one_prompt_share_it(model, monkeypatch):
    shares = model.config.model_type != "gemma2"  # whose window is shorter than these texts
    alone, _ = grouped_verdicts(model, make_judge(model, batch_size=1))
    together, tokens = grouped_verdicts(model, make_judge(model, batch_size=16))
    assert together == pytest.approx(alone, abs=1e-5)
    split, _ = grouped_verdicts(model, make_judge(model, batch_size=5))
    assert split == pytest.approx(alone, abs=1e-5)
    monkeypatch.setattr(scoring, "LEAST_SHARED", 10**6)
    apart, tokens_apart = grouped_verdicts(model, make_judge(model, batch_size=16))
    assert apart == pytest.approx(alone, abs=1e-5)
    if shares:
        assert tokens < 0.75 * tokens_apart
    else:
        assert tokens == tokens_apart


@pytest.mark.parametrize(("rests", "expected"), [
    ([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 7], [1, 2, 3, 4, 5, 8]], [(5, 3)]),
    ([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [9, 9, 9, 9, 9, 1], [9, 9, 9, 9, 9, 2]],
     [(4, 2), (5, 2)]),
    ([[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 7, 9], [1, 2, 3, 4, 8, 8]], [(4, 3)]),
    ([[1, 2, 3], [1, 2, 3]], []),
    ([[1, 2, 3, 4, 5, 6], [2, 2, 3, 4, 5, 6]], []),
])  # fmt: skip
def test_neighbors_are_grouped_where_that_saves_tokens(llama, monkeypatch, rests, expected):
    model = make_judge(llama)._model
    groups = model._groups(rests, 1, 0)
    assert groups == expected


# --- Models against each other --------------------------------------------------------------------
def contest(folder, *more, judge=None):
    """A command line: a thinking model against a plain one on four prompts."""
    if not (folder / "thinks").exists():
        model = thinking_model(plain_model(LLAMA), thoughts={"positions": "answer_start"})
        model.save_pretrained(folder / "thinks", load_tokenizer("bytes"))
        for name, seed in (("plain", 3), ("judge", 0)):
            plain = plain_model(LLAMA, max_position_embeddings=512, seed=seed)
            plain.save_pretrained(folder / name)
            load_tokenizer("bytes").save_pretrained(folder / name)
        (folder / "mine.j2").write_text(TEMPLATE, encoding="utf-8")
        lines = [json.dumps({"prompt": f"{text} is"}) + "\n" for text in PROMPTS[:4]]
        (folder / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")
    return [
        "judge", "--prompts", str(folder / "prompts.jsonl"), "--model", str(folder / "judge"),
        "--template", str(folder / "mine.j2"), "--out", str(folder / "out.jsonl"),
        "--max-new-tokens", "4", "--batch-size", "2", *more,
    ]  # fmt: skip


def test_two_models_are_compared_by_what_they_write(tmp_path, capsys):
    names = [str(tmp_path / name) for name in ("thinks", "plain")]
    line = contest(tmp_path, "--compare", *names, "--html", str(tmp_path / "page.html"))
    assert cli.main(line) == 0
    shown = capsys.readouterr().out
    assert "thinks wins over plain" in shown
    texts = json.loads((tmp_path / "out.candidates.json").read_text(encoding="utf-8"))["texts"]
    labels = [json.loads(row) for row in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()]
    summary = json.loads((tmp_path / "out.judge.json").read_text(encoding="utf-8"))["summary"]
    rates = []
    for first, second, label in zip(*texts, labels, strict=True):
        first, second = (text.strip() or "(no text)" for text in (first, second))
        assert {first, second} == {label["chosen"], label["rejected"]}
        p = label["soft_label"]
        rates.append(p if label["chosen"] == first else 1 - p)
    assert summary["win_rate"] == pytest.approx(sum(rates) / 4)
    model = thinking_model(plain_model(LLAMA), thoughts={"positions": "answer_start"})
    ids = torch.tensor([load_tokenizer("bytes")(f"{PROMPTS[0]} is")["input_ids"]])
    own = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert texts[0][0] == load_tokenizer("bytes").decode(own[0, ids.shape[1] :])
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert ("Clearest for" in page) == any(max(rate, 1 - rate) >= CLEAR for rate in rates)
    assert ("Its verdicts say little" in page) == (summary["mass"] < LEAST_MASS)


def test_a_model_is_compared_with_itself_without_thoughts(tmp_path):
    name = str(tmp_path / "thinks")
    assert cli.main(contest(tmp_path, "--compare", name, name, "--thoughts", "on", "off")) == 0
    with_thoughts, without = json.loads((tmp_path / "out.candidates.json").read_text())["texts"]
    assert with_thoughts != without


def test_a_contest_goes_on_from_the_texts_that_are_written(tmp_path, monkeypatch):
    names = [str(tmp_path / name) for name in ("thinks", "plain")]
    line = contest(tmp_path, "--compare", *names)
    assert cli.main(line) == 0
    whole = (tmp_path / "out.jsonl").read_bytes()
    path = tmp_path / "out.candidates.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    document["texts"] = [document["texts"][0], document["texts"][1][:2]]
    path.write_text(json.dumps(document), encoding="utf-8")
    (tmp_path / "out.jsonl").unlink()
    loaded = []
    plain_load = load_model
    monkeypatch.setattr(
        "quietstar.cli.options.load_model", lambda *a: loaded.append(a[3]) or plain_load(*a)
    )
    assert cli.main(line) == 0
    assert loaded == [names[1]], "only the model whose texts were missing"
    assert (tmp_path / "out.jsonl").read_bytes() == whole


@pytest.mark.parametrize(("more", "message"), [
    ([], "--pairs or --compare: must be given"),
    (["--compare", "plain", "plain"], "its likeliest texts are the same"),
    (["--compare", "plain", "plain", "--thoughts", "on", "off"], "and does not think"),
    (["--compare", "plain", "nowhere"], "nowhere): there is no such folder"),
    (["--compare", "plain", "thinks", "--rationale", "600"],
     "judge): --template and --rationale: take"),
    (["--compare", "plain", "thinks", "--max-new-tokens", "600"], "there must be at most 513"),
])  # fmt: skip
def test_a_contest_that_cannot_be_is_refused(tmp_path, capsys, more, message):
    line = contest(tmp_path)
    more = [str(tmp_path / x) if x in ("plain", "thinks", "nowhere") else x for x in more]
    if "--max-new-tokens" in more:
        at = line.index("--max-new-tokens")
        del line[at : at + 2]
    assert cli.main([*line, *more]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.candidates.json").exists()


def test_samples_depend_on_the_seed_alone(tmp_path, monkeypatch):
    """A model against itself: two samples, the same ones after an interrupt."""
    line = contest(tmp_path, "--compare", *[str(tmp_path / "plain")] * 2, "--temperature", "1")
    path = tmp_path / "out.candidates.json"
    assert cli.main(line) == 0
    whole = json.loads(path.read_text(encoding="utf-8"))
    assert whole["texts"][0] != whole["texts"][1]
    part = {**whole, "texts": [whole["texts"][0][:2], []]}
    path.write_text(json.dumps(part), encoding="utf-8")
    (tmp_path / "out.jsonl").unlink()
    torch.rand(3)
    assert cli.main(line) == 0
    assert json.loads(path.read_text(encoding="utf-8")) == whole
    assert cli.main([*line, "--seed", "1", "--force"]) == 0
    assert json.loads(path.read_text(encoding="utf-8"))["texts"] != whole["texts"]


def test_a_model_that_has_written_nothing_may_be_another_one(tmp_path):
    names = [str(tmp_path / name) for name in ("thinks", "plain")]
    line = contest(tmp_path, "--compare", *names)
    assert cli.main(line) == 0
    path = tmp_path / "out.candidates.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    document["settings"]["model 2"] = "other"
    (tmp_path / "out.jsonl").unlink()
    path.write_text(json.dumps(document), encoding="utf-8")
    assert cli.main(line) == 2
    path.write_text(json.dumps({**document, "texts": [document["texts"][0], []]}), encoding="utf-8")
    assert cli.main(line) == 0
