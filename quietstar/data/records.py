"""Records: raw text, questions with answers, and chats, checked as they are read.

A record is a dict with canonical fields: `text`; or `question` and `answer`, perhaps `rationale`;
or `messages` (dicts with `role` and `content`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quietstar.config import DataConfig
from quietstar.errors import UserError

Record = dict[str, Any]

MESSAGE_FIELDS = ("role", "content")


@dataclass(frozen=True)
class Layout:
    """Where the canonical fields of a format lie in the raw records.

    Attributes:
        format: `text`, `qa` or `chat`.
        fields: Pairs of canonical name and name in the raw record.
    """

    format: str
    fields: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, config: DataConfig) -> "Layout":
        """Reads the field names of the config's format."""
        if config.format == "text":
            return cls("text", (("text", config.text_field),))
        if config.format == "chat":
            return cls("chat", (("messages", config.messages_field),))
        fields = (("question", config.question_field), ("answer", config.answer_field))
        rationale = (
            () if config.rationale_field is None else (("rationale", config.rationale_field),)
        )
        return cls("qa", fields + rationale)

    @property
    def canonical(self) -> "Layout":
        """The same format with every field under its canonical name."""
        return Layout(self.format, tuple((name, name) for name, _ in self.fields))


def read_record(raw: object, layout: Layout, where: str) -> Record:
    """Picks the canonical fields out of a raw record; a null becomes empty.

    Args:
        raw: The record as it was read.
        layout: Where the fields are.
        where: Names the record in an error, such as `train.jsonl, line 3`.

    Raises:
        UserError: If it is no object, lacks a field, or a field has the wrong type.
    """
    if not isinstance(raw, Mapping):
        raise UserError(f"{where}: a record must be an object with fields, not {_kind(raw)}")
    read = _read_messages if layout.format == "chat" else _read_string
    return {name: read(raw, field, where, name) for name, field in layout.fields}


def missing_field(field: str, present: Sequence[str], where: str, name: str) -> UserError:
    """Builds the error for a record (or table) without a field.

    Args:
        field: The field's name in the raw record.
        present: The fields that are there.
        where: Names the record.
        name: The field's canonical name.
    """
    fields = ", ".join(map(str, present)) or "none"
    key = "" if name in MESSAGE_FIELDS else f": set data.{name}_field, or data.format"
    return UserError(f"{where}: no field {field!r} (its fields: {fields}){key}")


def is_empty(record: Record) -> bool:
    """Says whether a record has nothing to learn from: no text, no answer, or no messages."""
    if "messages" in record:
        return not any(message["content"].strip() for message in record["messages"])
    return not (record["answer"] if "answer" in record else record["text"]).strip()


def _read_string(raw: Mapping[str, Any], field: str, where: str, name: str) -> str:
    if field not in raw:
        raise missing_field(field, list(raw), where, name)
    value = raw[field]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where}: field {field!r} must be a string, not {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: field {field!r} holds half of a surrogate pair, which is no text:"
            " remove or replace it"
        ) from error
    return value


def _read_messages(
    raw: Mapping[str, Any], field: str, where: str, name: str
) -> list[dict[str, str]]:
    if field not in raw:
        raise missing_field(field, list(raw), where, name)
    messages = [] if raw[field] is None else raw[field]
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise UserError(
            f"{where}: field {field!r} must be a list of messages, not {_kind(messages)}"
        )
    for message in messages:
        if not isinstance(message, Mapping):
            raise UserError(f"{where}: a message must be an object, not {_kind(message)}")
    return [
        {key: _read_string(message, key, f"{where}, message {n}", key) for key in MESSAGE_FIELDS}
        for n, message in enumerate(messages, 1)
    ]


def _kind(value: object) -> str:
    names = {"dict": "an object", "list": "a list", "int": "a number", "float": "a number"}
    return names.get(type(value).__name__, f"a {type(value).__name__}")
