"""Benchmarks: what a step costs beside the floor that its tokens set."""
