"""Two processes in one run folder: one works, the other is told who does."""

from forking import runs_alone


def test_one_of_two_processes_works_and_nothing_is_lost():
    report = runs_alone("race.py", "--times", "1")
    assert report
    assert all(counts == {"sound": 1} for counts in report.values()), report
