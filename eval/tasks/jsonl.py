"""Data of the tasks here: JSONL files, read and checked as ``quietstar eval`` does.

The folder is given as ``--metadata '{"data_dir": "DIR"}'``.
"""

from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from quietstar.errors import reading
from quietstar.evaluation.tasks import TASKS, read_lines


def gsm8k(data_dir: str = ".", **_: Any) -> DatasetDict:
    """Prompts that ask for a chain of thought, and the number that is right."""
    items = TASKS["gsm8k_cot"].items(Path(data_dir), None)
    return _test([{"prompt": item.prompt, "answer": item.answer} for item in items])


def commonsense_qa(data_dir: str = ".", **_: Any) -> DatasetDict:
    """Prompts that list the choices, their labels, and the right one."""
    items = TASKS["commonsense_qa"].items(Path(data_dir), None)
    rows = [
        {"prompt": item.prompt, "labels": list(item.labels), "gold": item.labels.index(item.answer)}
        for item in items
    ]
    return _test(rows)


def lambada(data_dir: str = ".", **_: Any) -> DatasetDict:
    """Texts without their last word, and that word."""
    rows = []
    for record, where in read_lines(Path(data_dir) / "lambada_test.jsonl", "lambada_jsonl"):
        with reading(where, "Give it a field text."):
            prompt, _, word = record["text"].rstrip().rpartition(" ")
        rows.append({"prompt": prompt, "answer": word})
    return _test(rows)


def _test(rows: list[dict[str, Any]]) -> DatasetDict:
    return DatasetDict({"test": Dataset.from_list(rows)})
