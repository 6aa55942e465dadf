"""Tokenizers: a built-in byte-level one, loading, and the check that one fits its model."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from quietstar.config.schema import SYNTHETIC
from quietstar.data.synthetic import VOCABULARY, check_task
from quietstar.errors import UserError, reason_of
from quietstar.registry import NEVER_TRUSTED, TRUST_REMEDY
from quietstar.system.inputs import check_folder

BYTES = "bytes"
EOS_TOKEN = "<|endoftext|>"
PAD_TOKEN = "<|pad|>"
_EXAMPLE = "1 + 1 = 2, and so on."
_ANCHOR = "a"
"""Stands before tokens when they are decoded: some tokenizers drop a space at the beginning."""

logger = logging.getLogger(__name__)


def check_unicode(text: str, where: str) -> str:
    """Returns a text; raises `UserError` if it holds bytes or half characters that are no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as problem:
        raise UserError(
            f"{where}: character {problem.start} is no Unicode character but half of a surrogate"
            " pair; is the text UTF-8?"
        ) from None
    return text


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Builds a tokenizer with one token per byte: id 0 to 255 is the byte, then eos and pad.

    It round-trips any UTF-8 text and needs no download, so tests and tiny random models use it.
    """
    vocab = {character: byte for byte, character in bytes_to_unicode().items()}
    by_bytes = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    return _built_in(
        model={"type": "BPE", "vocab": vocab, "merges": []},
        pre_tokenizer={**by_bytes, "add_prefix_space": False},
        decoder={**by_bytes, "add_prefix_space": True},
    )


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Builds a tokenizer with one token per word of the synthetic tasks, then eos and pad."""
    words = (*VOCABULARY, EOS_TOKEN, PAD_TOKEN)
    vocab = {word: index for index, word in enumerate(words)}
    return _built_in(
        model={"type": "WordLevel", "vocab": vocab, "unk_token": PAD_TOKEN},
        pre_tokenizer={"type": "WhitespaceSplit"},
        decoder=None,
    )


def _built_in(**parts: Any) -> PreTrainedTokenizerFast:
    """Builds a tokenizer from the parts of a tokenizer.json."""
    unused = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
    content = {"version": "1.0", "added_tokens": [], **unused, **parts}
    with TemporaryDirectory() as folder:
        (path := Path(folder) / "tokenizer.json").write_text(json.dumps(content), "utf-8")
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(path),
            eos_token=EOS_TOKEN,
            pad_token=PAD_TOKEN,
            clean_up_tokenization_spaces=False,
        )
    tokenizer.init_kwargs.pop("tokenizer_file", None)  # it is gone
    return tokenizer


def load_tokenizer(
    name: str, *, trust_remote_code: bool | None = False, what: str = "tokenizer", **hub_kwargs: Any
) -> PreTrainedTokenizerBase:
    """Loads a tokenizer and gives it a padding token where it has none.

    Padding then is end-of-text: a mask, never the id, says what is padding, so nothing is lost.

    Args:
        name: `bytes` for the built-in byte-level tokenizer, `synthetic:<task>` for the words of
            a synthetic task, else a folder or a hub id.
        trust_remote_code: Whether code that comes with a tokenizer may run; None: it never may.
        what: What an error message begins with, such as the config key that names it.
        **hub_kwargs: Arguments of `AutoTokenizer.from_pretrained` (revision, token, ...).
    """
    if name == BYTES:
        return byte_tokenizer()
    if name.startswith(SYNTHETIC):
        check_task(f"model.tokenizer: {name}", name.removeprefix(SYNTHETIC))
        return word_tokenizer()
    check_folder(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, trust_remote_code=bool(trust_remote_code), **hub_kwargs
        )
        _try_out(tokenizer)
    except BaseException as error:
        # The loader raises nearly anything, from KeyError to hub errors; the panics of its Rust
        # part are no `Exception`.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        owner, remedy = "", "Give a folder that holds one, or a hub id you can reach."
        if what == "model.tokenizer":
            remedy = f"Give a folder that holds one, a hub id you can reach, or {BYTES!r}."
        elif what == "model.name_or_path":
            owner = "its tokenizer "
            remedy = "Give a folder with model and tokenizer, or a hub id you can reach."
        if "trust_remote_code" in str(error):
            reason = "it needs Python code of its own, which is not run"
            remedy = NEVER_TRUSTED if trust_remote_code is None else TRUST_REMEDY
        elif not (path := Path(name)).exists() and (
            path.is_absolute() or name.startswith((".", "~"))
        ):
            owner, reason = "", "there is no such folder"
        else:
            reason = reason_of(error)
        raise UserError(f"{what} ({name}): {owner}cannot be loaded ({reason}). {remedy}") from error
    if tokenizer.eos_token_id is None:
        logger.warning(
            "tokenizer %r has no end-of-text token: the end of texts is not learned", name
        )
    elif tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _try_out(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise what a damaged tokenizer raises at its first use, and refuse one that is no tokenizer.

    transformers gives an empty one where it finds no files, and does not look at the types of what
    it reads.
    """
    if not tokenizer.vocab_size:
        raise ValueError("it has no vocabulary")
    tokenizer.decode(tokenizer(_EXAMPLE)["input_ids"])
    padding_id(tokenizer)
    special = (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id)
    for token_id in special:
        if token_id is not None and not isinstance(token_id, int):
            raise TypeError(f"a special token has the id {token_id!r}")


def check_tokenizer_fits(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raises `UserError` if some ids have no row in the model's embedding; more rows are fine."""
    needed = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))
    if needed > vocab_size:
        raise UserError(
            f"the tokenizer needs {needed} rows but the model's embedding has {vocab_size}: ids"
            " beyond it cannot be embedded; use the tokenizer that belongs to the model, or"
            " resize the model's embedding first"
        )


def decode_behind(tokenizer: PreTrainedTokenizerBase, rows: Sequence[list[int]]) -> list[str]:
    """Returns what each row of tokens adds to a text that goes on with it.

    Some bytes of a character become the replacement character.
    """
    anchor: Any = tokenizer(_ANCHOR, add_special_tokens=False)["input_ids"]
    begin = len(str(tokenizer.decode(anchor)))
    return [text[begin:] for text in tokenizer.batch_decode([[*anchor, *row] for row in rows])]


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the id to pad with: any token's id serves, as a mask says what is padding."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token_id for token_id in candidates if isinstance(token_id, int)), 0)


def pad_left(rows: Sequence[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Pads texts to be continued on the left: ids and mask, (batch, seq) each."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask
