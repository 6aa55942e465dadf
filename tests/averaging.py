"""train.py, but before every micro-batch the average of the weights predicts a text.

`average.jsonl` in the run folder has the log-probability of the text before the last one of every
step.
"""

import json
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

from quietstar.cli import main as cli
from quietstar.training import loop

real = loop.accumulate_gradients


def accumulate_gradients(run, step, batches, drawn=None):
    text, accumulate = torch.arange(40, 50).view(1, -1), run.strategy.accumulate

    @contextmanager
    def after_a_look(model, last):
        with torch.no_grad(), run.ema.applied(model):
            scores = model("score_plain", text.to(run.accelerator.device))
        if last and run.accelerator.is_main_process:
            with (Path(run.config.training.output_dir) / "average.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, "logprob": scores.logprobs.sum().item()}))
                file.write("\n")
        with accumulate(model, last):
            yield

    run.strategy.accumulate = after_a_look
    try:
        return real(run, step, batches, drawn)
    finally:
        run.strategy.accumulate = accumulate


if __name__ == "__main__":
    loop.accumulate_gradients = accumulate_gradients
    sys.exit(cli.main(["train", *sys.argv[1:]]))
