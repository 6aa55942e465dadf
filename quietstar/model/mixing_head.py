"""The mixing head: how much of a prediction comes from the thought (section 4.3 of the paper)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from quietstar.attention.kernels import at_least_float32
from quietstar.attention.layout import TextLookahead
from quietstar.config import MixingHeadConfig


class MixingHead(nn.Module):
    """MLP over [text state, thought state]: 2D -> H -> H -> 1, ReLU.

    The first layer is kept in two halves, so that its text half runs once per text token and not
    once per thought and lookahead. The last layer starts at zero: every weight starts at
    ``initial_weight``. With ``fixed_weight`` nothing reads the layers, and they do not train.

    Args:
        width: D of the final states.
        config: Initial weight, floor and fixed weight.
        hidden: H; by default D.
    """

    def __init__(self, width: int, config: MixingHeadConfig, hidden: int | None = None) -> None:
        super().__init__()
        hidden = hidden or width
        self.text_layer = nn.Linear(width, hidden)
        self.thought_layer = nn.Linear(width, hidden, bias=False)
        self.middle_layer = nn.Linear(hidden, hidden)
        self.last_layer = nn.Linear(hidden, 1)
        self.sigmoid = config.initial_weight > 0
        self.floor, self.fixed_weight = config.floor, config.fixed_weight
        # Two halves of one layer of 2D inputs: the bound that the whole would have.
        bound = 1 / math.sqrt(2 * width)
        for layer in (self.text_layer, self.thought_layer):
            nn.init.uniform_(layer.weight, -bound, bound)
        nn.init.zeros_(self.last_layer.weight)
        bias = config.initial_weight
        if self.sigmoid:
            share = max(bias - self.floor, 1e-6) / (1 - self.floor)
            bias = math.log(share / (1 - share))
        nn.init.constant_(self.last_layer.bias, bias)
        self.requires_grad_(self.trains)

    @property
    def trains(self) -> bool:
        """True unless a constant replaces the head's output."""
        return self.fixed_weight is None

    def forward(
        self,
        text: TextLookahead,
        thought_states: Float[Tensor, "lookahead thoughts batch positions width"],
        fixed: float | None = None,
    ) -> Float[Tensor, "lookahead thoughts batch positions"]:
        """Mixing weight of every thought and lookahead, in float32.

        Args:
            text: The text's own states that predict the same tokens.
            thought_states: Those from the end token on.
            fixed: Constant in place of the weight; by default ``fixed_weight``, if there is one.
        """
        if self.fixed_weight is not None:
            constant = self.fixed_weight if fixed is None else fixed
            return torch.full_like(at_least_float32(thought_states[..., 0].detach()), constant)
        rows = text.rows
        if not torch.is_autocast_enabled(rows.device.type):  # weights of a bfloat16 model
            dtype = self.text_layer.weight.dtype
            rows, thought_states = rows.to(dtype), thought_states.to(dtype)
        by_text = text.gather(self.text_layer(rows))  # (A, B, P, hidden)
        hidden = torch.relu(by_text.unsqueeze(1) + self.thought_layer(thought_states))
        hidden = torch.relu(self.middle_layer(hidden))
        weight = at_least_float32(self.last_layer(hidden).squeeze(-1))
        if fixed is not None:
            # A warm-up keeps the head in the graph, with gradient zero: DDP wants every parameter
            # that trains used.
            return weight * 0.0 + fixed
        if not self.sigmoid:
            return weight
        return self.floor + (1 - self.floor) * torch.sigmoid(weight)
