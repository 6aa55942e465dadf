"""``quietstar generate``: texts that go on, thinking before each new token."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from quietstar.cli.options import add_options, arguments_of, load
from quietstar.cli.streaming import ConsoleStreamer, thought_text
from quietstar.cli.terminal import visible
from quietstar.data.tokenizer import check_unicode, pad_left, padding_id
from quietstar.errors import UserError
from quietstar.generation.generate import ThinkingOutput


def main(arguments: Sequence[str] | None = None) -> int:
    """Generate and print.

    Raises:
        UserError: A wrong argument, file or model.
    """
    parser = argparse.ArgumentParser(
        "quietstar generate", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--prompt", help="text to go on from")
    parser.add_argument(
        "--prompts", metavar="FILE", help="one prompt on each line, UTF-8; blank lines are skipped"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="prompts of a file at once")
    args = parser.parse_args(arguments)
    prompts = read_prompts(args)
    model, tokenizer = load(args)
    how = arguments_of(args, tokenizer)
    console = Console(highlight=False)
    if args.prompt is not None:
        streamer = ConsoleStreamer(tokenizer, console, args.show_thoughts, args.prompt)
        ids, mask = encode_prompts(tokenizer, prompts)
        device = model.device
        model.generate(ids.to(device), attention_mask=mask.to(device), streamer=streamer, **how)
        return 0
    for start in range(0, len(prompts), args.batch_size):
        chunk = prompts[start : start + args.batch_size]
        ids, mask = (x.to(model.device) for x in encode_prompts(tokenizer, chunk))
        out = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **how)
        for row, prompt in enumerate(chunk):
            console.print(Text(visible(prompt), style="bold"), end="", soft_wrap=True)
            shown = continuation(tokenizer, out, row, ids.shape[1], args.show_thoughts)
            console.print(shown, soft_wrap=True)
    return 0


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompt, or those of the file.

    Raises:
        UserError: Not one of the two, an empty one, or a file that cannot be read.
    """
    if (args.prompt is None) == (args.prompts is None):
        raise UserError("--prompt: give either --prompt TEXT or --prompts FILE")
    if args.batch_size < 1:
        raise UserError(f"--batch-size: {args.batch_size} must be at least 1")
    if args.prompt is not None:
        prompts = [check_unicode(args.prompt, "--prompt")]
    else:
        try:
            text = Path(args.prompts).read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as problem:
            raise UserError(f"--prompts: {args.prompts} is no UTF-8 ({problem})") from None
        except OSError as problem:
            raise UserError(f"--prompts: {args.prompts}: {problem.strerror}") from None
        prompts = [line for line in text.splitlines() if line.strip()]
    if not prompts or not prompts[0].strip():
        option = "--prompt" if args.prompt is not None else f"--prompts: {args.prompts}"
        raise UserError(f"{option}: is empty; give a text to go on from")
    return prompts


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, padded on the left."""
    rows: list[Any] = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    return pad_left(rows, padding_id(tokenizer))


def continuation(
    tokenizer: PreTrainedTokenizerBase,
    out: ThinkingOutput,
    row: int,
    start: int,
    show_thoughts: bool,
) -> Text:
    """What follows a prompt, with its thoughts if they are to be shown."""
    ids = out.sequences[row].tolist()
    prompt = str(tokenizer.decode(ids[:start], skip_special_tokens=True))
    if not show_thoughts or out.thoughts is None:
        return Text(visible(_decoded(tokenizer, ids)[len(prompt) :]))
    text, done = Text(), prompt
    for new, thoughts in enumerate(out.thoughts[row].tolist()):
        now = _decoded(tokenizer, ids[: start + new + 1])
        if now == done:  # a special token, such as the padding behind the end
            continue
        text.append_text(thought_text(tokenizer, thoughts))
        text.append(visible(now[len(done) :]))
        done = now
    return text


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))
