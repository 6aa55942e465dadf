"""``quietstar chat``: turns by the tokenizer's chat template, thinking before each token."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console

from quietstar.cli.options import add_options, arguments_of, load
from quietstar.cli.streaming import ConsoleStreamer
from quietstar.data.tokenizer import check_unicode
from quietstar.errors import UserError

HELP = "/reset begins anew, /thoughts shows or hides thoughts, /quit ends"


def main(arguments: Sequence[str] | None = None) -> int:
    """Read turns from the terminal and answer them until the end of input.

    Raises:
        UserError: A wrong argument or model, or one without a chat template.
    """
    parser = argparse.ArgumentParser(
        "quietstar chat", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--system", help="text of the system's turn")
    args = parser.parse_args(arguments)
    model, tokenizer = load(args)
    if tokenizer.chat_template is None:
        raise UserError(
            f"--model: {args.model} has a tokenizer without a chat template; use quietstar generate"
        )
    console = Console(highlight=False)
    console.print(HELP, style="dim")
    turns = opening = [] if args.system is None else [{"role": "system", "content": args.system}]
    while True:
        try:
            said = check_unicode(console.input("[bold]you:[/bold] ").strip(), "this turn")
        except UserError as problem:
            console.print(str(problem), style="red", markup=False)
            continue
        except EOFError:
            console.print()
            return 0
        if said == "/quit":
            return 0
        if said == "/reset":
            turns = opening
        elif said == "/thoughts":
            args.show_thoughts = not args.show_thoughts
        elif said:
            turns = [*turns, {"role": "user", "content": said}]
            try:
                turns = [*turns, answer(model, tokenizer, turns, args, console)]
            except UserError as problem:  # the talk goes on
                console.print(f"{problem} (/reset begins anew)", style="red", markup=False)
                turns = turns[:-1]


def answer(
    model: Any, tokenizer: Any, turns: list[dict[str, str]], args: argparse.Namespace,
    console: Console,
) -> dict[str, str]:  # fmt: skip
    """Print the model's turn as it grows; returns it."""
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    rows = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([rows], device=model.device)
    streamer = ConsoleStreamer(tokenizer, console, args.show_thoughts)
    how = arguments_of(args, tokenizer)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), streamer=streamer, **how)
    said = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return {"role": "assistant", "content": said}
