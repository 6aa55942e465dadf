"""Texts around thoughts and in them: what opens, closes and ends one."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quietstar.backbone.run import embed_sparsely
from quietstar.config import ThoughtsConfig
from quietstar.errors import UserError
from quietstar.sampling.stopping import StopTexts


def marker_tokens(
    tokenizer: PreTrainedTokenizerBase,
    thoughts: ThoughtsConfig,
    num_markers: tuple[int, int] | None = None,
) -> tuple[list[int], list[int]]:
    """Return the tokens of ``thoughts.start_init`` and ``end_init``.

    Raises:
        UserError: A text without tokens, or with another number of them than ``num_markers``, the
            vectors that a model has for them.
    """
    tokens = []
    for key, count in zip(("start_init", "end_init"), num_markers or (None, None), strict=True):
        text = getattr(thoughts, key)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise UserError(
                f"thoughts.{key}: {text!r} has no tokens in this tokenizer; choose another text"
            )
        if count is not None and len(ids) != count:
            raise UserError(
                f"thoughts.{key} ({text!r}): has {len(ids)} tokens, but the model has a vector for "
                f"{count}. Give a text of as many, or make the model anew from its base."
            )
        tokens.append(ids)
    return tokens[0], tokens[1]


def frozen_markers(model: Any, thoughts: ThoughtsConfig) -> tuple[Tensor, Tensor] | None:
    """Return the tokens of markers that do not train; None where vectors of their own do."""
    if thoughts.train_markers:
        return None
    if model.tokenizer is None:
        raise UserError(
            "thoughts.train_markers (false): needs the tokenizer of the model. Set model.tokenizer."
        )
    start, end = marker_tokens(model.tokenizer, thoughts, model.num_markers)
    return torch.tensor(start, device=model.device), torch.tensor(end, device=model.device)


def marker_vectors(model: Any, index: int) -> Float[Tensor, "markers embedding"]:
    """Return the input embeddings that open (``index`` 0) or close (1) every thought."""
    if model.frozen_markers is None:
        vectors = (model.start_embedding, model.end_embedding)[index]
        return vectors.view(-1, vectors.shape[-1])
    if model.frozen_markers[0].device != model.device:
        start, end = model.frozen_markers
        model.frozen_markers = start.to(model.device), end.to(model.device)
    return embed_sparsely(model.causal_lm, model.frozen_markers[index])


@torch.no_grad()
def initial_vectors(model: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Return the input embeddings of the markers' tokens, for ``start_`` and ``end_embedding``.

    Raises:
        UserError: As `marker_tokens`.
    """
    embed, vectors = model.causal_lm.get_input_embeddings(), []
    both = marker_tokens(tokenizer, model.thoughts, model.num_markers)
    for tokens, like in zip(both, (model.start_embedding, model.end_embedding), strict=True):
        ids = torch.tensor(tokens, device=model.start_embedding.device)
        vectors.append(embed(ids).float().view_as(like))
    return vectors[0], vectors[1]


def find_stop(model: Any, thoughts: ThoughtsConfig) -> StopTexts | None:
    """Return what ends thoughts early by ``thoughts.stop``; None where nothing does.

    Raises:
        UserError: There is no tokenizer, or a text that no thought is long enough for.
    """
    if not thoughts.stop:
        return None
    if model.tokenizer is None:
        raise UserError(
            f"thoughts.stop ({thoughts.stop}): needs the tokenizer of the model. Set "
            "model.tokenizer."
        )
    stop = model.stop
    if stop is None or thoughts.stop != model.thoughts.stop:
        # The embeddings themselves may be sharded, and then have no rows here.
        stop = StopTexts.of_tokenizer(thoughts.stop, model.tokenizer, model.num_embeddings)
    for text, fewest in stop.fewest.items():
        if fewest > thoughts.length:
            raise UserError(
                f"thoughts.stop: {text!r} takes at least {fewest} tokens, but "
                f"thoughts.length ({thoughts.length}) is shorter, so no thought would end "
                "with it. Leave it out, or raise thoughts.length."
            )
    return stop
