"""Pages of runs whose files hold absurd figures, or are no files: a page, or one line."""

import json
import os

import pytest
from rich.console import Console
from test_pages import TASK
from test_report import FILES, RECORDS, Page

from quietstar.errors import UserError
from quietstar.reports import write_report
from quietstar.reports.evaluation import page_mark, task_view, write_page

ABSURD = (1e308, -1e308, 1e300, 10**400, 2**63, -1, 0, float("nan"), float("inf"))


@pytest.fixture
def run(tmp_path):
    for file, text in FILES.items():
        (tmp_path / file).write_text(text, encoding="utf-8")
    return tmp_path


def absurd(value, number):
    """The same with another number in the place of every one."""
    if isinstance(value, dict):
        return {key: absurd(part, number) for key, part in value.items()}
    if isinstance(value, list):
        return [absurd(part, number) for part in value]
    return value if isinstance(value, bool | str) or value is None else number


@pytest.mark.parametrize("number", ABSURD, ids=str)
def test_absurd_figures_give_a_page(run, number):
    records = [absurd(record, number) | {"step": record["step"]} for record in RECORDS]
    records += [RECORDS[-1] | {"step": number}]
    lines = "".join(json.dumps(record) + "\n" for record in (*RECORDS[:2], *records))
    (run / "metrics.jsonl").write_text(lines)
    for name in ("results.json", "samples.json"):
        (run / name).write_text(json.dumps(absurd(json.loads(FILES[name]), number)))
    controls = absurd(json.loads(FILES["controls.json"]), number) | {"seeds": [0, 1]}
    (run / "controls.json").write_text(json.dumps(controls))
    page = Page(write_report(run).read_text("utf-8"))
    assert page.open == []
    drawn = [value for _, attributes in page.elements for value in attributes.values()]
    assert not any("nan" in str(value) or "inf" in str(value) for value in drawn)


@pytest.mark.parametrize(
    "config",
    ["[" * 5000, "a: 2023-99-99\n", "a: &a [*a]\n", "? [1]\n: 2\n", "\x00", "model: 5\n",
     "model: {name_or_path: {a: b}}\n", "a: !!python/object/apply:os.system [true]\n", "{" * 900],
)  # fmt: skip
def test_a_config_of_any_form_gives_a_page(run, config):
    (run / "config.yaml").write_text(config)
    assert Page(write_report(run).read_text("utf-8")).open == []


@pytest.mark.parametrize("name", FILES)
def test_a_pipe_in_a_run_folder_is_not_waited_for(run, name):
    (run / name).unlink()
    os.mkfifo(run / name)
    assert write_report(run).exists()


def test_a_link_in_the_place_of_the_page_is_not_written_through(run):
    (run / "mine.txt").write_text("mine")
    (run / "report.html").symlink_to("mine.txt")
    with pytest.raises(UserError, match="is no regular file and is not replaced"):
        write_report(run)
    assert (run / "mine.txt").read_text() == "mine"


def test_names_of_tasks_are_text_in_the_terminal(capsys):
    name = "[/b] [link=http://evil]x \x1b]0;pwned\x07\n[red]"
    Console().print(task_view(name, TASK))
    said = capsys.readouterr().out
    assert "[link=http://evil]" in said
    assert not set(said) & set("\x1b\x07")


def test_a_page_is_known_by_the_settings_of_its_evaluation(tmp_path):
    config = {"seed": 0, "variants": ["a"], "batch_size": 3}
    environment = dict.fromkeys(("dtype", "device", "torch"), "x")
    result = {"tasks": {"t": TASK}, "config": config, "environment": environment}
    page = write_page(tmp_path / "e.html", "model", result).read_text("utf-8")
    assert page_mark({"seed": 0, "batch_size": 4}) in page
    assert page_mark({"seed": 1, "batch_size": 3}) not in page
