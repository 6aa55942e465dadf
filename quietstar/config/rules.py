"""Rules that tie fields of the config together, each with its remedy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from quietstar.config.schema import Config

SYNTHETIC = "synthetic:"
DEFAULT_STEPS = 4
"""Difficulty of the ``synthetic:`` tasks where ``data.task_options`` names none."""


class CrossFieldProblem(NamedTuple):
    """A broken rule between fields.

    Attributes:
        keys: Dotted names of the fields in the rule, the one to change first.
        message: The values, the rule, the reason and the remedy in one line.
    """

    keys: tuple[str, ...]
    message: str


def cross_field_problems(config: Config) -> list[CrossFieldProblem]:
    """All broken rules between the fields of a config whose single fields are valid."""
    rules = (_model_rules, _thought_rules, _mixing_head_rules, _loss_rules, _data_rules)
    problems = [problem for rule in rules for problem in rule(config)]
    return [*problems, *_batch_rules(config)]


def _model_rules(config: Config) -> Iterator[CrossFieldProblem]:
    model = config.model
    if (model.name_or_path is None) == (model.config is None):
        state = "neither model.name_or_path nor model.config is set"
        remedy = "Set model.name_or_path to a folder or hub id"
        if model.config is not None:
            state = f"both model.name_or_path ({model.name_or_path}) and model.config are set"
            remedy = "Set model.config: null to train the pretrained model"
        yield CrossFieldProblem(
            ("model.name_or_path", "model.config"),
            f"{state}, but exactly one must be: the weights are pretrained or random. {remedy}.",
        )
    if model.config is None:
        return
    if config.tuning.method not in ("full", "galore"):
        yield CrossFieldProblem(
            ("tuning.method", "model.config"),
            f"tuning.method: {config.tuning.method} needs a pretrained model, but model.config"
            " makes random weights, which a saved adapter could not name. Set tuning.method: full.",
        )
    if not isinstance(model.config.get("model_type"), str):
        yield CrossFieldProblem(
            ("model.config",),
            f"names no model_type (keys: {', '.join(model.config) or 'none'}), but it must: the"
            " other keys are fields of an architecture. Add model_type, such as model_type: llama.",
        )
    if model.name_or_path is None and model.tokenizer is None:
        yield CrossFieldProblem(
            ("model.tokenizer", "model.config"),
            "null with model.config must be set: random weights come with no tokenizer."
            " Set model.tokenizer: bytes, or a folder or hub id.",
        )


def _thought_rules(config: Config) -> Iterator[CrossFieldProblem]:
    thoughts, loss = config.thoughts, config.loss
    if config.loss.objective == "next_token":
        return
    if thoughts.sampler == "pause" and loss.policy_weight > 0:
        yield CrossFieldProblem(
            ("loss.policy_weight", "thoughts.sampler"),
            f"loss.policy_weight ({loss.policy_weight}) must be 0 with thoughts.sampler: pause:"
            " thoughts that nobody chose cannot be reinforced. Set it to 0.",
        )
    steps = synthetic_steps(config)
    if steps is not None and steps > thoughts.length:
        yield CrossFieldProblem(
            ("thoughts.length", "data.task_options"),
            f"thoughts.length ({thoughts.length}) must be at least num_steps ({steps}) of"
            f" {config.data.train}: a shorter thought cannot hold the steps to an answer."
            " Raise it, or lower data.task_options num_steps.",
        )
    if thoughts.positions in ("answer", "answer_start"):
        yield from _answer_position_rules(config)
    grouped = loss.estimator != "no_baseline" and loss.policy_weight > 0
    if thoughts.num_thoughts == 1 and grouped:
        yield CrossFieldProblem(
            ("thoughts.num_thoughts", "loss.estimator", "loss.policy_weight"),
            "thoughts.num_thoughts (1) must be at least 2: the REINFORCE baseline compares thoughts"
            " sampled at the same position. Raise it, or set loss.estimator: no_baseline.",
        )
    if config.data.min_context >= config.data.seq_len:
        yield CrossFieldProblem(
            ("data.min_context", "data.seq_len"),
            f"data.min_context ({config.data.min_context}) must be smaller than data.seq_len"
            f" ({config.data.seq_len}), or no token is a target. Lower it.",
        )
    if thoughts.lookahead >= config.data.seq_len:
        yield CrossFieldProblem(
            ("thoughts.lookahead", "data.seq_len"),
            f"thoughts.lookahead ({thoughts.lookahead}) must be smaller than data.seq_len"
            f" ({config.data.seq_len}): the true tokens that a thought is scored on lie in the same"
            " sequence. Lower it, or raise data.seq_len.",
        )


def _answer_position_rules(config: Config) -> Iterator[CrossFieldProblem]:
    data, where = config.data, config.thoughts.positions
    if data.format == "text":
        yield CrossFieldProblem(
            ("thoughts.positions", "data.format"),
            f"thoughts.positions ({where}) needs data.format: qa or chat, but it is text, which has"
            " no answers to think before. Set thoughts.positions to all, every, random, entropy,"
            " weight or weighted_entropy.",
        )
    if data.format == "chat" and data.loss_on != "answer":
        yield CrossFieldProblem(
            ("data.loss_on", "thoughts.positions"),
            f"data.loss_on ({data.loss_on}) must be answer with thoughts.positions: {where} and"
            " data.format: chat: only then are the assistant's tokens known. Set it to answer.",
        )


def synthetic_steps(config: Config) -> int | None:
    """Steps, of one token each, to an answer of ``synthetic:moves``; None for other data."""
    if config.data.train != f"{SYNTHETIC}moves":
        return None
    steps = config.data.task_options.get("num_steps", DEFAULT_STEPS)
    return steps if isinstance(steps, int) else None  # a wrong type is reported by the task


def _mixing_head_rules(config: Config) -> Iterator[CrossFieldProblem]:
    head = config.mixing_head
    if head.activation == "sigmoid":
        if head.initial_weight == 0:
            yield CrossFieldProblem(
                ("mixing_head.initial_weight", "mixing_head.activation"),
                "mixing_head.initial_weight (0) must be above 0 with mixing_head.activation:"
                " sigmoid, which never reaches 0. Set a small value such as 0.12, or"
                " mixing_head.activation: none.",
            )
        elif head.initial_weight <= head.floor:
            yield CrossFieldProblem(
                ("mixing_head.initial_weight", "mixing_head.floor"),
                f"mixing_head.initial_weight ({head.initial_weight}) must be above"
                f" mixing_head.floor ({head.floor}), the lower bound of the weight. Raise it, or"
                " lower the floor.",
            )
        return
    if head.initial_weight != 0:
        yield CrossFieldProblem(
            ("mixing_head.initial_weight", "mixing_head.activation"),
            f"mixing_head.initial_weight ({head.initial_weight}) must be 0 with"
            " mixing_head.activation: none, the paper's head, which is zero at the start."
            " Set it to 0, or mixing_head.activation: sigmoid.",
        )
    if head.floor != 0:
        yield CrossFieldProblem(
            ("mixing_head.floor", "mixing_head.activation"),
            f"mixing_head.floor ({head.floor}) must be 0 with mixing_head.activation: none, whose"
            " output has no bounds. Set it to 0, or mixing_head.activation: sigmoid.",
        )


def _loss_rules(config: Config) -> Iterator[CrossFieldProblem]:
    if config.loss.objective == "next_token":
        return
    weights = {
        f"loss.{name}": value
        for name, value in config.loss.model_dump().items()
        if name.endswith("_weight")
    }
    keys = tuple(weights)
    if not any(weights.values()):
        yield CrossFieldProblem(
            keys,
            f"all weights ({', '.join(keys)}) are 0, but at least one must be above 0: there would"
            " be nothing to learn. Leave one of them out to get its default.",
        )


def _data_rules(config: Config) -> Iterator[CrossFieldProblem]:
    data = config.data
    if data.train is None:
        yield CrossFieldProblem(
            ("data.train",),
            "data.train is not set, but it must name the text to train on. Pass --data.train with a"
            " .jsonl, .json, .txt or .parquet file, a folder, a hub data set id,"
            " reasoning_gym:<task> or synthetic:<task>.",
        )
    before, placeholder, after = data.template.rpartition("{answer}")
    if not placeholder or after.strip() or "{answer}" in before or "{question}" not in before:
        yield CrossFieldProblem(
            ("data.template",),
            f"data.template ({data.template!r}) must hold {{question}}, then {{answer}} once, then"
            " at most white space: the answer is what follows the question."
            " Write it like '{question} {answer}'.",
        )
    if data.rationale_field is not None and data.format != "qa":
        yield CrossFieldProblem(
            ("data.rationale_field", "data.format"),
            f"data.rationale_field ({data.rationale_field}) must be null "
            f"with data.format: {data.format},"
            " whose records have no answer that steps lead to. Leave it out, or set data.format:"
            " qa.",
        )
    if data.loss_on == "answer" and data.format == "text":
        yield CrossFieldProblem(
            ("data.loss_on", "data.format"),
            "data.loss_on (answer) must be all with data.format: text, which does not tell an"
            " answer from its question. Set it to all, or data.format to qa or chat.",
        )


def _batch_rules(config: Config) -> Iterator[CrossFieldProblem]:
    training = config.training
    if training.global_batch_size % training.micro_batch_size:
        yield CrossFieldProblem(
            ("training.micro_batch_size", "training.global_batch_size"),
            f"training.micro_batch_size ({training.micro_batch_size}) must divide"
            f" training.global_batch_size ({training.global_batch_size}):"
            " a step is made of whole micro-batches."
            " Set it to a divisor, such as 1.",
        )
