"""Configs and command lines of every kind end in a config, or in one line a problem."""

import json
import logging
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quietstar.cli import main as cli
from quietstar.config import Config, LossConfig, fields
from quietstar.config.loading import load_config, save_config, shipped_configs
from quietstar.config.messages import types_of, words_of
from quietstar.config.tree import loss_class
from quietstar.config.yaml import MOST_CHARACTERS
from quietstar.errors import ConfigError, UserError
from quietstar.registry import choices

OBJECTIVES = sorted(choices("loss.objective"), key=lambda name: name != "quiet_star")
VALID = {"model": {"name_or_path": "some/model"}, "data": {"train": "text.jsonl"}}
NUMBERS = sorted(k for k in fields() if types_of(fields()[k]) & {"integer", "number"})
TEXTS = sorted(k for k, f in fields().items() if "string" in types_of(f) and not words_of(f))
LISTS = ["tuning.lora_target_modules", "tuning.unfreeze", "logging.report_to"]


def written(tree, folder, name="x.yaml"):
    path = Path(folder) / name
    path.write_text(json.dumps(tree), encoding="utf-8")  # JSON is YAML
    return path


def with_value(key, value):
    section, name = key.split(".")
    tree = {**VALID, section: {**VALID.get(section, {}), name: value}}
    if key == f"loss.{name}" and name not in LossConfig.model_fields:  # some objectives have it
        owners = [o for o in OBJECTIVES if name in loss_class(o).model_fields]
        tree["loss"]["objective"] = owners[0]
    return tree


def problems_of(config_file, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(config_file, overrides)
    assert caught.value.problems
    assert all("\n" not in problem for problem in caught.value.problems)
    return caught.value.problems


def only_problem_of(config_file, *overrides):
    (problem,) = problems_of(config_file, *overrides)
    return problem


# --- Whatever is in it ----------------------------------------------------------------------------
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=20)  # with half surrogates
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.integers(-(10**40), 10**40),
    st.floats(),
    ANY_TEXT,
    st.sampled_from(["~", "~nobody/x", "a\0b", "x" * 300, "[", "null", "{question}", "1e-4", " "]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=5,
)
KEYS = sorted(fields())


def allowed_values(key):
    """Values within the bounds of a key."""
    kinds = [st.sampled_from(words)] if (words := words_of(fields()[key])) else []
    for member in fields()[key].get("anyOf", [fields()[key]]):
        least = member.get("minimum", member.get("exclusiveMinimum"))
        most = member.get("maximum", member.get("exclusiveMaximum"))
        if member.get("type") == "integer":
            kinds += [st.integers(least, min(most, 300)), st.integers(least, most)]
        elif member.get("type") == "number":
            kinds += [st.floats(least, most)]
        elif member.get("type") == "boolean":
            kinds += [st.booleans()]
        elif member.get("type") == "array":
            kinds += [st.lists(st.text(min_size=1, max_size=5), max_size=3)]
        elif member.get("type") == "object":
            kinds += [st.dictionaries(st.text(max_size=5), VALUES, max_size=3)]
        elif member.get("type") == "string" and not words:
            kinds += [st.text(min_size=1, max_size=30)]
    return st.one_of(kinds)


ALLOWED = {key: allowed_values(key) for key in KEYS}


@st.composite
def trees(draw):
    tree = json.loads(json.dumps(VALID))
    odd = draw(st.booleans())
    for key in draw(st.lists(st.sampled_from(KEYS), max_size=6)):
        section, name = key.split(".")
        tree.setdefault(section, {})[name] = draw(ALLOWED[key] | VALUES if odd else ALLOWED[key])
    if not odd:
        return tree
    if draw(st.integers(0, 3)) == 0:
        tree[draw(ANY_TEXT)] = draw(VALUES)
    if draw(st.integers(0, 3)) == 0:
        tree["stages"] = draw(
            VALUES
            | st.dictionaries(
                st.sampled_from(["a", "b", "a.b", "", "[/x]", "1"]),
                st.dictionaries(st.sampled_from(["thoughts", "data", "tuning", "x"]), VALUES,
                                max_size=2),
                max_size=3,
            )
        )  # fmt: skip
    return tree


@settings(max_examples=150, deadline=5000, derandomize=True)
@given(trees(), st.lists(st.tuples(st.sampled_from(KEYS), ANY_TEXT), max_size=2))
def test_any_tree_is_a_config_or_one_line_a_problem(tree, flags):
    with tempfile.TemporaryDirectory() as folder:
        path = written(tree, folder)
        config, problems = None, []
        try:
            config = load_config(path, [f"--{key}={text}" for key, text in flags])
        except ConfigError as error:
            problems = error.problems
        if config is not None:
            save_config(config, Path(folder) / "again.yaml")
            assert load_config(Path(folder) / "again.yaml") == config
        else:
            assert problems
            for problem in problems:
                assert "\n" not in problem
                assert problem.startswith((str(path), "command line: "))
                assert problem.removeprefix(str(path)).partition(": ")[2].strip(), problem


@settings(max_examples=150, deadline=5000, derandomize=True)
@given(st.binary(max_size=200) | st.text("abc:-{}[],&*!<>|%@'\"\n #?", max_size=60).map(str.encode))
def test_any_bytes_are_a_config_or_one_line_a_problem(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.yaml"
        path.write_bytes(content)
        assert problems_of(path)  # none of them sets model and data


# --- Bounds ---------------------------------------------------------------------------------------
def test_every_number_has_finite_bounds():
    for key in NUMBERS:
        members = fields()[key].get("anyOf", [fields()[key]])
        (number,) = [m for m in members if m.get("type") in ("integer", "number")]
        assert {"minimum", "exclusiveMinimum"} & number.keys(), key
        assert {"maximum", "exclusiveMaximum"} & number.keys(), key


@pytest.mark.parametrize("value", ["1" + "0" * 40, "1e308", ".nan", "-10000000", "true", "'1'"])
def test_a_number_out_of_bounds_is_one_line_that_names_its_key(value, tmp_path):
    for key in NUMBERS:
        path = tmp_path / "x.yaml"
        path.write_text(json.dumps(with_value(key, "HERE")).replace('"HERE"', value))
        assert f": {key}: " in only_problem_of(path)


@pytest.mark.parametrize(
    "value", [*("", "a\0b", "x" * 10_001), pytest.param("\udcff", id="surrogate")]
)
def test_text_that_no_file_or_tokenizer_takes_is_refused(value, tmp_path):
    for key in TEXTS:
        assert f": {key}: " in only_problem_of(written(with_value(key, value), tmp_path))


@pytest.mark.parametrize("key", LISTS)
@pytest.mark.parametrize("value", [[""], ["a\0"], [1], "a", {"a": 1}, [None]])
def test_lists_hold_texts(key, value, tmp_path):
    assert f": {key}" in only_problem_of(written(with_value(key, value), tmp_path))


@pytest.mark.parametrize("key", ["data.train", "data.eval", "training.output_dir"])
def test_a_name_that_no_file_can_have_is_refused(key, tmp_path):
    for name, rule in (("a/" + "x" * 256, "at most 255 bytes"), (" ", "must not be blank"),
                       ("~nobody-of-this-name/x", "a user who has a home folder")):  # fmt: skip
        assert rule in only_problem_of(written(with_value(key, name), tmp_path))


def test_a_home_folder_is_expanded_in_every_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    tree = {
        "model": {"name_or_path": "~/m", "tokenizer": "~/t"},
        "data": {"train": "~/a.jsonl", "eval": "~/b.jsonl"},
    }
    config = load_config(written(tree, tmp_path), ["--training.output_dir=~/x"])
    assert (config.model.name_or_path, config.model.tokenizer) == ("/home/me/m", "/home/me/t")
    assert (config.data.train, config.data.eval) == ("/home/me/a.jsonl", "/home/me/b.jsonl")
    assert config.training.output_dir == "/home/me/x"


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        ({"a": float("nan")}, "must hold finite numbers, and a is nan"),
        ({"a": {"b": [0, 2**63]}}, "must hold numbers below 2**63, unlike a.b.1"),
        ({"a": "\0"}, "must not hold a NUL"),
        ({"\ud800": 1}, "half a surrogate pair"),
        (json.loads('{"a":' * 21 + "1" + "}" * 21), "must not be nested deeper than 20"),
    ],
)
def test_a_mapping_holds_what_a_file_can_hold(value, rule, tmp_path):
    text = json.dumps(with_value("data.task_options", value)).replace("NaN", ".nan")
    path = tmp_path / "x.yaml"
    path.write_text(text)
    assert rule in only_problem_of(path)


def test_thoughts_that_no_memory_holds_are_refused(tmp_path):
    tree = {
        **with_value("training.micro_batch_size", 2**20),
        "thoughts": {"num_thoughts": 1000, "length": 2**20},
    }
    tree["training"]["global_batch_size"] = 2**20
    problem = only_problem_of(written(tree, tmp_path))
    assert "training.micro_batch_size (1048576) texts" in problem
    assert "GiB for the ids of their tokens alone" in problem


# --- Files and YAML -------------------------------------------------------------------------------
def test_what_is_no_regular_file_is_told_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "gone.yaml").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    for name, words in (
        (tmp_path / "pipe.yaml", "is a pipe, a socket or a device"),
        ("/dev/null", "is a pipe, a socket or a device"),
        (tmp_path / "gone.yaml", "there is no file"),
        (tmp_path / "loop.yaml", "cannot be read: Too many levels of symbolic links"),
        ("a\0b", "cannot be read: embedded null"),
        ("x" * 300, "cannot be read: File name too long"),
        ("", "has no value"),
    ):
        problem = only_problem_of(name)
        assert problem.startswith("command line: --config: ")
        assert words in problem


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_config_without_read_permission(tmp_path):
    path = written(VALID, tmp_path)
    path.chmod(0)
    assert "cannot be read: Permission denied" in only_problem_of(path)


def test_a_huge_file_is_not_parsed(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("a: " + "x" * MOST_CHARACTERS)
    assert "more than 200,000 characters" in only_problem_of(path)
    with path.open("wb") as file:
        file.truncate(2**40)  # sparse
    assert str(path) in only_problem_of(path)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("a: &a {b: 1, <<: *a}", "no valid YAML"),
        ("a:" + " [" * 60 + "]" * 60, "more than 50 levels"),
        ("a: " + "9" * 5000, "4300 digits"),
        ("a: 0x" + "f" * 5000, ""),
        ("%YAML 9.9\n---\na: 1", ""),
        ("a: !!python/object/apply:os.system [x]", "no valid YAML"),
        ("a: 1\n---\nb: 2", "no valid YAML"),
        ("a: \x07", "no valid YAML"),
        ("thoughts: {&x length: 8, *x : 9}", ""),
    ],
)
def test_odd_yaml_is_one_line(text, rule, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    assert any(rule in problem for problem in problems_of(path))


def test_an_anchor_that_is_defined_again_prints_nothing(tmp_path, recwarn):
    path = tmp_path / "x.yaml"
    path.write_text(f"{json.dumps(VALID)[:-1]}, thoughts: {{start_init: &a x, end_init: &a y}}}}")
    assert load_config(path).thoughts.end_init == "y"
    assert not recwarn


def test_thousands_of_unknown_keys_are_told_quickly(tmp_path):
    problems = problems_of(written({f"key{n}": 1 for n in range(3000)}, tmp_path))
    assert len(problems) == 3000


def test_a_long_key_is_cut(tmp_path):
    problems = problems_of(written({**VALID, "x" * 10_000: 1}, tmp_path))
    assert all(len(problem) < 500 for problem in problems)


@pytest.mark.parametrize("name", ["[/x]", "a.b", "", "a\nb", "\x1b]0;x", "x" * 101])
def test_stages_have_plain_names(name, tmp_path):
    problems = problems_of(written({**VALID, "stages": {name: {}}}, tmp_path))
    assert any("a stage's name is made of letters, digits, - and _" in p for p in problems)


def test_stages_are_few(tmp_path):
    tree = {**VALID, "stages": {f"s{n}": {} for n in range(101)}}
    assert "stages: " in only_problem_of(written(tree, tmp_path))


def test_a_config_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    config = Config.model_validate(VALID)
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "config.yaml").symlink_to(tmp_path / "mine.txt")
    with pytest.raises(UserError, match="is no regular file and is not replaced"):
        save_config(config, tmp_path / "config.yaml")
    assert (tmp_path / "mine.txt").read_text() == "mine"


# --- Settings without effect ----------------------------------------------------------------------
IDLE = [
    ({"tuning": {"lora_r": 8}}, "tuning.lora_r: 8 has no effect with tuning.method: full"),
    ({"tuning": {"lora_target_modules": ["q_proj"]}}, "tuning.lora_target_modules"),
    ({"tuning": {"unfreeze": ["lm_head"]}}, "which trains all weights"),
    ({"thoughts": {"position_fraction": 0.5}}, "with thoughts.positions: all"),
    ({"thoughts": {"position_fraction": 3}}, "with thoughts.positions: all"),
    (
        {"thoughts": {"positions": "one_random", "position_fraction": 0.5}},
        "with thoughts.positions: one_random",
    ),
    ({"thoughts": {"pattern": "^"}}, "thoughts.pattern: '^' has no effect with thoughts.positions"),
    ({"data": {"positions_field": "at"}}, "data.positions_field: 'at' has no effect"),
    ({"mixing_head": {"warmup_weight": 0.25}}, "with mixing_head.warmup_steps: 0"),
    ({"mixing_head": {"warmup_steps": 2000}}, "the mixing head never learns"),
    *(
        ({"mixing_head": {"fixed_weight": 0.5} | head, **more}, "which stands in for what the head")
        for head, more in (
            ({"initial_weight": 0.5}, {}),
            ({"floor": 0.1}, {}),
            ({}, {"optim": {"mixing_head_learning_rate": 0.5}}),
        )
    ),
    ({"data": {"task_options": {"a": 1}}}, "without a reasoning_gym or synthetic task"),
    ({"data": {"eval": "b.txt", "eval_fraction": 0.5}}, "with data.eval"),
    ({"data": {"template": "{question}{answer}"}}, "with data.format: text"),
    ({"data": {"train": "synthetic:moves", "text_field": "x"}}, "with generated problems"),
    ({"optim": {"warmup_steps": 1000}}, "the learning rates never reach their values"),
    ({"training": {"save_steps": 0, "save_total_limit": 5}}, "with training.save_steps: 0"),
    ({"training": {"cpu_threads": 1000}}, "the cores of this machine"),
    ({"loss": {"policy_weight": 0, "reward": "mixed"}}, "with loss.policy_weight: 0"),
    ({"loss": {"objective": "next_token", "base_weight": 1}}, "with loss.objective: next_token"),
    (
        {"loss": {"objective": "next_token"}, "optim": {"embedding_learning_rate": 1}},
        "with loss.objective: next_token, which does not think",
    ),
]


@pytest.mark.parametrize(("change", "words"), IDLE)
def test_a_setting_without_effect_is_named_in_one_line(change, words, tmp_path, caplog):
    tree = {section: {**VALID.get(section, {}), **change.get(section, {})}
            for section in VALID | change}  # fmt: skip
    load_config(written(tree, tmp_path))
    (record,) = caplog.records
    assert words in record.getMessage()
    assert "x.yaml" in record.getMessage()


def test_a_wrong_value_of_another_objective_is_refused(tmp_path):
    tree = with_value("loss.teacher_length", float("inf"))
    path = written({**tree, "loss": {**tree["loss"], "objective": "quiet_star"}}, tmp_path)
    problem = only_problem_of(path)
    assert "loss.teacher_length" in problem
    assert "must be a valid integer" in problem


def test_defaults_and_the_config_of_a_run_are_silent(tmp_path, caplog):
    tree = {**VALID, "tuning": {"lora_r": 8}}
    config = load_config(written(tree, tmp_path))
    caplog.clear()
    load_config(written({**VALID, "tuning": {"lora_r": 16}}, tmp_path))
    (tmp_path / "checkpoints").mkdir()
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert not caplog.records


@pytest.mark.parametrize("name", sorted(shipped_configs()))
def test_shipped_configs_are_silent(name, caplog):
    text = ["--data.train", "x.txt"] if name == "smollm2_math" else []
    load_config(name, text)
    assert not caplog.records


def test_a_key_that_one_stage_reads_is_silent_and_one_of_a_stage_is_not(tmp_path, caplog):
    stages = {"plain": {"loss": {"objective": "next_token"}}, "think": {}}
    load_config(written({**VALID, "loss": {"reward": "mixed"}, "stages": stages}, tmp_path))
    assert not caplog.records
    stages["plain"]["optim"] = {"embedding_learning_rate": 0.1}
    load_config(written({**VALID, "stages": stages}, tmp_path))
    (record,) = caplog.records
    assert "stages.plain.optim.embedding_learning_rate: 0.1 has no effect" in record.getMessage()


# --- The command line -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config", "tiny", "--config", "demo"], "--config: is given 2 times; give it once"),
        (["--resume=auto", "--resume", "auto"], "--resume: is given 2 times"),
        (["--resume="], "--resume (): must not be empty"),
        (["--config="], "--config (): must not be empty"),
        (["--conf", "tiny"], "--conf: unknown key"),
        (["--thoughts.length="], "thoughts.length: has no value"),
        (["--data.train="], "data.train: has no value"),
        (["--thoughts.len", "8"], "--thoughts.len: unknown key"),
        (["--thoughts.ｌength", "8"], "--thoughts.ｌength: unknown key"),
        (["—thoughts.length", "8"], "belongs to no key"),
        (["--model.config" + ".a" * 100, "8"], "has more than 20 dots"),
        (["--" + "x" * 100_000, "8"], "unknown key"),
        (["--resume", "x" * 300], "there is no such folder"),
        (["--resume", "a\0b"], "must not hold a NUL character"),
        (["--training.seed", "9" * 5000], "4300 digits"),
        (["--data.task_options", "[" * 3000], "is no valid YAML: it is nested too deeply"),
        (["--data.train", "\udcff"], "data.train: "),
        (["--controls", "2", "--resume", "auto"], "--resume: does not go with --controls"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(arguments, words, capsys):
    assert cli.main(["train", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert any(words in line for line in lines), lines
    assert all(line.startswith("quietstar: error: ") and len(line) < 700 for line in lines)


def test_the_last_of_two_values_counts_and_is_warned_of(caplog):
    arguments = ["--thoughts.length", "5", "--thoughts.length=6"]
    assert load_config("tiny", arguments).thoughts.length == 6
    (record,) = caplog.records
    assert "thoughts.length: is given more than once; the last value counts" in record.getMessage()


def test_only_the_main_process_warns(monkeypatch, caplog):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(cli, "SECONDS_FOR_RANK_0", 0.0)
    logger = logging.getLogger("quietstar.config")
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    cli.main(["train", "--config", "tiny", "--tuning.lora_r", "8", "--resume", "no/such"])
    assert logger.level == logging.ERROR
    logger.setLevel(logging.NOTSET)
