"""A fixed sample of the malformed inputs of ``fuzz.py``: each ends as the command line promises."""

from forking import runs_alone

COUNT = 20


def test_malformed_inputs_are_refused_in_a_line_and_lose_nothing():
    records = runs_alone("fuzz.py", "--count", str(COUNT), "--seed", "1", "--real", "30")
    assert len(records) == COUNT
    failed = {f"{r['name']}: {r['what']}": r["verdicts"] for r in records if r["verdicts"]}
    assert not failed
    # Some inputs only look odd: a program that refused everything would pass as well.
    assert {0, 2} <= {record["code"] for record in records}
