"""Help texts of the console command."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from quietstar.config import FIELDS, SECTIONS, Config
from quietstar.config.messages import default_text, type_text
from quietstar.config.presets import shipped_configs

_WIDTH = 100
"""Longest line on a wide terminal."""


def _console() -> Console:
    console = Console(highlight=False)
    console.width = min(console.width, _WIDTH)
    return console


def _print_rows(console: Console, rows: Sequence[tuple[Text, Text]], first_width: int) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, width=first_width)
    table.add_column()
    for row in rows:
        table.add_row(*row)
    console.print(Padding(table, (0, 0, 1, 2)))


def print_commands(summaries: Mapping[str, str]) -> None:
    """All commands, by name."""
    console = _console()
    console.print(Text("Quiet-STaR for any Hugging Face causal language model.\n"))
    console.print(Text("usage: quietstar COMMAND ...   (quietstar COMMAND --help says more)\n"))
    _print_summaries(console, {**summaries, "--version": "Print the version."})


def print_benchmarks(summaries: Mapping[str, str]) -> None:
    """All benchmarks, by name."""
    console = _console()
    console.print(
        Text("usage: quietstar bench NAME ...   (quietstar bench NAME --help says more)\n")
    )
    _print_summaries(console, summaries)


def _print_summaries(console: Console, summaries: Mapping[str, str]) -> None:
    rows = [(Text(name), Text(summary)) for name, summary in summaries.items()]
    _print_rows(console, rows, first_width=max(map(len, summaries)))


def print_train_help() -> None:
    """Options of ``quietstar train`` and every key of a config."""
    console = _console()
    console.print(
        Text("usage: quietstar train [--config FILE] [--resume auto|PATH] [--KEY VALUE ...]")
    )
    console.print(Text("       accelerate launch train.py ...   (the same, on many processes)\n"))
    width = max(len(key) for key in FIELDS) + len("--")
    shipped = ", ".join(shipped_configs())
    options = [
        ("--config FILE", f"YAML file, or one that is shipped ({shipped}); default demo."),
        ("--resume auto|PATH", "Go on from the newest checkpoint of the run, or from this one."),
        ("--allow-changes true", "Resume also under settings that make the run another one."),
        ("--controls SEEDS", "Compare the last stage with its controls, for so many seeds."),
    ]
    _print_rows(console, [(Text(name), Text(meaning)) for name, meaning in options], width)
    console.print(
        Text(
            "The keys below go into the file, by section, or on the command line, which wins."
            " Lists are written [a, b], no value is null, and a bare flag is true."
            " Single entries of a mapping: --model.config.hidden_size 64.\n"
        )
    )
    for section in SECTIONS:
        description = Config.model_fields[section].description
        console.print(Text(f"{section}: {description}", style="bold"))
        rows = [
            (Text(f"--{key}"), _describe(key)) for key in FIELDS if key.startswith(f"{section}.")
        ]
        _print_rows(console, rows, width)
    console.print(Text(f"stages: {Config.model_fields['stages'].description}", style="bold"))
    example = Text("Keys of a stage: --stages.NAME.KEY; without stages.NAME a key holds in all.")
    console.print(Padding(example, (0, 0, 1, 2)))


def _describe(key: str) -> Text:
    text = Text(f"{FIELDS[key].description}\n")
    return text.append(f"{type_text(key)}; default {default_text(key)}", style="dim")
