"""Positions that the data mark, by a pattern or a field: tokens, cuts, runs, mistakes."""

import json
import re
from types import SimpleNamespace
from unittest.mock import Mock

import datasets
import numpy as np
import pytest
import torch
from launching import launch, marked
from test_data import SlowTokenizer, error_of, write_jsonl
from test_training import SUMS, timeless, train
from tiny import plain_model, read_metrics, run_config, thinking_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from quietstar import QuietStarForCausalLM
from quietstar.cli import main as cli
from quietstar.config import Config, DataConfig, ThoughtsConfig
from quietstar.config.loading import save_config
from quietstar.data import (
    PatternMarker,
    build_data,
    byte_tokenizer,
    load_tokenizer,
    marking,
    sources,
)
from quietstar.data.encoding import Encoded, Encoder, chunks
from quietstar.errors import UserError
from quietstar.training import loop
from quietstar.training.state import StageRun

PATTERN = ThoughtsConfig(positions="pattern", pattern="x+")
FIELD = ThoughtsConfig(positions="field")


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


def word_pieces():
    """Some tokens of several characters, as most models have, with the space before a word."""
    vocab = {token: n for n, token in enumerate(["Ġa", "=Ġ", "=", "Ġ", "1", "12", "a", "<eos>"])}
    merges = [("Ġ", "a"), ("=", "Ġ"), ("1", "2")]
    vocab |= {"2": len(vocab)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def marked_bytes(pattern, text, tokenizer):
    """Offsets into the text, in UTF-8, of the tokens that are marked."""
    ids = tokenizer(text)["input_ids"]
    return PatternMarker(pattern, tokenizer)(ids).nonzero()[0].tolist()


# --- Patterns -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("pattern", "text", "expected"),
    [
        (r"\d+", "a 12 b3", [2, 6]),
        (r"=\s*(\d+)", "a = 12, b =3\nc = d", [4, 11]),
        (r"=(\d)|\n", "=1\n=x\n", [1, 2, 5]),  # group 1 where it took part, else the match
        ("^", "ab\ncd\n", [0, 3]),  # after the last line is no token
        ("$", "ab\ncd", [2]),
        (r"(?<=\. )\w", "One. Two. X", [5, 10]),
        ("é", "aé€é", [1, 6]),  # the first of the tokens that share a character
        ("€|b", "aé€b€", [3, 6, 7]),
    ],
)
def test_a_pattern_marks_the_token_with_the_first_character(pattern, text, expected, tokenizer):
    assert marked_bytes(pattern, text, tokenizer) == expected


@pytest.mark.parametrize("seed", range(10))
def test_marks_are_where_python_finds_matches(seed, tokenizer):
    rng = np.random.default_rng(seed)
    text = "".join(rng.choice(list("ab1 \n=é€"), 200))
    for pattern in (r"\w+", r"=\s*(\w)?", "^.", "(?i)A+", "€(é)|b", r"\b"):
        expected = set()
        for match in re.finditer(pattern, text, re.MULTILINE):
            start = match.start(1) if match.re.groups and match.start(1) >= 0 else match.start()
            if start < len(text):
                expected.add(len(text[:start].encode()))
        assert marked_bytes(pattern, text, tokenizer) == sorted(expected), pattern


def test_matches_may_begin_inside_a_token_and_behind_special_ones():
    tokenizer = word_pieces()
    ids = tokenizer("a a= 12")["input_ids"] + [tokenizer.eos_token_id]
    assert [tokenizer.decode([i]) for i in ids] == ["a", " a", "= ", "12", "<eos>"]

    def marks(pattern):
        return PatternMarker(pattern, tokenizer)(ids).tolist()

    assert marks(r"(?<=\s)\S") == [False, True, False, True, False]
    assert marks("2") == [False, False, False, True, False]
    assert not any(marks("<eos>|[eos]+"))  # none begins in a special token
    ids = [tokenizer.eos_token_id, *ids]
    assert marks("<eos>(.)") == [False, True, False, False, False, False]


@pytest.mark.parametrize(
    ("pattern", "text", "expected"),
    [
        (r"=(\d+)", "a=12 b=3", [2, 7]),
        ("^a|b", "~a~~b~", [1, 4]),
        ("c", "~~", []),
    ],
)
def test_a_tokenizer_without_offsets_and_tokens_without_text_serve(pattern, text, expected):
    class Slow(SlowTokenizer):
        def convert_tokens_to_string(self, tokens):
            return "".join(tokens).replace("~", "")

    ids = Slow().encode(text, add_special_tokens=False)
    assert PatternMarker(pattern, Slow())(ids).nonzero()[0].tolist() == expected


def test_a_pattern_that_backtracks_for_ever_is_ended(tokenizer, monkeypatch):
    monkeypatch.setattr(marking, "PATTERN_SECONDS", 0.05)
    ids = tokenizer("a" * 60 + "c")["input_ids"]
    with pytest.raises(UserError, match=r"thoughts.pattern \('\^\(a\|aa\)\+\$'\): takes more than"):
        PatternMarker("^(a|aa)+$", tokenizer)(ids)


@pytest.mark.parametrize("spans", ["random", "concatenate"])
@pytest.mark.parametrize("streaming", [False, True])
def test_batches_have_the_marks_of_their_own_text(tmp_path, tokenizer, spans, streaming):
    texts = [{"text": "abxxcdx" * n} for n in range(1, 13)]
    path = write_jsonl(tmp_path / "x.jsonl", texts)
    config = DataConfig(train=path, seq_len=16, spans=spans, streaming=streaming, eval_sequences=4)
    data, held_out, _ = build_data(config, tokenizer, 0, PATTERN)
    batches = [data.batch(step, 8) for step in range(3)] + list(held_out.batches(4))
    for batch in batches:
        ids, x = batch.input_ids, ord("x")
        expected = (ids == x) & (ids.roll(1, 1) != x)
        expected[:, 0] = ids[:, 0] == x
        assert torch.equal(batch.marked, expected)
    assert batches[0].marked.any()
    plain, _, _ = build_data(config, tokenizer, 0)
    assert not plain.batch(0, 8).marked.any()


# --- Fields ---------------------------------------------------------------------------------------
def marked_text(encoded):
    return bytes(encoded.ids[encoded.marked].tolist()).decode(errors="replace")


def encode(config, tokenizer, **record):
    return Encoder(tokenizer, config)([record])[0]


def test_offsets_mark_the_tokens_that_hold_their_characters(tokenizer):
    config = DataConfig(positions_field="where to think")
    encoded = encode(config, tokenizer, text="aé€b\n", positions=[4, 1, 1])
    assert encoded.marked.nonzero()[0].tolist() == [1, 7]  # é and the line's end, in bytes
    assert len(encoded.marked) == len(encoded)
    pieces = encode(config, word_pieces(), text="a a= 12", positions=[1, 4, 6])
    assert pieces.marked.tolist() == [False, True, True, True, False]
    slow = encode(config, SlowTokenizer(), text="abc", positions=[2])
    assert bytes(slow.ids[slow.marked].tolist()) == b"c"
    assert encode(config, tokenizer, text="abc", positions=None).marked.sum() == 0
    assert len(encode(DataConfig(), tokenizer, text="abc").marked) == 0


def test_offsets_of_questions_and_chats_are_into_their_joined_text(tokenizer):
    config = DataConfig(format="qa", template="Q{question} {answer}", positions_field="at")
    encoded = encode(config, tokenizer, question="1+1", answer="2!", positions=[0, 5, 6])
    assert marked_text(encoded) == "Q2!"
    tokenizer.chat_template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    chat = {"messages": [{"role": "user", "content": "ab"}, {"role": "user", "content": "c"}]}
    config = DataConfig(format="chat", positions_field="at")
    assert marked_text(encode(config, tokenizer, **chat, positions=[2, 5])) == "bc"


def test_marks_move_with_cuts_and_chunks(tmp_path, tokenizer):
    texts = [chr(97 + n) * 30 for n in range(8)]
    records = [{"text": t[:9] + "X" + t[10:], "at": [9]} for t in texts]
    path = write_jsonl(tmp_path / "x.jsonl", records)
    for spans in ("random", "concatenate"):
        config = DataConfig(train=path, positions_field="at", seq_len=20, spans=spans)
        data, held_out, _ = build_data(config, tokenizer, 0, FIELD)
        seen = 0
        for batch in (*(data.batch(step, 8) for step in range(4)), *held_out.batches(8)):
            assert torch.equal(batch.marked, batch.input_ids == ord("X"))
            seen += int(batch.marked.sum())
        assert seen > 10
    mask = np.ones(3, np.bool_)
    one = Encoded(np.arange(3, dtype=np.int32), mask, mask, marked=np.array([0, 1, 0], np.bool_))
    joined = list(chunks([one, one], 4))
    assert [chunk.marked.tolist() for chunk in joined] == [[False, True, False, False],
                                                           [True, False]]  # fmt: skip


def test_a_large_file_whose_first_records_have_no_positions_is_read(
    tmp_path, tokenizer, monkeypatch
):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(sources, "IN_MEMORY_BYTES", 10)
    records = [{"text": "abc", "at": []}] * 1100 + [{"text": "abc", "at": [1]}] * 1100
    config = DataConfig(train=write_jsonl(tmp_path / "x.jsonl", records), positions_field="at")
    data, _, _ = build_data(config, tokenizer, 0, FIELD)
    counts = data.batch(0, 100).marked.sum(-1).tolist()
    assert set(counts) == {0, 1}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("at", "words"),
    [
        ("3", "line 2: field 'at' must be a list of character offsets, not a str"),
        ({"a": 1}, "line 2: field 'at' must be a list of character offsets, not an object"),
        ([1, 2.0], "line 2: field 'at' must hold whole numbers, not a number"),
        ([True], "line 2: field 'at' must hold whole numbers, not a bool"),
        ([-1], "line 2: field 'at' holds -1: an offset must be from 0"),
        ([10**30], "an offset must be from 0 to the last character"),
        ([0, 3], "line 2: field 'at' holds 3: an offset must be less than 3"),
    ],
)
def test_offsets_that_cannot_be_are_refused_with_place_and_rule(
    tmp_path, tokenizer, at, words, streaming
):
    records = [{"text": "abcd", "at": [1]}, {"text": "abc", "at": at}]
    path = write_jsonl(tmp_path / "x.jsonl", records)
    config = DataConfig(train=path, positions_field="at", streaming=streaming, eval_sequences=1)
    message = error_of(config, tokenizer)
    assert words in message
    assert path in message


def test_a_missing_field_and_generated_problems_are_refused(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": "abcd"}] * 2)
    message = error_of(DataConfig(train=path, positions_field="at"), tokenizer)
    assert "line 1: no field 'at' (its fields: text): set data.positions_field" in message
    message = error_of(DataConfig(train="synthetic:moves", format="qa", positions_field="at"),
                       tokenizer)  # fmt: skip
    assert "data.positions_field: 'at' is no field of generated problems" in message


# --- Runs -----------------------------------------------------------------------------------------
def records_with_marks(path, count=40):
    texts = ["".join("abcdefgh"[(n * k) % 8] for k in range(30)) for n in range(1, count + 1)]
    return write_jsonl(path, [{"text": t, "at": [5, 8, 20]} for t in texts])


@pytest.mark.parametrize(
    "changes",
    [
        {"thoughts__positions": "pattern", "thoughts__pattern": "[a-c]+"},
        {"thoughts__positions": "field", "data__positions_field": "at"},
        {"thoughts__positions": "one_random"},
        {"thoughts__positions": "top_entropy", "thoughts__position_fraction": 2},
    ],
    ids=lambda changes: changes["thoughts__positions"],
)
def test_a_run_thinks_there_and_its_model_can_be_used(tmp_path, changes, caplog):
    config = run_config(
        tmp_path, **changes, data__train=records_with_marks(tmp_path / "x.jsonl"),
        training__max_steps=2, thoughts__num_thoughts=2, logging__thought_steps=1,
    )  # fmt: skip
    folder = train(config)
    records = read_metrics(folder, "train")
    per_text = [record["positions_per_text"] for record in records]
    if changes["thoughts__positions"] == "one_random":
        assert per_text == [1, 1]
    elif "thoughts__position_fraction" in changes:
        assert per_text == [2, 2]
    else:
        assert all(0 < number < 11 for number in per_text)
    assert all(np.isfinite(record["mixed_nll"]) for record in read_metrics(folder))
    model = QuietStarForCausalLM.from_pretrained(folder / "final")
    assert model.thoughts == config.thoughts
    ids = torch.tensor([list(b"abcabcde")])
    assert model.generate(ids, max_new_tokens=2).shape == (1, 10)
    if "thoughts__pattern" in changes:
        marker = PatternMarker(model.thoughts.pattern, load_tokenizer(str(folder / "final")))
        marks = torch.from_numpy(marker(ids[0].tolist()))[None]
        assert model.choose_positions(ids, marked=marks).tolist() == [[-1]]
    assert cli.main(["generate", "--model", str(folder / "final"), "--inspect", "abcd", "--out",
                     str(tmp_path / "page.json")]) == 0  # fmt: skip
    task = tmp_path / "task.jsonl"
    task.write_text('{"prompt": "abc", "answer": "d"}\n{"prompt": "bc", "answer": "e"}\n')
    assert cli.main(["eval", "--model", str(folder / "final"), "--tasks", str(task), "--out",
                     str(tmp_path / "out.json")]) == 0  # fmt: skip
    is_marked = changes["thoughts__positions"] in ("pattern", "field")
    assert ("but answers are thought about before each" in caplog.text) == is_marked


def test_a_run_with_answers_thinks_where_a_pattern_matches(tmp_path):
    config = run_config(
        tmp_path, **SUMS, thoughts__positions="pattern", thoughts__pattern=r"= (-?\d)"
    )  # fmt: skip
    folder = train(config)
    after = read_metrics(folder, "eval")[-1]
    assert 0 <= after["accuracy_with_thoughts"] <= 1
    samples = json.loads((folder / "samples.json").read_text(encoding="utf-8"))["samples"]
    assert len(samples) == 4


def scored_config(tmp_path):
    """Thinks where the model is unsure, then where a pattern matches."""
    scored = {"positions": "top_entropy", "position_fraction": 3}
    pattern = {"positions": "pattern", "pattern": "[aeiou]"}
    # With seed 0 two entropies are so near that their order is that of the rounding.
    config = run_config(
        tmp_path, training__seed=1, training__micro_batch_size=3, loss__policy_weight=1.0
    )
    stages = {"scored": {"thoughts": scored, "training": {"max_steps": 2}},
              "pattern": {"thoughts": pattern, "training": {"max_steps": 2}}}  # fmt: skip
    return Config.model_validate(config.model_dump() | {"stages": stages})


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [marked(strategy) for strategy in ("fsdp2", "zero3")])
def test_two_ranks_think_where_one_process_does(strategy, tmp_path):
    config = scored_config(tmp_path)
    save_config(config, tmp_path / "config.yaml")
    two = read_metrics(launch(strategy, tmp_path / "config.yaml", tmp_path / "two"))
    one = read_metrics(train(config))
    for record, wanted in zip(two, one, strict=True):
        for key in {"loss", "positions_per_text", "mixed_nll"} & record.keys():
            assert record[key] == pytest.approx(wanted[key], rel=1e-4), (record["step"], key)


def test_held_out_texts_without_a_position_are_refused_before_the_first_step(tmp_path):
    config = run_config(tmp_path, thoughts__positions="pattern", thoughts__pattern="QQQ+")
    with pytest.raises(UserError, match=r"thoughts.pattern \('QQQ\+'\): matches nowhere"):
        train(config)
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": "abcd", "at": [0]}] * 20)
    config = run_config(
        tmp_path, thoughts__positions="field", data__positions_field="at", data__train=path
    )  # fmt: skip
    with pytest.raises(UserError, match=r"data.positions_field \('at'\): names no character"):
        train(config)


def test_texts_without_positions_are_said_and_an_epoch_of_them_ends_the_run(tmp_path, capsys):
    rare = [{"text": "abcd" * 4}] * 30
    held_out = write_jsonl(tmp_path / "eval.jsonl", [{"text": "abXd" * 4}] * 4)
    changes = {
        "thoughts__positions": "pattern", "thoughts__pattern": "X", "data__eval": held_out,
        "training__max_steps": 9, "training__global_batch_size": 8,
    }  # fmt: skip
    config = run_config(tmp_path, **changes, data__train=write_jsonl(tmp_path / "none.jsonl", rare))
    words = r"step 4: the last 32 texts have no target that thoughts.positions \(pattern\)"
    with pytest.raises(UserError, match=words):
        train(config)
    said = capsys.readouterr().out
    assert said.count("none of its 8 texts has a target that thoughts.positions (pattern)") == 1
    assert [r["positions_per_text"] for r in read_metrics(tmp_path / "run", "train")] == [0.0] * 4


@pytest.mark.parametrize("epoch", [24, None], ids=["table", "stream"])
def test_only_texts_one_after_the_other_count(epoch, monkeypatch):
    monkeypatch.setattr(loop, "MOST_IDLE_TEXTS", 24)
    stage, data = SimpleNamespace(thinks=True), SimpleNamespace(epoch=epoch)
    config = Config.model_validate(
        {"model": {"name_or_path": "x"}, "data": {"train": "x"}, "thoughts": {"positions": "every"}}
    )
    state = Mock(
        spec=StageRun, idle_texts=0, config=config, stage=stage, reporter=Mock(), train_data=data
    )
    for step, num_positions in enumerate([0, 0, 5, 0, 0]):
        loop.check_idle_texts(state, step, num_positions)
    assert state.reporter.warn_once.call_count == 4
    with pytest.raises(UserError, match="step 9: the last 24 texts"):
        loop.check_idle_texts(state, 9, 0)
    stage.thinks = False
    loop.check_idle_texts(state, 9, 0)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_table_of_the_hub_has_positions(tokenizer, monkeypatch, streaming):
    rows = [{"body": "abcdefgh", "at": [1, 3]}, {"body": "abcdefgh", "at": None}] * 12
    table = datasets.Dataset.from_list(rows)
    monkeypatch.setattr(
        sources,
        "load_dataset",
        lambda *_, **__: table.to_iterable_dataset() if streaming else table,
    )
    config = DataConfig(train="owner/name", text_field="body", positions_field="at",
                        streaming=streaming, eval_sequences=2, eval_fraction=0.5)  # fmt: skip
    data, _, _ = build_data(config, tokenizer, 0, FIELD)
    rows = {tuple(row.nonzero()[:, 0].tolist()) for row in data.batch(0, 12).marked}
    assert rows == {(1, 3), ()}


def test_a_text_that_is_not_marked_changes_no_thought_of_the_others():
    """A micro-batch may have no position at all, and the loss is that of its text alone."""
    model = thinking_model(plain_model(), thoughts={"positions": "field"}).train()
    texts = torch.tensor([list(b"abcdefg"), list(b"gfedcba")])
    marked = torch.zeros_like(texts, dtype=torch.bool)
    marked[0, 3] = True
    counts = {"num_items_in_batch": 12, "num_thought_items": 1}
    ids = torch.arange(2)
    whole = model(texts, marked=marked, sample_ids=ids, **counts).loss
    parts = [model(texts[n : n + 1], marked=marked[n : n + 1], sample_ids=ids[n : n + 1], **counts)
             for n in range(2)]  # fmt: skip
    assert parts[1].positions.tolist() == [[-1]]
    torch.testing.assert_close(whole, sum(part.loss for part in parts))
    parts[1].loss.backward()


def test_timeless_records_of_a_pattern_are_those_of_any_cut(tmp_path):
    runs = []
    for micro in (8, 3):
        config = run_config(
            tmp_path, thoughts__positions="pattern", thoughts__pattern="[aeiou]",
            training__micro_batch_size=micro, training__output_dir=str(tmp_path / f"run{micro}"),
        )  # fmt: skip
        runs.append(
            [r["positions_per_text"] for r in timeless(read_metrics(train(config), "train"))]
        )
    assert runs[0] == runs[1]
