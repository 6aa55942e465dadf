import json
import os
from collections import Counter
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import PreTrainedTokenizer

from quietstar.config import DataConfig
from quietstar.data import build_data, byte_tokenizer
from quietstar.data import encoding as encoding_module
from quietstar.data import sources as sources_module
from quietstar.data.batches import IGNORED, answer_span
from quietstar.data.encoding import Encoded, Encoder, chunks
from quietstar.errors import UserError

EOS, PAD = 256, 257
NO_ANSWER = np.zeros(3, np.bool_)
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def chat_tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(autouse=True)
def _cache_in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def text_file(tmp_path, texts, name="data.jsonl"):
    return write_jsonl(tmp_path / name, [{"text": text} for text in texts])


def numbered(count, length=40):
    """Texts, each of one repeated letter and thus recognisable from any span."""
    return [chr(0x41 + n) * length for n in range(count)]


def decode(batch, row=0):
    return bytes(i for i in batch.input_ids[row][batch.attention_mask[row]] if i < 256).decode()


def learned(batch, row=0):
    """Returns the target ids of a row, checked to be the input ids at their places."""
    chosen = batch.labels[row] != IGNORED
    assert torch.equal(batch.labels[row][chosen], batch.input_ids[row][chosen])
    assert not (chosen & ~batch.attention_mask[row]).any()
    return batch.labels[row][chosen].tolist()


def error_of(config, tokenizer):
    with pytest.raises(UserError) as caught:
        build_data(config, tokenizer, 0)
    message = str(caught.value)
    assert "\n" not in message
    return message


def assert_same(first, second):
    for name in ("input_ids", "attention_mask", "labels", "sample_ids"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


def encode_one(config, tokenizer, record):
    return Encoder(tokenizer, config)([record])[0]


# ---- order, cuts and seeds


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("spans", ["random", "concatenate"])
def test_a_batch_is_the_same_for_every_cut_batch_size_and_start(
    tmp_path, tokenizer, streaming, spans
):
    path = text_file(tmp_path, numbered(40))
    config = DataConfig(train=path, seq_len=16, streaming=streaming, spans=spans, eval_sequences=4)
    data, _, _ = build_data(config, tokenizer, 3)
    for step in (0, 1, 7):
        whole = data.batch(step, 8)
        halves = [data.batch(step, 8, range(0, 4)), data.batch(step, 8, range(4, 8))]
        for name in ("input_ids", "attention_mask", "labels", "sample_ids"):
            parts = torch.cat([getattr(half, name) for half in halves])
            assert torch.equal(getattr(whole, name), parts)
        assert whole.sample_ids.tolist() == list(range(8 * step, 8 * step + 8))
        assert whole.input_ids.shape == (8, 16)
    assert_same(data.batch(1, 8, range(2, 4)), data.batch(5, 2))  # an index, of any batch size
    batches = [data.batch(step, 3) for step in range(12)]
    again, _, _ = build_data(config, tokenizer, 3)
    assert_same(again.batch(11, 3), batches[11])  # as after a resume
    assert_same(again.batch(4, 3), batches[4])  # backwards as well


def test_no_document_comes_twice_in_an_epoch_and_epochs_differ(tmp_path, tokenizer):
    config = DataConfig(train=text_file(tmp_path, numbered(20)), seq_len=16)
    data, _, report = build_data(config, tokenizer, 0)
    assert report.sequences == 19
    seen = [decode(data.batch(index, 1))[0] for index in range(3 * 19)]
    epochs = [seen[start : start + 19] for start in (0, 19, 38)]
    assert all(len(set(epoch)) == 19 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_seed_decides_order_spans_and_held_out_part(tmp_path, tokenizer):
    texts = [f"{n:02d}" + "abcdefghijklmnop" * 5 for n in range(40)]
    config = DataConfig(train=text_file(tmp_path, texts), seq_len=16)
    first, same, other = (build_data(config, tokenizer, seed) for seed in (1, 1, 2))
    assert_same(first[0].batch(0, 8), same[0].batch(0, 8))
    assert_same(next(first[1].batches(8)), next(same[1].batches(8)))
    assert not torch.equal(first[0].batch(0, 8).input_ids, other[0].batch(0, 8).input_ids)


def test_the_seed_decides_the_order_also_without_a_split(tmp_path, tokenizer):
    path = text_file(tmp_path, numbered(20, 5))
    config = DataConfig(train=path, eval=path, seq_len=16)
    orders = [
        [decode(data.batch(step, 1))[0] for step in range(20)]
        for data, _, _ in (build_data(config, tokenizer, seed) for seed in (0, 1))
    ]
    assert orders[0] != orders[1]
    assert set(orders[0]) == set(orders[1])


def test_random_spans_of_one_document_differ_between_visits_and_reach_both_ends(
    tmp_path, tokenizer
):
    text = "abcdefghij"
    data, _, _ = build_data(
        DataConfig(train=text_file(tmp_path, [text, text]), seq_len=8), tokenizer, 0
    )
    # 10 bytes and eos: starts 0 to 3, equally likely.
    spans = Counter(tuple(data.batch(step, 1).input_ids[0].tolist()) for step in range(200))
    whole = [*text.encode(), EOS]
    assert set(spans) == {tuple(whole[start : start + 8]) for start in range(4)}
    assert min(spans.values()) > 25  # 50 expected, standard deviation 6


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("spans", ["random", "concatenate"])
def test_the_context_of_a_sequence_is_no_target(tmp_path, tokenizer, streaming, spans):
    config = DataConfig(
        train=text_file(tmp_path, numbered(30)), seq_len=12, spans=spans, streaming=streaming,
        min_context=5, eval_sequences=4,
    )  # fmt: skip
    data, held_out, _ = build_data(config, tokenizer, 0)
    for batch in (data.batch(0, 4), *held_out.batches(2)):
        assert (batch.labels[:, :5] == -100).all()
        real = batch.attention_mask[:, 5:]
        assert real.any()
        assert torch.equal(batch.labels[:, 5:][real], batch.input_ids[:, 5:][real])


# ---- held-out part


def test_held_out_documents_are_never_trained_on(tmp_path, tokenizer):
    config = DataConfig(train=text_file(tmp_path, numbered(40)), seq_len=16, eval_fraction=0.2)
    data, held_out, report = build_data(config, tokenizer, 0)
    trained = {decode(data.batch(step, 1))[0] for step in range(64)}
    evaluated = {decode(batch)[0] for batch in held_out.batches(1)}
    assert (report.documents, report.held_out_documents) == (32, 8)
    assert len(trained) == 32
    assert len(evaluated) == 8
    assert not trained & evaluated


def test_evaluation_is_the_same_every_time_and_for_every_micro_batch(tmp_path, tokenizer):
    config = DataConfig(
        train=text_file(tmp_path, numbered(40)), seq_len=16, eval_fraction=0.5, eval_sequences=7
    )
    _, held_out, report = build_data(config, tokenizer, 0)
    batches = list(held_out.batches(3))
    assert [len(batch.input_ids) for batch in batches] == [3, 3, 1]
    assert len(held_out) == report.eval_sequences == 7
    assert torch.cat([batch.sample_ids for batch in batches]).tolist() == list(range(7))
    single = torch.cat([batch.input_ids for batch in held_out.batches(1)])
    assert torch.equal(torch.cat([batch.input_ids for batch in batches]), single)


def test_few_long_held_out_documents_give_several_disjoint_spans(tmp_path, tokenizer):
    text = "".join(chr(n) for n in range(0x20, 0x7F)) * 1  # 95 characters, none twice
    config = DataConfig(train=text_file(tmp_path, [text] * 3), seq_len=16, eval_fraction=0.3)
    _, held_out, _ = build_data(config, tokenizer, 0)
    spans = [decode(batch) for batch in held_out.batches(1)]
    assert len(spans) == 6  # 96 tokens with eos, 16 each
    assert len("".join(spans)) == len(set("".join(spans))) == 95


def test_a_file_of_its_own_is_evaluated_on_where_given(tmp_path, tokenizer):
    config = DataConfig(
        train=text_file(tmp_path, numbered(5)),
        eval=text_file(tmp_path, ["zzz"], "eval.jsonl"),
        seq_len=16,
    )
    _, held_out, report = build_data(config, tokenizer, 0)
    assert [decode(batch) for batch in held_out.batches(1)] == ["zzz"]
    assert report.documents == 5


def test_the_head_of_a_stream_is_held_out_and_the_rest_comes_in_order(tmp_path, tokenizer):
    config = DataConfig(
        train=text_file(tmp_path, ["", *numbered(10, 5)]),
        seq_len=8,
        streaming=True,
        eval_sequences=3,
    )
    data, held_out, report = build_data(config, tokenizer, 0)
    assert "".join(decode(batch)[0] for batch in held_out.batches(1)) == "ABC"
    order = "".join(decode(data.batch(step, 1))[0] for step in range(10))
    assert order == "DEFGHIJDEF"
    assert report.documents is None
    assert report.held_out_documents == 3


def test_a_joined_stream_shares_no_document_with_its_head(tmp_path, tokenizer):
    config = DataConfig(
        train=text_file(tmp_path, numbered(10, 5)),
        seq_len=8,
        streaming=True,
        spans="concatenate",
        eval_sequences=1,
    )
    data, held_out, _ = build_data(config, tokenizer, 0)
    # A and B (6 tokens each) are needed for 8 tokens; training starts at C.
    assert decode(next(held_out.batches(1))) == "AAAAABB"
    assert decode(data.batch(0, 1)) == "CCCCCDD"


# ---- labels, padding, end of text


@pytest.mark.parametrize("pad", [PAD, EOS])
def test_a_short_text_ends_with_a_learned_eos_and_padding_is_no_target(tmp_path, tokenizer, pad):
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    config = DataConfig(train=text_file(tmp_path, ["abc", "abc"]), seq_len=6)
    data, _, report = build_data(config, tokenizer, 0)
    batch = data.batch(0, 1)
    assert batch.input_ids.tolist() == [[97, 98, 99, EOS, pad, pad]]
    assert batch.attention_mask.tolist() == [[True] * 4 + [False] * 2]
    assert batch.labels.tolist() == [[97, 98, 99, EOS, IGNORED, IGNORED]]
    assert report.padded == 1


def test_eos_is_not_doubled_where_the_text_or_tokenizer_already_ends_with_it(tokenizer):
    encoded = encode_one(DataConfig(), tokenizer, {"text": "ab<|endoftext|>"})
    assert encoded.ids.tolist() == [97, 98, EOS]


def test_bos_stands_at_the_start_of_a_document_if_the_tokenizer_adds_it(tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|pad|> $A", special_tokens=[("<|pad|>", PAD)]
    )
    text = encode_one(DataConfig(), tokenizer, {"text": "ab"})
    assert text.ids.tolist() == [PAD, 97, 98, EOS]
    config = DataConfig(format="qa", loss_on="answer")
    record = encode_one(config, tokenizer, {"question": "q", "answer": "a"})
    assert record.ids.tolist() == [PAD, *b"q\na", EOS]
    assert record.targets.tolist() == [False, False, False, True, True]


def test_joined_documents_are_separated_by_eos_and_cut_without_loss(tmp_path, tokenizer):
    config = DataConfig(
        train=text_file(tmp_path, ["abc", "de", "fghijk"]),
        eval=text_file(tmp_path, ["xyz"], "eval.jsonl"),
        seq_len=4,
        spans="concatenate",
    )
    data, _, report = build_data(config, tokenizer, 0)
    # 4 + 3 + 7 tokens: three whole chunks and one of two tokens.
    rows = {tuple(data.batch(step, 1).input_ids[0].tolist()) for step in range(4)}
    assert rows == {
        (97, 98, 99, EOS),
        (100, 101, EOS, 102),
        (103, 104, 105, 106),
        (107, EOS, PAD, PAD),
    }
    assert (report.sequences, report.padded, report.tokens) == (4, 1, 14)


def test_chunks_keep_targets_beside_their_tokens():
    one = Encoded(np.arange(3, dtype=np.int32), np.array([False, True, True]), NO_ANSWER)
    two = Encoded(np.arange(3, 6, dtype=np.int32), np.array([False, True, True]), NO_ANSWER)
    joined = list(chunks([one, two], 4))
    assert [chunk.ids.tolist() for chunk in joined] == [[0, 1, 2, 3], [4, 5]]
    assert [chunk.targets.tolist() for chunk in joined] == [
        [False, True, True, False],
        [True, True],
    ]
    # A single token at the end has nothing to predict.
    assert [chunk.ids.tolist() for chunk in chunks([one, two], 5)] == [[0, 1, 2, 3, 4]]


# ---- questions and answers


def test_only_answer_and_eos_are_learned_where_asked(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "qa.jsonl", [{"question": "1+1?", "answer": "2é"}] * 2)
    config = DataConfig(train=path, format="qa", loss_on="answer", seq_len=12)
    data, _, _ = build_data(config, tokenizer, 0)
    batch = data.batch(0, 1)
    # "1+1?" and the line break are 5 bytes, "2é" 3 bytes, then eos: 9 tokens.
    assert batch.input_ids.tolist() == [[*b"1+1?\n", *"2é".encode(), EOS, PAD, PAD, PAD]]
    assert batch.labels[0].tolist() == [IGNORED] * 5 + [*"2é".encode(), EOS] + [IGNORED] * 3
    everything = build_data(config.model_copy(update={"loss_on": "all"}), tokenizer, 0)[0]
    assert learned(everything.batch(0, 1)) == [*"1+1?\n2é".encode(), EOS]


def test_a_token_across_the_joint_belongs_to_the_answer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"q": 0, ":": 1, " ": 2, "a": 3, " a": 4, "<eos>": 5}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[(" ", "a")]))
    backend.pre_tokenizer = pre_tokenizers.Split(":", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    config = DataConfig(format="qa", loss_on="answer", template="{question}: {answer}")
    encoded = encode_one(config, tokenizer, {"question": "q", "answer": "a"})
    assert encoded.ids.tolist() == [0, 1, 4, 5]  # as the tokenizer cuts the whole text
    assert encoded.targets.tolist() == [False, False, True, True]


def test_spaces_before_an_answer_go_with_it(tokenizer):
    record = {"question": "1+1=", "answer": "2"}
    config = DataConfig(format="qa", loss_on="answer", template="{question}  {answer}")
    encoded = encode_one(config, tokenizer, record)
    assert bytes(encoded.ids[encoded.answers].tolist()).decode() == "  2"
    newline = encode_one(DataConfig(format="qa", loss_on="answer"), tokenizer, record)
    assert bytes(newline.ids[newline.answers].tolist()).decode() == "2"


def test_braces_in_question_and_answer_are_text(tokenizer):
    record = {"question": "\\frac{1}{2} {answer}", "answer": "{question}"}
    encoded = encode_one(DataConfig(format="qa"), tokenizer, record)
    assert bytes(encoded.ids[:-1].tolist()).decode() == "\\frac{1}{2} {answer}\n{question}"


def test_a_long_question_loses_its_start_and_keeps_the_answer(tmp_path, tokenizer):
    records = [{"question": "0123456789", "answer": "ab"}] * 2
    path = write_jsonl(tmp_path / "qa.jsonl", records)
    for loss_on in ("answer", "all"):
        config = DataConfig(train=path, format="qa", loss_on=loss_on, seq_len=6)
        data, held_out, report = build_data(config, tokenizer, 0)
        assert data.batch(0, 1).input_ids.tolist() == [[*b"89\nab", EOS]]
        assert next(held_out.batches(1)).input_ids.tolist() == [[*b"89\nab", EOS]]
        assert report.truncated == 1


def test_a_long_answer_keeps_one_token_before_it_and_loses_its_end(tokenizer):
    config = DataConfig(format="qa", loss_on="answer")
    document = encode_one(config, tokenizer, {"question": "qq", "answer": "abcdefgh"})
    assert bytes(answer_span(document, 5).ids.tolist()) == b"\nabcd"
    assert answer_span(document, 5).targets.tolist() == [False, True, True, True, True]


class SlowTokenizer(PreTrainedTokenizer):
    """One token per character, without offsets; bos is `^`."""

    def __init__(self):
        super().__init__(eos_token="$", bos_token="^")

    @property
    def vocab_size(self):
        return 128

    def get_vocab(self):
        return {chr(n): n for n in range(128)}

    def _tokenize(self, text):
        return list(text)

    def _convert_token_to_id(self, token):
        return ord(token)

    def _convert_id_to_token(self, index):
        return chr(index)

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        return [self.bos_token_id, *token_ids_0]


def test_a_slow_tokenizer_marks_the_answer_by_parts():
    config = DataConfig(format="qa", loss_on="answer")
    tokenizer = SlowTokenizer()
    assert not tokenizer.is_fast
    encoded = encode_one(config, tokenizer, {"question": "qu", "answer": "an"})
    assert "".join(map(chr, encoded.ids)) in ("^qu\nan$", "qu\nan$")
    assert "".join(map(chr, encoded.ids[encoded.targets])) == "an$"


# ---- chats

CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "ho"},
    {"role": "user", "content": "x"},
    {"role": "assistant", "content": "yes"},
]


def test_a_chat_learns_what_the_assistant_says_and_its_end(tmp_path, chat_tokenizer):
    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": CHAT}] * 2)
    config = DataConfig(train=path, format="chat", loss_on="answer", seq_len=128)
    data, _, _ = build_data(config, chat_tokenizer, 0)
    batch = data.batch(0, 1)
    whole = "<user>hi</s>\n<assistant>ho</s>\n<user>x</s>\n<assistant>yes</s>\n"
    assert decode(batch) == whole
    assert bytes(learned(batch)).decode() == "ho</s>yes</s>"
    everything = build_data(config.model_copy(update={"loss_on": "all"}), chat_tokenizer, 0)[0]
    assert bytes(learned(everything.batch(0, 1))).decode() == whole


def test_a_long_chat_keeps_its_last_answer(chat_tokenizer):
    config = DataConfig(format="chat", loss_on="answer")
    document = encode_one(config, chat_tokenizer, {"messages": CHAT})
    assert bytes(answer_span(document, 10).ids.tolist()) == b"t>yes</s>\n"
    assert bytes(answer_span(document, 8).ids.tolist()) == b">yes</s>"
    assert bytes(answer_span(document, 6).ids.tolist()) == b">yes</"


def test_a_chat_without_an_answer_is_dropped_and_counted(tmp_path, chat_tokenizer):
    records = [{"messages": CHAT}] * 3 + [{"messages": CHAT[:1]}]
    path = write_jsonl(tmp_path / "chat.jsonl", records)
    config = DataConfig(train=path, format="chat", loss_on="answer")
    assert build_data(config, chat_tokenizer, 0)[2].dropped_empty == 1


def test_a_template_that_rewrites_earlier_messages_is_refused_for_answers_alone(
    tmp_path, chat_tokenizer
):
    chat_tokenizer.chat_template = "{{ messages | length }}" + CHAT_TEMPLATE
    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": CHAT}] * 2)
    config = DataConfig(train=path, format="chat", loss_on="answer")
    assert "set data.loss_on: all" in error_of(config, chat_tokenizer)
    build_data(config.model_copy(update={"loss_on": "all"}), chat_tokenizer, 0)


def test_a_chat_that_the_template_refuses_is_one_line(tmp_path, chat_tokenizer):
    chat_tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": CHAT}] * 2)
    message = error_of(DataConfig(train=path, format="chat"), chat_tokenizer)
    assert "roles must alternate" in message
    assert "user, assistant" in message


# ---- files


def test_every_kind_of_file_gives_the_same_documents(tmp_path, tokenizer):
    texts = ["first é", "second", "third"]
    text_file(tmp_path, texts, "a.jsonl")
    (tmp_path / "b.json").write_text(json.dumps([{"text": text} for text in texts], indent=1))
    text_file(tmp_path, texts, "c.json")
    pyarrow.parquet.write_table(
        pyarrow.table({"text": texts, "n": [1, 2, 3]}), tmp_path / "d.parquet"
    )
    for name in ("a.jsonl", "b.json", "c.json", "d.parquet"):
        source = sources_module.open_source(str(tmp_path / name), DataConfig(), 0)
        assert list(source.table["text"]) == texts, name


def test_a_folder_is_read_in_order_with_its_subfolders_and_without_hidden_files(tmp_path):
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    (folder / ".cache").mkdir()
    text_file(folder, ["one"], "a.jsonl")
    (folder / "b.txt").write_text("two\n")
    text_file(folder / "sub", ["three"], "c.jsonl")
    text_file(folder / ".cache", ["hidden"], "d.jsonl")
    (folder / "notes.md").write_text("not data")
    (folder / "z.txt").write_text("")
    source = sources_module.open_source(str(folder), DataConfig(), 0)
    assert list(source.table["text"]) == ["one", "two\n", "three"]


def test_a_long_text_file_is_cut_at_blank_lines_without_loss(tmp_path):
    text = "".join(f"line {n}\n" + ("\n" if n % 7 == 0 else "") for n in range(20_000))
    (tmp_path / "long.txt").write_text(text)
    source = sources_module.open_source(str(tmp_path / "long.txt"), DataConfig(), 0)
    parts = list(source.table["text"])
    assert "".join(parts) == text
    assert len(parts) > 3
    assert all(part.endswith("\n\n") and len(part) < 33_000 for part in parts[:-1])


def test_a_large_file_goes_to_a_cached_arrow_file_and_is_read_again_when_changed(
    tmp_path, tokenizer, monkeypatch
):
    path = text_file(tmp_path, numbered(4))
    config = DataConfig(train=path, seq_len=16)
    in_memory = build_data(config, tokenizer, 0)[0].batch(0, 3)
    monkeypatch.setattr(sources_module, "IN_MEMORY_BYTES", 0)
    mapped = sources_module.open_source(path, config, 0).table
    assert mapped.cache_files
    assert_same(build_data(config, tokenizer, 0)[0].batch(0, 3), in_memory)
    text_file(tmp_path, ["new", "text"])
    os.utime(path, ns=(1, 1))
    assert list(sources_module.open_source(path, config, 0).table["text"]) == ["new", "text"]
    text_file(tmp_path, ["fine"])
    with open(path, "a") as file:
        file.write("{broken\n")
    assert "line 2: malformed JSON" in error_of(config, tokenizer)


def test_a_table_too_large_to_count_is_tokenised_on_demand_to_the_same_samples(
    tmp_path, tokenizer, monkeypatch
):
    config = DataConfig(train=text_file(tmp_path, [*numbered(20), "ab"]), seq_len=16)
    counted = build_data(config, tokenizer, 0)
    monkeypatch.setattr(encoding_module, "EXACT_BYTES", 0)
    lazy = build_data(config, tokenizer, 0)
    assert_same(lazy[0].batch(2, 8), counted[0].batch(2, 8))
    assert_same(next(lazy[1].batches(4)), next(counted[1].batches(4)))
    assert (counted[2].exact, lazy[2].exact) == (True, False)
    assert lazy[2].tokens == counted[2].tokens  # fewer documents than the estimate reads
    assert "about" in lazy[2].summary()


def test_a_table_of_the_hub_is_used_by_its_columns(tmp_path, tokenizer, monkeypatch):
    calls = []

    def load(name, subset, split, streaming):
        calls.append((name, subset, split, streaming))
        table = datasets.Dataset.from_dict({"id": range(9), "body": numbered(9, 5)})
        return table.to_iterable_dataset() if streaming else table

    monkeypatch.setattr(sources_module, "load_dataset", load)
    config = DataConfig(train="owner/name:en:train", text_field="body", seq_len=16)
    assert build_data(config, tokenizer, 0)[2].documents == 8
    stream = config.model_copy(
        update={"streaming": True, "train": "owner/name:test", "eval_sequences": 2}
    )
    assert decode(build_data(stream, tokenizer, 0)[0].batch(0, 1)) == "CCCCC"
    assert calls == [("owner/name", "en", "train", False), ("owner/name", None, "test", True)]
    for name in ("owner/name:", "owner/name::test", "owner/name:a:b:c"):
        message = error_of(config.model_copy(update={"train": name}), tokenizer)
        assert message == (
            f"data.train: {name}: must be owner/name, owner/name:split, or owner/name:subset:split"
        )
    message = error_of(config.model_copy(update={"text_field": "text"}), tokenizer)
    assert "no field 'text' (its fields: id, body): set data.text_field" in message
    message = error_of(config.model_copy(update={"text_field": "id"}), tokenizer)
    assert "field 'id' must hold strings" in message


# ---- fields as templates


CHOICES = (
    "{{ question.stem }}{% for c in question.choices %}\n({{ c.label }}) {{ c.text }}{% endfor %}"
)
NESTED = {
    "question": {"stem": "What flies?", "choices": [{"label": "A", "text": "a bird"},
                                                    {"label": "B", "text": "a stone"}]},
    "answer": "Birds have wings.\n#### 1,000 ",
    "note": None,
}  # fmt: skip
TEMPLATES = {
    "format": "qa",
    "question_field": CHOICES,
    "answer_field": "{{ answer.split('####')[-1].strip().replace(',', '') }}{{ note }}",
    "template": "{question} {answer}",
    "seq_len": 64,
}


def stored(path, form, records):
    """The records as a file of this form."""
    if form == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path / "data.parquet")
        return str(path / "data.parquet")
    return write_jsonl(path / f"data.{form}", records)


@pytest.mark.parametrize("form", ["jsonl", "parquet", "hub", "stream of the hub"])
def test_templates_make_questions_and_answers_of_the_fields_of_records(
    tmp_path, tokenizer, monkeypatch, form
):
    if "hub" in form:
        table = datasets.Dataset.from_list([NESTED] * 4)
        table = table.to_iterable_dataset() if "stream" in form else table
        monkeypatch.setattr(sources_module, "load_dataset", lambda *_, **__: table)
        train = "owner/name"
    else:
        train = stored(tmp_path, form, [NESTED] * 4)
    config = DataConfig(
        train=train, streaming="stream" in form, eval_sequences=1, eval_fraction=0.25, **TEMPLATES
    )
    batch = build_data(config, tokenizer, 0)[0].batch(0, 1)
    assert decode(batch) == "What flies?\n(A) a bird\n(B) a stone 1000"


def test_a_text_file_is_read_through_a_template(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("a walk\n")
    (tmp_path / "b.txt").write_text("a walk\n")
    config = DataConfig(train=str(tmp_path), text_field="{{ text | upper }}", eval_fraction=0.5)
    assert decode(build_data(config, tokenizer, 0)[0].batch(0, 1)) == "A WALK\n"


@pytest.mark.parametrize(
    ("answer_field", "reason"),
    [
        ("{{ answers }}", "'answers' is undefined; the record's fields: question, answer, note"),
        ("{{ answer.split('=')[1] }}", "has no element 1"),
        ("{{ answer.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is"),
    ],
)
def test_a_template_that_fails_names_the_record_and_the_key(
    tmp_path, tokenizer, answer_field, reason
):
    train = write_jsonl(tmp_path / "a.jsonl", [NESTED])
    options = {**TEMPLATES, "answer_field": answer_field}
    message = error_of(DataConfig(train=train, **options), tokenizer)
    assert message.startswith(f"{train}, line 1: the template of data.answer_field fails (")
    assert reason in message


# ---- generated problems


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_generated_problems_are_questions_with_answers(tokenizer, streaming):
    config = DataConfig(
        train="reasoning_gym:chain_sum",
        format="qa",
        loss_on="answer",
        eval_sequences=4,
        streaming=streaming,
        task_options={"size": 20, "max_terms": 3, "max_digits": 1},
    )
    data, held_out, _ = build_data(config, tokenizer, 0)
    batch = data.batch(0, 8)
    for row in range(8):
        expression = decode(batch, row).split(": ")[1].split(" =\n")[0]
        answer = bytes(learned(batch, row)[:-1]).decode()
        assert eval(expression) == int(answer)
    assert len(held_out) == (4 if streaming else 1)


def test_generated_problems_fit_every_format_and_none_answers_are_dropped(
    chat_tokenizer, monkeypatch
):
    problems = [{"question": "q", "answer": "a"}] * 3 + [{"question": "q", "answer": None}]
    gym = SimpleNamespace(factory=SimpleNamespace(DATASETS={"any": None}))
    gym.create_dataset = lambda task, size, seed: problems
    monkeypatch.setattr(sources_module, "import_reasoning_gym", lambda label: gym)
    expected = {"qa": "q\na", "text": "q\na", "chat": "<user>q</s>\n<assistant>a</s>\n"}
    for name, text in expected.items():
        config = DataConfig(train="reasoning_gym:any", format=name, seq_len=64)
        data, _, report = build_data(config, chat_tokenizer, 0)
        assert decode(data.batch(0, 1)) == text
        assert (report.documents, report.held_out_documents, report.dropped_empty) == (2, 1, 1)


def test_problems_of_a_named_evaluation_are_not_those_trained_on(tokenizer):
    config = DataConfig(
        train="reasoning_gym:base_conversion",
        eval="reasoning_gym:base_conversion",
        format="qa",
        task_options={"size": 30},
        eval_sequences=10,
        seq_len=512,
    )
    data, held_out, report = build_data(config, tokenizer, 5)
    trained = {decode(data.batch(step, 1)) for step in range(30)}
    evaluated = {decode(batch) for batch in held_out.batches(1)}
    assert report.documents == 30
    assert len(evaluated) == 10
    assert not trained & evaluated


# ---- bad input


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"train": None}, "data.train: is not set"),
        ({"eval": "no.jsonl"}, "data.eval: "),
        ({"streaming": True}, "lower data.eval_sequences, or set data.eval"),
        ({"format": "chat"}, "data.format: 'chat' needs a tokenizer with a chat template"),
        ({"loss_on": "answer"}, "data.loss_on: 'answer' needs records"),
        ({"train": "folder"}, "holds no file that ends in"),
        ({"train": "a.txt", "format": "qa"}, "set data.format: text"),
        ({"train": "a.parquet"}, "no field 'text' (its fields: body)"),
    ],
)
def test_settings_that_do_not_fit_the_data_are_refused(
    tmp_path, tokenizer, monkeypatch, changes, expected
):
    monkeypatch.chdir(tmp_path)
    text_file(tmp_path, ["a", "b"])
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.txt").write_text("text")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), "a.parquet")
    values = {**DataConfig(train="data.jsonl").model_dump(), **changes}
    assert expected in error_of(DataConfig.model_construct(**values), tokenizer)


def test_a_missing_file_suggests_its_neighbour(tmp_path, tokenizer):
    text_file(tmp_path, ["a"], "openstax.jsonl")
    message = error_of(DataConfig(train=str(tmp_path / "opnstax.jsonl")), tokenizer)
    assert message.endswith("no such file or folder; did you mean openstax.jsonl?")
    assert message.startswith("data.train: ")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("empty.jsonl", b"", "is empty (0 bytes)"),
        ("blank.jsonl", b"\n \n", "holds no record"),
        ("data.csv", b"text\nabc\n", "unsupported ending '.csv': must be .jsonl, .json, .txt or"),
        ("bad.jsonl", b'{"text": "a"}\n\n{"text": \n', "line 3: malformed JSON"),
        ("bad.json", b'[{"text": "a"},\n {"text": }]', "line 2: malformed JSON"),
        ("list.jsonl", b'["a"]\n', "line 1: a record must be an object with fields, not a list"),
        ("field.jsonl", b'{"text": "a"}\n{"body": "b"}', "no field 'text' (its fields: body)"),
        ("type.jsonl", b'{"text": 3}', "line 1: field 'text' must be a string, not a number"),
        ("latin.jsonl", b'{"text": "a"}\n{"text": "\xe9"}', "line 2: byte 0xe9 is no UTF-8"),
        ("latin.txt", b"a\n\xff", "line 2: byte 0xff is no UTF-8"),
        ("half.jsonl", b'{"text": "\\ud800"}', "line 1: field 'text': character 0 is no Unicode"),
        ("no.parquet", b"PAR0", "is no parquet file"),
        ("null.jsonl", b'{"text": null}\n{"text": " "}', "every record is empty"),
        ("one.jsonl", b'{"text": "a"}', "one document cannot be split"),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused_with_place_and_rule(tmp_path, tokenizer, name, content, expected):
    path = tmp_path / name
    path.write_bytes(content)
    message = error_of(DataConfig(train=str(path)), tokenizer)
    assert expected in message
    assert str(path) in message


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ("hello", "must be a list of messages, not a str"),
        (["hello"], "a message must be an object, not a str"),
        ([{"role": "user"}], "message 1: no field 'content' (its fields: role)"),
        ([{"role": "user", "content": ["x"]}], "field 'content' must be a string, not a list"),
    ],
)
def test_a_bad_chat_is_refused_with_place_and_rule(tmp_path, chat_tokenizer, messages, expected):
    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": messages}])
    message = error_of(DataConfig(train=path, format="chat"), chat_tokenizer)
    assert "line 1" in message
    assert expected in message


def test_an_unreachable_hub_set_says_that_it_is_no_local_path_either(tokenizer, monkeypatch):
    def load(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'owner/nothing' on the Hub\nand more")

    monkeypatch.setattr(sources_module, "load_dataset", load)
    message = error_of(DataConfig(train="owner/nothing"), tokenizer)
    assert "no such file or folder here" in message
    assert "Couldn't reach" in message
    assert "and more" not in message


def test_an_unknown_task_and_wrong_options_are_refused(tokenizer):
    config = DataConfig(train="reasoning_gym:chain_sun", format="qa")
    assert error_of(config, tokenizer).endswith("did you mean chain_sum?")
    config = DataConfig(train="reasoning_gym:chain_sum", task_options={"terms": 3})
    message = error_of(config, tokenizer)
    assert message.startswith("data.task_options: {'terms': 3} is refused")


def test_a_missing_generator_package_says_how_to_install_it(tokenizer, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    for name in ("reasoning_gym:chain_sum", "synthetic:sums"):
        message = error_of(DataConfig(train=name, format="qa"), tokenizer)
        assert name in message
        assert "pip install 'quietstar[tasks]'" in message
