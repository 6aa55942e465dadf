"""``python -m benchmarks.long``: long thoughts at one place of each text, drawn and learned from.

Sampling stands beside transformers' ``generate`` with ``num_return_sequences``, on a copy of the
same model: thought tokens a second, once with thoughts of equal length and once with ragged ones,
whose lengths follow from their first token on both sides. The learn pass stands beside its floor:
forward and backward of the plain model over as many real tokens in rows of a text's length, with a
cross entropy over as many rows. The step (both, by an objective, with thoughts of equal length)
stands beside the sum of that floor and of a bare loop of the plain model's cached forwards, with
logits. All run in turn in one process; the figures are medians.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rich import box
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from benchmarks.measure import environment, peak_mb
from benchmarks.models import load_plain, make_thinker
from benchmarks.options import add_machine, report_result, run, settings_of
from quietstar.backbone.devices import find_device, keep_freed_memory
from quietstar.backbone.output_head import find_output_head
from quietstar.cli.options import Parser, whole
from quietstar.config import loss_config
from quietstar.model.quiet_star import QuietStarForCausalLM
from quietstar.sampling.rollout import sample_thoughts
from quietstar.sampling.stopping import StopTexts
from quietstar.sampling.thoughts import Sampling, Texts, ThoughtBatch
from quietstar.training.build import quiet_libraries

PARTS = ("equal", "ragged", "learn", "step")


class Countdown(StopTexts):
    """Stands for stop texts: a thought's first token says how long it is, an eighth of T to T."""

    def __init__(self, length: int) -> None:
        self.ended = -1
        self.lengths = torch.linspace(max(1, length // 8), length, 29).long()

    def step(self, state: Tensor, tokens: Tensor) -> Tensor:
        """Count down, (rows,); a thought begins in state 0."""
        first = self.length_of(tokens) - 1
        return torch.where(state == 0, first, state - 1).where((state != 1), self.ended)

    def length_of(self, first: Tensor) -> Tensor:
        """Tokens of thoughts with this first token."""
        return self.lengths.to(first.device)[first.clamp(min=0) % len(self.lengths)]


class _Ends(StoppingCriteria):
    def __init__(self, countdown: Countdown) -> None:
        self.countdown, self.state = countdown, None

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        tokens = input_ids[:, -1]
        state = torch.zeros_like(tokens) if self.state is None else self.state
        self.state = self.countdown.step(state, tokens).where(state >= 0, -1)
        return self.state == self.countdown.ended


def main(arguments: list[str]) -> int:
    """Run the benchmark, print a table, write JSON if asked."""
    args = _parser().read(arguments)
    quiet_libraries()
    result = bench_long(args)
    table = Table(title=f"long thoughts, {args.model}, {args.dtype}, {args.batch_size} texts of "
                  f"{args.seq_len}, K {args.num_thoughts}, T {args.thought_length}",
                  title_justify="left", box=box.SIMPLE_HEAD)  # fmt: skip
    for column in ("", "tokens/s", "beside it", "ratio", "MB above model"):
        table.add_column(column, justify="right")
    for name, row in result["parts"].items():
        table.add_row(
            name, f"{row['tokens_per_second']:.1f}", f"{row['other_tokens_per_second']:.1f}",
            f"{row['ratio']:.3f}", f"{row['peak_mb']:,.0f}",
        )  # fmt: skip
    return report_result(table, result, args.json)


def bench_long(args: argparse.Namespace) -> dict[str, Any]:
    """Measure all parts; keys as in the JSON file."""
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = find_device(args.device)
    base = load_plain(args.model).to(getattr(torch, args.dtype))
    plain = copy.deepcopy(base).to(device)  # pyright: ignore[reportArgumentType]
    model = make_thinker(base, args, num_thoughts=args.num_thoughts, lookahead=1)
    model = model.to(device, base.dtype)
    if device == "cpu":  # as in training, once the models are built
        keep_freed_memory()
    ids = torch.randint(model.vocab_size, (args.batch_size, args.seq_len), device=device)
    bench = {"equal": _sampling, "ragged": _sampling, "learn": _learning, "step": _learning}
    parts = {name: bench[name](model, plain, ids, args, name) for name in args.parts}
    return {"parts": parts, "settings": settings_of(args), "environment": environment()}


def _sampling(
    model: QuietStarForCausalLM, plain: PreTrainedModel, ids: Tensor, args: argparse.Namespace,
    part: str,
) -> dict[str, float]:  # fmt: skip
    length, positions = args.thought_length, _last_positions(ids)
    countdown = Countdown(length) if part == "ragged" else None
    sampling = Sampling(args.num_thoughts, length, 1.0, 0, countdown)

    def ours() -> int:
        thoughts = sample_thoughts(
            model.causal_lm, model.output_head, model.start_vectors.detach(), ids,
            torch.arange(len(ids), device=ids.device), sampling, positions,
        )  # fmt: skip
        return int((thoughts >= 0).sum())

    @torch.no_grad()
    def theirs() -> int:
        plain.eval()
        plain.generation_config.eos_token_id, plain.generation_config.pad_token_id = None, 0
        ends = StoppingCriteriaList([_Ends(countdown)] if countdown else [])
        texts: Any = plain.generate(  # pyright: ignore[reportCallIssue]
            ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, top_p=1.0,
            temperature=1.0, max_new_tokens=length, num_return_sequences=args.num_thoughts,
            stopping_criteria=ends,
        )  # fmt: skip
        new = texts[:, ids.shape[1] :]
        return int(countdown.length_of(new[:, 0]).sum()) if countdown else new.numel()

    peak = peak_mb(ours, ids.device.type)  # first: what is freed stays with the process
    row = _in_turn(ours, theirs, args.repeats)
    ratio = row["tokens_per_second"] / row["other_tokens_per_second"]
    return row | {"ratio": ratio, "peak_mb": peak}


def _learning(
    model: QuietStarForCausalLM, plain: PreTrainedModel, ids: Tensor, args: argparse.Namespace,
    part: str,
) -> dict[str, float]:  # fmt: skip
    shape = (*_last_positions(ids).shape, args.num_thoughts, args.thought_length)
    tokens = torch.randint(model.vocab_size, shape, device=ids.device)
    lengths = Countdown(args.thought_length).length_of(tokens[..., 0])
    if part == "step":
        lengths = torch.full_like(lengths, args.thought_length)
        model.configure(
            model.thoughts.model_copy(update={"positions": "one_random"}),
            loss_config(objective=args.objective),
        )
    texts = Texts(ids, ids, None, torch.arange(len(ids), device=ids.device))
    thoughts = ThoughtBatch.of_texts(texts, _last_positions(ids) - 1, tokens, lengths)
    model.train()
    model.learn_chunk_tokens = args.learn_chunk_tokens
    if args.checkpointing:
        for lm in (model.causal_lm, plain):
            lm.gradient_checkpointing_enable({"use_reentrant": False})
    start, end = len(model.start_vectors), len(model.end_vectors)
    behind = end * lengths.numel() + int(lengths.sum())
    total = ids.numel() + start * len(ids) + behind
    rows = -(-total // args.seq_len)
    scored = ids.numel() + int(lengths.sum()) + 2 * lengths.numel()

    def ours() -> int:
        loss = model(ids, thoughts=None if part == "step" else thoughts).loss
        assert loss is not None, "forward gives a loss"
        loss.backward()
        model.zero_grad()
        return total

    @torch.no_grad()
    def decode() -> None:
        head = find_output_head(plain).module
        one = torch.randint(model.vocab_size, (len(ids) * args.num_thoughts, 1), device=ids.device)
        plain.eval()
        cache = plain.base_model(input_ids=ids, use_cache=True).past_key_values
        cache.batch_repeat_interleave(args.num_thoughts)
        for _ in range(args.thought_length):
            step = plain.base_model(input_ids=one, past_key_values=cache, use_cache=True)
            head(step.last_hidden_state)

    def floor(batch: int) -> int:
        if part == "step":
            decode()
        left = scored
        for first in range(0, rows, batch):
            some = min(batch, rows - first)
            random = torch.randint(model.vocab_size, (some, args.seq_len), device=ids.device)
            plain.train()
            states = plain.base_model(input_ids=random, use_cache=False).last_hidden_state
            count = min(left, random.numel())
            left -= count
            if not count:
                states.sum().backward()
                continue
            logits = find_output_head(plain).module(states.flatten(0, 1)[:count]).float()
            F.cross_entropy(logits, random.flatten()[:count]).backward()
        plain.zero_grad()
        return total

    peak = peak_mb(ours, ids.device.type)
    batches = sorted({max(1, tokens // args.seq_len) for tokens in (1024, 2048)})
    seconds = {batch: _timed(lambda batch=batch: floor(batch))[1] for batch in batches}
    best = min(seconds, key=lambda batch: seconds[batch])
    row = _in_turn(ours, lambda: floor(best), args.repeats)
    ratio = row["other_tokens_per_second"] / row["tokens_per_second"]
    return row | {"ratio": ratio, "peak_mb": peak}


def _last_positions(ids: Tensor) -> Tensor:
    return torch.full((len(ids), 1), ids.shape[1] - 1, device=ids.device)


def _in_turn(ours: Callable[[], int], other: Callable[[], int], repeats: int) -> dict[str, float]:
    """Tokens a second of both, medians; a run before warms up."""
    rates: list[list[float]] = [[], []]
    for repeat in range(repeats + 1):
        for rate, function in zip(rates, (ours, other), strict=True):
            tokens, seconds = _timed(function)
            if repeat:
                rate.append(tokens / seconds)
    mine, others = (statistics.median(rate) for rate in rates)
    return {"tokens_per_second": mine, "other_tokens_per_second": others}


def _timed(function: Callable[[], int]) -> tuple[int, float]:
    begun = time.perf_counter()
    tokens = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return tokens, time.perf_counter() - begun


def _parser() -> Parser:
    parser = Parser("python -m benchmarks.long", __doc__)
    add = parser.add_argument
    add("--model", default="mistral-tiny", help="a built-in name or a folder")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what is measured")
    add("--batch-size", type=whole(1), default=4, help="B, texts")
    add("--seq-len", type=whole(3), default=256, help="S, tokens of a text")
    add("--num-thoughts", type=whole(2), default=8, help="K, thoughts of a text")
    add("--thought-length", type=whole(1), default=128, help="T, most tokens of a thought")
    add("--learn-chunk-tokens", type=whole(1), default=5120, help="that learn at once")
    add("--objective", default="rlp", help="of the step")
    add("--checkpointing", action="store_true", help="recompute activations, on both sides")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    add_machine(parser)
    return parser


if __name__ == "__main__":
    run(main)
