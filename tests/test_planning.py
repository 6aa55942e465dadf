"""`quietstar train --plan`: fake tensors take the memory that real ones do."""

import json

import pytest
import torch
from tiny import plain_model, run_config, write_texts

from benchmarks import memory
from quietstar.cli import main as cli
from quietstar.config.loading import save_config
from quietstar.data import load_tokenizer
from quietstar.errors import UserError
from quietstar.losses import groups
from quietstar.losses.groups import resolve_chunk_tokens
from quietstar.training import memory_plan
from quietstar.training.build import build_model
from quietstar.training.memory_plan import (
    PROGRAM,
    PROGRAM_BY_TOKEN,
    MemoryTrace,
    estimate_run,
    model_without_weights,
    num_bytes,
)
from quietstar.training.stages import begin_stage, plan_stages

MIB = 2**20


def planned(tmp_path, **changes):
    """A run whose model is large enough that activations matter; its vocabulary has a padding."""
    folder = tmp_path / "base"
    if not folder.exists():
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        plain_model(**sizes, pad_token_id=257).save_pretrained(folder)
        load_tokenizer("bytes").save_pretrained(folder)
    changes.setdefault("data__train", "unread.jsonl")
    changes.setdefault("training__global_batch_size", 4)
    model = {"model__name_or_path": str(folder), "model__config": None, "model__tokenizer": None}
    return run_config(tmp_path, training__micro_batch_size=4, **model, **changes)


def real_peak(config):
    """The same count on real tensors."""
    model = build_model(config, load_tokenizer("bytes")).train()
    (stage,) = plan_stages(config)
    begin_stage(model, stage)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.learn_chunk_tokens = resolve_chunk_tokens(
        config.training.learn_chunk_tokens, device, False, config.training.gradient_checkpointing
    )
    trace = MemoryTrace(model)
    tokens = torch.zeros(config.training.micro_batch_size, config.data.seq_len, dtype=torch.long)
    autocast = torch.autocast(
        "cpu", torch.bfloat16, enabled=config.training.mixed_precision == "bf16"
    )
    for _ in range(2):
        with trace, autocast:
            output = model(tokens, sample_ids=torch.arange(len(tokens)))
        with trace:
            output.loss.backward()
        del output
    return trace.peak


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"training__mixed_precision": "bf16"},
        {"training__gradient_checkpointing": True},
        {"thoughts__positions": "random", "thoughts__position_fraction": 0.5},
        {"tuning__method": "lora"},
        {"training__learn_chunk_tokens": 100},
        {"training__learn_chunk_tokens": None},
        {"thoughts__stop": ["e"], "thoughts__length": 6},
        {"thoughts__positions": "top_entropy", "thoughts__position_fraction": 9},
        {"thoughts__positions": "random", "thoughts__length": 44, "data__seq_len": 12},
    ],
    ids=str,
)
def test_fake_tensors_take_what_real_ones_take(tmp_path, monkeypatch, changes):
    # As on a GPU: a CPU reads the targets and leaves trailing positions out, fake tensors cannot;
    # and its compiled loops need less.
    monkeypatch.setattr(groups, "on_host", lambda _: False)
    config = planned(tmp_path, training__global_batch_size=8, **changes)  # gradients accumulate
    estimate = estimate_run(config, "single", 1)
    assert estimate.learning + estimate.learning_gradients == pytest.approx(
        real_peak(config), rel=0.02
    )


def test_checkpointing_and_fewer_positions_need_less(tmp_path):
    def needed(**changes):
        return estimate_run(planned(tmp_path, **changes), "single", 1).learning

    whole = needed()
    assert needed(training__gradient_checkpointing=True) < 0.8 * whole
    assert needed(thoughts__positions="every", thoughts__position_fraction=0.25) < 0.6 * whole


def test_a_number_of_positions_and_marks_everywhere_are_planned(tmp_path):
    def needed(**changes):
        return estimate_run(planned(tmp_path, **changes), "single", 1)

    whole = needed()
    few = needed(thoughts__positions="every", thoughts__position_fraction=3)
    one = needed(thoughts__positions="one_random")
    assert one.learning < few.learning < 0.6 * whole.learning
    assert one.cache < few.cache < whole.cache
    everywhere = needed(thoughts__positions="pattern", thoughts__pattern="^").learning
    assert few.learning < everywhere  # the texts are not there


def test_a_plan_counts_the_thoughts_and_the_length_that_the_data_have(tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"question": "one and two", "answer": "three"}\n' * 40)
    answers = {"data__format": "qa", "data__template": "{question} {answer}", "data__seq_len": 64}

    def needed(rule, **changes):
        config = planned(tmp_path, data__train=str(texts), thoughts__positions=rule, **changes)
        return estimate_run(config, "single", 1).learning

    first = needed("answer_start", **answers)
    assert first == needed("one_random", **answers)
    assert first < needed("answer", **answers) < needed("all", **answers)
    assert needed("all", **answers) == needed("all", **{**answers, "data__seq_len": 24})


def test_few_layers_tell_what_many_need(tmp_path, monkeypatch):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6}
    plain_model(**sizes).save_pretrained(tmp_path / "base")
    load_tokenizer("bytes").save_pretrained(tmp_path / "base")
    for changes in ({}, {"tuning__method": "lora"}):
        config = planned(tmp_path, **changes)
        few = estimate_run(config, "single", 1)
        with monkeypatch.context() as patch:
            patch.setattr(memory_plan, "TRACED_LAYERS", 6)
            whole = estimate_run(config, "single", 1)
        assert few.step == pytest.approx(whole.step, rel=0.05)
        assert few.weights == whole.weights


def test_engines_cut_what_they_say(tmp_path):
    config = planned(tmp_path, training__global_batch_size=8)
    one = estimate_run(config, "single", 1)
    model = model_without_weights(config, load_tokenizer("bytes"))
    assert one.weights == num_bytes(model.parameters())
    assert one.gradients == num_bytes(p for p in model.parameters() if p.requires_grad)
    assert one.optimizer == 2 * one.gradients
    shares = {"ddp": (1, 1), "zero1": (1, 1), "zero2": (1, 0.5), "zero3": (0.5, 0.5),
              "fsdp2": (0.5, 0.5)}  # fmt: skip
    cut = {engine: estimate_run(config, engine, 2) for engine in shares}
    for engine, (weights, gradients) in shares.items():
        assert cut[engine].weights == pytest.approx(one.weights * weights, abs=1)
        assert cut[engine].gradients == pytest.approx(one.gradients * gradients, abs=1)
    assert cut["fsdp2"].optimizer == pytest.approx(one.optimizer / 2, abs=1)
    # ZeRO keeps a copy of the weights in float32 beside the two moments.
    assert cut["zero2"].optimizer == pytest.approx(one.optimizer / 2 * 1.5, abs=1)
    assert cut["zero2"].learning_gradients < one.learning_gradients


def test_the_command_prints_the_sum_and_says_whether_it_fits(tmp_path, capsys):
    save_config(planned(tmp_path), tmp_path / "config.yaml")
    written = str(tmp_path / "plan.json")
    call = ["train", "--plan", "--config", str(tmp_path / "config.yaml"), "--json", written]
    assert cli.main([*call, "--memory", "1"]) is None
    said = capsys.readouterr().out
    assert "fits into 1 GiB" in said
    figures = json.loads((tmp_path / "plan.json").read_text())
    assert f"{figures['total'] / MIB:,.0f}" in said
    assert cli.main([*call, "--memory", "0.0001", "--force"]) == 1
    assert "does not fit into 0.0001 GiB" in capsys.readouterr().out


def test_options_of_a_plan_are_warned_of_without_one(tmp_path, monkeypatch, capsys):
    config = run_config(tmp_path)
    save_config(config, tmp_path / "config.yaml")
    monkeypatch.setattr("quietstar.training.run.run_training", lambda *given, **more: None)
    of_plan = ["--engine", "zero2", "--processes", "2", "--memory", "9", "--json", "p.json"]
    assert cli.main(["train", "--config", str(tmp_path / "config.yaml"), *of_plan]) is None
    told = capsys.readouterr().err
    for option in of_plan[::2]:
        assert f"quietstar: warning: {option}: has no effect without --plan; leave it out" in told


def test_a_plan_says_where_the_texts_are_not_there(tmp_path, capsys):
    save_config(planned(tmp_path), tmp_path / "config.yaml")
    gone = str(tmp_path / "gone.jsonl")
    call = ["train", "--plan", "--config", str(tmp_path / "config.yaml"), "--data.train", gone]
    assert cli.main(call) is None  # they may lie on the machine that is planned for
    captured = capsys.readouterr()
    assert f"(data.train: {gone}: no such file or folder" in captured.err
    assert f"launch: launch/single.sh {tmp_path / 'config.yaml'} --data.train" in captured.out
    assert "GiB" in captured.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--engine", "zero4"], "--engine (zero4): must be one of single, ddp"),
        (["--processes", "none"], "--processes (none): must be a whole number of at least 1"),
        (["--memory", "nan"], "--memory (nan): must be a number above 0"),
        (["--processes", "1.5"], "--processes (1.5): must be a whole number"),
        (["--engine", "single", "--processes", "2"], "--engine (single): is one process, not 2"),
        (["--processes", "9"], "training.global_batch_size (4) must be at least"),
        (["--thoughts.lenght", "3"], "did you mean --thoughts.length"),
        (["--resume", "auto"], "--resume: does not go with --plan. Leave it out."),
        (["--controls", "2"], "--controls: does not go with --plan. Leave it out."),
        (["--tuning.method", "qlora"], "qlora cannot be planned"),
    ],
)
def test_a_wrong_plan_is_refused_in_one_line(tmp_path, capsys, arguments, words):
    save_config(planned(tmp_path), tmp_path / "config.yaml")
    assert cli.main(["train", "--plan", "--config", str(tmp_path / "config.yaml"), *arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert words in lines[0]


def test_dropout_of_any_size_is_dropped(tmp_path, caplog):
    config = planned(tmp_path)
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "attention_dropout": 7}))
    assert estimate_run(config, "single", 1).total
    model = build_model(config, load_tokenizer("bytes")).train()
    assert "dropout is set to 0 (attention_dropout)" in caplog.text
    assert {layer.self_attn.attention_dropout for layer in model.causal_lm.model.layers} == {0.0}


def test_a_plan_needs_a_config_that_can_be_read(tmp_path):
    config = planned(tmp_path)
    (tmp_path / "base" / "config.json").unlink()
    with pytest.raises(UserError, match=r"model.name_or_path .*: cannot be read"):
        estimate_run(config, "single", 1)


@pytest.mark.slow
def test_a_run_is_measured_beside_its_plan(tmp_path):
    texts = write_texts(tmp_path / "texts.jsonl")
    save_config(planned(tmp_path, data__train=texts), tmp_path / "config.yaml")
    call = ["--config", str(tmp_path / "config.yaml"), "--steps", "1"]
    assert cli.run_command(memory.main, [*call, "--json", str(tmp_path / "memory.json")]) == 0
    figures = json.loads((tmp_path / "memory.json").read_text())
    # So small a model takes little beside the program itself, and machines load more or less of it.
    program = (PROGRAM + 260 * PROGRAM_BY_TOKEN) / 2**20
    model = figures["planned_mb"] - program
    assert 0 < model < figures["measured_mb"] < model + 3 * program
    assert figures["ratio"] == pytest.approx(figures["planned_mb"] / figures["measured_mb"])
