"""What ``quietstar generate`` and ``quietstar chat`` have in common."""

from __future__ import annotations

import argparse
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from quietstar.cli.devices import device_option, find_device
from quietstar.data.tokenizer import load_tokenizer, padding_id
from quietstar.errors import UserError
from quietstar.evaluation.loading import load_thinker
from quietstar.generation.gates import PROBED, Gate, GateKind
from quietstar.model.quiet_star import QuietStarForCausalLM
from quietstar.training.setup import quiet_libraries

CALIBRATED = "calibrated"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of model, thoughts and sampling."""
    add = parser.add_argument
    add("--model", required=True, help="folder of a saved Quiet-STaR model")
    add("--max-new-tokens", type=int, default=128)
    add("--show-thoughts", action="store_true", help="print them dim, before their token")
    add("--no-thoughts", action="store_true", help="the plain model")
    add("--gate", metavar="GATE", help="who thinks: calibrated, entropy:NATS, weight:W, gain:NATS")
    add("--num-thoughts", type=int, default=1, help="before each token, averaged")
    add("--thought-temperature", type=float, help="without it the most likely tokens")
    add("--temperature", type=float, default=0.0, help="of the text; 0 takes the most likely")
    add("--top-p", type=float, default=1.0)
    add("--seed", type=int, default=0)
    add("--dtype", default="auto", help="of the weights")
    add("--device", type=device_option, help="by default a GPU if there is one")


def load(args: argparse.Namespace) -> tuple[QuietStarForCausalLM, PreTrainedTokenizerBase]:
    """The model, on its device.

    Raises:
        UserError: It is none that thinks, though it shall, or a value is out of range.
    """
    quiet_libraries()
    for name in ("max_new_tokens", "num_thoughts"):
        if getattr(args, name) < 1:
            value = getattr(args, name)
            raise UserError(f"--{name.replace('_', '-')}: {value} must be at least 1")
    if args.temperature < 0 or (args.thought_temperature or 0) < 0:
        raise UserError("--temperature: must be 0 or more")
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top-p: {args.top_p} must be above 0 and at most 1")
    if args.no_thoughts and (args.show_thoughts or args.gate):
        raise UserError("--no-thoughts: does not go with --show-thoughts or --gate")
    remedy = "Set --no-thoughts to generate with the plain model."
    model = load_thinker(args.model, not args.no_thoughts, args.dtype, remedy)
    torch.manual_seed(args.seed)
    return model.to(find_device(args.device)), load_tokenizer(args.model)


def arguments_of(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Arguments of `QuietStarForCausalLM.generate`."""
    sampled = args.temperature > 0
    how = {"temperature": args.temperature, "top_p": args.top_p, "top_k": 0} if sampled else {}
    return {
        "think": find_gate(args), "num_thoughts": args.num_thoughts,
        "thought_temperature": args.thought_temperature or None, "seed": args.seed,
        "max_new_tokens": args.max_new_tokens, "pad_token_id": padding_id(tokenizer),
        "do_sample": sampled, **how,
    }  # fmt: skip


def find_gate(args: argparse.Namespace) -> bool | Gate:
    """Who thinks.

    Raises:
        UserError: No such gate, or none was calibrated.
    """
    if args.gate is None:
        return not args.no_thoughts
    if args.gate == CALIBRATED:
        return Gate.load(args.model)
    kind, _, threshold = args.gate.partition(":")
    try:
        value = float(threshold)
    except ValueError:
        raise UserError(
            f"--gate: {args.gate} must be calibrated, or a kind and a threshold, as entropy:1.5"
        ) from None
    probes = Gate.load(args.model).probes if kind in PROBED else {}
    return Gate(cast(GateKind, kind), value, probes)
