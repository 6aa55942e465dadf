"""Gates: which texts think before their next token, while they are generated.

A thought costs T + 1 passes in place of one, and most tokens gain nothing by it. A gate scores the
state behind the newest token, which is known before any thought, and lets those think whose score
is above a threshold (`quietstar calibrate` finds one):

- ``entropy``: the entropy of the plain model's prediction, nats;
- ``weight``: the mixing weight that a linear probe of the state predicts;
- ``gain``: the gain of thinking that such a probe predicts, nats;
- ``always`` and ``never``;
- ``once``: before the first new token alone, and so many of them are predicted with this thought as
  the model was trained to (``thoughts.lookahead``), as a model does that thinks before answers.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from safetensors.torch import load, save
from torch import Tensor

from quietstar.config import Section
from quietstar.errors import UserError, reading
from quietstar.system.files import write_json, write_whole

GateKind = Literal["always", "never", "once", "entropy", "weight", "gain"]
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
        probe = self.probes[self.kind]
        if probe.weight.shape != states.shape[-1:]:
            raise UserError(
                f"gate: its probe is for states of width {len(probe.weight)}, and the model's have "
                f"{states.shape[-1]}. Run quietstar calibrate for this model."
            )
        return probe(states)

    def save(self, folder: str | Path, **figures: object) -> None:
        """Write the gate beside a saved model, with figures that were measured of it.

        ``gate.json`` comes last and holds the digest of the probes, so that it never stands for
        other ones.
        """
        probes = self.probes.items()
        tensors = {f"{name}.weight": probe.weight.contiguous() for name, probe in probes}
        tensors |= {f"{name}.bias": probe.bias for name, probe in probes}
        content = save(tensors)
        write_whole(Path(folder, PROBES_FILE), content)
        gate = {"kind": self.kind, "threshold": self.threshold, "probes_sha256": _digest(content)}
        write_json(Path(folder, GATE_FILE), {**gate, **figures})

    @classmethod
    def load(cls, folder: str | Path) -> Gate:
        """Read what `save` wrote.

        Raises:
            UserError: The folder holds no gate, or a damaged one.
        """
        path, remedy = Path(folder, GATE_FILE), "Run quietstar calibrate again."
        if not path.is_file():
            raise UserError(
                f"{folder}: holds no gate ({GATE_FILE} is missing); run quietstar calibrate "
                f"--model {folder} --data FILE"
            )
        with reading(str(path), remedy):
            saved = _SavedGate.model_validate(json.loads(path.read_text(encoding="utf-8")))
        path = Path(folder, PROBES_FILE)
        with reading(str(path), remedy):
            if not path.is_file():
                raise UserError(f"{path}: is missing, or no regular file. {remedy}")
            content = path.read_bytes()
            if saved.probes_sha256 not in (None, _digest(content)):
                raise UserError(f"{path}: does not belong to {GATE_FILE} beside it. {remedy}")
            tensors = load(content)
            names = {name.partition(".")[0] for name in tensors}
            probes = {n: Probe(tensors[f"{n}.weight"], tensors[f"{n}.bias"]) for n in names}
            return cls(saved.kind, saved.threshold, probes)


def check_gate(kind: str, fixed_weight: float | None) -> None:
    """Refuse a gate by mixing weight for a model whose weight is fixed.

    Raises:
        UserError: It is such a gate.
    """
    if kind == "weight" and fixed_weight is not None:
        raise UserError(
            f"gate: weight asks the mixing head, whose weight is fixed at {fixed_weight} "
            "(mixing_head.fixed_weight) wherever it thinks. Use entropy or gain."
        )


class _SavedGate(Section, extra="ignore"):
    """What ``gate.json`` holds, beside figures that nothing reads."""

    kind: GateKind
    threshold: float
    probes_sha256: str | None = None  # earlier versions did not bind the two


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
