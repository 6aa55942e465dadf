"""Runs killed at any moment leave whole files and go on to the same weights, bit for bit.

``python tests/faults/kill.py --kills 50`` kills more often.
"""

import pytest
from forking import runs_alone

FAULTS = ("corrupt", "mixed", "unreadable", "divergent", "failed")


def assert_sound(counted, kills):
    assert not counted["problems"]
    assert {name: counted[name] for name in FAULTS} == dict.fromkeys(FAULTS, 0)
    assert counted["kills"] == kills


def test_one_process():
    assert_sound(runs_alone("kill.py", "--kills", "6", "--seed", "1")["one"], 6)


@pytest.mark.slow
def test_two_processes():  # by hand --strategies ddp,zero2 too
    report = runs_alone("kill.py", "--kills", "1", "--strategies", "fsdp2")
    assert_sound(report["fsdp2"], 1)
