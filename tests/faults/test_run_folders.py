"""The run folder: whose it is, who works in it, and that nothing of anybody's is lost."""

import errno
import fcntl
import json
import math
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_training import assert_same_weights, timeless
from tiny import read_metrics, run_config

from quietstar import __version__
from quietstar.cli import main as cli
from quietstar.config.loading import save_config
from quietstar.errors import Preempted, UserError, reason_of
from quietstar.system import files, signals
from quietstar.system.locks import locked
from quietstar.training import evaluation, loop, reporter, run_dir
from quietstar.training.checkpoint import list_checkpoints, write_manifest
from quietstar.training.run import run_training

SETTINGS = {"training__max_steps": 4, "training__save_steps": 2, "training__eval_steps": 2}


def content(folder):
    """Every file of a folder, and where its links lead."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an uninterrupted run."""
    return run_training(run_config(tmp_path_factory.mktemp("whole"), **SETTINGS)).parent


# --- Whose folder it is ---------------------------------------------------------------------------
FOREIGN = {
    "a project": {"config.yaml": "name: mine\n", "checkpoints/my_model.pt": "weights"},
    "a config of ours": {"config.yaml": "training: {max_steps: 3}\n"},
    "metrics": {"metrics.jsonl": '{"kind": "train", "step": 1}\n'},
    "anything": {"notes.txt": "mine"},
    "a config and a report": {
        "config.yaml": "model: {name_or_path: mine}\ndata: {train: texts.jsonl}\n",
        "checkpoints/step-000010/mine.pt": "weights",
        "metrics.jsonl": '{"kind": "train", "step": 1}\n',
        "report.html": "mine",
    },
    "a marker without its fields": {"quietstar-run.json": "{}", "final/mine": "mine"},
    "a marker that is a list": {"quietstar-run.json": "[]", "final/mine": "mine"},
}


@pytest.mark.parametrize("resume", [None, "auto"])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_folder_of_others_is_never_touched(tmp_path, name, overwrite, resume):
    for file, text in FOREIGN[name].items():
        path = tmp_path / "run" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    before = content(tmp_path / "run")
    config = run_config(tmp_path)
    with pytest.raises(UserError, match=r"no run of quietstar began it.*new or empty"):
        run_training(config, resume=resume, overwrite=overwrite)
    assert content(tmp_path / "run") == before


def test_a_run_of_an_earlier_version_is_gone_on_with_and_never_overwritten(tmp_path):
    config = run_config(tmp_path, **SETTINGS)
    folder = run_training(config).parent
    (folder / run_dir.MARKER_FILE).unlink()
    before = content(folder)
    with pytest.raises(UserError, match=r"no quietstar-run\.json as runs write it"):
        run_training(config, overwrite=True)
    assert content(folder) == before
    run_training(config, resume="auto")
    assert (folder / run_dir.MARKER_FILE).exists()


def test_a_run_marks_its_folder(whole):
    marker = json.loads((whole / run_dir.MARKER_FILE).read_text())
    assert set(marker) == {"version", "host", "pid", "start"}
    assert (marker["version"], marker["host"]) == (__version__, socket.gethostname())
    assert marker["pid"] == os.getpid()


LINKED = ["config.yaml", "metrics.jsonl", "final", "ema", "results.json", "checkpoints",
          "tensorboard", "tensorboard/quietstar"]  # fmt: skip


@pytest.mark.parametrize("name", LINKED)
def test_a_link_in_a_run_folder_is_not_written_through(tmp_path, name):
    config = run_config(tmp_path, **SETTINGS)
    run_training(config)
    (tmp_path / "run" / "tensorboard" / "quietstar").mkdir(parents=True)
    (tmp_path / "run" / "ema").mkdir()
    (tmp_path / "run" / "checkpoints" / "step-000099.partial").mkdir()
    (tmp_path / "run" / "checkpoints" / "step-000099.partial" / "mine").touch()
    outside = tmp_path / "of-the-user"
    (tmp_path / "run" / name).rename(outside)
    (tmp_path / "run" / name).symlink_to(outside)
    before = content(tmp_path)
    with pytest.raises(UserError, match=rf"its {name} is a link, not a .*Remove it"):
        run_training(config, resume="auto")
    with pytest.raises(UserError, match=rf"its {name} is a link"):
        run_training(config, overwrite=True)
    after = content(tmp_path)
    after.pop("run/quietstar.lock"), before.pop("run/quietstar.lock")
    assert after == before


def test_overwriting_deletes_what_a_run_wrote_and_nothing_else(tmp_path):
    run_training(run_config(tmp_path, **SETTINGS))
    for name in ("notes.txt", "checkpoints/notes.txt", "checkpoints/step-7/notes.txt"):
        (tmp_path / "run" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "run" / name).write_text("mine")
    run_training(run_config(tmp_path, training__max_steps=1), overwrite=True)
    assert list_checkpoints(tmp_path / "run") == []
    for name in ("notes.txt", "checkpoints/notes.txt", "checkpoints/step-7/notes.txt"):
        assert (tmp_path / "run" / name).read_text() == "mine"


@pytest.mark.parametrize("resume", [None, "auto"])
def test_what_only_looks_half_written_is_kept(tmp_path, resume):
    config = run_config(tmp_path, **SETTINGS)
    folder = run_training(config).parent
    mine = ("download.partial", "data.partial/mine", "checkpoints/notes.partial",
            ".notes.txt.12.partial", "config.yaml.partial", "mine.replaced")  # fmt: skip
    ours = (".config.yaml.12.partial", ".metrics.jsonl.3.partial", "final.partial/x",
            "checkpoints/step-000009.partial/x")  # fmt: skip
    for name in (*mine, *ours):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    run_training(config, resume=resume, overwrite=resume is None)
    assert [name for name in (*mine, *ours) if (folder / name).exists()] == list(mine)


def test_what_a_run_reads_does_not_lie_in_what_it_replaces(tmp_path):
    folder = run_training(run_config(tmp_path, **SETTINGS)).parent
    (folder / "final" / "texts.jsonl").write_bytes((tmp_path / "texts.jsonl").read_bytes())
    (tmp_path / "link").symlink_to(folder)
    before = content(folder)
    for key, path in {
        "data.train": folder / "final" / "texts.jsonl",
        "data.eval": folder / "metrics.jsonl",
        "model.name_or_path": folder / "final",
        "model.tokenizer": tmp_path / "link" / "final",
    }.items():
        settings = {**SETTINGS, key.replace(".", "__"): str(path)}
        if key == "model.name_or_path":
            settings["model__config"] = None
        told = rf"^{key} \({path}\): lies in what this run replaces \({folder}/"
        with pytest.raises(UserError, match=told):
            run_training(run_config(tmp_path, **settings), resume="auto", allow_changes=True)
        with pytest.raises(UserError, match=told):
            run_training(run_config(tmp_path, **settings), overwrite=True)
    assert content(folder) == before


def test_a_final_folder_of_something_else_is_refused_before_the_work(tmp_path):
    config = run_config(tmp_path, **{**SETTINGS, "training__max_steps": 6})
    run_training(run_config(tmp_path, **SETTINGS))
    (tmp_path / "run" / "final" / "quietstar.json").unlink()
    before = content(tmp_path / "run")
    with pytest.raises(UserError, match=r"final: already holds something that is no saved model"):
        run_training(config, resume="auto")
    after = content(tmp_path / "run")
    assert {**after, "quietstar.lock": b""} == {**before, "quietstar.lock": b""}


def test_a_setup_that_fails_leaves_no_folder(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        run_training(run_config(tmp_path, data__train=str(tmp_path / "no.jsonl")))
    assert not (tmp_path / "run").exists()


def test_a_finished_run_without_checkpoints_is_not_replaced_by_resuming(tmp_path):
    config = run_config(tmp_path)
    before = content(run_training(config).parent)
    with pytest.raises(UserError, match="holds a finished run without a checkpoint"):
        run_training(config, resume="auto")
    after = content(tmp_path / "run")
    assert {**after, "quietstar.lock": b""} == {**before, "quietstar.lock": b""}


# --- Who works in it ------------------------------------------------------------------------------
def test_a_second_process_is_told_who_works_in_the_folder(tmp_path):
    hold = "import sys, time; from pathlib import Path; from quietstar.system.locks import locked\n"
    hold += (
        "with locked(Path(sys.argv[1]), 'it', 'Wait.'): print('held', flush=True); time.sleep(60)"
    )
    (tmp_path / "run").mkdir()
    lock = str(tmp_path / "run" / run_dir.LOCK_FILE)
    with subprocess.Popen([sys.executable, "-c", hold, lock], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        config = run_config(tmp_path)
        told = rf"is in use by process {other.pid} on {socket.gethostname()} since \d{{4}}-"
        for resume in (None, "auto"):
            with pytest.raises(UserError, match=told):
                run_training(config, resume=resume)
        other.kill()
    run_training(config)  # the lock of a dead process is no lock


def test_a_lock_whose_file_its_last_holder_deleted_is_taken_anew(tmp_path, monkeypatch):
    path, flock, deleted = tmp_path / "lock", fcntl.flock, []

    def delete_first(descriptor, operation):
        flock(descriptor, operation)
        if not deleted:
            deleted.append(path.unlink())

    monkeypatch.setattr("fcntl.flock", delete_first)
    with locked(path, "it", "Wait."):
        assert json.loads(path.read_text())["pid"] == os.getpid()
        with pytest.raises(UserError, match=f"in use by process {os.getpid()}"), \
             locked(path, "it", "Wait."):  # fmt: skip
            pass


# --- Going on with it -----------------------------------------------------------------------------
def test_settings_are_compared_also_before_the_first_checkpoint(tmp_path, monkeypatch):
    step = loop.accumulate_gradients

    for at in (0, 1):  # a run without a single step is no run yet: it begins anew

        def fail(run, number, *rest, at=at):
            if number == at:
                raise UserError("stopped")
            return step(run, number, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(loop, "accumulate_gradients", fail)
            with pytest.raises(UserError, match="stopped"):
                run_training(run_config(tmp_path, optim__learning_rate=(0.5, 0.01)[at]))
    before = content(tmp_path / "run")
    with pytest.raises(UserError, match=r"optim.learning_rate was 0.01, is 0.5"):
        run_training(run_config(tmp_path, optim__learning_rate=0.5), resume="auto")
    after = content(tmp_path / "run")
    assert {**after, "quietstar.lock": b""} == {**before, "quietstar.lock": b""}
    assert run_training(run_config(tmp_path), resume="auto").exists()


def test_a_run_without_its_config_is_not_gone_on_with_unasked(tmp_path):
    config = run_config(tmp_path, **SETTINGS)
    run_training(config)
    (tmp_path / "run" / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"config.yaml is missing.*--allow-changes"):
        run_training(config, resume="auto")
    run_training(config, resume="auto", allow_changes=True)


@pytest.mark.parametrize("streaming", [False, True])
def test_what_a_stream_holds_out_is_part_of_the_run(tmp_path, streaming):
    def config(sequences):
        data = {"data__streaming": streaming, "data__eval_sequences": sequences}
        return run_config(tmp_path, **SETTINGS, **data)

    run_training(config(4))
    if not streaming:  # held out by a share: the training texts stay the same
        run_training(config(8), resume="auto")
        return
    with pytest.raises(UserError, match=r"data.eval_sequences was 4, is 8.*another run"):
        run_training(config(8), resume="auto")


@pytest.mark.parametrize("as_earlier_version", [False, True])
def test_code_that_the_config_of_a_run_folder_names_is_not_run(
    tmp_path, monkeypatch, as_earlier_version
):
    config = run_config(tmp_path, **SETTINGS)
    folder = run_training(config).parent
    (tmp_path / "evil_part.py").write_text("open('canary', 'w')\n")
    monkeypatch.chdir(tmp_path)
    text = (folder / "config.yaml").read_text()
    assert "objective: quiet_star" in text
    text = text.replace("objective: quiet_star", "objective: evil_part:Evil")
    (folder / "config.yaml").write_text(text)
    if as_earlier_version:
        (folder / run_dir.MARKER_FILE).unlink()
    with pytest.raises(UserError):
        run_training(config, resume="auto", allow_changes=True)
    assert not (tmp_path / "canary").exists()


def test_fewer_steps_than_done_are_refused(tmp_path):
    run_training(run_config(tmp_path, **SETTINGS))
    fewer = run_config(tmp_path, **{**SETTINGS, "training__max_steps": 3})
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=r"max_steps: the run has 3 steps, but .* is after 4"):
        run_training(fewer, resume="auto")
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


def test_a_resume_that_fails_changes_neither_config_nor_metrics(tmp_path):
    config = run_config(tmp_path, **SETTINGS)
    folder = run_training(config).parent
    newest = list_checkpoints(folder)[-1]
    weights = load_file(newest / "trainable.safetensors")
    weights["start_embedding"] = weights["start_embedding"][:1]  # would broadcast
    save_file(weights, newest / "trainable.safetensors")
    write_manifest(newest)
    before = content(folder)
    other = run_config(tmp_path, **{**SETTINGS, "optim__learning_rate": 0.5})
    with pytest.raises(UserError, match=r"start_embedding has shape \(1,\)"):
        run_training(other, resume="auto", allow_changes=True)
    after = content(folder)
    assert {**after, "quietstar.lock": b""} == {**before, "quietstar.lock": b""}


def test_half_written_folders_are_tidied_up_and_half_replaced_ones_restored(tmp_path, whole):
    config = run_config(tmp_path, **SETTINGS)
    folder = run_training(config).parent
    (newest := list_checkpoints(folder)[-1]).rename(f"{newest}.replaced")
    (folder / "checkpoints" / "step-000009.partial").mkdir()
    (folder / "final").rename(folder / "final.replaced")
    (folder / ".results.json.7.partial").write_text("{")
    run_training(config, resume="auto")
    assert [p.name for p in folder.rglob("*") if p.suffix in (".partial", ".replaced")] == []
    assert timeless(read_metrics(folder)) == timeless(read_metrics(whole))
    assert_same_weights(folder, whole)


def test_a_folder_in_which_nothing_but_half_a_marker_was_written_is_a_new_one(tmp_path, whole):
    config = run_config(tmp_path, **SETTINGS)
    (folder := tmp_path / "run").mkdir()
    (folder / ".quietstar-run.json.7.partial").write_text("{")
    (folder / "quietstar.lock").touch()
    assert_same_weights(run_training(config, resume="auto").parent, whole)
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("damage", [b"\0" * 40, b"\xff\xfe{}", b"[1]", b'{"kind": "train"}',
                                    b"[" * 10**5, b'{"step": 1' + b"0" * 5000 + b"}"])  # fmt: skip
def test_a_damaged_line_of_metrics_ends_nothing(tmp_path, capsys, damage, whole):
    config = run_config(tmp_path, **SETTINGS)
    folder = run_training(config).parent
    lines = (folder / "metrics.jsonl").read_bytes().split(b"\n")
    (folder / "metrics.jsonl").write_bytes(b"\n".join([lines[0], damage, *lines[1:]]))
    run_training(config, resume="auto")
    assert "metrics.jsonl are dropped: 1" in " ".join(capsys.readouterr().out.split())
    assert timeless(read_metrics(folder)) == timeless(read_metrics(whole))


# --- Disks that fail ------------------------------------------------------------------------------
def fail_writes(monkeypatch, is_bad):
    """Has `files` meet a full disk where ``is_bad(path)``."""
    for name in ("append", "write_whole"):
        write = getattr(files, name)

        def guarded(path, text, write=write):
            if is_bad(Path(path)):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            write(path, text)

        monkeypatch.setattr(files, name, guarded)


def test_training_goes_on_without_its_metrics_and_writes_them_later(
    tmp_path, monkeypatch, capsys, whole
):
    calls = []

    def is_bad(path):
        calls.append(path)
        return path.name == "metrics.jsonl" and 2 < len(calls) < 6

    with monkeypatch.context() as patch:
        fail_writes(patch, is_bad)
        run_training(run_config(tmp_path, **SETTINGS))
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("No space left on device); training goes on") == 1
    assert timeless(read_metrics(tmp_path / "run")) == timeless(read_metrics(whole))


def test_a_line_that_is_cut_by_a_full_disk_is_taken_back(tmp_path):
    path = tmp_path / "lines"
    files.append(path, "one\n")
    code = "import resource, sys; from pathlib import Path; from quietstar.system import files\n"
    code += "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\n"
    code += "files.append(Path(sys.argv[1]), 'a longer one\\n')"
    call = [sys.executable, "-c", code, str(path)]
    assert b"File too large" in subprocess.run(call, capture_output=True, check=False).stderr
    assert path.read_text() == "one\n"


def test_the_words_of_libraries_about_a_full_disk_are_plain():
    for text in (
        "[enforce fail at inline_container.cc:672] . unexpected pos 24512 vs 24400",
        "basic_ios::clear: iostream error",
    ):
        assert reason_of(RuntimeError(text)) == "the disk is full, or failed while it was written"
    advice = "\x1b[1mWeights only load failed\x1b[0m. Re-running with weights_only=False ..."
    assert "weights_only" not in reason_of(RuntimeError(advice))
    assert reason_of(ValueError("\x1b[31mred\x1b[0m  and\nlong")) == "red and long"


def test_a_report_that_fails_ends_no_run(tmp_path, capsys):
    def fail(folder, status):
        raise RuntimeError("no page\x1b[2J")

    run_training(run_config(tmp_path), on_report=fail)
    said = capsys.readouterr().out
    assert "warning: the report is not written: no page" in said
    assert "\x1b[2J" not in said


def test_a_run_whose_nll_rises_far_is_told(tmp_path, capsys):
    run_training(run_config(tmp_path, training__max_steps=3, optim__learning_rate=5.0))
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("warning: step 3: a held-out NLL has risen by") == 1
    assert "training diverges. Lower optim.learning_rate" in said


def test_data_that_vanishes_leaves_a_checkpoint(tmp_path, monkeypatch):
    ahead = loop.read_ahead
    config = run_config(tmp_path, **SETTINGS)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "read_ahead", lambda run: _cut(ahead(run), 3))
        with pytest.raises(UserError, match=r"No such file.*Step 3 is saved in .*--resume auto"):
            run_training(config)
    assert list_checkpoints(tmp_path / "run")[-1].name == "step-000003"


def _cut(batches, count):
    for number, one in enumerate(batches):
        if number == count:
            raise UserError("texts.jsonl: No such file or directory. Restore it.")
        yield one


# --- Weights that are not finite ------------------------------------------------------------------
@pytest.mark.parametrize("save_steps", [0, 1])
def test_a_run_that_diverges_in_its_last_step_writes_no_weights(tmp_path, monkeypatch, save_steps):
    rates = loop.set_learning_rates

    def explode(optimizer, optim, step, steps):
        lr = rates(optimizer, optim, step, steps)
        if step + 1 == steps:
            for group in optimizer.param_groups:
                group["lr"] = math.inf
        return lr

    monkeypatch.setattr(loop, "set_learning_rates", explode)
    config = run_config(tmp_path, training__max_steps=3, training__save_steps=save_steps)
    with pytest.raises(UserError, match=r"step 3: the weights are not finite \(.*learning_rate"):
        run_training(config)
    assert not (tmp_path / "run" / "final").exists()
    for folder in list_checkpoints(tmp_path / "run"):
        weights = load_file(folder / "trainable.safetensors").values()
        assert all(bool(torch.isfinite(weight).all()) for weight in weights)
    assert [f.name for f in list_checkpoints(tmp_path / "run")] == (
        ["step-000001", "step-000002"] if save_steps else []
    )


# --- Signals --------------------------------------------------------------------------------------
PHASES = {
    "reading": (loop, "next_batches"),
    "step": (loop, "accumulate_gradients"),
    "evaluation": (evaluation, "score_batch"),
    "update": (reporter.Reporter, "step_ends"),
    "save": (loop, "save_checkpoint"),
}


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_any_phase_is_followed_by_the_same_trajectory(
    tmp_path, monkeypatch, phase, count, whole
):
    owner, name = PHASES[phase]
    call, calls = getattr(owner, name), []

    def signaled(*args, **keywords):
        calls.append(name)
        if len(calls) == count + (phase == "evaluation"):
            os.kill(os.getpid(), signal.SIGTERM)
        return call(*args, **keywords)

    config = run_config(tmp_path, **SETTINGS)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, signaled)
        with suppress(Preempted):  # the third save is that of the signal's checkpoint, or none
            run_training(config)
    run_training(config, resume="auto")
    assert timeless(read_metrics(tmp_path / "run")) == timeless(read_metrics(whole))
    assert_same_weights(tmp_path / "run", whole)


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 75), ("SIGUSR1", 75), ("SIGINT", 130)])
def test_exit_codes_and_the_mark_for_schedulers(tmp_path, monkeypatch, capsys, name, code):
    step = loop.accumulate_gradients

    def signaled(run, number, *rest):
        if number == 1:
            os.kill(os.getpid(), getattr(signal, name))
        return step(run, number, *rest)

    monkeypatch.setattr(loop, "accumulate_gradients", signaled)
    save_config(run_config(tmp_path), tmp_path / "config.yaml")
    assert cli.main(["train", "--config", str(tmp_path / "config.yaml")]) == code
    err = capsys.readouterr().err
    assert err.startswith(f"quietstar: {name} asked for an end; step 1 is saved in ")
    assert err.count("\n") == 1
    # Launch scripts put a run that has this mark into the queue again, unlike one ended by hand.
    assert (tmp_path / "run" / "preempted").exists() == (name != "SIGINT")


def test_a_second_signal_ends_at_once():
    code = "import os, signal, sys, time\nfrom quietstar.system import signals\n"
    code += "with signals.listening(), signals.held():\n  print('ready', flush=True)\n"
    code += "  while True: time.sleep(0.01)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)  # as from a launcher that hands it on: the same request
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(signals.SAME_REQUEST_SECONDS + 0.3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == -signal.SIGTERM


def test_held_puts_a_signal_off_to_its_end_and_raises_it_once():
    seen = []
    with signals.listening():
        with pytest.raises(signals.Stopped, match="SIGUSR1"), signals.held():  # noqa: PT012
            os.kill(os.getpid(), signal.SIGUSR1)
            with signals.held():
                seen.append("inner")
            seen.append("outer")
        with signals.held():  # as the save that follows
            seen.append("save")
    assert seen == ["inner", "outer", "save"]
