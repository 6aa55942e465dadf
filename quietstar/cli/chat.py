"""``quietstar chat``: turns by the tokenizer's chat template, thinking before each token."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from rich.console import Console

from quietstar.cli.generate import ConsoleStreamer, add_generation, generate_settings, load
from quietstar.cli.options import Parser
from quietstar.data.tokenizer import check_unicode
from quietstar.errors import UserError, visible

HELP = "/reset starts over, /thoughts shows or hides thoughts, /quit ends"


def main(arguments: Sequence[str] | None = None) -> int:
    """Read turns from the terminal and answer them until the end of input.

    Raises:
        UserError: An option or the model is wrong, or the model has no chat template.
    """
    parser = Parser("quietstar chat", "Talks with a model, which thinks before each token.")
    add_generation(parser)
    parser.add_argument("--system", metavar="TEXT", help="text of the system's turn")
    args = parser.read(arguments)
    if args.system is not None:
        check_unicode(args.system, "--system")
    model, tokenizer = load(args)
    if tokenizer.chat_template is None:
        raise UserError(
            f"--model ({args.model}): has a tokenizer without a chat template; use quietstar "
            "generate"
        )
    opening = [] if args.system is None else [{"role": "system", "content": args.system}]
    _render(tokenizer, [*opening, {"role": "user", "content": "?"}])  # refuses before the talk
    console = Console(highlight=False)
    console.print(HELP, style="dim")
    turns = opening
    while (text := _read_turn(console)) != "/quit":
        if text == "/reset":
            turns = opening
        elif text == "/thoughts":
            args.show_thoughts = not args.show_thoughts
        elif text:
            asked = [*turns, {"role": "user", "content": text}]
            try:
                check_unicode(text, "this turn")
                turns = [*asked, _answer(model, tokenizer, asked, args, console)]
            except UserError as problem:  # the talk goes on without this turn
                message = visible(f"{problem} (/reset starts over)")
                console.print(message, style="red", markup=False)
    return 0


def _read_turn(console: Console) -> str:
    try:
        return console.input("[bold]you:[/bold] ").strip()
    except EOFError:
        console.print()
        return "/quit"


def _render(tokenizer: Any, turns: list[dict[str, str]]) -> list[int]:
    """Return the ids of the turns and of the opening of an answer.

    Raises:
        UserError: The template refuses them, as some do with a system's turn.
    """
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as problem:
        raise UserError(f"the chat template of the tokenizer fails: {problem}") from problem
    if not ids:
        raise UserError("the chat template of the tokenizer gives an empty text")
    return ids


def _answer(
    model: Any, tokenizer: Any, turns: list[dict[str, str]], args: argparse.Namespace,
    console: Console,
) -> dict[str, str]:  # fmt: skip
    """Print the model's turn as it grows, and return it."""
    ids = torch.tensor([_render(tokenizer, turns)], device=model.device)
    streamer = ConsoleStreamer(tokenizer, console, args.show_thoughts)
    settings = generate_settings(args, tokenizer)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), streamer=streamer, **settings)
    answer = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return {"role": "assistant", "content": answer}
