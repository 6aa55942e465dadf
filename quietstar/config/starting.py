"""Where a config starts from: what records look like, and counts as transformers names them."""

import math
import os
import re
from collections.abc import Mapping
from typing import Any

from quietstar.config.tree import fields
from quietstar.errors import UserError

COUNTED = (
    "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "bf16",
)  # fmt: skip
"""Arguments of transformers that need the data or the launch to become keys."""


FORMS = (
    ("question", "answer", None), ("question", "answerKey", "Q: {question}\nA: {answer}\n"),
    ("prompt", "completion", None), ("prompt", "answer", "{question}{answer}"),
)  # fmt: skip
"""Fields of a question and its answer, and the template by which an evaluation scores them."""


def default_of(key: str) -> Any:
    """Return the default of a key."""
    return fields()[key]["default"]


def format_of(columns: set[str], template: str | None) -> dict[str, Any]:
    """Choose format and fields by what records have, or by the names in a template."""
    if template is not None:
        names = re.findall(r"\{(\w+)\}", template)
        if len(names) < 2 or (columns and not columns >= set(names)):
            raise UserError(
                f"formatting ({template!r}): must name fields of the records in braces, the answer "
                f"last (they have {', '.join(sorted(columns)) or 'none'})"
            )
        head, _, tail = template.rpartition("{" + names[-1] + "}")
        # What precedes the answer is one template of the record's fields, and so is what closes it.
        body, end = head.rstrip(" \n"), tail.rstrip()
        if len(names) == 2 and not end:
            form = head.replace("{" + names[0] + "}", "{question}") + "{answer}" + tail
            return _fields(*names) | {"data.template": form}
        answer = names[-1] if not end else "{{ " + names[-1] + " }}" + _literal(end)
        question = re.sub(r"\{(\w+)\}", r"{{ \1 }}", _literal(body))
        form = "{question}" + head[len(body) :] + "{answer}" + tail[len(end) :]
        return _fields(question, answer) | {"data.template": form}
    if "messages" in columns:
        return {"data.format": "chat"}
    for question, answer, form in FORMS:
        if columns >= {question, answer}:
            return _fields(question, answer) | ({"data.template": form} if form else {})
    return {}


def _fields(question: str, answer: str) -> dict[str, Any]:
    return {"data.format": "qa", "data.question_field": question, "data.answer_field": answer}


def _literal(text: str) -> str:
    """Keep Jinja from reading what is text."""
    return re.sub(r"(\{\{|\{%)", r"{{ '\1' }}", text)


def counted(
    given: Mapping[str, Any], settings: Mapping[str, Any], count: int | None
) -> dict[str, Any]:
    """Turn epochs, batch sizes of a device, and accumulation into keys."""
    found: dict[str, Any] = {}
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    micro = given.get("per_device_train_batch_size")
    if micro is not None:
        found["training.micro_batch_size"] = micro
    if micro is not None or "gradient_accumulation_steps" in given:
        micro = micro or settings.get("training.micro_batch_size")
        micro = micro or default_of("training.micro_batch_size")
        found["training.global_batch_size"] = (
            micro * given.get("gradient_accumulation_steps", 1) * processes
        )
    if "bf16" in given:
        found["training.mixed_precision"] = "bf16" if given["bf16"] else "no"
    if "num_train_epochs" in given:
        if count is None:
            raise UserError(
                "num_train_epochs: needs a train_dataset of records, whose number is known. Set "
                "max_steps."
            )
        size = {**settings, **found}.get("training.global_batch_size")
        size = size or default_of("training.global_batch_size")
        held_out = settings.get("data.eval_fraction", default_of("data.eval_fraction"))
        trained = count if settings.get("data.eval") else count - max(1, round(held_out * count))
        found["training.max_steps"] = math.ceil(given["num_train_epochs"] * trained / size)
    return found
