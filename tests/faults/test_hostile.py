"""Hostile models, checkpoints, data and texts: nothing runs, leaves, or is marked up."""

import pytest
from forking import runs_alone

KINDS = ("pickle", "code", "leave", "text", "page")


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_material_does_nothing(kind):
    records = runs_alone("hostile.py", "--only", kind)
    assert len(records) >= 4
    failed = {record["name"]: record["verdicts"] for record in records if record["verdicts"]}
    assert not failed
