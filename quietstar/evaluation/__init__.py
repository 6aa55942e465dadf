"""Evaluation of saved models: reasoning benchmarks with and without thoughts."""
