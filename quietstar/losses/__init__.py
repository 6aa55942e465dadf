"""Losses as pure functions: estimators, cross entropies in chunks, the objective."""
