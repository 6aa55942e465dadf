"""The model class for lm-evaluation-harness: all its tasks run with and without thoughts.

Importing this module registers the name ``quietstar``, as ``quietstar eval lm-eval`` does. Without
thoughts everything is the harness's own ``hf`` class on the same weights.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import stop_sequences_criteria
from torch import Tensor
from tqdm import tqdm

from quietstar.attention.layout import NO_POSITION
from quietstar.backbone.devices import find_device, free_memory
from quietstar.backbone.run import num_virtual, plain_pass
from quietstar.data import load_tokenizer
from quietstar.data.tokenizer import padding_id
from quietstar.errors import UserError, reason_of
from quietstar.evaluation import controls
from quietstar.evaluation.scoring import (
    POSITIONS,
    load_thinker,
    not_finite,
    predict_thinking,
    refuse_not_finite,
    thinks_once,
)
from quietstar.evaluation.tasks import AnswerBatch, answer_batch

logger = logging.getLogger(__name__)

_Harness: Any = HFLM  # its decorator hides its type


MOST_AT_ONCE = 2**16
_OWN_ARGUMENTS = ("pretrained", "thoughts", "num_thoughts", "thought_temperature", "thought_top_p",
                  "thought_top_k", "seed", "positions", "control", "generic",
                  "untrained", "device_map")  # fmt: skip


@contextmanager
def one_line_errors(what: str) -> Iterator[None]:
    """Blame what the user asked of the harness for anything that goes wrong in it, in one line.

    Raises:
        UserError: In place of any other exception, but for a lack of memory or a package.
    """
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError, ModuleNotFoundError):
        raise
    except Exception as problem:
        kind = type(problem).__name__
        raise UserError(
            f"{what}: lm-evaluation-harness fails ({kind}: {reason_of(problem)}). Mend the task, "
            "its data or the arguments; quietstar eval lm-eval run --help lists them."
        ) from problem


@register_model("quietstar")
class QuietStarLM(_Harness):
    """A saved Quiet-STaR model, or a plain causal LM, for lm-evaluation-harness.

    Args:
        pretrained: Folder (or hub id) of the model.
        thoughts: ``on``: think before scored and generated tokens; ``off``: the plain model.
        num_thoughts: Thoughts before each token; their predictions are averaged.
        thought_temperature: Sampling temperature of thoughts; None takes the most likely tokens.
        thought_top_p: Draw thoughts among the most likely tokens that reach this probability.
        thought_top_k: Draw thoughts among so many of the most likely tokens.
        seed: Seed of the thoughts' noise.
        positions: ``trained``: a model trained with ``thoughts.positions: answer_start`` thinks
            once, before a continuation; ``once``: any model does; ``every``: before each of its
            tokens.
        control: Think the thoughts of a control in place of the model's own (`controls.CONTROLS`);
            swapped ones are those of another context.
        generic: Text of the control of that name.
        untrained: Let a plain model think too, with vectors and a head that were never trained.
        device: Device; defaults to a GPU if there is one.
        device_map: ``auto`` lets layers that do not fit there wait in memory, or on disk.
        trust_remote_code: Allow code that comes with a model to run.
        **settings: Settings of ``HFLM``: ``batch_size``, ``max_length``, ...

    Raises:
        UserError: A plain model was asked for thoughts, or a setting has no such value.
    """

    def __init__(
        self,
        pretrained: str,
        thoughts: str | bool = "on",
        num_thoughts: int = 1,
        thought_temperature: float | None = None,
        thought_top_p: float | None = None,
        thought_top_k: int | None = None,
        seed: int = 0,
        positions: str = "trained",
        control: str | None = None,
        generic: str = controls.GENERIC_TEXT,
        untrained: bool = False,
        dtype: str | torch.dtype = "auto",
        device: str | None = None,
        device_map: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        **settings: Any,
    ) -> None:
        if isinstance(thoughts, bool):  # as YAML reads on and off
            thoughts = "on" if thoughts else "off"
        if thoughts not in ("on", "off"):
            raise UserError(f"thoughts: {thoughts!r} must be on or off")
        if control is not None and (control not in controls.CONTROLS or thoughts == "off"):
            raise UserError(
                f"control: {control!r} must be one of {', '.join(controls.CONTROLS)}, with "
                "thoughts=on"
            )
        if positions not in POSITIONS:
            raise UserError(f"positions: {positions!r} must be one of {', '.join(POSITIONS)}")
        known = inspect.signature(_Harness.__init__).parameters
        if unknown := [name for name in settings if name not in known]:
            near = get_close_matches(unknown[0], [*known, *_OWN_ARGUMENTS], 1)
            hint = f"Did you mean {near[0]}?" if near else "Leave it out."
            raise UserError(
                f"--model_args ({unknown[0]}): the model takes no such argument. {hint}"
            )
        pretrained = str(pretrained)  # the harness reads nan, 1 or true as something else
        counts = {"num_thoughts": num_thoughts, "batch_size": settings.get("batch_size", 1)}
        for name, count in counts.items():
            if isinstance(count, int) and not 1 <= count <= MOST_AT_ONCE:
                raise UserError(
                    f"{name} ({count}): must be from 1 to {MOST_AT_ONCE}; no memory holds more at "
                    "once. Give another number."
                )
        self.thinks = thoughts == "on"
        hub = {"revision": revision, "trust_remote_code": trust_remote_code}
        remedy = "Set thoughts=off, or untrained=true for a baseline of thoughts never trained."
        needs_training = self.thinks and not untrained
        # The harness asks for "cuda" where nobody asked for anything.
        on_gpu = torch.cuda.is_available() or not str(device).startswith("cuda")
        device = device if on_gpu else None
        if device_map not in (None, "auto"):
            raise UserError(f"device_map: {device_map!r} must be auto. Leave it out, or set it so.")
        places = {} if device_map is None else {
            "device_map": device_map, "max_memory": free_memory(device)
        }  # fmt: skip
        self.thinker = load_thinker(
            pretrained, needs_training, dtype, remedy, positions, places, **hub
        )
        if device_map is None:
            self.thinker.to(find_device(device))
        self.sampling: dict[str, Any] = {"num_thoughts": num_thoughts, "seed": seed}
        self.thought_temperature = thought_temperature
        self.thought_filters = {"top_p": thought_top_p, "top_k": thought_top_k}
        self.thinks_once = thinks_once(self.thinker, positions)
        self.num_truncated, self.control = 0, control
        tokenizer = load_tokenizer(pretrained, **hub)
        self.generic = []
        if control == controls.GENERIC:
            length = self.thinker.thoughts.length
            self.generic = controls.generic_tokens(tokenizer, length, generic, "generic")
        super().__init__(
            pretrained=self.thinker.causal_lm,
            tokenizer=tokenizer,
            backend="causal",
            **settings,
        )

    @property
    def max_length(self) -> int:
        """Count the tokens that a text may have, with room for a thought where it thinks."""
        longest = self.thinker.max_text_length
        if not self.thinks or longest is None:
            return super().max_length
        return min(super().max_length, longest)

    def _model_call(self, inps: Tensor, attn_mask: Any = None, labels: Any = None) -> Tensor:
        """Compute logits of the plain model, after its virtual tokens."""
        causal_lm = self.thinker.causal_lm
        if not num_virtual(causal_lm):
            logits = super()._model_call(inps, attn_mask, labels)
        else:
            with torch.no_grad():
                logits = self.thinker.output_head.logits(plain_pass(causal_lm, inps))
        largest = logits.amax(-1)
        if not largest.isfinite().all():
            raise not_finite("a request without thoughts", "its largest logit", float("nan"))
        return logits

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Give the log-probability of each continuation, and whether it is the greedy one."""
        if not self.thinks:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1] + requests[i][2]))
        size = override_bs or self.batch_size
        if not isinstance(size, int) or size < 1:
            raise UserError(f"batch_size ({size}): must be a number of at least 1 with thoughts")
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        longest = self.max_length
        chunks = [order[start : start + size] for start in range(0, len(order), size)]
        swapped = self._swapped(requests, chunks) if self.control == controls.SWAPPED else None
        with tqdm(total=len(requests), desc="log-likelihoods, thinking",
                  disable=disable_tqdm or self.rank != 0) as bar:  # fmt: skip
            for chunk in chunks:
                batch = self._batch(requests, chunk)
                self.num_truncated += sum(
                    len(requests[i][1] + requests[i][2]) > longest for i in chunk
                )
                if swapped is None:
                    thoughts = self._sample(batch, chunk)
                else:
                    places = batch.thinking.shape[1]
                    thoughts = torch.stack(
                        [controls.fit_thoughts(swapped[i], places) for i in chunk]
                    ).to(batch.ids.device)
                if self.control in controls.MADE:
                    pause = self.thinker.pause_token_id
                    thoughts = controls.make_thoughts(
                        self.control, thoughts, chunk, pause, self.generic
                    )
                scores = predict_thinking(self.thinker, batch, None, thoughts)
                targets, valid = batch.targets.cpu(), batch.valid.cpu()
                # Thoughts are averaged as probabilities.
                logprobs = scores.logprobs.cpu().logsumexp(1) - math.log(thoughts.shape[1])
                sums = logprobs.double().where(valid, 0).sum(1).tolist()
                # A continuation is greedy if each thought alone would have chosen all of it.
                greedy = (scores.predicted.cpu() == targets.unsqueeze(1)).all(1) | ~valid
                for place, value in zip(chunk, sums, strict=True):
                    if not math.isfinite(value):
                        where = f"request {place} of lm-evaluation-harness, with thoughts"
                        raise not_finite(where, "its log-likelihood", value)
                pairs = zip(sums, greedy.all(1).tolist(), strict=True)
                for place, answer in zip(chunk, pairs, strict=True):
                    answers[place], text = answer, requests[place][0]
                    if text is not None:
                        self.cache_hook.add_partial("loglikelihood", text, answer)
                bar.update(len(chunk))
        if self.num_truncated:
            logger.warning("%d texts lost their beginning to fit into %d tokens",
                           self.num_truncated, longest)  # fmt: skip
        return answers

    def _batch(self, requests: Any, chunk: Sequence[int]) -> AnswerBatch:
        texts = [(requests[i][1] + requests[i][2])[-self.max_length :] for i in chunk]
        counts = [len(requests[i][2]) for i in chunk]
        thinking = [1] * len(chunk) if self.thinks_once else None
        pad = padding_id(self.tokenizer)
        return answer_batch(texts, counts, pad, thinking).to(self.thinker.device)

    def _sample(self, batch: AnswerBatch, chunk: Sequence[int]) -> Tensor:
        return self.thinker.draw(
            batch.ids, positions=batch.thinking, temperature=self.thought_temperature,
            sample_ids=torch.tensor(chunk, device=batch.ids.device), **self.thought_filters,
            **self.sampling,
        ).tokens.transpose(1, 2)  # fmt: skip

    def _swapped(self, requests: Any, chunks: Sequence[Sequence[int]]) -> dict[int, Tensor]:
        """Draw the thoughts of all requests; give each those of a request of another context."""
        own = {}
        for chunk in chunks:
            batch = self._batch(requests, chunk)
            counts = (batch.thinking != NO_POSITION).sum(1).tolist()
            thoughts = self._sample(batch, chunk).cpu()
            own |= {i: x[:, :count] for i, x, count in zip(chunk, thoughts, counts, strict=True)}
        contexts: dict[tuple[int, ...], list[int]] = {}
        for number, request in enumerate(requests):
            contexts.setdefault(tuple(request[1]), []).append(number)
        if len(contexts) < 2:
            raise UserError(
                "control: 'swapped' needs two contexts at least, and all requests have the same. "
                "Evaluate more items."
            )
        groups, donors = list(contexts.values()), controls.derangement(len(contexts), seed=0)
        return {
            number: own[groups[donor][place % len(groups[donor])]]
            for group, donor in zip(groups, donors.tolist(), strict=True)
            for place, number in enumerate(group)
        }

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **settings: Any
    ) -> Tensor:
        settings["logits_processor"] = refuse_not_finite()
        if not self.thinks and not num_virtual(self.thinker.causal_lm):
            return super()._model_generate(context, max_length, stop, **settings)
        if not settings.get("do_sample"):
            settings = {**settings, "do_sample": False}
            settings.pop("temperature", None)
        return self.thinker.generate(
            context, think=self.thinks, thought_temperature=self.thought_temperature,
            thought_top_p=self.thought_filters["top_p"],
            thought_top_k=self.thought_filters["top_k"],
            replace_thoughts=None
            if self.control is None
            else controls.replacement(self.control, self.thinker.pause_token_id, self.generic),
            max_length=max_length, pad_token_id=padding_id(self.tokenizer),
            stopping_criteria=stop_sequences_criteria(self.tokenizer, stop, *context.shape[::-1]),
            **self.sampling, **settings,
        )  # fmt: skip
