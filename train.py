"""Trains a Quiet-STaR model: any Hugging Face causal LM learns to think at every token.

The same as `quietstar train`, as a file for launchers. On one process and on many:

    python train.py --config configs/tiny.yaml
    accelerate launch train.py --config configs/smollm2_math.yaml --data.train text.jsonl
    torchrun --nproc-per-node 8 train.py --config configs/paper.yaml

`python train.py --help` lists every key of the config. The loop is in quietstar/training.
"""

import sys

from quietstar.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
