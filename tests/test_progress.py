"""What a run says of its time: its first words, what evaluations cost, what is left, its page."""

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from tiny import read_metrics, run_config

from quietstar.config.loading import load_config
from quietstar.data import load_tokenizer
from quietstar.errors import UserError
from quietstar.model.outputs import QuietStarOutput, ThoughtMetrics
from quietstar.reports import write_report
from quietstar.training import costs, loop, reporter
from quietstar.training.costs import TimeLeft, costs_of, evaluations_after, with_eval_sequences
from quietstar.training.reporter import Reporter
from quietstar.training.run import run_training
from quietstar.training.stages import plan_stages


def chosen(config):
    stages = with_eval_sequences(config).stage_configs()
    return [stage.data.eval_sequences for stage in stages.values()]


def qa(tmp_path, **changes):
    return run_config(tmp_path, data__eval_sequences=None, data__format="qa", **changes)


# --- Held-out texts -------------------------------------------------------------------------------
@pytest.mark.parametrize("positions", ["all", "answer_start", "random"])
@pytest.mark.parametrize("steps", [20, 60])
def test_evaluations_cost_no_more_than_the_training(tmp_path, positions, steps):
    config = qa(tmp_path, training__max_steps=steps, training__eval_steps=20,
                thoughts__positions=positions)  # fmt: skip
    (number,), (stage,) = chosen(config), plan_stages(config)
    assert costs.FEWEST < number < costs.MOST
    count = costs_of(stage)
    assert count.num_evaluations == steps // 20 + 1
    spent = [n * count.num_evaluations * count.text for n in (number, number + 1)]
    assert spent[0] <= costs.SHARE * steps * count.step < spent[1]


def test_controls_and_thoughts_that_are_counted_leave_room_for_fewer_texts(tmp_path):
    changes = {"training__max_steps": 40, "data__seq_len": 40}
    few = chosen(qa(tmp_path, **changes, training__eval_controls=[]))
    more = chosen(qa(tmp_path, **changes))
    most = chosen(qa(tmp_path, **changes, data__rationale_field="rationale"))
    assert few > more > most


def test_short_runs_and_long_ones_have_enough_texts_and_no_more(tmp_path):
    assert chosen(qa(tmp_path, training__max_steps=1)) == [costs.FEWEST]
    assert chosen(qa(tmp_path, training__max_steps=9999)) == [costs.MOST]
    text = run_config(tmp_path, data__eval_sequences=None, training__max_steps=9999)
    assert chosen(text) == [64]
    stream = run_config(tmp_path, data__eval_sequences=None, data__streaming=True)
    assert chosen(stream) == [None]  # another number would move where training begins


def test_what_a_config_says_is_kept(tmp_path):
    config = run_config(tmp_path, data__eval_sequences=400, training__max_steps=1)
    assert with_eval_sequences(config) == config


def test_shipped_configs_evaluate_on_the_texts_of_their_documentation():
    texts = {name: chosen(load_config(name)) for name in ("demo", "tiny")}
    assert texts == {"demo": [512, 512, 512], "tiny": [64]}
    assert chosen(load_config("demo", ["--training.max_steps", "2"])) < [100, 100, 100]


def test_a_longer_run_goes_on_with_the_texts_that_it_began_with(tmp_path):
    config = run_config(tmp_path, data__eval_sequences=None, training__save_steps=3)
    run_training(config, more_runs=True)
    path = tmp_path / "run" / "config.yaml"
    assert load_config(path).data.eval_sequences == costs.FEWEST
    longer = run_config(tmp_path, data__eval_sequences=None, training__max_steps=900)
    assert chosen(longer)[0] > costs.FEWEST
    longer = longer.model_copy(
        update={"training": longer.training.model_copy(update={"max_steps": 4})}
    )
    run_training(longer, resume="auto", more_runs=True)
    assert load_config(path).data.eval_sequences == costs.FEWEST


def test_a_run_says_how_long_its_evaluations_take(tmp_path, capsys):
    run_training(run_config(tmp_path, data__eval_sequences=200, training__max_steps=2))
    said = capsys.readouterr().out
    (number,) = re.findall(r"\n2 evaluations of (\d+) held-out texts, .* as long as [\d.]+ ", said)
    assert costs.FEWEST < int(number) <= 200
    assert "notice: data.eval_sequences (200): evaluations take about" in said
    assert f"evaluating on {number} held-out texts\n" in said
    assert f"evaluating on {number} held-out texts, about " in said


def test_lines_of_the_data_leave_out_what_there_is_nothing_of(tmp_path, capsys):
    run_training(run_config(tmp_path, training__max_steps=1))
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("data.train"))
    assert " 0 " not in line.replace(" 0 held", "")


# --- Time left ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("every", "last", "after", "count"),
    [(0, 5, -1, 2), (2, 5, -1, 4), (2, 5, 0, 3), (2, 5, 3, 2), (2, 4, 2, 1), (2, 4, 4, 0)],
)
def test_the_evaluations_of_a_stage_are_counted(tmp_path, every, last, after, count):
    config = run_config(tmp_path, training__eval_steps=every, training__max_steps=last)
    assert evaluations_after(config, after) == count


def test_the_time_left_knows_evaluations_and_later_stages(tmp_path):
    staged = run_config(tmp_path, training__max_steps=10).model_copy(
        update={"stages": {"a": {}, "b": {"training": {"max_steps": 20}}}}
    )
    left = TimeLeft(plan_stages(staged))
    assert left(0, 0, -1) is None
    left.times["step", 0].extend([900.0, 60.0, 60.0])  # the first one compiles
    cost = costs_of(plan_stages(staged)[0])
    evaluation = 60 * 4 * cost.text / cost.step  # by its cost, until one was timed
    assert left(0, 3, 0) == pytest.approx(7 * 60 + evaluation + 20 * 60 + 2 * evaluation)
    left.times["evaluation", 0].append(100.0)
    left.times["evaluation", 1].append(50.0)
    step = 50 / 4 * cost.step / cost.text
    assert left(1, 5, 0) == pytest.approx(15 * step + 50)
    assert left(1, 20, 20) == 0


@pytest.fixture
def clock(monkeypatch):
    """A clock for the reporter, which moves when it is told to."""
    clock = SimpleNamespace(now=0.0)
    fake = SimpleNamespace(perf_counter=lambda: clock.now, strftime=lambda form: "now")
    monkeypatch.setattr(reporter, "time", fake)
    return clock


def make_reporter(tmp_path, steps, on_report=None):
    config = run_config(tmp_path, training__max_steps=steps)
    (tmp_path / "run").mkdir(exist_ok=True)
    stages = plan_stages(config)
    made = Reporter(config, Accelerator(cpu=True), load_tokenizer("bytes"), stages, 0, on_report)
    made.begin_stage(stages[0], [])
    return made


def end_step(made, step):
    one = torch.tensor(1)
    figures = dict.fromkeys(("base_nll", "gain", "thought_logprob"), (torch.tensor(1.0), one))
    output = QuietStarOutput(metrics=ThoughtMetrics(figures))
    made.step_ends(step, 1.0, {"total": 1.0}, 0.1, output)


def test_steps_of_over_half_a_minute_have_an_eta(tmp_path, clock, capsys):
    made = make_reporter(tmp_path, 10)
    for step in (1, 2):
        clock.now += 45
        end_step(made, step)
    clock.now += 20
    (column,) = (c for c in made.bar.columns if type(c).__name__ == "_Left")
    shown = column.render(made.bar.tasks[0]).plain
    expected = made._time_left(0, 2, -1) - 20
    assert 8 * 45 - 20 < expected < 12 * 45
    hours, minutes, seconds = map(int, shown.split(":"))
    assert 3600 * hours + 60 * minutes + seconds == pytest.approx(expected, abs=1)
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("step")]
    assert len(lines) == 2
    assert all(line.endswith(" min left") for line in lines)


def test_the_first_evaluation_is_timed_by_its_parts(tmp_path, clock):
    made = make_reporter(tmp_path, 10)
    with made.evaluating(4, 4) as advance:
        assert made.seconds_left() is None
        clock.now += 30
        advance()
        evaluation = made.bar.tasks[-1].fields["left"]
        assert evaluation() == pytest.approx(90)
        left = made.seconds_left()
        clock.now += 30
        advance()
        assert evaluation() == pytest.approx(60)
        assert made.seconds_left() == pytest.approx(left - 30)


# --- The page while the run goes on ---------------------------------------------------------------
def test_the_page_follows_the_steps_and_costs_little(tmp_path, clock):
    said = []

    def write(folder, status):
        said.append(status)
        clock.now += 1

    made = make_reporter(tmp_path, 99, write)
    for step in range(1, 91):
        clock.now += 1
        end_step(made, step)
        made.refresh()
    assert 3 <= len(said) <= 5
    assert said[0].startswith("running, step 9 of 99, about ")  # none in the first seconds
    assert said[0].endswith(" left, as of now")
    assert not made.report("finished") or said[-1] == "finished, step 90 of 99"


def test_a_page_stays_as_it_was_where_a_run_fails_before_its_first_record(tmp_path):
    said = []

    def fail(steps):
        with make_reporter(tmp_path, 9, lambda folder, status: said.append(status)) as made:
            for step in range(1, steps + 1):
                end_step(made, step)
            raise UserError("no checkpoint")

    for steps in (0, 1):
        with pytest.raises(UserError, match="no checkpoint"):
            fail(steps)
        assert said == ["stopped, step 1 of 9"] * steps


def test_a_page_is_there_before_the_first_evaluation_after_a_step_and_says_how_it_ended(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(reporter, "PAUSE_AFTER_REPORT", 0)
    said = []

    def write(folder, status):
        said.append(status.partition(", as")[0])
        write_report(folder, status)

    run_training(run_config(tmp_path), on_report=write, more_runs=True)
    steps = [status.partition(", about")[0] for status in said]
    assert steps == [*(f"running, step {n} of 3" for n in (0, 1, 2, 3, 3)), "finished, step 3 of 3"]
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Finished, step 3 of 3." in page
    assert "Finished, step 3 of 3." in write_report(tmp_path / "run").read_text(encoding="utf-8")

    def fail(*_):
        raise UserError("no more")

    monkeypatch.setattr(loop, "check_idle_texts", fail)
    again = run_config(tmp_path)
    with pytest.raises(UserError, match="no more"):
        run_training(again, overwrite=True, on_report=write, more_runs=True)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Stopped, step 1 of 3." in page
    page = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "Not finished, step 1 of 3." in page


# --- The first words ------------------------------------------------------------------------------
def test_a_run_says_what_it_does_before_torch_is_imported(tmp_path):
    script = (
        "import sys; from quietstar.cli import train\n"
        "train.load_config = lambda *_: sys.exit('torch' in sys.modules)\n"
        f"train.main(['--config', 'tiny', '--training.output_dir', {str(tmp_path / 'x')!r}])"
    )
    for rank in ("0", "1"):
        environment = {**os.environ, "RANK": rank, "WORLD_SIZE": "2"}
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                              env=environment, check=False)  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        line = f"training a model with random weights on reasoning_gym:chain_sum into {tmp_path}/x"
        assert (line in done.stdout) is (rank == "0")
        assert ("configs/tiny.yaml" in done.stdout) is (rank == "0")


def test_a_run_names_its_phases(tmp_path, capsys):
    run_training(run_config(tmp_path, training__max_steps=1))
    said = capsys.readouterr().out
    phases = ("reading the data (", "loading the model", "evaluating on", "step ")
    places = [said.index(phase) for phase in phases]
    assert places == sorted(places)
    assert len(read_metrics(tmp_path / "run", "train")) == 1
