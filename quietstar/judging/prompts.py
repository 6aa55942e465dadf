"""What a judge reads: templates, chats, and the tokens that its answer may begin with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from jinja2 import StrictUndefined, TemplateSyntaxError
from jinja2 import Template as CompiledTemplate
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from quietstar.data.tokenizer import check_unicode
from quietstar.errors import UserError, reading, reason_of
from quietstar.evaluation.tasks import read_document
from quietstar.system.limits import limited

Kind = Literal["pair", "rating"]
TEMPLATES = ("continuation", "answer", "summary")
"""Templates that come with the package."""
BLOCKS = ("preamble", "pair", "pair_ending", "rating", "rating_ending", "rationale")
"""Blocks that a template must have; ``examples``, written after the preamble, is optional."""
FIELDS: dict[Kind, tuple[str, ...]] = {
    "pair": ("prompt", "first", "second"),
    "rating": ("prompt", "candidate"),
}
"""Names that the blocks of a template may use."""
LABELS: dict[Kind, tuple[str, ...]] = {
    "pair": ("1", "2"),
    "rating": ("1", "2", "3", "4", "5", "6", "7", "8", "9", "10"),
}
BEHIND_RATIONALE = "\n\n"
"""Text between a rationale and the ending."""


@dataclass(frozen=True)
class Template:
    """A Jinja template of what a judge is asked, in blocks (`BLOCKS`).

    It runs in a sandbox without files, and a name that it does not know is an error.

    Attributes:
        name: Built-in name or file, for messages.
        source: Text of the template.

    Raises:
        UserError: It lacks a block, fails, or leaves out what is judged.
    """

    name: str
    source: str

    def __post_init__(self) -> None:
        """Refuse a template that cannot be used, before any model is loaded."""
        where = f"--template ({self.name})"
        with self._limited():
            known = set(self._compiled.blocks)
        if missing := [name for name in BLOCKS if name not in known]:
            raise UserError(
                f"{where}: has no block {missing[0]}; it must have {', '.join(BLOCKS)}. Write "
                f"{{% block {missing[0]} %}} ... {{% endblock %}}."
            )
        for kind, names in FIELDS.items():
            marks = {name: f"<{name}>" for name in names}
            head = ("preamble", "examples", kind)
            self.render(("rationale",), marks)
            self.render((f"{kind}_ending",), {})
            text = self.render(head, marks)
            if absent := [x for x in names if self.render(head, {**marks, x: "?"}) == text]:
                raise UserError(
                    f"{where}: its block {kind} does not write {absent[0]}. Put "
                    f"{{{{ {absent[0]} }}}} into it."
                )

    def render(self, blocks: Sequence[str], values: Mapping[str, str]) -> str:
        """Write blocks one after the other; an optional one that is missing is empty.

        Raises:
            UserError: The template fails, or takes too long.
        """
        with self._limited():
            made = self._compiled
            parts: list[Any] = [made.blocks[name] for name in blocks if name in made.blocks]
            return "".join("".join(part(made.new_context(dict(values)))) for part in parts)

    @cached_property
    def _compiled(self) -> CompiledTemplate:
        environment = ImmutableSandboxedEnvironment(
            undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True
        )
        return environment.from_string(self.source)

    @contextmanager
    def _limited(self) -> Iterator[None]:
        """Turn whatever the template does wrong, loops without end included, into one line."""
        where, remedy = f"--template ({self.name})", "Correct the template."
        with reading(where, remedy), limited():
            try:
                yield
            except TemplateSyntaxError as problem:
                raise ValueError(f"line {problem.lineno}: {problem.message}") from problem

    @property
    def digest(self) -> str:
        """Hash of the text, which tells templates apart whatever their names."""
        return hashlib.sha256(self.source.encode()).hexdigest()[:16]


def load_template(name: str) -> Template:
    """Load a built-in template by its name, or one from a file.

    Raises:
        UserError: There is no such template, or it is not one that can be used.
    """
    if name in TEMPLATES:
        folder = resources.files("quietstar.judging") / "templates"
        source = (folder / f"{name}.j2").read_text("utf-8")
    elif Path(name).expanduser().is_file():
        source = read_document(name, "--template")
    else:
        raise UserError(
            f"--template ({name}): must be one of {', '.join(TEMPLATES)}, or a file. Give one."
        )
    return Template(name, source)


@dataclass(frozen=True)
class Answers:
    """Tokens of the labels of a kind after its ending.

    Attributes:
        ending: Text of the ending.
        gap: Text between the ending and a label: nothing, or a space where the tokenizer has
            single digits only with one.
        ids: Token of each label, without that of "10" where it is two.
        zero: Token of the "0" after "1" where "10" is two tokens, else None.
    """

    ending: str
    gap: str
    ids: tuple[int, ...]
    zero: int | None


@dataclass(frozen=True)
class Prompts:
    """Writes and encodes what a judge reads, for one tokenizer and one template.

    Attributes:
        tokenizer: Tokenizer of the judge's model.
        template: What the judge is asked.
        uses_chat: Whether the tokenizer's chat template frames it: the question is the user's turn,
            and rationale and ending begin the assistant's.
    """

    tokenizer: PreTrainedTokenizerBase
    template: Template
    uses_chat: bool

    def opening(self, kind: Kind, values: Mapping[str, str], asks_rationale: bool) -> str:
        """Write all that stands before the judge's own words, or before the ending.

        Raises:
            UserError: The template or the chat template fails.
        """
        more = ("rationale",) if asks_rationale else ()
        text = self.template.render(("preamble", "examples", kind, *more), values)
        if not self.uses_chat:
            return text
        failure, tokenizer = "the chat template of the judge's tokenizer fails", self.tokenizer
        turns = [{"role": "user", "content": text.strip()}]
        try:
            with limited():
                chat = tokenizer.apply_chat_template(
                    turns, tokenize=False, add_generation_prompt=True
                )
        except Exception as problem:  # whatever a program may raise
            raise UserError(f"{failure} ({reason_of(problem)}). Set --chat off.") from problem
        if not isinstance(chat, str) or text.strip() not in chat:
            raise UserError(f"{failure} (it leaves the user's turn out). Set --chat off.")
        return check_unicode(chat, "the chat template")

    def encode(self, text: str) -> list[int]:
        """Encode a text; a chat template has written its special tokens itself."""
        ids: Any = self.tokenizer(text, add_special_tokens=not self.uses_chat, verbose=False)
        return ids["input_ids"]

    def answers(self, kind: Kind) -> Answers:
        """Find the tokens of the labels after the ending, as this tokenizer writes them.

        A space at the end of the ending belongs to the label where the tokenizer joins them.

        Raises:
            UserError: A label is not one token ("10": nor two, of which the first is "1").
        """
        marks = {name: f"<{name}>" for name in FIELDS[kind]}
        opening = self.opening(kind, marks, asks_rationale=False)
        ending = self.template.render((f"{kind}_ending",), {})
        for gap in ("", " "):
            if (found := self._answers(kind, opening, ending, gap)) is not None:
                return found
        text = opening + ending
        pieces = {label: self._pieces(self.encode(text + label)[-3:]) for label in LABELS[kind]}
        label = next((x for x, ends in pieces.items() if ends[-1].strip() != x), LABELS[kind][0])
        raise UserError(
            f"judge's tokenizer: it ends {ending + label!r} in the tokens "
            f"{pieces[label]}, but {label!r} must be a token of its own after the ending. Choose "
            "another judge, or another ending in --template."
        )

    def _answers(self, kind: Kind, opening: str, ending: str, gap: str) -> Answers | None:
        rows = {label: self.encode(opening + ending + gap + label) for label in LABELS[kind]}
        before, zero = rows["1"][:-1], None
        if len(rows.get("10", ())) == len(before) + 2:
            ten = rows.pop("10")
            zero = ten[-1]
            if ten[:-1] != rows["1"] or self._pieces([zero])[0].strip() != "0":
                return None
        ids = tuple(row[-1] for row in rows.values())
        is_clean = all(row[:-1] == before for row in rows.values()) and len({*ids}) == len(ids)
        texts = [piece.strip() for piece in self._pieces(ids)]
        return Answers(ending, gap, ids, zero) if is_clean and texts == [*rows] else None

    def _pieces(self, ids: Sequence[int]) -> list[str]:
        return self.tokenizer.batch_decode([[token] for token in ids])
