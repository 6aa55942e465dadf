"""``quietstar init``: a config to start from, made for a file of records and a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from quietstar.cli import options
from quietstar.cli.options import Parser, number, whole
from quietstar.config import DataConfig
from quietstar.config.loading import load_config
from quietstar.config.starting import counted, format_of
from quietstar.errors import UserError
from quietstar.system.files import write_whole

QUESTION = "Question: {question}\nAnswer: {answer}"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
LOOKED_AT = 1000
"""Records whose fields and lengths are looked at."""
MOST_TOKENS = 1024
"""Of a text, in a config to start from."""
ANSWERS = """\
# Thinks once before each answer and learns from your answers alone; no worked solution is needed.
# A worked example before the question, in data.template, shows the model what a thought looks like:
# docs/tutorials/your-questions.md has one, and explains what to watch.
model:
  name_or_path: {model}
tuning:
  method: lora
thoughts:
  positions: answer_start
  length: 64 # tokens, at most
  lookahead: {answer} # tokens of the answer
  num_thoughts: 6
  temperature: 0.7
  start_init: "\\nLet me think:"
  end_init: " So the answer is"
  stop: ["\\n"]
  train_markers: false
mixing_head:
  fixed_weight: 1 # answers are predicted after the thought alone
loss:
  objective: verifree # reward: the probability of your answer
data:
  train: {data}
  format: qa
  question_field: {question}
  answer_field: {answer_field}
  template: {template}
  loss_on: answer
  seq_len: {seq_len}
"""
TEXTS = """\
# Thinks within your texts, before a random quarter of the tokens, as Quiet-STaR does.
# docs/tutorials/your-text.md explains what to watch.
model:
  name_or_path: {model}
tuning:
  method: lora
thoughts:
  positions: random
  position_fraction: 0.25
  length: 8
  lookahead: 4
  num_thoughts: 2
loss:
  objective: quiet_star
data:
  train: {data}
  format: {format}
  seq_len: {seq_len}
"""
TRAINING = """\
optim:
  learning_rate: 3.0e-4
  warmup_steps: {warmup}
training:
  max_steps: {max_steps} # {epochs} of {count} records
  global_batch_size: {global_batch_size}
  micro_batch_size: {micro_batch_size}
  output_dir: {output_dir}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the config, say what to run next; what is wrong raises `UserError`."""
    parser = Parser("quietstar init", "Writes a config for your records, ready to train with.")
    value = parser.value
    parser.add_argument("--data", type=options.existing, required=True, metavar="FILE",
                        help="records: question and answer, prompt and completion, messages, or "
                        "text; of JSON lines, JSON, Parquet, or plain text")  # fmt: skip
    value("--model", options.existing, MODEL, "NAME", "folder or hub id of the model")
    parser.output("--out", "config to write; default: the data's name with .yaml", ".yaml")
    value("--question-field", options.unicode_text, None, "NAME", "field of the question")
    value("--answer-field", options.unicode_text, None, "NAME", "field of the answer")
    value("--num-train-epochs", number(0.0, 1e6, above=True), 1.0, "X", "passes over the records")
    value("--per-device-train-batch-size", whole(1, 2**16), 8, "N", "texts at once")
    value("--gradient-accumulation-steps", whole(1, 2**16), 1, "N", "times in a step")
    args = parser.read(arguments)
    out = args.out or Path(args.data).with_suffix(".yaml").name
    args.out = str(out)
    parser.check(args)
    from quietstar.data.sources import raw_records

    rows = raw_records(args.data, "--data")
    records = list(islice(rows, LOOKED_AT))
    count = len(records) + sum(1 for _ in rows)
    if not records:
        raise UserError(f"--data ({args.data}): holds no record. Give a file with at least one.")
    columns = set.intersection(*(set(record) for record, _ in records))
    found = format_of(columns, None)
    question = args.question_field or found.get("data.question_field")
    answer = args.answer_field or found.get("data.answer_field")
    if (question is None) != (answer is None):
        raise UserError("--question-field: needs --answer-field, too. Give both.")
    kind = "qa" if answer else found.get("data.format", "text")
    if kind == "text" and "text" not in columns:
        raise UserError(
            f"--data ({args.data}): its records have {', '.join(sorted(columns)) or 'no field'}, "
            "but neither text nor messages nor a question with its answer. Give --question-field "
            "and --answer-field."
        )
    given = {"num_train_epochs": args.num_train_epochs,
             "per_device_train_batch_size": args.per_device_train_batch_size,
             "gradient_accumulation_steps": args.gradient_accumulation_steps}  # fmt: skip
    keys = {key.partition(".")[2]: n for key, n in counted(given, {}, count).items()}
    template = QUESTION if args.answer_field else found.get("data.template", QUESTION)
    fields = {"question_field": question, "answer_field": answer} if answer else {}
    data = DataConfig(train=args.data, format=kind, template=template, **fields)
    seq_len, longest = _lengths(args.model, records, data)
    quoted = {name: json.dumps(text, ensure_ascii=False) for name, text in (
        ("model", args.model), ("data", args.data), ("question", question),
        ("answer_field", answer), ("template", template),
        ("output_dir", f"runs/{Path(args.out).stem}"))}  # fmt: skip
    epochs = f"{args.num_train_epochs:g} epoch{'' if args.num_train_epochs == 1 else 's'}"
    text = ((ANSWERS if kind == "qa" else TEXTS) + TRAINING).format(
        **quoted, format=kind, count=f"{count:,}", epochs=epochs, answer=longest,
        seq_len=seq_len, warmup=min(10, keys["max_steps"] // 10), **keys,
    )  # fmt: skip
    write_whole(Path(args.out), text)
    load_config(args.out)  # what it says is right
    shown = Path(args.out).name if Path(args.out).parent == Path.cwd() else args.out
    options.say(f"config: {shown}")
    options.say(f"memory: quietstar train --plan --config {shown}")
    options.say(f"train:  accelerate launch train.py --config {shown}")
    return 0


def _lengths(
    model: str, records: Sequence[tuple[Mapping[str, Any], str]], data: DataConfig
) -> tuple[int, int]:
    """Choose the tokens of a text, and those of an answer, that most records fit into."""
    from quietstar.data.encoding import Encoder
    from quietstar.data.sources import read_record, record_fields
    from quietstar.data.tokenizer import load_tokenizer

    encoder, names = Encoder(load_tokenizer(model, what="--model"), data), record_fields(data)
    texts = encoder([read_record(record, names, where) for record, where in records])
    whole, longest = sorted(map(len, texts)), max(int(text.answers.sum()) for text in texts)
    most = max(1, whole[int(0.99 * (len(whole) - 1))])
    return min(MOST_TOKENS, -(-most // 32) * 32), max(2, min(64, longest + 1))
