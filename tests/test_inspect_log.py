"""``quietstar export --inspect-log``: what Inspect finds in the log of a run or an evaluation."""

import json

import pytest

from quietstar.cli import main as cli

KEYS = ["version", "status", "eval", "plan", "results", "stats", "samples"]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def exported(source, out, capsys):
    """The logs of a command, by the task in the name of their file."""
    assert not cli.main(["export", "--inspect-log", str(source), "--out", str(out)])
    said = capsys.readouterr().out.splitlines()
    assert sorted(said) == sorted(f"log: {path}" for path in out.iterdir())
    logs = {}
    for path in out.iterdir():
        created, task, key = path.stem.split("_")
        logs[task] = log = json.loads(path.read_text())
        assert list(log) == KEYS  # readers of headers stop at samples
        assert created == log["eval"]["created"].replace(":", "-").replace("+", "-")
        assert key == log["eval"]["task_id"]
        numbers = {(sample["id"], sample["epoch"]) for sample in log["samples"]}
        assert len(numbers) == log["results"]["total_samples"]
    return logs


def parts(sample):
    """The assistant's message, which is the output, too: thoughts in angle brackets, and text."""
    user, assistant = sample["messages"]
    assert user == {"role": "user", "content": sample["input"]}
    assert sample["output"]["choices"][0]["message"] == assistant
    forms = {"reasoning": "<{}>", "text": "{}"}
    return [forms[part["type"]].format(part[part["type"]]) for part in assistant["content"]]


def values(scores):
    return {name: pytest.approx(score["value"]) for name, score in scores.items()}


def answer(prediction, probability):
    return {"prediction": prediction, "probability": probability}


def test_a_run_becomes_texts_whose_epochs_are_its_evaluations(tmp_path, capsys):
    run = tmp_path / "mine"
    run.mkdir()
    answers = {"without_thoughts": answer("3", 0.25), "with_thoughts": answer("2", 0.75)}
    sample = {"before": "1 + 1 =", "thought": "two", "truth": "2", **answers}
    later = sample | {"thought": "", "with_thoughts": answer("3", None), "correct": False}
    write_lines(run / "thoughts.jsonl", [
        {"stage": "think", "step": 0, "samples": [sample, sample | {"before": "0 + 2 ="}]},
        {"stage": "think", "step": 10, "samples": [later]},
    ])  # fmt: skip
    (log,) = exported(run, tmp_path / "logs", capsys).values()
    assert log["eval"]["model"] == str(run)
    first, other, last = log["samples"]
    assert [one["metadata"]["step"] for one in log["samples"]] == [0, 0, 10]
    assert [(one["id"], one["epoch"]) for one in log["samples"]] == [(1, 1), (2, 1), (1, 2)]
    assert (first["input"], other["input"], first["target"]) == ("1 + 1 =", "0 + 2 =", "2")
    assert (parts(first), parts(last)) == (["<two>", "2"], ["<>", "3"])
    assert values(first["scores"]) == {
        "gain": 0.5, "accuracy_with_thoughts": 1.0, "accuracy_without_thoughts": 0.0,
        "gold_probability_with_thoughts": 0.75, "gold_probability_without_thoughts": 0.25,
    }  # fmt: skip
    assert "gain" not in last["scores"]  # whose probability is unknown
    (means,) = [
        s["metrics"] for s in log["results"]["scores"] if s["name"].startswith("accuracy_with_")
    ]
    assert {name: metric["value"] for name, metric in means.items()} == {"step 0": 1, "step 10": 0}
    assert len(exported(run, tmp_path / "logs", capsys)) == 1  # which replaces the first one


def test_an_evaluation_becomes_a_log_of_each_task(tmp_path, capsys):
    def record(task, variant, values, **more):
        return {"task": task, "item": 0, "variant": variant, "id": "q7", "answer": " 4 2",
                "metrics": {"nll": values}, **more}  # fmt: skip

    write_lines(tmp_path / "e.items.jsonl", [
        {"settings": {"model": "runs/mine/final"}},
        record("my_math", "without_thoughts", [3.0], predicted=[" 9"]),
        record("my_math", "with_thoughts", [1.0, 2.0], predicted=[" 42", " 43"], prompt="6 * 7 =",
               thought_texts=[["six"], ["seven"]]),
        record("my_math", "swapped", [2.5, 4.0], predicted=[" 9", " 8"]),
        record("text.txt", "without_thoughts", [1.0], tokens=["4", " 2"], nll=[1.0, 1.0]),
        record("text.txt", "with_thoughts", [1.5], nll=[1.0, 2.0], thought_texts=[["a", "b"]]),
        record("plain", "without_thoughts", [1.0]),
    ])  # fmt: skip
    logs = exported(tmp_path / "e.json", tmp_path / "logs", capsys)
    assert {*logs} == {"my-math", "text-txt"}
    first, second = logs["my-math"]["samples"]
    assert (parts(first), parts(second)) == (["<six>", " 42"], ["<seven>", " 43"])
    assert (first["input"], first["metadata"]["id"]) == ("6 * 7 =", "q7")
    assert values(second["scores"]) == {
        "gain": 1.0, "gain_of_content": 2.0, "nll_with_thoughts": 2.0, "nll_without_thoughts": 3.0,
        "nll_swapped": 4.0,
    }  # fmt: skip
    means = {s["name"]: s["metrics"]["mean"]["value"] for s in logs["my-math"]["results"]["scores"]}
    assert means["gain"] == 1.5  # of 2 and 1
    (text,) = logs["text-txt"]["samples"]
    assert (text["input"], parts(text)) == (" 4 2", ["<a>", "4", "<b>", " 2"])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothing", "--inspect-log (nothing): is neither a run nor an evaluation. Give"),
        ("empty", "--inspect-log (empty): holds no thoughts. Give"),
        ("e.json", "--inspect-log (e.json), e.items.jsonl: cannot be read (No such file"),
        ("off.items.jsonl", "--inspect-log (off.items.jsonl): holds no thoughts. Give"),
    ],
)
def test_a_source_without_thoughts_is_one_line(source, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    record = {"task": "t", "item": 0, "variant": "without_thoughts", "metrics": {"nll": [1.0]}}
    write_lines(tmp_path / "off.items.jsonl", [{"settings": {}}, record])
    for out, expected in (("off.items.jsonl", "--out (off.items.jsonl): is no"), ("logs", message)):
        assert cli.main(["export", "--inspect-log", source, "--out", out]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"quietstar: error: {expected}")
    assert not (tmp_path / "logs").exists()


def test_inspect_reads_a_log(tmp_path, capsys):
    log_module = pytest.importorskip("inspect_ai.log")
    test_an_evaluation_becomes_a_log_of_each_task(tmp_path, capsys)
    for path in (tmp_path / "logs").iterdir():
        log = log_module.read_eval_log(str(path))
        assert log.samples[0].messages[1].content[0].type == "reasoning"
