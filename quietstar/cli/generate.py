"""``quietstar generate``: continues texts, thinking before each new token."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, cast

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quietstar.cli import options
from quietstar.cli.options import Parser
from quietstar.data.tokenizer import check_unicode, load_tokenizer, pad_left, padding_id
from quietstar.errors import UserError, visible
from quietstar.generation.gates import PROBED, Gate, GateKind
from quietstar.generation.generate import ThinkingOutput, ThinkingStreamer
from quietstar.model.quiet_star import QuietStarForCausalLM

CALIBRATED = "calibrated"
OPEN, CLOSE = "⟨", "⟩"
_HALF = "\N{REPLACEMENT CHARACTER}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Generate and print.

    Raises:
        UserError: An option, a file or the model is wrong.
    """
    parser = Parser("quietstar generate", "Continues a text, thinking before each new token.")
    add_generation(parser)
    parser.add_argument("--prompt", metavar="TEXT", help="text to continue")
    parser.add_argument(
        "--prompts", metavar="FILE", help="one prompt per line, UTF-8; blank lines are skipped"
    )
    parser.add_argument(
        "--batch-size", type=options.COUNT, default=8, help="prompts of a file at once"
    )
    args = parser.read(arguments)
    prompts = _prompts(args)
    model, tokenizer = load(args)
    settings = generate_settings(args, tokenizer)
    console = Console(highlight=False)
    if args.prompt is not None:
        streamer = ConsoleStreamer(tokenizer, console, args.show_thoughts, args.prompt)
        ids, mask = (x.to(model.device) for x in _encode(tokenizer, prompts))
        model.generate(ids, attention_mask=mask, streamer=streamer, **settings)
        return 0
    for start in range(0, len(prompts), args.batch_size):
        chunk = prompts[start : start + args.batch_size]
        ids, mask = (x.to(model.device) for x in _encode(tokenizer, chunk))
        out = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **settings)
        for row, prompt in enumerate(chunk):
            console.print(Text(visible(prompt), style="bold"), end="", soft_wrap=True)
            new = _continuation(tokenizer, out, row, ids.shape[1], args.show_thoughts)
            console.print(new, soft_wrap=True)
    return 0


def add_generation(parser: argparse.ArgumentParser) -> None:
    """Add the options of model, thoughts and sampling, which ``quietstar chat`` has too."""
    options.add_model(parser)
    add = parser.add_argument
    add(
        "--max-new-tokens",
        type=options.COUNT,
        default=128,
        metavar="N",
        help="length of the answer",
    )
    add("--show-thoughts", action="store_true", help="print them dim, before their token")
    add("--no-thoughts", action="store_true", help="generate with the plain model")
    add("--gate", metavar="GATE",
        help="which tokens think: calibrated, entropy:NATS, weight:W or gain:NATS")  # fmt: skip
    add("--num-thoughts", type=options.THOUGHTS, default=1, metavar="K",
        help="thoughts before each token, whose predictions are averaged")  # fmt: skip
    add("--thought-temperature", type=options.number(), metavar="T",
        help="temperature of thoughts; without it their most likely tokens")  # fmt: skip
    add("--temperature", type=options.number(), default=0.0, metavar="T",
        help="temperature of the text; 0 takes the most likely tokens")  # fmt: skip
    add("--top-p", type=options.number(0.0, 1.0, above=True), default=1.0, metavar="P",
        help="sample from the most likely tokens that reach this probability")  # fmt: skip
    add("--seed", type=options.SEED, default=0, help="seed of text and thoughts")


def load(args: argparse.Namespace) -> tuple[QuietStarForCausalLM, PreTrainedTokenizerBase]:
    """Load model and tokenizer.

    Raises:
        UserError: The model cannot think although it is asked to, or options contradict.
    """
    if args.no_thoughts and (args.show_thoughts or args.gate):
        raise UserError("--no-thoughts: does not go with --show-thoughts or --gate; leave one out")
    remedy = "Set --no-thoughts to generate with the plain model."
    model = options.load_model(args, not args.no_thoughts, remedy)
    torch.manual_seed(args.seed)
    return model, load_tokenizer(args.model, trust_remote_code=False)


def generate_settings(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Translate the options to arguments of `QuietStarForCausalLM.generate`."""
    sampling: dict[str, Any] = {"do_sample": False}
    if args.temperature > 0:
        sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p}
        sampling["top_k"] = 0
    return {
        "think": _gate(args), "num_thoughts": args.num_thoughts,
        "thought_temperature": args.thought_temperature or None, "seed": args.seed,
        "max_new_tokens": args.max_new_tokens, "pad_token_id": padding_id(tokenizer), **sampling,
    }  # fmt: skip


def _gate(args: argparse.Namespace) -> bool | Gate:
    if args.gate is None:
        return not args.no_thoughts
    if args.gate == CALIBRATED:
        return Gate.load(args.model)
    kind, _, threshold = args.gate.partition(":")
    try:
        value = options.number(-float("inf"))(threshold)
    except argparse.ArgumentTypeError:
        raise UserError(
            f"--gate ({args.gate}): must be calibrated, or a kind and a threshold, as entropy:1.5"
        ) from None
    probes = Gate.load(args.model).probes if kind in PROBED else {}
    return Gate(cast(GateKind, kind), value, probes)


def _prompts(args: argparse.Namespace) -> list[str]:
    if (args.prompt is None) == (args.prompts is None):
        raise UserError("--prompt: give either --prompt TEXT or --prompts FILE")
    if args.prompt is not None:
        prompts = [check_unicode(args.prompt, "--prompt")]
    else:
        lines = options.read_text("--prompts", args.prompts).splitlines()
        prompts = [line for line in lines if line.strip()]
    if not prompts or not prompts[0].strip():
        option = "--prompt" if args.prompt is not None else f"--prompts ({args.prompts})"
        raise UserError(f"{option}: is empty; give a text to continue")
    return prompts


def _encode(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return ids and mask, padded on the left."""
    rows: list[Any] = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    return pad_left(rows, padding_id(tokenizer))


def _continuation(
    tokenizer: PreTrainedTokenizerBase, out: ThinkingOutput, row: int, start: int, thoughts: bool
) -> Text:
    """Return what follows a prompt, with its thoughts if they are to be shown."""

    def decoded(length: int | None) -> str:
        return str(tokenizer.decode(ids[:length], skip_special_tokens=True))

    ids = out.sequences[row].tolist()
    printed = decoded(start)
    if not thoughts or out.thoughts is None:
        return Text(visible(decoded(None)[len(printed) :]))
    text = Text()
    for new, before_token in enumerate(out.thoughts[row].tolist(), start + 1):
        now = decoded(new)
        if now != printed:  # it stays the same at special tokens, as the padding behind the end
            text.append_text(thought_text(tokenizer, before_token))
            text.append(visible(now[len(printed) :]))
            printed = now
    return text


class ConsoleStreamer(ThinkingStreamer):
    """Prints one text while it grows; thoughts dim, before the token that they led to.

    Args:
        tokenizer: Tokenizer of the model.
        console: Console that is printed on.
        show_thoughts: True to print thoughts.
        opening: Text before the first token. It is printed late, so that an error about the prompt
            comes before it.
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
        self.ids += value.flatten().tolist()
        text = self._decoded()
        if self.is_prompt:
            self.is_prompt = False
            self.printed = text
            return
        self._open()
        if not text.endswith(_HALF):  # the rest of a character is still to come
            self._print(text[len(self.printed) :])
            self.printed = text

    def end(self) -> None:
        """End the line."""
        self._print(self._decoded()[len(self.printed) :])
        self.console.print()

    def _open(self) -> None:
        self._print(self.opening, "bold")
        self.opening = ""

    def _decoded(self) -> str:
        return str(self.tokenizer.decode(self.ids, skip_special_tokens=True))

    def _print(self, text: str, style: str = "") -> None:
        self.console.print(Text(visible(text), style=style), end="", soft_wrap=True)


def thought_text(tokenizer: PreTrainedTokenizerBase, thoughts: Sequence[list[int]]) -> Text:
    """Return thoughts as they stand in a text; empty where none was made."""
    made = [thought for thought in thoughts if thought and thought[0] >= 0]
    texts = [visible(str(tokenizer.decode(thought))).replace("\n", "⏎") for thought in made]
    return Text("".join(f" {OPEN}{text}{CLOSE}" for text in texts), style="dim cyan")
