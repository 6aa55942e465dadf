"""Controls: does the thinking make the difference? The last stage again without one of its parts.

All variants start from the same weights, and are trained for several seeds (adapters of earlier
stages are merged into their base first):

- ``full``: the stage as it is.
- ``no_thoughts``: plain language modeling at equal FLOPs, by what ``full`` has counted.
- ``equal_tokens``: plain language modeling on the same texts, each as often as ``full`` reads it.
- ``pause``: constant tokens in place of thoughts.
- ``no_reinforce``: thoughts, but no REINFORCE (policy weight 0).
- ``first_thoughts``: the model of ``full`` reads the thoughts of the model before the stage.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table

from quietstar import registry
from quietstar.config import Config
from quietstar.config.loading import save_config
from quietstar.data import build_data, load_tokenizer
from quietstar.distributed import from_main_process
from quietstar.errors import UserError, reading
from quietstar.evaluation.statistics import mean_over_seeds
from quietstar.model.markers import marker_tokens
from quietstar.model.merging import merge
from quietstar.model.quiet_star import QuietStarForCausalLM
from quietstar.model.tuning import PEFT_METHODS, WHOLE
from quietstar.system import files
from quietstar.training.build import build_accelerator, hub_source
from quietstar.training.costs import with_eval_sequences
from quietstar.training.evaluation import RESULTS_FILE, chosen_positions, score_batch
from quietstar.training.reporter import METRICS_FILE, read_metrics
from quietstar.training.run import run_training
from quietstar.training.run_dir import (
    CONFIG_FILE,
    FINAL_FOLDER,
    check_own,
    check_same_run,
    hold,
    mark,
)

CONTROLS_FILE = "controls.json"
LABELS = {
    "full": "Quiet-STaR",
    "no_thoughts": "no thoughts, equal FLOPs",
    "equal_tokens": "no thoughts, equal tokens",
    "pause": "pause tokens as thoughts",
    "no_reinforce": "no REINFORCE",
    "first_thoughts": "thoughts of the model before",
}
PLAIN = ("no_thoughts", "equal_tokens")
TRAINED = ("full", *PLAIN, "pause", "no_reinforce")


def run_controls(
    config: Config, num_seeds: int, on_report: Callable[[Path, str], object] | None = None
) -> Path:
    """Trains all variants for every seed and compares them; returns the folder of the comparison.

    An interrupted call goes on: finished variants are kept, the current one resumes. All processes
    of a launch take part in every variant, and the main process alone writes the comparison. Seeds
    count up from ``training.seed``; ``on_report`` is called on the main process with each run
    folder whose figures changed.

    Raises:
        UserError: The last stage does not think, its texts have no answers, or training fails.
    """
    config = with_eval_sequences(config)  # the same texts for all variants, whatever they cost
    stage = list(config.stage_configs().values())[-1]
    check_comparable(config, stage)
    root = Path(f"{config.training.output_dir}_controls")
    accelerator = build_accelerator(config)

    def train(one: Config) -> dict[str, Any]:
        folder = Path(one.training.output_dir)
        if not from_main_process(accelerator, lambda: _is_finished(folder, one)):
            # A run that failed before its first checkpoint begins anew.
            run_training(one, resume="auto", overwrite=True, on_report=on_report, more_runs=True)

        def read() -> dict[str, Any]:
            path = folder / RESULTS_FILE
            with reading(f"--controls ({path})", "Remove the folder, and its run begins anew."):
                return json.loads(path.read_text(encoding="utf-8"))

        return from_main_process(accelerator, read)

    def begin() -> None:
        check_own(root)
        stack.enter_context(hold(root))
        mark(root)

    with ExitStack() as stack:
        from_main_process(accelerator, begin)
        by_seed = {}
        for seed in range(config.training.seed, config.training.seed + num_seeds):
            folder, start = root / f"seed-{seed}", None
            if len(config.stages) > 1:
                earlier = dict(list(config.stages.items())[:-1])
                changes = {"seed": seed, "output_dir": str(folder / "start")}
                train(_changed(config, {"training": changes}, stages=earlier))
                start = folder / "start" / FINAL_FOLDER
                if config.tuning.method in PEFT_METHODS:
                    # All variants, the full one too, begin with fresh adapters on the merged base.
                    trained, start = start, start.with_name("merged")
                    if not from_main_process(accelerator, start.exists):
                        from_main_process(accelerator, partial(merge, trained, start))
            source = str(start or stage.model.tokenizer or stage.model.name_or_path)
            source, hub = hub_source(source, stage)
            tokenizer = load_tokenizer(source, **hub)
            num_markers = sum(map(len, marker_tokens(tokenizer, stage.thoughts)))

            def count_steps(folder=folder, num_markers=num_markers) -> int:
                records, _ = read_metrics(folder / "full" / METRICS_FILE)
                return matched_steps(stage, records, num_markers)

            results = {"full": train(variant("full", stage, start, seed, folder / "full"))}
            steps = from_main_process(accelerator, count_steps)
            for name in TRAINED[1:]:
                results[name] = train(variant(name, stage, start, seed, folder / name, steps))
            final = folder / "full" / FINAL_FOLDER
            results["first_thoughts"] = _first_thoughts(accelerator, stage, start, final, seed)
            by_seed[seed] = results
        if accelerator.is_main_process:
            summary = summarize(by_seed)
            save_config(config, root / CONFIG_FILE)
            files.write_json(root / CONTROLS_FILE, summary)
            table = Table(
                "", "accuracy", "95 % interval", title=f"held-out answers, {num_seeds} seeds"
            )
            for row in (*summary["variants"], *summary["differences"]):
                interval = "" if row["ci95"] is None else "{:.3f} to {:.3f}".format(*row["ci95"])
                table.add_row(row["label"], f"{row['mean']:.3f}", interval)
            Console().print(table)
            if on_report is not None:
                on_report(root, "")
        accelerator.wait_for_everyone()
    accelerator.end_training()
    return root


def check_comparable(config: Config, stage: Config) -> None:
    """Raises UserError unless the last stage thinks about answers, and variants can start alike."""
    method = config.tuning.method
    is_staged = len(config.stages) > 1
    rules = (
        (stage.loss.thinks, f"the last stage has loss.objective: {stage.loss.objective}, but "
         "controls compare a stage that thinks. Put one last"),
        (stage.data.format != "text", "data.format (text) has no answers whose accuracy could be "
         "compared. Set data.format: qa"),
        (not is_staged or method in (*WHOLE, *PEFT_METHODS), f"tuning.method ({method}) must be "
         f"full, galore or adapters that can be merged ({', '.join(PEFT_METHODS)}) in a run of "
         "several stages: every control starts from the model of the stages before. Choose one"),
    )  # fmt: skip
    for is_kept, problem in rules:
        if not is_kept:
            raise UserError(f"--controls: {problem}, or leave --controls out.")


def variant(
    name: str,
    stage: Config,
    start: Path | None,
    seed: int,
    folder: Path,
    equal_flops: int = 1,
) -> Config:
    """Returns the config of one variant of the stage, by its name in `TRAINED`.

    It starts from the model in ``start``, None for the stage's own, and runs in ``folder``;
    ``equal_flops`` are the steps of ``no_thoughts`` (`matched_steps`).
    """
    training = {"seed": seed, "output_dir": str(folder), "eval_steps": 0}
    changes: dict[str, dict[str, Any]] = {"training": training}
    if start is not None:
        changes["model"] = {"name_or_path": str(start), "config": None, "tokenizer": None}
    if name in PLAIN:
        changes["loss"] = {"objective": "next_token"}
    if name == "no_thoughts":
        training["max_steps"] = equal_flops
    if name == "pause":
        changes["thoughts"] = {"sampler": "pause"}
    if name in ("pause", "no_reinforce"):
        changes["loss"] = {"policy_weight": 0.0}
    return _changed(stage, changes)


def matched_steps(stage: Config, records: Sequence[Mapping[str, Any]], num_markers: int) -> int:
    """Returns the steps of plain language modeling at the FLOPs of a run of the stage that thinks.

    A token costs one unit forward and two backward, so by the run's own counts (``records``, those
    of metrics.jsonl), with S text tokens in a step, N thoughts and M tokens in all of these, a step
    costs

        3 (S + M + N (markers + A - 1)) + M,

    text, thoughts, and the A - 1 true tokens after each forward and backward, and the M sampled
    tokens forward. (To sample M tokens takes as many forward: the start of a thought stands in for
    its last token.) With inner epochs the first term counts so many times. A reference reads the
    text forward; one that thoughts are compared with reads these too, and then they are drawn in a
    pass of their own over the text. A plain step costs 3 S. Texts count with their padding to the
    longest of a micro-batch, thoughts that end early with the tokens they have. The mixing head and
    the output layer, which also predicts in plain training, are left out. A plain student learns
    from the text alone, 3 S, and its teacher reads text and thoughts forward: those of another run
    cost this one nothing.
    """
    thoughts, settings = stage.thoughts, stage.training
    objective = registry.find("loss.objective", stage.loss.objective)(stage.loss)
    has_reference = objective.reads_reference(stage.loss.reward)
    is_compared = has_reference and (objective.kl_weight > 0 or objective.needs_log_ratio)
    texts, costs = [], []
    for record in (record for record in records if record["kind"] == "train"):
        sampled = round(record["thought_tokens_per_second"] * record["seconds"])
        text = round(record["text_tokens_per_second"] * record["seconds"])
        of_text = record.get("positions_per_text")  # absent where all positions think
        places = text if of_text is None else of_text * settings.global_batch_size
        lookahead = record.get("lookahead", thoughts.lookahead)  # where it is scheduled
        behind = round(places) * thoughts.num_thoughts * (num_markers + int(lookahead) - 1)
        texts.append(text)
        learned = text + sampled + behind
        if objective.student == "plain":
            costs.append(3 * text + bool(sampled) * (learned + sampled))
            continue
        cost = 3 * settings.inner_epochs * learned + sampled
        costs.append(cost + has_reference * text + is_compared * learned)
    return -(-settings.max_steps * sum(costs) // (3 * sum(texts)))


def _changed(config: Config, changes: Mapping[str, Mapping[str, Any]], stages=None) -> Config:
    tree = config.model_dump(exclude={"stages"})
    for section, values in changes.items():
        tree[section] |= values
    return Config.model_validate({**tree, "stages": stages or {}})


def _is_finished(folder: Path, config: Config) -> bool:
    """Returns True if an earlier call has finished a run.

    Raises UserError if it is one of other settings, whose results would be taken for this one's.
    """
    if not (folder / RESULTS_FILE).exists():
        return False
    _, changes = check_same_run(folder, config)
    if longer := [change for change in changes if "training.max_steps was" in change]:
        raise UserError(
            f"--controls: {folder} is finished, and its {'; '.join(longer)}. "
            "Choose another training.output_dir, or remove that folder."
        )
    return True


@torch.no_grad()
def _first_thoughts(
    accelerator: Accelerator, stage: Config, start: Path | None, final: Path, seed: int
) -> dict[str, Any]:
    """Scores the trained model with greedy thoughts of the model that it started from."""
    trust = stage.model.trust_remote_code
    tokenizer = load_tokenizer(str(final), trust_remote_code=trust)
    source, hub = hub_source(str(start or stage.model.name_or_path), stage)
    writer = QuietStarForCausalLM.from_base(
        source, tokenizer=tokenizer, thoughts=stage.thoughts, **hub
    )
    reader = QuietStarForCausalLM.from_pretrained(final, trust_remote_code=trust)
    reader.to(accelerator.device)
    writer.to(accelerator.device).eval()
    _, eval_data, _ = build_data(stage.data, tokenizer, seed, stage.thoughts)
    counts = torch.zeros(2, dtype=torch.int64, device=accelerator.device)
    for index, batch in enumerate(eval_data.batches(stage.training.micro_batch_size)):
        if index % accelerator.num_processes != accelerator.process_index:
            continue
        batch = batch.to(accelerator.device)
        positions = chosen_positions(reader, batch)
        drawn = writer.draw(batch.input_ids, positions=positions, sample_ids=batch.sample_ids)
        metrics, key = score_batch(reader, batch, drawn.tokens, positions), "accuracy_with_thoughts"
        counts += torch.stack(metrics.sums[key])
    right, total = accelerator.reduce(counts, "sum").tolist()  # pyright: ignore
    return {"accuracy": {"with_thoughts": right / total, "n": total}}


def summarize(results: Mapping[int, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Turns the results by seed and variant into means with intervals, as in controls.json."""
    variants, differences = [], []
    for name, label in LABELS.items():
        of_seeds = [by_name[name] for by_name in results.values()]
        key = "without_thoughts" if name in PLAIN else "with_thoughts"
        accuracy = [one["accuracy"][key] for one in of_seeds]
        right = [one.get("right_thoughts", {}).get("after") for one in of_seeds]
        right = None if None in right else right
        row = {"name": name, "label": label, "accuracy": accuracy}
        variants.append({**row, **mean_over_seeds(accuracy), "right_thoughts": right})
        if name != "full":
            gaps = [a - b for a, b in zip(variants[0]["accuracy"], accuracy, strict=True)]
            title = f"{LABELS['full']} minus {label}"
            differences.append({"label": title, **mean_over_seeds(gaps)})
    return {"seeds": list(results), "variants": variants, "differences": differences}
