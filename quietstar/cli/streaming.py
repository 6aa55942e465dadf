"""Text and thoughts on the terminal as they come."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quietstar.cli.terminal import visible
from quietstar.generation.generate import ThinkingStreamer

OPEN, CLOSE = "⟨", "⟩"
_HALF = "\N{REPLACEMENT CHARACTER}"


class ConsoleStreamer(ThinkingStreamer):
    """Prints one text while it grows; thoughts dim, before the token that they led to.

    Args:
        tokenizer: The model's.
        console: Where to.
        show_thoughts: Whether thoughts are printed.
        opening: Printed before the first token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        console: Console,
        show_thoughts: bool,
        opening: str = "",
    ) -> None:
        self.tokenizer, self.console, self.show_thoughts = tokenizer, console, show_thoughts
        self.ids: list[int] = []
        self.printed = ""
        self.is_prompt = True
        self.opening = opening

    def think(self, thoughts: Tensor) -> None:
        """Print the thoughts of the next token, (1, K, T)."""
        self._open()
        if self.show_thoughts:
            self.console.print(thought_text(self.tokenizer, thoughts[0].tolist()), end="")

    def put(self, value: Tensor) -> None:
        """Print a new token; the first call brings the prompt."""
        if self.is_prompt:
            self.is_prompt = False
            self.ids = value.flatten().tolist()
            self.printed = self._decoded()
            return
        self._open()
        self.ids += value.flatten().tolist()
        text = self._decoded()
        if not text.endswith(_HALF):  # the rest of a character is still to come
            self._print(text[len(self.printed) :])
            self.printed = text

    def end(self) -> None:
        """End the line."""
        self._print(self._decoded()[len(self.printed) :])
        self.console.print()

    def _open(self) -> None:
        """Only now: what is wrong with the prompt was told before."""
        self.console.print(Text(visible(self.opening), style="bold"), end="", soft_wrap=True)
        self.opening = ""

    def _decoded(self) -> str:
        return str(self.tokenizer.decode(self.ids, skip_special_tokens=True))

    def _print(self, text: str) -> None:
        self.console.print(Text(visible(text)), end="", soft_wrap=True)


def thought_text(tokenizer: PreTrainedTokenizerBase, thoughts: Sequence[list[int]]) -> Text:
    """Thoughts as they stand in a text; nothing where none was made."""
    made = [thought for thought in thoughts if thought and thought[0] >= 0]
    texts = [visible(str(tokenizer.decode(thought))).replace("\n", "⏎") for thought in made]
    return Text("".join(f" {OPEN}{text}{CLOSE}" for text in texts), style="dim cyan")
