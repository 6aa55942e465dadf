"""What transformers' Auto classes read of a model that thinks."""

from __future__ import annotations

from importlib import import_module
from typing import Any, ClassVar

# Not from `transformers` itself: this may be imported in the middle of an import of its modules.
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

from quietstar.config.schema import THINKING_TYPE


class QuietStarModelConfig(PreTrainedConfig):
    """Type ``quiet_star``, around the config of the language model.

    It is ``config.json`` of a saved model, by which `AutoModelForCausalLM` and ``pipeline`` find
    `QuietStarForCausalLM`. The settings of the thoughts are in ``quietstar.json``.

    Args:
        text_config: Config of the language model, which ``get_text_config`` returns; as a dict with
            its ``model_type``.
        **fields: Fields of any config.
    """

    model_type = THINKING_TYPE
    # Of the output, what Trainer's evaluation can neither pad nor gather.
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "metrics", "thoughts", "input_ids", "positions", "drawn",
    ]  # fmt: skip
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}  # pyright: ignore

    def __init__(
        self, text_config: PreTrainedConfig | dict[str, Any] | None = None, **fields: Any
    ) -> None:
        import_module("quietstar.model.quiet_star")  # Auto classes make a config, then want a model
        # The base class hands its choice of attention on to the configs within, and the language
        # model has one of its own by now. So these come last.
        super().__init__(**fields)
        if text_config is None:
            text_config = {"model_type": "llama"}
        if isinstance(text_config, dict):
            known = text_config.get("model_type") in CONFIG_MAPPING
            kind = CONFIG_MAPPING[text_config["model_type"]] if known else PreTrainedConfig
            text_config = kind.from_dict(text_config)
        self.text_config = text_config


AutoConfig.register(QuietStarModelConfig.model_type, QuietStarModelConfig)
