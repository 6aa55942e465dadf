"""Training runs: one trajectory for every cut, resuming, refusals, and what a run leaves."""

import json
import os
import re
import shutil
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from tiny import (
    LLAMA,
    plain_model,
    random_texts,
    read_metrics,
    run_config,
    thinking_model,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import get_scheduler

import quietstar.model.quiet_star
from quietstar import QuietStarForCausalLM
from quietstar.config import OptimConfig
from quietstar.config.loading import load_config
from quietstar.data import build_data, load_tokenizer
from quietstar.distributed import Strategy
from quietstar.errors import UserError
from quietstar.model.outputs import ThoughtMetrics
from quietstar.training import build, loop, run
from quietstar.training.evaluation import compare, figures
from quietstar.training.optimizer import build_optimizer, learning_rate_factor
from quietstar.training.run import hub_data, run_training

ROOT = Path(__file__).parents[1]
CLOCK = ("seconds", "text_tokens_per_second", "thought_tokens_per_second", "peak_memory_mb")


def train(config, resume=None, overwrite=False):
    """Run a config; returns the run folder."""
    return run_training(config, resume=resume, overwrite=overwrite).parent


def without(records, keys):
    return [{k: v for k, v in r.items() if k not in keys} for r in records]


def timeless(records):
    """Records without the figures of clock and memory."""
    return without(records, CLOCK)


def assert_close(records, wanted, **tolerance):
    """Two runs' records agree to a tolerance."""
    assert [(r["kind"], r["step"]) for r in records] == [(r["kind"], r["step"]) for r in wanted]
    for record, other in zip(records, wanted, strict=True):
        a, b = ({k: v for k, v in r.items() if k not in ("kind", "stage")} for r in (record, other))
        assert a == pytest.approx(b, **tolerance)


def final_weights(folder):
    files = sorted((folder / "final").glob("*.safetensors"))
    assert files
    return {f"{f.name}:{name}": x for f in files for name, x in load_file(f).items()}


def assert_same_weights(folder, other):
    a, b = final_weights(folder), final_weights(other)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def snapshot(folder):
    paths = [p for p in folder.rglob("*") if p.is_file() and p.name != "quietstar.lock"]
    return {path.relative_to(folder): path.read_bytes() for path in paths}


# --- One trajectory -------------------------------------------------------------------------------


SUMS = {
    "data__train": "synthetic:sums",
    "data__format": "qa",
    "data__template": "{question} {answer}",
    "data__rationale_field": "rationale",
    "data__task_options": {"size": 50, "min_terms": 3, "max_terms": 3},
    "data__seq_len": 28,
    "thoughts__length": 14,
}
"""Problems whose answers are 1 to 3 tokens."""


@pytest.mark.parametrize(
    "positions", ["all", "entropy", "random", "one_random", "answer", "answer_start", "pattern"]
)
def test_every_cut_of_the_batch_gives_one_trajectory(tmp_path, positions):
    """Padding differs among the texts, so a mean of micro-batch means would show."""
    trajectories = {}
    for micro in (8, 4, 2, 1):
        config = run_config(
            tmp_path,
            training__micro_batch_size=micro,
            training__output_dir=str(tmp_path / f"run{micro}"),
            **(SUMS if positions.startswith("answer") else {"data__seq_len": 28}),
            thoughts__positions=positions,
            thoughts__pattern="[aeiou]" if positions == "pattern" else None,
            loss__policy_weight=1.0,
            training__max_steps=3,
            # With seed 0 rounding moved one draw of step 3 across the edge between two tokens.
            training__seed=1,
        )
        trajectories[micro] = timeless(read_metrics(train(config)))
    whole = trajectories.pop(8)
    for records in trajectories.values():
        # Float32 sums in another order; three steps of AdamW amplify it.
        assert_close(records, whole, rel=2e-5, abs=2e-5)
        losses, wanted = ([r["loss"] for r in x if "loss" in r] for x in (records, whole))
        assert losses == pytest.approx(wanted, rel=2e-6)


def test_answers_are_thought_about_and_counted(tmp_path):
    config = run_config(
        tmp_path, **SUMS, thoughts__positions="answer_start", logging__thought_steps=1
    )  # fmt: skip
    folder = train(config)
    before, after = (read_metrics(folder, "eval")[n] for n in (0, -1))
    assert 0 <= after["accuracy_with_thoughts"] <= 1
    assert after["right_thoughts"] == 0  # of random weights
    assert before["text_nll"] != pytest.approx(before["base_nll"])
    samples = json.loads((folder / "samples.json").read_text(encoding="utf-8"))["samples"]
    assert all(sample["before"].endswith("=") for sample in samples)
    whole = [re.fullmatch(r" -?\d+", sample["truth"]) for sample in samples]
    assert all(whole)  # the space and all digits, as accuracies count them
    wanted = sum(sample["correct"] for sample in samples) / 4
    assert after["accuracy_with_thoughts"] == wanted
    for kind in ("with_thoughts", "without_thoughts"):
        wanted = sum(sample[kind]["probability"] for sample in samples) / 4
        assert 0 < after[f"gold_probability_{kind}"] == pytest.approx(wanted, rel=1e-5)
    assert {"gold_probability_swapped", "gold_probability_pause"} <= after.keys()
    assert len(samples) == 4


def test_a_stopped_run_resumes_bit_for_bit(tmp_path, monkeypatch):
    settings = {
        "training__max_steps": 4,
        "training__save_steps": 2,
        "training__eval_steps": 2,
        "training__micro_batch_size": 4,
        "optim__warmup_steps": 3,
        "optim__lr_scheduler_type": "cosine",
    }
    whole = train(run_config(tmp_path, **settings, training__output_dir=str(tmp_path / "whole")))

    def save_and_die(*args):
        save_checkpoint(*args)
        raise KeyboardInterrupt

    save_checkpoint = loop.save_checkpoint
    config = run_config(tmp_path, **settings)
    monkeypatch.setattr(loop, "save_checkpoint", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.setattr(loop, "save_checkpoint", save_checkpoint)
    folder = tmp_path / "run"
    assert [r["step"] for r in read_metrics(folder)] == [0, 1, 2, 2]
    assert train(config, resume="auto") == folder
    assert timeless(read_metrics(folder)) == timeless(read_metrics(whole))
    assert_same_weights(folder, whole)


def test_a_checkpoint_by_path_goes_on_in_another_folder(tmp_path):
    config = run_config(tmp_path, training__save_steps=2, training__max_steps=4)
    first = train(config)
    other = run_config(
        tmp_path,
        training__save_steps=1,
        training__save_total_limit=5,
        training__max_steps=4,
        training__output_dir=str(tmp_path / "other"),
    )
    second = train(other, resume=str(first / "checkpoints" / "step-000002"))
    assert timeless(read_metrics(second, "train")) == timeless(read_metrics(first, "train")[2:])
    assert_same_weights(second, first)
    assert load_config(second / "config.yaml") == other
    before = snapshot(first)  # nor does such a checkpoint get into the records of another run
    with pytest.raises(UserError, match="already holds a run"):
        train(config, resume=str(second / "checkpoints" / "step-000003"))
    assert snapshot(first) == before


def test_only_the_newest_checkpoints_are_kept_and_none_is_half_written(tmp_path):
    folder = train(run_config(tmp_path, training__save_steps=1, training__save_total_limit=2))
    names = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert names == ["step-000002", "step-000003"]


# --- The run folder -------------------------------------------------------------------------------


def test_a_folder_with_another_run_is_refused_untouched_and_overwritten_only_if_asked(tmp_path):
    folder = train(run_config(tmp_path, training__max_steps=2, training__save_steps=2))
    before = snapshot(folder)
    assert len(before) > 5
    with pytest.raises(UserError, match="already holds a run"):
        train(run_config(tmp_path, training__max_steps=1))
    assert snapshot(folder) == before
    train(run_config(tmp_path, training__max_steps=1), overwrite=True)
    assert [r["step"] for r in read_metrics(folder)] == [0, 1, 1]
    assert not (folder / "checkpoints").exists()


def test_a_failed_setup_leaves_an_overwritable_run_as_it_was(tmp_path):
    folder = train(run_config(tmp_path, training__max_steps=1))
    before = snapshot(folder)
    with pytest.raises(UserError):
        train(run_config(tmp_path, data__train=str(tmp_path / "no.txt")), overwrite=True)
    assert snapshot(folder) == before


def test_records_have_exactly_the_documented_keys(tmp_path):
    table = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| ([a-z, ]+) \|", table, flags=re.MULTILINE)
    folder = train(run_config(tmp_path, training__max_steps=1, training__inner_epochs=2))
    for kind in ("train", "eval"):
        documented = {key for key, kinds in rows if kind in kinds.split(", ")}
        for record in read_metrics(folder, kind):
            assert record.keys() == documented, kind


def test_the_final_model_gives_the_last_evaluation_again(tmp_path):
    config = run_config(tmp_path, training__max_steps=2, thoughts__start_init="x")
    folder = train(config)
    model = QuietStarForCausalLM.from_pretrained(folder / "final")
    tokenizer = load_tokenizer(str(folder / "final"))
    _, eval_data, _ = build_data(config.data, tokenizer, config.training.seed)
    batches = list(eval_data.batches(config.training.micro_batch_size))
    totals = compare(model, batches)
    last = read_metrics(folder, "eval")[-1]
    again = figures(totals)
    assert again["mixed_nll"] == pytest.approx(last["mixed_nll"], rel=1e-6)
    assert again == pytest.approx({k: last[k] for k in again}, rel=1e-5, abs=1e-6)


# --- Refusals and alarms --------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(tmp_path, monkeypatch):
    seen = {}
    real_learn, real_train = quietstar.model.quiet_star.learn, run.train

    def poisoned(*args, **kwargs):
        loss, scored = real_learn(*args, **kwargs)
        return (loss * float("nan") if loss.requires_grad else loss), scored

    def watched(this):
        seen["model"] = this.model
        seen["before"] = {n: p.detach().clone() for n, p in this.model.named_parameters()}
        real_train(this)

    monkeypatch.setattr(quietstar.model.quiet_star, "learn", poisoned)
    monkeypatch.setattr(run, "train", watched)
    with pytest.raises(UserError, match=r"step 1: loss nan.*is not finite"):
        train(run_config(tmp_path))
    for name, parameter in seen["model"].named_parameters():
        assert torch.equal(parameter, seen["before"][name]), name
    assert not (tmp_path / "run" / "final").exists()


def test_a_gradient_that_is_not_finite_stops_too(tmp_path, monkeypatch):
    real = Strategy.clip

    def poisoned(engine, model, clip_norm):
        next(iter(model.parameters())).grad.view(-1)[0] = float("inf")
        return real(engine, model, clip_norm)

    monkeypatch.setattr(Strategy, "clip", poisoned)
    with pytest.raises(UserError, match="gradient norm inf is not finite"):
        train(run_config(tmp_path))


def test_a_step_waits_for_the_device_once(tmp_path, monkeypatch):
    """Every number that this package's training code reads on the host is a sync on a GPU."""
    reads = []

    def counted(name):
        real = getattr(torch.Tensor, name)

        def read(tensor, *args):
            module = sys._getframe(1).f_globals["__name__"]
            if module.startswith(("quietstar.training.", "quietstar.distributed.")):
                reads.append((module, name))
            return real(tensor, *args)

        return read

    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    monkeypatch.setattr(loop, "evaluate", lambda run: ({"base_nll": 1.0}, []))
    seen = {}

    def watched(this):
        reads.clear()
        real_train(this)
        seen["reads"] = list(reads)

    real_train = run.train
    monkeypatch.setattr(run, "train", watched)
    monkeypatch.setattr(run, "write_results", lambda *args: None)
    train(run_config(tmp_path, training__max_steps=4, logging__logging_steps=1000))
    of_steps = [("quietstar.training.loop", "tolist")] * 4
    assert seen["reads"] == [*of_steps, ("quietstar.training.checkpoint", "__float__")]


def test_figures_are_summed_on_a_device_without_float64():
    """As on Apple's GPUs, here without content: making a float64 tensor there is an error."""
    accelerator = Mock(spec=Accelerator, num_processes=2)
    accelerator.reduce.side_effect = lambda table, reduction: table

    class WithoutFloat64(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.device.type == "mps":
                assert result.dtype != torch.float64, func
            return result

    with FakeTensorMode(), WithoutFloat64():
        names = ("base_nll", "mixed_nll")
        pair = (torch.zeros((), device="mps"), torch.zeros((), device="mps", dtype=torch.int64))
        reduced = ThoughtMetrics(dict.fromkeys(names, pair)).reduced(accelerator)
        assert reduced.sums["mixed_nll"][0].dtype == torch.float64


def test_too_few_positions_are_refused_with_the_numbers(tmp_path):
    longest = 64 - 2 - 2 - 1  # positions - length - lookahead - 1
    with pytest.raises(UserError, match=rf"data.seq_len \(60\).* 64 positions.*at most {longest}"):
        train(run_config(tmp_path, data__seq_len=60))
    assert not (tmp_path / "run").exists()


def test_evaluations_record_the_thoughts_in_the_same_texts(tmp_path):
    config = run_config(tmp_path, training__max_steps=4, training__eval_steps=2)
    run_training(config)
    path = Path(config.training.output_dir) / "thoughts.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["step"] for record in found] == [0, 2, 4]
    texts = [[sample["before"] for sample in record["samples"]] for record in found]
    assert texts[0] == texts[1] == texts[2]
    assert 0 < len(texts[0]) <= 3
    shutil.rmtree(Path(config.training.output_dir) / "final")
    run_training(config, resume="auto")  # it is evaluated again, and nothing stands twice
    assert [json.loads(line) for line in path.read_text().splitlines()] == found


def test_the_revision_behind_a_name_is_what_is_read(tmp_path, monkeypatch):
    seen = []

    def load(name, *_, revision, **__):
        seen.append((name, revision))
        raise UserError("not here")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(build, "load_tokenizer", load)
    monkeypatch.setattr(build, "load_base", load)
    for name in ("owner/name@v1", "gpt2@v1", "owner/name", "here@v1"):
        (tmp_path / "here@v1").mkdir(exist_ok=True)
        config = run_config(
            tmp_path, model__config=None, model__tokenizer=None, model__name_or_path=name
        )
        with pytest.raises(UserError, match="not here"):
            build.find_tokenizer(config)
        with pytest.raises(UserError, match="not here"):
            build.build_model(config, load_tokenizer("bytes"))
    expected = [("owner/name", "v1"), ("gpt2", "v1"), ("owner/name", None), ("here@v1", None)]
    assert seen == [one for one in expected for _ in range(2)]
    named = run_config(tmp_path, data__train="owner/name:main:train")
    assert hub_data(named) == ["owner/name"]


# --- Trackers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tracker", ["wandb", "mlflow", "trackio"])
def test_trackers_get_name_config_and_figures(tracker, tmp_path, monkeypatch):
    """Offline, into folders of their own; of packages that no extra installs."""
    store = tmp_path / "store"
    store.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(store))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}/mlflow.db")
    monkeypatch.setenv("TRACKIO_DIR", str(store))
    pytest.importorskip(tracker)  # reads the environment
    own = {"logging__report_to": [tracker], "training__output_dir": str(tmp_path / "mine")}
    train(run_config(tmp_path, training__max_steps=2, **own))
    if tracker == "mlflow":
        import mlflow

        (run,) = mlflow.search_runs(experiment_names=["quietstar"], output_format="list")
        assert run.info.run_name == "mine"
        assert {"train/base_nll", "eval/gain"} <= set(run.data.metrics)
        assert run.data.params["thoughts.length"]
        return
    pattern = {"wandb": "**/*.wandb", "trackio": "**/quietstar.db"}[tracker]
    (file,) = store.glob(pattern)
    written = b"".join(path.read_bytes() for path in file.parent.glob(f"{file.name}*"))
    for text in ("mine", "train/base_nll", "eval/gain", "thoughts.length"):
        assert text.encode() in written, text


# --- Optimiser ------------------------------------------------------------------------------------


def test_each_group_has_its_own_learning_rate_and_vectors_do_not_decay():
    model = thinking_model()
    config = OptimConfig(
        learning_rate=0.1,
        mixing_head_learning_rate=0.2,
        embedding_learning_rate=0.3,
        weight_decay=0.5,
    )
    optimizer = build_optimizer(model, config)
    settings = {
        p: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]
    }
    rates = {
        "language_model": 0.1,
        "mixing_head": 0.2,
        "start_embedding": 0.3,
        "end_embedding": 0.3,
    }
    for name, parameter in model.named_parameters():
        decay = 0.5 if parameter.ndim == 2 else 0.0
        assert settings[parameter] == (rates[name.split(".")[0]], decay), name


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("warmup", "steps"), [(0, 6), (3, 10), (4, 4), (5, 3)])
def test_learning_rates_are_those_of_transformers_schedules(kind, warmup, steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    theirs = get_scheduler(
        "constant_with_warmup" if kind == "constant" else kind, optimizer, warmup, steps
    )
    config = OptimConfig(lr_scheduler_type=kind, warmup_steps=warmup)
    for step in range(steps):
        ours = 0.3 * learning_rate_factor(config, step, steps)
        assert ours == optimizer.param_groups[0]["lr"], step
        optimizer.step()
        theirs.step()


def test_gradient_norms_are_those_of_each_group_before_clipping():
    model = thinking_model()
    model(random_texts()).loss.backward()
    squares = {"language_model": 0.0, "mixing_head": 0.0, "embeddings": 0.0}
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        group = "embeddings" if part.endswith("_embedding") else part
        squares[group] += parameter.grad.double().square().sum().item()
    norms = Strategy(Accelerator(cpu=True)).clip(model, 1e-3)
    assert {n: x.item() for n, x in norms.items()} == pytest.approx(
        {n: x**0.5 for n, x in squares.items()} | {"total": sum(squares.values()) ** 0.5}, rel=1e-5
    )
    clipped = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert clipped.item() == pytest.approx(1e-3, rel=1e-2)


# --- Other models ---------------------------------------------------------------------------------


def test_a_lora_run_trains_and_its_final_model_loads(tmp_path):
    plain_model().save_pretrained(tmp_path / "base")
    config = run_config(
        tmp_path,
        model__name_or_path=str(tmp_path / "base"),
        model__config=None,
        tuning__method="lora",
        tuning__lora_r=2,
        training__save_steps=3,
    )
    folder = train(config)
    losses = [r["loss"] for r in read_metrics(folder, "train")]
    assert len(set(losses)) == 3
    assert not list((folder / "final").rglob("model.safetensors"))
    model = QuietStarForCausalLM.from_pretrained(folder / "final")
    adapters = [p for n, p in model.named_parameters() if "lora_B" in n]
    assert adapters
    assert all(p.any() for p in adapters)
    base = load_file(tmp_path / "base" / "model.safetensors")
    embedding = model.causal_lm.get_input_embeddings().weight
    assert torch.equal(embedding, base["model.embed_tokens.weight"])
    # A checkpoint holds what trains, not the frozen base.
    trained = load_file(folder / "checkpoints" / "step-000003" / "trainable.safetensors")
    assert not any("embed_tokens" in name or "base_layer" in name for name in trained)


def test_a_new_model_takes_its_special_tokens_from_the_tokenizer(tmp_path):
    final = train(run_config(tmp_path, training__max_steps=1)) / "final"
    tokenizer = load_tokenizer(str(final))
    model = QuietStarForCausalLM.from_pretrained(final)
    for settings in (model.causal_lm.config, model.causal_lm.generation_config):
        assert settings.eos_token_id == tokenizer.eos_token_id == 256
        assert settings.pad_token_id == tokenizer.pad_token_id == 257
        assert settings.bos_token_id is None
    named = run_config(
        tmp_path,
        model__config={**LLAMA, "eos_token_id": 10},
        training__max_steps=1,
        training__output_dir=str(tmp_path / "named"),
    )
    model = QuietStarForCausalLM.from_pretrained(train(named) / "final")
    assert model.causal_lm.generation_config.eos_token_id == 10


def test_a_run_learns(tmp_path):
    config = run_config(tmp_path, training__max_steps=12, optim__learning_rate=0.03)
    before, after = read_metrics(train(config), "eval")
    for name in ("base_nll", "mixed_nll", "thought_nll"):
        assert after[name] < before[name] - 0.3, name


def test_without_a_gpu_a_run_takes_all_cores_unless_told():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # as accelerate launch does
        build.use_cpu_threads(None)
        if not torch.cuda.is_available():
            assert torch.get_num_threads() == len(os.sched_getaffinity(0))
            build.use_cpu_threads(1)
            assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_loaded(tmp_path):
    (tmp_path / "file").write_text("x")
    config = run_config(tmp_path, training__output_dir=str(tmp_path / "file" / "run"))
    with pytest.raises(UserError, match=r"file is a file\. Give another"):
        train(config)


@pytest.mark.parametrize(("reward", "is_shown"), [("prob", True), ("thought", False)])
def test_the_line_of_a_step_has_a_reward_that_is_no_gain(tmp_path, capsys, reward, is_shown):
    train(run_config(tmp_path, loss__reward=reward, training__max_steps=1))
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("step "))
    assert ("  reward +" in line or "  reward -" in line) is is_shown
