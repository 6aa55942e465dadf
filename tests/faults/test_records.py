"""Data files of every kind give batches, or one line that names file and reason."""

import io
import json
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import random_texts, thinking_model

from quietstar import registry
from quietstar.config import Config, DataConfig, loss_config
from quietstar.data import EvalData, TrainData, build_data, byte_tokenizer, encoding, sources
from quietstar.data.synthetic import MovesOptions
from quietstar.errors import UserError
from quietstar.sampling.positions import choose_positions, count_positions

TOKENIZER = byte_tokenizer()
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture(autouse=True)
def _cache_in_tmp_path(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def error_of(path, **changes):
    config = DataConfig(**{"train": str(path), "seq_len": 8, **changes})
    with pytest.raises(UserError) as caught:
        build_data(config, TOKENIZER, 0)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def data_or_line(path, **changes):
    """Builds the data; whatever is wrong must be a `UserError` of one line that names the file."""
    config = DataConfig(**{"train": str(path), "seq_len": 8, "eval_sequences": 2, **changes})
    try:
        train, held_out, _ = build_data(config, TOKENIZER, 0)
        train.batch(0, 2)
    except UserError as error:
        return str(error)
    assert isinstance(train, TrainData)
    assert isinstance(held_out, EvalData)
    return None


def check(content, ending, **changes):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"x{ending}"
        path.write_bytes(content)
        line = data_or_line(path, **changes)
        assert line is None or (str(path) in line and "\n" not in line), line


# --- Whatever is in it ----------------------------------------------------------------------------
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=()), max_size=20)
)
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["text", "question", "answer", "messages", "role"]), inner
        )
    ),
    max_leaves=8,
)
FORMS = st.sampled_from([{"format": "text"}, {"format": "qa"}])
STREAMS = st.booleans()


@settings(max_examples=100, deadline=5000, derandomize=True)
@given(st.binary(max_size=100), st.sampled_from([".jsonl", ".json", ".txt", ".parquet"]), STREAMS)
def test_any_bytes_are_data_or_one_line(content, ending, streaming):
    check(content, ending, streaming=streaming)


@settings(max_examples=100, deadline=5000, derandomize=True)
@given(st.lists(JSON, max_size=4), FORMS, st.booleans(), STREAMS)
def test_any_json_is_data_or_one_line(values, form, as_list, streaming):
    lines = json.dumps(values) if as_list else "\n".join(map(json.dumps, values))
    check(lines.encode(), ".json", streaming=streaming, **form)


def parquet(table, **options):
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file, **options)
    return file.getvalue()


WHOLE = parquet(pyarrow.table({"text": [f"some text {n}" for n in range(50)], "n": range(50)}))


@settings(max_examples=150, deadline=5000, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(4, len(WHOLE) - 1), st.integers(0, 255)), max_size=4),
    st.integers(0, len(WHOLE)),
    STREAMS,
)
def test_any_damage_to_a_parquet_file_is_data_or_one_line(changes, cut, streaming):
    content = bytearray(WHOLE if cut % 3 else WHOLE[:cut])
    for place, byte in changes:
        if place < len(content):
            content[place] = byte
    check(bytes(content), ".parquet", streaming=streaming)


# --- JSON -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"text": "a", "text": "b"}', "line 1: malformed JSON (the name 'text' stands twice"),
        (b'{"text": "a"}\n{"a": {"b": 1, "b": 2}}', "line 2: malformed JSON (the name 'b' stands"),
        (b'{"text": ' + b"[" * 200_000, "line 1: malformed JSON (it is nested too deeply)"),
        (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "line 1: malformed JSON (Exceeds the limit"),
        (b'{"text": NaN}', "line 1: field 'text' must be a string, not a number"),
        (b'{"text": "a"}\x00', "line 1: malformed JSON"),
        (b'\xff\xfe{\x00"\x00', "line 1: byte 0xff is no UTF-8"),
        (b'{"text": "a"}\n\xef\xbb\xbf{"text": "b"}', "line 2: malformed JSON"),
        (b'"\\ud800"', "line 1: a record must be an object"),
        (json.dumps({f"field {n}": 1 for n in range(5000)}).encode(), "no field 'text'"),
    ],
)
def test_odd_json_is_told_with_its_line(content, words, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    message = error_of(path)
    assert words in message
    assert len(message) < 600


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'[{"text": "a", "text": "b"}]', "x.json: malformed JSON (the name 'text' stands twice"),
        (b'[\n{"text": "a"},\n{"text": }]', "line 3: malformed JSON"),
        (b'[\n{"text": "a"},\n{"text": "\xff"}]', "line 3: byte 0xff is no UTF-8"),
        (b"[" * 200_000, "x.json: malformed JSON (it is nested too deeply)"),
    ],
)
def test_odd_lists_are_told_with_their_file(content, words, tmp_path):
    (tmp_path / "x.json").write_bytes(content)
    assert words in error_of(tmp_path / "x.json")


def test_what_no_field_reads_may_be_odd(tmp_path):
    (tmp_path / "x.jsonl").write_text('\ufeff{"text": "abcdefgh", "score": NaN}\n' * 1
                                      + '{"text": "abc\\u0000", "score": Infinity}\n')  # fmt: skip
    assert data_or_line(tmp_path / "x.jsonl") is None


# --- Sizes ----------------------------------------------------------------------------------------
def test_a_document_that_a_tokenizer_has_no_memory_for_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MOST_CHARACTERS", 50)
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n' + json.dumps({"text": "b" * 51}))
    assert "line 2: a record of 51 characters is longer than 50" in error_of(path)
    chat = {"messages": [{"role": "user", "content": "c" * 30}] * 2}
    path.write_text(json.dumps(chat))
    message = error_of(path, format="text", text_field="messages")
    assert "must be a string" in message
    with pytest.raises(UserError, match="a record of 60 characters"):
        sources.read_record(chat, {"messages": "messages"}, "here")


def test_a_line_is_never_read_without_measure(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MOST_LINE_BYTES", 100)
    for name in ("x.jsonl", "x.txt"):
        (tmp_path / name).write_bytes(b"a\n" * (name == "x.txt") + b"b" * 101)
        line = 2 if name == "x.txt" else 1
        assert f"line {line}: is longer than" in error_of(tmp_path / name)
    monkeypatch.setattr(sources, "MOST_LIST_BYTES", 100)
    (tmp_path / "x.json").write_text(json.dumps([{"text": "a" * 100}]))
    assert "write one record a line instead" in error_of(tmp_path / "x.json")


def test_documents_are_tokenized_in_portions_to_the_same_tokens(monkeypatch):
    config = DataConfig(seq_len=8)
    records = [{"text": letter * 10} for letter in "abcde"]
    whole = encoding.Encoder(TOKENIZER, config)(records)
    monkeypatch.setattr(encoding, "MOST_CHARACTERS", 25)
    sizes = [len(part) for part in encoding._portions(records)]
    assert sizes == [2, 2, 1]
    again = encoding.Encoder(TOKENIZER, config)(records)
    assert [e.ids.tolist() for e in again] == [e.ids.tolist() for e in whole]


def test_a_long_sequence_allocates_nothing_before_it_is_used(tmp_path, monkeypatch):
    (tmp_path / "x.jsonl").write_text('{"text": "abc"}\n{"text": "def"}\n')

    def refuse(*args):
        raise AssertionError("a batch was built")

    monkeypatch.setattr("quietstar.data.batches.collate", refuse)
    assert build_data(DataConfig(train=str(tmp_path / "x.jsonl"), seq_len=2**20), TOKENIZER, 0)


# --- Files ----------------------------------------------------------------------------------------
def test_what_is_no_regular_file_is_told_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "it is a pipe, a socket or a device" in error_of(tmp_path / "pipe.jsonl")
    assert "pipe.jsonl cannot be read (it is a pipe" in error_of(tmp_path)
    assert "/dev/zero: unsupported ending" in error_of("/dev/zero")


def test_links_that_lead_nowhere_are_told_of(tmp_path):
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    assert "Too many levels of symbolic links" in error_of(tmp_path / "loop.jsonl")
    (tmp_path / "loop.jsonl").unlink()
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    for path in (tmp_path, tmp_path / "gone.jsonl"):
        assert "gone.jsonl cannot be read (No such file or directory)" in error_of(path)


def test_a_folder_that_contains_itself_is_read_once(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "abc"}\n{"text": "def"}\n')
    (tmp_path / "again").symlink_to(tmp_path)
    source = sources.open_source(str(tmp_path), DataConfig(), 0)
    assert list(source.table["text"]) == ["abc", "def"]


def test_a_part_of_a_folder_that_cannot_be_listed_is_told_of(tmp_path, monkeypatch):
    (tmp_path / "x.jsonl").write_text('{"text": "abc"}\n')
    (tmp_path / "secret").mkdir()
    scandir = os.scandir

    def refuse(path):  # root may list anything
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert "secret cannot be read (Permission denied)" in error_of(tmp_path)


@pytest.mark.parametrize("name", ["a\0b.jsonl", "x" * 300, "missing/" + "x" * 300 + ".jsonl"])
def test_a_name_that_no_file_has_is_one_line(name, tmp_path):
    config = DataConfig.model_construct(**{**DataConfig().model_dump(), "train": name})
    with pytest.raises(UserError, match=r"^data\.train: "):
        build_data(config, TOKENIZER, 0)


def test_a_file_that_goes_while_a_stream_reads_it_is_named(tmp_path):
    for name in ("a", "b"):
        lines = "".join(json.dumps({"text": name * 20}) + "\n" for _ in range(4))
        (tmp_path / f"{name}.jsonl").write_text(lines)
    config = DataConfig(train=str(tmp_path), seq_len=8, streaming=True, eval_sequences=1)
    train, _, _ = build_data(config, TOKENIZER, 0)
    (tmp_path / "b.jsonl").unlink()
    with pytest.raises(UserError, match=r"b\.jsonl: cannot be read \(No such file or directory\)"):
        train.batch(4, 16)


# --- Parquet --------------------------------------------------------------------------------------
def test_a_parquet_file_whose_pages_are_broken_is_named(tmp_path):
    path = tmp_path / "x.parquet"
    table = pyarrow.table({"text": [f"some text {n}" for n in range(5000)]})
    content = bytearray(parquet(table, compression="zstd", use_dictionary=False))
    content[200:2000] = bytes(1800)
    path.write_bytes(content)
    assert f"{path}: cannot be read (" in error_of(path)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (pyarrow.table({"text": [1, 2]}), "record 1: field 'text' must be a string, not a number"),
        (pyarrow.table({"text": [b"a", b"b"]}), "record 1: field 'text' must be a string"),
        (pyarrow.table({"text": [{"a": "b"}]}), "record 1: field 'text' must be a string"),
        (pyarrow.table([["a"], ["b"]], ["text", "text"]), "field 'text' stands twice"),
        (pyarrow.table({"text": pyarrow.array([], "string")}), "holds no record"),
    ],
)
def test_a_parquet_file_of_other_types_is_one_line(table, words, tmp_path):
    path = tmp_path / "x.parquet"
    path.write_bytes(parquet(table))
    assert words in error_of(path)


def test_chats_and_dictionaries_of_parquet_files_are_read(tmp_path):
    path = tmp_path / "x.parquet"
    texts = pyarrow.array(["abc", "def", "abc"]).dictionary_encode()
    chats = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]] * 3
    path.write_bytes(parquet(pyarrow.table({"text": texts, "messages": chats})))
    for form, expected in (("text", "abc"), ("chat", chats[0])):
        source = sources.open_source(str(path), DataConfig(format=form), 0)
        assert next(source.rows())["text" if form == "text" else "messages"] == expected


# --- Templates, targets, generated problems -------------------------------------------------------
@pytest.mark.parametrize(
    "template",
    ["{question.__class__}{answer}", "{question}{answer!r:>99999999}", "{0}{answer}", "{answer}"],
)
def test_a_template_is_never_a_format_string(template):
    tree = {"model": {"name_or_path": "x"}, "data": {"train": "x", "template": template}}
    with pytest.raises(ValueError, match=r"data\.template .*must hold \{question\}"):
        Config.model_validate(tree)


def test_other_braces_of_a_template_are_text():
    template = "{question.__class__} {{x}} {question} {answer}"
    encoder = encoding.Encoder(TOKENIZER, DataConfig(format="qa", template=template))
    (encoded,) = encoder([{"question": "q", "answer": "{question}"}])
    assert bytes(encoded.ids[:-1].tolist()) == b"{question.__class__} {{x}} q {question}"


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{{ messages[5]['x'] }}", "{{ none + 1 }}"])
def test_a_chat_template_that_fails_in_any_way_is_one_line(template, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}) + "\n")
    with pytest.raises(UserError, match="the tokenizer's chat template refuses a chat"):
        build_data(DataConfig(train=str(path), format="chat"), tokenizer, 0)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (ENDLESS,
         r"refuses a chat \(it takes more than 3 seconds; roles: user, assistant\)"),
        ("{{ 'x' * 20000000 }}", "makes 20,000,000 characters of a chat"),
    ],
)  # fmt: skip
def test_a_chat_template_without_end_is_one_line(template, words, tmp_path, monkeypatch):
    monkeypatch.setattr("quietstar.system.limits.SECONDS", 3.0)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    path = tmp_path / "x.jsonl"
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path.write_text(json.dumps({"messages": chat}) + "\n")
    with pytest.raises(UserError, match=words):
        build_data(DataConfig(train=str(path), format="chat"), tokenizer, 0)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (ENDLESS, "it takes more than 0.5 seconds"),
        ("{{ 9 ** (9 ** n) }}", "it takes more than 0.5 seconds"),
        ("{{ text * 2000000000 }}", "it does not fit into memory"),
    ],
)
def test_a_template_of_a_field_without_end_is_one_line(template, reason, tmp_path, monkeypatch):
    monkeypatch.setattr("quietstar.system.limits.SECONDS", 0.5)
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"text": "ab", "n": 9}) + "\n")
    message = error_of(path, text_field="{{ text }}" + template)
    assert f"{path}, line 1: the template of data.text_field fails ({reason}" in message


def test_a_template_without_end_is_one_line_in_a_thread_that_reads_ahead(monkeypatch):
    monkeypatch.setattr("quietstar.system.limits.SECONDS", 0.5)
    fields = {"text": "{{ text }}" + ENDLESS}
    with ThreadPoolExecutor(1) as executor:
        for _ in range(2):
            reading = executor.submit(sources.read_record, {"text": "ab"}, fields, "here")
            with pytest.raises(UserError, match=r"takes more than 0\.5 seconds"):
                reading.result()
        assert executor.submit(sources.read_record, {"text": "ab"}, {"text": "text"}, "").result()


def test_texts_without_a_target_are_refused(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "abc"}\n{"text": "def"}\n')
    message = error_of(path, min_context=6)
    assert "no text reaches beyond the first data.min_context (6) tokens" in message
    (tmp_path / "long.jsonl").write_text('{"text": "abcdefghij"}\n')
    for streaming in (False, True):
        evaluation = {"eval": str(tmp_path / "long.jsonl"), "streaming": streaming}
        assert "x.jsonl: no text reaches beyond" in error_of(path, min_context=6, **evaluation)
    path.write_text('{"question": "ab", "answer": "c"}\n' * 4)
    message = error_of(path, format="qa", min_context=6)
    assert "no answer reaches beyond the first data.min_context (6) tokens" in message


def test_a_share_that_rounds_to_none_is_one_position():
    labels = random_texts(2, 9)
    labels[1] = -100
    assert count_positions("random", 1e-9, labels).tolist() == [1, 0]
    chosen = choose_positions("random", 1e-9, labels)
    assert chosen.shape == (2, 1)
    assert chosen[0, 0] >= 0
    assert chosen[1, 0] == -1


@pytest.mark.parametrize(
    "options",
    [
        {"min_terms": "3"},
        {"min_terms": 1.5, "max_terms": 2.5},
        {"max_digits": [1]},
        {"size": 0},
        {"size": "3"},
        {"size": True},
        {"size": 10**8},
        {"seed": None},
        {"min_digits": {"a": 1}},
        {"self": 1},
    ],
)
def test_wrong_options_of_reasoning_gym_are_one_line(options):
    pytest.importorskip("reasoning_gym")
    message = error_of("reasoning_gym:chain_sum", task_options={"size": 4} | options)
    assert message.startswith("data.task_options: ")


def test_a_task_that_fails_over_a_problem_blames_its_options(monkeypatch):
    class Failing:
        factory = type("factory", (), {"DATASETS": {"any": None}})

        @staticmethod
        def create_dataset(task, size, seed):
            yield {"question": "q", "answer": "a"}
            raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(sources, "import_reasoning_gym", lambda label: Failing)
    message = error_of("reasoning_gym:any")
    assert "is refused by the task 'any' (division by zero)" in message


@pytest.mark.parametrize("share", [0.0, 1e-9, 1.0])
def test_a_held_out_share_leaves_problems_in_both_parts(share):
    with pytest.raises(ValueError, match="held_out_share"):
        MovesOptions(held_out_share=share)
    message = error_of("synthetic:moves", task_options={"held_out_share": share})
    assert "data.task_options: held_out_share" in message


# --- Parts of the user's own ----------------------------------------------------------------------
MODULES = {
    "exits": "import sys\nsys.exit(3)\n",
    "raises": "raise BaseException('odd')\n",
    "broken": "def reward(thoughts, scores:\n",
    "loops": "from loops import reward\n",
    "getter": "def __getattr__(name): raise RuntimeError('no ' + name)\n",
}


@pytest.fixture
def working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("module", MODULES)
def test_a_module_that_fails_in_any_way_is_one_line(module, working_folder):
    (working_folder / f"{module}.py").write_text(MODULES[module])
    with pytest.raises(UserError, match="cannot be imported") as caught:
        registry.find("loss.reward", f"{module}:reward")
    assert "\n" not in str(caught.value)


def test_what_a_module_prints_is_no_output_of_the_command(working_folder, capsys):
    (working_folder / "chatty.py").write_text("print('hello')\ndef mine(thoughts, scores): ...\n")
    registry.find("loss.reward", "chatty:mine")
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "hello\n")


@pytest.mark.parametrize("name", ["builtins:dict", "os:system", "math:pi", "builtins:len"])
def test_what_is_no_reward_is_one_line(name):
    with pytest.raises(UserError, match=rf"^loss\.reward \({name}\): "):
        registry.find("loss.reward", name)


WRONG_PARTS = """
import torch
from quietstar.objectives import Objective
from quietstar.sampling.thoughts import ThoughtBatch

def fails(thoughts, scores):
    return scores.mixed["x"]

def counts(thoughts, scores):
    return thoughts.lengths

def leaves(thoughts, scores):
    raise SystemExit(0)

def elsewhere(thoughts, scores):
    return scores.mixed.sum(-1).to("meta")

class Alone:
    def weigh(self, reward, scores): ...

class Nothing(Objective):
    def weigh(self, reward, scores):
        return None

class Picky(Objective):
    def __init__(self, settings):
        raise ValueError("not today")
    def weigh(self, reward, scores): ...

class OddSettings(Objective):
    Settings = int
    def weigh(self, reward, scores): ...

class OddRules(Objective):
    @staticmethod
    def problems(config):
        return [1]
    def weigh(self, reward, scores): ...

class Silent(Objective): ...

class Beyond:
    def sample(self, model, texts, positions, spec):
        tokens = texts.input_ids[:, :, None, None].repeat(1, 1, 2, spec.thought_length)
        return ThoughtBatch.of_texts(texts, positions, tokens + 10**6)
"""


@pytest.mark.parametrize(
    ("key", "name", "words"),
    [
        ("loss.reward", "fails", r"it raised \w+ \(.*\) in line 7 of .*wrong_parts.py"),
        ("loss.reward", "counts", "a tensor of torch.int64 on cpu, but must return one of float32"),
        ("loss.reward", "leaves", r"it raised SystemExit \(0\) in line 13 of .*wrong_parts.py"),
        ("loss.reward", "elsewhere", "on meta, but must return one of float32 on cpu"),
        ("loss.objective", "Alone", "derived from quietstar.objectives.Objective"),
        (
            "loss.objective",
            "Silent",
            r"it has no method weigh of its own. Define weigh\(reward, sc",
        ),
        ("loss.objective", "Nothing", "it returned NoneType, but must return ThoughtWeights"),
        ("loss.objective", "Picky", r"it raised ValueError \(not today\)"),
        ("loss.objective", "OddSettings", "its Settings cannot be keys of a config"),
        ("thoughts.sampler", "Beyond", r"its tokens \(10\d+\): must be token ids from 0 to 257"),
    ],
)
def test_a_part_that_does_what_it_must_not_is_one_line(key, name, words, working_folder):
    (working_folder / "wrong_parts.py").write_text(WRONG_PARTS)
    name = f"wrong_parts:{name}"
    section, part = key.split(".")
    with pytest.raises(UserError, match=words) as caught:
        thinking_model(**{section: {part: name}})(random_texts(2, 6))
    assert str(caught.value).startswith(f"{key} ({name}): ")
    assert "\n" not in str(caught.value)


def test_rules_of_an_objective_that_fail_are_a_problem_of_the_config(working_folder):
    (working_folder / "wrong_parts.py").write_text(WRONG_PARTS)
    tree = {"model": {"name_or_path": "x"}, "data": {"train": "x"},
            "loss": {"objective": "wrong_parts:OddRules"}}  # fmt: skip
    with pytest.raises(ValueError, match=r"loss\.objective \(wrong_parts:OddRules\): it raised"):
        Config.model_validate(tree)


def test_a_built_in_part_is_not_blamed(monkeypatch):
    model = thinking_model(loss={"reward": "mixed", "policy_weight": 1.0})
    monkeypatch.setattr(model, "reward", lambda thoughts, scores: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(random_texts(2, 6))
    assert loss_config(reward="mixed").reward == "mixed"
