"""Hostile models, checkpoints, data and texts: nothing runs, leaves, or is marked up."""

from collections import Counter

from forking import runs_alone

KINDS = ("pickle", "code", "leave", "text", "page")


def test_hostile_material_does_nothing():
    records = runs_alone("hostile.py", "--every", "5")  # by hand all
    of_kinds = Counter(record["name"].partition("/")[0] for record in records)
    assert all(of_kinds[kind] >= 3 for kind in KINDS), of_kinds
    failed = {record["name"]: record["verdicts"] for record in records if record["verdicts"]}
    assert not failed
