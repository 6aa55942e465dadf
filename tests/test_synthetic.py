"""The synthetic task: its problems are right, held-out ones are never trained on."""

import pytest

from quietstar.config import DataConfig
from quietstar.data import build_data, load_tokenizer
from quietstar.data.synthetic import (
    CHATTER,
    DASH,
    VOCABULARY,
    MovesOptions,
    SumsOptions,
    chain_sum_steps,
    moves_records,
    sums_records,
    synthetic_records,
)
from quietstar.data.tokenizer import word_tokenizer
from quietstar.errors import UserError


def problems(options, size=200, seed=0, held_out=False):
    return list(moves_records(options, size, seed, held_out))


def bare(record):
    """Start and moves of a problem."""
    words = record["question"].split()
    return words[3], tuple(words[words.index("does") + 1 : words.index("Now") - 1])


def test_every_move_is_one_permutation_of_the_places():
    meaning = {}
    for record in problems(MovesOptions(num_steps=3), size=2000):
        start, moves = bare(record)
        places = [start, *record["rationale"].split()]
        assert record["answer"] == places[-1]
        for move, before, after in zip(moves, places, places[1:], strict=False):
            assert meaning.setdefault((move, before), after) == after
    assert len(meaning) == 12 * 10
    for move in {name for name, _ in meaning}:
        assert len({after for (name, _), after in meaning.items() if name == move}) == 10


@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_problems_are_never_trained_on(seed):
    options = MovesOptions(num_steps=2)  # 1,440 problems, so that nearly all are drawn
    trained = {bare(record) for record in problems(options, 4000, seed=seed)}
    held_out = {bare(record) for record in problems(options, 500, seed=3, held_out=True)}
    assert len(trained) > 1000
    assert not trained & held_out


def test_asides_come_in_the_shares_asked_for():
    options = MovesOptions(aside_share=0.5, worked_share=0.2)
    records = problems(options, 4000)
    asides = [r for r in records if DASH in r["question"]]
    worked = [r for r in asides if f"{DASH} {r['rationale']} {DASH}" in r["question"]]
    assert len(asides) / len(records) == pytest.approx(0.5, abs=0.03)
    assert len(worked) / len(asides) == pytest.approx(0.2, abs=0.03)
    chatter = next(r for r in asides if r not in worked)["question"].split(DASH)[1].split()
    assert all(word in CHATTER[place] for place, word in enumerate(chatter))
    records = problems(MovesOptions(aside_share=1.0), held_out=True)
    assert not any(DASH in record["question"] for record in records)


def test_the_same_seed_gives_the_same_problems():
    assert problems(MovesOptions(), seed=5) == problems(MovesOptions(), seed=5)
    assert problems(MovesOptions(), seed=5) != problems(MovesOptions(), seed=6)


def test_one_token_a_word():
    assert len(set(VOCABULARY)) == len(VOCABULARY)
    tokenizer = word_tokenizer()
    record = problems(MovesOptions(), size=1)[0]
    words = f"{record['question']} {record['answer']}"
    assert tokenizer.decode(tokenizer(words)["input_ids"]) == words
    assert len(tokenizer(words)["input_ids"]) == len(words.split())


def test_batches_mark_answers_and_carry_steps():
    config = DataConfig(
        train="synthetic:moves", format="qa", template="{question} {answer}",
        rationale_field="rationale", seq_len=26, eval_sequences=8,
        task_options={"size": 50, "aside_share": 1.0, "worked_share": 1.0},
    )  # fmt: skip
    tokenizer = load_tokenizer("synthetic:moves")
    train, held_out, _ = build_data(config, tokenizer, 0)
    batch = train.batch(0, 4)
    assert batch.answers.sum(1).tolist() == [1] * 4
    for row in range(4):
        assert batch.input_ids[row][batch.answers[row]] == batch.rationale[row][-1]
    assert all(batch.rationale.shape[1] == 4 for batch in held_out.batches(4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_step": 3}, "data.task_options: num_step: 3 is unknown; known are num_steps"),
        ({"num_steps": 0}, "num_steps: 0 should be greater than or equal to 1"),
        ({"num_steps": 2.5}, "num_steps: 2.5 should be a valid integer"),
        ({"aside_share": 2}, "aside_share: 2 should be less than or equal to 1"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        synthetic_records("data.train: synthetic:moves", "moves", options, 1, 0, False)


def test_an_unknown_task_is_refused():
    with pytest.raises(UserError, match="no synthetic task 'movs'; known: moves, sums"):
        build_data(DataConfig(train="synthetic:movs"), load_tokenizer("bytes"), 0)


def test_steps_of_a_chain_sum_go_from_left_to_right():
    question = "State the final answer to the following arithmetic problem: 4 - 1 - 7 + 7 ="
    assert chain_sum_steps(question) == "4-1=3,3-7=-4,-4+7=3"
    assert chain_sum_steps("Sum: -12 + 30 =") == "-12+30=18"


def test_asides_of_sums_work_out_the_answer_or_chatter():
    options = SumsOptions(min_terms=3, max_terms=4, aside_share=0.8, worked_share=0.5)
    records = list(sums_records(options, 500, 0, False))
    worked = [r for r in records if f"({r['rationale']})" in r["question"]]
    asides = [r for r in records if "(" in r["question"]]
    assert 0.7 < len(asides) / len(records) < 0.9
    assert 0.4 < len(worked) / len(asides) < 0.6
    assert all(r["rationale"].rpartition("=")[2] == r["answer"] for r in records)
    held_out = list(sums_records(options, 50, 0, True))
    assert not any("(" in r["question"] for r in held_out)


def test_problems_of_reasoning_gym_carry_steps_where_they_are_asked_for():
    config = DataConfig(
        train="reasoning_gym:chain_sum", format="qa", template="{question} {answer}",
        rationale_field="rationale", seq_len=160, eval_sequences=4,
        task_options={"size": 20, "max_terms": 4, "max_digits": 1},
    )  # fmt: skip
    batch = build_data(config, load_tokenizer("bytes"), 0)[0].batch(0, 2)
    assert (batch.rationale >= 0).any(1).all()
    wrong = config.model_copy(update={"train": "reasoning_gym:gcd", "task_options": {}})
    with pytest.raises(UserError, match="'rationale' needs problems with known reasoning"):
        build_data(wrong, load_tokenizer("bytes"), 0)


@pytest.mark.parametrize(
    ("share", "held_out", "part"), [(0.001, True, "held out"), (0.999, False, "to train on")]
)
def test_a_part_without_problems_is_refused_in_one_line(share, held_out, part):
    with pytest.raises(UserError, match=f"held_out_share: {share:g} leaves no problem {part}"):
        # So short problems are so few that a small part of them is none.
        problems(MovesOptions(num_steps=1, num_moves=2, held_out_share=share), held_out=held_out)
