"""Damaged and hostile model folders: a working model or one line, and nothing of theirs runs."""

import json
import os
import shutil
import signal

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import GPT2, LLAMA, plain_model, random_texts, thinking_model

from quietstar import QuietStarForCausalLM
from quietstar.backbone.loading import load_base
from quietstar.config import MixingHeadConfig, ThoughtsConfig, TuningConfig
from quietstar.data import load_tokenizer
from quietstar.errors import UserError
from quietstar.evaluation.scoring import fingerprint, load_thinker
from quietstar.judging.reward_model import RewardModel
from quietstar.model.merging import merge

WEIGHTS, OWN, SETTINGS = "model.safetensors", "quietstar.safetensors", "quietstar.json"
WITHIN = "language_model"
MODEL = f"{WITHIN}/{WEIGHTS}"
ADAPTER, ADAPTERS = f"{WITHIN}/adapter_config.json", f"{WITHIN}/adapter_model.safetensors"
THOUGHTS, HEAD = ThoughtsConfig().model_dump(), MixingHeadConfig().model_dump()
TUNING = TuningConfig().model_dump()


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A plain model, and saved ones: tuned as a whole, with adapters, with virtual tokens."""
    folder = tmp_path_factory.mktemp("saved")
    tokenizer = load_tokenizer("bytes")
    plain_model().save_pretrained(folder / "plain")
    tokenizer.save_pretrained(folder / "plain")
    for name, method in (("full", "full"), ("lora", "lora"), ("prompt", "prompt")):
        base = QuietStarForCausalLM.from_base(
            str(folder / "plain"), tuning=TuningConfig(method=method, lora_r=2)
        )
        base.save_pretrained(folder / name, tokenizer)
    return folder


def linked(source, folder):
    """A copy whose files may be replaced, but not changed in place."""
    shutil.copytree(source, folder, copy_function=os.link)
    return folder


def put(path, content):
    """Replace a file, which may be a link to the original."""
    path.unlink(missing_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def change(path, **fields):
    put(path, json.dumps({**json.loads(path.read_text(encoding="utf-8")), **fields}))


def retensor(path, **changes):
    """Change tensors by name (with __ for the dots); None removes one."""
    tensors = load_file(path)
    for name, value in changes.items():
        name = next(key for key in tensors if key.replace(".", "__").endswith(name))
        old = tensors.pop(name)
        if value is not None:
            tensors[name] = value(old)
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})


def load(folder):
    return QuietStarForCausalLM.from_pretrained(folder)


def refused(call, *words):
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700, message
    for word in words:
        assert word in message, message


def works_or_is_refused(call):
    message = ""
    try:
        call()
    except UserError as problem:
        message = str(problem)
    assert "\n" not in message


def filled(value):
    return lambda old: torch.full_like(old, value)


# --- quietstar.json -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "3", '"text"', b"\xff\xfe\x00", "[" * 100_000, "{}", '{"a": 1}',
     '{"format_version": "3"}', '{"format_version": 0}', '{"format_version": true}',
     '{"format_version": 1}', '{"format_version": 2, "thoughts": []}', "1" * 5000],
)  # fmt: skip
def test_settings_that_are_no_settings_are_refused(content, saved, tmp_path):
    folder = linked(saved / "full", tmp_path / "model")
    put(folder / SETTINGS, content)
    refused(lambda: load(folder), SETTINGS)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"format_version": 99}, "99 is newer"),
        ({"vocab_size": 0}, "vocab_size (0): Input should be greater than 0"),
        ({"vocab_size": -5}, "vocab_size"),
        ({"vocab_size": 10**6}, "vocab_size (1000000): must be at most 258"),
        ({"vocab_size": "258"}, "vocab_size"),
        ({"vocab_size": None}, "vocab_size"),
        ({"vocab_size": float("nan")}, "vocab_size"),
        ({"vocab_size": True}, "vocab_size"),
        ({"pause_token_id": 258}, "pause_token_id (258): must be at most 257"),
        ({"pause_token_id": -1}, "pause_token_id"),
        ({"dtype": "nn"}, "dtype"),
        ({"dtype": "int8"}, "dtype"),
        ({"texts_seen": 10**30}, "texts_seen"),
        ({"tuning": {"method": "magic"}}, "tuning.method"),
        ({"tuning": "full"}, "tuning"),
        ({"thoughts": {"length": 0}}, "thoughts.length"),
        ({"thoughts": {**THOUGHTS, "sampler": "no_such"}}, "thoughts.sampler"),
        ({"thoughts": {"length": 2}}, "thoughts.end_init: Field required"),
        ({"mixing_head": {}}, "mixing_head.floor: Field required"),
        ({"tuning": {"method": "full"}}, "tuning.lora_alpha: Field required"),
        ({"tuning": {**TUNING, "options": {"rank": 4}}}, "rank"),
        (
            {"tuning": {**TUNING, "method": "prompt", "options": {"num_virtual_tokens": 10**9}}},
            "num_virtual_tokens",
        ),
        ({"more": 1}, "more"),
    ],
)
def test_a_wrong_setting_is_named(fields, words, saved, tmp_path):
    folder = linked(saved / "full", tmp_path / "model")
    change(folder / SETTINGS, **fields)
    refused(lambda: load(folder), words)


@pytest.mark.parametrize("version", [1, 3])
def test_settings_that_a_format_did_not_have_may_be_missing(version, saved, tmp_path):
    folder = linked(saved / "full", tmp_path / "model")
    new = {"stop", "train_markers", "top_p", "top_k", "pattern"}
    new |= {"sampler", "positions", "position_fraction"} if version == 1 else set()
    thoughts = ThoughtsConfig(length=2).model_dump(exclude=new)
    content = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    for path in list((folder / WITHIN).iterdir()):  # where these formats had it
        path.replace(folder / path.name)
    (folder / WITHIN).rmdir()
    if version == 1:
        del content["tuning"]
    put(folder / SETTINGS, json.dumps(content | {"format_version": version, "thoughts": thoughts}))
    assert load(folder).thoughts == ThoughtsConfig(length=2)


def test_a_sampler_that_a_folder_names_is_not_imported(saved, tmp_path, monkeypatch):
    folder = linked(saved / "full", tmp_path / "model")
    (folder / "evil_sampler.py").write_text(
        "open('canary', 'w')\nclass Mine:\n def sample(self, model, texts, positions, spec): ...\n"
    )
    monkeypatch.chdir(folder)
    change(folder / SETTINGS, thoughts={**THOUGHTS, "sampler": "evil_sampler:Mine"})
    refused(lambda: load(folder), "evil_sampler:Mine", "trust_remote_code")
    assert not (folder / "canary").exists()
    assert QuietStarForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert (folder / "canary").exists()


@pytest.mark.parametrize("name", [SETTINGS, OWN, f"{WITHIN}/config.json", f"{WITHIN}/{WEIGHTS}"])
@pytest.mark.parametrize("kind", ["missing", "folder", "cut", "empty", "binary"])
def test_a_damaged_file_is_refused(name, kind, saved, tmp_path):
    folder = linked(saved / "full", tmp_path / "model")
    path = folder / name
    content = path.read_bytes()
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes(
            {"cut": content[: len(content) // 2], "empty": b"", "binary": b"\x80\0"}[kind]
        )
    refused(lambda: load(folder), str(folder))


@pytest.mark.parametrize(
    ("call", "model"),
    [(load, "full"), (load, "lora"), (lambda folder: load_base(str(folder)), "plain"),
     (lambda folder: load_tokenizer(str(folder)), "plain"),
     (lambda folder: RewardModel.load(str(folder)), "plain")],
    ids=["full", "lora", "base", "tokenizer", "reward-model"],
)  # fmt: skip
def test_a_pipe_among_the_files_of_a_model_is_told_at_once(call, model, saved, tmp_path):
    def stop(number, frame):
        raise AssertionError("it waits for the pipe")

    handler = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    try:
        for number, path in enumerate(sorted((saved / model).rglob("*.*"))):
            folder = linked(saved / model, tmp_path / str(number))
            pipe = folder / path.relative_to(saved / model)
            pipe.unlink()
            os.mkfifo(pipe)
            refused(lambda folder=folder: call(folder), f"{pipe}: ", "a pipe, a socket or a device")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in (ADAPTER, ADAPTERS, OWN)
     for kind in ("missing", "folder", "cut", "empty", "binary", "list")],
)  # fmt: skip
def test_a_damaged_adapter_is_refused(name, kind, saved, tmp_path):
    folder = linked(saved / "lora", tmp_path / "model")
    path = folder / name
    content = path.read_bytes()
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        half = content[: len(content) // 2]
        path.write_bytes({"cut": half, "empty": b"", "binary": b"\x80\0", "list": b"[]"}[kind])
    refused(lambda: load(folder), str(folder))


# --- Weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "file", "changes", "words"),
    [
        ("full", OWN, {"end_embedding": None}, ("missing ['end_embedding']",)),
        ("full", OWN, {"start_embedding": lambda x: x[:1]}, ("size mismatch",)),
        ("full", OWN, {"start_embedding": lambda x: x.int()}, ("start_embedding", "int32")),
        ("full", OWN, {"start_embedding": filled(torch.nan)}, ("start_embedding", "not finite")),
        ("prompt", OWN, {"virtual_tokens__embeddings": None}, ("virtual_tokens.embeddings",)),
        ("full", MODEL, {"layers__1__mlp__up_proj__weight": None}, ("lack 1 of", "up_proj")),
        ("full", MODEL, {"layers__1__mlp__up_proj__weight": lambda x: x[:1].clone()},
         ("up_proj", "(1, 16)", "(24, 16)")),
        ("full", MODEL, {"lm_head__weight": filled(torch.nan)}, ("lm_head.weight", "not finite")),
        ("full", MODEL, {"lm_head__weight": filled(-torch.inf)}, ("lm_head.weight",)),
        ("full", MODEL, {"lm_head__weight": lambda x: x.long()}, ("lm_head.weight", "I64")),
        ("full", MODEL, {"lm_head__weight": lambda x: x > 0}, ("lm_head.weight", "BOOL")),
        ("full", MODEL, {"lm_head__weight": lambda x: x + 0j}, ("lm_head.weight", "C64")),
        ("lora", ADAPTERS, {"q_proj__lora_A__weight": None}, ("lacks 2",)),
        ("lora", ADAPTERS, {"q_proj__lora_A__weight": filled(torch.inf)},
         ("lora_A", "not finite")),
        ("lora", ADAPTERS, {"q_proj__lora_A__weight": lambda x: x[:1].clone()},
         ("mismatch",)),
    ],
)  # fmt: skip
def test_weights_that_are_missing_or_wrong_are_named(model, file, changes, words, saved, tmp_path):
    folder = linked(saved / model, tmp_path / "model")
    if words == ("lacks 2",):
        retensor(folder / file, **changes)
    retensor(folder / file, **changes)
    refused(lambda: load(folder), *words)


def test_adapters_that_no_layer_gets_are_refused(saved, tmp_path):
    folder = linked(saved / "lora", tmp_path / "model")
    file, words = folder / ADAPTERS, "are no part of the model"
    tensors = load_file(file)
    change(folder / ADAPTER, target_modules=["q_proj"])
    refused(lambda: load(folder), f"{len(tensors) - 4} of its tensors {words}")
    folder = linked(saved / "lora", tmp_path / "other")
    (folder / ADAPTERS).unlink()
    save_file({**tensors, "extra": torch.ones(2)}, folder / ADAPTERS)
    refused(lambda: load(folder), f"1 of its tensors {words}", "extra")


def test_adapters_of_the_output_layer_are_loaded_with_it(saved, tmp_path):
    """PEFT saves that layer's own weights beside them."""
    tuning = TuningConfig(method="lora", lora_r=2, lora_target_modules=["q_proj", "lm_head"])
    model = QuietStarForCausalLM.from_base(str(saved / "plain"), tuning=tuning)
    model.save_pretrained(tmp_path / "model")
    assert load(tmp_path / "model").tuning == tuning


def test_a_base_without_some_layers_is_refused_and_more_layers_are_told(saved, tmp_path, caplog):
    folder = linked(saved / "plain", tmp_path / "base")
    change(folder / "config.json", num_hidden_layers=3)
    refused(lambda: load_base(str(folder)), "lack", "model.layers.2.")
    change(folder / "config.json", num_hidden_layers=1)
    assert load_base(str(folder)).config.num_hidden_layers == 1
    assert "are not used" in caplog.text


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shape", [LLAMA, GPT2])
def test_tied_weights_and_buffers_are_not_missing(shape, tied, tmp_path):
    plain_model(shape, tie_word_embeddings=tied).save_pretrained(tmp_path)
    assert load_base(str(tmp_path))
    assert load_base(str(tmp_path), dtype="stored")


def test_a_saved_model_has_no_more_weights_than_its_config(saved, tmp_path):
    folder = linked(saved / "full", tmp_path / "model")
    config = folder / WITHIN / "config.json"
    layers = json.loads(config.read_text())["num_hidden_layers"]
    change(config, num_hidden_layers=layers - 1)
    refused(lambda: load(folder), "tensors in its files are no part of the model by config.json")


def test_weights_of_bitsandbytes_are_refused(saved, tmp_path):
    folder = linked(saved / "plain", tmp_path / "base")
    for method in ({"load_in_8bit": True}, {"quant_method": "bitsandbytes", "load_in_4bit": True}):
        change(folder / "config.json", quantization_config=method)
        refused(lambda: load_base(str(folder)), "quantized by bitsandbytes")


def test_shards_outside_the_folder_are_not_read(saved, tmp_path):
    folder = linked(saved / "plain", tmp_path / "base")
    (folder / WEIGHTS).rename(tmp_path / "outside.safetensors")
    names = load_file(tmp_path / "outside.safetensors")
    for outside in ("../outside.safetensors", str(tmp_path / "outside.safetensors")):
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, outside)}
        put(folder / "model.safetensors.index.json", json.dumps(index))
        refused(lambda: load_base(str(folder)), "outside.safetensors", "no file of its folder")


def test_a_config_larger_than_its_weights_is_refused_before_memory_is_taken(saved, tmp_path):
    folder = linked(saved / "plain", tmp_path / "base")
    change(folder / "config.json", hidden_size=2**16, intermediate_size=2**18, head_dim=2**10)
    refused(lambda: load_base(str(folder)), "more than its safetensors files can hold")


# --- config.json and model.config -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"num_key_value_heads": 3},
            ("num_key_value_heads is 3", "must divide"),
        ),
        ({"num_attention_heads": 2, "num_key_value_heads": 4}, ("num_key_value_heads is 4",)),
        ({"num_hidden_layers": 0}, ("num_hidden_layers is 0",)),
        ({"num_hidden_layers": -1}, ("num_hidden_layers is -1",)),
        ({"num_hidden_layers": 10**6}, ("num_hidden_layers is 1000000", "from 1 to 1000")),
        ({"hidden_size": 0}, ("hidden_size is 0",)),
        ({"num_attention_heads": 0}, ("model.config",)),
        ({"max_position_embeddings": 10**8}, ("max_position_embeddings is 100000000",)),
        (
            {
                "hidden_size": 2**17,
                "num_attention_heads": 128,
                "num_key_value_heads": 128,
                "intermediate_size": 2**20,
            },
            ("GiB of memory",),
        ),
        ({"vocab_size": 10**12}, ("vocab_size",)),
        ({"hidden_size": "16"}, ("hidden_size",)),
        ({"rms_norm_eps": float("nan")}, ("rms_norm_eps is nan",)),
        ({"hidden_act": "no_such"}, ("no_such",)),
        ({"hiden_size": 64}, ("hiden_size (64)", "Did you mean hidden_size?")),
        ({"nosuchfield": 1}, ("nosuchfield (1)", "no field of LlamaConfig")),
        ({"n_layer": 2}, ("n_layer (2)",)),
        ({"head_dim": 2**20}, ("head_dim is 1048576",)),
        ({"auto_map": {"AutoConfig": "evil.Evil"}}, ("auto_map", "must be left out")),
        ({"quantization_config": {}}, ("quantization_config", "must be left out")),
        ({"_attn_implementation": "someone/kernel"}, ("_attn_implementation",)),
        ({"model_type": "lama"}, ("model_type (lama)", "Did you mean llama?")),
        ({"model_type": None}, ("model_type",)),
        ({"model_type": "t5"}, ("T5Config",)),
    ],
)
def test_a_config_that_cannot_be_built_is_refused(fields, words):
    config = {**LLAMA, **fields}
    if fields.get("model_type") == "t5":
        config = fields
    refused(lambda: load_base(None, config, vocab_size=258), "model.config", *words)


def test_fields_by_their_other_names_are_taken():
    for config in (GPT2, {**GPT2, "architectures": ["X"], "torch_dtype": "float32"},
                   {**LLAMA, "rope_theta": 1e4, "use_cache": True},
                   {"model_type": "gpt2", "hidden_size": 16, "num_hidden_layers": 1,
                    "num_attention_heads": 2, "max_position_embeddings": 32}):  # fmt: skip
        model = load_base(None, config, vocab_size=258)
        assert model.config.hidden_size == 16


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "null", b"\xff", "[" * 100_000])
def test_a_base_with_a_damaged_config_is_refused(name, content, saved, tmp_path):
    folder = linked(saved / "plain", tmp_path / "base")
    put(folder / name, content)
    refused(lambda: load_base(str(folder)), str(folder))


@pytest.mark.parametrize(
    "fields", [{"eos_token_id": "x"}, {"suppress_tokens": ["a"]}, {"repetition_penalty": "x"},
               {"max_time": "soon"}, {"bad_words_ids": 3}, {"suppress_tokens": [*range(258)]}]
)  # fmt: skip
def test_a_generation_config_that_cannot_generate_is_refused(fields, saved, tmp_path):
    folder = linked(saved / "plain", tmp_path / "base")
    change(folder / "generation_config.json", **fields)
    refused(lambda: load_base(str(folder)), "generation_config.json")


def test_a_contradictory_generation_config_does_not_stop_a_model_from_being_saved(saved, tmp_path):
    """transformers refuses to write sampling settings without do_sample: after days of training."""
    folder = linked(saved / "plain", tmp_path / "base")
    change(folder / "generation_config.json", temperature=0.5, top_p=0.6, eos_token_id=7)
    model = QuietStarForCausalLM.from_base(str(folder))
    model.save_pretrained(tmp_path / "model")
    assert load(tmp_path / "model").causal_lm.generation_config.eos_token_id == 7


# --- Code -----------------------------------------------------------------------------------------

EVIL = """
from pathlib import Path
Path(__file__).with_name("canary").touch()
Path("{canary}").touch()
from transformers import PreTrainedConfig, PreTrainedTokenizerFast
class Evil(PreTrainedConfig):
    model_type = "evil"
class EvilTokenizer(PreTrainedTokenizerFast): ...
"""


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A file that hostile code would make; whoever asks on stdin whether to run it hears yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    yield tmp_path / "canary"
    assert not (tmp_path / "canary").exists()


def test_code_in_a_model_folder_is_not_run(saved, tmp_path, canary):
    folder = linked(saved / "plain", tmp_path / "base")
    (folder / "evil.py").write_text(EVIL.replace("{canary}", str(canary)), encoding="utf-8")
    change(folder / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Evil"})
    refused(lambda: load_base(str(folder)), "auto_map", "model.trust_remote_code")
    refused(lambda: load_thinker(str(folder), False, "auto", ""), "trust_remote_code")


def test_code_of_a_tokenizer_is_not_run(saved, tmp_path, canary):
    folder = linked(saved / "plain", tmp_path / "base")
    (folder / "evil.py").write_text(EVIL.replace("{canary}", str(canary)), encoding="utf-8")
    change(folder / "tokenizer_config.json", tokenizer_class="EvilTokenizer",
           auto_map={"AutoTokenizer": ["evil.EvilTokenizer", None]})  # fmt: skip
    refused(lambda: load_tokenizer(str(folder)), "trust_remote_code")


def test_a_config_cannot_ask_for_a_kernel_of_the_hub(saved, tmp_path):
    folder = linked(saved / "plain", tmp_path / "base")
    change(folder / "config.json", attn_implementation="someone/kernel")
    assert load_base(str(folder)).config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "fields",
    [
        {"megatron_config": {"a": 1}, "megatron_core": "antigravity"},
        {"auto_mapping": {"parent_library": "antigravity", "base_model_class": "x"}},
        {"target_modules": "(a+)+$"},
        {"rank_pattern": {"(a+)+$": 3}},
        {"peft_type": "IA3"},
        {"peft_type": "XLORA"},
        {"peft_type": None},
        {"r": 3},
        {"lora_alpha": 1e308},
        {"lora_alpha": "x"},
        {"lora_dropout": 0.5},
        {"use_dora": True},
    ],
)
def test_adapter_settings_that_are_not_ours_are_refused(fields, saved, tmp_path):
    folder = linked(saved / "lora", tmp_path / "model")
    change(folder / ADAPTER, **fields)
    refused(lambda: load(folder), "adapter_config.json", next(iter(fields)))


def test_pickled_adapters_are_not_read(saved, tmp_path):
    folder = linked(saved / "lora", tmp_path / "model")
    tensors = load_file(folder / ADAPTERS)
    (folder / ADAPTERS).unlink()
    torch.save(tensors, (folder / ADAPTERS).with_suffix(".bin"))
    refused(lambda: load(folder), "adapter_model.safetensors", "missing")


def test_adapters_beside_a_whole_model_are_refused(saved, tmp_path):
    folder = linked(saved / "full", tmp_path / "model")
    shutil.copy(saved / "lora" / ADAPTER, folder / WITHIN)
    refused(lambda: load(folder), "holds a PEFT adapter")


def test_an_adapter_without_its_base_says_which(saved, tmp_path):
    folder = linked(saved / "lora", tmp_path / "model")
    change(folder / SETTINGS, base_model_name_or_path=str(tmp_path / "gone"))
    refused(lambda: load(folder), str(tmp_path / "gone"))
    change(folder / SETTINGS, base_model_name_or_path="")
    refused(lambda: load(folder), "names no model")


# --- Saving ---------------------------------------------------------------------------------------


def test_a_failed_save_leaves_the_earlier_model(saved, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    model = load(saved / "full")
    model.save_pretrained(folder, load_tokenizer("bytes"))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    model.texts_seen = 7

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("quietstar.model.saving.save_file", full_disk)
    refused(lambda: model.save_pretrained(folder), "No space left", str(folder))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_save_replaces_a_model_whole_and_keeps_the_files_of_others(saved, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(saved / "lora", folder)
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    (folder / "figures").mkdir()
    (folder / "figures" / "a.json").write_text("{}", encoding="utf-8")
    for name in ("gate.json", "gate.safetensors"):  # of version 0.1.0
        (folder / name).touch()
    model = load(saved / "full")
    model.save_pretrained(folder)
    names = {path.name for path in folder.iterdir()}
    assert {"notes.txt", "figures", WITHIN, "tokenizer.json"} <= names
    assert not list(folder.glob("gate.*"))
    assert not list(folder.rglob("adapter_*"))
    assert (folder / "figures" / "a.json").read_text(encoding="utf-8") == "{}"
    assert load(folder)


def test_a_folder_of_something_else_is_not_replaced(saved, tmp_path, monkeypatch):
    model = load(saved / "full")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("all of it", encoding="utf-8")
    refused(lambda: model.save_pretrained(tmp_path / "mine"), "already holds something")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    (tmp_path / "file").touch()
    for name in ("link", "file"):
        refused(lambda name=name: model.save_pretrained(tmp_path / name), "is no folder")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    refused(lambda: model.save_pretrained("."), "working directory")


def test_saved_files_have_the_permissions_that_the_umask_asks_for(saved, tmp_path):
    before = os.umask(0o022)
    try:
        load(saved / "lora").save_pretrained(tmp_path / "model", load_tokenizer("bytes"))
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "model").rglob("*.*")} == {0o644}


@pytest.mark.parametrize("name", ["start_embedding", "language_model.lm_head.weight"])
def test_weights_that_are_not_finite_are_not_saved(name, saved, tmp_path):
    model = load(saved / "full")
    with torch.no_grad():
        dict(model.named_parameters())[name].view(-1)[3] = torch.nan
    refused(lambda: model.save_pretrained(tmp_path / "model"), name, "not finite")
    assert not (tmp_path / "model").exists()


def test_a_merge_that_lacks_something_writes_nothing(saved, tmp_path):
    folder = linked(saved / "lora", tmp_path / "model")
    retensor(folder / OWN, end_embedding=None)
    refused(lambda: merge(folder, tmp_path / "out"), "missing ['end_embedding']")
    assert not (tmp_path / "out").exists()


def test_where_a_merge_may_not_write_is_told_before_anything_is_loaded(saved, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "file").touch()
    for name in ("full", "link", "file", "file/inside", "\udcff"):
        refused(lambda name=name: merge(tmp_path / "no_model", tmp_path / name), "--out", name)
    merge(saved / "lora", tmp_path / "new" / "out")
    assert load(tmp_path / "new" / "out")
    assert (tmp_path / "new" / "out" / "tokenizer.json").exists()


# --- Tokenizers, calls and fingerprints -----------------------------------------------------------


def test_a_tokenizer_larger_than_its_model_is_refused_at_loading(saved, tmp_path):
    folder = linked(saved / "full", tmp_path / "model")
    tokenizer = load_tokenizer("bytes")
    tokenizer.add_tokens([f"<more {i}>" for i in range(4)])
    for path in folder.glob("tokenizer*"):
        path.unlink()
    tokenizer.save_pretrained(folder)
    refused(lambda: load_thinker(str(folder), True, "auto", ""), "needs 262 rows", "has 258")
    shutil.rmtree(folder)
    linked(saved / "full", folder)
    change(folder / SETTINGS, vocab_size=100)
    refused(lambda: load_thinker(str(folder), True, "auto", ""), "258 tokens", "with 100")


@pytest.mark.parametrize("content", ["", "[]", "{}", "null", b"\xff", "[" * 100_000])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_is_refused_or_works(name, content, saved, tmp_path):
    folder = linked(saved / "full", tmp_path / "model")
    put(folder / name, content)

    def use():
        tokenizer = load_tokenizer(str(folder))
        assert tokenizer.decode(tokenizer("text")["input_ids"])

    works_or_is_refused(use)


def test_a_run_folder_is_answered_with_where_its_model_is(saved, tmp_path):
    linked(saved / "full", tmp_path / "run" / "final")
    refused(lambda: load_thinker(str(tmp_path / "run"), True, "auto", ""), "folder of a run")


@pytest.mark.parametrize("value", [-1, -101, 258, 10**6])
def test_ids_and_labels_outside_the_vocabulary_are_refused(value):
    model, texts = thinking_model(), random_texts(1, 6)
    wrong = texts.clone()
    wrong[0, 3] = value
    for think in (True, False):
        refused(lambda think=think: model(texts, labels=wrong, think=think), f"labels ({value})")
        refused(lambda think=think: model(wrong, think=think), f"input_ids ({value})")
    refused(lambda: model.generate(wrong, max_new_tokens=1), f"inputs ({value})")
    refused(lambda: model.draw(texts, labels=wrong), f"labels ({value})")
    refused(lambda: model.score_plain(texts, labels=wrong), f"labels ({value})")
    wrong[0, 3] = -100
    assert model(texts, labels=wrong).loss.isfinite()


def test_a_fingerprint_changes_with_all_that_decides_scores(saved, tmp_path):
    folder, base = tmp_path / "model", tmp_path / "base"
    shutil.copytree(saved / "lora", folder)
    shutil.copytree(saved / "plain", base)
    change(folder / SETTINGS, base_model_name_or_path=str(base))
    seen = {fingerprint(str(folder))}
    for other in ("scores.jsonl", "gate.json", "gate.safetensors"):  # the last two of 0.1.0
        (folder / other).touch()
    assert fingerprint(str(folder)) in seen
    paths = [folder / name for name in (SETTINGS, ADAPTER, "tokenizer.json")]
    for path in [*paths, base / "config.json"]:
        text = path.read_text(encoding="utf-8")
        put(path, text.replace("{", "{ ", 1))
        seen.add(fingerprint(str(folder)))
    for path in (folder / OWN, folder / ADAPTERS, base / WEIGHTS):
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        put(path, bytes(content))
        seen.add(fingerprint(str(folder)))
    assert len(seen) == 8


# --- Properties -----------------------------------------------------------------------------------

VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 300), st.sampled_from([10**6, 10**30, -(10**9)]),
    st.floats(), st.text(max_size=5), st.lists(st.integers(-1, 3), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip


def places(tree, path=()):
    """Every place in a JSON tree."""
    yield path
    if isinstance(tree, dict | list):
        for key in tree if isinstance(tree, dict) else range(len(tree)):
            yield from places(tree[key], (*path, key))


def replaced(tree, path, value):
    if not path:
        return value
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[path[0]] = replaced(tree[path[0]], path[1:], value)
    return copy


@st.composite
def damages(draw, folder):
    """One file of a saved model, and what it holds after some damage; None: nothing, a folder."""
    path = draw(st.sampled_from(sorted(p for p in folder.rglob("*") if p.is_file())))
    content, name = path.read_bytes(), str(path.relative_to(folder))
    if draw(st.booleans()) and path.suffix == ".json" and "tokenizer.json" not in path.name:
        tree = json.loads(content)
        place = draw(st.sampled_from(list(places(tree))))
        return name, json.dumps(replaced(tree, place, draw(VALUES))).encode()
    how = draw(st.sampled_from(["cut", "flip", "header", "delete", "folder"]))
    if how == "cut":
        return name, content[: draw(st.integers(0, len(content) - 1))]
    if how in ("flip", "header"):
        most = len(content) if how == "flip" else min(len(content), 400)
        damaged = bytearray(content)
        damaged[draw(st.integers(0, most - 1))] = draw(st.integers(0, 255))
        return name, bytes(damaged)
    return name, how


@pytest.mark.parametrize("name", ["full", "lora"])
def test_a_damaged_folder_works_or_is_refused_in_one_line(name, saved, tmp_path):
    count = 0

    @settings(
        max_examples=60, derandomize=True, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(damages(saved / name))
    def check(damage):
        nonlocal count
        count += 1
        file, content = damage
        folder = linked(saved / name, tmp_path / str(count))
        (folder / file).unlink()
        if content == "folder":
            (folder / file).mkdir()
        elif content != "delete":
            (folder / file).write_bytes(content)

        def use():
            model = load_thinker(str(folder), True, "auto", "")
            model.draw(random_texts(1, 3))
            model.generate(random_texts(1, 3), max_new_tokens=1)

        works_or_is_refused(use)
        shutil.rmtree(folder)

    check()
