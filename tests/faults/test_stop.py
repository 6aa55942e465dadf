"""Signals in the phases of a run and of other commands: a prompt end, and the same run after."""

import pytest
from forking import runs_alone


@pytest.mark.slow
def test_a_signal_ends_any_phase_soon_and_the_run_goes_on():
    phases = "rollout,save"  # by hand all, and SIGINT and SIGUSR1
    report = runs_alone("stop.py", "--signals", "SIGTERM", "--phases", phases)
    wrong = {record["phase"]: record["wrong"] for record in report["one"] if record["wrong"]}
    assert not wrong
    assert len(report["one"]) == 2
