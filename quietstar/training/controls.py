"""Controls: is it the thinking? The last stage of a run again without one of its parts.

Each starts from the same weights, for several seeds:

- ``full``: the stage as it is.
- ``no_thoughts``: plain language modelling with as many tokens through the model.
- ``pause``: constant tokens in place of thoughts.
- ``no_reinforce``: thoughts, but no REINFORCE (policy weight 0).
- ``first_thoughts``: the model of ``full`` reads the thoughts of the model before the stage.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from scipy import stats
from transformers import PreTrainedTokenizerBase

from quietstar.config import Config
from quietstar.config.loading import load_config, save_config
from quietstar.data import Batch, build_data, load_tokenizer
from quietstar.errors import UserError
from quietstar.model.quiet_star import QuietStarForCausalLM
from quietstar.sampling.positions import count_positions
from quietstar.training.answers import right_answers
from quietstar.training.evaluation import chosen_positions
from quietstar.training.folder import CONFIG_FILE, FINAL_FOLDER, check_same_run
from quietstar.training.results import RESULTS_FILE
from quietstar.training.run import run_training

CONTROLS_FILE = "controls.json"
COUNTED_STEPS = 20
"""Steps whose thinking positions are counted, to match the compute of a control."""
LABELS = {
    "full": "Quiet-STaR",
    "no_thoughts": "no thoughts, same compute",
    "pause": "pause tokens as thoughts",
    "no_reinforce": "no REINFORCE",
    "first_thoughts": "thoughts of the model before",
}
TRAINED = ("full", "no_thoughts", "pause", "no_reinforce")


def run_controls(
    config: Config, num_seeds: int, on_report: Callable[[Path], object] | None = None
) -> Path:
    """Train all variants for every seed; returns the folder of the comparison.

    What an interrupted call has finished is kept, and what it was at goes on. ``on_report`` is
    called with the folder at the end.

    Raises:
        UserError: The last stage does not think, its texts have no answers, or training fails.
    """
    stage = list(config.stage_configs().values())[-1]
    check_comparable(config, stage)
    root = Path(f"{config.training.output_dir}_controls")
    seeds = [config.training.seed + index for index in range(num_seeds)]
    results = {seed: _run_seed(config, stage, root, seed) for seed in seeds}
    summary = summarise(results)
    save_config(config, root / CONFIG_FILE)
    (root / CONTROLS_FILE).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    Console().print(controls_table(summary))
    if on_report is not None:
        on_report(root)
    return root


def check_comparable(config: Config, stage: Config) -> None:
    """Refuse what the controls cannot compare.

    Raises:
        UserError: The last stage does not think, texts have no answers, or LoRA after a stage.
    """
    if stage.loss.objective != "quiet_star":
        raise UserError(
            "--controls: the last stage has loss.objective: next_token, but controls compare "
            "a quiet_star stage. Put one last, or leave --controls out."
        )
    if stage.data.format == "text":
        raise UserError(
            "--controls: data.format (text) has no answers whose accuracy could be compared. "
            "Set data.format: qa, or leave --controls out."
        )
    if len(config.stages) > 1 and config.tuning.method != "full":
        raise UserError(
            f"--controls: tuning.method ({config.tuning.method}) must be full in a run of several "
            "stages: every control starts from the whole model of the stages before."
        )


def _run_seed(config: Config, stage: Config, root: Path, seed: int) -> dict[str, dict[str, Any]]:
    folder = root / f"seed-{seed}"
    start = _start(config, folder, seed)
    share = thinking_share(stage, load_tokenizer(_tokenizer_of(stage, start)))
    results = {}
    for name in TRAINED:
        results[name] = _train(variant(name, stage, start, seed, folder / name, share))
    results["first_thoughts"] = _first_thoughts(stage, start, folder / "full" / FINAL_FOLDER, seed)
    return results


def _tokenizer_of(stage: Config, start: Path | None) -> str:
    return str(start or stage.model.tokenizer or stage.model.name_or_path)


def _start(config: Config, folder: Path, seed: int) -> Path | None:
    """The model that the last stage starts from: trained by the stages before it, if any."""
    if len(config.stages) < 2:
        return None
    earlier = dict(list(config.stages.items())[:-1])
    changes = {"seed": seed, "output_dir": str(folder / "start")}
    start = _changed(config, {"training": changes}, stages=earlier)
    _train(start)
    return folder / "start" / FINAL_FOLDER


def variant(
    name: str, stage: Config, start: Path | None, seed: int, folder: Path, share: float = 1.0
) -> Config:
    """Config of one variant of the stage, starting from the model in ``start`` (or its own).

    ``share`` of the tokens think (`thinking_share`).
    """
    changes: dict[str, dict[str, Any]] = {
        "training": {"seed": seed, "output_dir": str(folder), "eval_steps": 0},
    }
    if start is not None:
        changes["model"] = {"name_or_path": str(start), "config": None, "tokenizer": None}
    if name == "no_thoughts":
        changes["loss"] = {"objective": "next_token"}
        changes["training"]["max_steps"] = matched_steps(stage, share)
    elif name == "pause":
        changes |= {"thoughts": {"sampler": "pause"}, "loss": {"policy_weight": 0.0}}
    elif name == "no_reinforce":
        changes["loss"] = {"policy_weight": 0.0}
    return _changed(stage, changes)


def matched_steps(stage: Config, share: float = 1.0) -> int:
    """Steps of plain language modelling that put as many tokens through the model.

    A text token of a Quiet-STaR step costs 1 + s * K * W tokens forward and backward, s the share
    of tokens with thoughts, and 1 + s * K * T forward in the rollout, which is a third of forward
    and backward.
    """
    thoughts = stage.thoughts
    block = thoughts.length + thoughts.lookahead + 1
    learn = 1 + share * thoughts.num_thoughts * block
    rollout = (1 + share * thoughts.num_thoughts * thoughts.length) / 3
    return math.ceil(stage.training.max_steps * (learn + rollout))


def thinking_share(stage: Config, tokenizer: PreTrainedTokenizerBase) -> float:
    """Share of the tokens of a stage's sequences, padding included, that think."""
    thoughts, settings = stage.thoughts, stage.training
    if thoughts.positions == "all":
        return 1.0
    train_data, _, _ = build_data(stage.data, tokenizer, settings.seed)
    counts = []
    for step in range(min(settings.max_steps, COUNTED_STEPS)):
        batch = train_data.batch(step, settings.global_batch_size)
        counts.append(
            count_positions(
                thoughts.positions, thoughts.position_fraction, batch.labels, batch.answers
            )
        )
    return float(torch.cat(counts).float().mean()) / stage.data.seq_len


def _changed(config: Config, changes: Mapping[str, Mapping[str, Any]], stages=None) -> Config:
    tree = config.model_dump(exclude={"stages"})
    for section, values in changes.items():
        tree[section] |= values
    return Config.model_validate({**tree, "stages": stages or {}})


def _train(config: Config) -> dict[str, Any]:
    """Train, or go on, unless it is done; returns results.json."""
    results = Path(config.training.output_dir) / RESULTS_FILE
    if results.exists():
        check_finished(results.parent, config)
    else:
        is_begun = (results.parent / CONFIG_FILE).exists()
        if is_begun and not (results.parent / "checkpoints").exists():
            config = _changed(config, {"training": {"overwrite_output_dir": True}}, config.stages)
            is_begun = False
        run_training(config, resume="auto" if is_begun else None)
    return json.loads(results.read_text(encoding="utf-8"))


def check_finished(folder: Path, config: Config) -> None:
    """Refuse a finished run of other settings, whose results would be taken for these.

    Raises:
        UserError: It is one.
    """
    check_same_run(folder, config)
    before = load_config(folder / CONFIG_FILE)
    steps = [
        {name: stage.training.max_steps for name, stage in one.stage_configs().items()}
        for one in (before, config)
    ]
    if steps[0] != steps[1]:
        raise UserError(
            f"--controls: {folder} is finished with training.max_steps {steps[0]}, not {steps[1]}. "
            "Choose another training.output_dir, or remove that folder."
        )


@torch.no_grad()
def _first_thoughts(stage: Config, start: Path | None, final: Path, seed: int) -> dict[str, Any]:
    """Accuracy of the trained model with greedy thoughts of the model it started from."""
    source = str(start or stage.model.name_or_path)
    tokenizer = load_tokenizer(str(final))
    reader = QuietStarForCausalLM.from_pretrained(final)
    writer = QuietStarForCausalLM.from_base(source, tokenizer=tokenizer, thoughts=stage.thoughts)
    _, eval_data, _ = build_data(stage.data, tokenizer, seed)
    right = total = 0
    for batch in eval_data.batches(stage.training.micro_batch_size):
        part, count = _read(reader, writer.eval(), batch)
        right, total = right + part, total + count
    return {"accuracy": {"with_thoughts": right / total, "n": total}}


def _read(
    reader: QuietStarForCausalLM, writer: QuietStarForCausalLM, batch: Batch
) -> tuple[int, int]:
    positions = chosen_positions(reader, batch)
    thoughts = writer.sample(batch.input_ids, positions=positions, sample_ids=batch.sample_ids)
    inputs = (batch.input_ids, batch.attention_mask, batch.labels)
    scored = reader.think(*inputs, thoughts=thoughts, positions=positions)
    right, count = right_answers(scored.next_predicted(), batch.input_ids, batch.answers)
    return int(right), int(count)


# --- Comparing ------------------------------------------------------------------------------------


def summarise(results: Mapping[int, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """From the results by seed and variant to means with intervals, as in controls.json."""
    accuracies = {
        name: [_accuracy(name, by_name[name]) for by_name in results.values()] for name in LABELS
    }
    variants = [
        {
            "name": name,
            "label": LABELS[name],
            "accuracy": values,
            **_mean_and_interval(values),
            "right_thoughts": _right(name, results),
        }
        for name, values in accuracies.items()
    ]
    differences = [
        {
            "label": f"{LABELS['full']} minus {LABELS[name]}",
            **_mean_and_interval(
                [a - b for a, b in zip(accuracies["full"], accuracies[name], strict=True)]
            ),
        }
        for name in LABELS
        if name != "full"
    ]
    return {"seeds": list(results), "variants": variants, "differences": differences}


def _accuracy(name: str, result: Mapping[str, Any]) -> float:
    key = "without_thoughts" if name == "no_thoughts" else "with_thoughts"
    return result["accuracy"][key]


def _right(name: str, results: Mapping[int, Mapping[str, Any]]) -> list[float] | None:
    shares = [by_name[name].get("right_thoughts", {}).get("after") for by_name in results.values()]
    return None if None in shares else shares


def _mean_and_interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean and 95 % interval over seeds by Student's t; no interval of a single seed."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return {"mean": mean, "ci95": None}
    error = float(stats.sem(values))
    if error == 0:
        return {"mean": mean, "ci95": [mean, mean]}
    low, high = stats.t.interval(0.95, len(values) - 1, loc=mean, scale=error)
    return {"mean": mean, "ci95": [float(low), float(high)]}


def controls_table(summary: Mapping[str, Any]) -> Table:
    """Accuracy of every variant, for the terminal."""
    seeds = len(summary["seeds"])
    table = Table("", "accuracy", "95 % interval", title=f"held-out answers, {seeds} seeds")
    for row in (*summary["variants"], *summary["differences"]):
        interval = "" if row["ci95"] is None else "{:.3f} to {:.3f}".format(*row["ci95"])
        table.add_row(row["label"], f"{row['mean']:.3f}", interval)
    return table
