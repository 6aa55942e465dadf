"""Rules that tie keys of the config together: each yields the keys and a line with its remedy.

A function under `rule` sees a config whose single values are valid. The first key that it yields
is the one to change; the message has values, rule, reason and remedy.
"""

from collections.abc import Callable, Iterator

from quietstar import registry
from quietstar.config.schema import RULES, Config, CrossFieldProblem
from quietstar.errors import UserError

SYNTHETIC = "synthetic:"
GYM = "reasoning_gym:"
DEFAULT_STEPS = 4
"""Difficulty of the ``synthetic:`` tasks where ``data.task_options`` names none."""

Broken = Iterator[tuple[tuple[str, ...], str]]


def rule(check: Callable[[Config], Broken]) -> Callable[[Config], Broken]:
    """Adds a function to the rules that every config is checked by."""
    RULES.append(lambda config: (CrossFieldProblem(*broken) for broken in check(config)))
    return check


@rule
def _model_rules(config: Config) -> Broken:
    model = config.model
    if (model.name_or_path is None) == (model.config is None):
        state = "neither model.name_or_path nor model.config is set"
        remedy = "Set model.name_or_path to a folder or hub id"
        if model.config is not None:
            state = f"both model.name_or_path ({model.name_or_path}) and model.config are set"
            remedy = "Set model.config: null to train the pretrained model"
        yield (
            ("model.name_or_path", "model.config"),
            f"{state}, but exactly one must be: the weights are pretrained or random. {remedy}.",
        )
    if model.config is None:
        return
    if config.tuning.method not in ("full", "galore"):
        yield (
            ("tuning.method", "model.config"),
            f"tuning.method: {config.tuning.method} needs a pretrained model, but model.config"
            " makes random weights, which a saved adapter could not name. Set tuning.method: full.",
        )
    if not isinstance(model.config.get("model_type"), str):
        yield (
            ("model.config",),
            f"names no model_type (keys: {', '.join(model.config) or 'none'}), but it must: the"
            " other keys are fields of an architecture. Add model_type, such as model_type: llama.",
        )
    if model.name_or_path is None and model.tokenizer is None:
        yield (
            ("model.tokenizer", "model.config"),
            "null with model.config must be set: random weights come with no tokenizer."
            " Set model.tokenizer: bytes, or a folder or hub id.",
        )


@rule
def _thought_rules(config: Config) -> Broken:
    thoughts, data = config.thoughts, config.data
    try:
        if not config.loss.thinks:
            return
    except UserError:  # another rule says so
        return
    steps = data.task_options.get("num_steps", DEFAULT_STEPS)  # the task reports a wrong type
    is_moves = data.train == f"{SYNTHETIC}moves"
    if is_moves and isinstance(steps, int) and steps > thoughts.length:
        yield (
            ("thoughts.length", "data.task_options"),
            f"thoughts.length ({thoughts.length}) must be at least num_steps ({steps}) of"
            f" {data.train}: a shorter thought cannot hold the steps to an answer."
            " Raise it, or lower data.task_options num_steps.",
        )
    if thoughts.positions in ("answer", "answer_start"):
        if data.format == "text":
            yield (
                ("thoughts.positions", "data.format"),
                f"thoughts.positions ({thoughts.positions}) needs data.format: qa or chat, but it"
                " is text, which has no answers to think before. Set thoughts.positions to all,"
                " every, random, entropy, weight or weighted_entropy.",
            )
        if data.format == "chat" and data.loss_on != "answer":
            yield (
                ("data.loss_on", "thoughts.positions"),
                f"data.loss_on ({data.loss_on}) must be answer with thoughts.positions:"
                f" {thoughts.positions} and data.format: chat: only then are the assistant's tokens"
                " known. Set it to answer.",
            )
    if data.min_context >= data.seq_len:
        yield (
            ("data.min_context", "data.seq_len"),
            f"data.min_context ({data.min_context}) must be smaller than data.seq_len"
            f" ({data.seq_len}), or no token is a target. Lower it.",
        )
    if thoughts.lookahead >= data.seq_len:
        yield (
            ("thoughts.lookahead", "data.seq_len"),
            f"thoughts.lookahead ({thoughts.lookahead}) must be smaller than data.seq_len"
            f" ({data.seq_len}): the true tokens that a thought is scored on lie in the same"
            " sequence. Lower it, or raise data.seq_len.",
        )


@rule
def _mixing_head_rules(config: Config) -> Broken:
    head = config.mixing_head
    weight = ("mixing_head.initial_weight", "mixing_head.activation")
    if head.activation == "sigmoid" and head.initial_weight == 0:
        yield (
            weight,
            "mixing_head.initial_weight (0) must be above 0 with mixing_head.activation: sigmoid,"
            " which never reaches 0. Set a small value such as 0.12, or mixing_head.activation:"
            " none.",
        )
    elif head.activation == "sigmoid" and head.initial_weight <= head.floor:
        yield (
            ("mixing_head.initial_weight", "mixing_head.floor"),
            f"mixing_head.initial_weight ({head.initial_weight}) must be above mixing_head.floor"
            f" ({head.floor}), the lower bound of the weight. Raise it, or lower the floor.",
        )
    if head.activation == "none" and head.initial_weight != 0:
        yield (
            weight,
            f"mixing_head.initial_weight ({head.initial_weight}) must be 0 with"
            " mixing_head.activation: none, the paper's head, which is zero at the start."
            " Set it to 0, or mixing_head.activation: sigmoid.",
        )
    if head.activation == "none" and head.floor != 0:
        yield (
            ("mixing_head.floor", "mixing_head.activation"),
            f"mixing_head.floor ({head.floor}) must be 0 with mixing_head.activation: none, whose"
            " output has no bounds. Set it to 0, or mixing_head.activation: sigmoid.",
        )


@rule
def _part_rules(config: Config) -> Broken:
    named = {
        "loss.objective": config.loss.objective,
        "loss.reward": config.loss.reward,
        "thoughts.sampler": config.thoughts.sampler,
    }
    for key, name in named.items():
        try:
            registry.check(key, name)
        except UserError as problem:
            yield (key,), str(problem).replace(f"{key} ({name}): ", f"{name}: ", 1)
        else:
            if key == "loss.objective":
                yield from registry.find(key, name).problems(config)


@rule
def _data_rules(config: Config) -> Broken:
    data = config.data
    if data.train is None:
        yield (
            ("data.train",),
            "data.train is not set, but it must name the text to train on. Pass --data.train with a"
            " .jsonl, .json, .txt or .parquet file, a folder, a hub data set id,"
            " reasoning_gym:<task> or synthetic:<task>.",
        )
    before, placeholder, after = data.template.rpartition("{answer}")
    if not placeholder or after.strip() or "{answer}" in before or "{question}" not in before:
        yield (
            ("data.template",),
            f"data.template ({data.template!r}) must hold {{question}}, then {{answer}} once, then"
            " at most white space: the answer is what follows the question."
            " Write it like '{question} {answer}'.",
        )
    if data.rationale_field is not None and data.format != "qa":
        yield (
            ("data.rationale_field", "data.format"),
            f"data.rationale_field ({data.rationale_field}) must be null with data.format:"
            f" {data.format}, whose records have no answer that reasoning leads to. Leave it out,"
            " or set data.format: qa.",
        )
    if data.loss_on == "answer" and data.format == "text":
        yield (
            ("data.loss_on", "data.format"),
            "data.loss_on (answer) must be all with data.format: text, which does not tell an"
            " answer from its question. Set it to all, or data.format to qa or chat.",
        )
