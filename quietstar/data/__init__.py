"""Data: records from files, the hub or generators, as deterministic batches of tokens."""

from quietstar.data.batches import Batch, DataReport, EvalData, TrainData, build_data
from quietstar.data.marking import PatternMarker
from quietstar.data.tokenizer import byte_tokenizer, check_tokenizer_fits, load_tokenizer

__all__ = [
    "Batch",
    "DataReport",
    "EvalData",
    "PatternMarker",
    "TrainData",
    "build_data",
    "byte_tokenizer",
    "check_tokenizer_fits",
    "load_tokenizer",
]
