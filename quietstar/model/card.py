"""The card of a saved model, ``README.md``: what it is, what it learned, and how well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined

from quietstar.backbone.loading import HUB_ID
from quietstar.model.tuning import PEFT_METHODS, WHOLE

CARD_FILE = "README.md"
_MARK = "<!-- Written by quietstar, which writes it anew unless this line is gone. -->"
_FIGURES = {
    "accuracy_without_thoughts": "accuracy without thoughts",
    "accuracy_with_thoughts": "accuracy with thoughts",
    "accuracy_swapped": "accuracy with swapped thoughts",
    "gold_probability_without_thoughts": "P(gold answer) without thoughts",
    "gold_probability_with_thoughts": "P(gold answer) with thoughts",
    "gold_probability_swapped": "P(gold answer) with swapped thoughts",
    "right_thoughts": "correct thoughts",
    "base_nll": "NLL without thoughts, nats/token",
    "mixed_nll": "NLL with thoughts, nats/token",
    "gain": "gain of thinking, nats/token",
    "gain_of_content": "**gain of content**, nats/token",
    "gain_over_pause": "gain over pause tokens, nats/token",
}
_OF_NEXT_TOKENS = ("base_nll", "mixed_nll", "gain", "gain_of_content", "gain_over_pause")
"""Figures that with one thought for a whole answer are about its first token alone."""
_TEXT = """\
---
{{ header }}
---

# {{ title | cell }}

{{ mark }}

{{ about }}, in the format of quietstar.

| | |
|---|---|
{% for name, value in facts.items() %}
| {{ name }} | {{ value | cell }} |
{% endfor %}

## How well

{% for label, before, after in metrics %}
{% if loop.first %}
| held out | before | after |
|---|---|---|
{% endif %}
| {{ label }} | {{ before | number }} | {{ after | number }} |
{% else %}
No figures are known of this model.
{% endfor %}

The *gain of content* is what is lost when the model reads thoughts of other texts in place of its own: a gain of thinking without it says nothing about what the thoughts say.

## How to use it

```python
from quietstar import QuietStarForCausalLM  # and transformers' Auto classes and pipelines know it
from transformers import AutoTokenizer

model = QuietStarForCausalLM.from_pretrained(NAME)  # this folder
tokenizer = AutoTokenizer.from_pretrained(NAME)
inputs = tokenizer("...", return_tensors="pt")
{{ call }}
```

{{ plain }}
"""  # noqa: E501
_THINKS = (
    "A causal language model that thinks before it predicts "
    "([Quiet-STaR](https://arxiv.org/abs/2403.09629))",
    "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))  # think=False: "
    "without",
)
_STUDENT = (
    "A causal language model that has learned to predict without thoughts what it, or its teacher, "
    "predicted with them (distilled after [Quiet-STaR](https://arxiv.org/abs/2403.09629)). Its own "
    "thoughts are no longer trained: use it with `think=False`, or as the plain model that "
    "`quietstar export --plain` writes",
    "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32, think=False)[0]))",
)
"""What a model is, and how it is called."""
_WHOLE = (
    "`language_model/` is the same model without thoughts. It loads with `AutoModelForCausalLM`, "
    "without this package."
)
_ADAPTER = (
    "`language_model/` is a PEFT adapter of the base model. The base itself is not here. `quietstar"
    " merge` folds the adapter in."
)
_BESIDE = "The base model itself is not here: what was trained lies in `quietstar.safetensors`."


def model_card(
    model: Any,
    facts: Mapping[str, str] | None = None,
    before: Mapping[str, Any] | None = None,
    after: Mapping[str, Any] | None = None,
    datasets: Sequence[str] = (),
) -> str:
    """Write the card of a model, and of the run that trained it if there was one.

    Args:
        model: The `QuietStarForCausalLM` that is saved.
        facts: What else to say of how it came about, by name.
        before: Held-out figures before the training, by the names of ``metrics.jsonl``.
        after: Those after it.
        datasets: Names on the hub of what it was trained on.
    """
    base, thoughts = model.causal_lm.config.name_or_path, model.thoughts
    is_hub_id = HUB_ID.fullmatch(base) and not Path(base).exists()
    base = base if is_hub_id else Path(base).name  # a path says nothing to others
    method = model.tuning.method
    where = "every token" if thoughts.positions == "all" else f"`positions: {thoughts.positions}`"
    end = f"ended by {', '.join(map(repr, thoughts.stop))}" if thoughts.stop else "all as long"
    rows = {
        "base model": base or "none: trained from random weights",
        "what was trained": "all weights" if method in WHOLE else method,
        "thoughts": f"at most {thoughts.length} tokens, {end}; {where}; lookahead "
        f"{thoughts.lookahead}",
        "their words": f"{thoughts.start_init!r} ... {thoughts.end_init!r}",
        **(facts or {}),
    }
    data = ModelCardData(
        library_name="quietstar",
        pipeline_tag="text-generation",
        tags=["quiet-star", "reasoning"],
        base_model=base if is_hub_id else None,
        datasets=list(datasets) or None,
    )
    plain = _WHOLE if method in WHOLE else _ADAPTER if method in PEFT_METHODS else _BESIDE
    is_student = model.objective.student == "plain"
    kind = "taught by thoughts" if is_student else "that thinks"
    title = f"{Path(base).name} {kind}" if base else f"A model {kind}"
    about, call = _STUDENT if is_student else _THINKS
    note = ", first token of an answer" if thoughts.positions == "answer_start" else ""
    metrics = [
        (label + note * (name in _OF_NEXT_TOKENS), (before or {}).get(name), (after or {})[name])
        for name, label in _FIGURES.items()
        if isinstance((after or {}).get(name), int | float)
    ]
    return _TEMPLATE.render(
        header=data.to_yaml(), title=title, mark=_MARK, about=about, facts=rows, metrics=metrics,
        call=call, plain=plain,
    )  # fmt: skip


def _cell(text: str) -> str:
    """Keep a text on one line, and its bars from ending a cell."""
    return " ".join(text.split()).replace("|", "\\|")


_ENVIRONMENT = Environment(
    trim_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined, autoescape=False
)
_ENVIRONMENT.filters |= {
    "cell": _cell,
    "number": lambda value: f"{value:.4f}" if isinstance(value, int | float) else "",
}
_TEMPLATE = _ENVIRONMENT.from_string(_TEXT)


def write_card(folder: Path, text: str, is_given: bool) -> None:
    """Write the card, unless somebody else's is there and no text was given for it."""
    path = folder / CARD_FILE
    if not is_given and path.is_file() and _MARK not in path.read_text("utf-8", "replace"):
        return
    ModelCard(text, ignore_metadata_errors=True).save(path)
