"""The benchmarks run, and their files hold what they promise."""

import json
import os
import re
import subprocess

import pytest
import torch
from launching import ROOT

from benchmarks import decode, judging, long, rollout, step, sweep, tuning
from benchmarks.measure import peak_mb
from quietstar.backbone.devices import keep_freed_memory
from quietstar.cli.main import run_command


def test_a_test_that_fails_on_a_gpu_does_not_cost_the_figures(tmp_path):
    calls, stub = tmp_path / "calls.txt", tmp_path / "python"
    stub.write_text(f'#!/bin/sh\necho "$*" >> {calls}\ncase "$*" in *pytest*) exit 1;; esac\n')
    stub.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    call = ["bash", str(ROOT / "launch/gpu_bench.sh"), str(tmp_path / "figures")]
    done = subprocess.run(call, env=os.environ | {"PATH": path}, capture_output=True)
    ran = calls.read_text()
    assert done.returncode == 1
    assert all(f"benchmarks.{name}" in ran for name in ("step", "rollout", "decode", "sweep"))


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_memory_of_a_gpu_is_measured_whatever_its_name(device, monkeypatch):
    for name in ("reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: 2**20 * name.startswith("max"))
    assert peak_mb(lambda: None, device) == 1


@pytest.mark.slow
def test_the_step_and_its_floor(tmp_path):
    out = tmp_path / "step.json"
    main, call = step.main, ["--seq-len", "16", "--thought-length", "3", "--repeats", "1"]
    assert run_command(main, [*call, "--device", "cpu", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["step_over_floor"] == pytest.approx(found["step_seconds"] / found["floor_seconds"])
    assert found["peak_mb_above_model"] > found["peak_mb_above_gradients"]
    assert found["floor_tflop"] > 0
    assert found["settings"]["seq_len"] == 16


def test_sampling_and_its_floor(tmp_path):
    out = tmp_path / "rollout.json"
    main, call = rollout.main, ["--seq-len", "16", "--thought-length", "3", "--repeats", "1"]
    assert (
        run_command(main, [*call, "--positions", "every", "--device", "cpu", "--json", str(out)])
        == 0
    )
    found = json.loads(out.read_text())
    ratio = found["rollout_seconds"] / found["floor_seconds"]
    assert found["rollout_over_floor"] == pytest.approx(ratio)
    places = 4  # ceil(0.25 * 15)
    assert found["tokens_per_second"] * found["rollout_seconds"] == pytest.approx(3 * 2 * places)


def test_long_thoughts_beside_generate_and_a_plain_model(tmp_path):
    out = tmp_path / "long.json"
    call = ["--seq-len", "12", "--thought-length", "30", "--num-thoughts", "3", "--repeats", "1"]
    call += ["--batch-size", "2", "--device", "cpu", "--json", str(out)]
    assert run_command(long.main, call) == 0
    parts = json.loads(out.read_text())["parts"]
    assert list(parts) == ["equal", "ragged", "learn", "step"]
    for name, part in parts.items():
        ratio = part["tokens_per_second"] / part["other_tokens_per_second"]
        assert part["ratio"] == pytest.approx(1 / ratio if name in ("learn", "step") else ratio)


def test_decoding_beside_the_ideal(tmp_path):
    out = tmp_path / "decode.json"
    main, call = decode.main, ["--prefix", "8", "--tokens", "2", "--repeats", "1"]
    assert run_command(main, [*call, "--device", "cpu", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["batch_size"] for row in rows] == [1, 8]
    for row in rows:
        share = row["tokens_per_second"] / row["ideal_tokens_per_second"]
        assert row["share_of_ideal"] == pytest.approx(share)


def test_decoding_with_a_gate_thinks_at_a_share_of_the_tokens(tmp_path):
    out = tmp_path / "decode.json"
    call = ["--prefix", "8", "--tokens", "8", "--repeats", "1", "--gate", "0.25"]
    call += ["--batch-sizes", "4", "--thought-length", "2", "--device", "cpu", "--json", str(out)]
    assert run_command(decode.main, call) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert 0.1 < row["thinking_share"] < 0.4


def test_a_judge_beside_a_naive_loop(tmp_path):
    out = tmp_path / "judging.json"
    call = ["--prompts", "1", "--candidates", "3", "--words", "9", "--candidate-words", "1"]
    call += ["--repeats", "1", "--device", "cpu", "--json", str(out)]
    assert run_command(judging.main, call) == 0
    found = json.loads(out.read_text())
    judge, naive = found["judge"], found["naive"]
    assert found["speedup"] == pytest.approx(naive["seconds"] / judge["seconds"])
    assert judge["pairs_per_second"] * judge["seconds"] == pytest.approx(3)
    assert judge["tokens"] < naive["tokens"]
    assert found["largest_difference"] < 1e-5


def test_freed_memory_is_kept_unless_the_environment_rules(monkeypatch):
    asked = []

    class Library:
        def mallopt(self, parameter, value):
            asked.append((parameter, value))
            return 1

    monkeypatch.setattr("quietstar.backbone.devices.ctypes.CDLL", lambda _: Library())
    monkeypatch.setattr("quietstar.backbone.devices.sys.platform", "linux")
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    assert keep_freed_memory()
    assert asked == [(-4, 0), (-1, 2**31 - 1)]
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    assert not keep_freed_memory()
    assert len(asked) == 2


def test_a_sweep_over_lengths_can_keep_the_tokens_of_a_step(monkeypatch, tmp_path):
    out = tmp_path / "sweep.json"
    made = []

    def here(measure, args):  # in place of a process
        made.append((args.batch_size, args.seq_len))
        return dict.fromkeys(sweep.FIGURES, 1.0)

    monkeypatch.setattr(sweep, "in_fresh_process", here)
    main, call = sweep.main, ["--axes", "S", "--step-tokens", "512", "--json", str(out)]
    assert run_command(main, call) == 0
    assert made == [(8, 64), (4, 128), (2, 256), (1, 512), (1, 1024)]
    assert [row["value"] for row in json.loads(out.read_text())["axes"]["S"]] == [
        s for _, s in made
    ]


def test_exponents_are_slopes_of_logarithms(tmp_path):
    rows = [{"value": v, "step_seconds": 3 * v**1.5, "step_over_floor": 1.2,
             "peak_mb_above_gradients": 2.0 * v} for v in (1, 2, 4, 8)]  # fmt: skip
    assert sweep.exponent(rows, "step_seconds") == pytest.approx(1.5)
    assert sweep.exponent(rows, "step_over_floor") == pytest.approx(0, abs=1e-9)
    sweep.write_plot(tmp_path / "x.svg", {"T": rows})
    assert "</svg>" in (tmp_path / "x.svg").read_text()
    assert run_command(sweep.main, ["--axes", "TX"]) == 2


@pytest.mark.parametrize(
    ("main", "call", "words"),
    [
        (step.main, ["--seq-len", "1"], r"--seq-len \(1\): must be a whole number of at least 2"),
        (step.main, ["--seq-len", "9000"], "--seq-len: .* takes at most 8178"),
        (step.main, ["--repeats", "0"], r"--repeats \(0\): must be a whole number of at least 1"),
        (step.main, ["--share", "2"], r"--share \(2\): must be a number above 0 and at most 1"),
        (step.main, ["--block-tokens", "-5"], r"--block-tokens \(-5\): must be a whole number"),
        (sweep.main, ["--axes", ""], r"--axes \(\): must be letters of STKAV"),
        (decode.main, ["--tokens", "x"], r"--tokens \(x\): must be a whole number of at least 1"),
        (tuning.main, ["--model", "m", "--steps", "1"], r"--steps \(1\): must be .* at least 2"),
        (step.main, ["--seqlen", "4"], "--seqlen: unknown option; did you mean --seq-len"),
    ],
)
def test_a_wrong_value_is_told_of_in_one_line(main, call, words, capsys):
    assert run_command(main, call) == 2
    (line,) = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("quietstar: error")
    ]
    assert re.search(words, line)


def test_a_file_that_cannot_be_written_is_told_of_before_the_work(tmp_path, capsys):
    (tmp_path / "file").touch()
    main, call = step.main, ["--json", str(tmp_path / "file" / "x.json")]
    assert run_command(main, call) == 2
    assert "--json (" in capsys.readouterr().err


def test_one_thought_has_no_others_to_be_compared_with(tmp_path):
    out = tmp_path / "deeper" / "step.json"
    main, call = step.main, ["--seq-len", "8", "--thought-length", "2", "--num-thoughts", "1"]
    assert run_command(main, [*call, "--repeats", "1", "--device", "cpu", "--json", str(out)]) == 0
    assert json.loads(out.read_text())["settings"]["num_thoughts"] == 1
