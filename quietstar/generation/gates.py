"""Gates: which texts think before their next token, while they are generated.

A thought costs T + 1 passes in place of one, and most tokens gain nothing by it. A gate scores the
state behind the newest token, which is known before any thought, and lets those think whose score
is above a threshold (`quietstar calibrate` finds one):

- ``entropy``: the entropy of the plain model's prediction, nats;
- ``weight``: the mixing weight that a linear probe of the state predicts;
- ``gain``: the gain of thinking that such a probe predicts, nats;
- ``always`` and ``never``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from quietstar.errors import UserError

GateKind = Literal["always", "never", "entropy", "weight", "gain"]
PROBED = ("weight", "gain")
GATE_FILE = "gate.json"
PROBES_FILE = "gate.safetensors"


@dataclass(frozen=True)
class Probe:
    """A linear function of states of the text."""

    weight: Float[Tensor, " width"]
    bias: Float[Tensor, ""]

    def __call__(self, states: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows"]:
        """Predict from states."""
        return states.float() @ self.weight.to(states.device) + self.bias.to(states.device)


@dataclass(frozen=True)
class Gate:
    """Decides which texts think before their next token."""

    kind: str  # of the score (`GateKind`)
    threshold: float = 0.0  # score above which a text thinks
    probes: dict[str, Probe] = field(default_factory=dict)  # for the kinds `PROBED`

    def __post_init__(self) -> None:
        """Refuse a kind that is unknown, or that lacks its probe."""
        if self.kind not in get_args(GateKind):
            known = ", ".join(get_args(GateKind))
            raise UserError(f"gate: there is no gate {self.kind!r}; known: {known}")
        if self.kind in PROBED and self.kind not in self.probes:
            raise UserError(
                f"gate: {self.kind} needs a probe that was fitted on text; run quietstar calibrate "
                "--model DIR --data FILE first"
            )

    def decide(
        self, states: Float[Tensor, "batch width"], logits: Float[Tensor, "batch vocab"]
    ) -> Bool[Tensor, " batch"]:
        """Say which rows think, by the newest tokens' states and the plain model's logits."""
        if self.kind in ("always", "never"):
            return torch.full_like(states[:, 0], self.kind == "always", dtype=torch.bool)
        return self.score(states, logits) > self.threshold

    def score(
        self, states: Float[Tensor, "batch width"], logits: Float[Tensor, "batch vocab"]
    ) -> Float[Tensor, " batch"]:
        """Compute what the threshold is compared with, for kinds that have a score."""
        if self.kind == "entropy":
            logprobs = logits.log_softmax(-1)
            return -(logprobs.exp() * logprobs.clamp(min=-1e9)).sum(-1)
        return self.probes[self.kind](states)

    def save(self, folder: str | Path, **figures: object) -> None:
        """Write the gate beside a saved model, with figures that were measured of it."""
        content = {"kind": self.kind, "threshold": self.threshold, **figures}
        Path(folder, GATE_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        probes = self.probes.items()
        tensors = {f"{name}.weight": probe.weight.contiguous() for name, probe in probes}
        tensors |= {f"{name}.bias": probe.bias for name, probe in probes}
        save_file(tensors, Path(folder, PROBES_FILE))

    @classmethod
    def load(cls, folder: str | Path) -> Gate:
        """Read what `save` wrote.

        Raises:
            UserError: The folder holds no gate, or a damaged one.
        """
        path = Path(folder, GATE_FILE)
        if not path.exists():
            raise UserError(
                f"{folder}: holds no gate ({GATE_FILE} is missing); run quietstar calibrate "
                f"--model {folder} --data FILE"
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            tensors = load_file(Path(folder, PROBES_FILE))
            names = {name.partition(".")[0] for name in tensors}
            probes = {n: Probe(tensors[f"{n}.weight"], tensors[f"{n}.bias"]) for n in names}
            return cls(content["kind"], float(content["threshold"]), probes)
        except (ValueError, KeyError, OSError, SafetensorError) as problem:
            raise UserError(
                f"{path}: no gate that can be read ({problem}); run quietstar calibrate again"
            ) from problem
