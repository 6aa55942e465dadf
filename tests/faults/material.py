"""Good models, runs, texts and configs, by relative names: what the cases then spoil."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from forking import Child, call

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"
CONFIG = """\
# A run of four steps.
model:
  config:
    model_type: llama
    hidden_size: 16
    intermediate_size: 24
    num_hidden_layers: 2
    num_attention_heads: 2
    num_key_value_heads: 1
    max_position_embeddings: 64
  tokenizer: bytes
thoughts: {length: 2, lookahead: 2, num_thoughts: 2}
data:
  train: texts.jsonl
  seq_len: 12
  eval_sequences: 4
  eval_fraction: 0.2
optim: {learning_rate: 0.01, warmup_steps: 0}
training:
  max_steps: 4
  global_batch_size: 4
  micro_batch_size: 4
  mixed_precision: "no"
  cpu_threads: 1
  eval_steps: 2
  save_steps: 2
  save_total_limit: 2
  output_dir: run
logging: {report_to: [], thought_steps: 0}
"""
HARNESS_TASK = """\
task: own
dataset_path: json
dataset_kwargs: {data_files: {test: harness/rows.jsonl}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{text}}"
doc_to_target: " {{answer}}"
metric_list: [{metric: acc}]
"""
COMMANDS: dict[str, list[str]] = {
    "train": ["train", "--config", "new.yaml"],
    "resume": ["train", "--config", "longer.yaml", "--resume", "auto"],
    "plan": ["train", "--plan", "--config", "new.yaml"],
    "eval": ["eval", "--model", "full", "--tasks", "items.jsonl", "--limit", "3"],
    "generate": ["generate", "--model", "full", "--prompt", "two and", "--max-new-tokens", "2"],
    "chat": ["generate", "--chat", "--model", "full", "--max-new-tokens", "2"],
    "inspect": ["generate", "--model", "full", "--inspect", "two plus two is four"],
    "export": ["export", "--model", "lora", "--out", "merged"],
    "lm-eval": ["eval", "lm-eval", "run", "--model", "quietstar", "--model_args", "pretrained=full",
                "--tasks", "own", "--include_path", "harness", "--limit", "2"],
}  # fmt: skip
"""Command lines that work in a folder of this material, by what is done."""


def command(name: str, *more: str, **options: str | None) -> list[str]:
    """Return a command line that works, with some options replaced; None takes an option out."""
    line = list(COMMANDS[name])
    for key, value in options.items():
        option = (
            "--" + key if key in ("model_args", "include_path") else "--" + key.replace("_", "-")
        )
        if option in line:
            place = line.index(option)
            line[place : place + 2] = [] if value is None else [option, value]
        elif value is not None:
            line += [option, value]
    return [*line, *more]


def build(folder: Path) -> None:
    """Fill a new folder."""
    folder.mkdir(parents=True)
    lines = [
        f"{a} plus {b} is {a + b}" + ", and so on" * (a % 3) for a in range(8) for b in range(5)
    ]
    write_lines(folder / "texts.jsonl", [{"text": line} for line in lines])
    write_lines(
        folder / "qa.jsonl", [{"question": line, "answer": f" {n}"} for n, line in enumerate(lines)]
    )
    turns = [
        [{"role": "user", "content": x}, {"role": "assistant", "content": x[::-1]}] for x in lines
    ]
    write_lines(folder / "chats.jsonl", [{"messages": chat} for chat in turns])
    (folder / "text.txt").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    write_lines(
        folder / "items.jsonl",
        [
            {"prompt": "two and two is", "answer": " four"},
            {"prompt": "one and one is", "answer": " 2"},
            {"text": "a text of more than a few words"},
            {"prompt": "six and", "answer": " six"},
        ],
    )
    (folder / "harness").mkdir()
    write_lines(folder / "harness" / "rows.jsonl",
                [{"text": f"{n} and {n} is", "answer": str(2 * n)} for n in range(4)])  # fmt: skip
    (folder / "harness" / "own.yaml").write_text(HARNESS_TASK)
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "longer.yaml").write_text(CONFIG.replace("max_steps: 4", "max_steps: 6"))
    new = CONFIG.replace("output_dir: run", "output_dir: new").replace(
        "max_steps: 4", "max_steps: 1"
    )
    (folder / "new.yaml").write_text(new)
    (folder / "user_notes.txt").write_text("not to be lost\n")
    call(lambda: _models(folder), folder.parent)
    for line in (["train", "--config", "config.yaml"],
                 command("eval", "--out", "figures.json")):  # fmt: skip
        outcome = Child(line, folder, place=folder.parent, as_root=True).wait(120)
        if outcome.code != 0:
            raise RuntimeError(f"{line}: exit {outcome.code}\n{outcome.said}\n{outcome.traceback}")


def _models(folder: Path) -> None:
    """A plain model, a trained one with all its weights, and one with adapters."""
    os.chdir(folder)
    import torch
    from tiny import plain_model, randomise_own_weights

    from quietstar import QuietStarForCausalLM
    from quietstar.config import ThoughtsConfig, TuningConfig
    from quietstar.data import load_tokenizer

    tokenizer = load_tokenizer("bytes")
    tokenizer.chat_template = TEMPLATE
    plain_model(max_position_embeddings=128, eos_token_id=256).save_pretrained("plain")
    tokenizer.save_pretrained("plain")
    for name, method in (("full", "full"), ("lora", "lora")):
        torch.manual_seed(0)
        model = QuietStarForCausalLM.from_base(
            "plain", tokenizer=tokenizer, thoughts=ThoughtsConfig(length=2, lookahead=2),
            tuning=TuningConfig(method=method, lora_r=2),
        )  # fmt: skip
        randomise_own_weights(model)
        model.eval().save_pretrained(Path(name), tokenizer)


def write_lines(path: Path, records: list[object]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def copy(material: Path, place: Path) -> Path:
    """Copy it into the folder ``work`` of a place."""
    return Path(shutil.copytree(material, place / "work", symlinks=True))
