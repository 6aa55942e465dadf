"""The key figures at the top of the page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from quietstar.reports.artifacts import Accuracy, BeforeAfter, Controls, Results
from quietstar.reports.formats import (
    MISSING,
    percent,
    percents,
    plain,
    point_bounds,
    points,
    signed,
    wilson,
)
from quietstar.reports.records import Record, series

_MOST_DIFFERENCES = 3
_ACCURACIES = {
    "with_thoughts": "accuracy_with_thoughts",
    "without_thoughts": "accuracy_without_thoughts",
    "swapped_thoughts": "accuracy_swapped",
    "pause_thoughts": "accuracy_pause",
}


@dataclass(frozen=True)
class Tile:
    """One figure: what it is, its value, and what puts it into relation.

    Attributes:
        label: Above the value.
        value: In large type.
        notes: Below the value, a line each.
        color: Name of the mark's colour, the same as in the charts.
    """

    label: str
    value: str
    notes: tuple[str, ...] = ()
    color: str = "ink"


@dataclass(frozen=True)
class Group:
    """Figures measured together, and where."""

    title: str
    tiles: list[Tile]


def headline(records: Sequence[Record], results: Results, controls: Controls) -> list[Group]:
    """The groups that were measured: answers, next tokens, and only without them, controls."""
    found = [answers(records, results), next_tokens(records)]
    groups = [group for group in found if group and group.tiles]
    if groups:
        return groups
    compared = control_tiles(controls)
    return [Group("Over all seeds", compared)] if compared else []


def answers(records: Sequence[Record], results: Results) -> Group:
    """Accuracy with, without and with swapped thoughts, and how many thoughts are right."""
    accuracy, title = measured_accuracy(records, results)
    tiles = [*accuracy_tiles(accuracy), *right_thoughts(records, results)]
    return Group(title, tiles)


def measured_accuracy(records: Sequence[Record], results: Results) -> tuple[Accuracy, str]:
    """That of ``results.json``, or else of the last held-out evaluation; and what it is."""
    measured = results.accuracy
    if any(getattr(measured, part) is not None for part in _ACCURACIES):
        problems = f"{measured.n:.0f} held-out problems" if measured.n else "held-out problems"
        return measured, f"Answers to {problems}"
    step, last = 0, {}
    for record in records:
        if record.kind == "eval" and not _ACCURACIES.keys().isdisjoint(_short(record)):
            step, last = record.step, _short(record)
    return Accuracy(**last), f"Answers to held-out problems, step {step}"


def _short(record: Record) -> dict[str, float]:
    return {k: record.figures[key] for k, key in _ACCURACIES.items() if key in record.figures}


def accuracy_tiles(accuracy: Accuracy) -> Iterator[Tile]:
    """One tile for each accuracy there is."""
    own, without, swapped, pause = (getattr(accuracy, part) for part in _ACCURACIES)
    n = accuracy.n
    if own is not None:
        gained = () if without is None else (f"{points(own - without)} against no thoughts",)
        yield Tile("With thoughts", percent(own), spread(own, n) + gained, "blue")
    if without is not None:
        yield Tile("Without thoughts", percent(without), spread(without, n))
    if swapped is not None:
        notes = (*spread(swapped, n), "each problem with the thought of another")
        yield Tile("Swapped thoughts", percent(swapped), notes, "vermillion")
    if pause is not None:
        notes = (*spread(pause, n), "one constant token in place of every thought token")
        yield Tile("Pause tokens", percent(pause), notes, "purple")


def spread(share: float, n: float | None) -> tuple[str, ...]:
    """The sampling interval, if it is known over how many problems."""
    return (f"95 % interval {percents(wilson(share, n))}",) if n and 0 <= share <= 1 else ()


def right_thoughts(records: Sequence[Record], results: Results) -> Iterator[Tile]:
    """The share of right thoughts before and after training."""
    measured = results.right_thoughts
    if measured.before is None and measured.after is None:
        _, values = series(records, "eval", "right_thoughts")
        if not values:
            return
        before = values[0] if len(values) > 1 else None
        measured = BeforeAfter(before=before, after=values[-1])
    note = "share of the sampled thoughts"
    if measured.before is None:
        yield Tile("Right thoughts", percent(measured.after), (note,), "green")
        return
    change = f"{percent(measured.before)} → {percent(measured.after)}"
    yield Tile("Right thoughts", change, (note, "before → after training"), "green")


def next_tokens(records: Sequence[Record]) -> Group | None:
    """NLL and gain of the last held-out evaluation; the gain of content beside every gain."""
    evaluations = [r for r in records if r.kind == "eval" and "base_nll" in r.figures]
    if not evaluations:
        return None
    thinking = [record for record in evaluations if "mixed_nll" in record.figures]
    last = (thinking or evaluations)[-1]
    first = (thinking or evaluations)[0]
    title = f"Next tokens of held-out data, nats a token, step {last.step}"
    return Group(title, list(nll_tiles(last, first)) + list(gain_tiles(last)))


def nll_tiles(last: Record, first: Record) -> Iterator[Tile]:
    """Base and mixed NLL, with where they came from."""
    for key, label, color in (("base_nll", "Base NLL", "ink"), ("mixed_nll", "Mixed NLL", "blue")):
        if key in last.figures:
            before = first.figures.get(key) if first is not last else None
            notes = () if before is None else (f"{plain(before, 3)} at step {first.step}",)
            yield Tile(label, plain(last.figures[key], 3), notes, color)


def gain_tiles(last: Record) -> Iterator[Tile]:
    """The gain, and always beside it the gain of content."""
    if "gain" not in last.figures:
        return
    yield Tile("Gain of thinking", signed(last.figures["gain"], 3), ("base minus mixed",), "blue")
    content = last.figures.get("gain_of_content")
    note = "not measured" if content is None else "lost when thoughts are swapped"
    yield Tile("Gain of content", signed(content, 3), (note,), "green")
    if "mixing_weight" in last.figures:
        weight = plain(last.figures["mixing_weight"], 3)
        yield Tile("Mixing weight", weight, ("share of the thought in the prediction",))


def control_tiles(controls: Controls) -> list[Tile]:
    """The first variant, and what it is better by."""
    tiles = []
    for variant in controls.variants[:1]:
        notes = (f"95 % interval {percents(variant.ci95)}",) if variant.ci95 else ()
        tiles.append(Tile(variant.title, percent(variant.mean), notes, "blue"))
    for difference in controls.differences[:_MOST_DIFFERENCES]:
        notes = (f"95 % interval {point_bounds(difference.ci95)}",) if difference.ci95 else ()
        tiles.append(Tile(difference.label, points(difference.mean), notes))
    return [tile for tile in tiles if tile.value != MISSING]
