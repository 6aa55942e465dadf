"""Judges: causal LMs that say which of two texts is better, or how good one is (RLAIF)."""

from quietstar.judging.cache import VerdictCache
from quietstar.judging.judge import Comparison, Judge, Rating
from quietstar.judging.prompts import Template, load_template

__all__ = ["Comparison", "Judge", "Rating", "Template", "VerdictCache", "load_template"]
