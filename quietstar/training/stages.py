"""The stages of a run, and what changes from one to the next."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from quietstar import registry
from quietstar.config import Config, ThoughtsConfig
from quietstar.distributed import group_of
from quietstar.model.quiet_star import QuietStarForCausalLM
from quietstar.objectives import Objective


@dataclass(frozen=True)
class Stage:
    """A stage of a run, whose steps are counted over the whole run."""

    name: str
    index: int
    config: Config
    first_step: int  # steps of all stages before
    starts_thinking: bool  # the first stage that thinks sets the two vectors

    @property
    def last_step(self) -> int:
        """Steps of the run at the end of the stage."""
        return self.first_step + self.config.training.max_steps

    @property
    def thinks(self) -> bool:
        """True if the objective needs thoughts."""
        return self.config.loss.thinks

    @property
    def objective(self) -> Objective:
        """The objective, with its settings."""
        return registry.find("loss.objective", self.config.loss.objective)(self.config.loss)

    @property
    def student(self) -> str | None:
        """Who learns from a teacher: ``plain`` or ``thinking``; None where nobody does."""
        return self.objective.student

    @property
    def has_thoughts(self) -> bool:
        """True if held-out thoughts say something, as those of a model that never thought do not.

        That is a student without thoughts whose teacher's predictions lie on disk.
        """
        is_stored = getattr(self.config.loss, "teacher", None) is not None
        never_thinks = is_stored and self.student == "plain" and self.starts_thinking
        return self.thinks and not never_thinks


def plan_stages(config: Config) -> list[Stage]:
    """Returns the stages of a config in order."""
    stages: list[Stage] = []
    for index, (name, stage_config) in enumerate(config.stage_configs().items()):
        starts = stage_config.loss.thinks and not any(stage.thinks for stage in stages)
        first = stages[-1].last_step if stages else 0
        stages.append(Stage(name, index, stage_config, first, starts))
    return stages


def stage_at(stages: Sequence[Stage], step: int) -> Stage:
    """Returns the stage of a run after ``step`` steps: the earlier one at a boundary."""
    return next((stage for stage in stages if step <= stage.last_step), stages[-1])


def scheduled(thoughts: ThoughtsConfig, step: int) -> ThoughtsConfig:
    """Returns the thoughts of a step of a stage, counted from 0, by ``thoughts.schedule``.

    Fast Quiet-STaR (arXiv 2505.17746) teaches a model to think in ever fewer tokens.
    """
    if not thoughts.schedule:
        return thoughts
    points = [(0, thoughts.length, thoughts.lookahead)]
    for point in thoughts.schedule:
        _, length, lookahead = points[-1]
        length, lookahead = point.get("length", length), point.get("lookahead", lookahead)
        points.append((point["step"], length, lookahead))
    if points[1][0] == 0:
        del points[0]
    steps, *courses = zip(*points, strict=True)
    length, lookahead = (x[bisect_right(steps, step) - 1] for x in courses)
    now = {"length": length, "lookahead": lookahead, "schedule": []}
    return thoughts.model_copy(update=now)


def begin_stage(model: QuietStarForCausalLM, stage: Stage) -> None:
    """Gives the model the stage's settings; without thoughts only the language model trains."""
    model.configure(stage.config.thoughts, stage.config.loss)
    learns_to_think = stage.thinks and model.objective.student != "plain"
    trains = {
        "mixing_head": model.mixing_head.trains,
        "embeddings": stage.config.thoughts.train_markers,
    }
    for name, parameter in model.named_parameters():
        if (group := group_of(name)) != "language_model":
            parameter.requires_grad_(learns_to_think and trains[group])
