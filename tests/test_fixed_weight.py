"""``mixing_head.fixed_weight``: a constant in place of the mixing head, wherever a model thinks."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import random_texts, run_config, think, thinking_model

from quietstar import QuietStarForCausalLM
from quietstar.data import load_tokenizer
from quietstar.errors import UserError
from quietstar.training.run import run_training


def make(weight, **thoughts):
    return thinking_model(head={"fixed_weight": weight}, thoughts=thoughts).eval()


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_it_is_the_weight_of_every_thought(weight):
    model, texts = make(weight), random_texts()
    thoughts = think(model, texts)
    assert thoughts.mixing_weight.unique().tolist() == pytest.approx([weight])
    scores = model.score(texts, thoughts.tokens, only_mixed=True, lookahead=1)
    mixed = scores.mixed_logprobs[..., 0]
    torch.testing.assert_close(mixed, thoughts.mixed_logprobs[..., 0])
    if weight == 1:
        torch.testing.assert_close(thoughts.mixed_logprobs, thoughts.thought_logprobs)
    elif weight == 0:
        torch.testing.assert_close(mixed[:, :, 0], thoughts.base_logprobs[..., 0])


def test_training_heeds_it_and_the_warm_up_comes_before_it():
    model, texts = make(0.7), random_texts()
    output = model(texts, sample_ids=torch.arange(2))
    assert output.metrics.means()["mixing_weight"] == pytest.approx(0.7)
    output.loss.backward()
    assert all(p.grad is None for p in model.mixing_head.parameters())
    warm = model(texts, sample_ids=torch.arange(2), fixed_mixing_weight=0.0)
    assert warm.metrics.means()["mixing_weight"] == 0


def test_a_generated_token_is_predicted_by_the_thought_alone():
    model, texts = make(1.0), random_texts(1, 6)
    out = model.generate(texts, max_new_tokens=1, do_sample=False, pad_token_id=0,
                         return_dict_in_generate=True, output_logits=True)  # fmt: skip
    scored = think(model, torch.cat([texts, out.sequences[:, -1:]], 1))
    own = scored.thought_logprobs[0, 5, 0, 0]
    found = out.logits[0].log_softmax(-1)[0, out.sequences[0, -1]]
    torch.testing.assert_close(found, own)
    assert abs(float(own - scored.base_logprobs[0, 5, 0])) > 1e-3


def test_it_is_saved_and_folders_without_it_ask_the_head(tmp_path):
    model, texts = make(1.0), random_texts()
    model.save_pretrained(tmp_path / "model", load_tokenizer("bytes"))
    again = QuietStarForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(think(again, texts).mixed_logprobs, think(model, texts).mixed_logprobs)
    settings = tmp_path / "model" / "quietstar.json"
    content = json.loads(settings.read_text())
    del content["mixing_head"]["fixed_weight"]
    settings.write_text(json.dumps(content))
    model = QuietStarForCausalLM.from_pretrained(tmp_path / "model")
    weights = think(model, texts).mixing_weight
    assert len(weights.unique()) > 10


def test_a_run_keeps_it_and_trains_no_head(tmp_path):
    settings = {"mixing_head__fixed_weight": 0.25, "mixing_head__warmup_steps": 2,
                "mixing_head__warmup_weight": 0.75, "training__save_steps": 3}  # fmt: skip
    run_training(run_config(tmp_path, **settings))
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    weights = [(line["kind"], line["mixing_weight"]) for line in lines]
    train = [("train", 0.75), ("train", 0.75), ("train", 0.25)]
    assert weights == [("eval", 0.25), *train, ("eval", 0.25)]
    trained = load_file(tmp_path / "run" / "checkpoints" / "step-000003" / "trainable.safetensors")
    assert "start_embedding" in trained
    assert not any(name.startswith("mixing_head.") for name in trained)


def test_a_checkpoint_whose_head_trained_is_refused(tmp_path):
    settings = {"training__save_steps": 2, "training__max_steps": 2}
    run_training(run_config(tmp_path, **settings))
    fixed = run_config(
        tmp_path, **settings | {"training__max_steps": 4}, mixing_head__fixed_weight=0.5
    )
    with pytest.raises(UserError, match="holds a mixing head that trains, which none does with"):
        run_training(fixed, resume="auto", allow_changes=True)


@pytest.mark.parametrize("rule", ["weight", "weighted_entropy"])
def test_rules_that_ask_the_head_are_refused(rule):
    with pytest.raises(UserError, match=rf"thoughts.positions \({rule}\): asks the mixing head"):
        make(1.0, positions=rule)
