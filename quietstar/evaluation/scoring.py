"""Models to evaluate, and their scores of items, token by token, with given thoughts or none."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from quietstar.attention.layout import NO_POSITION
from quietstar.backbone.devices import find_device, free_memory
from quietstar.backbone.loading import LANGUAGE_MODEL_FOLDER
from quietstar.backbone.run import TextRun, embedding_weight
from quietstar.data.tokenizer import check_tokenizer_fits, load_tokenizer
from quietstar.errors import UserError, reading
from quietstar.evaluation.controls import GENERIC_TEXT
from quietstar.evaluation.tasks import AnswerBatch, Candidates, EncodedItem
from quietstar.model.quiet_star import QuietStarForCausalLM
from quietstar.model.saving import SETTINGS_FILE, TOKENIZER_FILES, find_on_hub, read_settings
from quietstar.model.tuning import WHOLE

POSITIONS = ("trained", "once", "every")
"""Where answers are thought about: as the model was trained, once before them, or before every
scored token."""
_DECISIVE = (
    "*.safetensors", "*.bin", "*.index.json", "*config.json", SETTINGS_FILE, *TOKENIZER_FILES
)  # fmt: skip
"""Files that decide scores: weights, configs, the tokenizer and its chat template."""
OLD_GATE = "gate.safetensors"
"""What earlier versions left beside a model, of no weight for its scores."""
_PIECE, _PIECES, _WHOLLY_HASHED = 2**20, 4096, 8 * 2**30
"""A file larger than the last is hashed in pieces, so that this takes less time than to load it."""
NO_CANDIDATE = -1  # index of a true token that is no candidate, and where there is no token


@dataclass(frozen=True)
class MixedScores:
    """Predictions of the scored tokens, and the logits of candidates."""

    logprobs: Float[Tensor, "batch thoughts positions"]
    predicted: Int[Tensor, "batch thoughts positions"]
    candidates: Float[Tensor, "batch thoughts positions candidates"] | None = None


@dataclass(frozen=True)
class Protocol:
    """How items are scored."""

    variants: tuple[str, ...]  # such as with_thoughts and some of controls.CONTROLS
    batch_size: int = 16  # items (chains, where there are votes) at once
    samples: int = 1  # thoughts of each item, over which scores are averaged
    thought_temperature: float | None = None  # None takes the most likely tokens
    thought_top_p: float | None = None  # draws among the tokens that reach it; None: all
    thought_top_k: int | None = None  # draws among so many tokens; None: all
    seed: int = 0  # of thoughts, votes, controls and resampling
    votes: int = 8  # chains of thought of an item
    temperature: float = 0.9  # of the chains
    max_new_tokens: int = 384  # tokens of a chain
    text_tokens: int = 256  # tokens that are read of a text without a prompt
    positions: str = "trained"  # where answers are thought about (`POSITIONS`)
    separator: str = ""  # text between prompt and answer of the user's own records
    stop: str | None = None  # text that ends a generated one, in files of the user's own
    generic: str = GENERIC_TEXT  # what stands in every thought of the control of that name


def load_thinker(
    name: str,
    needs_training: bool,
    dtype: str | torch.dtype,
    remedy: str,
    positions: str = "every",
    placement: Mapping[str, Any] | None = None,
    sections: Mapping[str, Any] | None = None,
    **hub: Any,
) -> QuietStarForCausalLM:
    """Load a saved Quiet-STaR model, or a plain one with vectors and head never trained.

    One token is predicted after each thought, so its lookahead is 1; but a model that thinks once
    about an answer (`thinks_once`) predicts with this thought as many tokens as it was trained to.
    ``placement`` may hold ``device_map`` and ``max_memory``, ``sections`` those of a config that a
    plain model thinks by, ``hub`` may hold ``revision`` and ``trust_remote_code``.

    Raises:
        UserError: There is no such model, or it is plain where a trained one is needed; ``remedy``
            says what to do about that.
    """
    path = Path(name).expanduser()
    if not path.exists():
        is_local = path.is_absolute() or name.startswith((".", "~"))
        found = None if is_local else find_on_hub(name, hub.get("revision"))
        if found is None and (is_local or needs_training):
            raise UserError(
                f"--model ({name}): there is no such folder, and no model that thinks of this name "
                "on the hub. Give the folder of a saved model."
            )
        if found is not None:
            path, _ = found, hub.pop("revision", None)
    name, places = str(path) if path.exists() else name, placement or {}
    if (path / "final" / SETTINGS_FILE).exists() and not (path / SETTINGS_FILE).exists():
        raise UserError(
            f"--model ({name}): is the folder of a run; its model is in {path / 'final'}"
        )
    if (path / SETTINGS_FILE).exists():
        model = QuietStarForCausalLM.from_pretrained(name, dtype=dtype, **places, **hub)
        _check_tokenizer(path, model, **hub)
    elif needs_training:
        raise UserError(
            f"{name} is no Quiet-STaR model ({SETTINGS_FILE} is missing), and thoughts are asked "
            f"for. {remedy}"
        )
    else:
        given = sections or {}
        model = QuietStarForCausalLM.from_base(name, dtype=dtype, **given, **places, **hub)
    if positions == "once":
        model.configure(model.thoughts.model_copy(update={"positions": "answer_start"}))
    if not thinks_once(model, positions):
        rule = {"positions": "all"} if model.thoughts.positions == "answer_start" else {}
        model.configure(model.thoughts.model_copy(update={"lookahead": 1, **rule}))
    return model.eval()


def load_onto_device(
    name: str,
    needs_training: bool,
    dtype: str | torch.dtype,
    remedy: str,
    *,
    device: str | None,
    device_map: str | None = None,
    **settings: Any,
) -> QuietStarForCausalLM:
    """Load a model as `load_thinker` does, onto a device, or by ``device_map`` over what there is.

    Raises:
        UserError: No such model, one that cannot think where it must, or no such device.
    """
    try:
        if device_map is None:
            model = load_thinker(name, needs_training, dtype, remedy, **settings)
            return model.to(find_device(device))
        places = {"device_map": device_map, "max_memory": free_memory(device)}
        return load_thinker(name, needs_training, dtype, remedy, placement=places, **settings)
    except UserError as problem:  # of a part that knows the key of a config only
        raise UserError(str(problem).replace("model.name_or_path (", "--model (")) from problem


def _check_tokenizer(folder: Path, model: QuietStarForCausalLM, **hub: Any) -> None:
    """Refuse a tokenizer in the folder of a saved model that is not the one it was trained with."""
    if not any((folder / file).exists() for file in ("tokenizer_config.json", "tokenizer.json")):
        return
    tokenizer = load_tokenizer(str(folder), **hub)
    check_tokenizer_fits(tokenizer, embedding_weight(model.causal_lm).shape[0])
    if len(tokenizer) > model.vocab_size:
        raise UserError(
            f"--model ({folder}): its tokenizer has {len(tokenizer)} tokens, and the model was "
            f"trained with {model.vocab_size} ({SETTINGS_FILE}). Give it the tokenizer of then."
        )


def fingerprint(name: str) -> str:
    """Hash the files of a model's folder that decide scores, and those of an adapter's base.

    A hub model's name stays as it is.
    """
    folder, digest = Path(name).expanduser(), hashlib.sha256()
    if not folder.is_dir():
        return name
    with reading(f"--model ({name})", "Give a folder that can be read."):
        _add_files(folder, digest)
        if (folder / LANGUAGE_MODEL_FOLDER).is_dir():
            _add_files(folder / LANGUAGE_MODEL_FOLDER, digest)
        if (folder / SETTINGS_FILE).exists():
            settings = read_settings(folder)
            if settings.tuning.method not in WHOLE:
                base = settings.base_model_name_or_path
                digest.update(f"{base} {settings.base_revision}".encode())
                if Path(base).is_dir():
                    _add_files(Path(base), digest)
    return digest.hexdigest()[:16]


def _add_files(folder: Path, digest: Any) -> None:
    """Hash names and contents, of very large files only pieces that lie close together."""
    for path in sorted(folder.iterdir()):
        is_decisive = any(fnmatchcase(path.name, pattern) for pattern in _DECISIVE)
        if not is_decisive or path.name == OLD_GATE or not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        step = _PIECE if size <= _WHOLLY_HASHED else max(_PIECE, size // _PIECES)
        with path.open("rb") as file:
            for start in range(0, size, step):
                file.seek(start)
                digest.update(file.read(_PIECE))


# --- Scores --------------------------------------------------------------------------------------
def not_finite(where: str, figure: str, value: Any) -> UserError:
    """Make the error of a figure that is NaN or infinite, which no mean or page may hide."""
    return UserError(
        f"{where}: {figure} ({value}) is no finite number: the model's weights or activations "
        "overflow. Try --dtype float32, or an earlier checkpoint."
    )


class _FiniteLogits(LogitsProcessor):
    """Ends a generation whose next token would be drawn from NaN or infinite logits."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        largest = scores.amax(-1)
        if not largest.isfinite().all():
            raise not_finite(
                f"token {input_ids.shape[1]} of a generated text", "its largest logit",
                largest[~largest.isfinite()][0].item(),
            )  # fmt: skip
        return scores


def refuse_not_finite() -> LogitsProcessorList:
    """Return the argument ``logits_processor`` that ends a generation at NaN logits."""
    return LogitsProcessorList([_FiniteLogits()])


def thinks_once(model: QuietStarForCausalLM, positions: str) -> bool:
    """Say whether answers are thought about once, before their first token (`POSITIONS`)."""
    return positions != "every" and model.thoughts.positions == "answer_start"


def predict_plain(
    model: QuietStarForCausalLM, batch: AnswerBatch, candidates: Candidates | None
) -> MixedScores:
    """Predict the scored tokens without thoughts, as with one thought that changes nothing."""
    ids = None if candidates is None else candidates.ids.to(batch.ids.device)
    scores = model.score_plain(batch.ids, None, batch.labels, candidates=ids)
    places = batch.positions.clamp(min=0)  # (B, P)
    logits = scores.candidates
    if logits is not None:
        logits = logits.take_along_dim(places.unsqueeze(-1), 1).unsqueeze(1)
    logprobs = scores.logprobs.gather(1, places).unsqueeze(1)
    predicted = scores.predicted.gather(1, places).unsqueeze(1)
    return MixedScores(logprobs, predicted, logits)


def predict_thinking(
    model: QuietStarForCausalLM,
    batch: AnswerBatch,
    candidates: Candidates | None,
    thoughts: Int[Tensor, "batch thoughts thinking length"],
    text: TextRun | None = None,
) -> MixedScores:
    """Predict the scored tokens with these thoughts; ``text`` is that of `run_text`, if it ran.

    A token without a thought of its own is predicted by the last one before it, if the model's
    lookahead reaches it from there, and plainly otherwise.
    """
    ids = None if candidates is None else candidates.ids.to(batch.ids.device)
    each_alone = torch.equal(batch.thinking, batch.positions)
    lookahead = 1 if each_alone else model.thoughts.lookahead
    mixed = model.score(
        batch.ids, thoughts.transpose(1, 2), labels=batch.labels, positions=batch.thinking,
        text=text, only_mixed=True, lookahead=lookahead, candidates=ids,
    )  # fmt: skip
    assert mixed.mixed_predicted is not None, "it was asked for"
    if each_alone:
        few = None if mixed.candidates is None else mixed.candidates[..., 0, :].transpose(1, 2)
        logprobs, predicted = mixed.mixed_logprobs[..., 0], mixed.mixed_predicted[..., 0]
        return MixedScores(logprobs.transpose(1, 2), predicted.transpose(1, 2), few)
    rows = torch.arange(len(batch.ids), device=batch.ids.device)[:, None]  # (B, 1)
    last = (batch.thinking != NO_POSITION).sum(1, keepdim=True) - 1  # (B, 1)
    column = torch.arange(batch.positions.shape[1], device=rows.device)
    place = last.minimum(column)  # (B, P), of the thought that predicts the token
    ahead = column - place
    is_reached = (place >= 0) & (ahead < lookahead)
    plain = None
    if not (is_reached | ~batch.valid).all():
        plain = predict_plain(model, batch, candidates)

    def select(mixed: Tensor, plain: Tensor | None) -> Tensor:
        chosen = mixed[rows, place.clamp(min=0), :, ahead.clamp(max=lookahead - 1)]
        chosen = rearrange(chosen, "b p k ... -> b k p ...")
        if plain is None:
            return chosen
        mask = is_reached[:, None] if chosen.ndim == 3 else is_reached[:, None, :, None]
        return chosen.where(mask, plain)

    logits = None
    if mixed.candidates is not None:
        logits = select(mixed.candidates, plain and plain.candidates)
    logprobs = select(mixed.mixed_logprobs, plain and plain.logprobs)
    return MixedScores(logprobs, select(mixed.mixed_predicted, plain and plain.predicted), logits)


def item_metrics(
    predictions: MixedScores,
    batch: AnswerBatch,
    candidates: Candidates | None,
    are_answers: bool = True,
) -> dict[str, Float[Tensor, "batch thoughts"]]:
    """Compute the metrics of every item and every one of its thoughts.

    Returns:
        ``nll``: of the scored tokens over the whole vocabulary, nats a token, and

        - ``gold_probability``, if these ``are_answers``: the product over the answer's tokens of
          their probabilities; with candidates renormalized over the digits (or labels);
        - ``gold_logprob``: its logarithm, nats;
        - ``accuracy``: 1 where each token is the most likely of the vocabulary, or of those
          candidates;
        - with candidates that have an end: ``published_accuracy``: as ``gold_probability``, with
          the end of the line among candidates and tokens, as the published code does;
        - without candidates: ``token_accuracy``: fraction of tokens that are the most likely ones.
    """
    batch = batch.to(torch.device("cpu"))  # float64 is not on every device
    valid = batch.valid.unsqueeze(1)  # (B, 1, P)
    counts = valid.sum(-1)
    total = predictions.logprobs.cpu().double().where(valid, 0).sum(-1)
    metrics = {"nll": -total / counts}
    if candidates is None or predictions.candidates is None:
        right = (predictions.predicted.cpu() == batch.targets.unsqueeze(1)) & valid
        fraction = right.sum(-1).double() / counts
        if are_answers:
            metrics |= {"gold_probability": total.exp(), "gold_logprob": total}
        return metrics | {"accuracy": (right | ~valid).all(-1).double(), "token_accuracy": fraction}
    logits = predictions.candidates.cpu().double()
    same = batch.targets.unsqueeze(-1) == candidates.ids  # (B, P, C)
    gold = same.int().argmax(-1).where(same.any(-1) & batch.valid, NO_CANDIDATE).unsqueeze(1)
    answers = logits[..., : candidates.num_answers]
    gold_answer = gold.where(gold < candidates.num_answers, NO_CANDIDATE)  # (B, 1, P)
    right = (answers.argmax(-1) == gold_answer) | (gold_answer == NO_CANDIDATE)
    logprob = _sum_logprobs(answers, gold_answer)
    metrics |= {"gold_probability": logprob.exp(), "gold_logprob": logprob}
    metrics["accuracy"] = right.all(-1).double()
    if len(candidates.ids) > candidates.num_answers:  # with an end
        metrics["published_accuracy"] = _sum_logprobs(logits, gold).exp()
    return metrics


def choice_metrics(
    items: Sequence[EncodedItem], logprobs: Float[Tensor, "batch thoughts"]
) -> tuple[dict[str, Float[Tensor, "batch thoughts"]], dict[int, list[str]]]:
    """Compute the metrics of items with choices from the log-probability of every choice.

    Returns:
        In the row of each item's answer ``accuracy``: 1 where the answer is the most likely choice
        (1/n where it is one of n such choices);
        ``accuracy_norm``: the same by log-probability per byte of the choice, as
        lm-evaluation-harness's ``acc_norm``; ``gold_probability`` and ``gold_logprob`` of the
        answer among the choices. And what was chosen by each thought, by that row.
    """
    names = ("accuracy", "accuracy_norm", "gold_probability", "gold_logprob")
    metrics = {name: torch.zeros_like(logprobs) for name in names}
    chosen = {}
    for _, rows in groupby(range(len(items)), key=lambda row: items[row].number):
        rows = list(rows)
        choices = items[rows[0]].item.choices
        gold = next(place for place, row in enumerate(rows) if items[row].is_answer)
        of_item = logprobs[rows]  # (C, K)
        sizes = of_item.new_tensor([len(choice.encode()) for choice in choices])
        best = of_item.argmax(0)
        among = of_item.log_softmax(0)[gold]
        row = rows[gold]
        metrics["accuracy"][row] = _share_of_best(of_item)[gold]
        metrics["accuracy_norm"][row] = _share_of_best(of_item / sizes[:, None])[gold]
        metrics["gold_probability"][row], metrics["gold_logprob"][row] = among.exp(), among
        chosen[row] = [choices[place] for place in best.tolist()]
    return metrics, chosen


def _share_of_best(scores: Float[Tensor, "choices thoughts"]) -> Float[Tensor, "choices thoughts"]:
    """Share one point among the choices with the highest score, so that no order decides."""
    best = (scores == scores.amax(0)).to(scores.dtype)
    return best / best.sum(0)


def _sum_logprobs(
    logits: Float[Tensor, "batch thoughts positions candidates"],
    gold: Int[Tensor, "batch 1 positions"],
) -> Float[Tensor, "batch thoughts"]:
    """Add up the log-probabilities of the true candidates; `NO_CANDIDATE` does not count."""
    gold = gold.expand(logits.shape[:3])
    logprobs = logits.log_softmax(-1).movedim(-1, 1)
    return -F.nll_loss(logprobs, gold, ignore_index=NO_CANDIDATE, reduction="none").sum(-1)
