"""The module that engines wrap, and the model's methods through its forward."""

from __future__ import annotations

from typing import Any

from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from quietstar.model.outputs import PlainScores, Thoughts
from quietstar.model.quiet_star import QuietStarForCausalLM


class Trainee(nn.Module):
    """The module that an engine wraps: its forward calls a method of the model.

    Args:
        model: That trains.
    """

    def __init__(self, model: QuietStarForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, method: str, *args: Any, **keywords: Any) -> Any:
        """``model.method(...)``; ``forward`` itself is called as a module, with its hooks."""
        if method == "forward":
            return self.model(*args, **keywords)
        return getattr(self.model, method)(*args, **keywords)


class ThroughEngine:
    """The model's methods, called through the engine around it.

    Args:
        prepared: The engine around a `Trainee`, or the trainee itself.
    """

    def __init__(self, prepared: nn.Module) -> None:
        self.prepared = prepared

    @property
    def pause_token_id(self) -> int:
        """Of the model."""
        return self._model.pause_token_id

    @property
    def _model(self) -> QuietStarForCausalLM:
        trainee = extract_model_from_parallel(self.prepared)
        assert isinstance(trainee, Trainee), type(trainee)
        return trainee.model

    def think(self, *args: Any, **keywords: Any) -> Thoughts:
        """`QuietStarForCausalLM.think`."""
        return self.prepared("think", *args, **keywords)

    def sample(self, *args: Any, **keywords: Any) -> Tensor:
        """`QuietStarForCausalLM.sample`."""
        return self.prepared("sample", *args, **keywords)

    def score_plain(self, *args: Any, **keywords: Any) -> PlainScores:
        """`QuietStarForCausalLM.score_plain`."""
        return self.prepared("score_plain", *args, **keywords)

    def choose_positions(self, *args: Any, **keywords: Any) -> Tensor | None:
        """`QuietStarForCausalLM.choose_positions`."""
        return self.prepared("choose_positions", *args, **keywords)

    def initial_vectors(self, *args: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
        """`QuietStarForCausalLM.initial_vectors`."""
        return self.prepared("initial_vectors", *args, **keywords)
