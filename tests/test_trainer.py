"""Training from Python: names, records and rewards; the same run as from the command line."""

import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny import plain_model

from quietstar import QuietStarConfig, QuietStarTrainer
from quietstar.cli import main as cli
from quietstar.config import DataConfig
from quietstar.config.loading import load_config
from quietstar.config.starting import format_of
from quietstar.data import build_data, load_tokenizer
from quietstar.errors import ConfigError, UserError
from quietstar.evaluation.tasks import encode, find_task
from quietstar.registry import weighted_parts
from quietstar.rewards import find_reward

ROWS = [{"q": f"{a} plus {b} is", "a": f"{a + b}", "level": a} for a in range(6) for b in range(5)]
SEEN = []


def correct(completions, a, **record):
    """A rule-based reward that reads the record."""
    SEEN.append((completions, a, record))
    return [float(text.strip() == answer) for text, answer in zip(completions, a, strict=True)]


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain_model(max_position_embeddings=128, eos_token_id=256).save_pretrained("m")
    load_tokenizer("bytes").save_pretrained("m")
    SEEN.clear()
    return tmp_path


def args(**more):
    settings = {
        "positions": "answer_start", "length": 3, "lookahead": 3, "max_steps": 2, "seq_len": 40,
        "per_device_train_batch_size": 4, "warmup_steps": 0,
        "output_dir": "runs/x", "mixed_precision": "no", "eval_sequences": 4, "report_to": [],
        "thought_steps": 0,
    }  # fmt: skip
    return QuietStarConfig(**settings | more)


def trainer(reward_funcs=correct, **more):
    return QuietStarTrainer(
        "m", args(**more), ROWS, reward_funcs=reward_funcs, formatting="Q: {q}\nA: {a}"
    )


def test_a_run_from_python_is_that_of_its_config_bit_for_bit(work):
    result = trainer().train()
    assert result.metrics["step"] == 2
    assert len(result.frame()) == len(result.log_history)
    assert result.model.decode_thoughts(torch.tensor([[*b"hi", -1]])) == ["hi"]
    assert "NLL of the next token" in result._repr_html_()
    line = ["train", "--config", "runs/x/config.yaml", "--training.output_dir", "runs/y"]
    assert cli.main(line) in (None, 0)
    one, other = (load_all(work / "runs" / name).values() for name in ("x", "y"))
    for mine, theirs in zip(one, other, strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def load_all(run):
    return {path: load_file(path) for path in sorted((run / "final").rglob("*.safetensors"))}


def test_a_reward_reads_what_is_written_and_the_record_it_belongs_to(work):
    trainer().train()
    assert len(SEEN) == 2
    for completions, answers, record in SEEN:
        assert len(completions) == len(answers) == 4 * 2  # texts, thoughts
        assert set(record) == {"q", "level", "prompts", "thoughts"}
        for question, answer, level, prompt in zip(
            record["q"], answers, record["level"], record["prompts"], strict=True
        ):
            assert prompt.startswith(f"Q: {question}\nA:")
            assert {"q": question, "a": answer, "level": level} in ROWS
        assert all(isinstance(thought, str) for thought in record["thoughts"])


def test_rewards_with_weights_add_up(work, monkeypatch):
    assert weighted_parts("0.5*a:b + thought") == [(0.5, "a:b"), (1.0, "thought")]
    with pytest.raises(UserError, match="'x' must be a number"):
        find_reward("x*thought")
    one, two = (lambda completions: [1.0] * len(completions)), correct
    made = QuietStarTrainer("m", args(), ROWS, reward_funcs=[one, two], reward_weights=[0.25, 2],
                            formatting="{q} {a}")  # fmt: skip
    name = made.config.loss.reward
    assert re.fullmatch(r"0.25\*quietstar_given:reward\w* \+ 2\*test_trainer:correct", name)
    assert len(made.train().log_history) > 2
    (record, *_) = [r for r in made_records(work) if r["kind"] == "train"]
    rewards = [0.25 + 2 * (text.strip() == answer) for seen in SEEN[:1]
               for text, answer in zip(seen[0], seen[1], strict=True)]  # fmt: skip
    assert record["policy_reward"] == pytest.approx(sum(rewards) / len(rewards))


def made_records(work):
    lines = (work / "runs" / "x" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        (lambda completions, gold: [0.0] * len(completions), "reads gold, which is no field of"),
        (lambda completions: [0.0], "returned 1 numbers for 8 completions"),
        (lambda completions: 1 / 0, "it raised ZeroDivisionError"),
    ],
)
def test_what_a_reward_does_wrong_is_one_line(work, reward, words):
    with pytest.raises(UserError, match=words):
        trainer(reward).train()


def test_names_are_found_in_their_sections():
    found = QuietStarConfig(length=8, num_generations=4, beta=0.1, judge={"continuation": 5},
                            **{"data.seq_len": 64}).settings  # fmt: skip
    assert found == {
        "thoughts.length": 8, "thoughts.num_thoughts": 4, "loss.kl_weight": 0.1,
        "judge.continuation": 5, "data.seq_len": 64,
    }  # fmt: skip
    with pytest.raises(ConfigError, match="QuietStarConfig: lenght: unknown key; did you mean tho"):
        load_config(None, given=QuietStarConfig(lenght=3).settings)


def test_epochs_and_accumulation_are_counted(work):
    config = trainer(num_train_epochs=2, gradient_accumulation_steps=2).config.training
    assert config.global_batch_size == 8
    assert config.max_steps == 7  # of 28 records, two of which are held out


def test_a_template_names_the_fields_of_a_question(work):
    found = format_of({"a", "b", "c"}, "{a}, {b}:\n{c}.")
    assert found["data.template"] == "{question}\n{answer}"
    data = QuietStarTrainer(
        "m", args(), [{"a": "{{ x }}", "b": "{%", "c": "3"}] * 3, formatting="{a}, {b}:\n{c}."
    ).config.data
    _, held, _ = build_data(data, load_tokenizer("bytes"), 0)
    text = load_tokenizer("bytes").decode(held.samples[0].ids, skip_special_tokens=True)
    assert text == "{{ x }}, {%:\n3."
    with pytest.raises(UserError, match="must name fields of the records"):
        format_of({"a"}, "{a} {b}")


CHOICES = [{"label": label, "text": f"thing {label}"} for label in "ABC"]
STEM = "Which?"


@pytest.mark.parametrize(
    ("record", "task"),
    [
        ({"prompt": "Is ice cold?", "choices": [" yes", " no"], "answer": " no"}, "q.jsonl"),
        ({"prompt": "Is ice cold?", "choices": [" yes", " no"], "answer": 1}, "q.jsonl"),
        ({"question": {"stem": STEM, "choices": CHOICES}, "answerKey": "B"}, "commonsense_qa"),
        ({"question": STEM, "choices": CHOICES, "answerKey": "B"}, "commonsense_qa"),
    ],
)
def test_choices_are_trained_on_as_an_evaluation_scores_them(work, record, task):
    found = find_task(task)
    name = found.file
    (work / name).write_text((json.dumps(record) + "\n") * 2)
    keys = {key.partition(".")[2]: value for key, value in format_of({*record}, None).items()}
    config = DataConfig(train=name, loss_on="answer", seq_len=80, **keys)
    tokenizer = load_tokenizer("bytes")
    trained = build_data(config, tokenizer, 0)[1].samples[0]
    assert trained.ids[-1] == tokenizer.eos_token_id
    for way in (found, find_task(name, data=config)):  # by itself, and as the training's config
        items = way.items(work, 1)
        (gold,) = (one for one in encode(way, items, tokenizer, None) if one.is_answer)
        assert way is not found or gold.ids == trained.ids[:-1].tolist()
        scored = tokenizer.decode(trained.ids[trained.targets][:-1]).strip()
        assert tokenizer.decode(gold.scored_ids).strip() == scored == record.get("answerKey", "no")
    assert len(items[0].choices) == (3 if "answerKey" in record else 2)
    (work / name).write_text(json.dumps({**record, "answer": " x", "answerKey": "x"}))
    with pytest.raises(UserError, match=rf"{name}, line 1: field answer\w* is ' ?x', .* of "):
        build_data(config, tokenizer, 0)


def test_a_notebook_has_one_bar_that_moves(work, monkeypatch):
    shown = []

    class Output:
        def update(self, bars):
            shown.append(bars._repr_mimebundle_([], [])["text/plain"])

    module = SimpleNamespace(display=lambda *_, display_id=None: display_id and Output())
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(display=module))
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    trainer().train()
    assert "0/2" in shown[0]
    assert any("evaluating" in text for text in shown)
    assert "2/2" in shown[-1]
    assert "evaluating" not in shown[-1]
    assert "loss" in shown[-1]


def test_a_config_gives_what_arguments_do_not(work):
    assert QuietStarTrainer(args=QuietStarConfig("demo")).config.model.config is not None
    (work / "own.yaml").write_text("data: {format: qa, question_field: a, answer_field: b}")
    rows = [{"question": "1", "answer": "2", "a": "3", "b": "4"}] * 3
    data = QuietStarTrainer("m", QuietStarConfig("own.yaml"), rows).config.data
    assert (data.question_field, data.answer_field) == ("a", "b")


def test_the_record_of_a_sample_is_that_of_its_text(work):
    (work / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config = DataConfig(train="q.jsonl", format="qa", question_field="q", answer_field="a",
                        seq_len=40, template="{question} {answer}")  # fmt: skip
    tokenizer = load_tokenizer("bytes")
    data, _, _ = build_data(config, tokenizer, 3, whole=True)
    for step in (0, 5, 9):  # over epochs
        batch = data.batch(step, 7)
        records = data.records(batch.sample_ids.tolist())
        for ids, record in zip(batch.input_ids, records, strict=True):
            text = tokenizer.decode(ids, skip_special_tokens=True).replace("<|pad|>", "")
            assert text.startswith(f"{record['q']} {record['a']}")
    plain, _, _ = build_data(config, tokenizer, 3)
    with pytest.raises(UserError, match="reads fields of records"):
        plain.records([0])


def test_an_evaluation_is_a_frame(work):
    made = QuietStarTrainer("m", args(), ROWS, ROWS[:6], formatting="Q: {q}\nA: {a}")
    made.train()
    saved = work / "runs" / "x" / "config.yaml"  # scores need no reward, whose module may be gone
    saved.write_text(saved.read_text().replace("test_trainer:correct", "gone:correct"))
    frame = made.evaluate(limit=4).frame()
    assert set(frame["variant"]) >= {"without_thoughts", "with_thoughts", "swapped"}
    assert (frame["n"] == 4).all()


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        ({"prompt": "1 and 1 is", "completion": "2"}, "qa"),
        ({"prompt": "1 and 1 is", "choices": [" 2", " 3"], "answer": 0}, "qa"),
        ({"text": "a text of words"}, "text"),
    ],
)
def test_init_writes_a_config_that_trains(work, capsys, record, kind):
    (work / "mine.jsonl").write_text((json.dumps(record) + "\n") * 20)
    call = ["init", "--data", "mine.jsonl", "--model", "m", "--num-train-epochs", "2"]
    assert cli.main(call) == 0
    assert "accelerate launch train.py --config mine.yaml" in capsys.readouterr().out
    config = load_config("mine.yaml")
    assert (config.data.format, config.training.max_steps) == (kind, 5)
    small = ["--training.max_steps", "1", "--thoughts.length", "4", "--optim.warmup_steps", "0"]
    small += ["--training.mixed_precision", "no"]  # one for all runs of a process
    assert cli.main(["train", "--config", "mine.yaml", *small]) in (None, 0)
    assert cli.main(call) == 2
    assert "mine.yaml): exists" in capsys.readouterr().err
    (work / "empty.jsonl").touch()
    assert cli.main(["init", "--data", "empty.jsonl", "--model", "m"]) == 2
    assert "--data (empty.jsonl): holds no record" in capsys.readouterr().err
