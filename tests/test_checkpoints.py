"""Checkpoints: whole or not at all, damage found and named, stopped by signals, full disks."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_training import assert_same_weights, timeless
from tiny import plain_model, read_metrics, run_config

from quietstar.cli import main as cli
from quietstar.data import byte_tokenizer
from quietstar.errors import UserError
from quietstar.training import checkpoint
from quietstar.training.checkpoint import (
    MANIFEST_FILE,
    STATE_FILE,
    drop_old,
    find_damage,
    list_checkpoints,
    write_manifest,
)
from quietstar.training.export import export_checkpoint
from quietstar.training.run import run_training

TWO_STEPS = {"training__max_steps": 2, "training__save_steps": 1}


def saved_run(tmp_path, **more):
    """A run of six steps with a checkpoint after every second one."""
    settings = {
        "training__max_steps": 6,
        "training__save_steps": 2,
        "training__save_total_limit": 3,
    }
    config = run_config(tmp_path, **settings, **more)
    return config, run_training(config).parent


def test_a_flipped_byte_is_found_and_the_checkpoint_before_is_used(tmp_path, capsys):
    config, folder = saved_run(tmp_path)
    newest = folder / "checkpoints" / "step-000006"
    weights = newest / "trainable.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"step-000006\): is damaged: trainable.safetensors is not"):
        run_training(config, resume=str(newest))
    run_training(config, resume="auto")
    said = capsys.readouterr().out
    assert "step-000006 is damaged and passed over: trainable.safetensors" in said
    assert "going on from" in said
    assert "step-000004" in said
    assert find_damage(newest) is None  # written anew


def test_a_run_with_projected_gradients_resumes_bit_for_bit(tmp_path):
    """The projections are of step 0, and stay for a thousand."""
    pytest.importorskip("galore_torch")
    galore = {"tuning__method": "galore", "tuning__options": {"rank": 4, "update_proj_gap": 1000}}
    config, folder = saved_run(tmp_path, **galore)
    shutil.copytree(folder, whole := tmp_path / "whole")
    for name in ("checkpoints/step-000004", "checkpoints/step-000006", "final"):
        shutil.rmtree(folder / name)
    run_training(config, resume="auto")
    assert_same_weights(folder, whole)
    assert timeless(read_metrics(folder)) == timeless(read_metrics(whole))


def renamed(folder, old, new):
    """Has the manifest call a file by another name."""
    path = folder / MANIFEST_FILE
    path.write_text(path.read_text().replace(f'"{old}"', f'"{new}"'))


def linked(folder):
    """Puts a link to an equal file outside in the place of a file."""
    (folder / "a").rename(folder.parent / "a")
    (folder / "a").symlink_to(folder.parent / "a")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "a").unlink(), "a is missing"),
        (lambda f: (f / "a").write_text("longer"), "a has 6 bytes, not 3"),
        (lambda f: (f / "a").write_text("xyz"), "a is not what was written"),
        (lambda f: (f / MANIFEST_FILE).unlink(), "manifest.json is missing"),
        (lambda f: (f / MANIFEST_FILE).write_text("{"), "manifest.json cannot be read"),
        (lambda f: (f / MANIFEST_FILE).write_text("[]"), "manifest.json cannot be read"),
        (lambda f: (f / MANIFEST_FILE).write_text("[" * 10**5), "manifest.json cannot be read"),
        (lambda f: (f / MANIFEST_FILE).write_text('{"files": {}}'), "a is not in manifest.json"),
        (lambda f: (f / "c").write_text("c"), "c is not in manifest.json"),
        (lambda f: renamed(f, "a", "../a"), "names '../a', which is not in the folder"),
        (lambda f: renamed(f, "a", "/etc/passwd"), "names '/etc/passwd', which is not in the"),
        (lambda f: linked(f), "a is no file of this folder"),
    ],
)
def test_damage_is_named(tmp_path, damage, words):
    (tmp_path / "a").write_text("abc")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b").write_text("b")
    (tmp_path / STATE_FILE).write_text("{}")
    write_manifest(tmp_path)
    assert find_damage(tmp_path) is None
    damage(tmp_path)
    assert words in find_damage(tmp_path)


def optimizer(change):
    """Changes the state of the optimizer, by the number of each weight."""

    def damage(folder):
        content = torch.load(folder / "optimizer.bin", weights_only=True)
        change(content["state"])
        torch.save(content, folder / "optimizer.bin")

    return damage


def vectors(change):
    """Changes a weight that trains, and what else the file holds."""

    def damage(folder):
        weights = load_file(folder / "trainable.safetensors")
        weights |= change(weights["start_embedding"])
        save_file(weights, folder / "trainable.safetensors")

    return damage


def state(**fields):
    """Changes what says where the run was."""

    def damage(folder):
        content = json.loads((folder / STATE_FILE).read_text())
        (folder / STATE_FILE).write_text(json.dumps({**content, **fields}))

    return damage


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of two steps with a checkpoint after each."""
    return run_training(run_config(tmp_path_factory.mktemp("saved"), **TWO_STEPS)).parent


@pytest.mark.parametrize("key", ["reward: thought", "sampler: rollout"])
def test_the_model_of_a_checkpoint_runs_no_code_that_its_run_names(
    saved, tmp_path, monkeypatch, key
):
    newest = list_checkpoints(shutil.copytree(saved, tmp_path / "run"))[-1]
    config = tmp_path / "run" / "config.yaml"
    assert key in config.read_text()
    config.write_text(config.read_text().replace(key, f"{key.split()[0]} of_a_folder:part"))
    monkeypatch.chdir(tmp_path)
    Path("of_a_folder.py").write_text("open('it_ran', 'w')\n")
    with pytest.raises(UserError, match="names code, which is not run"):
        export_checkpoint(newest)
    assert not Path("it_ran").exists()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (optimizer(lambda s: s[0].update(exp_avg=torch.zeros(1))), r"exp_avg of .* shape \(1,\)"),
        (optimizer(lambda s: s[0].update(step=torch.tensor(-1.0))), "step of .* is -1.0 of 2"),
        (optimizer(lambda s: s[0]["exp_avg_sq"].fill_(-1)), "exp_avg_sq of .* cannot be"),
        (optimizer(lambda s: s[0].pop("exp_avg")), "it has no 'exp_avg'"),
        (optimizer(lambda s: s.pop(0)), r"for \d+ weights, and had one for \d+"),
        (optimizer(lambda s: s.clear()), "for 0 weights"),
        (vectors(lambda x: {"start_embedding": x.int()}), "start_embedding has shape .*int32"),
        (vectors(lambda x: {"start_embedding": x * torch.nan}), "start_embedding .* not finite"),
        (vectors(lambda x: {"more": x.clone()}), "does not train its tensor more"),
        (state(stage="nosuch"), r"its stage \(nosuch\): must be one of the config \(train\)"),
        (state(mixed_nll=float("nan")), "mixed_nll"),
        (state(mixed_nll=-5.0), "mixed_nll"),
        (state(step=1), "its step is 1, unlike the folder's"),
    ],
)
def test_what_no_run_wrote_is_refused_and_changes_nothing(saved, tmp_path, damage, words):
    newest = list_checkpoints(shutil.copytree(saved, tmp_path / "run"))[-1]
    damage(newest)
    write_manifest(newest)
    before = (tmp_path / "run" / "config.yaml").stat().st_mtime_ns
    config = run_config(tmp_path, **TWO_STEPS, data__train=str(saved.parent / "texts.jsonl"))
    with pytest.raises(UserError, match=rf"--resume \(.*{words}"):
        run_training(config, resume=str(newest))
    assert (tmp_path / "run" / "config.yaml").stat().st_mtime_ns == before


@pytest.mark.parametrize("content", [b"garbage", None])
def test_random_states_that_cannot_be_read_are_told(saved, tmp_path, caplog, content):
    """Those of another numpy cannot; the trajectory does not depend on them."""
    first, newest = list_checkpoints(shutil.copytree(saved, tmp_path / "run"))
    shutil.rmtree(newest)
    (first / "random_states_0.pkl").unlink()
    if content is not None:
        (first / "random_states_0.pkl").write_bytes(content)
    write_manifest(first)
    config = run_config(tmp_path, **TWO_STEPS, data__train=str(saved.parent / "texts.jsonl"))
    run_training(config, resume="auto")
    assert "random_states_0.pkl: cannot be read" in caplog.text
    assert_same_weights(tmp_path / "run", saved)


def test_nothing_is_started_anew_over_damaged_checkpoints(tmp_path):
    config, folder = saved_run(tmp_path)
    for path in list_checkpoints(folder):
        (path / MANIFEST_FILE).unlink()
    with pytest.raises(UserError, match="no whole checkpoint is left"):
        run_training(config, resume="auto")
    assert (folder / "final").exists()


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    manifest = checkpoint.write_manifest

    def full(folder):
        if "step-000004" in folder.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        manifest(folder)

    monkeypatch.setattr(checkpoint, "write_manifest", full)
    with pytest.raises(UserError, match=r"No space left.*needs about \d+ MiB.*02 is whole"):
        saved_run(tmp_path)
    monkeypatch.setattr(checkpoint, "write_manifest", manifest)
    folder = tmp_path / "run"
    assert [f.name for f in (folder / "checkpoints").iterdir()] == ["step-000002"]
    config = run_config(
        tmp_path, training__max_steps=6, training__save_steps=2, training__save_total_limit=3
    )
    assert run_training(config, resume="auto").exists()


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path):
    figures = {2: ("a", 1.0), 4: ("b", 2.5), 6: ("b", 1.5), 8: ("b", None), 10: ("b", 2.0)}
    for step, (stage, nll) in figures.items():
        folder = tmp_path / "checkpoints" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        state = {"step": step, "stage": stage, "mixed_nll": nll}
        (folder / "trainer_state.json").write_text(json.dumps(state))
    drop_old(tmp_path, 1)
    kept = [f.name for f in list_checkpoints(tmp_path)]
    assert kept == ["step-000006", "step-000010"]  # that of stage a is of another objective


def test_checkpoints_know_the_evaluation_at_their_step(tmp_path):
    _, folder = saved_run(tmp_path, training__eval_steps=4)
    states = [checkpoint.read_state(f) for f in list_checkpoints(folder)]
    evaluations = {r["step"]: r["mixed_nll"] for r in read_metrics(folder, "eval")}
    assert [s.mixed_nll for s in states] == [None, pytest.approx(evaluations[4]), None]


def test_changes_are_refused_unless_they_are_insisted_on(tmp_path, capsys):
    _, folder = saved_run(tmp_path)
    changed = run_config(
        tmp_path, training__max_steps=7, training__save_steps=2, training__save_total_limit=3,
        optim__learning_rate=0.005,
    )  # fmt: skip
    with pytest.raises(
        UserError, match=r"optim.learning_rate was 0.01, is 0.005.*--allow-changes true"
    ):
        run_training(changed, resume="auto")
    run_training(changed, resume="auto", allow_changes=True)
    said = capsys.readouterr().out
    assert "--resume: optim.learning_rate was 0.01, is 0.005" in said
    assert "--resume: training.max_steps was 6, is 7" in said
    assert [r["step"] for r in read_metrics(folder, "train")] == [1, 2, 3, 4, 5, 6, 7]


def test_a_run_resumed_under_other_settings_has_the_learning_rates_of_these(tmp_path):
    def resumed(name, **changes):
        """Four steps more, or other ones, after the second step."""
        settings = {
            "training__max_steps": 4,
            "training__save_steps": 2,
            "optim__warmup_steps": 1,
            "optim__lr_scheduler_type": "linear",
            **changes,
        }
        folder = tmp_path / name
        return run_config(tmp_path, **settings, training__output_dir=str(folder))

    first = run_training(resumed("first")).parent
    shutil.rmtree(first / "checkpoints" / "step-000004")
    for name, changes in {
        "steps": {"training__max_steps": 8},
        "rate": {"optim__learning_rate": 0.1, "optim__weight_decay": 0.5},
    }.items():
        shutil.copytree(first, tmp_path / name)
        run_training(resumed(name, **changes), resume="auto", allow_changes=True)
        whole = run_training(resumed(f"whole-{name}", **changes)).parent
        rates = [[r["lr"] for r in read_metrics(f, "train")] for f in (tmp_path / name, whole)]
        assert rates[0][2:] == rates[1][2:], name
    state = torch.load(list_checkpoints(tmp_path / "rate")[-1] / "optimizer.bin", weights_only=True)
    assert state["param_groups"][0]["weight_decay"] == 0.5


def test_a_checkpoint_is_plain_tensors_and_json(tmp_path):
    _, folder = saved_run(tmp_path)
    newest = list_checkpoints(folder)[-1]
    for name in ("optimizer.bin",):
        torch.load(newest / name, weights_only=True)
    names = {f.name for f in newest.iterdir()}
    assert {Path(name).suffix for name in names} <= {".safetensors", ".json", ".bin", ".pkl"}
    # Loaded by accelerate with weights_only; it unpickles any custom_checkpoint_*.pkl whole.
    assert [name for name in names if name.endswith(".pkl")] == ["random_states_0.pkl"]


class Trap:
    """Runs code when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


def test_a_pickled_schedule_of_an_older_version_is_never_read(tmp_path):
    config, folder = saved_run(tmp_path)
    wanted = timeless(read_metrics(folder))
    for newest in list_checkpoints(folder)[1:]:
        shutil.rmtree(newest)
    (old,) = list_checkpoints(folder)
    torch.save(Trap(tmp_path / "ran"), old / "custom_checkpoint_0.pkl")
    state = json.loads((old / "trainer_state.json").read_text())
    state["engine"] = "whole"  # what one process was called then
    state.pop("strategy", None)
    (old / "trainer_state.json").write_text(json.dumps(state))
    write_manifest(old)
    run_training(config, resume="auto")
    assert not (tmp_path / "ran").exists()
    assert timeless(read_metrics(folder)) == wanted


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_the_model_of_a_checkpoint_is_taken_where_a_model_is_asked_for(tuning, tmp_path, capsys):
    """It is bit for bit the one that the run saves at its end; the run goes on beside it."""
    more = {}
    if tuning == "lora":
        plain_model().save_pretrained(tmp_path / "base")
        byte_tokenizer().save_pretrained(tmp_path / "base")
        more = {"model__config": None, "model__tokenizer": None, "tuning__method": "lora",
                "model__name_or_path": str(tmp_path / "base")}  # fmt: skip
    config, folder = saved_run(tmp_path, **more)
    capsys.readouterr()
    call = ["generate", "--max-new-tokens", "3", "--prompt", "2 + 3", "--model"]
    texts = []
    for model in (folder / "checkpoints/step-000006", folder, folder / "checkpoints/step-000002"):
        assert cli.main([*call, str(model)]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    exported = folder / "models" / "step-000006"
    a, b = (load_file(f / "quietstar.safetensors") for f in (exported, folder / "final"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    shutil.move(folder / "final", tmp_path / "kept")  # as if the run had been interrupted
    assert cli.main([*call, str(folder)]) == 0
    said = capsys.readouterr()
    assert said.out == texts[0]
    assert "is a run without a final model; its newest checkpoint is taken" in said.err
    shutil.move(tmp_path / "kept", folder / "final")
    before = (exported / "quietstar.json").stat().st_mtime_ns
    assert cli.main([*call, str(folder / "checkpoints/step-000006")]) == 0
    assert (exported / "quietstar.json").stat().st_mtime_ns == before  # written once
    earlier, newest = (folder / "checkpoints" / name for name in ("step-000002", "step-000006"))
    shutil.copy(earlier / "trainable.safetensors", newest)
    write_manifest(newest)
    os.utime(newest / MANIFEST_FILE, (1, 1))  # an older one than the model that was exported
    assert cli.main([*call, str(newest)]) == 0
    b = load_file(exported / "quietstar.safetensors")
    c = load_file(folder / "models/step-000002/quietstar.safetensors")
    assert all(torch.equal(b[name], c[name]) for name in c)  # written again
    run_training(config, resume=str(folder / "checkpoints/step-000004"))
    flip = folder / "checkpoints" / "step-000004" / "trainable.safetensors"
    flip.write_bytes(flip.read_bytes()[:-1] + b"x")
    assert cli.main([*call, str(folder / "checkpoints/step-000004")]) == 2
    assert "step-000004): is damaged: trainable.safetensors" in capsys.readouterr().err
    assert cli.main([*call, str(folder / "checkpoint")]) == 2
    assert f"there is no such folder. Did you mean {folder / 'checkpoints'}?" in (
        capsys.readouterr().err
    )
