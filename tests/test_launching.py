"""An error is seen once, whichever rank of a launch it strikes."""

import subprocess
import sys

import pytest
from launching import ROOT

from quietstar.cli import main as cli

ERROR = "quietstar: error: command line: --xyzzy"


@pytest.mark.parametrize(
    ("variables", "prefix"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, ""),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "[rank 1] "),
        ({"RANK": "8", "LOCAL_RANK": "0", "WORLD_SIZE": "16"}, "[rank 8] "),
        ({"RANK": "1"}, ""),  # left over in the environment: no launch has rank 1 of 1
        ({"RANK": "1", "WORLD_SIZE": "1"}, ""),
        ({"LOCAL_RANK": "1"}, ""),
    ],
)
def test_an_error_names_the_rank_that_it_struck(variables, prefix, monkeypatch, capsys):
    monkeypatch.setattr(cli, "SECONDS_FOR_RANK_0", 0.0)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["train", "--xyzzy"]) == 2
    assert capsys.readouterr().err.startswith(prefix + ERROR)


FAILING = """
import os, sys, time
from quietstar.cli.main import main
if os.environ["RANK"] not in sys.argv[1]:
    time.sleep(120)
sys.exit(main(["train", "--xyzzy"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["1", "01"])
def test_an_error_of_one_rank_or_of_both_is_printed_once(ranks, tmp_path):
    script = tmp_path / "failing.py"
    script.write_text(FAILING, encoding="utf-8")
    call = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    call += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(script), ranks]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=100)
    lines = [line for line in done.stderr.splitlines() if ERROR in line]
    assert len(lines) == 1
    assert lines[0].startswith("[rank 1] " if ranks == "1" else "quietstar")
