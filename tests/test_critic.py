"""Judges and reward models as rewards: verdicts on what the model writes after its thoughts."""

import filecmp
import json
import re

import pytest
import torch
from test_judging import TEMPLATE, make_judge
from tiny import (
    BYTES_VOCAB,
    LLAMA,
    plain_model,
    random_texts,
    read_metrics,
    run_config,
    thinking_model,
)
from transformers import AutoConfig, AutoModelForSequenceClassification

from quietstar.cli import main as cli
from quietstar.config import JudgeConfig
from quietstar.data import load_tokenizer
from quietstar.errors import UserError
from quietstar.generation.continuations import Writing
from quietstar.judging import Critic, Judge, RewardModel
from quietstar.judging.critic import load_critic
from quietstar.judging.judge import Comparison, Rating
from quietstar.judging.reward_model import encode_scored
from quietstar.judging.reward_training import _Collate, _PreferenceTrainer
from quietstar.rewards.judge import judge as judge_reward
from quietstar.training.run import run_training

WRITING = Writing(3)
PROMPTS = ["two and two is", "one"]
CANDIDATES = [["four", " four\n", "five", " "], ["six", "seven", "six", "eight"]]


class Scripted(Judge):
    """Prefers longer texts; counts what it is asked."""

    tokens_run = 0

    def __init__(self):
        self.asked, self.tokens_run = [], 0

    def rate(self, prompts, candidates):
        self.asked += list(zip(prompts, candidates, strict=True))
        self.tokens_run += len(candidates)
        return [Rating(len(x) / 10, 5.5, (0.1,) * 10, 1.0) for x in candidates]

    def compare(self, prompts, first, second):
        self.asked += list(zip(prompts, first, second, strict=True))
        odds = [0.5 + 0.1 * (len(a) - len(b)) for a, b in zip(first, second, strict=True)]
        return [Comparison(p, 0.0, (p, p), (1.0, 1.0), ()) for p in odds]


def saved_judge(folder):
    model = plain_model(LLAMA, max_position_embeddings=512)
    model.save_pretrained(folder)
    load_tokenizer("bytes").save_pretrained(folder)
    return str(folder)


def classifier(seed=0):
    fields = {"vocab_size": BYTES_VOCAB, **LLAMA, "num_labels": 1, "pad_token_id": 257}
    config = AutoConfig.for_model(**fields)
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.4)
    return model.eval()


# --- What a critic says ---------------------------------------------------------------------------
def test_equal_texts_are_asked_about_once_and_empty_ones_never():
    scripted = Scripted()
    critic = Critic(scripted, WRITING)
    assert critic(PROMPTS, CANDIDATES) == [[0.4, 0.4, 0.4, -1.0], [0.3, 0.5, 0.3, 0.5]]
    assert sorted(scripted.asked) == [
        ("one", "eight"), ("one", "seven"), ("one", "six"),
        ("two and two is", "five"), ("two and two is", "four"),
    ]  # fmt: skip
    seconds, tokens = critic.take_costs()
    assert (seconds > 0, tokens) == (True, 5)
    assert critic.take_costs() == (0.0, 0)


def test_win_rates_are_means_over_the_other_texts_of_a_position():
    scripted = Scripted()
    rates = Critic(scripted, WRITING, "pairs")(PROMPTS, CANDIDATES)
    # Against "four", "four" and "five", of which none is longer, and against nothing.
    assert rates[0] == pytest.approx([2 / 3, 2 / 3, 2 / 3, 0.0])
    # "six" meets "seven" (0.3), "six" (0.5) and "eight" (0.3); "seven" meets 0.7, 0.7 and 0.5.
    assert rates[1] == pytest.approx([1.1 / 3, 1.9 / 3, 1.1 / 3, 1.9 / 3])
    assert len(scripted.asked) == 1 + 3
    total = sum(map(sum, rates))
    assert total == pytest.approx(2 * 4 / 2), "what one wins another loses"


@pytest.mark.parametrize("mode", ["rating", "pairs"])
def test_verdicts_are_those_of_the_judge(mode):
    judge = make_judge(plain_model(LLAMA, max_position_embeddings=512))
    said = Critic(judge, WRITING, mode)(PROMPTS[1:], CANDIDATES[1:])[0]
    if mode == "rating":
        ratings = judge.rate(PROMPTS[1:] * 3, ["six", "seven", "eight"])
        expected = [ratings[n].score for n in (0, 1, 0, 2)]
    else:
        names = [("six", "seven"), ("six", "eight"), ("seven", "eight")]
        a, b, c = (judge.compare(["one"], [x], [y])[0].probability for x, y in names)
        six = (0.5 + a + b) / 3
        expected = [six, (2 * (1 - a) + c) / 3, six, (2 * (1 - b) + 1 - c) / 3]
    assert said == pytest.approx(expected, abs=1e-5)


def test_the_base_judges_with_its_adapters_off():
    base = plain_model(LLAMA, max_position_embeddings=512)
    model = thinking_model(base, tuning={"method": "lora"})
    settings = JudgeConfig()
    critic = load_critic(settings, "judge", model, 4, torch.device("cpu"))
    alone = make_judge(plain_model(LLAMA, max_position_embeddings=512))
    alone.prompts = critic.judge.prompts
    expected = [x.score for x in alone.rate(["one", "one"], ["six", "seven"])]
    assert critic(["one"], [["six", "seven"]])[0] == pytest.approx(expected, abs=1e-5)
    trains = [p for p in model.language_model.parameters() if p.requires_grad]
    assert trains, "adapters train again"
    assert critic.writing.num_tokens == 4


def test_a_reward_model_scores_each_text_as_transformers_does():
    model, tokenizer = classifier(), load_tokenizer("bytes")
    prompts, candidates = ["one ", "", "a longer prompt "] * 2, ["two", "x", "and text"] * 2
    scores = RewardModel(model, tokenizer, batch_size=3).score(prompts, candidates)
    for prompt, candidate, score in zip(prompts, candidates, scores, strict=True):
        ids = tokenizer(prompt + candidate)["input_ids"]
        ids += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([ids])).logits.item()
        assert score == pytest.approx(expected, abs=1e-5)


# --- In training ----------------------------------------------------------------------------------
def judged_config(folder, judge, **changes):
    folder.mkdir(exist_ok=True)
    template = folder / "mine.j2"
    template.write_text(TEMPLATE, encoding="utf-8")
    settings = {
        "loss__reward": "judge", "judge__model": judge, "judge__template": str(template),
        "judge__continuation": 3, "thoughts__positions": "random", "data__seq_len": 16,
        "thoughts__position_fraction": 2,
    }  # fmt: skip
    return run_config(folder, **{**settings, **changes})


@pytest.mark.parametrize("mode", ["rating", "pairs"])
def test_thoughts_are_reinforced_by_what_a_judge_says(tmp_path, mode):
    judge = saved_judge(tmp_path / "judge")
    run_training(judged_config(tmp_path / "a", judge, judge__mode=mode))
    records = read_metrics(tmp_path / "a" / "run", "train")
    for record in records:
        low = -1 if mode == "rating" else 0
        assert low < record["policy_reward"] < 1
        assert 0 < record["judge_share"] < 1
        assert record["judged_tokens_per_second"] > 0
    if mode == "pairs":
        assert records[0]["policy_reward"] == pytest.approx(0.5, abs=1e-6)


def test_the_reward_is_the_judge_s_rating_of_the_continuation():
    base = plain_model(LLAMA, max_position_embeddings=512)
    model, seen = thinking_model(base, thoughts={"positions": "random"}), []
    critic = Critic(make_judge(plain_model(LLAMA, max_position_embeddings=512)), WRITING)

    def watched(prompts, candidates):
        seen.append((prompts, candidates, critic(prompts, candidates)))
        return seen[-1][2]

    watched.writing = WRITING
    model.judge, model.reward, model.reward_name = watched, judge_reward, "judge"
    texts = torch.randint(97, 122, (2, 9), generator=torch.Generator().manual_seed(0))
    output = model(texts)
    ((_, _, scores),) = seen
    mean = torch.tensor(scores).mean().item()
    assert output.metrics.means()["policy_reward"] == pytest.approx(mean, abs=1e-6)


def test_later_updates_ask_no_judge_again(tmp_path):
    judge = saved_judge(tmp_path / "judge")
    once = judged_config(tmp_path / "1", judge, training__max_steps=1)
    twice = judged_config(tmp_path / "2", judge, training__max_steps=1, training__inner_epochs=3)
    counts = []
    for name, config in (("1", once), ("2", twice)):
        run_training(config)
        (record,) = read_metrics(tmp_path / name / "run", "train")
        seconds = record["judge_share"] * record["seconds"]
        counts.append(round(record["judged_tokens_per_second"] * seconds))
    assert counts[0] == counts[1] > 0


def test_a_judged_run_resumes_bit_by_bit(tmp_path):
    judge = saved_judge(tmp_path / "judge")
    settings = {"training__save_steps": 2, "training__max_steps": 4}
    run_training(judged_config(tmp_path / "a", judge, **settings))
    run_training(judged_config(tmp_path / "b", judge, **{**settings, "training__max_steps": 2}))
    longer = judged_config(tmp_path / "b", judge, **settings)
    run_training(longer, resume="auto", allow_changes=True)
    name = "run/final/language_model/model.safetensors"
    assert filecmp.cmp(tmp_path / "a" / name, tmp_path / "b" / name, shallow=False)


def test_a_reward_model_reinforces_thoughts(tmp_path):
    folder = tmp_path / "scorer"
    classifier().save_pretrained(folder)
    load_tokenizer("bytes").save_pretrained(folder)
    run_training(judged_config(tmp_path / "a", str(folder), loss__reward="reward_model"))
    records = read_metrics(tmp_path / "a" / "run", "train")
    assert all(record["policy_reward_std"] > 0 and record["judge_share"] > 0 for record in records)


# --- Training a reward model ----------------------------------------------------------------------
def preferences(path, count=48):
    """Pairs in which a text of the letter a is better than one of z, nearly always."""
    lines = []
    for n in range(count):
        soft = 0.9 if n % 8 else 0.5
        better, worse = "a" * (1 + n % 3), "z" * (1 + n % 4)
        lines.append({"prompt": f"{n}: ", "chosen": better, "rejected": worse, "soft_label": soft})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("labels", ["soft", "hard"])
def test_a_reward_model_learns_what_is_preferred(tmp_path, labels):
    base, pairs = saved_judge(tmp_path / "base"), preferences(tmp_path / "pairs.jsonl")
    out = tmp_path / "scorer"
    line = ["reward-model", "--pairs", pairs, "--model", base, "--out", str(out), "--epochs", "6",
            "--learning-rate", "0.01", "--batch-size", "8", "--labels", labels]  # fmt: skip
    assert cli.main(line) == 0
    results = json.loads((out / "reward_model.json").read_text(encoding="utf-8"))
    assert results["agreement"] == 1.0
    assert results["trained_on"] + results["n"] == 48
    scorer = RewardModel.load(str(out))
    better, worse = scorer.score(["x: ", "x: "], ["aa", "zz"])
    gap = better - worse
    # Of eight pairs seven have the log odds of 0.9 (2.2), one those of 0.5.
    assert (1 < gap < 2.8) if labels == "soft" else gap > 3.2, gap
    assert not out.with_name("scorer.checkpoints").exists()
    plain = AutoModelForSequenceClassification.from_pretrained(out)
    assert plain.config.num_labels == 1


def test_the_loss_of_soft_labels_is_the_cross_entropy_of_both_scores():
    model, tokenizer = classifier(), load_tokenizer("bytes")
    row = {
        "rows": [encode_scored(tokenizer, "x", text, 64) for text in ("ab", "cde")],
        "label": 0.7,
    }
    batch = _Collate(model.config.pad_token_id)([row, {**row, "label": 0.2}])
    loss = _PreferenceTrainer.compute_loss(None, model, batch)
    scores = torch.tensor(RewardModel(model, tokenizer).score(["x", "x"], ["ab", "cde"]))
    chosen, rejected = scores.log_softmax(0).tolist()
    expected = -sum(p * chosen + (1 - p) * rejected for p in (0.7, 0.2)) / 2
    assert loss.item() == pytest.approx(expected, abs=1e-5)


def test_checkpoints_of_other_settings_are_refused(tmp_path, capsys, monkeypatch):
    base, pairs = saved_judge(tmp_path / "base"), preferences(tmp_path / "pairs.jsonl")
    out = tmp_path / "scorer"
    line = ["reward-model", "--pairs", pairs, "--model", base, "--out", str(out), "--epochs", "2",
            "--batch-size", "8", "--save-steps", "2", "--lora-r", "0"]  # fmt: skip

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("quietstar.judging.reward_training.measure_agreement", stop)
        cli.main(line)
    assert not out.exists()
    assert cli.main([*line, "--seed", "1"]) == 2
    assert "its checkpoints are of another" in capsys.readouterr().err
    assert cli.main(line) == 0
    assert out.exists()
    assert not out.with_name("scorer.checkpoints").exists()


@pytest.mark.parametrize(("line", "message"), [
    ('{"prompt": "x", "chosen": ["y"], "rejected": "z"}', r"chosen holds list, and must be plain"),
    ('{"prompt": "x", "chosen": "y"}', r"must have the texts prompt, chosen and rejected"),
    ('{"prompt": "x", "chosen": "y", "rejected": "z", "soft_label": 2}', r"soft_label \(2\) must"),
    ('{"prompt": "x", "chosen": "y", "rejected": "y"}', r"has no pair of different texts"),
    ('{"prompt": "x", "chosen": "y", "rejected": "z"}', r"\(.*pairs.jsonl\): .* too few to hold 1"),
])  # fmt: skip
def test_preferences_that_teach_nothing_are_refused(tmp_path, capsys, line, message):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(line + "\n", encoding="utf-8")
    arguments = ["--pairs", str(pairs), "--model", str(tmp_path), "--out", str(tmp_path / "o")]
    assert cli.main(["reward-model", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


# --- What is refused ------------------------------------------------------------------------------
@pytest.mark.parametrize(("changes", "message"), [
    ({"loss__reward": "judge"}, r"judge.model \(null\) must be set with tuning.method: full"),
    ({"loss__reward": "reward_model"}, r"judge.model \(null\) must be set with loss.reward"),
    ({"loss__reward": "judge", "judge__model": "x", "judge__mode": "pairs",
      "thoughts__num_thoughts": 1, "loss__estimator": "no_baseline"},
     r"num_thoughts \(1\) must be at least 2 with judge.mode: pairs"),
])  # fmt: skip
def test_what_cannot_judge_is_refused_with_the_remedy(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run_config(tmp_path, **changes)


def test_a_judge_that_is_none_is_named_by_its_key(tmp_path):
    model, cpu = thinking_model(), torch.device("cpu")
    (tmp_path / "empty").mkdir()
    for reward in ("judge", "reward_model"):
        settings = JudgeConfig(model=str(tmp_path / "empty"))
        with pytest.raises(UserError, match=re.escape(f"judge.model ({tmp_path / 'empty'})")):
            load_critic(settings, reward, model, 2, cpu)
    judge = saved_judge(tmp_path / "judge")
    with pytest.raises(UserError, match=r"judge.model \(.*\): has no weights of a reward model"):
        load_critic(JudgeConfig(model=judge), "reward_model", model, 2, cpu)
    with pytest.raises(UserError, match=r"judge.template \(none\): must be one of"):
        load_critic(JudgeConfig(model=judge, template="none"), "judge", model, 2, cpu)
    model.passes_together = True
    with pytest.raises(UserError, match=r"judge.model \(null\): .* sharded"):
        load_critic(JudgeConfig(), "judge", model, 2, cpu)


def test_a_judge_that_could_read_nothing_is_refused_before_the_first_step(tmp_path):
    plain_model().save_pretrained(tmp_path / "short")  # 64 positions
    load_tokenizer("bytes").save_pretrained(tmp_path / "short")
    model, cpu = thinking_model(), torch.device("cpu")
    with pytest.raises(UserError, match=r"short\): judge.template: take \d+ tokens .* reads 64"):
        load_critic(JudgeConfig(model=str(tmp_path / "short")), "judge", model, 2, cpu)
    classifier().save_pretrained(tmp_path / "scorer")
    load_tokenizer("bytes").save_pretrained(tmp_path / "scorer")
    with pytest.raises(UserError, match=r"is a sequence classifier, .*reward: reward_model"):
        load_critic(JudgeConfig(model=str(tmp_path / "scorer")), "judge", model, 2, cpu)
    judge = saved_judge(tmp_path / "judge")
    config = judged_config(tmp_path / "a", judge, judge__continuation=60)
    with pytest.raises(UserError, match=r"judge.continuation \(60\): .* it must be at most \d+"):
        run_training(config)


def test_a_reward_that_asks_no_judge_loads_none(tmp_path):
    config = judged_config(tmp_path / "a", str(tmp_path / "nowhere"), loss__reward="thought")
    run_training(config)


def test_a_model_without_a_judge_says_how_to_give_it_one():
    model = thinking_model()
    model.reward, model.reward_name = judge_reward, "judge"
    with pytest.raises(UserError, match=r"scores.judge: the model has no judge. Set judge.model"):
        model(random_texts())
