"""What users of transformers try first: Auto classes, pipelines, Trainer, the hub."""

import json
import math
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from tiny import MARKERS, plain_model, random_texts, think, thinking_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    pipeline,
)

from quietstar import QuietStarForCausalLM
from quietstar.backbone.loading import fill_device
from quietstar.cli.main import main as quietstar
from quietstar.config import ThoughtsConfig, TuningConfig
from quietstar.data import load_tokenizer
from quietstar.errors import UserError
from quietstar.evaluation import scoring
from quietstar.evaluation.scoring import load_thinker
from quietstar.model import card, saving


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    plain_model().save_pretrained(folder)
    load_tokenizer("bytes").save_pretrained(folder)
    return folder


def make(base, method="full", **thoughts):
    return QuietStarForCausalLM.from_base(
        str(base),
        thoughts=ThoughtsConfig(**{"length": 2, "lookahead": 2, **MARKERS, **thoughts}),
        tuning=TuningConfig(method=method, lora_r=2),
    ).eval()


def texts_of(model):
    return torch.tensor([model.tokenizer.encode("two and two is"), [65] * 14])


@pytest.mark.parametrize("method", ["full", "lora"])
def test_auto_classes_and_pipelines_know_a_saved_model(method, base, tmp_path):
    model = make(base, method)
    model.save_pretrained(tmp_path, model.tokenizer)
    assert AutoConfig.from_pretrained(tmp_path).get_text_config().model_type == "llama"
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is QuietStarForCausalLM
    texts = texts_of(model)
    assert torch.equal(model(texts).logits, again(texts).logits)
    generator = pipeline("text-generation", model=str(tmp_path))
    assert type(generator.model) is QuietStarForCausalLM
    text = generator("two and", max_new_tokens=3, do_sample=False)[0]["generated_text"]
    ids = AutoTokenizer.from_pretrained(tmp_path)("two and", return_tensors="pt")
    new = model.generate(**ids, max_new_tokens=3, do_sample=False)
    assert text == model.tokenizer.decode(new[0], skip_special_tokens=True)
    given = pipeline("text-generation", model=model, tokenizer=model.tokenizer)
    assert given("two and", max_new_tokens=3, do_sample=False)[0]["generated_text"] == text


@pytest.mark.parametrize("first", ["quietstar", "transformers"])
def test_auto_classes_know_a_saved_model_whichever_package_is_imported_first(first, base, tmp_path):
    model = make(base)
    model.save_pretrained(tmp_path, model.tokenizer)
    code = f"""
import sys
import {first}
assert "torch" not in sys.modules or {first!r} != "quietstar"
import importlib.util, quietstar
importlib.util.find_spec("transformers.models.auto.configuration_auto")  # looks, and loads nothing
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})).__name__)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "QuietStarForCausalLM\n", run.stderr


def test_the_language_model_of_a_full_one_loads_where_this_package_is_not(base, tmp_path):
    model = make(base)
    model.save_pretrained(tmp_path, model.tokenizer)
    code = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer;"
        f"folder = {str(tmp_path / 'language_model')!r};"
        "model = AutoModelForCausalLM.from_pretrained(folder);"
        "ids = AutoTokenizer.from_pretrained(folder)('two', return_tensors='pt').input_ids;"
        "print(type(model).__name__, model(ids).logits.sum().item(), 'quietstar' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    name, total, is_there = done.stdout.split()
    assert (name, is_there) == ("LlamaForCausalLM", "False")
    ids = model.tokenizer("two", return_tensors="pt").input_ids
    assert float(total) == pytest.approx(model.causal_lm(ids).logits.sum().item(), rel=1e-4)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_trainer_trains_saves_and_evaluates(method, base, tmp_path):
    model = make(base, method)
    tokenizer = model.tokenizer
    data = [tokenizer(f"{n} and {n} is {2 * n}, and so on") for n in range(24)]
    data = [{"input_ids": item.input_ids} for item in data]
    args = TrainingArguments(
        str(tmp_path / "out"), max_steps=3, per_device_train_batch_size=4, save_steps=3,
        gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=3, logging_steps=1,
        learning_rate=1e-2, report_to=[], use_cpu=True, gradient_checkpointing=True,
    )  # fmt: skip
    trainer = Trainer(
        model, args, DataCollatorForLanguageModeling(tokenizer, mlm=False), data, data[:8],
        processing_class=tokenizer,
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    moved = {name for name, p in model.named_parameters() if p.requires_grad}
    assert moved == {n for n in moved if not torch.equal(before[n], model.get_parameter(n))}
    figures = {key for record in trainer.state.log_history for key in record}
    assert {"loss", "eval_loss", "grad_norm"} <= figures
    assert trainer.predict(data[:8]).metrics["test_loss"] > 0
    trainer.save_model()  # beside its checkpoints
    saved, are_frozen = tmp_path / "out", method == "lora"
    with nullcontext() if not are_frozen else pytest.warns(UserWarning, match="trainable=True"):
        AutoModelForCausalLM.from_pretrained(saved).train()
    further = AutoModelForCausalLM.from_pretrained(saved, trainable=True).train()
    assert {name for name, p in further.named_parameters() if p.requires_grad} == moved
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-3"):
        again = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(again(texts_of(model)).logits, model.eval()(texts_of(model)).logits)
        assert len(AutoTokenizer.from_pretrained(folder)) == len(tokenizer)


def test_batches_that_trainer_accumulates_weigh_the_same_as_one(base, tmp_path):
    """Its loss is the mean over batches: what it would count are targets alone."""
    model = make(base)
    assert not Trainer(
        model, TrainingArguments(str(tmp_path), report_to=[])
    ).model_accepts_loss_kwargs


# --- Logits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_thoughts", [1, 3])
def test_logits_are_those_of_the_mixed_prediction(num_thoughts):
    loss = {} if num_thoughts > 1 else {"estimator": "no_baseline"}
    model = thinking_model(thoughts={"num_thoughts": num_thoughts}, loss=loss).eval()
    texts = random_texts()
    output = model(texts)
    assert output.logits.shape == (*texts.shape, 258)
    scores = model.score(texts, output.drawn)
    expected = scores.mixed_logprobs[:, :-1, :, 0].logsumexp(2) - math.log(num_thoughts)
    logprobs = output.logits[:, :-1].log_softmax(-1).gather(-1, texts[:, 1:, None])[..., 0]
    assert torch.allclose(logprobs, expected, atol=1e-5)
    for other in (model(texts, labels=texts), model.train()(texts)):
        assert other.logits is None
    assert model(texts, return_logits=True).logits.shape == output.logits.shape
    assert model.eval()(texts, return_logits=False).logits is None


def test_logits_without_thoughts_are_the_plain_models():
    model, texts = thinking_model().eval(), random_texts()
    assert torch.allclose(
        model(texts, think=False).logits, model.causal_lm(texts).logits, atol=1e-5
    )


def test_logits_behind_a_thought_reach_as_far_as_it_was_trained_to():
    model = thinking_model(thoughts={"positions": "answer_start", "lookahead": 3}).eval()
    texts = random_texts(2, 9)
    answers = torch.zeros(2, 9, dtype=torch.bool)
    answers[0, 4:] = True
    answers[1, 7:] = True
    output = model(texts, answers=answers)
    assert output.positions.tolist() == [[3], [6]]
    plain = model.score_plain(texts).logprobs
    logprobs = output.logits[:, :-1].log_softmax(-1).gather(-1, texts[:, 1:, None])[..., 0]
    both = model.score(texts, output.drawn, only_mixed=True).mixed_logprobs
    assert both.shape == (2, 1, 2, 3)  # two thoughts, averaged as probabilities
    mean = both.logsumexp(2) - math.log(2)
    assert torch.allclose(logprobs[0, 3:6], mean[0, 0], atol=1e-5)
    assert torch.allclose(logprobs[1, 6:8], mean[1, 0, :2], atol=1e-5)
    for row, places in ((0, [0, 1, 2, 6, 7]), (1, [0, 1, 2, 3, 4, 5])):
        assert torch.allclose(logprobs[row, places], plain[row, places], atol=1e-5)


# --- The hub --------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder that stands in for the hub."""
    place = tmp_path / "hub"

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, private=None, exist_ok=False):
            if repo_id == "me/forbidden":
                raise PermissionError(13, "403 Forbidden")
            return type("Url", (str,), {"repo_id": repo_id})(f"https://hub/{repo_id}")

        def upload_folder(self, *, repo_id, folder_path, revision, commit_message, ignore_patterns):
            ignore = shutil.ignore_patterns(*ignore_patterns)
            shutil.copytree(folder_path, place / repo_id, ignore=ignore)

    def download(repo_id, **more):
        if not (place / repo_id).exists():
            raise OSError(f"404: {repo_id}")
        return str(place / repo_id)

    def cached(repo_id, file, **more):
        return str(Path(download(repo_id)) / file)

    monkeypatch.setattr(saving, "HfApi", Api)
    monkeypatch.setattr(saving, "snapshot_download", download)
    monkeypatch.setattr(saving, "cached_file", cached)
    return place


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_model_goes_to_the_hub_and_comes_back(method, base, tmp_path, hub):
    model = make(base, method)
    assert model.push_to_hub("me/one") == "https://hub/me/one"
    model.save_pretrained(tmp_path / "saved", model.tokenizer, push_to_hub=True, repo_id="me/two")
    for name in ("me/one", "me/two"):
        again = QuietStarForCausalLM.from_pretrained(name)
        assert torch.equal(again(texts_of(model)).logits, model(texts_of(model)).logits)
        assert (hub / name / "README.md").exists()
        assert (hub / name / "tokenizer.json").exists()
    assert load_thinker("me/one", True, "auto", "").tuning.method == method
    with pytest.raises(UserError, match=r"me/forbidden.*403 Forbidden"):
        model.push_to_hub("me/forbidden")
    with pytest.raises(UserError, match=r"me/none: there is no such folder, and the hub"):
        QuietStarForCausalLM.from_pretrained("me/none")
    with pytest.raises(UserError, match=r"\(me/none\): there is no such folder, and no model"):
        load_thinker("me/none", True, "auto", "")


def test_arguments_that_mean_nothing_are_refused(base, tmp_path):
    model = make(base)
    with pytest.raises(UserError, match="save_pretrained: tokens: unknown argument"):
        model.save_pretrained(tmp_path, tokens=3)
    model.save_pretrained(tmp_path / "x", is_main_process=False)
    assert not (tmp_path / "x").exists()
    model.save_pretrained(tmp_path / "x", max_shard_size="8KB")
    assert len(list((tmp_path / "x" / "language_model").glob("*.safetensors"))) > 1
    with pytest.raises(UserError, match="from_pretrained: dtypes: unknown argument"):
        QuietStarForCausalLM.from_pretrained(tmp_path / "x", dtypes=3)
    with pytest.raises(UserError, match=r"from_config.*from_base"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "x"))


# --- Where weights lie ----------------------------------------------------------------------------


def test_layers_may_wait_on_the_disk(base, tmp_path):
    model, texts = make(base), random_texts(2, 9)
    model.save_pretrained(tmp_path / "model", model.tokenizer)
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
              "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    some = QuietStarForCausalLM.from_pretrained(tmp_path / "model", device_map=places)
    assert some.causal_lm.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    a, b = (think(m, texts, num_thoughts=2, temperature=1.0) for m in (model, some))
    assert torch.equal(a.tokens, b.tokens)
    assert torch.equal(a.mixed_logprobs, b.mixed_logprobs)
    assert torch.equal(*(m.generate(texts, max_new_tokens=3) for m in (model, some)))
    whole = QuietStarForCausalLM.from_pretrained(tmp_path / "model", device_map="auto")
    assert torch.equal(whole(texts).logits, model(texts).logits)
    assert not any(p.device.type == "meta" for p in whole.parameters())
    with pytest.raises(UserError, match="puts embeddings or output layer elsewhere"):
        QuietStarForCausalLM.from_pretrained(
            tmp_path / "model", device_map={**places, "lm_head": "disk"}
        )


def test_one_device_takes_what_thoughts_read_and_the_layers_that_fit(base):
    """Also where the output layer has weights of its own, which transformers' map moves away."""
    config = AutoConfig.from_pretrained(base, tie_word_embeddings=False, num_hidden_layers=5)
    config.dtype = torch.bfloat16
    whole = AutoModelForCausalLM.from_config(config)
    layer = sum(p.numel() for p in whole.model.layers[0].parameters())
    others = sum(p.numel() for p in whole.parameters()) - 5 * layer

    def places(device, memory):  # in numbers of layers
        room = {0: 2 * others + 2 * device * layer, "cpu": 2 * memory * layer}
        mapped = fill_device(config, "auto", room)
        layers = [mapped.pop(f"model.layers.{n}") for n in range(5)]
        assert set(mapped) == {"model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"}
        assert set(mapped.values()) == {0}
        return layers

    assert places(3, 9) == [0, 0, "cpu", "cpu", "cpu"]  # one waits for its turn
    assert places(3, 2) == [0, 0, "cpu", "cpu", "disk"]
    assert places(0, 0) == ["disk"] * 5
    assert fill_device(config, "auto", {0: 2 * others + 10 * layer, "cpu": 0}) == {"": 0}
    assert fill_device(config, torch.float32, {0: "1MB", "cpu": "1GiB"}) == {"": 0}
    assert fill_device(config, torch.float32, {"cpu": 4 * others + 8 * layer})["lm_head"] == "cpu"


@pytest.mark.parametrize("tuning", ["full", "lora", "prefix"])
def test_commands_run_models_whose_layers_wait_on_the_disk(
    tuning, base, tmp_path, monkeypatch, capsys
):
    model = make(base, tuning)
    model.save_pretrained(tmp_path / "model", model.tokenizer)
    layer, texts = model.causal_lm.model.layers[0], tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"{n} of them"}) + "\n" for n in range(3)))
    monkeypatch.chdir(tmp_path)
    added = ("lora", "virtual")
    size = sum(p.numel() * 4 for n, p in layer.named_parameters() if not any(a in n for a in added))
    call = ["eval", "--model", "model", "--tasks", str(texts), "--out"]
    assert quietstar([*call, "whole.json"]) == 0
    embedded = sum(p.numel() * 4 for p in model.causal_lm.parameters()) - 2 * size
    monkeypatch.setattr(
        "quietstar.backbone.devices.get_max_memory", lambda: {"cpu": (embedded + size) * 5 // 4}
    )
    loaded, load = [], scoring.load_thinker
    monkeypatch.setattr(
        scoring, "load_thinker", lambda *a, **kw: loaded.append(load(*a, **kw)) or loaded[-1]
    )
    assert quietstar([*call, "map.json", "--device-map", "auto"]) == 0
    assert any(p.device.type == "meta" for p in loaded[0].causal_lm.model.layers[1].parameters())
    a, b = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "map"))
    assert a["tasks"] == b["tasks"]


def test_adapters_that_read_weights_do_not_load_beside_layers_on_the_disk(base, tmp_path):
    make(base, "dora").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"device_map: DoRA reads .* Merge the adapters"):
        QuietStarForCausalLM.from_pretrained(tmp_path, device_map="auto", max_memory={"cpu": 9})


# --- The card -------------------------------------------------------------------------------------


def test_the_card_says_what_the_model_is_and_keeps_what_others_wrote(base, tmp_path):
    model = make(base, "lora", stop=["\n"], start_init="|")
    model.save_pretrained(tmp_path)
    path = tmp_path / card.CARD_FILE
    text = path.read_text()
    assert "| what was trained | lora |" in text
    assert "ended by '\\n'" in text
    assert "| their words | '\\|' ... '-' |" in text
    assert "No figures are known" in text
    assert "PEFT adapter of the base model" in text
    path.write_text("Mine.")
    model.save_pretrained(tmp_path)
    assert path.read_text() == "Mine."
    figures = {"gain": 0.25, "gain_of_content": 0.125, "accuracy_with_thoughts": 1}
    more = card.model_card(model, {"seed": "3"}, {"gain": -0.5}, figures, ["owner/data"])
    model.save_pretrained(tmp_path, card=more)
    text = path.read_text()
    assert "| gain of thinking, nats/token | -0.5000 | 0.2500 |" in text
    assert "| **gain of content**, nats/token |  | 0.1250 |" in text
    assert "- owner/data" in text
    model.configure(model.thoughts.model_copy(update={"positions": "answer_start"}))
    text = card.model_card(model, after=figures)
    assert "| gain of thinking, nats/token, first token of an answer |  | 0.2500 |" in text
    assert "| accuracy with thoughts |  | 1.0000 |" in text
