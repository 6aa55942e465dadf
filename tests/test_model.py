"""The model: saved is what is used, what trains moves, and mistakes end in clear errors."""

import json
import logging

import pytest
import torch
from tiny import (
    BYTES_VOCAB,
    GPT2,
    plain_model,
    random_texts,
    randomise_own_weights,
    think,
    thinking_model,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from quietstar import QuietStarForCausalLM
from quietstar.config import OptimConfig, ThoughtsConfig, TuningConfig
from quietstar.data import load_tokenizer
from quietstar.errors import UserError
from quietstar.training.optimizer import build_optimizer

OWN = ("start_embedding", "end_embedding", "mixing_head")


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    """A plain model with its tokenizer, as on the hub."""
    folder = tmp_path_factory.mktemp("base")
    plain_model().save_pretrained(folder)
    load_tokenizer("bytes").save_pretrained(folder)
    return folder


@torch.no_grad()
def shake(model):
    """Every parameter that trains takes a value that no initialisation would give it."""
    generator = torch.Generator().manual_seed(11)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def make(folder, method="full", **settings):
    return QuietStarForCausalLM.from_base(
        str(folder),
        thoughts=ThoughtsConfig(length=2, lookahead=2),
        tuning=TuningConfig(method=method, lora_r=2),
        **settings,
    )


def assert_thinks_the_same(model, other):
    texts = random_texts(2, 9)
    a, b = (think(m, texts, num_thoughts=2, temperature=1.0, seed=3) for m in (model, other))
    for name in ("tokens", "logprobs", "mixing_weight", "base_logprobs", "mixed_logprobs"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


# --- Saving and loading ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_saved_model_thinks_bit_for_bit_the_same(method, base_folder, tmp_path):
    model = make(base_folder, method)
    shake(model)
    model.save_pretrained(tmp_path / "saved")
    assert_thinks_the_same(model, QuietStarForCausalLM.from_pretrained(tmp_path / "saved"))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_learned_vectors_and_the_head_survive_saving(method, base_folder, tmp_path):
    """The published code writes the embedding of --- over both vectors after loading."""
    model = make(base_folder, method)
    randomise_own_weights(model)
    model.save_pretrained(tmp_path)
    loaded = dict(QuietStarForCausalLM.from_pretrained(tmp_path).named_parameters())
    own = [(n, p) for n, p in model.named_parameters() if n.startswith(OWN)]
    assert len(own) == 9  # two vectors, three layers with bias, one without
    for name, parameter in own:
        assert torch.equal(loaded[name], parameter), name


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_that_are_tied_or_not_survive_saving(tied, tmp_path):
    model = thinking_model(plain_model(tie_word_embeddings=tied))
    shake(model)
    model.save_pretrained(tmp_path)
    loaded = QuietStarForCausalLM.from_pretrained(tmp_path)
    embedding, head = (
        loaded.causal_lm.get_input_embeddings().weight,
        loaded.causal_lm.get_output_embeddings().weight,
    )
    assert (embedding is head) == tied
    assert_thinks_the_same(model, loaded)


def test_a_fully_tuned_folder_loads_as_a_plain_model_with_the_same_logits(base_folder, tmp_path):
    model = make(base_folder)
    shake(model)
    model.save_pretrained(tmp_path, load_tokenizer("bytes"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "language_model")
    assert type(plain).__name__ == "LlamaForCausalLM"
    assert len(AutoTokenizer.from_pretrained(tmp_path / "language_model")) == BYTES_VOCAB
    assert plain.config._attn_implementation != "quietstar"
    texts = random_texts(2, 9)
    with torch.no_grad():
        logits = plain(texts).logits
        assert (logits - model.causal_lm(texts).logits).abs().max() < 1e-5
    logprobs = logits[:, :-1].log_softmax(-1).gather(-1, texts[:, 1:, None]).squeeze(-1)
    base_logprobs = think(model, texts).base_logprobs[:, :-1, 0]
    assert (base_logprobs - logprobs).abs().max() < 1e-5


def test_a_lora_folder_holds_the_adapter_alone_and_names_its_base(base_folder, tmp_path):
    model = make(base_folder, "lora")
    shake(model)
    model.save_pretrained(tmp_path)
    names = {str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*") if f.is_file()}
    adapter = {f"language_model/adapter_{name}" for name in ("config.json", "model.safetensors")}
    own = {"quietstar.safetensors", "quietstar.json", "config.json", "README.md"}
    assert names == adapter | own
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size = sum(f.stat().st_size for f in tmp_path.rglob("*.safetensors"))
    assert size < 4 * trained + 20_000  # float32, and the headers
    for file in ("quietstar.json", "language_model/adapter_config.json"):
        settings = json.loads((tmp_path / file).read_text())
        assert settings["base_model_name_or_path"] == str(base_folder)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_saved_folders_hold_safetensors_and_text_only(method, base_folder, tmp_path):
    make(base_folder, method).save_pretrained(tmp_path, load_tokenizer("bytes"))
    endings = {f.suffix for f in tmp_path.rglob("*") if f.is_file()}
    assert endings <= {".safetensors", ".json", ".md"}


def test_adapters_train_on_only_when_asked_for(base_folder, tmp_path):
    make(base_folder, "lora").save_pretrained(tmp_path)
    for trainable in (False, True):
        loaded = QuietStarForCausalLM.from_pretrained(tmp_path, trainable=trainable)
        adapters = [p for n, p in loaded.named_parameters() if "lora_" in n]
        assert adapters
        assert all(p.requires_grad == trainable for p in adapters)


def test_sections_may_be_given_as_mappings(base_folder):
    model = QuietStarForCausalLM.from_base(
        str(base_folder), thoughts={"length": 3}, loss={"objective": "rlp"}, mixing_head={}
    )
    assert model.thoughts == ThoughtsConfig(length=3)
    assert type(model.objective).__name__ == "Rlp"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"thoughts": {"lenght": 3}}, "from_base: thoughts.lenght: unknown key; did you mean "
         "thoughts.length?"),
        ({"thoughts": {"length": "3"}}, "from_base: thoughts.length: '3' must be a valid integer; "
         "write it without quotes"),
        ({"thoughts": {"length": object}}, "from_base: thoughts.length: <class 'object'> must be a "
         "valid integer"),
        ({"loss": {"reward": "prop"}}, "from_base: loss.reward: prop: there is none of this name; "
         "did you mean prob?"),
        ({"lenght": 3}, "from_base: lenght: unknown argument; did you mean thoughts.length?"),
        ({"num_generations": 3}, "from_base: num_generations: unknown argument; here it is "
         "thoughts.num_thoughts"),
    ],
)  # fmt: skip
def test_wrong_arguments_of_from_base_are_named(base_folder, arguments, expected):
    with pytest.raises(UserError) as error:
        QuietStarForCausalLM.from_base(str(base_folder), **arguments)
    assert str(error.value).startswith(expected)


def test_a_plain_folder_is_refused_with_the_way_to_load_it(base_folder):
    with pytest.raises(UserError, match="from_base") as error:
        QuietStarForCausalLM.from_pretrained(base_folder)
    assert str(base_folder) in str(error.value)


def test_a_newer_format_is_refused(base_folder, tmp_path):
    make(base_folder).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "quietstar.json").read_text())
    (tmp_path / "quietstar.json").write_text(json.dumps(settings | {"format_version": 99}))
    with pytest.raises(UserError, match="99"):
        QuietStarForCausalLM.from_pretrained(tmp_path)


# --- What trains ----------------------------------------------------------------------------------


def step(model, texts):
    optimizer = build_optimizer(model, OptimConfig(learning_rate=0.01))
    model(texts).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_every_trainable_parameter_moves_and_no_frozen_one(method, base_folder):
    model = make(base_folder, method)
    shake(model)  # the mixing head's last layer and the adapters' second matrices start at zero
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    step(model, random_texts(4, 9))
    for name, parameter in model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == parameter.requires_grad, name
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    base = {n for n in before if n.startswith("language_model.") and "lora_" not in n}
    assert frozen == (base if method == "lora" else set())
    assert any("lora_" in name for name in before) == (method == "lora")


def test_a_new_mixing_head_leaves_its_zero_within_two_steps(base_folder):
    model = make(base_folder)
    before = {n: p.detach().clone() for n, p in model.mixing_head.named_parameters()}
    assert not before["last_layer.weight"].any()
    for _ in range(2):
        step(model, random_texts(4, 9))
    for name, parameter in model.mixing_head.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_every_new_mixing_weight_is_the_initial_one(base_folder):
    weights = think(make(base_folder), random_texts()).mixing_weight
    assert torch.allclose(weights, torch.tensor(0.12))


# --- Loading a base -------------------------------------------------------------------------------


@pytest.mark.parametrize("loaded", [True, False])
def test_dropout_is_set_to_zero_and_that_is_said(loaded, tmp_path, caplog):
    base = plain_model(GPT2, embd_pdrop=0.5)
    assert base.config.resid_pdrop == 0.1
    base.save_pretrained(tmp_path)
    load_tokenizer("bytes").save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        model = thinking_model(base) if loaded else make(tmp_path)
    assert "dropout is set to 0" in caplog.text
    assert "resid_pdrop" in caplog.text
    rates = {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}
    assert rates == {0.0}
    texts = random_texts()
    losses = {model.train()(texts, sample_ids=torch.arange(2)).loss.item() for _ in range(2)}
    assert losses == {model.eval()(texts, sample_ids=torch.arange(2)).loss.item()}


def test_dropout_inside_attention_is_set_to_zero_in_a_loaded_model():
    model = thinking_model(plain_model(attention_dropout=0.5)).train()
    assert model(random_texts()).loss.isfinite()  # the attention function refuses dropout


def test_markers_have_a_vector_for_every_token_of_their_text():
    base = plain_model()
    model = thinking_model(base, randomise=False, thoughts={"start_init": "abc", "end_init": "z"})
    embeddings = base.get_input_embeddings().weight
    assert torch.equal(model.start_embedding, embeddings[list(b"abc")])
    assert torch.equal(model.end_embedding, embeddings[ord("z")])
    assert len(model.start_vectors) == 3
    assert len(model.end_vectors) == 1
    assert model.block_length == 3 + 2 + 1 + 1


def test_markers_that_do_not_train_are_tokens_of_the_model(tmp_path):
    markers = {"start_init": "abc", "end_init": "yz"}
    model, twin = (
        thinking_model(randomise=False, thoughts={**markers, "train_markers": trains})
        for trains in (False, True)
    )
    texts = random_texts()
    output = model(texts)
    assert torch.equal(output.loss, twin(texts).loss)
    output.loss.backward()
    assert model.start_embedding.grad is None
    assert not model.end_embedding.requires_grad
    weight = model.causal_lm.get_input_embeddings().weight
    with torch.no_grad():
        weight.mul_(1.5)
    assert torch.equal(model.start_vectors, weight[list(b"abc")])
    model.save_pretrained(tmp_path, model.tokenizer)
    loaded = QuietStarForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.end_vectors, weight[list(b"yz")])
    assert torch.equal(loaded(texts).loss, model.eval()(texts).loss)
    with pytest.raises(
        UserError, match=r"thoughts.start_init \('q'\): has 1 tokens, but the model"
    ):
        model.configure(model.thoughts.model_copy(update={"start_init": "q"}))


def test_folders_with_one_vector_for_a_text_of_several_tokens_load(tmp_path):
    model = thinking_model()
    model.configure(model.thoughts.model_copy(update={"start_init": "abc", "end_init": "xyz"}))
    model.save_pretrained(tmp_path, model.tokenizer)
    loaded = QuietStarForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.start_embedding, model.start_embedding)
    assert len(loaded.start_vectors) == len(loaded.end_vectors) == 1


def test_a_vocabulary_larger_than_the_tokenizer_is_fine_and_a_smaller_one_is_refused():
    model = thinking_model(plain_model(vocab_size=BYTES_VOCAB + 6))
    assert model(random_texts()).loss.isfinite()
    assert model.vocab_size == BYTES_VOCAB
    with pytest.raises(UserError, match=f"{BYTES_VOCAB} rows .* has 100"):
        thinking_model(plain_model(vocab_size=100))


def test_bfloat16_weights_run_and_survive_saving(tmp_path, base_folder):
    model = make(base_folder, dtype=torch.bfloat16)
    assert model.causal_lm.dtype == torch.bfloat16
    assert model.start_embedding.dtype == torch.float32
    output = model(random_texts())
    output.loss.backward()
    assert output.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    model.save_pretrained(tmp_path)
    loaded = QuietStarForCausalLM.from_pretrained(tmp_path)
    assert loaded.causal_lm.dtype == torch.bfloat16
    assert_thinks_the_same(model, loaded)


# --- Calling --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return thinking_model()


def test_labels_default_to_all_real_tokens(model):
    texts, ids = random_texts(), torch.arange(2)
    mask = torch.ones_like(texts)
    mask[1, 6:] = 0
    labels = texts.where(mask.bool(), -100)
    by_mask = model(texts, attention_mask=mask, sample_ids=ids)
    by_labels = model(texts, labels=labels, sample_ids=ids)
    both = model(texts, attention_mask=mask, labels=texts, sample_ids=ids)
    plain = model(texts, sample_ids=ids)
    assert by_mask.loss.item() == by_labels.loss.item() == both.loss.item()
    assert plain.loss.item() != by_mask.loss.item()
    counts = {name: o.metrics.sums["base_nll"][1].item()
              for name, o in (("mask", by_mask), ("plain", plain))}  # fmt: skip
    assert counts == {"mask": 8 + 5, "plain": 8 + 8}  # a text of n tokens has n - 1 targets


def test_ignored_labels_are_no_targets(model):
    texts = random_texts()
    labels = texts.clone()
    labels[:, 4] = -100
    thoughts = think(model, texts, labels=labels)
    valid = torch.ones(2, 9, 2, dtype=torch.bool)
    valid[:, 3, 0] = valid[:, 2, 1] = False  # x_4 is one ahead of 3 and two ahead of 2
    valid[:, 8, 0] = valid[:, 7:, 1] = False  # beyond the end
    assert torch.equal(thoughts.valid, valid)
    for name in ("mixed_logprobs", "thought_logprobs"):
        assert not getattr(thoughts, name)[:, :, 0][~valid].any(), name
    assert not thoughts.base_logprobs[~valid].any()
    assert model(texts, labels=torch.full_like(texts, -100)).loss == 0


def test_a_seed_and_sample_ids_fix_the_thoughts(model):
    texts, ids = random_texts(), torch.tensor([7, 8])
    first = model(texts, sample_ids=ids, seed=5)
    assert torch.equal(first.thoughts, model(texts, sample_ids=ids, seed=5).thoughts)
    assert not torch.equal(first.thoughts, model(texts, sample_ids=ids, seed=6).thoughts)
    assert not torch.equal(first.thoughts, model(texts, sample_ids=ids + 2, seed=5).thoughts)
    assert not torch.equal(model(texts).thoughts, model(texts).thoughts)  # calls are counted


def test_given_thoughts_are_scored_as_they_are(model):
    texts = random_texts()
    own = think(model, texts, num_thoughts=2, temperature=1.0)
    again = model.score(texts, own.tokens)
    assert torch.equal(again.tokens, own.tokens)
    assert torch.equal(again.mixed_logprobs, own.mixed_logprobs)


def test_a_fixed_mixing_weight_replaces_the_heads(model):
    texts, ids = random_texts(), torch.arange(2)
    for weight in (0.0, 0.5):
        output = model(texts, sample_ids=ids, fixed_mixing_weight=weight)
        means = output.metrics.means()
        assert means["mixing_weight"] == weight
        if weight == 0:
            assert means["gain"] == pytest.approx(0, abs=1e-6)
    output.loss.backward()
    head = model.mixing_head
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())
    model.zero_grad()


def test_padding_on_the_left_is_refused(model):
    texts = random_texts()
    mask = torch.ones_like(texts)
    mask[1, :2] = 0
    for call in (model, model.draw):
        with pytest.raises(ValueError, match="padded on the right"):
            call(texts, attention_mask=mask)


def test_a_text_too_long_is_refused_with_the_numbers(model):
    longest = 64 - 2 - 2 - 1  # positions - T - A - 1
    assert model.max_text_length == longest
    assert model(random_texts(1, longest)).loss.isfinite()
    for call in (model, model.draw):
        with pytest.raises(ValueError, match=rf"of {longest + 1} tokens.*at most {longest}"):
            call(random_texts(1, longest + 1))
