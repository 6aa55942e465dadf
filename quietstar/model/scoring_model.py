"""A smaller causal LM whose uncertainty says where the model thinks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from quietstar.backbone.loading import load_base
from quietstar.backbone.output_head import OutputHead, find_output_head
from quietstar.backbone.run import plain_pass
from quietstar.data.tokenizer import load_tokenizer
from quietstar.errors import UserError

_REMEDY = "Give a smaller model of the same family, or leave thoughts.scoring_model out."


@contextmanager
def blamed() -> Iterator[None]:
    """Names ``thoughts.scoring_model`` where a model that is loaded inside cannot be."""
    try:
        yield
    except UserError as problem:
        message = str(problem).replace("model.name_or_path (", "thoughts.scoring_model (")
        raise UserError(message) from problem


class ScoringModel:
    """The model of ``thoughts.scoring_model``, loaded when it is first asked.

    To think where a smaller model is unsure is the choice of RPT (arXiv:2506.08007). This model is
    frozen and no module of the one that thinks: no optimizer, wrapper or checkpoint sees it, and a
    saved model has its name only.

    Args:
        name: Folder or hub id.

    Attributes:
        lm: The causal LM; None until it is loaded.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.lm: PreTrainedModel | None = None

    def load(self, thinker: Any) -> PreTrainedModel:
        """Load it, in the dtype and on the device of the model that thinks.

        Raises:
            UserError: It cannot be loaded, or reads other tokens.
        """
        if self.lm is None:
            unset_hf_deepspeed_config()  # or transformers would shard it
            with blamed():
                lm = load_base(self.name, dtype=thinker.causal_lm.dtype)
            self.check_vocabulary(lm, thinker)
            self.lm = lm.requires_grad_(False).eval()
        if self.lm.device != thinker.device:
            self.lm.to(thinker.device)  # pyright: ignore[reportArgumentType]
        return self.lm

    def check_vocabulary(self, lm: PreTrainedModel, thinker: Any) -> None:
        """Refuse a model whose tokens are others, or where no tokenizer tells, in number."""
        # The embeddings themselves may be sharded, and then have no rows here.
        rows, own_rows = (x.config.get_text_config().vocab_size for x in (lm, thinker.causal_lm))
        tokenizer = None
        with suppress(UserError):  # a folder without one
            tokenizer = load_tokenizer(self.name)
        if tokenizer is None or thinker.tokenizer is None:
            fits = rows == own_rows
        else:
            theirs, own = tokenizer.get_vocab(), thinker.tokenizer.get_vocab()
            fits = rows >= thinker.vocab_size and own.items() <= theirs.items()
        if not fits:
            raise UserError(
                f"thoughts.scoring_model ({self.name}): has another vocabulary ({rows:,} tokens) "
                f"than the model that thinks ({own_rows:,}), whose tokens it must read. {_REMEDY}"
            )

    def run(
        self, input_ids: Int[Tensor, "batch seq"], thinker: Any
    ) -> tuple[Float[Tensor, "batch seq width"], OutputHead]:
        """Return the final states of texts (padded on the right if at all), and the output head.

        Raises:
            UserError: As `load`; or the texts have more tokens than it has positions.
        """
        lm = self.load(thinker)
        longest = getattr(lm.config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and input_ids.shape[1] > longest:
            raise UserError(
                f"thoughts.scoring_model ({self.name}): reads at most {longest} tokens, but a text "
                f"has {input_ids.shape[1]}. Lower data.seq_len, or give another model."
            )
        with torch.no_grad():
            return plain_pass(lm, input_ids), find_output_head(lm, thinker.vocab_size)
