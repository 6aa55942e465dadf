"""Controls: swapped, shuffled and pause thoughts, and the gain of content."""

import dataclasses
from typing import get_args

import pytest
import torch
from pydantic import ValidationError
from tiny import read_metrics, run_config, thinking_model

from quietstar import QuietStarForCausalLM
from quietstar.backbone import run as backbone
from quietstar.config.schema import Controls
from quietstar.data import Batch, build_data, load_tokenizer
from quietstar.evaluation.controls import (
    CONTROL_NAMES,
    CONTROLS,
    GAINS,
    MADE,
    TextThoughts,
    derangement,
    fit_thoughts,
    gain_over,
    pause_tokens,
    plan_swap,
    same_thought,
    shuffle_tokens,
    swap_positions,
)
from quietstar.reports import write_report
from quietstar.training.evaluation import compare, figures, score_batch
from quietstar.training.run import run_training


@pytest.mark.parametrize("count", [2, 3, 9, 50])
def test_a_derangement_is_one_cycle_through_all(count):
    donors = derangement(count, seed=3).tolist()
    seen, place = [], 0
    for _ in range(count):
        seen.append(place)
        place = donors[place]
    assert sorted(seen) == list(range(count))
    assert place == 0


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_is_swapped_with_itself(count):
    with pytest.raises(ValueError, match="it takes two"):
        derangement(count, seed=0)


@pytest.mark.parametrize("length", [2, 4, 7])
def test_swapping_gives_no_position_its_own_thoughts(length):
    tokens = torch.arange(2 * length * 2).view(2, length, 2)
    for seed in range(20):
        swapped = swap_positions(tokens, seed)
        assert (swapped != tokens).all()
        # a position's thoughts stay together, and every position's are used once
        groups = [thoughts.transpose(0, 1).flatten(1).tolist() for thoughts in (tokens, swapped)]
        assert sorted(groups[0]) == sorted(groups[1])
    if length > 2:
        assert not all(
            torch.equal(swap_positions(tokens, 0), swap_positions(tokens, n)) for n in range(20)
        )


def texts_with_answers(counts, anchors):
    """The thought at (text, position) is the number 10 * text + position."""
    return [
        TextThoughts(i, (10 * i + torch.arange(count))[None, :, None], anchor, True)
        for i, (count, anchor) in enumerate(zip(counts, anchors, strict=True))
    ]


def test_every_text_gets_another_ones_thought_before_the_answer():
    anchors = [1, 2, 3, 4, 2]
    texts = texts_with_answers([6] * 5, anchors)
    swap = plan_swap(texts)
    got = [int(swap(text, 6)[0, text.anchor, 0]) for text in texts]
    donors = [value // 10 for value in got]
    assert sorted(donors) == [0, 1, 2, 3, 4]
    assert all(donor != row for row, donor in enumerate(donors))
    assert [value % 10 for value in got] == [anchors[donor] for donor in donors]


def test_nobody_gets_what_is_no_thought():
    counts = [1, 2, 3]
    texts = texts_with_answers(counts, [0, 0, 0])
    swap = plan_swap(texts)
    for text in texts:
        swapped = swap(text, 3)[0, :, 0]
        last = counts[int(swapped[0]) // 10] - 1
        assert (swapped % 10).tolist() == [min(place, last) for place in range(3)]


def test_the_swap_does_not_depend_on_the_order_of_texts_or_on_ranks_that_read_one_twice():
    texts = texts_with_answers([4, 4, 3, 5], [1, 2, 0, 3])
    plans = [plan_swap(texts), plan_swap([*texts[::-1], texts[0]])]
    for text in texts:
        assert torch.equal(plans[0](text, 5), plans[1](text, 5))


def test_a_single_text_with_an_answer_has_nothing_to_swap_with():
    (text,) = texts_with_answers([4], [1])
    assert plan_swap([text]) is None
    without = dataclasses.replace(text, has_answer=False)
    swapped = plan_swap([without])(without, 4)
    assert (swapped != without.tokens).all()
    assert plan_swap([dataclasses.replace(without, tokens=without.tokens[:, :1])]) is None


def test_a_text_with_one_position_takes_the_thought_of_another_text():
    texts = [dataclasses.replace(t, has_answer=False) for t in texts_with_answers([1, 4], [0, 0])]
    swap = plan_swap(texts)
    assert swap(texts[0], 1).tolist() == [[[10]]]
    assert sorted(swap(texts[1], 4).flatten().tolist()) == [10, 11, 12, 13]


def test_the_last_thought_stands_in_for_those_a_donor_lacks():
    assert fit_thoughts(torch.arange(6).view(1, 2, 3), 3)[0, 2].tolist() == [3, 4, 5]
    assert fit_thoughts(torch.arange(6).view(1, 2, 3), 2, shift=-1)[0, 0].tolist() == [0, 1, 2]


def test_shuffled_thoughts_keep_no_token_at_its_place():
    thoughts = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)
    shuffled = shuffle_tokens(thoughts, [7, 8], seed=0)
    assert (shuffled != thoughts).all()
    assert torch.equal(shuffled.sort(-1).values, thoughts)
    assert torch.equal(shuffled[1:], shuffle_tokens(thoughts[1:], [8], seed=0))


def test_controls_of_thoughts_that_end_early_keep_their_lengths():
    generator = torch.Generator().manual_seed(4)
    tokens = torch.arange(6).expand(2, 2, 5, 6)
    lengths = torch.randint(0, 7, (2, 2, 5, 1), generator=generator)
    thoughts = tokens.where(torch.arange(6) < lengths, -1)
    assert {0, 1, 2, 6} <= set(lengths.flatten().tolist())
    shuffled = shuffle_tokens(thoughts, [7, 8], seed=0)
    is_token = thoughts >= 0
    assert torch.equal(shuffled >= 0, is_token)
    assert (shuffled != thoughts)[is_token & (lengths > 1)].all()
    assert torch.equal(shuffled.sort(-1).values, thoughts.sort(-1).values)
    assert torch.equal(pause_tokens(thoughts, 9), torch.where(is_token, 9, -1))
    swapped = swap_positions(thoughts[0], seed=0)
    assert sorted((swapped >= 0).sum(-1)[0].tolist()) == sorted(lengths[0, 0, :, 0].tolist())


def test_pause_tokens_are_one_token():
    thoughts = torch.arange(12).view(1, 2, 2, 3)
    assert pause_tokens(thoughts, 7).tolist() == torch.full((1, 2, 2, 3), 7).tolist()


def test_one_text_stands_in_every_thought_or_none_does():
    thoughts = torch.arange(24).view(2, 2, 2, 3)
    assert same_thought(thoughts, [7, 8]).tolist() == [[[[7, 8], [7, 8]]]] * 2
    assert same_thought(thoughts, []).tolist() == [[[[-1], [-1]]]] * 2


def test_a_gain_is_positive_where_own_thoughts_are_better():
    assert gain_over(2.0, 2.5) == 0.5  # NLL
    assert gain_over(0.75, 0.5, "gold_probability") == 0.25


def test_the_swap_is_the_same_however_many_ranks_share_the_texts():
    """Before, a rank with a single text gave it its own thoughts: a gain of content of zero."""
    model = thinking_model(thoughts={"length": 2}).eval()
    tokens = torch.arange(3 * 8).view(3, 8) * 7 % 250
    answers = torch.zeros(3, 8, dtype=torch.bool)
    answers[:, 5:7] = True
    mask = torch.ones(3, 8, dtype=torch.bool)
    nothing = torch.full((3, 0), -100)
    columns = (tokens, mask, tokens, torch.arange(3), answers, nothing, torch.zeros_like(answers))
    rows = [Batch(*(x[i : i + 1] for x in columns)) for i in range(3)]
    whole = compare(model, rows)
    texts = []
    compare(model, rows, gather=lambda mine: texts.extend(mine) or mine)
    ranks = [compare(model, mine, gather=lambda _: texts) for mine in (rows[:1], rows[1:])]
    for name, (total, _) in whole["swapped"].sums.items():
        parts = [rank["swapped"].sums[name][0] for rank in ranks]
        assert float(sum(parts)) == pytest.approx(float(total), rel=1e-5)
    assert abs(figures(whole)["gain_of_content"]) > 1e-4
    alone = figures(compare(model, rows[:1]))
    assert "gain_of_content" not in alone
    assert "gain_over_pause" in alone


def test_a_text_runs_once_for_its_own_thoughts_and_once_for_all_controls(monkeypatch):
    model, ran = thinking_model(thoughts={"length": 2}).eval(), []
    made = backbone.TextPass  # once for every run of texts, whoever asks for it
    monkeypatch.setattr(backbone, "TextPass", lambda *given: ran.append(1) or made(*given))
    tokens, nothing = torch.arange(24).view(3, 8), torch.zeros(3, 8, dtype=torch.bool)
    rationale = torch.full((3, 2), 5)
    batch = Batch(tokens, ~nothing, tokens, torch.arange(3), nothing, rationale, nothing)
    compare(model, [batch, batch], names=CONTROLS, generic=[1])
    assert len(ran) == 4


# --- Evaluations of a training run ----------------------------------------------------------------
def test_a_run_evaluates_the_controls_it_is_asked_for(tmp_path):
    """By hand: the final model scores the held-out texts with each control's thoughts."""
    every = list(CONTROLS)
    config = run_config(tmp_path, training__eval_controls=every, thoughts__length=3)
    run_training(config, more_runs=True, on_report=write_report)
    last = read_metrics(tmp_path / "run", "eval")[-1]
    model = QuietStarForCausalLM.from_pretrained(tmp_path / "run" / "final").eval()
    tokenizer = load_tokenizer("bytes")
    _, held_out, _ = build_data(config.data, tokenizer, config.training.seed)
    (batch,) = held_out.batches(8)
    drawn = model.draw(batch.input_ids, positions=None, sample_ids=batch.sample_ids)
    own = drawn.tokens.transpose(1, 2)
    given = {
        "shuffled": shuffle_tokens(own, batch.sample_ids.tolist(), seed=0),
        "pause": torch.full_like(own, model.pause_token_id),
        "generic": torch.tensor(tokenizer.encode(" I ")).expand(*own.shape),
        "blank": torch.full_like(own[..., :1], -1),
    }
    for name, thoughts in given.items():
        scores = score_batch(model, batch, thoughts.transpose(1, 2)).means()
        assert last[f"{name}_mixed_nll"] == pytest.approx(scores["mixed_nll"], rel=1e-5), name
        gain = scores["mixed_nll"] - last["mixed_nll"]
        assert last[f"gain_over_{name}"] == pytest.approx(gain, abs=1e-5)
    assert len({round(last[f"{name}_thought_nll"], 5) for name in given}) == 4
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    for name in ("gain of content", *(f"gain over {CONTROL_NAMES[name]}" for name in MADE)):
        assert name in page


def test_controls_do_not_depend_on_how_texts_are_batched(tmp_path):
    figures = []
    for size in (1, 4):
        folder = tmp_path / str(size)
        folder.mkdir()
        config = run_config(
            folder, training__micro_batch_size=size, training__eval_controls=list(CONTROLS),
            training__max_steps=1, thoughts__positions="random", thoughts__length=4,
        )  # fmt: skip
        run_training(config, more_runs=True)
        record = read_metrics(folder / "run", "eval")[0]
        figures.append({key: x for key, x in record.items() if isinstance(x, float)})
    assert set(GAINS.values()) <= figures[0].keys()
    # Gains are differences of NLLs of five nats, which float32 rounds to some 1e-6.
    assert figures[0] == pytest.approx(figures[1], rel=1e-5, abs=1e-5)


def test_only_what_is_asked_for_is_evaluated(tmp_path):
    run_training(run_config(tmp_path, training__eval_controls=["blank"]), more_runs=True)
    last = read_metrics(tmp_path / "run", "eval")[-1]
    assert "gain_over_blank" in last
    assert not {"gain_of_content", "gain_over_pause", "swapped_mixed_nll"} & last.keys()


def test_a_config_names_the_controls_by_their_names(tmp_path):
    choices = get_args(get_args(get_args(Controls)[0])[0])
    assert sorted(choices) == sorted(CONTROLS)
    with pytest.raises(ValidationError, match="each name once"):
        run_config(tmp_path, training__eval_controls=["blank", "blank"])
    with pytest.raises(ValidationError, match="should be 'swapped'"):
        run_config(tmp_path, training__eval_controls=["none"])
    with pytest.raises(ValueError, match=r"\(shuffled\) needs thoughts.length of at least 2"):
        run_config(tmp_path, training__eval_controls=["shuffled"], thoughts__length=1)
