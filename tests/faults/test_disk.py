"""Full disks: one line, nothing that was whole is lost, and the same command goes on after."""

import os
import subprocess
from pathlib import Path

import pytest
from forking import runs_alone


@pytest.fixture(autouse=True)
def _can_mount(tmp_path: Path):
    call = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(call, capture_output=True).returncode != 0:
        pytest.skip("file systems cannot be mounted here")
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_disk_at_any_write():
    report = runs_alone("disk.py", "--levels", "2")
    trials = {f"{n}, {r['free']} bytes": r["wrong"] for n, rs in report.items() for r in rs}
    assert {name: wrong for name, wrong in trials.items() if wrong} == {}
    codes = {record["code"] for records in report.values() for record in records}
    assert codes == {0, 2}
