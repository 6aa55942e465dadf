"""``quietstar teach``: the predictions of a model that thinks, for students to learn."""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quietstar.cli import options
from quietstar.cli.options import BATCH, Parser, whole
from quietstar.config import Config
from quietstar.config.loading import load_config
from quietstar.errors import UserError
from quietstar.system.progress import progress

logger = logging.getLogger(__name__)

DESCRIPTION = """Has a model that thinks predict the texts of a run, and keeps what it predicts.

Students learn it with loss.objective: distill (or fast_rl) and loss.teacher: DIR,
in runs with the same data section, seed and steps, and a model with the same
tokenizer. The same command goes on where one was ended. Keys of the config that say
which texts are read may be given as for quietstar train.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Predict and write; what is wrong raises `UserError`."""
    parser = Parser("quietstar teach", DESCRIPTION)
    add, value = parser.add_argument, parser.value
    options.add_model(parser, "the teacher, a saved Quiet-STaR model")
    add("--config", type=options.existing, required=True, metavar="FILE",
        help="config of the students' run, whose texts are taught")  # fmt: skip
    add("--out", type=options.existing, required=True, metavar="DIR", help="folder to write")
    value("--stage", str, None, "NAME", "stage of the config; default: the last one")
    value("--batch-size", BATCH, 16, "N", "texts at once")
    value("--top", whole(1, 2**20, "no vocabulary has as many"), 64, "N",
          "most likely tokens that are kept of each prediction")  # fmt: skip
    args, overrides = parser.parse_known_args(arguments)
    config = load_config(args.config, overrides)
    for key in sorted({word[2:].partition("=")[0] for word in overrides if word[:2] == "--"}):
        name = re.sub(r"^stages\.[^.]+\.", "", key)
        if name.partition(".")[0] in ("thoughts", "loss", "mixing_head", "optim"):
            logger.warning(
                "--%s: has no effect on the teacher, which thinks as it was saved; leave it out",
                key,
            )
    options.find_models(args)
    _teach(args, config)
    return 0


def _teach(args: argparse.Namespace, config: Config) -> None:
    # These import torch, after command line and config are known to be valid.
    from quietstar.backbone.devices import find_device, free_memory
    from quietstar.data import build_data, load_tokenizer
    from quietstar.evaluation.scoring import fingerprint
    from quietstar.model.quiet_star import QuietStarForCausalLM
    from quietstar.training.build import quiet_libraries
    from quietstar.training.stages import plan_stages
    from quietstar.training.teaching import write_teacher

    stages = {stage.name: stage for stage in plan_stages(config)}
    name = args.stage or list(stages)[-1]
    if name not in stages:
        raise UserError(
            f"--stage ({name}): is none of the config, which has {', '.join(stages)}. Give one of"
            " these."
        )
    stage = stages[name]
    quiet_libraries()
    options.require_trained(args.model)
    # As it was trained: evaluations look ahead by one token alone.
    places: dict[str, Any] = {}
    if args.device_map is not None:
        places = {"device_map": args.device_map, "max_memory": free_memory(args.device)}
    trust = args.trust_remote_code
    model = QuietStarForCausalLM.from_pretrained(
        args.model, dtype=args.dtype, trust_remote_code=trust, **places
    )
    if not places:
        model.to(find_device(args.device))
    tokenizer, seed = load_tokenizer(args.model, trust_remote_code=trust), config.training.seed
    data, _, _ = build_data(stage.config.data, tokenizer, seed, model.thoughts)
    most, longest = stage.config.data.seq_len, model.max_text_length
    if longest is not None and most > longest:
        raise UserError(
            f"data.seq_len ({most}): the teacher takes at most {longest} tokens before a thought."
            " Lower it, here and in the students' run."
        )
    steps = range(stage.first_step, stage.last_step)
    batch_size = stage.config.training.global_batch_size
    size = min(args.batch_size, batch_size)
    settings = {
        "teacher": fingerprint(args.model), "vocab_size": model.vocab_size,
        "thoughts": model.thoughts.model_dump(),
    }  # fmt: skip
    with progress("teaching", len(steps) * -(-batch_size // size)) as advance:
        count, new = write_teacher(
            model, data, steps, Path(args.out).expanduser(), batch_size=batch_size,
            micro_batch_size=size, seed=seed, top=args.top, settings=settings, advance=advance,
        )  # fmt: skip
    options.say(f"predictions for {count:,} texts are in {args.out}, {new:,} of them new")
