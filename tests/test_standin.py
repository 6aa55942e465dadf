"""Runs `on_standin` in a process of its own: a backend of torch cannot be removed again."""

import subprocess
import sys
from pathlib import Path


def test_devices_do_not_mix_and_the_host_waits_only_where_it_must():
    call = [sys.executable, "-m", "pytest", "-q", "on_standin.py", "-p", "no:cacheprovider"]
    run = subprocess.run(call, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-10_000:]
