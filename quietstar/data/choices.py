"""Records with choices: whole answers to choose from, or labeled ones as CommonsenseQA has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quietstar.data.tokenizer import check_unicode
from quietstar.errors import UserError

MOST_CHOICES = 1000
"""No question has more."""

Record = Mapping[str, Any]


def field_of(record: Record, path: str, where: str) -> Any:
    """Return a field, ``a.b`` for one within another.

    Raises:
        UserError: It is missing.
    """
    value: Any = record
    for part in path.split("."):
        if not isinstance(value, Mapping) or value.get(part) is None:
            known = ", ".join(record) if isinstance(record, Mapping) else "no fields"
            raise UserError(f"{where}: field {path} is missing; the record has {known or 'none'}")
        value = value[part]
    return value


def text_field(record: Record, path: str, where: str) -> str:
    """Return a field that is a text.

    Raises:
        UserError: It is missing, empty, or no text.
    """
    value = field_of(record, path, where)
    if not isinstance(value, str) or not value.strip():
        raise UserError(
            f"{where}: field {path} must be a text in quotes that is not empty, not {value!r}"
        )
    return check_unicode(value, f"{where}: field {path}")


def resolve(
    record: Record, fields: Mapping[str, str], where: str
) -> tuple[Record, tuple[str, ...]]:
    """Put texts in the place of what chooses: the record to train on, and all its choices.

    ``choices`` belong to the fields ``answer`` and ``answerKey``, whatever else may be trained on.

    Raises:
        UserError: The answer is none of the choices, or they are no choices.
    """
    question, answer = record.get("question"), fields.get("answer")
    has_labels = "choices" in record or isinstance(question, Mapping)
    if answer == "answerKey" and fields["question"] == "question" and has_labels:
        text, labels, key = read_labeled(record, where)
        return {**record, "question": text, "answerKey": key}, labels
    if answer == "answer" and "choices" in record:
        choices, text = read_choices(record, where)
        return {**record, "answer": text}, choices
    return record, ()


def read_labeled(record: Record, where: str) -> tuple[str, tuple[str, ...], str]:
    """Read CommonsenseQA's original layout, or the hub's, which is flat.

    Returns the question with a line for every choice, the labels, and the right one.
    """
    nested = isinstance(record.get("question"), Mapping)
    stem = text_field(record, "question.stem" if nested else "question", where)
    choices = field_of(record, "question.choices" if nested else "choices", where)
    if isinstance(choices, Mapping):
        columns = [field_of(choices, name, where) for name in ("label", "text")]
        if not all(isinstance(column, list) for column in columns):
            raise UserError(f"{where}: fields label and text of choices must be lists")
        choices = [{"label": a, "text": b} for a, b in zip(*columns, strict=True)]
    if not isinstance(choices, list) or len(choices) < 2:
        raise UserError(f"{where}: field choices must list at least two choices, not {choices!r}")
    labels = tuple(text_field(choice, "label", where) for choice in choices)
    if len(set(labels)) < len(labels):
        raise UserError(f"{where}: field choices has two choices of one label, {', '.join(labels)}")
    texts = [text_field(choice, "text", where) for choice in choices]
    answer = text_field(record, "answerKey", where)
    if answer not in labels:
        known = ", ".join(labels)
        raise UserError(f"{where}: field answerKey is {answer!r}, which is none of {known}")
    lines = [f"({label}) {text}" for label, text in zip(labels, texts, strict=True)]
    return "\n".join([stem, *lines]), labels, answer


def read_choices(record: Record, where: str) -> tuple[tuple[str, ...], str]:
    """Read the choices of a record, and the one that ``answer`` names by its text or index."""
    choices = record["choices"]
    if not isinstance(choices, list) or len(choices) < 2 or len(choices) > MOST_CHOICES:
        raise UserError(
            f"{where}: field choices must list from 2 to {MOST_CHOICES} texts, such as "
            f'[" yes", " no"], not {str(choices)[:80]}'
        )
    texts = tuple(text_field({"choices": choice}, "choices", where) for choice in choices)
    if len(set(texts)) < len(texts):
        raise UserError(f"{where}: field choices has a text twice. Leave one out.")
    answer = field_of(record, "answer", where)
    if type(answer) is int and 0 <= answer < len(texts):
        return texts, texts[answer]
    if answer not in texts:
        raise UserError(
            f"{where}: field answer is {answer!r}, but must be one of the choices as it is written,"
            f" or its index from 0 to {len(texts) - 1}"
        )
    return texts, answer
