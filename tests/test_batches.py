"""Shares of a step: how batches are cut over ranks, and reading one step ahead."""

import json
import threading
import time
from contextlib import closing

import pytest
import torch
from launching import launch
from test_training import assert_close, timeless
from tiny import read_metrics, run_config, thinking_model

from quietstar.config import DataConfig, ThoughtsConfig
from quietstar.config.loading import save_config
from quietstar.data import build_data, load_tokenizer
from quietstar.data.batches import collate
from quietstar.errors import UserError
from quietstar.training.batches import count_thinking, micro_batch_rows, prefetched, read_step
from quietstar.training.build import check_batch
from quietstar.training.run import run_training


@pytest.mark.parametrize("batch_size", range(1, 12))
def test_ranks_share_every_row_in_equally_many_micro_batches(batch_size):
    for processes in range(1, batch_size + 1):
        for micro in range(1, batch_size + 2):
            ranks = [micro_batch_rows(batch_size, micro, processes, r) for r in range(processes)]
            rows = [row for rank in ranks for part in rank for row in part]
            assert rows == list(range(batch_size))  # each once, shares contiguous
            assert len({len(rank) for rank in ranks}) == 1
            shares = [sum(map(len, rank)) for rank in ranks]
            assert max(shares) - min(shares) <= 1
            assert max(len(part) for rank in ranks for part in rank) <= micro


@pytest.mark.parametrize("positions", ["all", "random", "answer"])
def test_a_padding_micro_batch_counts_nothing(tmp_path, positions):
    config = run_config(tmp_path)
    data, _, _ = build_data(config.data, load_tokenizer("bytes"), 0)
    thoughts = ThoughtsConfig(positions=positions)
    rows = micro_batch_rows(5, 1, 2, 0)
    assert rows == [range(0, 0), range(0, 1), range(1, 2)]
    padded = read_step(data, 0, 5, rows, pin=False)
    alone = read_step(data, 0, 5, rows[1:], pin=False)
    assert padded.counts[0] == alone.counts[0]
    assert count_thinking(padded.micro_batches[0], thoughts).sum() == 0
    assert (padded.micro_batches[0].labels == -100).all()
    assert padded.micro_batches[0].input_ids.shape == padded.micro_batches[1].input_ids.shape


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "micro"), [("ddp", 2), ("fsdp2", 1)])
def test_five_texts_train_alike_on_two_ranks(strategy, micro, tmp_path):
    """With micro-batches of one text, the first rank pads: ranks must run as many passes."""
    config = run_config(
        tmp_path, training__global_batch_size=5, training__micro_batch_size=micro
    )  # fmt: skip
    save_config(config, tmp_path / "config.yaml")
    two = launch(strategy, tmp_path / "config.yaml", tmp_path / "two")
    one = run_training(config).parent
    assert_close(timeless(read_metrics(two)), timeless(read_metrics(one)), rel=1e-4, abs=1e-4)


def test_more_processes_than_texts_are_refused(tmp_path):
    config = run_config(tmp_path, training__global_batch_size=5, training__micro_batch_size=2)
    check_batch(config, 5)
    with pytest.raises(UserError, match=r"global_batch_size \(5\) must be at least .*\(6\)"):
        check_batch(config, 6)


# --- Reading ahead --------------------------------------------------------------------------------


def test_the_next_step_is_read_in_the_background_and_none_behind_the_last():
    seen, threads = [], set()

    def read(step):
        seen.append(step)
        threads.add(threading.current_thread())
        return step * 10

    results = []
    for result in prefetched(read, range(3, 6)):
        for _ in range(500):  # the reader is one step ahead, and no further
            if len(seen) == min(len(results) + 2, 3):
                break
            time.sleep(0.01)
        assert seen == [3, 4, 5][: len(results) + 2]
        results.append(result)
    assert results == [30, 40, 50]
    assert threading.main_thread() not in threads
    assert list(prefetched(read, range(6, 6))) == []


def test_an_error_of_the_reader_is_raised_at_its_own_step():
    def read(step):
        if step == 1:
            raise UserError("data.train: line 7 is no JSON")
        return step

    steps = prefetched(read, range(3))
    assert next(steps) == 0
    with pytest.raises(UserError, match="line 7"):
        next(steps)


def test_closing_ends_the_thread():
    before = threading.active_count()
    with closing(prefetched(lambda step: step, range(10))) as steps:
        next(steps)
    assert threading.active_count() == before


@pytest.mark.parametrize("positions", ["all", "random", "entropy", "one_random", "answer_start"])
def test_padding_changes_no_thought_and_no_loss(tmp_path, positions):
    """So a batch need be no wider than its texts, and micro-batches may differ in width."""
    texts = ["two and two is", "one", "a longer question"]
    answers = [" four", " two", " and a longer answer"]
    records = [{"question": q, "answer": a} for q, a in zip(texts, answers, strict=True)]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records * 2))
    config = DataConfig(
        train=str(tmp_path / "qa.jsonl"), format="qa", template="{question}{answer}", seq_len=56,
        eval_fraction=0.5,
    )  # fmt: skip
    data, eval_data, _ = build_data(config, load_tokenizer("bytes"), 0)
    batch, samples = data.batch(0, 3), data.samples.read(0, 3, range(3))
    longest = max(map(len, samples))
    assert batch.input_ids.shape[1] == -(-longest // 8) * 8 < 56
    assert len({held_out.input_ids.shape[1] for held_out in eval_data.batches(1)}) == 1
    wide = collate(samples, [0, 1, 2], 56, data.pad_id)
    model = thinking_model(thoughts={"length": 3, "lookahead": 2, "positions": positions})

    def run(batch):
        output = model(
            batch.input_ids, batch.attention_mask, batch.labels, answers=batch.answers,
            sample_ids=batch.sample_ids, seed=5,
        )  # fmt: skip
        model.zero_grad()
        output.loss.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        return output, gradients

    (narrow, gradients), (padded, expected) = run(batch), run(wide)
    torch.testing.assert_close(narrow.loss, padded.loss, rtol=1e-6, atol=1e-6)
    for name, value in narrow.metrics.means().items():
        assert value == pytest.approx(padded.metrics.means()[name], rel=1e-5, abs=1e-6), name
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-6)
