"""``quietstar inspect``: the thoughts before every token of a text, as a page or JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from transformers import PreTrainedTokenizerBase

from quietstar.cli.devices import device_option, find_device
from quietstar.cli.terminal import document_view
from quietstar.data.tokenizer import check_unicode, load_tokenizer
from quietstar.errors import UserError
from quietstar.evaluation.inspection import Reading, inspect_text, num_windows
from quietstar.evaluation.loading import load_thinker
from quietstar.model.quiet_star import QuietStarForCausalLM
from quietstar.reports.thoughts import render_page
from quietstar.training.setup import quiet_libraries

ENDINGS = (".html", ".json")


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the text with one model, or two, and show what was thought.

    Raises:
        UserError: A wrong argument, text, file or model.
    """
    args = _parser().parse_args(arguments)
    quiet_libraries()
    text = read_text(args)
    out = check_out(args.out, args.force)
    if args.num_thoughts < 1:
        raise UserError(f"--num-thoughts: {args.num_thoughts} must be at least 1")
    if args.temperature is None and args.num_thoughts > 1:
        raise UserError(
            f"--num-thoughts: {args.num_thoughts} greedy thoughts are all alike; "
            "set --temperature 1"
        )
    names = [args.model] if args.compare is None else [args.model, args.compare]
    tokenizers = [load_tokenizer(name) for name in names]
    check_same_tokens(text, names, tokenizers)
    documents = [
        read_with(name, tokenizer, text, args)
        for name, tokenizer in zip(names, tokenizers, strict=True)
    ]
    console = Console(highlight=False)
    if out is None:
        for document in documents:
            console.print(document_view(document))
        return 0
    write(out, documents)
    console.print(f"{len(documents[0]['tokens'])} tokens: {out}", soft_wrap=True)
    return 0


def read_text(args: argparse.Namespace) -> str:
    """The text of ``--text`` or ``--text-file``.

    Raises:
        UserError: Not one of the two, no such file, one that is no UTF-8, or nothing in it.
    """
    if (args.text is None) == (args.text_file is None):
        raise UserError("--text: give either --text TEXT or --text-file FILE")
    if args.text is not None:
        text = check_unicode(args.text, "--text")
    else:
        path = Path(args.text_file)
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as problem:
            raise UserError(
                f"--text-file: {path} is no UTF-8 (byte {problem.start} is "
                f"0x{problem.object[problem.start]:02x}); convert it, as with iconv"
            ) from None
        except OSError as problem:
            raise UserError(f"--text-file: {path} cannot be read: {problem.strerror}") from None
    if not text.strip():
        option = "--text" if args.text is not None else f"--text-file: {args.text_file}"
        raise UserError(f"{option}: is empty; give a text of at least two tokens")
    return text


def check_out(name: str | None, force: bool) -> Path | None:
    """The file to write.

    Raises:
        UserError: Of another kind, in no folder, or there already.
    """
    if name is None:
        return None
    path = Path(name)
    if path.suffix not in ENDINGS:
        raise UserError(f"--out: {path} must end in .html (a page) or .json (its figures)")
    if not path.parent.is_dir():
        raise UserError(f"--out: there is no folder {path.parent}; make it first")
    if path.exists() and not force:
        raise UserError(f"--out: {path} exists; give another name, or --force to replace it")
    return path


def check_same_tokens(
    text: str, names: Sequence[str], tokenizers: Sequence[PreTrainedTokenizerBase]
) -> None:
    """Refuse texts that cannot be shown side by side, and those of a single token.

    Raises:
        UserError: The tokenizers disagree, or there is nothing to predict.
    """
    ids = [tokenizer(text)["input_ids"] for tokenizer in tokenizers]
    if len(ids[0]) < 2:  # pyright: ignore[reportArgumentType]
        raise UserError("--text: is a single token; give a text of at least two")
    if any(other != ids[0] for other in ids):
        raise UserError(
            f"--compare: {names[1]} splits the text into other tokens than {names[0]}; compare "
            "models of one tokenizer"
        )


def read_with(
    name: str, tokenizer: PreTrainedTokenizerBase, text: str, args: argparse.Namespace
) -> dict[str, Any]:
    """What a model thinks of the text.

    Raises:
        UserError: It is no Quiet-STaR model.
    """
    model = load_thinker(name, True, args.dtype, "quietstar inspect needs a trained one.")
    model.to(find_device(args.device))
    context = longest(model, args.context)
    count = len(tokenizer(text)["input_ids"])  # pyright: ignore[reportArgumentType]
    if context is not None and count > context:
        Console(stderr=True).print(
            f"the text has {count} tokens: read in windows of {context}, in which every position "
            f"sees at least {context - min(128, context // 2)} tokens before it",
            soft_wrap=True,
        )
    reading = Reading(args.num_thoughts, args.temperature, args.seed, context)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(name, total=num_windows(count, context))
        return inspect_text(model, tokenizer, text, name, reading, lambda: progress.advance(bar))


def longest(model: QuietStarForCausalLM, wanted: int | None) -> int | None:
    """Tokens that are read at once.

    Raises:
        UserError: More are wanted than the model takes.
    """
    most = model.max_text_length
    if wanted is not None and (wanted < 2 or (most is not None and wanted > most)):
        limit = "" if most is None else f" and at most {most}, what the model takes"
        raise UserError(f"--context: {wanted} must be at least 2{limit}")
    return most if wanted is None else wanted


def write(path: Path, documents: Sequence[dict[str, Any]]) -> None:
    """The page, or its figures: one document, or a list of two."""
    if path.suffix == ".html":
        path.write_text(render_page(documents), encoding="utf-8")
        return
    content = documents[0] if len(documents) == 1 else documents
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "quietstar inspect",
        description="Shows what a model thinks before every token of a text, and what it gains. "
        "Without --out in the terminal.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="folder of a saved Quiet-STaR model")
    add("--text", help="the text")
    add("--text-file", help="file with the text, UTF-8")
    add("--out", help="page (.html) or figures (.json)")
    add("--force", action="store_true", help="replace a file that exists")
    add("--compare", metavar="DIR", help="a second model, side by side")
    add("--num-thoughts", type=int, default=1, help="before every token")
    add("--temperature", type=float, help="of thoughts; without it the most likely tokens")
    add("--seed", type=int, default=0, help="of sampled thoughts")
    add("--context", type=int, help="tokens that are read at once; default what the model takes")
    add("--dtype", default="auto", help="of the weights")
    add("--device", type=device_option, help="by default a GPU if there is one")
    return parser
