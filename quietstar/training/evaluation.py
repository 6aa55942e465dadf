"""Held-out evaluation: the gain of thinking, and how much of it comes from what thoughts say.

Greedy thoughts at every position that `thoughts.positions` takes; then the same texts with the
thoughts of each control of `training.eval_controls` (`evaluation.controls`), by default swapped
ones and pause tokens. A control costs one pass over the texts, in which nothing is sampled.
A second read-out of the text gives a gain with any thoughts at all; only what swapped thoughts lose
is content. Thoughts are swapped among texts where all have answers, within each text otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from operator import add
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quietstar.attention.layout import IGNORE_INDEX
from quietstar.backbone.run import TextRun
from quietstar.data import Batch
from quietstar.distributed import ModelProxy
from quietstar.evaluation.controls import (
    GAINS,
    GENERIC,
    GENERIC_TEXT,
    MADE,
    PAUSE,
    SWAPPED,
    TextThoughts,
    gain_over,
    generic_tokens,
    make_thoughts,
    plan_swap,
)
from quietstar.losses.scores import Scores
from quietstar.model.outputs import ThoughtMetrics, decode_thoughts
from quietstar.model.quiet_star import QuietStarForCausalLM
from quietstar.system import files
from quietstar.system.signals import acknowledge, requested
from quietstar.training.costs import SAMPLES
from quietstar.training.reporter import read_metrics
from quietstar.training.state import StageRun

Thinker = QuietStarForCausalLM | ModelProxy  # as it is, or in its strategy's wrapper
Count = tuple[Tensor, Tensor]  # a sum, and of how many
RESULTS_FILE, SAMPLES_FILE = "results.json", "samples.json"
NUM_SAMPLES = 20
NUM_FOLLOWED = 3  # held-out texts whose thought every evaluation records
ACCURACIES = {
    "with_thoughts": "accuracy_with_thoughts",
    "without_thoughts": "accuracy_without_thoughts",
    **{f"{name}_thoughts": f"accuracy_{name}" for name in (SWAPPED, *MADE)},
}
"""Names in results.json, and in metrics.jsonl."""


def evaluate(run: StageRun) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Computes the held-out figures of docs/metrics.md, in nats a token, over all ranks.

    They are those of `ThoughtMetrics` with greedy thoughts, and NLLs, gains, accuracies and
    probabilities of the answers with the controls; the latter two only where texts have answers,
    ``right_thoughts`` where they have steps. A stage without thoughts has ``base_nll`` and the
    figures of answers without thoughts only.

    Returns:
        The figures, and a thought in each of the first `NUM_SAMPLES` texts that have targets: the
        one before the answer, or at a random place without one.
    """
    accelerator = run.accelerator
    model = ModelProxy(run.model)
    batches = list(run.eval_data.batches(run.config.training.micro_batch_size))
    counted, ranks = len(batches), accelerator.num_processes
    if counted >= ranks:  # with fewer all ranks read all; the means over ranks are the same
        own = batches[accelerator.process_index :: ranks]
        most = -(-len(batches) // ranks)
        # Strategies need as many forward passes on every rank: what is read again does not count.
        batches, counted = [*own, *own[: most - len(own)]], len(own)
    batches = [batch.to(accelerator.device) for batch in batches]
    passes = 2 if run.stage.has_thoughts else 1
    names, generic = run.config.training.eval_controls, []
    if GENERIC in names:
        option = "training.eval_controls (generic): its text"
        length = model.thoughts.length
        generic = generic_tokens(run.reporter.tokenizer, length, GENERIC_TEXT, option)
    samples: dict[int, dict[str, Any]] = {}

    def follow(batch: Batch, kind: str, thoughts: Scores) -> None:
        for row, number in enumerate(batch.sample_ids.tolist()):
            if number < NUM_SAMPLES:
                sample = _sample(batch, thoughts, row, run.reporter.tokenizer)
                if sample and kind == SWAPPED:
                    other = {"thought": sample["thought"], **sample["with_thoughts"]}
                    samples[number][SWAPPED] = other
                elif sample:
                    samples[number] = sample

    parts = passes * len(batches)
    with accelerator.autocast(), run.reporter.evaluating(len(run.eval_data), parts) as count:

        def advance() -> None:
            count()
            stop_together(accelerator)

        if run.stage.has_thoughts:
            totals = compare(
                model, batches, advance, counted, gather_object, names, generic, follow
            )
        else:
            parts = []
            for batch in batches:
                scores = model.score_plain(batch.input_ids, batch.attention_mask, batch.labels)
                plain = _answer_metrics(
                    batch, "without", scores.predicted[..., None], scores.logprobs[..., None]
                )
                parts.append(scores.metrics.joined(plain))
                advance()
            totals = {"own": reduce(add, parts[:counted])}
    if run.stage.has_thoughts and SWAPPED in names and SWAPPED not in totals:
        run.reporter.say(
            "gain of content: not available, because a single held-out text has no other to swap "
            "thoughts with; raise data.eval_sequences"
        )
    result = figures({kind: total.reduced(accelerator) for kind, total in totals.items()})
    if "accuracy_without_thoughts" in result:
        result["num_answers"] = float(len(run.eval_data))
    by_text = dict(gather_object(list(samples.items())))  # what two ranks have read is the same
    return result, [by_text[number] for number in sorted(by_text)]


def stop_together(accelerator: Accelerator) -> None:
    """Raises `Stopped` on all processes if a signal reached one of several."""
    if accelerator.num_processes > 1:
        asked = torch.tensor(float(requested() is not None), device=accelerator.device)
        if float(accelerator.reduce(asked, "sum")) > 0:  # pyright: ignore[reportArgumentType]
            raise acknowledge()


def compare(
    model: Thinker,
    batches: Sequence[Batch],
    advance: Callable[[], object] = lambda: None,
    counted: int | None = None,
    gather: Callable[[list[TextThoughts]], list[TextThoughts]] = lambda texts: texts,
    names: Sequence[str] = (SWAPPED, PAUSE),
    generic: Sequence[int] = (),
    follow: Callable[[Batch, str, Scores], object] = lambda batch, kind, thoughts: None,
) -> dict[str, ThoughtMetrics]:
    """Scores texts with the model's greedy thoughts (``own``) and with each control of ``names``.

    Swapped thoughts are missing where there is nothing to swap with (`plan_swap`). ``advance`` is
    called twice a batch. The first ``counted`` batches count, by default all; the others are only
    read. ``gather`` joins the thoughts of all ranks, to swap them over the whole set. ``generic``
    are the tokens of the generic text. ``follow`` is given each batch with its own scored thoughts,
    and later with swapped ones.
    """
    parts: dict[str, list[ThoughtMetrics]] = {kind: [] for kind in ("own", *names)}
    thoughts_of_batches = []
    for batch in batches:
        positions, text_run = chosen_positions(model, batch), model.run_text(batch.input_ids)
        where = {"positions": positions, "sample_ids": batch.sample_ids, "text": text_run}
        own = model.draw(batch.input_ids, **where).tokens
        see = partial(follow, batch, "own")
        metrics = score_batch(model, batch, own, positions, text_run, see)
        if batch.rationale.shape[1] > 0:
            drawn = model.draw(batch.input_ids, num_thoughts=SAMPLES, temperature=1.0, **where)
            right = right_thoughts(drawn.tokens, batch.answers, batch.rationale, positions)
            metrics = metrics.joined(ThoughtMetrics({"right_thoughts": right}))
        parts["own"].append(metrics)
        texts = _text_thoughts(batch, own, positions)
        thoughts_of_batches.append((batch, own, positions, texts))
        advance()
    swap = None
    if SWAPPED in names:
        swap = plan_swap(gather([text for *_, texts in thoughts_of_batches for text in texts]))
    for batch, own, positions, texts in thoughts_of_batches:
        text_run = model.run_text(batch.input_ids) if names else None
        for name in names:
            if name != SWAPPED:
                numbers, pause = batch.sample_ids.tolist(), model.pause_token_id
                given = make_thoughts(name, own.transpose(1, 2), numbers, pause, generic)
            elif swap is not None:
                given = torch.stack([swap(text, own.shape[1]) for text in texts]).to(own.device)
            else:
                continue
            see = partial(follow, batch, SWAPPED) if name == SWAPPED else lambda scored: None
            parts[name].append(
                score_batch(model, batch, given.transpose(1, 2), positions, text_run, see)
            )
        advance()
    return {kind: reduce(add, metrics[:counted]) for kind, metrics in parts.items() if metrics}


def chosen_positions(model: Thinker, batch: Batch) -> Tensor | None:
    """Chooses where the texts of a batch think; None for all positions."""
    return model.choose_positions(
        batch.input_ids, batch.attention_mask, batch.labels, answers=batch.answers,
        marked=batch.marked, sample_ids=batch.sample_ids,
    )  # fmt: skip


def score_batch(
    model: Thinker,
    batch: Batch,
    thoughts: Tensor,
    positions: Tensor | None = None,
    text_run: TextRun | None = None,
    see: Callable[[Scores], object] = lambda scored: None,
) -> ThoughtMetrics:
    """Scores a batch with given thoughts (at given positions); ``see`` is given the scored ones."""
    scored = model.score(
        batch.input_ids, thoughts, batch.attention_mask, batch.labels, positions=positions,
        text=text_run,
    )  # fmt: skip
    see(scored)
    assert scored.base_predicted is not None, "scored in full"
    assert scored.text_logprobs is not None, "scored in full"
    base = _answer_metrics(
        batch, "without", scored.base_predicted[..., None], scored.text_logprobs[..., None]
    )
    mixed = _answer_metrics(batch, "with", scored.next_predicted(), scored.next_logprobs())
    return scored.metrics.joined(base).joined(mixed)


def _answer_metrics(
    batch: Batch,
    kind: str,
    predicted: Int[Tensor, "batch seq thoughts"],
    logprobs: Float[Tensor, "batch seq thoughts"],
) -> ThoughtMetrics:
    """Scores answers by the most likely next tokens and the log-probabilities of the true ones."""
    ids, answers = batch.input_ids, batch.answers
    return ThoughtMetrics({
        f"accuracy_{kind}_thoughts": right_answers(predicted, ids, answers),
        f"gold_probability_{kind}_thoughts": gold_probabilities(logprobs, batch.labels, answers),
    })  # fmt: skip


def _text_thoughts(batch: Batch, thoughts: Tensor, positions: Tensor | None) -> list[TextThoughts]:
    """Returns the thoughts of each text of a batch, as the ranks exchange them."""
    real = batch.attention_mask.bool() if positions is None else positions >= 0
    anchors = place_before_answer(batch.answers, positions).tolist()
    has_answer, counts = batch.answers.any(-1).tolist(), real.sum(-1).clamp(min=1).tolist()
    tokens = thoughts.transpose(1, 2).cpu()
    rows = zip(batch.sample_ids.tolist(), tokens, counts, anchors, has_answer, strict=True)
    return [TextThoughts(i, t[:, :count], a, has) for i, t, count, a, has in rows]


def figures(totals: Mapping[str, ThoughtMetrics]) -> dict[str, float]:
    """Turns the metrics with own thoughts and with each control into the figures of `evaluate`."""
    result = totals["own"].means()
    for kind in (kind for kind in totals if kind != "own"):
        control = totals[kind].means()
        result[f"{kind}_mixed_nll"] = control["mixed_nll"]
        result[f"{kind}_thought_nll"] = control["thought_nll"]
        for figure in ("accuracy", "gold_probability"):
            if f"{figure}_with_thoughts" in control:
                result[f"{figure}_{kind}"] = control[f"{figure}_with_thoughts"]
        result[GAINS[kind]] = gain_over(result["mixed_nll"], control["mixed_nll"])
    return result


# --- Answers: are they right, and are the thoughts before them? -----------------------------------
def right_answers(
    predicted: Int[Tensor, "batch seq thoughts"],
    input_ids: Int[Tensor, "batch seq"],
    answers: Bool[Tensor, "batch seq"],
) -> Count:
    """Counts right answers, whose tokens are all the most likely ones, and all answers.

    At i ``predicted`` holds the most likely token i + 1, with each thought (or one, without).
    """
    wrong = (predicted[:, :-1] != input_ids[:, 1:, None]) & answers[:, 1:, None]
    has_answer = answers[:, 1:].any(-1, keepdim=True)  # (B, 1)
    right = ~wrong.any(1) & has_answer
    return right.sum(), has_answer.sum() * predicted.shape[2]


def gold_probabilities(
    logprobs: Float[Tensor, "batch seq thoughts"],
    labels: Int[Tensor, "batch seq"],
    answers: Bool[Tensor, "batch seq"],
) -> Count:
    """Adds up the texts' probabilities of all their answer tokens, and counts the texts.

    At i ``logprobs`` holds the log-probability of the true token i + 1. Texts without an answer do
    not count, nor do those with an answer token that has no label (`data.min_context`).
    """
    answers = answers[:, 1:]
    is_whole = ~(answers & (labels[:, 1:] == IGNORE_INDEX)).any(-1, keepdim=True)
    counted = is_whole & answers.any(-1, keepdim=True)  # (B, 1)
    total = logprobs[:, :-1].float().where(answers[..., None], 0.0).sum(1)
    return total.exp().where(counted, 0.0).sum(), counted.sum() * logprobs.shape[2]


def place_before_answer(
    answers: Bool[Tensor, "batch seq"], positions: Int[Tensor, "batch positions"] | None = None
) -> Int[Tensor, " batch"]:
    """Returns the place (among the positions) of the thought before the first answer token.

    0 in a text without an answer; with chosen positions that leave it out, that of the next one.
    """
    before = (answers.int().argmax(-1) - 1).clamp(min=0)
    if positions is None:
        return before
    return (positions >= before[:, None]).int().argmax(-1)


def right_thoughts(
    tokens: Int[Tensor, "batch places thoughts length"],
    answers: Bool[Tensor, "batch seq"],
    steps: Int[Tensor, "batch steps"],
    positions: Int[Tensor, "batch places"] | None = None,
) -> Count:
    """Counts thoughts before an answer that begin with the steps to it, and all.

    Texts without steps (-100 after the last) or without a thought there do not count.
    """
    is_step = steps >= 0
    counted = is_step.any(-1) & answers.any(-1)  # (B,)
    rows = torch.arange(len(tokens), device=tokens.device)
    place = place_before_answer(answers, positions)
    if positions is not None:
        counted = counted & (positions[rows, place] == place_before_answer(answers))
    thoughts = tokens[rows, place]  # (B, K, T)
    width = min(thoughts.shape[-1], steps.shape[-1])
    agrees = (thoughts[..., :width] == steps[:, None, :width]) | ~is_step[:, None, :width]
    fits = ~is_step[:, width:].any(-1)  # steps longer than a thought cannot be in it
    right = agrees.all(-1) & (counted & fits)[:, None]
    return right.sum(), counted.sum() * tokens.shape[2]


# --- What a run leaves next to its model: results.json and samples.json ---------------------------
def held_out_figures(run: StageRun) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the stage's held-out figures at its start and end, as ``metrics.jsonl`` has them."""
    records, _ = read_metrics(run.reporter.path)
    of_stage = [r for r in records if r["kind"] == "eval" and r["stage"] == run.stage.name]
    return of_stage[0], of_stage[-1]


def write_results(run: StageRun, seconds: float) -> None:
    """Writes both files, with the last stage's held-out figures at its start and end.

    To be called on the main process at the end of the last stage, with the time of the whole run.
    """
    before, after = held_out_figures(run)
    results: dict[str, Any] = {"held_out": {"before": before, "after": after}}
    accuracy = {name: after[key] for name, key in ACCURACIES.items() if key in after}
    if accuracy:
        results["accuracy"] = {**accuracy, "n": len(run.eval_data)}
    if "right_thoughts" in after:
        right = {"before": before.get("right_thoughts"), "after": after["right_thoughts"]}
        results["right_thoughts"] = right
    folder = run.reporter.path.parent
    if run.stage.has_thoughts:
        files.write_json(folder / SAMPLES_FILE, {"samples": run.samples})
    files.write_json(folder / RESULTS_FILE, {**results, "seconds": round(seconds, 1)})


def _sample(
    batch: Batch, thoughts: Scores, row: int, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any] | None:
    """Describes one thought of a text and what it predicts; None in a text without targets."""
    ids, answers = batch.input_ids[row], batch.answers[row]
    positions = None if thoughts.positions is None else thoughts.positions[row]
    places = thoughts.valid[row, :, 0].nonzero().squeeze(1)
    if len(places) == 0:
        return None
    if bool(answers.any()):
        of_row = None if positions is None else positions[None]
        place = int(place_before_answer(answers[None], of_row))
    else:
        generator = torch.Generator().manual_seed(int(batch.sample_ids[row]))
        place = int(places[torch.randint(len(places), (1,), generator=generator)])
    position = place if positions is None else int(positions[place])
    end = position + 1  # after the positions that predict the rest of the answer, or the one alone
    while end + 1 < len(answers) and bool(answers[position + 1]) and bool(answers[end + 1]):
        end += 1
    truth = ids[position + 1 : end + 1]
    assert thoughts.base_predicted is not None, "scored in full"
    assert thoughts.text_logprobs is not None, "scored in full"
    base = thoughts.base_predicted[row, position:end]
    mixed = thoughts.next_predicted()[row, position:end, 0]
    of_truth = (thoughts.text_logprobs[row], thoughts.next_logprobs()[row, :, 0])
    without, with_thoughts = (x[position:end].sum().exp().item() for x in of_truth)
    tokens, rationale = thoughts.tokens[row, place, 0], batch.rationale[row]
    rationale = rationale[rationale >= 0]
    is_right = None
    if 0 < len(rationale) <= len(tokens):
        is_right = bool((tokens[: len(rationale)] == rationale).all())
    return {
        "before": tokenizer.decode(ids[: position + 1]),
        "thought": decode_thoughts(tokenizer, tokens),
        "truth": tokenizer.decode(truth),
        "without_thoughts": {"prediction": tokenizer.decode(base), "probability": without},
        "with_thoughts": {"prediction": tokenizer.decode(mixed), "probability": with_thoughts},
        "mixing_weight": float(thoughts.mixing_weight[row, place, 0, 0]),
        "right_thought": is_right,
        "correct": bool((mixed == truth).all()),
    }
