"""Gates: which texts think before their next token, while they are generated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from jaxtyping import Bool, Float
from torch import Tensor

from quietstar.errors import UserError

GateKind = Literal["always", "never", "once", "entropy"]


@dataclass(frozen=True)
class Gate:
    """Decides which texts think before their next token.

    A thought of T tokens costs T + 1 passes in place of one, and most tokens gain nothing by it.

    - ``always`` and ``never``;
    - ``once``: before the first new token alone; as many tokens are predicted with this thought as
      the model was trained to (``thoughts.lookahead``), as a model does that thinks before answers;
    - ``entropy``: where the entropy of the plain prediction is above a threshold. The table that
      ``quietstar eval`` prints for texts says what each threshold costs and gives.
    """

    kind: GateKind
    threshold: float = 0.0  # nats

    def __post_init__(self) -> None:
        """Refuse an unknown kind."""
        if self.kind not in get_args(GateKind):
            known = ", ".join(get_args(GateKind))
            raise UserError(f"gate: there is no gate {self.kind!r}; known: {known}")

    def decide(self, logits: Float[Tensor, "batch vocab"]) -> Bool[Tensor, " batch"]:
        """Say which rows think, by the plain model's logits of their next token."""
        logprobs = logits.log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs.clamp(min=-1e9)).sum(-1)
        return entropy > self.threshold
