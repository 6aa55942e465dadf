"""The whole tree: its sections, the stages of a run, and the rules that tie keys together.

The keys of the ``loss`` section are those of the objective: `quietstar.registry` finds it when a
config is validated.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Annotated, Any

from pydantic import (
    Field,
    SerializeAsAny,
    TypeAdapter,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)

from quietstar import registry
from quietstar.config import schema
from quietstar.config.schema import TUNING_OPTIONS, Section, Text
from quietstar.errors import UserError, reason_of

MOST_TOKEN_BYTES = 2**36
"""Of the ids of one micro-batch's thoughts, whose states need a thousand times as much."""

MOST_STAGES = 100

SWITCHED_OFF = ("lora", "rslora", "dora", "qlora", "ia3")
"""Methods of tuning whose adapters can be switched off, so that the base judges."""

# A stage may change the keys of these sections, and these keys; all others hold for the whole run.
_STAGE_SECTIONS = ("thoughts", "loss", "data", "optim")
_LEARNED_RULES = ("weight", "weighted_entropy")  # of thoughts.positions: they ask the mixing head
_STAGE_KEYS = (
    *("mixing_head.warmup_steps", "mixing_head.warmup_weight", "training.max_steps"),
    *("training.global_batch_size", "training.micro_batch_size", "training.eval_steps"),
    "training.inner_epochs",
    "training.eval_controls",
)


class LossConfig(Section):
    """The objective, the reward, and the objective's own settings (`loss_class`)."""

    objective: Text = "quiet_star"
    """What is learned (docs/objectives.md): quiet_star, rlp, log_prob, verifree, jepo, rlpr, latro,
    distill and fast_rl (a student without thoughts learns from a teacher with them), next_token
    (plain language modeling without thoughts), or an objective of your own as module:name. It
    brings the other keys of this section, and their defaults."""
    reward: Text = "thought"
    """What thoughts are reinforced by: the log-probability of the true tokens by the mixed
    prediction (mixed) or the thought's own (thought), what the latter adds to a prediction without
    a thought (information_gain, mean_prob), their probability (prob), the thought's rank in its
    position by it (rank), what a judge says of the text that the model writes after the thought
    (judge, reward_model; section judge), how close it comes to a teacher (teacher, with objective
    distill), or a function of your own as module:name."""

    @property
    def thinks(self) -> bool:
        """Whether the objective samples thoughts at all."""
        return registry.find("loss.objective", self.objective).thinks

    def __reduce__(self) -> Any:
        """Pickles by values: the class is made for its objective."""
        return partial(loss_config, **self.model_dump()), ()


@cache
def loss_class(objective: str) -> type[LossConfig]:
    """Returns the ``loss`` section with the settings of an objective.

    Raises:
        UserError: There is no such objective.
    """
    settings = registry.find("loss.objective", objective).Settings
    if settings is Section:
        return LossConfig
    try:
        kind = create_model("LossConfig", __base__=(settings, LossConfig))
        properties = kind.model_json_schema()["properties"]
    except Exception as problem:
        raise UserError(
            f"loss.objective ({objective}): its Settings cannot be keys of a config"
            f" ({reason_of(problem)}). Derive them from quietstar.config.Section, with a type for"
            " each."
        ) from problem
    if ":" in objective:  # `fields` has the others
        for name, field in properties.items():
            fields().setdefault(f"loss.{name}", field)
    return kind


def loss_config(**values: Any) -> LossConfig:
    """Makes a ``loss`` section: the objective, the reward, and the objective's own settings."""
    objective = values.get("objective", LossConfig.model_fields["objective"].default)
    return loss_class(objective)(**values)


Broken = tuple[tuple[str, ...], str]
"""A broken rule: its keys, the one to change first; values, rule, reason and remedy in one line."""


class CrossFieldError(ValueError):
    """Carries the broken rules between keys through pydantic."""

    def __init__(self, problems: list[Broken]) -> None:
        self.problems = problems
        super().__init__("\n".join(f"{keys[0]}: {message}" for keys, message in problems))


class Config(Section):
    """The whole tree.

    A run is one stage, or several (`stages`): each changes some keys for its part of the run and
    starts from the weights of the one before.

    Raises:
        pydantic.ValidationError: With every broken bound, or else every broken cross-field rule.
    """

    model: schema.ModelConfig = schema.ModelConfig()
    tuning: schema.TuningConfig = schema.TuningConfig()
    thoughts: schema.ThoughtsConfig = schema.ThoughtsConfig()
    mixing_head: schema.MixingHeadConfig = schema.MixingHeadConfig()
    loss: SerializeAsAny[LossConfig] = Field(default_factory=loss_config)
    judge: schema.JudgeConfig = schema.JudgeConfig()
    data: schema.DataConfig = schema.DataConfig()
    optim: schema.OptimConfig = schema.OptimConfig()
    training: schema.TrainingConfig = schema.TrainingConfig()
    logging: schema.LoggingConfig = schema.LoggingConfig()
    stages: Annotated[
        dict[schema.StageName, dict[str, dict[str, Any]]], Field(max_length=MOST_STAGES)
    ] = Field(default_factory=dict)
    """Stages of the run by name, in order, each with the keys it changes; none means that the run
    is one stage."""

    @field_validator("loss", mode="wrap")
    @classmethod
    def _by_objective(cls, value: Any, handler: Callable[[Any], LossConfig]) -> LossConfig:
        """Validates the section with the settings that its objective brings."""
        if not isinstance(value, Mapping):
            return handler(value)
        objective = value.get("objective", LossConfig.model_fields["objective"].default)
        try:
            kind = loss_class(objective) if isinstance(objective, str) else LossConfig
        except UserError:  # a rule says so
            kind = LossConfig
        # Settings of another objective may be here for another stage of the run: valid, but unused.
        unused = {k for k in value if k not in kind.model_fields and f"loss.{k}" in fields()}
        if unused:
            declared = {}
            for other in map(loss_class, registry.choices("loss.objective")):
                declared |= {k: (f.annotation, f) for k, f in other.model_fields.items()}
            extra = {k: declared[k] for k in unused if k in declared}
            create_model("LossConfig", __base__=kind, **extra).model_validate(value)
        return kind.model_validate({k: v for k, v in value.items() if k not in unused})

    @model_validator(mode="after")
    def _check_rules(self) -> "Config":
        for stage, sections in self.stages.items():
            for key in (f"{section}.{name}" for section in sections for name in sections[section]):
                if not is_stage_key(key):
                    raise ValueError(f"stages.{stage}: {key} holds for the whole run")
        if self.stages:
            self.stage_configs()  # each checks its own fields and rules
        elif problems := cross_field_problems(self):
            raise CrossFieldError(problems)
        return self

    def stage_configs(self) -> dict[str, "Config"]:
        """Returns the whole config of each stage, by name, in order.

        A config that names no stages is one, called ``train``.
        """
        if not self.stages:
            return {"train": self}
        # Of what is set: another objective has other defaults.
        stages = stages_of(self.model_dump(exclude_unset=True))
        return {name: Config.model_validate(sections) for name, sections in stages.items()}


SECTIONS = tuple(name for name in Config.model_fields if name != "stages")
"""Names of the sections, in order."""


_STAGES: TypeAdapter[dict[str, dict[str, dict[str, Any]]]] = TypeAdapter(
    Config.model_fields["stages"].rebuild_annotation()
)


def stages_of(tree: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the sections of each stage by its name; without stages, those of the run as "".

    Raises:
        pydantic.ValidationError: The stages are no mapping of sections.
    """
    common = {section: body for section, body in tree.items() if section != "stages"}
    stages = _STAGES.validate_python(tree.get("stages") or {})
    return {
        name: common | {section: {**common.get(section, {}), **body}
                        for section, body in changes.items()
                        if isinstance(common.get(section, {}), dict)}
        for name, changes in stages.items()
    } or {"": common}  # fmt: skip


@cache
def fields() -> dict[str, dict[str, Any]]:
    """Returns every key, such as ``thoughts.length``, with its JSON schema.

    A function, since objectives, whose settings are keys of ``loss``, import torch.
    """
    kinds: list[tuple[str, Any]] = [
        (section, Config.model_fields[section].annotation) for section in SECTIONS
    ]
    default = LossConfig.model_fields["objective"].default  # whose defaults are shown
    names = sorted(registry.choices("loss.objective"), key=lambda name: name == default)
    kinds += [("loss", loss_class(name)) for name in names]
    return {
        f"{section}.{name}": field
        for section, kind in kinds
        for name, field in kind.model_json_schema()["properties"].items()
    }


def keys_of(section: str) -> list[str]:
    """Returns the keys of a section, with its name before them."""
    return [key for key in fields() if key.startswith(f"{section}.")]


def is_stage_key(key: str) -> bool:
    """Tells whether a stage may change this key."""
    return key.partition(".")[0] in _STAGE_SECTIONS or key in _STAGE_KEYS


def cross_field_problems(config: Config) -> list[Broken]:
    """Returns all broken rules between the keys of a config whose single fields are valid."""
    rules = (
        *(_model_rules, _thought_rules, _mixing_head_rules, _part_rules, _judge_rules),
        _data_rules,
    )
    return [broken for rule in rules for broken in rule(config)]


def _model_rules(config: Config) -> Iterator[Broken]:
    model = config.model
    if (model.name_or_path is None) == (model.config is None):
        state = "neither model.name_or_path nor model.config is set"
        remedy = "Set model.name_or_path to a folder or hub id"
        if model.config is not None:
            state = f"both model.name_or_path ({model.name_or_path}) and model.config are set"
            remedy = "Set model.config: null to train the pretrained model"
        yield ("model.name_or_path", "model.config"), (
            f"{state}, but exactly one must be: the weights are pretrained or random. {remedy}."
        )  # fmt: skip
    if config.tuning.method == "galore" and config.optim.name != "adamw_torch":
        yield ("optim.name", "tuning.method"), (
            f"optim.name: {config.optim.name} does not go with tuning.method: galore, which has an"
            " AdamW of its own. Set optim.name: adamw_torch, or another method."
        )  # fmt: skip
    yield from _tuning_rules(config.tuning)
    if model.config is None:
        return
    if config.tuning.method not in ("full", "galore"):
        yield ("tuning.method", "model.config"), (
            f"tuning.method: {config.tuning.method} needs a pretrained model, but model.config"
            " makes random weights, which a saved adapter could not name. Set tuning.method: full."
        )  # fmt: skip
    if not isinstance(model.config.get("model_type"), str):
        yield ("model.config",), (
            f"names no model_type (keys: {', '.join(model.config) or 'none'}), but it must: the"
            " other keys are fields of an architecture. Add model_type, such as model_type: llama."
        )  # fmt: skip
    if model.name_or_path is None and model.tokenizer is None:
        yield ("model.tokenizer", "model.config"), (
            "null with model.config must be set: random weights come with no tokenizer."
            " Set model.tokenizer: bytes, or a folder or hub id."
        )  # fmt: skip


def _tuning_rules(tuning: schema.TuningConfig) -> Iterator[Broken]:
    known = TUNING_OPTIONS.get(tuning.method, Section).model_fields
    for name, value in tuning.options.items():
        shown = f"tuning.options.{name} ({value!r})"
        if name not in known:
            yield ("tuning.options", "tuning.method"), (
                f"{shown} is none of tuning.method: {tuning.method}, which has"
                f" {', '.join(known) or 'no options'}. Leave it out."
            )  # fmt: skip
            continue
        try:
            TUNING_OPTIONS[tuning.method].model_validate({name: value})
        except ValidationError as problem:
            reason = problem.errors()[0]["msg"]
            yield ("tuning.options", "tuning.method"), f"{shown}: {reason}. Correct it."


def _thought_rules(config: Config) -> Iterator[Broken]:
    thoughts, data = config.thoughts, config.data
    try:
        if not config.loss.thinks:
            return
    except UserError:  # another rule says so
        return
    for name in ("length", "lookahead"):
        most, points = getattr(thoughts, name), [point.get(name, 1) for point in thoughts.schedule]
        if points and max(points) > most:
            yield (f"thoughts.{name}", "thoughts.schedule"), (
                f"thoughts.{name} ({most}) must be at least the {max(points)} of thoughts.schedule,"
                " because memory is planned for it. Raise it: the schedule may begin lower, at"
                " step 0."
            )  # fmt: skip
    if thoughts.length == 1 and "shuffled" in config.training.eval_controls:
        yield ("training.eval_controls", "thoughts.length"), (
            "training.eval_controls (shuffled) needs thoughts.length of at least 2: a single token"
            " has no other order. Leave it out, or raise thoughts.length."
        )  # fmt: skip
    yield from _position_rules(config)
    if data.min_context >= data.seq_len:
        yield ("data.min_context", "data.seq_len"), (
            f"data.min_context ({data.min_context}) must be smaller than data.seq_len"
            f" ({data.seq_len}), or no token is a target. Lower it."
        )  # fmt: skip
    share = thoughts.position_fraction
    places = min(data.seq_len, max(1, int(share if share > 1 else data.seq_len * share)))
    if thoughts.positions in ("one_random", "answer_start"):
        places = 1
    elif thoughts.positions in ("all", "answer", "pattern", "field"):
        places = data.seq_len
    texts = min(config.training.micro_batch_size, config.training.global_batch_size)
    size = 8 * texts * places * thoughts.num_thoughts * (thoughts.length + thoughts.lookahead)
    if config.loss.thinks and size > MOST_TOKEN_BYTES:
        yield ("training.micro_batch_size", "thoughts.num_thoughts", "data.seq_len"), (
            f"training.micro_batch_size ({config.training.micro_batch_size}) texts of data.seq_len"
            f" ({data.seq_len}) with thoughts.num_thoughts ({thoughts.num_thoughts}) of"
            f" thoughts.length ({thoughts.length}) would need {size // 2**30} GiB for the ids of"
            " their tokens alone. Lower one of them."
        )  # fmt: skip
    if thoughts.lookahead >= data.seq_len:
        yield ("thoughts.lookahead", "data.seq_len"), (
            f"thoughts.lookahead ({thoughts.lookahead}) must be smaller than data.seq_len"
            f" ({data.seq_len}): the true tokens that a thought is scored on lie in the same"
            " sequence. Lower it, or raise data.seq_len."
        )  # fmt: skip


def _position_rules(config: Config) -> Iterator[Broken]:
    thoughts, data = config.thoughts, config.data
    if thoughts.positions in ("answer", "answer_start"):
        if data.format == "text":
            yield ("thoughts.positions", "data.format"), (
                f"thoughts.positions ({thoughts.positions}) needs data.format: qa or chat, but it"
                " is text, which has no answers to think before. Set thoughts.positions to another"
                " rule, such as random or entropy."
            )  # fmt: skip
        if data.format == "chat" and data.loss_on != "answer":
            yield ("data.loss_on", "thoughts.positions"), (
                f"data.loss_on ({data.loss_on}) must be answer with thoughts.positions:"
                f" {thoughts.positions} and data.format: chat: only then are the assistant's tokens"
                " known. Set it to answer."
            )  # fmt: skip
    if thoughts.positions == "pattern" and thoughts.pattern is None:
        yield ("thoughts.pattern", "thoughts.positions"), (
            "thoughts.pattern (null) must be set with thoughts.positions: pattern, which thinks"
            " where it matches. Give a regular expression such as '^' (the beginnings of lines)."
        )  # fmt: skip
    if thoughts.positions == "pattern" and thoughts.pattern and _matches_anywhere(thoughts.pattern):
        yield ("thoughts.pattern",), (
            f"thoughts.pattern ({thoughts.pattern!r}) must not match the empty text at every"
            " place, where each token would get a thought. Let it match one character at least"
            " (+ in place of *), or set thoughts.positions: all."
        )  # fmt: skip
    if thoughts.positions == "field" and data.positions_field is None:
        yield ("data.positions_field", "thoughts.positions"), (
            "data.positions_field (null) must be set with thoughts.positions: field, which thinks"
            " where a record says. Name the field with the character offsets."
        )  # fmt: skip


def _matches_anywhere(pattern: str) -> bool:
    """Tells whether a pattern matches at every place of any text, as ``x*`` does."""
    compiled = re.compile(pattern, re.MULTILINE)
    texts = ("ab", "a b", "1 2", "\n\n\n", "é. =", "")
    return all(compiled.match(text, n) for text in texts for n in range(len(text) + 1))


def _mixing_head_rules(config: Config) -> Iterator[Broken]:
    head = config.mixing_head
    if head.initial_weight <= head.floor and head.floor > 0:
        yield ("mixing_head.initial_weight", "mixing_head.floor"), (
            f"mixing_head.initial_weight ({head.initial_weight}) must be above mixing_head.floor"
            f" ({head.floor}), the lower bound of the weight. Raise it, or lower the floor."
        )  # fmt: skip
    if head.fixed_weight is not None and config.thoughts.positions in _LEARNED_RULES:
        yield ("thoughts.positions", "mixing_head.fixed_weight"), (
            f"thoughts.positions ({config.thoughts.positions}) asks the mixing head, but"
            f" mixing_head.fixed_weight ({head.fixed_weight}) is the same at all positions. Set"
            " thoughts.positions to all, every, random or entropy, or fixed_weight to null."
        )  # fmt: skip


def _part_rules(config: Config) -> Iterator[Broken]:
    named = {
        "loss.objective": config.loss.objective,
        "loss.reward": config.loss.reward,
        "thoughts.sampler": config.thoughts.sampler,
    }
    unknown: set[str] = set()
    for key, name in named.items():
        try:
            registry.check(key, name)
        except UserError as problem:
            unknown.add(key)
            yield (key,), str(problem).replace(f"{key} ({name}): ", f"{name}: ", 1)
    if "loss.objective" not in unknown:  # a rule about a part that does not exist would mislead
        yield from (one for one in _problems_of_objective(config) if unknown.isdisjoint(one[0]))


def _judge_rules(config: Config) -> Iterator[Broken]:
    judge = config.judge
    try:
        rewards = {part for _, part in registry.weighted_parts(config.loss.reward)}
    except UserError:  # another rule says so
        return
    reward = next((name for name in ("judge", "reward_model") if name in rewards), None)
    if reward == "reward_model" and judge.model is None:
        yield ("judge.model", "loss.reward"), (
            "judge.model (null) must be set with loss.reward: reward_model. Name the folder of a"
            " sequence classifier, such as quietstar reward-model makes."
        )  # fmt: skip
    if reward == "judge" and judge.model is None and config.tuning.method not in SWITCHED_OFF:
        yield ("judge.model", "tuning.method"), (
            f"judge.model (null) must be set with tuning.method: {config.tuning.method}, which"
            " changes the weights that would judge. Name the folder of a causal LM, or set"
            f" tuning.method to {', '.join(SWITCHED_OFF[:-1])} or {SWITCHED_OFF[-1]}."
        )  # fmt: skip
    if reward == "judge" and judge.mode == "pairs" and config.thoughts.num_thoughts < 2:
        yield ("thoughts.num_thoughts", "judge.mode"), (
            f"thoughts.num_thoughts ({config.thoughts.num_thoughts}) must be at least 2 with"
            " judge.mode: pairs, which compares the texts after a position's thoughts. Raise it,"
            " or set judge.mode: rating."
        )  # fmt: skip


def _problems_of_objective(config: Config) -> list[Broken]:
    """Asks the objective; one of the user's own that fails over it is a problem, too."""
    name = config.loss.objective
    part = registry.find("loss.objective", name)
    try:
        with registry.running("loss.objective", name):
            return [(tuple(keys), str(message)) for keys, message in part.problems(config)]
    except UserError as problem:
        return [(("loss.objective",), str(problem))]


def _data_rules(config: Config) -> Iterator[Broken]:
    data = config.data
    if data.train is None:
        yield ("data.train",), (
            "not set, but it must name the text to train on. Pass --data.train with a .jsonl,"
            " .json, .txt or .parquet file, a folder, a hub data set id, reasoning_gym:<task> or"
            " synthetic:<task>."
        )  # fmt: skip
    before, placeholder, after = data.template.rpartition("{answer}")
    if not placeholder or after.strip() or "{answer}" in before or "{question}" not in before:
        yield ("data.template",), (
            f"data.template ({data.template!r}) must hold {{question}}, then {{answer}} once, then"
            " at most white space: the answer is what follows the question."
            " Write it like '{question} {answer}'."
        )  # fmt: skip
    if data.rationale_field is not None and data.format != "qa":
        yield ("data.rationale_field", "data.format"), (
            f"data.rationale_field ({data.rationale_field}) must be null with data.format:"
            f" {data.format}, whose records have no answer that reasoning leads to. Leave it out,"
            " or set data.format: qa."
        )  # fmt: skip
    if data.loss_on == "answer" and data.format == "text":
        yield ("data.loss_on", "data.format"), (
            "data.loss_on (answer) must be all with data.format: text, which does not tell an"
            " answer from its question. Set it to all, or data.format to qa or chat."
        )  # fmt: skip
