"""``quietstar train``: a run from a config file and keys on the command line, or its plan."""

import argparse
import logging
import os
from collections.abc import Sequence
from itertools import pairwise
from textwrap import fill

from quietstar import registry
from quietstar.cli import options, plan
from quietstar.cli.options import DEFAULT_CONFIG, Parser, whole
from quietstar.config import SECTIONS, Config, fields
from quietstar.config.loading import load_config, resolve_config_file
from quietstar.config.messages import default_text, type_text
from quietstar.config.schema import TrainingConfig
from quietstar.config.tree import loss_class
from quietstar.config.yaml import YamlProblem, parse
from quietstar.errors import ConfigError, UserError
from quietstar.system.processes import launched_rank
from quietstar.version import __version__

DESCRIPTION = """Trains a model. On many processes: accelerate launch train.py, same options.

Keys go into the config file, by section, or on the command line, which wins.
--help SECTION explains one section, --help all explains all of them.
Lists are [a, b], no value is null, a bare flag is true. Entries of a mapping:
--model.config.hidden_size 64. Keys of one stage: --stages.NAME.KEY.
"""


def main(arguments: Sequence[str] | None = None) -> int | None:
    """Train, or compare the last stage with its controls; what is wrong raises `UserError`."""
    parser = _TrainParser(
        "quietstar train",
        DESCRIPTION,
        "quietstar train [--config FILE] [--preset FILE] [--resume auto|PATH]\n"
        "                       [--plan] [--KEY VALUE ...]",
    )
    value = parser.value
    value("--config", _filled, DEFAULT_CONFIG, "FILE",
          "YAML file, or a name in configs/")  # fmt: skip
    value("--preset", _filled, None, "FILE",
          "objective of stages that think: file, or a name in "
          "configs/objectives/")  # fmt: skip
    value("--resume", _filled, None, "auto|PATH", "go on from the newest checkpoint, or this one")
    parser.add_argument(
        "--allow-changes", type=_true_or_false, nargs="?", const=True, default=False,
        metavar="true", help="resume as another run",
    )  # fmt: skip
    parser.add_argument(
        "--overwrite", type=_true_or_false, nargs="?", const=True, default=False, metavar="true",
        help="replace a run in the same folder",
    )  # fmt: skip
    value("--controls", whole(1, 1000), None, "SEEDS",
          "compare the last stage with its controls")  # fmt: skip
    plan.add_options(parser)
    parser.objective = _named_objective(arguments or ())
    parser.section = _asked_section(arguments or ())
    # DeepSpeed's launcher adds it; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    args, overrides = parser.parse_known_args(arguments)
    if args.plan:
        for option in ("--resume", "--controls", "--allow-changes", "--overwrite"):
            if getattr(args, option[2:].replace("-", "_")):
                raise UserError(f"{option}: does not go with --plan. Leave it out.")
        return plan.plan(parser, args, overrides)
    of_plan = ("--engine", "--processes", "--memory", "--json", "--force")
    parser.warn_idle(args, dict.fromkeys(of_plan, "without --plan"))
    if args.controls is not None and args.resume is not None:
        raise UserError("--resume: does not go with --controls, which always goes on; leave it out")
    if launched_rank() > 0:
        logging.getLogger("quietstar.config").setLevel(logging.ERROR)  # rank 0 warns
    else:
        _announce(args.config, overrides)
    problems: list[str] = []
    if args.resume not in (None, "auto") and not os.path.exists(args.resume):
        problems.append(
            f"--resume ({args.resume}): there is no such folder; give a checkpoint such as"
            " runs/x/checkpoints/step-000500, or auto for the newest of the run"
        )
    try:
        config = load_config(args.config, overrides, args.preset)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from error
    if problems:
        raise ConfigError(problems)

    from quietstar.reports import write_report

    if args.controls is not None:
        from quietstar.training.controls import run_controls  # imports torch

        run_controls(config, args.controls, on_report=write_report)
        return None

    from quietstar.training.run import run_training  # imports torch

    run_training(
        config,
        resume=args.resume,
        allow_changes=args.allow_changes,
        overwrite=args.overwrite,
        on_report=write_report,
    )
    return None


def _announce(config: str, overrides: Sequence[str]) -> None:
    """Say what will be trained, before the config is checked, which imports torch."""
    given = _given(overrides)
    try:
        path, name = resolve_config_file(config)
        written = parse(path.read_text(encoding="utf-8"))
    except (ConfigError, YamlProblem, OSError, ValueError):  # to be told by `load_config`
        return
    keys = ("model.name_or_path", "data.train", "training.output_dir")
    model, data, folder = (given.get(f"--{key}") or written.text(key) for key in keys)
    options.say(
        f"quietstar {__version__}: training {model or 'a model with random weights'} on "
        f"{data or 'nothing'} into {folder or TrainingConfig().output_dir}, as {name} says"
    )


def _filled(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("(): must not be empty")
    return os.path.expanduser(text)


def _true_or_false(text: str) -> bool:
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"({text}): must be true or false")
    return text == "true"


def _given(arguments: Sequence[str]) -> dict[str, str]:
    """Pair each word of the command line with the next, so that options have their values."""
    return dict(pairwise(part for word in arguments for part in word.split("=", 1)))


def _named_objective(arguments: Sequence[str]) -> str | None:
    """Find the built-in objective that the command line names."""
    named = _given(arguments).get("--loss.objective")
    return named if named in registry.choices("loss.objective") else None


class _TrainParser(Parser):
    """Lists the keys of the config, which the config's own reader parses.

    Attributes:
        objective: The one whose keys and defaults are listed; None lists those of all.
        section: The one that is explained; all of them, or with None only the names of its keys.
    """

    objective: str | None = None
    section: str | None = None

    def format_help(self) -> str:
        """Name the keys by section, or explain those of one."""
        listed = dict(fields())
        about = "Defaults are those of quiet_star. Add --loss.objective NAME for those of another."
        if self.objective is not None:
            own = loss_class(self.objective).model_json_schema()["properties"]
            listed = {k: v for k, v in listed.items() if not k.startswith("loss.")}
            listed |= {f"loss.{name}": field for name, field in own.items()}
            about = f"These keys, and their defaults, are those of {self.objective}."
        if self.section is None:
            lines = []
            for section in SECTIONS:
                names = ", ".join(
                    k.partition(".")[2] for k in listed if k.startswith(f"{section}.")
                )
                first, rest = f"  {section:<12}", " " * 14
                lines.append(fill(names, 80, initial_indent=first, subsequent_indent=rest))
            return "\n".join([super().format_help(), "keys, as --SECTION.KEY:", *lines, ""])
        for section in SECTIONS if self.section == "all" else (self.section,):
            description = Config.model_fields[section].annotation.__doc__ or ""
            if section == "loss":
                description = f"{description.rstrip()} {about}"
            group = self.add_argument_group(section, fill(description, 76))
            for key in (key for key in listed if key.startswith(f"{section}.")):
                description = listed[key].get("description", "")
                default = default_text(listed[key])
                text = f"{description} ({type_text(listed[key])}; default {default})"
                group.add_argument(f"--{key}", help=text.replace("%", "%%"), metavar="")
        text = super().format_help()
        return text if self.section == "all" else text[text.index(f"\n{self.section}:") + 1 :]


def _asked_section(arguments: Sequence[str]) -> str | None:
    """Return the word after ``--help``: a section, ``all``, or None."""
    for word, following in pairwise([*arguments, "--"]):
        if word in ("-h", "--help") and not following.startswith("-"):
            known = ", ".join(SECTIONS)
            if following not in (*SECTIONS, "all"):
                raise UserError(f"--help ({following}): is no section; give one of {known}, or all")
            return following
    return None
