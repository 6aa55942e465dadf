"""Where a text thinks: the positions chosen for thoughts.

A position is a candidate if the token after it is a target. Of the n candidates in a text,

- ``every`` takes evenly spaced ones, ``random`` a random choice (keyed, as the sampling noise is,
  so that how a batch is cut changes nothing): ceil(share * n) of them, or a number of them;
- as many are those with the highest score: ``entropy`` takes that of the base model's next token,
  ``top_entropy`` that among the most likely tokens (RPT, arXiv:2506.08007), ``weight`` the mixing
  weight that the mixing head gives without a thought, ``weighted_entropy`` the product of both;
- ``one_random`` takes the one that ``random`` would (RLP, arXiv:2510.01265);
- ``answer`` takes those before a token of an answer, ``answer_start`` those before the first one;
- ``pattern`` and ``field`` take those before a token that the data mark.

How many there are depends on the data alone, so that a step can be normalised before it runs.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from quietstar.attention.layout import IGNORE_INDEX, NO_POSITION, lookahead_targets
from quietstar.errors import UserError
from quietstar.sampling.noise import keyed_uniform

# fmt: off
Rule = Literal[
    "all", "every", "random", "entropy", "top_entropy", "weight", "weighted_entropy", "one_random",
    "answer", "answer_start", "pattern", "field",
]
# fmt: on
ANSWER_RULES = ("answer", "answer_start")
MARKED_RULES = ("pattern", "field")
LEARNED_RULES = ("weight", "weighted_entropy")
"""Their scores learn only from the positions that they choose: training explores others too."""
SCORED_RULES = ("entropy", "top_entropy", *LEARNED_RULES)

_CHOICE = 2**20
"""Stands for the token in the noise's key: beyond the tokens of any thought."""


def count_positions(
    rule: Rule,
    share: float,
    labels: Int[Tensor, "batch seq"],
    answers: Bool[Tensor, "batch seq"] | None = None,
    lookahead: int = 1,
    *,
    marked: Bool[Tensor, "batch seq"] | None = None,
) -> Int[Tensor, " batch"]:
    """Count the positions of each text that think and have a target after them.

    Arguments as in `choose_positions`. With rule ``all``, where thoughts are at every position, one
    target among the ``lookahead`` tokens that a thought is scored on is enough.
    """
    if rule == "all":
        return (lookahead_targets(labels, lookahead) != IGNORE_INDEX).any(0).sum(-1)
    candidates = _next(labels != IGNORE_INDEX)
    if rule in (*ANSWER_RULES, *MARKED_RULES):
        return (candidates & _named(rule, answers, marked)).sum(-1)
    total = candidates.sum(-1)
    if rule == "one_random" or share > 1:
        return total.clamp(max=1 if rule == "one_random" else int(share))
    # A hair less, so that a third of three stays one; and one at least, whatever the share.
    return (total * share - 1e-6).ceil().clamp(min=1).long() * (total > 0)


def most_positions(rule: Rule, share: float, seq_len: int) -> int:
    """Most positions of a text that a rule can choose; arguments as in `choose_positions`."""
    if rule in ("all", *ANSWER_RULES, *MARKED_RULES):
        return seq_len
    most = 1 if rule == "one_random" else share if share > 1 else -(-(seq_len - 1) * share // 1)
    return max(1, min(int(most), seq_len - 1))


def choose_positions(
    rule: Rule,
    share: float,
    labels: Int[Tensor, "batch seq"],
    *,
    answers: Bool[Tensor, "batch seq"] | None = None,
    marked: Bool[Tensor, "batch seq"] | None = None,
    score: Float[Tensor, "batch seq"] | None = None,
    sample_ids: Int[Tensor, " batch"] | None = None,
    seed: int = 0,
    explore: bool = False,
) -> Int[Tensor, "batch positions"] | None:
    """Positions that think, ascending, `NO_POSITION` after the last; None for all.

    Only the rules of answers and marks look at the result on the host, to know how wide it is.

    Args:
        rule: Rule of the module's docstring.
        share: Fraction of the candidates; above 1 their number, or all of a text with fewer.
        labels: Token ids, IGNORE_INDEX where a token is no target.
        answers: Tokens of answers (rules ``answer`` and ``answer_start``).
        marked: Tokens before which to think (rules ``pattern`` and ``field``).
        score: The higher, the sooner a position is chosen (`SCORED_RULES`).
        sample_ids: Key the random choice.
        seed: Seed of the random choice.
        explore: Leave a quarter of the positions of `LEARNED_RULES` to chance.

    Raises:
        UserError: A rule of answers without answers, or of marks without marks.
    """
    if rule == "all":
        return None
    candidates, device = _next(labels != IGNORE_INDEX), labels.device
    counts = count_positions(rule, share, labels, answers, marked=marked)
    if rule in (*ANSWER_RULES, *MARKED_RULES):
        width, score = max(1, int(counts.max())), _named(rule, answers, marked).float()
    else:
        width = most_positions(rule, share, labels.shape[1])
        if sample_ids is None:
            sample_ids = torch.arange(labels.shape[0], device=device)
        places = torch.arange(labels.shape[1], device=device).expand(labels.shape)
        noise = keyed_uniform(seed, sample_ids, 1, _CHOICE, places)[0]  # in (0, 1)
        if rule in SCORED_RULES:
            assert score is not None, f"rule {rule} needs scores"
            score = score.float()
        elif rule == "every":
            score = _evenly_spaced(candidates, share, counts).float()
        else:
            score = noise
        if explore and rule in LEARNED_RULES:  # three quarters are the best, the others any
            order = score.masked_fill(~candidates, -torch.inf).argsort(
                dim=-1, descending=True, stable=True
            )
            best = order.argsort(dim=-1) < (counts - counts // 4)[:, None]
            score = noise.masked_fill(best, 2.0)  # noise is below 1
    chosen = score.masked_fill(~candidates, -torch.inf).topk(width, dim=-1).indices
    beyond = torch.arange(width, device=device) >= counts[:, None]
    behind = labels.shape[1]  # sorts after every position
    chosen = chosen.masked_fill(beyond, behind).sort(-1).values
    return chosen.masked_fill(chosen == behind, NO_POSITION)


def _evenly_spaced(
    candidates: Bool[Tensor, "batch seq"],
    share: float,
    counts: Int[Tensor, " batch"],
) -> Bool[Tensor, "batch seq"]:
    """Say which candidates begin another of the equal parts of a text, one for each thought."""
    rank = candidates.cumsum(-1) - 1
    if share <= 1:
        begun = [((rank + n) * share - 1e-6).ceil() for n in (0, 1)]
    else:
        total = candidates.sum(-1, keepdim=True).clamp(min=1)
        begun = [-(-(rank + n) * counts[:, None] // total) for n in (0, 1)]  # ceil
    return begun[1] > begun[0]


def _named(rule: Rule, answers: Tensor | None, marked: Tensor | None) -> Bool[Tensor, "batch seq"]:
    """Say which positions are before a token of the rule: of an answer, or marked."""
    if rule in MARKED_RULES:
        if marked is None:
            raise UserError(
                f"thoughts.positions {rule} needs to know the tokens before which to think: pass "
                "marked (batch, seq), which quietstar.data.PatternMarker gives for a pattern, or "
                "choose other positions"
            )
        return _next(marked)
    if answers is None:
        raise UserError(
            f"thoughts.positions {rule} needs to know the tokens of answers: pass answers "
            "(batch, seq), or choose other positions"
        )
    before = _next(answers)
    return before if rule == "answer" else before & ~answers


def _next(x: Bool[Tensor, "batch seq"]) -> Bool[Tensor, "batch seq"]:
    """What is said of token i + 1, at i."""
    return torch.nn.functional.pad(x[:, 1:], (0, 1), value=False)
