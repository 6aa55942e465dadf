"""``quietstar eval``: scores of a slow loop, resume, controls, what a user may get wrong."""

import json
import math
import re
import subprocess
from pathlib import Path

import pytest
import torch
from launching import ROOT, wrap
from test_generation import slow_step
from tiny import plain_model, read_metrics, run_config, thinking_model

from quietstar import QuietStarForCausalLM
from quietstar.cli import main as cli
from quietstar.config import DataConfig
from quietstar.config.loading import save_config
from quietstar.data import load_tokenizer
from quietstar.data.encoding import Encoder
from quietstar.errors import UserError
from quietstar.evaluation import tasks as tasks_module
from quietstar.evaluation.controls import CONTROLS, GAINS, derangement, replacement
from quietstar.evaluation.scoring import GENERIC_TEXT, MixedScores, choice_metrics, item_metrics
from quietstar.evaluation.tasks import (
    TASKS,
    EncodedItem,
    Item,
    Task,
    answer_batch,
    encode,
    extract_answer,
    find_candidates,
    find_task,
)
from quietstar.sampling.samplers.rollout import Rollout
from quietstar.sampling.thoughts import Texts, ThoughtBatch
from quietstar.system.processes import Processes, join_launch
from quietstar.training.run import run_training

QUESTIONS = [
    "Two and two?",
    "A robe takes 2 bolts and half of it. How many?",
    "7?",
    "How far, in m?",
]
NUMBERS = ["4", "3", "1,007", "12"]
STEMS = ["Where is a bank?", "What is wet?", "Who?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model that thinks, a plain one, and small files in the benchmarks' own layout."""
    folder = tmp_path_factory.mktemp("evaluation")
    base = plain_model(max_position_embeddings=256, eos_token_id=256)
    base.save_pretrained(folder / "plain")
    load_tokenizer("bytes").save_pretrained(folder / "plain")
    model = thinking_model(base, thoughts={"length": 3})
    model.save_pretrained(folder / "model", load_tokenizer("bytes"))
    write_lines(folder / "gsm8k_test.jsonl", [
        {"question": q, "answer": f"so it is\n#### {n}"}
        for q, n in zip(QUESTIONS, NUMBERS, strict=True)
    ])  # fmt: skip
    choices = [{"label": letter, "text": f"thing {letter}"} for letter in "ABC"]
    write_lines(folder / "commonsenseqa_validation.jsonl", [
        {"id": f"q{i}", "question": {"stem": stem, "choices": choices}, "answerKey": "ABC"[i]}
        for i, stem in enumerate(STEMS)
    ])  # fmt: skip
    return folder


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run(folder, *arguments, tasks="gsm8k,commonsense_qa", model="model"):
    """Exit code of the command."""
    data = [] if "--data-dir" in arguments else ["--data-dir", folder]
    call = ["eval", "--model", folder / model, "--tasks", tasks, "--device", "cpu"]
    return cli.main([str(word) for word in (*call, *data, *arguments)])


def evaluated(folder, tmp_path, *arguments, **more):
    """The figures, and the records of items."""
    out = tmp_path / "out.json"
    assert run(folder, "--out", out, *arguments, **more) == 0
    items = [json.loads(line) for line in out.with_suffix(".items.jsonl").read_text().splitlines()]
    return json.loads(out.read_text()), items[1:]


# --- Scores ---------------------------------------------------------------------------------------


@torch.no_grad()
def slow_scores(model, prompt, answer, think, candidates):
    """One token at a time, no cache, no batch: (P(gold), P with the end, right, NLL a token)."""
    text = list(f"{prompt} ".encode())
    gold, published, right, nll = 1.0, 1.0, True, 0.0
    whole = list(f"{answer}\n".encode())
    model.causal_lm.set_attn_implementation("eager")
    for token in whole:
        ids = torch.tensor(text)
        logits = slow_step(model, ids)[1] if think else model.causal_lm(ids[None]).logits[0, -1]
        nll -= logits.log_softmax(-1)[token].item() / len(whole)
        with_end = logits[[*candidates, 10]].softmax(-1)
        published *= with_end[[*candidates, 10].index(token)].item()
        if token != 10:
            among = logits[candidates].softmax(-1)
            gold *= among[candidates.index(token)].item()
            right &= candidates[int(among.argmax())] == token
        text.append(token)
    return gold, published, float(right), nll


@pytest.mark.parametrize("batch_size", [1, 3])
def test_scores_are_those_of_a_slow_loop(folder, tmp_path, batch_size):
    result, items = evaluated(folder, tmp_path, "--batch-size", batch_size)
    model = thinking_model(
        plain_model(max_position_embeddings=256, eos_token_id=256), thoughts={"length": 3}
    ).eval()
    prompts = [f"Q: {q}\nA:" for q in QUESTIONS]
    listed = "".join(f"\n({letter}) thing {letter}" for letter in "ABC")
    asked = {
        "gsm8k": (prompts, [n.replace(",", "") for n in NUMBERS], list(b"0123456789")),
        "commonsense_qa": ([f"Q: {s}{listed}\nA:" for s in STEMS], list("ABC"), list(b"ABC")),
    }
    names = ("gold_probability", "published_accuracy", "accuracy", "nll")
    for task, (texts, answers, candidates) in asked.items():
        for think, variant in ((False, "without_thoughts"), (True, "with_thoughts")):
            wanted = [
                slow_scores(model, *pair, think, candidates)
                for pair in zip(texts, answers, strict=True)
            ]
            found = {r["item"]: r for r in items if (r["task"], r["variant"]) == (task, variant)}
            for number, want in enumerate(wanted):
                scores = [found[number]["metrics"][name][0] for name in names]
                assert scores == pytest.approx(want, abs=1e-5)
            mean = sum(want[0] for want in wanted) / len(wanted)
            figures = result["tasks"][task][variant]
            assert figures["gold_probability"] == pytest.approx(mean, abs=1e-5)
            assert figures["n"] == len(wanted)
        told = result["tasks"][task]["difference"]
        pair = (result["tasks"][task][v]["gold_probability"]
                for v in ("with_thoughts", "without_thoughts"))  # fmt: skip
        assert told["gold_probability"] == pytest.approx(next(pair) - next(pair))
        assert told["ci95"][0] <= told["gold_probability"] <= told["ci95"][1]
        assert 0 <= told["p_value"] <= 1


def test_sampled_thoughts_do_not_depend_on_batches_and_their_spread_is_told(folder, tmp_path):
    settings = ("--samples", 3, "--thought-temperature", 1)
    one, _ = evaluated(folder, tmp_path, *settings, "--batch-size", 1)
    both, items = evaluated(folder, tmp_path, *settings, "--batch-size", 4, "--force")
    thoughts = [r["thoughts"] for r in items if r["variant"] == "with_thoughts"]
    assert all(len(sample) == 3 for sample in thoughts)
    assert any(sample[0] != sample[1] for sample in thoughts)
    for task in ("gsm8k", "commonsense_qa"):
        a, b = (x["tasks"][task]["with_thoughts"] for x in (one, both))
        assert a["nll"] == pytest.approx(b["nll"], abs=1e-5)
        assert a["samples"]["n"] == 3
        assert b["samples"]["nll"]["stdev_between_thoughts"] > 0


def test_a_text_is_scored_at_every_token_but_the_first(folder, tmp_path):
    write_lines(tmp_path / "my.jsonl", [{"text": "a text of thirty-one characters."},
                                        {"prompt": "one, two,", "answer": "three"}])  # fmt: skip
    name = str(tmp_path / "my.jsonl")
    result, items = evaluated(folder, tmp_path, "--text-tokens", 20, tasks=name)
    first, second = (r for r in items if r["variant"] == "without_thoughts")
    assert "".join(first["tokens"]) == "a text of thirty-one"[8:]
    assert "".join(second["tokens"]) == "three"
    assert first["metrics"]["nll"][0] == pytest.approx(sum(first["nll"]) / 12)
    assert result["tasks"][name]["truncated"] == 1


# --- Controls -------------------------------------------------------------------------------------


def test_every_item_gets_the_thoughts_of_another_one(folder, tmp_path):
    result, items = evaluated(folder, tmp_path, "--controls", tasks="gsm8k")
    kept = {(r["item"], r["variant"]): r for r in items}
    found = result["tasks"]["gsm8k"]
    assert set(found["controls"]) == {"shuffled", "pause", "generic", "blank", "swapped"}
    own, swapped = (
        sum(kept[i, v]["metrics"]["gold_probability"][0] for i in range(4)) / 4
        for v in ("with_thoughts", "swapped")
    )
    assert found["gain_of_content"]["gold_probability"] == pytest.approx(own - swapped)
    assert own != pytest.approx(swapped)


def test_the_model_itself_scores_another_items_thoughts_alike(folder, tmp_path):
    """The control of an item is what `think` says of the donor's thoughts."""
    _, items = evaluated(folder, tmp_path, "--controls", tasks="gsm8k")
    kept = {(r["item"], r["variant"]): r for r in items}
    model = thinking_model(
        plain_model(max_position_embeddings=256, eos_token_id=256), thoughts={"length": 3}
    ).eval()
    for number, donor in enumerate(derangement(4, seed=0).tolist()):
        prompt = f"Q: {QUESTIONS[number]}\nA: "
        text = list(f"{prompt}{NUMBERS[number].replace(',', '')}\n".encode())
        batch = answer_batch([text], [len(text) - len(prompt)], 0)
        thoughts = torch.tensor(kept[donor, "with_thoughts"]["thoughts"])
        places = [min(p, thoughts.shape[1] - 1) for p in range(batch.positions.shape[1])]
        scored = model.score(
            batch.ids, thoughts[None, :, places].transpose(1, 2), labels=batch.labels,
            positions=batch.positions,
        )  # fmt: skip
        nll = -scored.mixed_logprobs[0, :, 0, 0].mean().item()
        assert kept[number, "swapped"]["metrics"]["nll"][0] == pytest.approx(nll, abs=1e-5)


def test_a_single_item_has_nothing_to_swap_with_and_this_is_said(folder, tmp_path):
    """Before, it got its own thoughts: a gain of content of exactly zero."""
    result, _ = evaluated(folder, tmp_path, "--controls", "--limit", 1, tasks="gsm8k")
    found = result["tasks"]["gsm8k"]
    assert "gain_of_content" not in found
    assert "gain_over_pause" in found
    assert any("gain of content: not available" in line for line in found["warnings"])


class ByItem:
    """Draws thoughts whose lengths differ from item to item; some have no token."""

    def sample(self, model, texts, positions, spec):
        batch = Rollout().sample(model, texts, positions, spec)
        texts = Texts(batch.input_ids, batch.labels, batch.answer_mask, batch.sample_ids)
        lengths = (5 * batch.sample_ids % 4).view(-1, 1, 1).expand(batch.lengths.shape)
        return ThoughtBatch.of_texts(texts, batch.positions, batch.tokens, lengths)


LENGTHS = [0, 1, 2, 3]  # of the items of `early`, of three tokens at most
ANSWERS = ["4", "no", "007", "12"]


@pytest.fixture(scope="module")
def early(folder):
    """A model that thinks once, before an answer, and whose thoughts end early; a file of items."""
    base = plain_model(max_position_embeddings=256, eos_token_id=256)
    spec = {
        "length": 3,
        "lookahead": 3,
        "positions": "answer_start",
        "sampler": f"{__name__}:ByItem",
    }
    model = thinking_model(base, thoughts=spec, head={"fixed_weight": 1.0}).eval()
    model.save_pretrained(folder / "early", load_tokenizer("bytes"))
    rows = zip(QUESTIONS, ANSWERS, range(4), strict=True)
    write_lines(folder / "own.jsonl", [
        {"prompt": q, "answer": a, "groups": {"hops": n % 2}} for q, a, n in rows
    ])  # fmt: skip
    return model


def test_every_control_scores_the_whole_answer_behind_thoughts_of_any_length(
    folder, tmp_path, early
):
    name = str(folder / "own.jsonl")
    result, items = evaluated(folder, tmp_path, "--controls", model="early", tasks=name)
    kept = {(r["item"], r["variant"]): r for r in items}
    own = [[t for t in kept[i, "with_thoughts"]["thoughts"][0][0] if t >= 0] for i in range(4)]
    assert len({len(thought) for thought in own}) > 1
    donors, generic = derangement(4, seed=0).tolist(), GENERIC_TEXT.encode()[:3]
    for number, (prompt, answer) in enumerate(
        zip(QUESTIONS, ["4", "no", "007", "12"], strict=True)
    ):
        thoughts = {
            "with_thoughts": own[number],
            "swapped": own[donors[number]],
            "blank": [],
            "pause": [early.pause_token_id] * len(own[number]),
            "generic": list(generic),
        }
        ids = torch.tensor([list(f"{prompt}{answer}".encode())])
        for variant, thought in thoughts.items():
            scored = early.score(ids, torch.tensor(thought or [-1]).view(1, 1, 1, -1),
                                 positions=torch.tensor([[len(prompt) - 1]]))  # fmt: skip
            logprob = scored.thought_logprobs[0, 0, 0, : len(answer)].sum().item()
            metrics = kept[number, variant]["metrics"]
            assert metrics["gold_logprob"] == pytest.approx([logprob], abs=1e-4)
            assert metrics["gold_probability"] == pytest.approx([math.exp(logprob)], rel=1e-4)
            assert metrics["nll"] == pytest.approx([-logprob / len(answer)], abs=1e-4)
    figures = result["tasks"][name]
    hops = figures["groups"]["hops"]
    assert [(group["label"], group["n"]) for group in hops] == [("0", 2), ("1", 2)]
    metric = [kept[n, "with_thoughts"]["metrics"]["gold_probability"][0] for n in (1, 3)]
    assert hops[1]["with_thoughts"]["gold_probability"] == pytest.approx(sum(metric) / 2)
    drawn = [one for kind in ("right", "wrong") for one in figures["examples"][kind]]
    assert sorted(one["prompt"] for one in drawn) == sorted(QUESTIONS)
    assert figures["with_thoughts"]["thought_length"] == 1.5
    assert figures["with_thoughts"]["truncated_fraction"] == 0.25
    for control, gain in GAINS.items():
        mean = sum(kept[i, control]["metrics"]["gold_probability"][0] for i in range(4)) / 4
        expected = figures["with_thoughts"]["gold_probability"] - mean
        assert figures[gain]["gold_probability"] == pytest.approx(expected)
        assert {"gold_probability_ci95", "gold_probability_p_value"} <= set(figures[gain])
        assert figures["controls"][control]["gold_probability_ci95"][0] <= mean


def test_an_evaluation_of_thoughts_that_end_early_goes_on(folder, tmp_path, early):
    """Before, the padding after a thought was refused in the file of items."""
    settings = {"model": "early", "tasks": str(folder / "own.jsonl")}
    whole, _ = evaluated(folder, tmp_path, "--controls", "--batch-size", 1, **settings)
    path = tmp_path / "out.items.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[: len(lines) // 2]))
    again, _ = evaluated(folder, tmp_path, "--controls", "--batch-size", 1, **settings)
    assert again["tasks"] == whole["tasks"]


def test_a_generic_text_is_refused_without_tokens_and_idle_without_controls(
    folder, tmp_path, early, capsys, caplog
):
    settings = {"model": "early", "tasks": str(folder / "own.jsonl")}
    assert run(folder, "--controls", "--generic", "", **settings) == 2
    assert "--generic ('')" in capsys.readouterr().err
    assert run(folder, "--generic", "Well,", **settings) == 0
    assert "--generic: has no effect without --controls" in caplog.text
    assert run(folder, "--controls", "pause", "--generic", "Well,", **settings) == 0
    assert "--generic: has no effect without --controls generic" in caplog.text


def test_some_controls_are_scored_alone_and_others_added(folder, tmp_path):
    some, _ = evaluated(folder, tmp_path, "--controls", "swapped, pause", tasks="gsm8k")
    assert some["config"]["variants"] == ["without_thoughts", "with_thoughts", "pause", "swapped"]
    every, _ = evaluated(folder, tmp_path, "--controls", tasks="gsm8k")
    for name in ("pause", "swapped"):
        few, many = (result["tasks"]["gsm8k"]["controls"][name] for result in (some, every))
        assert few["nll"] == many["nll"]
    assert list(every["tasks"]["gsm8k"]["controls"]) == list(CONTROLS)
    assert set(some["tasks"]["gsm8k"]["controls"]) == {"pause", "swapped"}


# --- Where answers are thought about --------------------------------------------------------------


def test_a_model_trained_to_think_once_is_evaluated_so(folder, tmp_path):
    base = plain_model(max_position_embeddings=256, eos_token_id=256)
    spec = {"length": 3, "positions": "answer_start"}
    once = thinking_model(base, thoughts=spec, head={"fixed_weight": 0.5})
    once.save_pretrained(folder / "once", load_tokenizer("bytes"))
    settings = {"tasks": "gsm8k", "model": "once"}
    runs = {"trained": evaluated(folder, tmp_path, "--controls", **settings)[1]}
    more = ("--controls", "--positions", "every", "--force")
    runs["every"] = evaluated(folder, tmp_path, *more, **settings)[1]
    nll = {(name, r["variant"], r["item"]): r["nll"] for name, items in runs.items() for r in items}
    for number, answer in enumerate(NUMBERS):
        thought, every, plain = (
            nll[(*key, number)]
            for key in (("trained", "with_thoughts"), ("every", "with_thoughts"),
                        ("every", "without_thoughts"))
        )  # fmt: skip
        assert len(thought) == len(answer.replace(",", "")) + 1
        assert thought[:1] == pytest.approx(every[:1], abs=1e-5)
        # The thought is trained on two true tokens, and predicts as many.
        assert thought[2:] == pytest.approx(plain[2:], abs=1e-5)
        assert thought[1] != pytest.approx(plain[1], abs=1e-5)
        assert thought[1:] != pytest.approx(every[1:], abs=1e-5)
    own = [r["thoughts"] for r in runs["trained"] if r["variant"] == "with_thoughts"]
    assert all(len(sample) == 1 for thoughts in own for sample in thoughts)


def test_a_run_and_the_command_measure_one_probability_of_the_answer(tmp_path):
    rows = [{"question": q, "answer": n} for q, n in zip(QUESTIONS, NUMBERS, strict=True)]
    write_lines(tmp_path / "own.jsonl", rows)
    file = str(tmp_path / "own.jsonl")
    config = run_config(
        tmp_path, data__train=file, data__eval=file, data__format="qa", data__loss_on="answer",
        data__seq_len=56, data__template="{question} {answer}",
        thoughts__positions="answer_start", thoughts__lookahead=3, mixing_head__fixed_weight=0.5,
        training__max_steps=1, training__eval_controls=["swapped", "pause"],
    )  # fmt: skip
    final = run_training(config)
    record = read_metrics(final.parent, "eval")[-1]
    config_file = tmp_path / "run/config.yaml"
    more = ("--config", config_file, "--controls", "pause")
    result, _ = evaluated(final.parent, tmp_path, *more, tasks=file, model="final")
    figures = result["tasks"][file]
    sides = {"with_thoughts": figures["with_thoughts"], "pause": figures["controls"]["pause"],
             "without_thoughts": figures["without_thoughts"]}  # fmt: skip
    for name, of_command in sides.items():
        of_run = record[f"gold_probability_{name}"]
        assert 0 < of_run == pytest.approx(of_command["gold_probability"], rel=1e-4)


def test_the_answers_behind_sampled_thoughts_vote(folder, tmp_path, capsys):
    base = plain_model(max_position_embeddings=256, eos_token_id=256)
    spec = {"length": 3, "positions": "answer_start", "lookahead": 3}
    model = thinking_model(base, thoughts=spec, head={"fixed_weight": 0.5}).eval()
    model.save_pretrained(folder / "votes", load_tokenizer("bytes"))
    name, sampled = str(folder / "votes.jsonl"), ("--samples", 4, "--thought-temperature", 2)
    write_lines(folder / "votes.jsonl", [{"prompt": q, "answer": "?"} for q in QUESTIONS])
    _, first = evaluated(folder, tmp_path, *sampled, model="votes", tasks=name)
    first = [record for record in first if record["variant"] == "with_thoughts"]
    rows = []
    for record in sorted(first, key=lambda record: record["item"]):
        prompt = QUESTIONS[record["item"]]
        rows.append({"prompt": prompt, "answer": record["answers"][0].strip().split("\n")[0]})
        ids = torch.tensor([list(prompt.encode())] * 4)
        new = model.generate(
            ids, attention_mask=torch.ones_like(ids), thoughts=torch.tensor(record["thoughts"]),
            max_new_tokens=12, do_sample=False, pad_token_id=0,
        )  # fmt: skip
        texts = load_tokenizer("bytes").batch_decode(new[:, ids.shape[1] :])
        assert [text.partition("<|endoftext|>")[0] for text in texts] == record["answers"]
        assert len(set(texts)) > 1
    write_lines(folder / "votes.jsonl", [row for row in rows if row["answer"]])
    result, items = evaluated(folder, tmp_path, *sampled, "--force", model="votes", tasks=name)
    votes = [r["votes"] for r in items if r["variant"] == "with_thoughts"]
    assert {tuple(vote) for vote in votes} == {("maj@4", "maj@2", "maj@1", "pass@2", "pass@4")}
    assert all(vote["maj@1"] >= 0.25 for vote in votes), "the first thought is right"
    for metric, vote in result["tasks"][name]["with_thoughts"]["votes"].items():
        assert vote["mean"] == pytest.approx(sum(v[metric] for v in votes) / len(votes))
    assert "pass@4 of the sampled thoughts: 1.000 (" in capsys.readouterr().out
    again, _ = evaluated(folder, tmp_path, *sampled, model="votes", tasks=name)
    assert again["tasks"] == result["tasks"]


def ordered(items):
    return sorted(items, key=lambda record: record["item"])


# --- A user's own texts ---------------------------------------------------------------------------


def test_exactly_the_text_that_the_user_wrote_is_scored(folder, tmp_path):
    """Before, a blank stood between prompt and answer, also where the answer brought its own."""
    write_lines(tmp_path / "my.jsonl", [{"prompt": "2+2=", "answer": "4"},
                                        {"prompt": "one,", "answer": " two"}])  # fmt: skip
    name = str(tmp_path / "my.jsonl")
    _, items = evaluated(folder, tmp_path, "--thoughts", "off", tasks=name)
    assert ["".join(r["tokens"]) for r in ordered(items)] == ["4", " two"]
    assert [r["position"] for r in ordered(items)] == [4, 4]
    more = ("--thoughts", "off", "--separator", " ", "--force")
    _, items = evaluated(folder, tmp_path, *more, tasks=name)
    assert ["".join(r["tokens"]) for r in ordered(items)] == ["4", "two"]
    assert [r["position"] for r in ordered(items)] == [5, 6]


def test_an_item_without_a_prompt_does_not_shorten_those_behind_it():
    items = [Item("0", "", "x" * 40, "here"), Item("1", "p" * 30, "answer", "here")]
    task = find_task("my.jsonl")
    text, question = encode(task, items, load_tokenizer("bytes"), None, text_tokens=20)
    assert (len(text.ids), text.num_cut) == (20, 20)
    assert (len(question.ids), question.num_cut) == (36, 0)


def test_a_text_file_is_read_in_spans_and_its_thoughts_are_swapped_within_each(folder, tmp_path):
    (tmp_path / "held.txt").write_text("words of a text " * 6, encoding="utf-8")
    name = str(tmp_path / "held.txt")
    result, items = evaluated(folder, tmp_path, "--controls", "--text-tokens", 40, tasks=name)
    found = result["tasks"][name]
    assert (found["n"], found["truncated"]) == (3, 0)
    without = [r for r in items if r["variant"] == "without_thoughts"]
    assert "".join(without[1]["tokens"]) == ("words of a text " * 6)[48:80]
    means = {v: found[v]["nll"] for v in ("without_thoughts", "with_thoughts")}
    assert found["difference"]["nll"] == pytest.approx(
        means["with_thoughts"] - means["without_thoughts"]
    )
    swapped = found["controls"]["swapped"]["nll"]
    assert found["gain_of_content"]["nll"] == pytest.approx(swapped - means["with_thoughts"])
    one, _ = evaluated(
        folder, tmp_path, "--controls", "--text-tokens", 40, "--limit", 1, "--force", tasks=name
    )
    records = {(r["item"], r["variant"]): r for r in items}
    alone = one["tasks"][name]["gain_of_content"]["nll"]  # the other spans do not matter
    kept = [records[0, v]["metrics"]["nll"][0] for v in ("swapped", "with_thoughts")]
    assert alone == pytest.approx(kept[0] - kept[1], abs=1e-5)


def test_texts_have_a_table_of_gates_by_the_entropy_of_the_plain_model(
    folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "100")
    (tmp_path / "held.txt").write_text("words of a text " * 6, encoding="utf-8")
    page, name = tmp_path / "page.html", str(tmp_path / "held.txt")
    options = ("--text-tokens", 40, "--report", page)
    result, items = evaluated(folder, tmp_path, *options, tasks=name)
    model = QuietStarForCausalLM.from_pretrained(folder / "model")
    for record in items:
        if record["variant"] == "with_thoughts":
            assert "entropy" not in record
            continue
        text = ("words of a text " * 6).encode()[40 * record["item"] :][:40]
        with torch.no_grad():
            logprobs = model.causal_lm(torch.tensor([list(text)])).logits[0].log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)[-len(record["nll"]) - 1 : -1]
        assert record["entropy"] == pytest.approx(entropy.tolist(), rel=1e-4)
    gates = result["tasks"][name]["gates"]
    nll = [x for r in items if r["variant"] == "with_thoughts" for x in r["nll"]]
    assert gates[-1]["nll"] == pytest.approx(sum(nll) / len(nll))
    assert (gates[0]["passes"], gates[-1]["passes"]) == (1, 4)
    printed = capsys.readouterr().out
    assert "think where the entropy is above" in printed
    for gate in gates:
        assert f"{gate['entropy']:.3f} nats" in printed
    assert f"--gate entropy:{gates[3]['entropy']:.2f}" in page.read_text(encoding="utf-8")
    result, _ = evaluated(folder, tmp_path, "--force", tasks="gsm8k")
    assert "gates" not in result["tasks"]["gsm8k"]


def test_an_untrained_model_thinks_as_the_config_says(folder, tmp_path):
    (tmp_path / "held.txt").write_text("words of a text " * 6, encoding="utf-8")
    config = tmp_path / "c.yaml"
    config.write_text(
        "model: {name_or_path: x}\ndata: {train: x}\n"
        "thoughts: {length: 3, end_init: x}\nmixing_head: {fixed_weight: 0.0}\n"
    )
    arguments = ("--text-tokens", 40, "--untrained")
    options = {"model": "plain", "tasks": str(tmp_path / "held.txt")}
    result, _ = evaluated(folder, tmp_path, *arguments, "--config", config, **options)
    (task,) = result["tasks"].values()
    assert result["config"]["thinks"]["thoughts"]["length"] == 3
    assert task["difference"]["nll"] == pytest.approx(0, abs=1e-6)  # the thought counts nothing
    result, _ = evaluated(folder, tmp_path, *arguments, "--force", **options)
    (task,) = result["tasks"].values()
    assert abs(task["difference"]["nll"]) > 1e-4


# --- Interrupted ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [0.3, 0.62, 0.9])
def test_an_interrupted_evaluation_goes_on_to_the_same_json(folder, tmp_path, cut):
    settings = ("--controls", "--batch-size", 2, "--samples", 2, "--thought-temperature", 1)
    evaluated(folder, tmp_path, *settings)
    out, items = tmp_path / "out.json", tmp_path / "out.items.jsonl"
    whole = out.read_bytes()
    kept = items.read_bytes()
    items.write_bytes(kept[: int(cut * len(kept))])  # killed in the middle of a line
    out.unlink()
    run(folder, "--out", out, *settings)
    assert out.read_bytes() == whole
    assert sorted(items.read_bytes().splitlines()) == sorted(kept.splitlines())


@pytest.mark.parametrize("size", [0, 40])
def test_what_was_killed_before_its_first_item_begins_anew(folder, tmp_path, size):
    whole, _ = evaluated(folder, tmp_path)
    path = tmp_path / "out.items.jsonl"
    path.write_bytes(path.read_bytes()[:size])
    again, _ = evaluated(folder, tmp_path)
    assert again == whole


def test_another_batch_size_may_go_on(folder, tmp_path):
    whole, _ = evaluated(folder, tmp_path, "--controls", "--batch-size", 3)
    path = tmp_path / "out.items.jsonl"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    again, _ = evaluated(folder, tmp_path, "--controls", "--batch-size", 1)
    for name, task in whole["tasks"].items():
        for key, value in again["tasks"][name]["controls"]["swapped"].items():
            if not key.endswith("_ci95"):  # which resampling rounds otherwise
                # The batch's size decides how float32 rounds log-probabilities.
                assert value == pytest.approx(task["controls"]["swapped"][key], rel=1e-5), key


def test_two_items_tell_nothing_however_they_agree(folder, tmp_path):
    write_lines(tmp_path / "two.jsonl", [{"text": "the same long text again"}] * 2)
    name = str(tmp_path / "two.jsonl")
    result, _ = evaluated(folder, tmp_path, tasks=name)
    assert result["tasks"][name]["verdict"] == "2 items are too few to say whether thoughts help"


def test_finished_items_are_not_scored_again(folder, tmp_path, monkeypatch):
    evaluated(folder, tmp_path)
    monkeypatch.setattr("quietstar.evaluation.scoring.predict_plain", None)
    evaluated(folder, tmp_path)
    assert run(folder, "--out", tmp_path / "out.json", "--force") == cli.EXIT_FAULT


def test_chains_are_generated_the_same_again(folder, tmp_path):
    settings = ("--votes", 4, "--max-new-tokens", 5, "--batch-size", 8)
    result, items = evaluated(folder, tmp_path, *settings, tasks="gsm8k_cot")
    assert set(result["tasks"]["gsm8k_cot"]["with_thoughts"]) >= {"maj@1", "maj@4", "pass@4"}
    assert all(len(set(r["chains"])) > 1 for r in items)
    path = tmp_path / "out.items.jsonl"
    kept = path.read_bytes()
    path.write_bytes(kept[: len(kept) // 2])
    run(folder, "--out", tmp_path / "out.json", *settings, tasks="gsm8k_cot")
    assert path.read_bytes() == kept


# --- Mistakes -------------------------------------------------------------------------------------


def test_mistakes_are_told_in_one_line(folder, tmp_path, capsys):
    def said(*arguments, **more):
        assert run(folder, *arguments, **more) == 2
        return capsys.readouterr().err

    assert "there is no task gsm9k; did you mean gsm8k?" in said(tasks="gsm9k")
    assert "there is no file" in said("--data-dir", tmp_path)
    assert "is no Quiet-STaR model" in said(model="plain")
    assert "--thoughts off, or --untrained" in said("--thoughts", "on", model="plain")
    assert "set --thought-temperature 1" in said("--samples", 2)
    assert "--limit (0): must be a whole number of at least 1" in said("--limit", 0)
    assert "need thoughts" in said("--controls", "--thoughts", "off")
    assert "--controls (swaped): no such control; did you mean swapped?" in said(
        "--controls", "swaped"
    )
    room = said("--max-new-tokens", 300, tasks="gsm8k_cot")
    assert "--max-new-tokens: 300 leaves no room for a prompt" in room
    assert "set at most 250" in room
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert "byte 3 is 0xe9, which is no UTF-8" in said(tasks=str(tmp_path / "latin.txt"))
    assert "cannot be read" in said(tasks=str(tmp_path / "gone.txt"))
    assert "is a folder" in said("--out", tmp_path)
    out = tmp_path / "x.json"
    run(folder, "--out", out, "--limit", 1)
    capsys.readouterr()
    assert "another limit (1, now 2). Give another --out" in said("--out", out, "--limit", 2)
    kept = (tmp_path / "x.items.jsonl").read_text()
    for line in ("nothing of ours", "[1, 2]", '{"task": "gsm8k"}'):
        (tmp_path / "x.items.jsonl").write_text(f"{kept}{line}\n")
        number = len(kept.splitlines()) + 1
        assert f"line {number}: cannot be read" in said("--out", out, "--limit", 1)
    assert "is also --out. Give another name" in said("--out", out, "--out-items", out)
    assert "is also --out. Give another name" in said("--out", out, "--report", out)
    assert "is a folder" in said("--report", tmp_path)
    assert "cannot be written" in said("--out", out / "below" / "x.json")
    (tmp_path / "mine.json").write_text('[{"mine": 1}]')
    (tmp_path / "mine.html").write_text("<p>mine")
    for option, name in (("--out", "mine.json"), ("--report", "mine.html")):
        assert "exists. Give another name, or --force" in said(option, tmp_path / name)
    assert (tmp_path / "mine.json").read_text() == '[{"mine": 1}]'
    write_lines(tmp_path / "short.jsonl", [{"text": "x"}])
    assert "line 1: the text has no token" in said(tasks=str(tmp_path / "short.jsonl"))
    write_lines(tmp_path / "half.jsonl", [{"text": "a\ud800b"}])
    assert "character 1 is no Unicode character" in said(tasks=str(tmp_path / "half.jsonl"))
    gone = said(tasks=str(tmp_path / "gone.jsonl"))
    assert "there is no such file; check the name" in gone
    assert "--data-dir" not in gone
    assert "did you mean short.jsonl?" in said(tasks=str(tmp_path / "shorts.jsonl"))
    assert "(/nowhere): there is no such folder" in said(model="/nowhere")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "?"}, "line 2: field answer is missing; the record has question"),
        ({"question": "?", "answer": "five"}, "line 2: field answer must end in `#### NUMBER`"),
        ({"question": 5, "answer": "#### 5"}, "line 2: field question must be a text"),
        ([], r"line 2: cannot be read \(it must be an object"),
    ],
)
def test_a_bad_record_is_named(tmp_path, row, message):
    write_lines(tmp_path / "gsm8k_test.jsonl", [{"question": "?", "answer": "#### 1"}, row])
    with pytest.raises(ValueError, match=message):
        TASKS["gsm8k"].items(tmp_path, None)
    (tmp_path / "gsm8k_test.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"line 1: cannot be read \(no valid JSON"):
        TASKS["gsm8k"].items(tmp_path, None)


def test_the_flat_layout_of_the_hub_is_read_too():
    record = {"id": "x", "question": "Who?", "answerKey": "B",
              "choices": {"label": ["A", "B"], "text": ["me", "you"]}}  # fmt: skip
    item = TASKS["commonsense_qa"].read(record, 0, "here")
    assert item.prompt == "Q: Who?\n(A) me\n(B) you\nA:"
    assert item.labels == ("A", "B")
    with pytest.raises(ValueError, match="answerKey is 'C', which is none of A, B"):
        TASKS["commonsense_qa"].read(record | {"answerKey": "C"}, 0, "here")


def bpe(merges, *words):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(("Q", " ", "4", "B", *words))}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab=vocab, merges=merges))
    )


def test_an_answer_that_the_tokenizer_joins_to_its_prompt_is_refused():
    task = Task("t", "answer", TASKS["gsm8k"].read, candidates="labels", separator=" ")
    item = Item("0", "Q", "4", "here")
    assert encode(task, [item], bpe([(" ", "4")], " 4"), None)[0].ids == [0, 4]
    with pytest.raises(ValueError, match=r"here: the tokenizer joins the end of the prompt"):
        encode(task, [item], bpe([("Q", " ")], "Q "), None)


def test_a_label_or_digit_of_several_tokens_is_refused():
    task = Task("t", "answer", TASKS["gsm8k"].read, candidates="labels", separator=" ")
    item = Item("0", "Q", "B", "here", ("B", "BBB"))
    tokenizer = bpe([(" ", "B")], " B")
    with pytest.raises(ValueError, match=r"splits the answer 'BBB' into .* must be one token"):
        find_candidates(task, encode(task, [item], tokenizer, None), tokenizer)
    digits = encode(TASKS["gsm8k"], [Item("0", "Q", "B", "here")], tokenizer, None)
    with pytest.raises(ValueError, match="none of which is a digit token"):
        find_candidates(TASKS["gsm8k"], digits, tokenizer)


def test_a_prompt_that_is_too_long_loses_its_beginning_and_is_counted(folder, tmp_path, capsys):
    write_lines(tmp_path / "gsm8k_test.jsonl",
                [{"question": "x" * 300, "answer": "#### 5"}])  # fmt: skip
    result, _ = evaluated(folder, tmp_path, "--data-dir", tmp_path, tasks="gsm8k")
    assert result["tasks"]["gsm8k"]["truncated"] == 1
    assert "1 items were longer than the model takes and were cut" in capsys.readouterr().out


def test_probabilities_of_many_digits_multiply():
    tokenizer, task = load_tokenizer("bytes"), TASKS["gsm8k"]
    (encoded,) = encode(task, [Item("0", "Q", "42", "here")], tokenizer, None)
    found = find_candidates(task, [encoded], tokenizer)
    assert found is not None
    assert found.ids.tolist() == [*b"0123456789\n"]
    batch = answer_batch([encoded.ids], [encoded.num_scored], 0)
    nothing = torch.zeros(1, 1, 3)
    flat = MixedScores(nothing, nothing.long(), torch.zeros(1, 1, 3, 11))
    metrics = item_metrics(flat, batch, found)
    assert metrics["gold_probability"].item() == pytest.approx(0.01)
    assert metrics["published_accuracy"].item() == pytest.approx(11**-3)


# --- The page -------------------------------------------------------------------------------------


def test_the_page_shows_names_as_text(folder, tmp_path):
    name = str(tmp_path / "<script>alert(1)</script>.jsonl")
    (tmp_path / "<script>alert(1)<").mkdir(exist_ok=True)
    write_lines(Path(name), [{"text": f"{n} and some words of a text </script>"} for n in range(3)])
    page = tmp_path / "sub" / "page.html"
    assert run(folder, "--report", page, "--controls", tasks=name) == 0
    text = page.read_text()
    assert "<script>alert(1)" not in text
    assert "&lt;script&gt;alert(1)" in text
    charts = set(re.findall('id="plot-([^"]+)"', text))
    assert charts == {"task1", "task1-difficulty", "task1-kind", "task1-position"}
    for control in ("swapped thoughts", "shuffled thoughts", "pause tokens"):
        assert f">{control}</span>" in text


# --- Choices, generated answers, and several processes --------------------------------------------
CHOICES = [
    {"prompt": "Two and two is", "choices": [" four", " five.", " a fish"], "answer": " four"},
    {"prompt": "A fish is", "choices": [" wet", " a long way off"], "answer": 1},
    {"prompt": "It", "choices": [" is", " rains", " was", " ends"], "answer": 0},
]


@torch.no_grad()
def choice_logprob(model, prompt, choice, think):
    """A choice's log-probability, token by token, with a thought before each or none."""
    text, total = list(prompt.encode()), 0.0
    for token in choice.encode():
        ids = torch.tensor(text)
        logits = slow_step(model, ids)[1] if think else model.causal_lm(ids[None]).logits[0, -1]
        total += logits.log_softmax(-1)[token].item()
        text.append(token)
    return total


@pytest.mark.parametrize("batch_size", [1, 5, 16])
def test_choices_are_those_of_a_slow_loop(folder, tmp_path, batch_size):
    write_lines(tmp_path / "choices.jsonl", CHOICES)
    name = str(tmp_path / "choices.jsonl")
    result, items = evaluated(folder, tmp_path, "--controls", "--batch-size", batch_size,
                              tasks=name)  # fmt: skip
    model = QuietStarForCausalLM.from_pretrained(folder / "model")
    model.causal_lm.set_attn_implementation("eager")
    for think, variant in ((False, "without_thoughts"), (True, "with_thoughts")):
        found = {r["item"]: r for r in items if r["variant"] == variant}
        assert sorted(found) == [0, 1, 2]
        for number, record in enumerate(CHOICES):
            totals = torch.tensor(
                [choice_logprob(model, record["prompt"], c, think) for c in record["choices"]]
            )
            answer = record["answer"]
            gold = answer if isinstance(answer, int) else record["choices"].index(answer)
            sizes = torch.tensor([len(choice) for choice in record["choices"]])
            metrics = found[number]["metrics"]
            expected = {
                "accuracy": float(totals.argmax() == gold),
                "accuracy_norm": float((totals / sizes).argmax() == gold),
                "gold_probability": totals.softmax(0)[gold].item(),
                "gold_logprob": totals.log_softmax(0)[gold].item(),
                "nll": -(totals / sizes)[gold].item(),
            }
            assert {k: v[0] for k, v in metrics.items()} == pytest.approx(expected, abs=1e-4)
            assert found[number]["answer"] == record["choices"][gold]
            assert found[number]["predicted"] == [record["choices"][int(totals.argmax())]]
    task = result["tasks"][name]
    assert task["main_metric"] == "accuracy"
    assert task["n"] == 3
    assert set(task["controls"]) == {"shuffled", "pause", "generic", "blank", "swapped"}


def test_no_order_decides_between_equally_likely_choices():
    """As where a model knows the words of none, and takes all for the same token."""
    item = Item("n", "It", " b", "here", choices=(" a", " b", " c"))
    items = [EncodedItem(0, item, [1, 2], 1, 1, 0, choice) for choice in range(3)]
    logprobs = torch.tensor([[-1.0, -1.0, -3.0], [-1.0, -2.0, -1.0], [-2.0, -2.0, -1.5]])
    metrics, _ = choice_metrics(items, logprobs)
    assert metrics["accuracy"][1].tolist() == [0.5, 0.0, 1.0]
    assert metrics["accuracy_norm"][1].tolist() == [0.5, 0.0, 1.0]


def test_thoughts_before_choices_vote(folder, tmp_path):
    write_lines(tmp_path / "choices.jsonl", CHOICES)
    settings = ("--samples", 4, "--thought-temperature", 1, "--positions", "once")
    name = str(tmp_path / "choices.jsonl")
    result, items = evaluated(folder, tmp_path, *settings, tasks=name)
    own = [record for record in items if record["variant"] == "with_thoughts"]
    for record in own:
        assert record["answers"] == record["predicted"]
        assert len(record["answers"]) == 4
    right = [r["votes"]["maj@1"] for r in own]
    mean = result["tasks"][name]["with_thoughts"]["votes"]["maj@1"]["mean"]
    assert mean == pytest.approx(sum(right) / 3)
    assert mean == pytest.approx(result["tasks"][name]["with_thoughts"]["accuracy"])


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"prompt": "a", "choices": [" b"], "answer": 0}, "must list from 2 to"),
        ({"prompt": "a", "choices": " b", "answer": 0}, "must list from 2 to"),
        ({"prompt": "a", "choices": [" b", " b"], "answer": 0}, "has a text twice"),
        ({"prompt": "a", "choices": [" b", 3], "answer": 0}, "field choices must be a text"),
        ({"prompt": "a", "choices": [" b", " c"], "answer": 2}, "its index from 0 to 1"),
        ({"prompt": "a", "choices": [" b", " c"], "answer": True}, "its index from 0 to 1"),
        ({"prompt": "a", "choices": [" b", " c"], "answer": "b"}, "as it is written"),
        ({"prompt": "a", "choices": [" b", " c"]}, "field answer is missing"),
        ({"prompt": "a", "answer": " b"}, "has no choices, but other records"),
    ],
)
def test_choices_that_are_none_are_refused(folder, tmp_path, capsys, record, words):
    write_lines(tmp_path / "choices.jsonl", [*CHOICES, record])
    assert run(folder, tasks=str(tmp_path / "choices.jsonl")) == 2
    assert words in capsys.readouterr().err


def test_answers_are_extracted_from_generated_texts(folder, tmp_path, capsys):
    base = plain_model(max_position_embeddings=256, eos_token_id=256)
    model = thinking_model(base, thoughts={"length": 3}, head={"fixed_weight": 1.0}).eval()
    model.save_pretrained(folder / "decided", load_tokenizer("bytes"))
    questions = [{"prompt": f"Say {n}:", "answer": f" {n}"} for n in range(3)]
    write_lines(tmp_path / "own.jsonl", questions)
    name = str(tmp_path / "own.jsonl")
    settings = ("--extract", "(.)", "--temperature", 0, "--votes", 1, "--max-new-tokens", 6)
    more = {"tasks": name, "model": "decided"}
    result, items = evaluated(folder, tmp_path, *settings, "--controls", **more)
    variants = {record["variant"] for record in items}
    assert variants == {"with_thoughts", "without_thoughts", *CONTROLS}
    tokenizer = load_tokenizer("bytes")
    for record in items:
        ids = torch.tensor([tokenizer.encode(questions[record["item"]]["prompt"])])
        if record["variant"] in ("with_thoughts", "without_thoughts"):
            think = record["variant"] == "with_thoughts"
            new = model.generate(ids, think=think, max_new_tokens=6, do_sample=False)
            text = tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)
            assert record["chains"] == [text]
            matches = [c for c in text if c != "\n"]
            assert record["predicted"] == [matches[-1].strip() if matches else None]
    chains = {v: [r["chains"] for r in items if r["variant"] == v] for v in variants}
    assert len({json.dumps(chain) for chain in chains.values()}) > 3
    ids = torch.tensor([tokenizer.encode(question["prompt"]) for question in questions])
    swap = replacement("swapped", model.pause_token_id, [])
    new = model.generate(ids, max_new_tokens=6, do_sample=False, replace_thoughts=swap)
    texts = tokenizer.batch_decode(new[:, ids.shape[1] :], skip_special_tokens=True)
    assert chains["swapped"] == [[text] for text in texts]
    task = result["tasks"][name]
    assert set(task["with_thoughts"]) >= {"exact_match", "exact_match_ci95"}
    assert "gain_of_content" in task
    result, items = evaluated(folder, tmp_path, *settings[:2], "--votes", 4, "--stop", "e",
                              "--max-new-tokens", 6, "--force", **more)  # fmt: skip
    assert all("e" not in chain for record in items for chain in record["chains"])
    assert {"maj@4", "maj@2", "exact_match", "pass@4"} <= set(
        result["tasks"][name]["with_thoughts"]
    )
    assert run(folder, "--extract", "(", tasks=name) == 2
    assert "must be a regular expression" in capsys.readouterr().err
    write_lines(tmp_path / "own.jsonl", [{"text": "a text without a prompt"}])
    assert run(folder, "--extract", "x", tasks=name) == 2
    assert "after which nothing is generated" in capsys.readouterr().err


def test_the_last_match_is_the_answer_and_patterns_without_end_are_stopped(monkeypatch):
    assert extract_answer(r"#### (-?\d+)", "#### 3\n#### -14 apples") == "-14"
    assert extract_answer(r"yes|(no)", "no, yes") == "yes"
    assert extract_answer(r"\d", "none") is None
    assert extract_answer(r".+", "$18,000, 1,250,000.50") == "$18000, 1250000.50"
    assert extract_answer(r".+", "1,2,3 and 1,2345 and 12,34") == "1,2,3 and 1,2345 and 12,34"
    monkeypatch.setattr(tasks_module, "PATTERN_SECONDS", 0.2)
    with pytest.raises(UserError, match=r"takes more than 0.2 seconds"):
        extract_answer("^(a|aa)+$", "a" * 60 + "c")


def test_questions_are_read_by_fields_and_template_as_in_training(folder, tmp_path, capsys):
    lines = [{"q": f"What is {n} and 1?", "a": {"text": f"{n + 1}, of course"}} for n in range(4)]
    write_lines(tmp_path / "raw.jsonl", lines)
    plain = [
        {"prompt": f"Q: {line['q']}\nA:", "answer": " " + line["a"]["text"].split(",")[0]}
        for line in lines
    ]
    write_lines(tmp_path / "own.jsonl", plain)
    call = ("--template", "Q: {question}\\nA: {answer}\\n", "--question-field", "q")
    call += ("--answer-field", "{{ a.text.split(',')[0] }}")
    raw, own = str(tmp_path / "raw.jsonl"), str(tmp_path / "own.jsonl")
    found, _ = evaluated(folder, tmp_path, *call, tasks=raw)
    expected, _ = evaluated(folder, tmp_path, "--force", tasks=own)
    assert found["tasks"][raw] == expected["tasks"][own]
    config = run_config(
        tmp_path, data__format="qa", data__template="Q: {question}\nA: {answer}\n",
        data__question_field="q", data__answer_field="{{ a.text }}",
    )  # fmt: skip
    save_config(config, tmp_path / "train.yaml")
    call = ("--config", tmp_path / "train.yaml", "--answer-field", call[-1], "--force")
    assert evaluated(folder, tmp_path, *call, tasks=raw)[0]["tasks"][raw] == found["tasks"][raw]
    data = DataConfig(format="qa", template="{question} {answer}")
    (trained,) = Encoder(load_tokenizer("bytes"), data)(
        [{"question": plain[0]["prompt"], "answer": "1"}]
    )
    (item,) = find_task(own).items(None, 1)
    assert bytes(trained.ids[trained.answers].tolist()) == item.answer.encode()

    def refused(*options):
        assert run(folder, *options, tasks=raw) == 2
        return capsys.readouterr().err

    assert "raw.jsonl, line 1: no field 'question' (its fields: q, a): set --question-field" in (
        refused("--template", "{question} {answer}")
    )
    assert "--template: 'no place' must hold {question}" in refused("--template", "no place")
    assert "--answer-field ({{ a): must be a field's name or" in refused("--answer-field", "{{ a")
    # A template that leaves items out of training does so here too: the error says the way out.
    short = run_config(
        tmp_path, data__format="qa", data__question_field="q",
        data__answer_field="{% if q|length < 9 %}{{ a.text }}{% endif %}",
    )  # fmt: skip
    save_config(short, tmp_path / "short.yaml")
    assert "Leave the record out, or name another field or template by --answer-field" in (
        refused("--config", tmp_path / "short.yaml")
    )
    save_config(run_config(tmp_path), tmp_path / "text.yaml")
    assert "has data.format: text, whose records have no question" in refused(
        "--config", tmp_path / "text.yaml"
    )
    assert "--separator: a --template says" in refused("--separator", " ", "--question-field", "q")


def on_two_processes(folder, *arguments):
    """Run the command under a launcher; what it printed."""
    script = ["-m", "quietstar", "eval", *map(str, arguments)]
    call, environment = wrap("ddp", script)
    return subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_two_processes_score_the_same_items(folder, tmp_path):
    write_lines(tmp_path / "choices.jsonl", CHOICES)
    files = f"gsm8k,commonsense_qa,{tmp_path / 'choices.jsonl'}"
    call = ["--controls", "--batch-size", 2, "--samples", 2, "--thought-temperature", 1]
    result, items = evaluated(folder, tmp_path, *call, tasks=files)
    out = tmp_path / "two.json"
    more = ["--model", folder / "model", "--data-dir", folder, "--tasks", files, "--out", out]
    done = on_two_processes(folder, *more, *call, "--device", "cpu")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("metrics:") == 1
    lines = out.with_suffix(".items.jsonl").read_text().splitlines()[1:]
    two = {(r["task"], r["item"], r["variant"]): r for r in map(json.loads, lines)}
    assert len(two) == len(lines)
    assert two == {(r["task"], r["item"], r["variant"]): r for r in items}
    again = json.loads(out.read_text())
    assert again["tasks"] == result["tasks"]
    assert again["environment"]["processes"] == 2
    # An interrupted file goes on, on any number of processes.
    path = out.with_suffix(".items.jsonl")
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines()[:9]))
    done = on_two_processes(folder, *more, *call, "--device", "cpu")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(out.read_text())["tasks"] == result["tasks"]


def test_an_error_on_one_process_ends_all_with_one_line(folder, tmp_path):
    (tmp_path / "out.json").write_text("mine")
    more = ["--model", folder / "model", "--data-dir", folder, "--tasks", "gsm8k"]
    done = on_two_processes(folder, *more, "--out", tmp_path / "out.json", "--device", "cpu")
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("quietstar: error")]
    assert len(said) == 1
    assert "out.json" in said[0]


def test_two_processes_do_not_share_one_named_gpu(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"\(cuda:1\): is one device, and 2 processes"):
        join_launch("cuda:1")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert join_launch("cuda:1") == Processes()
