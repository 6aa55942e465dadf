"""A moving average of the weights: its formula, use in their place, saving, resuming, loading."""

import json
import shutil

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from test_training import train
from tiny import read_metrics, run_config, thinking_model

from quietstar import QuietStarForCausalLM
from quietstar.cli import main as cli
from quietstar.distributed import Strategy, WrappedModule
from quietstar.distributed.strategies import bare_name
from quietstar.errors import UserError
from quietstar.training import ema as module
from quietstar.training import loop, run
from quietstar.training.checkpoint import write_manifest
from quietstar.training.ema import WeightAverage
from quietstar.training.memory_plan import estimate_run
from quietstar.training.run import run_training

AVERAGED = {"training__ema_decay": 0.9, "training__max_steps": 4, "training__save_steps": 2}


def averaged(decay=0.9, dtype=torch.float32, **more):
    """A strategy's module, and the average of its weights."""
    model = WrappedModule(thinking_model(**more).to(dtype))
    return model, WeightAverage(Strategy(Accelerator(cpu=True)), model, decay)


@torch.no_grad()
def move(model, seed=0):
    """Changes all weights that train, by steps as small as an optimizer's."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_((0.01 * noise).to(parameter.dtype))


def copies(model):
    named = model.named_parameters()
    return {bare_name(n): p.detach().clone() for n, p in named if p.requires_grad}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [0.0, 0.7, 1.0])
def test_it_follows_the_formula(decay, dtype):
    model, average = averaged(decay, dtype)
    wanted = {name: weight.double() for name, weight in copies(model).items()}
    for step in range(20):
        move(model, step)
        average.update(model)
        for name, weight in copies(model).items():
            wanted[name] = decay * wanted[name] + (1 - decay) * weight.double()
    assert average.values.keys() == wanted.keys()
    for name, value in average.values.items():
        assert value.dtype == torch.float32
        if decay in (0, 1):
            assert torch.equal(value.double(), wanted[name]), name
        # Each step rounds by 2**-24, of which a share of 0.7 stays in the next: 3.3 in all. What
        # is near 0 has been up to 0.1.
        torch.testing.assert_close(value.double(), wanted[name], rtol=4e-7, atol=4e-8)


def test_it_holds_what_trains_and_nothing_else():
    model, average = averaged(tuning={"method": "lora", "lora_r": 2})
    names = set(average.values)
    assert names == {n for n, p in model.model.named_parameters() if p.requires_grad}
    assert {"start_embedding", "end_embedding"} < names
    assert any(name.startswith("mixing_head.") for name in names)
    assert any("lora_" in name for name in names)
    assert not any("embed_tokens" in name for name in names)


@pytest.mark.parametrize("piece", [module.PIECE, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_takes_the_place_of_the_weights_and_both_are_exact_behind(dtype, piece, monkeypatch):
    monkeypatch.setattr(module, "PIECE", piece)
    model, average = averaged(dtype=dtype)
    for step in range(5):
        move(model, step)
        average.update(model)
    weights, values = copies(model), {n: x.clone() for n, x in average.values.items()}
    places = {n: p.data_ptr() for n, p in model.named_parameters()}

    def interrupted():
        with average.applied(model):
            for name, weight in copies(model).items():
                near = values[name].to(dtype)
                if dtype == torch.float32:
                    assert torch.equal(weight, near), name
                # Half a unit in the last place: only ties are rounded elsewhere.
                torch.testing.assert_close(weight.float(), values[name], rtol=2**-8, atol=0)
                assert (weight != near).float().mean() < 1e-2
            assert {n: p.data_ptr() for n, p in model.named_parameters()} == places
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        interrupted()
    assert_same(copies(model), weights)
    assert_same(average.values, values)


def test_every_pair_of_a_weight_and_an_average_comes_back():
    """All upper halves, beside lower halves on both sides of the tie."""
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32).repeat_interleave(6)
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    long = (upper << 16) | lower.repeat(2**16)
    short = torch.arange(len(long), dtype=torch.int32).to(torch.int16) * 7
    weight, average = short.clone().view(torch.bfloat16), long.clone().view(torch.float32)
    module._put(weight, average)
    is_finite = long.view(torch.float32).abs() < 3e38
    near = long.view(torch.float32).bfloat16()
    off = (weight.view(torch.int16).int() - near.view(torch.int16).int())[is_finite]
    is_tie = (lower.repeat(2**16) == 0x8000)[is_finite]
    assert (off[~is_tie] == 0).all()
    assert ((off[is_tie] == 0) | (off[is_tie] == 1)).all()
    module._take_back(weight, average)
    assert torch.equal(weight.view(torch.int16), short)
    assert torch.equal(average.view(torch.int32), long)


def test_the_model_computes_with_it_also_within_one_autocast():
    """Autocast remembers how it cast a weight, and would not see that another lies there."""
    model, average = averaged()
    move(model)
    average.update(model)
    ids = torch.arange(12).view(1, -1)

    def logprobs():
        return model("score_plain", ids).logprobs.float()

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        live = logprobs()
        with average.applied(model):
            of_average = logprobs()
        again = logprobs()
    assert torch.equal(live, again)
    assert not torch.equal(live, of_average)
    with torch.no_grad():
        for name, parameter in model.model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(average.values[name])
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(logprobs(), of_average)


def test_with_a_decay_of_one_adapters_stay_those_of_the_base_model():
    model, average = averaged(1.0, tuning={"method": "lora", "lora_r": 2})
    ids = torch.arange(12).view(1, -1)
    with torch.no_grad():
        before = model("score_plain", ids).logprobs
        move(model)
        average.update(model)
        assert not torch.equal(model("score_plain", ids).logprobs, before)
        with average.applied(model):
            assert torch.equal(model("score_plain", ids).logprobs, before)


# --- Runs -----------------------------------------------------------------------------------------


def folder_weights(folder):
    files = sorted(folder.glob("*.safetensors"))
    assert files
    return {f"{f.name}:{name}": x for f in files for name, x in load_file(f).items()}


def watched_run(config, monkeypatch):
    """Runs a config; returns its folder, and the weights before the first step and after each."""
    seen, real, real_update = [], run.train, Strategy.update

    def train_watched(this):
        seen.append(copies(this.model))
        real(this)

    def update_watched(strategy, model, *rest):
        norms = real_update(strategy, model, *rest)
        seen.append(copies(model))
        return norms

    with monkeypatch.context() as patch:
        patch.setattr(run, "train", train_watched)
        patch.setattr(Strategy, "update", update_watched)
        return train(config), seen


def test_a_run_leaves_the_average_of_its_weights_as_a_model(tmp_path, monkeypatch):
    folder, seen = watched_run(run_config(tmp_path, **AVERAGED), monkeypatch)
    assert len(seen) == 5
    wanted = seen[0]
    for weights in seen[1:]:
        wanted = {name: 0.9 * x + (1 - 0.9) * weights[name] for name, x in wanted.items()}
    model = QuietStarForCausalLM.from_pretrained(folder / "ema", trainable=True)
    for name, weight in copies(model).items():
        torch.testing.assert_close(weight, wanted[name], rtol=1e-6, atol=1e-7)
    live = copies(QuietStarForCausalLM.from_pretrained(folder / "final", trainable=True))
    assert_same(live, seen[-1])
    names = [sorted(p.name for p in (folder / part).iterdir()) for part in ("ema", "final")]
    assert names[0] == names[1]


def test_it_changes_nothing_of_the_training(tmp_path):
    settings = {**AVERAGED, "training__eval_steps": 2}
    one = train(run_config(tmp_path, **settings, training__output_dir=str(tmp_path / "one")))
    settings["training__ema_decay"] = None
    other = train(run_config(tmp_path, **settings))
    assert_same(folder_weights(one / "final"), folder_weights(other / "final"))
    for kind in ("train", "eval"):
        ours, theirs = read_metrics(one, kind), read_metrics(other, kind)
        assert [r.get("loss", r.get("mixed_nll")) for r in ours] == [
            r.get("loss", r.get("mixed_nll")) for r in theirs
        ]
    assert not (other / "ema").exists()


def test_it_moves_once_for_a_step_of_many_micro_batches(tmp_path):
    whole = train(run_config(tmp_path, **AVERAGED, training__output_dir=str(tmp_path / "whole")))
    cut = train(run_config(tmp_path, **AVERAGED, training__micro_batch_size=1))
    ours, theirs = folder_weights(cut / "ema"), folder_weights(whole / "ema")
    live = folder_weights(whole / "final")
    for name, value in ours.items():
        # Sums in another order, amplified by AdamW; one update more or less would be 1e-3.
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=2e-5)
    assert max((live[name] - theirs[name]).abs().max() for name in live) > 1e-2


def test_a_killed_run_resumes_with_the_same_average(tmp_path, monkeypatch):
    settings = {**AVERAGED, "training__micro_batch_size": 4}
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
    folder = train(config, resume="auto")
    for part in ("ema", "final"):
        assert_same(folder_weights(folder / part), folder_weights(whole / part))


def test_every_stage_begins_its_own(tmp_path):
    """The first, without thoughts, does not train the vectors; resuming keeps to the stage."""
    stages = {
        "reads": {"loss": {"objective": "next_token"}, "training": {"max_steps": 2}},
        "thinks": {"training": {"max_steps": 2}},
    }
    config = run_config(tmp_path, **{**AVERAGED, "training__save_steps": 1},
                        training__save_total_limit=9)  # fmt: skip
    config = type(config).model_validate({**config.model_dump(), "stages": stages})
    folder = train(config)
    saved = [load_file(folder / f"checkpoints/step-00000{n}/ema.safetensors") for n in (2, 3)]
    assert "start_embedding" not in saved[0]
    assert "start_embedding" in saved[1]
    weights = [
        load_file(folder / f"checkpoints/step-00000{n}/trainable.safetensors") for n in (2, 3)
    ]
    for name, value in saved[0].items():  # of step 2, with which the second stage begins
        wanted = 0.9 * weights[0][name] + (1 - 0.9) * weights[1][name]
        torch.testing.assert_close(saved[1][name], wanted, rtol=1e-6, atol=1e-7)
        assert not torch.equal(value, weights[0][name])
    part = tmp_path / "part"
    shutil.copytree(folder, part)
    for name in ("checkpoints/step-000003", "checkpoints/step-000004", "final", "ema"):
        shutil.rmtree(part / name)
    training = config.training.model_copy(update={"output_dir": str(part)})
    train(config.model_copy(update={"training": training}), resume="auto")
    assert_same(folder_weights(part / "ema"), folder_weights(folder / "ema"))


def test_it_begins_late_only_if_that_is_insisted_on(tmp_path, capsys):
    settings = {**AVERAGED, "training__max_steps": 2}
    train(run_config(tmp_path, **{**settings, "training__ema_decay": None}))
    config = run_config(tmp_path, **{**settings, "training__max_steps": 3})
    with pytest.raises(UserError, match=r"training\.ema_decay was None, is 0\.9: that would be an"):
        run_training(config, resume="auto")
    folder = run_training(config, resume="auto", allow_changes=True).parent
    said = " ".join(capsys.readouterr().out.split())
    assert "step-000002 holds no weights for training.ema_decay, so these begin" in said
    before = load_file(folder / "checkpoints/step-000002/trainable.safetensors")
    own = load_file(folder / "ema/quietstar.safetensors")
    after = load_file(folder / "final/quietstar.safetensors")
    name = "start_embedding"
    wanted = 0.9 * before[name] + (1 - 0.9) * after[name]
    torch.testing.assert_close(own[name], wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: {"start_embedding": x * torch.nan}, "start_embedding holds numbers that are"),
        (lambda x: {"start_embedding": x[None, None]}, "start_embedding has shape"),
        (lambda x: {"start_embedding": x.half()}, r"start_embedding has shape .*float16"),
        (lambda x: {"more": x.clone()}, r"is not one of what trains \(more\)"),
    ],
)
def test_an_average_that_no_run_wrote_is_refused(tmp_path, change, words):
    config = run_config(tmp_path, **{**AVERAGED, "training__max_steps": 2})
    newest = train(config) / "checkpoints" / "step-000002"
    content = load_file(newest / "ema.safetensors")
    save_file(content | change(content["start_embedding"]), newest / "ema.safetensors")
    write_manifest(newest)
    with pytest.raises(UserError, match=rf"--resume \(.*{words}"):
        run_training(config, resume=str(newest))


def test_a_folder_of_something_else_is_not_replaced_and_an_earlier_one_goes(tmp_path):
    config = run_config(tmp_path, **{**AVERAGED, "training__max_steps": 2})
    folder = train(config)
    (folder / "ema" / "quietstar.json").unlink()
    longer = run_config(tmp_path, **{**AVERAGED, "training__max_steps": 3})
    with pytest.raises(UserError, match=r"ema: already holds something that is no saved model"):
        run_training(longer, resume="auto")
    run_training(run_config(tmp_path, training__max_steps=1), overwrite=True)
    assert not (folder / "ema").exists()


def test_a_plan_counts_it(tmp_path):
    plans = [
        estimate_run(run_config(tmp_path, training__ema_decay=decay), engine, 2)
        for decay, engine in ((None, "ddp"), (0.9, "ddp"), (0.9, "zero3"))
    ]
    none, whole, shard = (plan.average for plan in plans)
    assert none == 0
    assert whole == plans[1].weights  # all of it trains, in float32
    assert shard == whole // 2
    assert plans[1].total - plans[0].total == whole


# --- Commands -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with an average that is far from its weights."""
    folder = tmp_path_factory.mktemp("finished")
    return train(run_config(folder, **AVERAGED, optim__learning_rate=0.05))


def test_commands_take_the_average_of_a_run(finished, tmp_path, capsys):
    line = ["generate", "--inspect", "1 plus 2 is 3"]
    for name, model in (
        ("average", [str(finished), "--ema"]),
        ("same", [str(finished / "ema")]),
        ("live", [str(finished / "final")]),
    ):
        assert not cli.main([*line, "--model", *model, "--out", str(tmp_path / f"{name}.json")])
    average, same, live = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("average", "same", "live")
    )
    assert average == same
    assert average["tokens"] != live["tokens"]
    text = ["--prompt", "1 plus", "--max-new-tokens", "4"]
    assert not cli.main(["generate", "--model", str(finished), "--ema", *text])
    items = tmp_path / "items.jsonl"
    items.write_text(json.dumps({"prompt": "1 plus 2 is ", "answer": "3"}) + "\n")
    out = tmp_path / "figures.json"
    line = ["eval", "--tasks", str(items), "--out", str(out)]
    assert not cli.main([*line, "--model", str(finished), "--ema"])
    assert json.loads(out.read_text())["config"]["model"] == str(finished / "ema")
    capsys.readouterr()


@pytest.mark.parametrize(
    "command", ["generate --inspect ab", "generate --prompt a", "eval --tasks x"]
)
def test_where_there_is_none_a_line_says_what_to_do(finished, tmp_path, capsys, command):
    (tmp_path / "run" / "final").mkdir(parents=True)
    for folder, words in (
        (tmp_path / "run", "has left no model in ema/. Train with --training.ema_decay 0.999"),
        (finished / "final", "needs the folder of a run as --model, and"),
        (tmp_path / "none", "needs the folder of a run as --model, and"),
    ):
        assert cli.main([*command.split(), "--model", str(folder), "--ema"]) == 2
        said = capsys.readouterr().err
        assert said.startswith("quietstar: error: --ema: ")
        assert words in said
        assert said.count("\n") == 1
