"""The benchmarks run, and their files hold what they promise."""

import json
import multiprocessing
import os

import pytest

from quietstar import cli
from quietstar.bench import sweep
from quietstar.cpu_memory import keep_freed_memory


@pytest.mark.slow
def test_the_step_and_its_floor(tmp_path):
    out = tmp_path / "step.json"
    call = ["bench", "step", "--seq-len", "16", "--thought-length", "3", "--repeats", "1"]
    assert cli.main([*call, "--device", "cpu", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["step_over_floor"] == pytest.approx(found["step_seconds"] / found["floor_seconds"])
    assert found["peak_mb_above_model"] > found["peak_mb_above_gradients"]
    assert found["floor_tflop"] > 0
    assert found["settings"]["seq_len"] == 16


def test_sampling_and_its_floor(tmp_path):
    out = tmp_path / "rollout.json"
    call = ["bench", "rollout", "--seq-len", "16", "--thought-length", "3", "--repeats", "1"]
    assert cli.main([*call, "--positions", "every", "--device", "cpu", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    ratio = found["rollout_seconds"] / found["floor_seconds"]
    assert found["rollout_over_floor"] == pytest.approx(ratio)
    places = 4  # ceil(0.25 * 15)
    assert found["tokens_per_second"] * found["rollout_seconds"] == pytest.approx(3 * 2 * places)


def test_decoding_beside_the_ideal(tmp_path):
    out = tmp_path / "decode.json"
    call = ["bench", "decode", "--prefix", "8", "--tokens", "2", "--repeats", "1"]
    assert cli.main([*call, "--device", "cpu", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["batch_size"] for row in rows] == [1, 8]
    for row in rows:
        share = row["tokens_per_second"] / row["ideal_tokens_per_second"]
        assert row["share_of_ideal"] == pytest.approx(share)


def test_freed_memory_is_kept_unless_the_environment_rules(monkeypatch):
    asked = []

    class Library:
        def mallopt(self, parameter, value):
            asked.append((parameter, value))
            return 1

    monkeypatch.setattr("quietstar.cpu_memory.ctypes.CDLL", lambda _: Library())
    monkeypatch.setattr("quietstar.cpu_memory.sys.platform", "linux")
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

    class Here:  # in place of processes
        def __init__(self, *args):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *args):
            pass

        close = join = __enter__

        def apply(self, function, args):
            made.append((args[0].batch_size, args[0].seq_len))
            return dict.fromkeys(sweep.FIGURES, 1.0)

    monkeypatch.setattr(multiprocessing.get_context("spawn"), "Pool", Here)
    call = ["bench", "sweep", "--axes", "S", "--step-tokens", "512", "--json", str(out)]
    assert cli.main(call) == 0
    assert made == [(8, 64), (4, 128), (2, 256), (1, 512), (1, 1024)]
    assert [row["value"] for row in json.loads(out.read_text())["axes"]["S"]] == [
        s for _, s in made
    ]


def test_exponents_are_slopes_of_logarithms(tmp_path):
    rows = [{"value": v, "step_seconds": 3 * v**1.5, "step_over_floor": 1.2,
             "peak_mb_above_gradients": 2.0 * v} for v in (1, 2, 4, 8)]  # fmt: skip
    assert sweep.exponent(rows, "step_seconds") == pytest.approx(1.5)
    assert sweep.exponent(rows, "step_over_floor") == pytest.approx(0, abs=1e-9)
    sweep.write_plot(tmp_path / "x.html", {"T": rows})
    assert "plotly" in (tmp_path / "x.html").read_text()
    assert cli.main(["bench", "sweep", "--axes", "TX"]) == 2
