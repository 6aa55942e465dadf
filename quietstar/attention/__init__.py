"""Parallel thoughts: layout, attention, rollout, learn pass, and the check that they are exact."""
