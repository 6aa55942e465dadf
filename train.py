"""Trains a Quiet-STaR model: any Hugging Face causal LM learns to think at every token.

The same thing as `quietstar train`, as a file for launchers. On one process and on many:

    python train.py --config configs/tiny.yaml
    accelerate launch train.py --config configs/smollm2_math.yaml --data.train text.jsonl
    torchrun --nproc-per-node 8 train.py --config configs/paper.yaml

`python train.py --help` lists every key of the config. The loop is in quietstar/training.
"""

import os
import sys

import psutil

from quietstar.cli.main import EXIT_PREEMPTED, EXIT_USER_ERROR, main


def stop_launcher() -> None:
    """End ``accelerate launch`` of one process without its traceback.

    It answers a non-zero exit of this process with a Python traceback of its own, under which the
    one line that tells the user what to do would be lost.
    """
    parent = psutil.Process(os.getppid())
    words = [os.path.basename(word) for word in parent.cmdline()]
    # torch's elastic agent, which starts DeepSpeed's processes, has a traceback for signals, too.
    agent = "TORCHELASTIC_RUN_ID" in os.environ
    alone = os.environ.get("WORLD_SIZE", "1") == "1" and not agent
    if alone and "launch" in words and any(word.startswith("accelerate") for word in words):
        parent.terminate()


if __name__ == "__main__":
    code = main(["train", *sys.argv[1:]])
    if code in (EXIT_USER_ERROR, EXIT_PREEMPTED):
        stop_launcher()
    sys.exit(code)
