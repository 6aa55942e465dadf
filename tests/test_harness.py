"""lm-evaluation-harness: without thoughts its own scores, with thoughts those of a slow loop."""

import copy
import json

import pytest
import torch
from test_generation import slow_generate
from tiny import plain_model, thinking_model

from quietstar.cli import main as cli
from quietstar.data import load_tokenizer
from quietstar.errors import UserError

pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from quietstar.evaluation.controls import CONTROLS
from quietstar.evaluation.harness import QuietStarLM

TASKS = {
    "choices": "output_type: multiple_choice\ndoc_to_choice: [red, blue sky, 'none']\n"
    "doc_to_target: label\nmetric_list: [{metric: acc}]\n",
    "last_word": "output_type: loglikelihood\ndoc_to_target: ' {{answer}}'\n"
    "metric_list: [{metric: perplexity}]\n",
    "free_text": "output_type: generate_until\ndoc_to_target: answer\n"
    "generation_kwargs: {until: ['q'], max_gen_toks: 6, do_sample: false}\n"
    "metric_list: [{metric: exact_match}]\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved Quiet-STaR model, its base, and tasks on a local file."""
    folder = tmp_path_factory.mktemp("harness")
    base = plain_model(max_position_embeddings=96, eos_token_id=256)
    base.save_pretrained(folder / "plain")
    load_tokenizer("bytes").save_pretrained(folder / "plain")
    model = thinking_model(base, thoughts={"length": 3})
    model.save_pretrained(folder / "model", load_tokenizer("bytes"))
    rows = [{"text": f"{n} and {n * n % 7}?", "label": n % 3, "answer": "ab" * (n % 4 + 1)}
            for n in range(7)]  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, rest in TASKS.items():
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ntest_split: test\ndoc_to_text: '{{{{text}}}}'\n"
            f"dataset_kwargs: {{data_files: {{test: {folder / 'rows.jsonl'}}}}}\n{rest}"
        )
    return folder


def evaluated(model, folder):
    """Responses to every request, by task."""
    results = lm_eval.simple_evaluate(
        model=model, tasks=list(TASKS), log_samples=True, bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    )  # fmt: skip
    return {
        name: [reply for sample in sorted(samples, key=lambda s: s["doc_id"])
               for reply in sample["resps"]]
        for name, samples in results["samples"].items()
    }  # fmt: skip


def flat(replies):
    return [reply[0] if isinstance(reply[0], str) else tuple(reply[0]) for reply in replies]


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 4])
def test_without_thoughts_it_is_the_harness_own_class(folder, batch_size):
    ours = evaluated(
        QuietStarLM(str(folder / "model"), thoughts="off", batch_size=batch_size, device="cpu"),
        folder,
    )
    theirs = evaluated(
        HFLM(str(folder / "plain"), batch_size=batch_size, device="cpu", dtype="float32"), folder
    )
    assert set(ours) == set(TASKS)
    for name in TASKS:
        assert ours[name] == theirs[name]


@torch.no_grad()
def slow_loglikelihood(model, text, count):
    """Sum over the last tokens of a text, a greedy thought before each; and whether all are."""
    slow = copy.deepcopy(model)
    slow.causal_lm.set_attn_implementation("eager")
    total, greedy = 0.0, True
    for place in range(len(text) - count, len(text)):
        _, _, logits = slow_generate(model, text[:place], 1)
        total += logits[0].log_softmax(-1)[text[place]].item()
        greedy &= bool(logits[0].argmax() == text[place])
    return total, greedy


@pytest.mark.slow
def test_unknown_arguments_are_named(folder):
    with pytest.raises(UserError, match=r"\(thougths\): the model takes no such.*mean thoughts\?"):
        QuietStarLM(str(folder / "model"), device="cpu", thougths="off")


@pytest.mark.parametrize("name", ["batch_size", "num_thoughts"])
@pytest.mark.parametrize("count", [0, -1, 2**17])
def test_counts_that_would_score_nothing_are_refused(folder, name, count):
    with pytest.raises(UserError, match=rf"{name} \({count}\): must be from 1 to 65536"):
        QuietStarLM(str(folder / "model"), device="cpu", **{name: count})


@pytest.mark.parametrize("batch_size", [1, 3])
def test_with_thoughts_scores_are_those_of_a_slow_loop(folder, batch_size):
    harness = QuietStarLM(str(folder / "model"), batch_size=batch_size, device="cpu")
    replies = evaluated(harness, folder)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    tokens = {"choices": (" red", " blue sky", " none")}
    wanted = [
        slow_loglikelihood(
            harness.thinker, torch.tensor(list((row["text"] + answer).encode())), len(answer)
        )
        for row in rows
        for answer in tokens["choices"]
    ]
    for reply, want in zip(flat(replies["choices"]), wanted, strict=True):
        assert reply[0] == pytest.approx(want[0], abs=1e-4)
        assert bool(reply[1]) == want[1]
    for reply, row in zip(flat(replies["last_word"]), rows, strict=True):
        text = torch.tensor(list(f"{row['text']} {row['answer']}".encode()))
        want = slow_loglikelihood(harness.thinker, text, len(row["answer"]) + 1)
        assert reply[0] == pytest.approx(want[0], abs=1e-4)
    tokenizer = load_tokenizer("bytes")
    for reply, row in zip(flat(replies["free_text"]), rows, strict=True):
        prompt = torch.tensor(list(row["text"].encode()))
        text, _, _ = slow_generate(harness.thinker, prompt, 6)
        written = tokenizer.decode(text[len(prompt) :]).split("q")[0]
        assert reply == written.split(tokenizer.eos_token)[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU is there")
def test_the_gpu_of_the_harness_default_is_a_wish(folder):
    thinker = QuietStarLM(str(folder / "model"), device="cuda").thinker
    assert next(thinker.parameters()).device.type == "cpu"


def test_long_texts_lose_their_beginning_and_are_counted(folder, caplog):
    harness = QuietStarLM(str(folder / "model"), device="cpu")
    assert harness.max_length == 96 - 3 - 2
    ((score, _),) = harness._loglikelihood_tokens([(None, [65] * 200, [66, 67])])
    text = torch.tensor([*[65] * (harness.max_length - 2), 66, 67])
    assert score == pytest.approx(slow_loglikelihood(harness.thinker, text, 2)[0], abs=1e-4)
    assert harness.num_truncated == 1
    assert "1 texts lost their beginning to fit into 91 tokens" in caplog.text


def test_thoughts_of_a_plain_model_are_refused_or_asked_for(folder):
    with pytest.raises(
        UserError, match=r"is no Quiet-STaR model .* Set thoughts=off, or untrained"
    ):
        QuietStarLM(str(folder / "plain"), device="cpu")
    automatic = QuietStarLM(str(folder / "model"), batch_size="auto", device="cpu")
    with pytest.raises(UserError, match=r"batch_size \(auto\): must be a number"):
        automatic._loglikelihood_tokens([(None, [65], [66])])
    with pytest.raises(UserError, match=r"thoughts: 'maybe' must be on or off"):
        QuietStarLM(str(folder / "model"), thoughts="maybe", device="cpu")
    assert QuietStarLM(str(folder / "plain"), untrained=True, device="cpu").thinks
    assert not QuietStarLM(str(folder / "plain"), thoughts="off", device="cpu").thinks


@pytest.mark.slow
def test_tasks_of_the_harness_are_paired_item_by_item(folder, tmp_path):
    out = tmp_path / "out.json"
    arguments = [
        "eval", "--model", str(folder / "model"), "--tasks", "choices,free_text",
        "--include-path", str(folder), "--limit", "5", "--out", str(out), "--device", "cpu",
    ]  # fmt: skip
    assert cli.main(arguments) == 0
    found = json.loads(out.read_text())["tasks"]
    assert found["choices"]["n"] == 5
    records = [
        json.loads(line) for line in out.with_suffix(".items.jsonl").read_text().splitlines()
    ]
    for variant, think in (("with_thoughts", "on"), ("without_thoughts", "off")):
        model = QuietStarLM(str(folder / "model"), thoughts=think, device="cpu")
        right = [r["metrics"]["acc"][0] for r in records[1:]
                 if (r["task"], r["variant"]) == ("choices", variant)]  # fmt: skip
        samples = lm_eval.simple_evaluate(
            model=model, tasks=["choices"], limit=5, bootstrap_iters=0,
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        )["samples"]["choices"]  # fmt: skip
        assert right == [s["acc"] for s in sorted(samples, key=lambda s: s["doc_id"])]
        assert found["choices"][variant]["acc"] == sum(right) / 5
    before = out.read_bytes()
    assert cli.main(arguments) == 0
    assert out.read_bytes() == before


@pytest.mark.slow
def test_the_command_knows_the_model(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["quietstar"])
    cli.main(
        ["eval", "lm-eval", "run", "--model", "quietstar", "--tasks", "choices",
         "--batch_size", "4", "--model_args", f"pretrained={folder / 'model'},thoughts=on",
         "--include_path", str(folder)]
    )  # fmt: skip
    assert "|choices|" in capsys.readouterr().out


def test_a_model_trained_to_think_once_is_scored_so(folder):
    base = plain_model(max_position_embeddings=96, eos_token_id=256)
    once = thinking_model(base, thoughts={"length": 3, "positions": "answer_start"})
    once.save_pretrained(folder / "once", load_tokenizer("bytes"))

    def score(continuation, **settings):
        model = QuietStarLM(str(folder / "once"), device="cpu", **settings)
        return model._loglikelihood_tokens([(None, [65, 66], continuation)])[0][0]

    first, rest = [67], [68, 69]
    assert score(first) == pytest.approx(score(first, positions="every"), abs=1e-5)
    # Its thought is trained on two true tokens; those after are predicted without one.
    plain = score(first + rest, thoughts="off") - score(first + rest[:1], thoughts="off")
    assert score(first + rest) == pytest.approx(score(first + rest[:1]) + plain, abs=1e-4)
    assert score(first + rest) != pytest.approx(score(first + rest, positions="every"), abs=1e-4)
    with pytest.raises(UserError, match=r"positions: 'never' must be one of trained, once, every"):
        QuietStarLM(str(folder / "once"), positions="never", device="cpu")


def requests_of(lm, folder):
    tokenizer = lm.tokenizer
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()][:4]
    pairs = [(row["text"], ending) for row in rows for ending in (" yes", " no, it is")]
    return [((a, b), tokenizer.encode(a), tokenizer.encode(b)) for a, b in pairs]


@pytest.mark.parametrize("control", CONTROLS)
def test_controls_of_log_likelihoods_do_not_depend_on_batches(folder, control):
    def scores(batch_size, control):
        lm = QuietStarLM(str(folder / "model"), device="cpu", batch_size=batch_size,
                         control=control)  # fmt: skip
        replies = lm._loglikelihood_tokens(requests_of(lm, folder), disable_tqdm=True)
        return torch.tensor([value for value, _ in replies])

    one, many, own = scores(1, control), scores(3, control), scores(3, None)
    assert torch.allclose(one, many, atol=1e-4)
    assert ((one - own).abs() > 1e-3).all()


def test_pause_tokens_and_swapped_thoughts_are_what_they_say(folder):
    lm = QuietStarLM(str(folder / "model"), device="cpu", batch_size=1, control="pause")
    model, requests = lm.thinker, requests_of(lm, folder)
    paused = [value for value, _ in lm._loglikelihood_tokens(requests, disable_tqdm=True)]
    for (_, prompt, answer), value in zip(requests, paused, strict=True):
        ids = torch.tensor([prompt + answer])
        positions = torch.arange(len(prompt) - 1, len(prompt + answer) - 1)[None]
        thoughts = torch.full((1, len(answer), 1, 3), model.pause_token_id)
        scores = model.score(ids, thoughts, positions=positions, lookahead=1)
        assert value == pytest.approx(scores.mixed_logprobs.sum().item(), abs=1e-4)
    swapped = lm._swapped(requests, [[i] for i in range(len(requests))])
    own = {i: lm._sample(lm._batch(requests, [i]), [i])[0] for i in range(len(requests))}
    for number, thoughts in swapped.items():
        donors = [i for i, other in own.items() if torch.equal(other, thoughts)]
        assert donors
        assert all(requests[i][1] != requests[number][1] for i in donors)
    with pytest.raises(UserError, match="needs two contexts"):
        lm._swapped(requests[:2], [[0, 1]])
    with pytest.raises(UserError, match="must be one of shuffled"):
        QuietStarLM(str(folder / "model"), device="cpu", control="nosuch")


@pytest.mark.slow
def test_tasks_of_the_harness_have_controls(folder, tmp_path):
    out = tmp_path / "out.json"
    call = ["eval", "--model", folder / "model", "--tasks", "choices", "--include-path", folder,
            "--controls", "--device", "cpu", "--out", out, "--limit", "3"]  # fmt: skip
    assert cli.main([str(word) for word in call]) == 0
    task = json.loads(out.read_text())["tasks"]["choices"]
    assert set(task["controls"]) == set(CONTROLS)
    assert "gain_of_content" in task
