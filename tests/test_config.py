"""The config: bounds, cross-field rules, YAML, overrides, and errors that come all at once."""

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from quietstar.config import Config, cross_field_problems, fields
from quietstar.config.earlier import DROPPED, FOREIGN, RENAMED, REPLACED
from quietstar.config.loading import (
    load_config,
    read_sections,
    resolve_config_file,
    save_config,
    shipped_configs,
)
from quietstar.errors import ConfigError

ROOT = Path(__file__).parents[1]
SHIPPED = sorted(path.relative_to(ROOT) for path in (ROOT / "configs").glob("*.yaml"))
VALID = {"model": {"name_or_path": "some/model"}, "data": {"train": "text.jsonl"}}
VALID_YAML = "model: {name_or_path: some/model}\ndata: {train: text.jsonl}\n"


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes x.yaml into a new working folder and returns its name."""
    monkeypatch.chdir(tmp_path)

    def write_file(text, name="x.yaml"):
        Path(name).write_text(text, encoding="utf-8")
        return name

    return write_file


def problems_of(config_file, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(config_file, overrides)
    assert str(caught.value) == "\n".join(caught.value.problems)
    assert all("\n" not in problem for problem in caught.value.problems)
    return caught.value.problems


def only_problem_of(config_file, *overrides):
    problems = problems_of(config_file, *overrides)
    assert len(problems) == 1, problems
    return problems[0]


# The tree


def test_importing_the_config_imports_no_torch():
    code = (
        "import sys, quietstar.config, quietstar.config.loading, quietstar.cli.main;"
        "heavy = {'torch', 'transformers', 'datasets', 'accelerate'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_every_key_has_a_sentence_that_describes_it():
    for key, field in fields().items():
        assert field["description"].endswith("."), key


def test_config_is_frozen_and_forbids_unknown_keys():
    config = Config.model_validate(VALID)
    with pytest.raises(ValidationError, match="frozen"):
        config.thoughts.length = 3
    with pytest.raises(ValidationError, match="Extra inputs"):
        Config.model_validate({**VALID, "thought": {}})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("thoughts.length", "8"),
        ("thoughts.length", 8.0),
        ("thoughts.length", True),
        ("thoughts.length", 0),
        ("thoughts.temperature", 0),
        ("optim.learning_rate", "0.1"),
        ("optim.learning_rate", True),
        ("optim.learning_rate", float("inf")),
        ("optim.betas", [0.9, 1]),
        ("training.torch_compile", 1),
        ("training.mixed_precision", False),
        ("data.eval_fraction", 1.0),
        ("mixing_head.floor", 1.0),
        ("tuning.lora_target_modules", []),
        ("logging.report_to", "tensorboard"),
    ],
)
def test_a_value_of_another_type_or_out_of_bounds_is_an_error(key, value):
    section, name = key.split(".")
    tree = {**VALID, section: {**VALID.get(section, {}), name: value}}
    with pytest.raises(ValidationError, match=key.replace(".", r"\.")):
        Config.model_validate(tree)


def test_a_whole_number_serves_as_a_real_one():
    config = Config.model_validate({**VALID, "optim": {"learning_rate": 1}})
    assert config.optim.learning_rate == 1.0


def test_the_valid_example_breaks_no_rule():
    assert cross_field_problems(Config.model_validate(VALID)) == []


RULES = [
    ("model.name_or_path", "exactly one", {"model": {}}),
    (
        "model.name_or_path",
        "exactly one",
        {"model": {"name_or_path": "x", "config": {"model_type": "llama"}}},
    ),
    ("model.config", "model_type", {"model": {"config": {}, "tokenizer": "bytes"}}),
    ("model.tokenizer", "bytes", {"model": {"config": {"model_type": "llama"}}}),
    (
        "tuning.method",
        "pretrained",
        {
            "model": {"config": {"model_type": "llama"}, "tokenizer": "bytes"},
            "tuning": {"method": "lora"},
        },
    ),
    (
        "mixing_head.initial_weight",
        "floor",
        {"mixing_head": {"initial_weight": 0.1, "floor": 0.1}},
    ),
    ("thoughts.num_thoughts", "no_baseline", {"thoughts": {"num_thoughts": 1}}),
    (
        "thoughts.num_thoughts",
        "no_baseline",
        {"thoughts": {"num_thoughts": 1}, "loss": {"estimator": "paper"}},
    ),
    ("thoughts.lookahead", r"seq_len \(4\)", {"data": {"train": "x", "seq_len": 4}}),
    ("data.min_context", r"no token is a target", {"data": {"train": "x", "min_context": 256}}),
    (
        "mixing_head.initial_weight",
        "above mixing_head.floor",
        {"mixing_head": {"initial_weight": 0, "floor": 0.1}},
    ),
    (
        "loss.base_weight",
        "nothing to learn",
        {"loss": {f"{name}_weight": 0 for name in ("base", "mixed", "thought", "policy")}},
    ),
    ("thoughts.pattern", "must be set", {"thoughts": {"positions": "pattern"}}),
    *(
        (
            "thoughts.pattern",
            "must not match the empty text at every place",
            {"thoughts": {"positions": "pattern", "pattern": pattern}},
        )
        for pattern in ("x*", "(a|b?)", r"\d*?")
    ),
    ("data.positions_field", "must be set", {"thoughts": {"positions": "field"}}),
    ("data.train", "not set", {"data": {}}),
    *(
        (
            "thoughts.positions",
            "the same at all positions",
            {"thoughts": {"positions": rule}, "mixing_head": {"fixed_weight": 1.0}},
        )
        for rule in ("weight", "weighted_entropy")
    ),
    ("data.template", "question", {"data": {"train": "x", "template": "{answer}"}}),
    ("data.template", "answer", {"data": {"train": "x", "template": "{question}"}}),
    ("data.template", "answer", {"data": {"train": "x", "template": "{question}{answer}!"}}),
    ("data.template", "answer", {"data": {"train": "x", "template": "{answer}{question}"}}),
    ("data.loss_on", "format", {"data": {"train": "x", "loss_on": "answer"}}),
]


@pytest.mark.parametrize(("key", "reason", "change"), RULES)
def test_a_broken_cross_field_rule_names_key_and_reason(key, reason, change):
    with pytest.raises(ValidationError, match=f"{key}: .*{reason}"):
        Config.model_validate({**VALID, **change})


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("(a", "missing \\), unterminated subpattern at position 0"),
        ("a{99999999999}", "the repetition number is too large"),
        ("(" * 9000, "it is nested too deeply"),
    ],
)
def test_a_pattern_that_is_none_is_refused(pattern, reason, write):
    problem = only_problem_of(write(VALID_YAML), "--thoughts.pattern", pattern)
    words = rf"thoughts.pattern: .* must be a regular expression of Python \({reason}\)"
    assert re.search(words, problem), problem


@pytest.mark.parametrize(
    "template",
    ["{{ answer", "{% if a %}b", "{{ a | nosuch }}", "{{ " + "(" * 9000, "{{ 9 ** (9 ** 9) }}"],
)
def test_a_template_that_is_none_is_refused(template, write, monkeypatch):
    monkeypatch.setattr("quietstar.system.limits.SECONDS", 0.5)
    problem = only_problem_of(write(VALID_YAML), "--data.answer_field", template)
    words = r"data.answer_field: .* must be a field's name or a Jinja template \(.+\)"
    assert re.search(words, problem), problem


@pytest.mark.parametrize(
    "change",
    [
        {"thoughts": {"num_thoughts": 1}, "loss": {"policy_weight": 0}},
        {"thoughts": {"num_thoughts": 1}, "loss": {"estimator": "no_baseline"}},
        {"mixing_head": {"initial_weight": 0}},
        {"data": {"train": "x", "format": "chat", "loss_on": "answer"}},
        {"training": {"global_batch_size": 8, "micro_batch_size": 3}},
        {"thoughts": {"positions": "every", "position_fraction": 3}},
        *(
            {"thoughts": {"positions": "pattern", "pattern": pattern}}
            for pattern in ("^", "$", r"\b", r"=\s*(\d+)", r"(?=\d)", ".")
        ),
        {"training": {"global_batch_size": 2, "micro_batch_size": 8}},
        {"data": {"train": "x", "template": "Q: {question} A: {answer}\n"}},
        {"model": {"config": {"model_type": "llama"}, "tokenizer": "bytes"}},
    ],
)
def test_what_the_rules_allow_is_accepted(change):
    Config.model_validate({**VALID, **change})


# Files


@pytest.mark.parametrize("path", SHIPPED, ids=str)
def test_every_shipped_config_loads_and_survives_a_round_trip(path, tmp_path):
    text = [] if "\n  train: null" not in (ROOT / path).read_text() else ["--data.train", "x.txt"]
    config = load_config(ROOT / path, text)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_shipped_configs_are_found_by_any_form_of_their_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert {f"configs/{name}.yaml" for name in shipped_configs()} == {str(p) for p in SHIPPED}
    for name in ("configs/tiny.yaml", "tiny.yaml", "tiny"):
        path, shown = resolve_config_file(name)
        assert path.samefile(ROOT / "configs/tiny.yaml")
        assert shown == "configs/tiny.yaml"


def test_an_existing_file_goes_before_a_shipped_one(write):
    name = write(VALID_YAML, "tiny.yaml")
    assert load_config(name).model.name_or_path == "some/model"


LOOKS_LIKE_SOMETHING_ELSE = [
    *("8", "08", "1e-4", "1_0", "0x1f", ".inf", "2024-01-01", "1:30"),
    *("no", "null", "~", "true", "", "---", "a: b", "# x", "<<", "'", '"', "\\n", "{question}"),
    *(" x ", "line\nline\n", "\u00fc \u4e2d"),
]


@pytest.mark.parametrize("text", LOOKS_LIKE_SOMETHING_ELSE)
def test_any_text_survives_a_round_trip(text, tmp_path):
    config = Config.model_validate({**VALID, "data": {"train": "x", "task_options": {"a": text}}})
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_numbers_and_nested_values_survive_a_round_trip(tmp_path):
    options = {"a": [1, 1.0, -1e-30, 1e22, True, None], "b": {"c": {"d": [[]]}}, "e": {}}
    tree = {
        "model": {"config": {"model_type": "llama", **options}, "tokenizer": "bytes"},
        "data": {"train": "x"},
        "optim": {"learning_rate": 1e-7, "weight_decay": 1e-12},
    }
    config = Config.model_validate(tree)
    save_config(config, tmp_path / "config.yaml")
    loaded = load_config(tmp_path / "config.yaml")
    assert loaded == config
    assert [type(x) for x in loaded.model.config["a"]] == [type(x) for x in options["a"]]


@pytest.mark.parametrize("text", LOOKS_LIKE_SOMETHING_ELSE)
def test_readers_of_yaml_1_1_understand_a_saved_config(text, tmp_path):
    yaml = pytest.importorskip("yaml")  # PyYAML, as accelerate and others use it
    options = {"a": text, "b": 1e-7, "c": 1e22}
    config = Config.model_validate({**VALID, "data": {"train": "x", "task_options": options}})
    save_config(config, tmp_path / "config.yaml")
    tree = yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))
    assert tree == config.model_dump()


def test_yaml_numbers_and_words_are_read_as_people_write_them(write):
    text = "optim: {learning_rate: 1e-4}\ntraining: {mixed_precision: no, max_steps: 10_000}\n"
    config = load_config(write(VALID_YAML + text + "thoughts:\n"))
    assert config.optim.learning_rate == 1e-4
    assert config.training.mixed_precision == "no"
    assert config.training.max_steps == 10000
    assert config.thoughts.length == 8  # an empty section sets nothing


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- a\n", "x.yaml: ['a'] must be a mapping"),
        ("8\n", "x.yaml: 8 must be a mapping"),
        ("model: [1\ndata: 2", "x.yaml:2: no valid YAML: "),
        ("a: 1\n\tb: 2", "x.yaml:2: no valid YAML: "),
        ("a: !!int x", "x.yaml: no valid YAML: "),
        (VALID_YAML + "training: 8", "x.yaml:3: training: 8 must be a mapping of keys, such as"),
        (
            VALID_YAML + "thoughts: {}\nthoughts: {}",
            "x.yaml:4: no valid YAML: thoughts stands twice",
        ),
        (
            VALID_YAML + "thoughts:\n  length: 8\n  length: 9",
            "x.yaml:5: no valid YAML: thoughts.length stands twice",
        ),
        (
            VALID_YAML + "thoughts:\n  lenght: 8",
            "x.yaml:4: thoughts.lenght: unknown key; did you mean thoughts.length?",
        ),
        (
            VALID_YAML + "thought: {length: 8}",
            "x.yaml:3: thought: unknown section; did you mean thoughts?",
        ),
        (VALID_YAML + "xyzzy: 1", "x.yaml:3: xyzzy: unknown section"),
        (
            VALID_YAML + "gradient_accumulation_steps: 4",
            "x.yaml:3: gradient_accumulation_steps: unknown section; here it is "
            "training.global_batch_size (all texts of a step",
        ),
        (
            VALID_YAML + "training: {lr: 1}",
            "x.yaml:3: training.lr: unknown key; did you mean optim.learning_rate?",
        ),
        (
            VALID_YAML + "thoughts.length: 8",
            "x.yaml:3: thoughts.length: unknown section; write `thoughts:` and `length:` below it",
        ),
        (
            VALID_YAML + 'thoughts: {length: "8"}',
            "x.yaml:3: thoughts.length: '8' must be a valid integer; write it without quotes",
        ),
        (
            VALID_YAML + "training: {mixed_precision: bf17}",
            "x.yaml:3: training.mixed_precision: 'bf17' must be 'no' or 'bf16'; did you mean bf16?",
        ),
        (
            VALID_YAML + "thoughts: {length: null}",
            "x.yaml:3: thoughts.length: null must be a valid integer; leave the key out",
        ),
        (
            VALID_YAML + "logging: {report_to: wandb}",
            "x.yaml:3: logging.report_to: 'wandb' must be a valid list; write it as [a, b]",
        ),
        (
            VALID_YAML + "logging: {report_to: [1]}",
            "x.yaml:3: logging.report_to.0: 1 must be a valid string",
        ),
        (
            VALID_YAML + "optim:\n  lr: 1",
            "x.yaml:4: optim.lr: renamed; write optim.learning_rate",
        ),
        (
            VALID_YAML + "training: {objective: next_token}",
            "x.yaml:3: training.objective: renamed; write loss.objective",
        ),
        (
            VALID_YAML + "stages: {a: {thoughts: {share: 0.5}}}",
            "x.yaml:3: stages.a.thoughts.share: renamed; write thoughts.position_fraction",
        ),
        (VALID_YAML + "[a]: 1", "x.yaml:3: no valid YAML: a key must be a name"),
        ("a: &a [*a]", "x.yaml:1: no valid YAML: more than 10,000 values, aliases written out, or"),
        (VALID_YAML + "a: !!set {b}", "x.yaml:3: no valid YAML: could not determine"),
        ("[" * 2000, "x.yaml: no valid YAML: it is nested too deeply"),
        ("model: {name_or_path: x}\ndata: {trian: x}", "x.yaml:2: data.trian: unknown key; did"),
    ],
)
def test_a_fault_in_the_file_is_one_line_with_its_place(write, text, expected):
    assert only_problem_of(write(text)).startswith(expected)


def test_foreign_names_lead_to_keys_that_exist_and_are_none_themselves():
    keys = fields()
    assert {key for key in FOREIGN.values() if key not in keys} == {"resume"}  # of the command line
    assert FOREIGN.keys().isdisjoint(key.partition(".")[2] for key in keys)


def test_a_section_of_another_type_is_named():
    with pytest.raises(ConfigError) as error:
        read_sections("from_base", {"tuning": "lora", "thoughts": None})
    assert error.value.problems == [
        "from_base: tuning: must be a mapping of keys, such as tuning.method, or a TuningConfig of "
        "quietstar.config, but is a str"
    ]


def test_a_misspelt_part_is_all_that_is_said_of_it(write):
    text = VALID_YAML + "loss: {objective: verifree, reward: probb}\n"
    problem = only_problem_of(write(text))
    assert problem.startswith("x.yaml:3: loss.reward: probb: there is none of this name")


def test_a_missing_file_or_a_folder_says_what_was_meant(write):
    assert only_problem_of("tny.yaml") == (
        "command line: --config: there is no file tny.yaml; did you mean tiny?"
    )
    Path("run").mkdir()
    assert "run is a folder; give a YAML file" in only_problem_of("run")
    write(VALID_YAML, "run/config.yaml")
    assert "did you mean run/config.yaml?" in only_problem_of("run")


def test_an_empty_file_leaves_only_what_must_be_set(write):
    problems = problems_of(write("# nothing\n"))
    assert [problem.split(": ")[1] for problem in problems] == ["model.name_or_path", "data.train"]


# Overrides


@pytest.mark.parametrize(
    ("arguments", "key", "value"),
    [
        (["--thoughts.length", "9"], "thoughts.length", 9),
        (["--thoughts.length=9"], "thoughts.length", 9),
        (["--thoughts.length=9", "--thoughts.length", "10"], "thoughts.length", 10),
        (["--training.torch_compile"], "training.torch_compile", True),
        (["--training.torch_compile", "--training.seed", "1"], "training.torch_compile", True),
        (["--training.torch_compile", "false"], "training.torch_compile", False),
        (["--optim.learning_rate", "1e-3"], "optim.learning_rate", 1e-3),
        (["--optim.learning_rate", "1"], "optim.learning_rate", 1.0),
        (["--logging.report_to", "[wandb, tensorboard]"], "logging.report_to", None),
        (["--tuning.lora_target_modules", "null"], "tuning.lora_target_modules", None),
        (["--data.eval", "null"], "data.eval", None),
        (["--data.eval", "8"], "data.eval", "8"),
        (["--training.mixed_precision", "no"], "training.mixed_precision", "no"),
        (["--thoughts.start_init", "---"], "thoughts.start_init", "---"),
        (["--data.template", "{question} {answer}"], "data.template", "{question} {answer}"),
        (["--data.template", r'"{question}\n{answer}"'], "data.template", "{question}\n{answer}"),
        (["--data.task_options", "{a: 1}"], "data.task_options", {"a": 1}),
        (["--data.task_options.a.b", "[1]"], "data.task_options", {"a": {"b": [1]}}),
    ],
)
def test_an_override_replaces_the_file(write, arguments, key, value):
    name = write(VALID_YAML + "thoughts: {length: 3, start_init: x}\n")
    section, field = key.split(".")
    if key == "logging.report_to":
        value = ["wandb", "tensorboard"]
    assert getattr(getattr(load_config(name, arguments), section), field) == value


def test_an_override_below_a_mapping_keeps_its_other_entries():
    config = load_config("tiny", ["--model.config.hidden_size", "32"])
    before = load_config("tiny").model.config
    assert config.model.config == {**before, "hidden_size": 32}
    before, config = load_config("demo"), load_config("demo", ["--data.task_options.size", "300"])
    for name, stage in before.stage_configs().items():
        options = {**stage.data.task_options, "size": 300}
        assert config.stage_configs()[name].data.task_options == options


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--lenght", "8"], "--lenght: unknown key; did you mean --thoughts.length?"),
        (["--learning_rate=1"], "--learning_rate: unknown key; did you mean --optim.learning_rate"),
        (["--lr", "1"], "--lr: unknown key; did you mean --optim.learning_rate?"),
        (["--optim.lr", "1"], "--optim.lr: renamed; write --optim.learning_rate"),
        (["--num_train_epochs", "3"], "--num_train_epochs: unknown key; here it is --training.max"),
        (
            ["--training.bf16"],
            "--training.bf16: unknown key; here it is --training.mixed_precision "
            "(bf16 or no; there is no fp16)",
        ),
        (["--beta", "0.1"], "--beta: unknown key; here it is --loss.kl_weight"),
        (
            ["--training.eval_controls", "[swaped]"],
            "training.eval_controls.0: 'swaped' must be 'swapped', "
            "'shuffled', 'pause', 'generic' or 'blank'; did you mean swapped?",
        ),
        (["--thoughts.lenght=8"], "--thoughts.lenght: unknown key; did you mean --thoughts.length"),
        (["--thoughts.length.x", "8"], "--thoughts.length.x: unknown key"),
        (["--xyzzy"], "--xyzzy: unknown key"),
        (["--thoughts", "{}"], "--thoughts: is a section; set one of its keys, such as --thoughts"),
        (["--thoughts.length"], "thoughts.length: has no value; write --thoughts.length VALUE"),
        (["--thoughts.length="], "thoughts.length: has no value"),
        (["--logging.report_to", "[a"], "logging.report_to: '[a' is no valid YAML"),
        (["y.yaml"], "y.yaml: belongs to no key; write --config y.yaml"),
        (
            ["--thoughts.length", "-1"],
            "thoughts.length: -1 must be greater than or equal to 1; default 8 (Free tokens",
        ),
        (["--thoughts.num_thoughts", "1"], "thoughts.num_thoughts: thoughts.num_thoughts (1) must"),
    ],
)
def test_a_fault_on_the_command_line_is_one_line(write, arguments, expected):
    problem = only_problem_of(write(VALID_YAML), *arguments)
    assert problem.startswith(f"command line: {expected}")


def test_a_rule_broken_by_an_override_is_reported_at_the_override(write):
    name = write(VALID_YAML + "thoughts: {lookahead: 20}")
    problem = only_problem_of(name, "--data.seq_len", "16")
    assert problem.startswith("command line: data.seq_len: thoughts.lookahead (20)")
    problem = only_problem_of(name, "--loss.estimator=paper", "--thoughts.num_thoughts=1")
    assert problem.startswith("command line: thoughts.num_thoughts: ")


def test_an_override_mends_a_fault_of_the_file(write):
    name = write(VALID_YAML + "thoughts: {length: 0}")
    assert load_config(name, ["--thoughts.length", "1"]).thoughts.length == 1


def test_all_wrong_names_and_values_are_reported_at_once_and_then_all_broken_rules(write):
    name = write(
        "model: {name_or_path: x}\n"
        "thoughts:\n"
        "  lenght: 8\n"  # unknown
        "  lookahead: 0\n"  # out of bounds
        "optim: {learning_rate: fast}\n"  # type
        "mixing_head: {initial_weight: 0.1, floor: 0.2}\n"  # cross-field
        "loss: {estimator: papre}\n"  # no such choice
    )
    arguments = ["--training.max_stepz", "1", "--data.seq_len", "x"]
    keys = [problem.split(": ")[:2] for problem in problems_of(name, *arguments)]
    assert sorted(keys) == [
        ["command line", "--training.max_stepz"],
        ["command line", "data.seq_len"],
        ["x.yaml:3", "thoughts.lenght"],
        ["x.yaml:4", "thoughts.lookahead"],
        ["x.yaml:5", "optim.learning_rate"],
        ["x.yaml:7", "loss.estimator"],
    ]
    text = "model: {name_or_path: x}\nthoughts: {num_thoughts: 1}\n"
    problems = problems_of(write(text + "mixing_head: {initial_weight: 0.1, floor: 0.2}\n"))
    keys = [problem.split(": ")[:2] for problem in problems]
    assert sorted(keys) == [
        ["x.yaml", "data.train"],
        ["x.yaml:2", "thoughts.num_thoughts"],
        ["x.yaml:3", "mixing_head.initial_weight"],
    ]


def test_an_unreadable_file_hides_no_fault_of_the_command_line():
    problems = problems_of("nothing.yaml", "--thoughts.length", "0", "--nothing", "1")
    assert [problem.split(": ")[1] for problem in problems] == [
        "--config",
        "--nothing",
        "thoughts.length",
    ]


@pytest.mark.parametrize("text", ["64", "auto", "null"])
def test_a_number_or_a_word_from_the_command_line(text):
    config = load_config("configs/tiny.yaml", ["--training.learn_chunk_tokens", text])
    expected = {"64": 64, "auto": "auto", "null": None}[text]
    assert config.training.learn_chunk_tokens == expected


@pytest.mark.parametrize("text", ["0", "-5", "6.5", "foo"])
def test_what_is_neither_the_number_nor_the_word(text):
    with pytest.raises(ConfigError) as caught:
        load_config("configs/tiny.yaml", ["--training.learn_chunk_tokens", text])
    (problem,) = caught.value.problems
    assert "training.learn_chunk_tokens: " in problem
    assert "must be integer >= 1 and <= 1000000000 or auto or null; default auto" in problem


def test_a_word_that_was_probably_meant():
    with pytest.raises(ConfigError, match=r"learn_chunk_tokens: 'autu' .*; did you mean auto"):
        load_config("configs/tiny.yaml", ["--training.learn_chunk_tokens", "autu"])


def test_a_bomb_of_aliases_is_refused_at_once(write):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30)]
    problem = only_problem_of(write("\n".join(lines)))
    assert problem.startswith("x.yaml:1: no valid YAML: more than 10,000 values, aliases written")


def test_a_few_aliases_and_merged_keys_are_understood(write):
    text = "stages:\n  a: {optim: &o {warmup_steps: 3}}\n  b: {optim: {<<: *o, weight_decay: 0}}\n"
    config = load_config(write(VALID_YAML + text))
    assert [stage.optim.warmup_steps for stage in config.stage_configs().values()] == [3, 3]


# Configs of earlier versions


def test_every_renamed_key_leads_to_one_of_today():
    assert set(RENAMED.values()) <= set(fields())
    assert not set(RENAMED) & set(fields())


OLD_RUN = """
model: {config: {model_type: llama}, tokenizer: bytes}
data: {train: "synthetic:moves", steps_field: steps, format: qa}
thoughts: {source: sampled, share: 0.5}
optim: {lr: 0.01}
stages:
  first:
    training: {objective: next_token, steps: 5}
  second:
    thoughts: {source: pause, length: 4}
    loss: {policy_weight: 0}
"""


def test_the_config_of_an_old_run_folder_is_translated(write, caplog):
    Path("run/checkpoints").mkdir(parents=True)
    config = load_config(write(OLD_RUN, "run/config.yaml"))
    first, second = config.stage_configs().values()
    assert (first.loss.objective, second.loss.objective) == ("next_token", "quiet_star")
    assert (first.training.max_steps, config.optim.learning_rate) == (5, 0.01)
    assert (first.thoughts.sampler, second.thoughts.sampler) == ("rollout", "pause")
    assert first.thoughts.position_fraction == 0.5
    assert config.data.rationale_field == "rationale"
    assert "translated 6 keys of an earlier version" in caplog.text
    assert "data.steps_field -> data.rationale_field" in caplog.text


def test_old_keys_of_any_other_file_are_errors(write):
    problems = problems_of(write(OLD_RUN, "config.yaml"))
    assert len([problem for problem in problems if ": renamed; write " in problem]) == 7


@pytest.mark.parametrize("key", sorted(REPLACED | DROPPED))
def test_a_key_that_is_gone_is_one_line_that_says_what_to_write(key, write):
    assert key not in fields()
    section, name = key.split(".")
    tree = {**VALID, section: {**VALID.get(section, {}), name: 1}}
    if key in REPLACED:
        assert REPLACED[key].partition(":")[0] in fields()
        words = f"is gone; write {REPLACED[key]}"
    else:
        words = f"is gone: {DROPPED[key][1]}; leave it out"
    assert only_problem_of(write(json.dumps(tree))) == f"x.yaml:1: {key}: {words}"
    assert only_problem_of(write(VALID_YAML), f"--{key}", "1").endswith(f"--{key}: {words}")


AT_DEFAULT = """
model: {revision: null}
tuning: {adapter_size: 64, num_virtual_tokens: 16, encoder_hidden_size: null, galore_rank: 128,
         galore_update_proj_gap: 200, galore_scale: 0.25}
thoughts: {position_count: null, scoring_model: null, schedule_type: stepped,
           schedule_min_gain: null}
mixing_head: {activation: sigmoid, hidden_size: null}
loss: {draft_weight: 0.0, length_weight: 0.0, policy_temperature: null}
judge: {chat: auto, temperature: 1.0, stop: [], batch_size: 16, dtype: auto, device: null,
        cache: null}
data: {messages_field: messages, short_texts: pad, split: train, subset: null, size: 10000}
optim: {adam_beta1: 0.9, adam_beta2: 0.999, adam_epsilon: 1.0e-08}
training: {overwrite_output_dir: false}
logging: {run_name: null}
"""
"""What version 0.2.0 wrote into every run folder, of keys that are gone."""


def in_a_run(tree, path="run/config.yaml"):
    """The config of a run folder that an earlier version wrote."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    (Path(path).parent / "checkpoints").mkdir(exist_ok=True)
    Path(path).write_text(yaml.safe_dump(tree), encoding="utf-8")
    return load_config(path)


def test_a_run_folder_with_the_keys_of_0_2_at_default_is_what_it_was(write, caplog):
    old = yaml.safe_load(AT_DEFAULT)
    known = {f"{section}.{name}" for section, body in old.items() for name in body}
    later = {"loss.form", "loss.top_tokens"}  # of other objectives
    earlier = {"optim.eps", "optim.beta1", "optim.beta2", "training.overwrite"}
    earlier |= {"tuning.virtual_tokens", "tuning.galore_update_every"}
    assert known == (REPLACED | DROPPED).keys() - later - earlier
    tree = {section: {**body, **VALID.get(section, {})} for section, body in old.items()}
    assert in_a_run(tree) == load_config(write(VALID_YAML))
    assert "is gone" not in caplog.text
    for more in (
        {"objective": "distill", "top_tokens": 64},
        {"objective": "fast_rl", "form": "paper", "policy_temperature": 3.0},
        {"objective": "quiet_star", "estimator": "paper", "policy_temperature": 3.0},
    ):
        loss = {name: more[name] for name in more if f"loss.{name}" in fields()}
        assert in_a_run({**VALID, "loss": more}) == in_a_run(
            {**VALID, "loss": loss}, "x/config.yaml"
        )
    assert "is gone" not in caplog.text


MOVED = [
    ({"thoughts": {"position_count": 3}}, {"thoughts": {"position_fraction": 3}}),
    ({"thoughts": {"position_count": 1}}, {"thoughts": {"position_fraction": 1e-4}}),
    (
        {"tuning": {"method": "prefix", "num_virtual_tokens": 4, "encoder_hidden_size": 5,
                    "adapter_size": 3}},
        {"tuning": {"method": "prefix",
                    "options": {"num_virtual_tokens": 4, "encoder_hidden_size": 5}}},
    ),
    ({"tuning": {"method": "houlsby", "adapter_size": 3}},
     {"tuning": {"method": "houlsby", "options": {"adapter_size": 3}}}),
    (
        {"tuning": {"method": "galore", "galore_rank": 4, "galore_update_proj_gap": 9,
                    "galore_scale": 0.5}},
        {"tuning": {"method": "galore",
                    "options": {"rank": 4, "update_proj_gap": 9, "scale": 0.5}}},
    ),
    ({"optim": {"adam_beta1": 0.8, "adam_beta2": 0.99}}, {"optim": {"betas": [0.8, 0.99]}}),
    ({"optim": {"beta2": 0.99}}, {"optim": {"betas": [0.9, 0.99]}}),
    (
        {"data": {"train": "synthetic:moves", "size": 50, "task_options": {"num_steps": 2}},
         "stages": {"a": {"data": {"task_options": {"num_steps": 3}}},
                    "b": {"data": {"size": 20, "seq_len": 40}}}},
        {"data": {"train": "synthetic:moves", "task_options": {"size": 50, "num_steps": 2}},
         "stages": {"a": {"data": {"task_options": {"size": 50, "num_steps": 3}}},
                    "b": {"data": {"task_options": {"size": 20, "num_steps": 2}, "seq_len": 40}}}},
    ),
    ({"data": {"train": "owner/name", "eval": "owner/name:test", "subset": "main"}},
     {"data": {"train": "owner/name:main:train", "eval": "owner/name:main:test"}}),
    ({"data": {"train": "owner/name", "eval": "x.jsonl", "split": "first"}},
     {"data": {"train": "owner/name:first", "eval": "x.jsonl"}}),
    ({"model": {"name_or_path": "owner/name", "tokenizer": "bytes", "revision": "abc"}},
     {"model": {"name_or_path": "owner/name@abc", "tokenizer": "bytes"}}),
    ({"model": {"name_or_path": "./here", "revision": "abc"}},
     {"model": {"name_or_path": "./here"}}),
    ({"mixing_head": {"activation": "none", "initial_weight": 0, "hidden_size": 8}},
     {"mixing_head": {"initial_weight": 0}}),
]  # fmt: skip
"""Sections of a run of version 0.2.0, and what they are today."""


@pytest.mark.parametrize(("old", "new"), MOVED, ids=str)
def test_what_a_run_of_0_2_says_by_keys_that_are_gone_moves(old, new, write, caplog):
    write("")
    found = in_a_run(VALID | old)
    assert "is gone" not in caplog.text
    assert found == in_a_run(VALID | new, "new/config.yaml")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("thoughts.scoring_model", "small"),
        ("thoughts.schedule_type", "linear"),
        ("thoughts.schedule_min_gain", 0.9),
        ("loss.draft_weight", 0.2),
        ("loss.length_weight", -0.001),
        ("loss.policy_temperature", 2.0),
        ("data.messages_field", "turns"),
        ("data.short_texts", "skip"),
        ("judge.stop", ["x"]),
        ("judge.temperature", 0.5),
        ("optim.adam_epsilon", 1e-12),
        ("logging.run_name", "mine"),
    ],
)
def test_what_a_run_cannot_keep_is_a_warning(key, value, write, caplog):
    write("")
    section, name = key.split(".")
    tree = {**VALID, section: {**VALID.get(section, {}), name: value}}
    assert in_a_run(tree) == in_a_run(VALID, "new/config.yaml")
    (record,) = caplog.records
    assert record.getMessage().startswith(f"run/config.yaml: {key} (")
    assert f"is gone; {DROPPED[key][1]}" in record.getMessage()


@pytest.mark.parametrize(
    "old",
    [
        {"tuning": 3}, {"tuning": "adapter_size"},
        {"tuning": {"method": "houlsby", "adapter_size": []}},
        {"thoughts": {"position_count": "x"}}, {"optim": {"adam_beta1": "x"}}, {"optim": []},
        {"data": {"train": "synthetic:moves", "size": 3, "task_options": "x"}},
        {"data": {"train": 3, "split": ["x"]}}, {"loss": 3, "training": {"objective": "x"}},
    ],
    ids=str,
)  # fmt: skip
def test_damaged_keys_of_a_run_folder_are_lines_too(old, write):
    write("")
    with pytest.raises(ConfigError):
        in_a_run(VALID | old)


def test_a_fault_in_an_old_run_folder_keeps_its_line(write):
    Path("run/checkpoints").mkdir(parents=True)
    problem = only_problem_of(write(VALID_YAML + "optim:\n  lr: x", "run/config.yaml"))
    assert problem.startswith("run/config.yaml:4: optim.learning_rate: 'x' must be")


def test_a_config_survives_pickling():
    config = load_config("tiny", ["--loss.policy_weight", "0.7"])
    assert pickle.loads(pickle.dumps(config)) == config
