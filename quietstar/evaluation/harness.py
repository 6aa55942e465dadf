"""The model of lm-evaluation-harness: every task of it runs with and without thoughts.

Importing this module registers the name ``quietstar`` (``quietstar lm-eval run`` does). Without
thoughts everything is the harness's own ``hf`` class on the same weights.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import stop_sequences_criteria
from torch import Tensor
from tqdm import tqdm

from quietstar.backbone.devices import find_device
from quietstar.backbone.learn import plain_pass
from quietstar.backbone.run import num_virtual
from quietstar.data import load_tokenizer
from quietstar.data.tokenizer import padding_id
from quietstar.errors import UserError
from quietstar.evaluation.encoding import answer_batch
from quietstar.evaluation.loading import load_thinker

logger = logging.getLogger(__name__)

THOUGHTS = ("on", "off")
_Harness: Any = HFLM  # its decorator hides its type


@register_model("quietstar")
class QuietStarLM(_Harness):
    """A saved Quiet-STaR model, or a plain causal LM, for lm-evaluation-harness.

    Args:
        pretrained: Folder (or hub id) of the model.
        thoughts: ``on``: before each scored or generated token; ``off``: the plain model.
        num_thoughts: Before each token; their predictions are averaged.
        thought_temperature: Of thoughts; None takes the most likely tokens.
        seed: Of the thoughts' noise.
        untrained: Think also with a plain model, whose vectors and head were never trained.
        dtype: Of the weights.
        device: Where it runs; by default a GPU if there is one.
        revision: Of a model on the hub.
        trust_remote_code: Whether code that lies with a model may run.
        **settings: Those of ``HFLM``: ``batch_size``, ``max_length``, ...

    Raises:
        UserError: Thoughts of a plain model, or a setting that cannot be.
    """

    def __init__(
        self,
        pretrained: str,
        thoughts: str | bool = "on",
        num_thoughts: int = 1,
        thought_temperature: float | None = None,
        seed: int = 0,
        untrained: bool = False,
        dtype: str | torch.dtype = "auto",
        device: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        **settings: Any,
    ) -> None:
        if isinstance(thoughts, bool):  # as YAML reads on and off
            thoughts = "on" if thoughts else "off"
        if thoughts not in THOUGHTS:
            raise UserError(f"thoughts: {thoughts!r} must be {' or '.join(THOUGHTS)}")
        self.thinks = thoughts == "on"
        hub = {"revision": revision, "trust_remote_code": trust_remote_code}
        remedy = "Set thoughts=off, or untrained=true for a baseline of thoughts never trained."
        needs_training = self.thinks and not untrained
        self.thinker = load_thinker(pretrained, needs_training, dtype, remedy, **hub)
        # The harness asks for "cuda" where nobody asked for anything.
        on_gpu = torch.cuda.is_available() or not str(device).startswith("cuda")
        self.thinker.to(find_device(device if on_gpu else None))
        self.sampling: dict[str, Any] = {"num_thoughts": num_thoughts, "seed": seed}
        self.thought_temperature = thought_temperature
        self.num_truncated = 0
        super().__init__(
            pretrained=self.thinker.causal_lm,
            tokenizer=load_tokenizer(pretrained, **hub),
            backend="causal",
            **settings,
        )

    @property
    def max_length(self) -> int:
        """Tokens of a text, with room for a thought where it thinks."""
        longest = self.thinker.max_text_length
        if not self.thinks or longest is None:
            return super().max_length
        return min(super().max_length, longest)

    def _model_call(self, inps: Tensor, attn_mask: Any = None, labels: Any = None) -> Tensor:
        """Logits of the plain model, its virtual tokens in front."""
        causal_lm = self.thinker.causal_lm
        if not num_virtual(causal_lm):
            return super()._model_call(inps, attn_mask, labels)
        with torch.no_grad():
            return self.thinker.output_head.logits(plain_pass(causal_lm, inps))

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Of each (text, context, continuation): its log-probability, and whether it is greedy."""
        if not self.thinks:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1] + requests[i][2]))
        size = override_bs or self._fixed_batch_size()
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        bar = tqdm(total=len(requests), desc="log-likelihoods, thinking",
                   disable=disable_tqdm or self.rank != 0)  # fmt: skip
        with bar:
            for start in range(0, len(order), size):
                chunk = order[start : start + size]
                scored = self._score([requests[i][1:] for i in chunk], chunk)
                for place, answer in zip(chunk, scored, strict=True):
                    answers[place] = answer
                    if requests[place][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[place][0], answer)
                bar.update(len(chunk))
        if self.num_truncated:
            logger.warning("%d texts lost their beginning to fit into %d tokens",
                           self.num_truncated, self.max_length)  # fmt: skip
        return answers

    def _fixed_batch_size(self) -> int:
        if not isinstance(self.batch_size, int):
            raise UserError(
                f"batch_size: {self.batch_size} is not known with thoughts; give a number"
            )
        return self.batch_size

    def _score(
        self, pairs: Sequence[tuple[list[int], list[int]]], sample_ids: Sequence[int]
    ) -> list[tuple[float, bool]]:
        """A batch of (context, continuation), a thought before every token of the latter."""
        texts = [self._fitted(context, continuation) for context, continuation in pairs]
        counts = [len(continuation) for _, continuation in pairs]
        device = self.thinker.device
        batch = answer_batch(texts, counts, padding_id(self.tokenizer)).to(device)
        thoughts = self.thinker.sample(
            batch.ids, positions=batch.positions, temperature=self.thought_temperature,
            sample_ids=torch.tensor(sample_ids, device=device), **self.sampling,
        )  # fmt: skip
        scored = self.thinker.score_mixed(
            batch.ids, batch.mask, batch.labels, thoughts, batch.positions
        )  # log-probabilities are 0 where there is no target
        logprobs = scored.logprobs.logsumexp(1) - math.log(scored.logprobs.shape[1])
        # The most likely token of every thought: of their average with one thought.
        right = (scored.predicted == batch.targets.unsqueeze(1)).all(1)
        sums = logprobs.double().where(batch.valid, 0).sum(1).tolist()
        return list(zip(sums, (right | ~batch.valid).all(1).tolist(), strict=True))

    def _fitted(self, context: list[int], continuation: list[int]) -> list[int]:
        """The text, shortened from the left to what the model takes; counts those shortened."""
        text = context + continuation
        if len(text) > self.max_length:
            self.num_truncated += 1
        return text[-self.max_length :]

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **settings: Any
    ) -> Tensor:
        if not self.thinks and not num_virtual(self.thinker.causal_lm):
            return super()._model_generate(context, max_length, stop, **settings)
        if not settings.get("do_sample"):
            settings = {**settings, "do_sample": False}
            settings.pop("temperature", None)
        return self.thinker.generate(
            context, think=self.thinks, thought_temperature=self.thought_temperature,
            max_length=max_length, pad_token_id=padding_id(self.tokenizer),
            stopping_criteria=stop_sequences_criteria(self.tokenizer, stop, *context.shape[::-1]),
            **self.sampling, **settings,
        )  # fmt: skip
