"""Texts that end thoughts: the automaton, the rollout, generation, saved models, mistakes."""

import json
import random
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tiny import plain_model, random_texts, read_metrics, run_config, think, thinking_model

from quietstar import QuietStarForCausalLM
from quietstar.cli import main as cli
from quietstar.data import load_tokenizer
from quietstar.errors import UserError
from quietstar.model.outputs import percentile
from quietstar.reports import write_report
from quietstar.sampling.stopping import StopTexts, token_pieces
from quietstar.training.run import run_training

OFTEN = [chr(c) for c in range(32, 72)]
"""Forty of 258 tokens: a random model ends a sixth of its thoughts with each token."""
LENGTH = 5


def build(stop=OFTEN, **thoughts):
    thoughts = {"length": LENGTH, "stop": stop, **thoughts}
    return thinking_model(plain_model(eos_token_id=256), thoughts=thoughts).eval()


# --- The automaton --------------------------------------------------------------------------------
def first_end(texts, pieces, tokens, end_ids):
    """Place of the first token by which one of the texts, or the end, was written; by searching."""
    written = ""
    for place, token in enumerate(tokens):
        written += pieces[token]
        if token in end_ids or any(text in written for text in texts):
            return place
    return None


@pytest.mark.parametrize("seed", range(20))
def test_it_finds_the_first_token_that_completes_a_text(seed):
    rng = random.Random(seed)
    pieces = ["a", "b", "c", *("".join(rng.choices("abc", k=rng.randrange(5))) for _ in range(9))]
    texts = ["".join(rng.choices("abc", k=rng.randrange(1, 5))) for _ in range(rng.randrange(1, 4))]
    stop = StopTexts(texts, pieces, [11])
    thoughts = [rng.choices(range(12), k=8) for _ in range(200)]
    state, ends = torch.zeros(200, dtype=torch.long), [None] * 200
    for place, tokens in enumerate(zip(*thoughts, strict=True)):
        state = stop.step(state, torch.tensor(tokens))
        for n in (state == stop.ended).nonzero()[:, 0].tolist():
            ends[n] = place if ends[n] is None else ends[n]
    assert ends == [first_end(texts, pieces, t, {11}) for t in thoughts]
    assert None in ends or len(set(ends)) > 1
    padded = torch.tensor([t[: e + 1] + [-1] * (7 - e) if e is not None else t
                           for t, e in zip(thoughts, ends, strict=True)])  # fmt: skip
    is_ended = stop.is_ended(padded).tolist()
    assert is_ended == [end is not None for end in ends]


def pieces_of_bytes():
    """What tokens write; special ones write no letters of these texts."""
    tokenizer = load_tokenizer("bytes")
    special = set(tokenizer.all_special_ids)
    return ["\ufffd" if i in special else x for i, x in enumerate(token_pieces(tokenizer))]


def test_pieces_are_what_tokens_add_to_a_text():
    tokenizer = load_tokenizer("bytes")
    pieces = token_pieces(tokenizer)
    assert len(pieces) == len(tokenizer)
    ids = tokenizer("so, 3 + 4.\n\nA", add_special_tokens=False)["input_ids"]
    assert "".join(pieces[i] for i in ids) == "so, 3 + 4.\n\nA"


@pytest.mark.parametrize(
    ("stop", "words"),
    [
        (["ok", "é"], r"thoughts.stop: 'é' cannot be written with the tokens of this model"),
        (["a" * 600, "b" * 600], "has 1,200 characters, but at most 300 fit"),
    ],
)
def test_texts_that_cannot_end_a_thought_are_refused(stop, words):
    with pytest.raises(UserError, match=words):
        build(stop)


# --- Thoughts -------------------------------------------------------------------------------------
@pytest.mark.parametrize("positions", [None, torch.tensor([[1, 4, 6], [0, 7, -1]])])
@pytest.mark.parametrize("temperature", [None, 1.0])
def test_thoughts_are_those_of_fixed_length_up_to_their_end(temperature, positions):
    model, texts = build(), random_texts(2, 9)
    arguments = {"num_thoughts": 3, "temperature": temperature, "positions": positions, "seed": 4}
    batch = model.draw(texts, **arguments)
    pieces = pieces_of_bytes()
    whole = build(stop=[]).draw(texts, **arguments)
    assert (whole.tokens >= 0).all()
    real = batch.positions >= 0
    rows = zip(whole.tokens[real].flatten(0, 1).tolist(), batch.tokens[real].flatten(0, 1).tolist(),
               batch.lengths[real].flatten().tolist(), strict=True)  # fmt: skip
    lengths = set()
    for all_tokens, tokens, length in rows:
        end = first_end(OFTEN, pieces, all_tokens, {256})
        expected = LENGTH if end is None else end + 1
        assert tokens == all_tokens[:expected] + [-1] * (LENGTH - expected)
        assert length == expected
        lengths.add(length)
    assert temperature is None or len(lengths) > 2


def test_the_rollout_ends_with_its_last_thought(monkeypatch):
    from quietstar.sampling import rollout

    model, steps = build(stop=[chr(c) for c in range(1, 128)]), []
    run = rollout._Steps.run
    monkeypatch.setattr(
        rollout._Steps, "run", lambda self, tokens: steps.append(self.index) or run(self, tokens)
    )
    batch = model.draw(random_texts(1, 2), temperature=1.0, positions=torch.tensor([[1]]), seed=2)
    assert steps == list(range(1, int(batch.lengths.max())))  # the start vector ran before
    assert int(batch.lengths.max()) < LENGTH


def test_a_step_learns_from_them_and_counts_their_tokens():
    model, texts = build().train(), random_texts(2, 9)
    output = model(texts, seed=1)
    output.loss.backward()
    figures = output.metrics.means()
    real = output.thoughts[:, :-1]  # after the last token there is no target
    lengths = (real >= 0).sum(-1)
    assert figures["thought_length"] == pytest.approx(lengths.float().mean().item())
    pieces = pieces_of_bytes()
    cut = [first_end(OFTEN, pieces, t, {256}) is None for t in real.flatten(0, 2).tolist()]
    assert 0 < sum(cut) < len(cut)
    assert figures["truncated_fraction"] == pytest.approx(sum(cut) / len(cut))
    assert figures["stop_fraction"] == pytest.approx(1 - sum(cut) / len(cut))
    assert figures["thought_length_p90"] == pytest.approx(np.percentile(lengths.numpy(), 90))
    given = build()(texts, thoughts=build().draw(texts, num_thoughts=2, temperature=1.0, seed=1))
    assert torch.equal(given.loss, output.loss)
    fixed = build(stop=[])(texts).metrics.means()
    assert not {"thought_length", "thought_length_p90", "stop_fraction"} & fixed.keys()


@pytest.mark.parametrize("positions", ["all", "random"])
def test_lengths_of_micro_batches_and_ranks_pool_exactly(positions):
    model, texts = build(positions=positions, position_fraction=0.4, num_thoughts=3), []
    parts, lengths = [], []
    for seed, (batch, seq) in enumerate([(2, 9), (1, 6)]):
        texts = random_texts(batch, seq, seed=seed)
        output = model(texts, seed=seed)
        parts.append(output.metrics)
        real = output.thoughts
        # After the last token there is no target.
        real = real[:, :-1] if output.positions is None else real[output.positions >= 0]
        lengths += (real >= 0).sum(-1).flatten().tolist()
    assert len(set(lengths)) > 2

    def reduce(x, how):  # the other rank has the second micro-batch
        other = parts[1]._table() if x.is_floating_point() else parts[1].lengths
        return x + other

    accelerator = Mock(spec=Accelerator, num_processes=2, reduce=reduce)
    for pooled in (parts[0] + parts[1], parts[0].reduced(accelerator)):
        assert pooled.lengths.tolist() == np.bincount(lengths, minlength=LENGTH + 1).tolist()
        figures = pooled.means()
        assert figures["thought_length_p90"] == pytest.approx(np.percentile(lengths, 90))
        assert figures["thought_length"] == pytest.approx(np.mean(lengths))
        assert figures["stop_fraction"] + figures["truncated_fraction"] == pytest.approx(1)


@pytest.mark.parametrize("seed", range(5))
def test_percentiles_of_counts_are_those_of_the_numbers(seed):
    rng = random.Random(seed)
    numbers = [rng.choice([0, 1, 4, 5, 9]) for _ in range(rng.randrange(1, 30))]
    counts = np.bincount(numbers, minlength=12).tolist()
    for fraction in (0.0, 0.5, 0.9, 1.0):
        expected = np.percentile(numbers, 100 * fraction)
        assert percentile(counts, fraction) == pytest.approx(expected)


def test_a_saved_model_ends_its_thoughts_as_before(tmp_path):
    model, texts = build(), random_texts(2, 9)
    expected = model.draw(texts, num_thoughts=2, temperature=1.0).tokens
    model.save_pretrained(tmp_path / "model", load_tokenizer("bytes"))
    loaded = QuietStarForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(loaded.draw(texts, num_thoughts=2, temperature=1.0).tokens, expected)
    assert (expected == -1).any()
    model.save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="tokenizer"):
        QuietStarForCausalLM.from_pretrained(tmp_path / "bare")


def test_stop_texts_can_change_between_stages():
    model, texts = build(stop=[]), random_texts(2, 9)
    whole = model.draw(texts).tokens
    model.configure(model.thoughts.model_copy(update={"stop": OFTEN}))
    assert (model.draw(texts, temperature=1.0).tokens == -1).any()
    model.configure(model.thoughts.model_copy(update={"stop": []}))
    assert torch.equal(model.draw(texts).tokens, whole)
    model.tokenizer = None
    with pytest.raises(UserError, match=r"needs the tokenizer of the model. Set model.tokenizer"):
        model.configure(model.thoughts.model_copy(update={"stop": OFTEN}))


def test_generation_ends_thoughts_also_where_embeddings_are_narrower_than_states():
    base = plain_model({"model_type": "opt", "hidden_size": 16, "word_embed_proj_dim": 8,
                        "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
                        "max_position_embeddings": 64})  # fmt: skip
    model = thinking_model(base, thoughts={"length": LENGTH, "stop": OFTEN}).eval()
    out = model.generate(
        random_texts(1, 6), max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0,
        thought_temperature=1.0, seed=3, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    seen = think(model, out.sequences, temperature=1.0, seed=3)
    assert torch.equal(out.thoughts[0, :, 0], seen.tokens[0, 5:9, 0])
    assert (out.thoughts == -1).any()
    for step, token in enumerate(out.sequences[0, 6:]):
        logprob = out.logits[step][0].log_softmax(-1)[token]
        torch.testing.assert_close(logprob, seen.mixed_logprobs[0, 5 + step, 0, 0])


# --- From a run to its evaluation -----------------------------------------------------------------
def test_a_run_with_them_is_the_same_however_it_is_cut_and_all_commands_read_its_model(
    tmp_path, capsys
):
    losses = []
    for name, micro_batch, chunk in (("whole", 8, None), ("cut", 3, 40)):
        config = run_config(
            tmp_path, thoughts__length=LENGTH, thoughts__stop=OFTEN, training__max_steps=3,
            thoughts__positions="random", thoughts__position_fraction=0.5,
            training__micro_batch_size=micro_batch, training__learn_chunk_tokens=chunk,
            training__output_dir=str(tmp_path / name), thoughts__temperature=1.5,
        )  # fmt: skip
        final = str(run_training(config, on_report=write_report))
        records = read_metrics(tmp_path / name, "train")
        losses.append([record["loss"] for record in records])
        assert all(1 < record["thought_length"] < LENGTH for record in records)
        assert all(0 < record["truncated_fraction"] < 1 for record in records)
        assert all(record["thought_length_p90"] >= record["thought_length"] for record in records)
        assert "90th percentile" in (tmp_path / name / "report.html").read_text(encoding="utf-8")
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)

    task = tmp_path / "task.jsonl"
    task.write_text('{"prompt": "one and", "answer": " two"}\n{"prompt": "2 +", "answer": " 3"}\n')
    out, page = tmp_path / "out.json", tmp_path / "page.json"
    sampled = ["--thought-temperature", "1"]
    call = ["eval", "--model", final, "--tasks", str(task), "--controls", "--out", str(out)]
    assert cli.main([*call, *sampled]) == 0
    items = (tmp_path / "out.items.jsonl").read_text().splitlines()
    own = [json.loads(line) for line in items if '"with_thoughts"' in line]
    texts = [text for record in own for some in record["thought_texts"] for text in some]
    assert min(map(len, texts)) < LENGTH
    assert cli.main(["generate", "--model", final, "--inspect", "one and two", *sampled,
                     "--out", str(page)]) == 0  # fmt: skip
    thoughts = [k for t in json.loads(page.read_text())["tokens"][1:] for k in t["thoughts"]]
    assert len({len(thought["ids"]) for thought in thoughts}) > 1
    assert all(len(k["ids"]) == len(k["probabilities"]) == len(k["texts"]) for k in thoughts)
    capsys.readouterr()
    assert cli.main(["generate", "--model", final, "--prompt", "one", "--max-new-tokens", "3",
                     "--show-thoughts", *sampled]) == 0  # fmt: skip
    assert "⟨" in capsys.readouterr().out
