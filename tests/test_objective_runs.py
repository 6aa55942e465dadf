"""Runs by the objectives: inner epochs, references, running means, presets; asking the policy."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny import plain_model, random_texts, read_metrics, run_config, thinking_model

from quietstar.backbone.run import plain_pass
from quietstar.checks import check_logprobs
from quietstar.config import fields
from quietstar.config.loading import load_config, save_config, shipped_configs
from quietstar.errors import ConfigError, UserError
from quietstar.model.scoring import score_reference
from quietstar.objectives._policy import PolicyObjective
from quietstar.objectives.rlp import Rlp
from quietstar.rewards import asks_policy
from quietstar.rewards import thought as thought_module
from quietstar.training.memory_plan import estimate_run
from quietstar.training.run import run_training

MODEL = "language_model/model.safetensors"
EVERYTHING = {
    "loss__objective": "rlp",
    "loss__reference": "base",
    "loss__estimator": "running_mean",
    "loss__kl_weight": 0.1,
    "loss__reward_kl_weight": 0.1,
    "loss__min_signal": 0.2,
    "loss__clip_low": 0.02,
    "loss__clip_high": 0.02,
    "training__inner_epochs": 3,
    "training__ema_decay": 0.8,
}
"""All parts that know earlier steps or other weights."""


def run(folder, **changes):
    folder.mkdir(exist_ok=True)
    run_training(run_config(folder, **changes))
    return folder / "run"


def weights(folder):
    return load_file(folder / "final" / MODEL)


def records(folder):
    return read_metrics(folder, "train")


# --- Inner epochs ---------------------------------------------------------------------------------
def test_the_first_update_of_several_is_that_of_plain_reinforce(tmp_path):
    alone = records(run(tmp_path / "1", training__max_steps=1))
    several = records(run(tmp_path / "2", training__max_steps=1, training__inner_epochs=3))
    for key in ("loss", "grad_norm_total", "policy_reward", "mixed_nll"):
        assert several[0][key] == alone[0][key]
    assert "ratio" not in alone[0]
    assert several[0]["ratio"] != 1
    assert several[0]["approx_kl"] > 0
    assert several[0]["clipped_fraction"] == 0


def test_a_clip_takes_tokens_out(tmp_path):
    free, clipped = (
        records(run(tmp_path / str(clip), training__inner_epochs=3, loss__clip_low=clip,
                    loss__clip_high=clip, loss__policy_weight=5.0))
        for clip in (None, 1e-3)
    )  # fmt: skip
    assert free[0]["clipped_fraction"] == 0
    assert 0.2 < clipped[0]["clipped_fraction"] < 0.8
    assert clipped[1]["loss"] != free[1]["loss"]


def test_micro_batches_change_nothing(tmp_path):
    whole = records(run(tmp_path / "8", **EVERYTHING))
    parts = records(run(tmp_path / "3", **EVERYTHING, training__micro_batch_size=3))
    keys = ("loss", "policy_reward", "policy_reward_std", "ratio", "approx_kl", "dropped_fraction")
    for ours, theirs in zip(parts, whole, strict=True):
        assert {k: ours[k] for k in keys} == pytest.approx(
            {k: theirs[k] for k in keys}, rel=1e-4, abs=1e-6
        )
    assert whole[1]["dropped_fraction"] != whole[0]["dropped_fraction"] == 1  # no earlier step


def test_a_run_resumes_bit_for_bit_with_all_that_it_remembers(tmp_path):
    more = {**EVERYTHING, "training__max_steps": 4, "training__save_steps": 2}
    whole = run(tmp_path / "whole", **more)
    (tmp_path / "part").mkdir()
    run_training(
        run_config(tmp_path / "part", **more),
        resume=str(whole / "checkpoints" / "step-000002"),
    )
    assert records(tmp_path / "part" / "run")[-1]["loss"] == records(whole)[-1]["loss"]
    for name in ("final", "ema"):
        ours, theirs = (
            load_file(folder / name / MODEL) for folder in (tmp_path / "part" / "run", whole)
        )
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def drawn(model, texts, **changes):
    batch = model.draw(texts, num_thoughts=2, temperature=1.0, sample_ids=torch.arange(len(texts)))
    return replace(batch, **changes)


def test_thoughts_of_another_policy_count_by_their_ratio():
    model, texts = thinking_model(loss={"clip_high": 0.5}), random_texts()
    own = model(texts, thoughts=drawn(model, texts))
    logprobs = own.drawn.sampling_logprobs
    same = model(texts, thoughts=drawn(model, texts, sampling_logprobs=logprobs))
    rarer = model(texts, thoughts=drawn(model, texts, sampling_logprobs=logprobs - 1.0))
    assert "ratio" not in own.metrics.means()
    assert same.metrics.means()["ratio"] == pytest.approx(1.0)
    figures = rarer.metrics.means()
    assert figures["ratio"] == pytest.approx(torch.e)
    assert figures["approx_kl"] == pytest.approx(torch.e - 2)
    assert 0.3 < figures["clipped_fraction"] < 0.7  # of positive advantage


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda x: x[..., :1], "must be floating-point numbers of the tokens' shape"),
     (lambda x: x * 0 + 0.5, "are above 0"), (lambda x: x * torch.nan, "or not finite"),
     (lambda x: x - torch.inf, "or not finite")],
)  # fmt: skip
def test_what_is_no_log_probability_is_refused(change, message):
    tokens = torch.zeros(2, 3, 2, 4, dtype=torch.long)
    logprobs = change(torch.zeros(tokens.shape))
    with pytest.raises(UserError, match=message):
        check_logprobs(SimpleNamespace(sampling_logprobs=logprobs, tokens=tokens), "its logprobs")


# --- References -----------------------------------------------------------------------------------
def test_the_start_of_adapters_is_the_base_model(tmp_path):
    base = plain_model()
    base.save_pretrained(tmp_path / "base")
    model = thinking_model(plain_model(), tuning={"method": "lora", "lora_r": 2})
    texts = random_texts()
    labels = texts.clone()
    before, _ = score_reference(model, texts, labels)
    logits = base(texts).logits.log_softmax(-1)
    expected = logits[:, :-1].gather(-1, texts[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(before[:, :-1], expected)


def test_gains_are_over_the_reference_and_their_gradient_is_not(tmp_path):
    plain = records(run(tmp_path / "current", loss__objective="rlp"))
    base = records(run(tmp_path / "base", loss__objective="rlp", loss__reference="base"))
    assert base[0]["policy_reward"] == pytest.approx(plain[0]["policy_reward"], rel=1e-5)
    assert base[2]["policy_reward"] != pytest.approx(plain[2]["policy_reward"], rel=1e-3)
    assert [r["grad_norm_total"] for r in base] == pytest.approx(
        [r["grad_norm_total"] for r in plain], rel=1e-4
    )


@pytest.mark.parametrize(
    ("loss", "name"),
    [({"objective": "latro"}, "reference_text"),
     ({"objective": "rlp", "reference": "base"}, "reference_text"),
     ({"kl_weight": 1.0, "reference": "base"}, "reference_logprobs")],
)  # fmt: skip
def test_a_loop_of_the_users_must_give_the_reference(loss, name):
    model, texts = thinking_model(loss=loss), random_texts()
    with pytest.raises(UserError, match="forward was not given reference_text"):
        model(texts)
    text, _ = score_reference(model, texts, texts)
    if name == "reference_logprobs":
        with pytest.raises(UserError, match="forward was not given reference_logprobs"):
            model(texts, reference_text=text)
    thoughts = drawn(model, texts)
    text, tokens = score_reference(model, texts, texts, thoughts)
    given = replace(thoughts, reference_text=text, reference_logprobs=tokens)
    assert model(texts, thoughts=given).loss.isfinite()


def test_divergences_are_from_the_weights_at_the_start(tmp_path):
    kept = run(
        tmp_path / "kept", loss__objective="rlp", loss__reference="base", loss__kl_weight=1.0
    )
    free = run(tmp_path / "free", loss__objective="rlp")
    first, second = records(kept), records(free)
    # At the start nothing diverges.
    assert first[0]["loss"] == pytest.approx(second[0]["loss"], abs=1e-6)
    assert first[2]["loss"] > second[2]["loss"] + 1e-5
    assert not any(torch.equal(a, weights(free)[n]) for n, a in weights(kept).items() if a.ndim > 1)


# --- Asking the policy ----------------------------------------------------------------------------
def logprob_by_hand(model, prompt, completion):
    tokenizer = model.tokenizer
    before = tokenizer(prompt)["input_ids"] if prompt else [tokenizer.bos_token_id]
    behind = tokenizer(completion, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([before + behind])
    logits = model.output_head.logits(plain_pass(model.causal_lm, ids)[0]).log_softmax(-1)
    return sum(logits[len(before) + n - 1, token] for n, token in enumerate(behind))


def test_a_reward_may_ask_for_log_probabilities_of_any_texts(monkeypatch):
    model, asked = thinking_model(), []

    @asks_policy
    def likely(thoughts, scores):
        texts = model.tokenizer.batch_decode(thoughts.tokens.flatten(0, 2))
        logprobs = scores.logprob(["so "] * len(texts), [f"{text}!" for text in texts])
        asked.append((texts, logprobs))
        return logprobs.view(thoughts.lengths.shape)

    model.reward, model.reward_name = likely, "likely"
    model(random_texts()).loss.backward()
    (texts, logprobs), *others = asked
    assert not others
    for n in (0, 5, len(texts) - 1):
        expected = logprob_by_hand(model, "so ", f"{texts[n]}!")
        torch.testing.assert_close(logprobs[n], expected.detach())
    assert not logprobs.requires_grad


def test_the_reward_of_the_docs_that_asks_the_model_works():
    text = (Path(__file__).parents[1] / "docs/tutorials/your-reward.md").read_text(encoding="utf-8")
    (source,) = re.findall(r"```python\n([^`]*asks_policy.*?)```", text, flags=re.DOTALL)
    exec(source, names := {})
    model = thinking_model(loss={"entropy_weight": 0.1})
    model.reward, model.reward_name = names["leads_back"], "leads_back"
    assert model(random_texts()).metrics.means()["policy_reward"] < -20


@pytest.mark.parametrize("head", ["linear", "soft-capped"])
def test_a_reward_that_sees_all_scores_at_once_is_the_same_reward(head):
    texts, losses = random_texts(3, 12), []
    base = plain_model() if head == "linear" else plain_model({"model_type": "gemma2", **GEMMA})
    for reward in (thought_module.thought, asks_policy(lambda t, s: thought_module.thought(t, s))):
        model = thinking_model(base)
        model.reward, model.reward_name = reward, "thought"
        model.zero_grad()
        loss = model(texts, sample_ids=torch.arange(3)).loss
        loss.backward()
        losses.append([loss, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    torch.testing.assert_close(*losses)


GEMMA = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    ("prompts", "completions", "message"),
    [
        (["a"], [], "there are 1 prompts and 0 completions"),
        (["a"], [""], "the completion '' has no tokens"),
        (["a" * 100], ["b"], "a text has 101 tokens, but the model reads at most"),
    ],
)
def test_what_cannot_be_asked_is_said_in_one_line(prompts, completions, message):
    model = thinking_model()
    model.reward_name = "mine"

    @asks_policy
    def asks(thoughts, scores):
        return scores.logprob(prompts, completions)

    model.reward = asks
    with pytest.raises(UserError, match=re.escape(message)):
        model(random_texts())
    del asks.asks_policy
    with pytest.raises(UserError, match="Put @asks_policy above it"):
        model(random_texts())


# --- Rules ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss__objective": "verifree", "loss__reward": "thought"}, "must not be negative"),
        ({"loss__kl_weight": 1.0}, "no model diverges from itself"),
        ({"loss__objective": "latro", "loss__reference": "current"}, "no model diverges"),
        ({"loss__objective": "rlp", "loss__reference": "ema"}, "must be set with loss.reference"),
        ({"loss__objective": "jepo", "loss__reward": "prob"}, "must be thought with"),
        ({"loss__objective": "jepo", "loss__estimator": "paper"}, "must be leave_one_out with"),
        ({"thoughts__num_thoughts": 1, "loss__objective": "rlpr",
          "loss__estimator": "no_baseline"}, "which asks how far the rewards"),
        ({"thoughts__num_thoughts": 1, "loss__objective": "jepo"}, "set loss.objective: log_prob"),
        ({"loss__objective": "jepo", "loss__min_signal": 0.5}, "loss.min_signal .* must be 0.0"),
        ({"loss__objective": "jepo", "loss__thought_weighting": "reward"}, "must be softmax with"),
        ({"training__inner_epochs": 2, "loss__estimator": "paper"}, "must be 1 with"),
    ],
)  # fmt: skip
def test_wrong_combinations_are_refused_with_the_reason(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run_config(tmp_path, **changes)


def test_the_command_line_goes_over_a_preset():
    stages = load_config("demo", ["--loss.reward", "rank"], preset="rlp").stage_configs()
    assert stages["think"].loss.reward == "rank"
    assert stages["think"].loss.token_weighting == "mean"


@pytest.mark.parametrize("name", sorted(shipped_configs("objectives")))
def test_presets_are_for_the_stages_that_think(name, tmp_path):
    config = load_config("demo", preset=name)
    stages = config.stage_configs()
    expected = name.removesuffix("_paper")
    assert [stage.loss.objective for stage in stages.values()] == ["next_token"] * 2 + [expected]
    alone = load_config("tiny", preset=f"configs/objectives/{name}.yaml").loss
    assert alone.objective == expected
    thinking = list(stages.values())[-1]
    assert thinking.loss == alone  # the defaults are those of the objective in a stage too
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml").stage_configs() == stages


def test_wrong_presets_are_one_line(tmp_path):
    with pytest.raises(
        ConfigError, match="--preset: there is no file verifre; did you mean verifree"
    ):
        load_config("demo", preset="verifre")
    path = tmp_path / "plain.yaml"
    path.write_text("loss: {objective: next_token}\ndata: {train: synthetic:moves}\n")
    with pytest.raises(ConfigError, match=r"no stage of .*plain.yaml thinks"):
        load_config(path, preset="rlp")
    with pytest.raises(ConfigError, match=r"stages: a preset has none"):
        load_config("demo", preset=_staged(tmp_path))


def _staged(folder):
    path = folder / "staged.yaml"
    text = "loss: {objective: rlp}\nstages:\n  think:\n    loss: {objective: rlp}\n"
    path.write_text(text)
    return path


def test_the_plan_counts_the_weights_of_the_start(tmp_path):
    averages = [
        estimate_run(run_config(tmp_path, loss__objective="rlp", **changes), "single", 1).average
        for changes in (
            {}, {"loss__reference": "base"},
            {"loss__reference": "base", "training__ema_decay": 0.9},
        )
    ]  # fmt: skip
    assert averages[0] == 0 < averages[1]
    assert averages[2] == 2 * averages[1]


# --- What was wrong once --------------------------------------------------------------------------
def test_all_updates_of_a_step_keep_what_it_began_with(tmp_path, monkeypatch):
    seen = []
    real = Rlp.weigh

    def weigh(self, reward, scores):
        running = None if scores.running is None else scores.running.tolist()
        seen.append((running, real(self, reward, scores)))
        return seen[-1][1]

    monkeypatch.setattr(Rlp, "weigh", weigh)
    changes = {"loss__objective": "rlp", "loss__estimator": "running_mean"}
    folder = run(tmp_path / "a", **changes, training__inner_epochs=2, training__max_steps=2)
    first, again, second, _ = (running for running, _ in seen)
    assert first is None
    assert again is None
    assert second[0] == pytest.approx(records(folder)[0]["policy_reward"], rel=1e-6)
    # The first step reinforces nothing, in none of its updates.
    assert records(folder)[0]["dropped_fraction"] == 1


def test_true_tokens_count_by_the_reward_itself(tmp_path):
    plain, shaped = (
        records(run(tmp_path / str(weight), loss__objective="verifree", loss__policy_weight=0.0,
                    loss__reference="base", loss__reward_kl_weight=weight))
        for weight in (0.0, 5.0)
    )  # fmt: skip
    assert [r["loss"] for r in shaped] == [r["loss"] for r in plain]


class Kept(PolicyObjective):
    """An objective from outside that sets attributes, not keys."""

    def __init__(self, settings):
        super().__init__(settings)
        self.kl_weight, self.reference = 5.0, "base"

    def reads_reference(self, reward):
        return True


def test_attributes_of_an_objective_from_outside_count(tmp_path):
    name = f"{__name__}:Kept"
    kept = records(run(tmp_path / "kept", loss__objective=name))
    free = records(run(tmp_path / "free", loss__objective="rlp", loss__token_weighting="sum",
                       loss__reward="thought"))  # fmt: skip
    assert kept[0]["loss"] == pytest.approx(free[0]["loss"], abs=1e-6)
    assert kept[2]["loss"] > free[2]["loss"] + 1e-5


class Odd(Kept):
    """One with an attribute that means nothing."""

    def __init__(self, settings):
        super().__init__(settings)
        self.token_weighting = "average"


def test_attributes_that_mean_nothing_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"its token_weighting \('average'\) must be sum, mean or"):
        run(tmp_path / "odd", loss__objective=f"{__name__}:Odd")


def test_ratios_at_other_temperatures_are_refused():
    model, texts = thinking_model(loss={"estimator": "paper"}), random_texts()
    thoughts = drawn(model, texts)
    logprobs = torch.zeros(thoughts.tokens.shape)
    with pytest.raises(UserError, match="ratios compare with the policy"):
        model(texts, thoughts=replace(thoughts, sampling_logprobs=logprobs))


@pytest.mark.parametrize("objective", ["latro", "rlp", "rlpr"])
def test_every_objective_can_be_planned(tmp_path, objective):
    config = run_config(
        tmp_path, loss__objective=objective, loss__reference="base", loss__kl_weight=1.0
    )
    assert estimate_run(config, "single", 1).learning > 0


def test_defaults_are_shown_of_the_default_objective():
    assert fields()["loss.reward"]["default"] == "thought"
    assert fields()["loss.policy_weight"]["default"] == 0.1
