"""The docs' page of parity: worst errors of every architecture, and which ones are refused.

The build of the docs measures them (15 s on one core).
"""

import torch
import transformers
from architectures import REFUSED, SUPPORTED, meta_model
from conftest import byte_tokenizer
from test_parity import GRADIENT_TOLERANCE, LENGTH, TOLERANCE, build, compare

from quietstar import QuietStarForCausalLM
from quietstar.errors import UserError

HEAD = """# Parity with a per-position loop

For each architecture, a tiny random copy (two layers or more, one of each kind; peaked attention,
windows of 4, soft caps of 3, sinks that are not zero) runs two texts of {length} and {shorter}
tokens with 2 thoughts of 2 tokens at every position and lookahead 2. The same thoughts are written
out one by one as ordinary sequences for the model's own `eager` attention (`tests/reference.py`).
Compared are final states, log-probabilities, mixing weights and the loss (forward), and the
gradients of all parameters with all terms of the loss on (gradient).

An error is the largest difference over the largest entry of the loop's tensor; for a gradient, over
at least a thousandth of the model's largest one (zero but for rounding: over the largest). The
worst of all tensors is shown. `tests/test_parity.py` fails from {tolerance:.0e} (forward) and
{gradient_tolerance:.0e} (gradient). In float32 the loop itself is up to 1e-5 from the loop in
float64. Last digits differ between machines.

Float32 on a CPU, torch {torch}, transformers {transformers}.

**flash**: a flash kernel for the text and small products for the block. **dense**: explicit
scores, exact and slower; taken for soft-capped scores, sinks, and windows shorter than the text
(here all windows are: the real model takes flash for texts that its window covers).

| architecture | forward | gradient | path |
|---|---|---|---|
"""

REFUSED_HEAD = """
## Refused

These raise an error at load; they are never computed wrongly.

| architecture | what the check says |
|---|---|
"""


def supported_rows() -> list[str]:
    rows = []
    for name in SUPPORTED:
        comparison = compare(build(name), [LENGTH, LENGTH - 2])
        forward, gradient = (
            max(errors.values()) for errors in (comparison.forward, comparison.gradient)
        )
        path = "flash and dense, by layer" if "," in comparison.path else comparison.path
        rows.append(f"| {name} | {forward:.1e} | {gradient:.1e} | {path} |")
    return rows


def refused_rows() -> list[str]:
    rows = []
    for name in REFUSED:
        try:
            QuietStarForCausalLM.from_base(meta_model(name), tokenizer=byte_tokenizer())
        except UserError as error:
            _, _, reason = str(error).partition(" is not supported: ")
            rows.append(f"| {name} | {reason.removesuffix(' Choose one that README lists.')} |")
    return rows


def page() -> str:
    head = HEAD.format(
        length=LENGTH,
        shorter=LENGTH - 2,
        tolerance=TOLERANCE,
        gradient_tolerance=GRADIENT_TOLERANCE,
        torch=torch.__version__,
        transformers=transformers.__version__,
    )
    return "\n".join([head.rstrip(), *supported_rows(), REFUSED_HEAD.rstrip(), *refused_rows()])
