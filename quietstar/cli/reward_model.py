"""``quietstar reward-model``: a sequence classifier that scores texts, from preferences."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from quietstar.cli import options
from quietstar.cli.options import Parser, number, whole
from quietstar.errors import UserError
from quietstar.system.files import file_kind

logger = logging.getLogger(__name__)

FEW_PAIRS = 20
"""Held-out pairs below which a share of them tells nothing."""
DESCRIPTION = """Trains a reward model on preferences, such as quietstar judge writes.

Every line of --pairs has "prompt", "chosen", "rejected" and perhaps "soft_label"
(the probability that chosen is preferred; default 1). The model in --out is a
sequence classifier of transformers with one logit, for loss.reward: reward_model.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, measure, print; what is wrong raises `UserError`."""
    args = _parser().read(arguments)
    out = Path(args.out).expanduser().absolute()
    if file_kind(out) != "none":
        raise UserError(
            f"--out ({args.out}): exists already, and a reward model is never replaced. Give a new"
            " folder."
        )
    # These import torch, after the command line is known to be valid.
    from quietstar.evaluation.scoring import fingerprint
    from quietstar.judging.reward_training import (
        RewardTraining,
        digest_of,
        read_preferences,
        train_reward_model,
    )
    from quietstar.training.build import quiet_libraries

    train = read_preferences(Path(args.pairs).expanduser(), "--pairs")
    if args.eval is not None:
        held_out = read_preferences(Path(args.eval).expanduser(), "--eval")
        if known := len({*train} & {*held_out}):
            logger.warning("--eval: %d of its pairs are trained on, so they measure less", known)
    else:
        train, held_out = _split(train, args.eval_fraction, args.seed, args.pairs)
    quiet_libraries()
    settings = RewardTraining(
        labels=args.labels, epochs=args.epochs, batch_size=args.batch_size,
        learning_rate=args.learning_rate, lora_r=args.lora_r, max_length=args.max_length,
        save_steps=args.save_steps, seed=args.seed,
    )  # fmt: skip
    given = {
        "weights": fingerprint(args.model), "pairs": digest_of(train), "eval": digest_of(held_out),
        "trained_on": len(train),
    }  # fmt: skip
    figures = train_reward_model(args.model, out, train, held_out, settings, given)
    if figures is not None:
        _show(figures, len(train), args.model, out)
    return 0


def _split(pairs: list[Any], fraction: float, seed: int, name: str) -> tuple[list[Any], list[Any]]:
    """Hold some prompts out, with all their pairs."""
    prompts = sorted({pair.prompt for pair in pairs})
    random.Random(seed).shuffle(prompts)
    count = max(1, round(fraction * len(prompts)))
    if count >= len(prompts):
        raise UserError(
            f"--pairs ({name}): is about {len(prompts)} different prompts, too few to hold {count}"
            " out. Give more, a smaller --eval-fraction, or other pairs by --eval."
        )
    held_out = set(prompts[:count])
    return (
        [pair for pair in pairs if pair.prompt not in held_out],
        [pair for pair in pairs if pair.prompt in held_out],
    )


def _show(figures: dict[str, Any], num_trained: int, base: str, out: Path) -> None:
    from quietstar.reports.formats import show

    table = options.table(("", "", "95% CI"), ("",))
    table.add_row("pairs trained on", str(num_trained))
    table.add_row("pairs held out", str(figures["n"]))
    table.add_row("  of these with a preference", str(figures["n_clear"]))
    agreement = show(figures["agreement"], ".1%"), show(figures["agreement_ci95"], ".1%")
    table.add_row("scores the preferred text higher", *agreement)
    table.add_row("cross-entropy with their labels, nats", f"{figures['cross_entropy']:.4f}")
    table.title = Text("reward model")
    Console().print(table)
    options.say(f"the reward model of {base} is in {out}")
    if figures["n_clear"] < FEW_PAIRS:
        logger.warning(
            "%d pairs held out are too few to say how good it is; give more --pairs, or --eval",
            figures["n_clear"],
        )


def _parser() -> Parser:
    parser = Parser("quietstar reward-model", DESCRIPTION)
    add, value = parser.add_argument, parser.value
    add("--pairs", type=options.existing, required=True, metavar="FILE.jsonl", help="preferences")
    add("--model", type=options.existing, required=True, metavar="DIR",
        help="folder of the model to begin with")  # fmt: skip
    add("--out", type=options.existing, required=True, metavar="DIR",
        help="new folder; the same command continues an interrupted one")  # fmt: skip
    add("--labels", choices=("soft", "hard"), default="soft",
        help="learn the soft labels, or that whatever was chosen is better")  # fmt: skip
    add("--eval", type=options.existing, metavar="FILE.jsonl",
        help="preferences to measure by; default: those of some prompts of --pairs")  # fmt: skip
    value("--eval-fraction", number(0.0, 0.9, above=True), 0.1, "X",
          "share of the prompts that is held out")  # fmt: skip
    value("--epochs", whole(1, 1000), 1, "N", "passes over the pairs")
    value("--batch-size", whole(1, 10**5), 16, "N", "pairs of a step")
    value("--learning-rate", number(0.0, 1.0, above=True), 1e-4, "X",
          "highest learning rate")  # fmt: skip
    value("--lora-r", whole(0, 10**4), 16, "N", "rank of LoRA; 0 trains all weights")
    value("--max-length", whole(8, 2**20), 1024, "N", "most tokens of a text")
    value("--save-steps", whole(1, 10**9), 100, "N", "steps between checkpoints")
    value("--seed", whole(0, 2**32 - 1), 0, "N", "of order and new weights")
    return parser
