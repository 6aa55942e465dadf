"""Under FSDP2 and ZeRO-3 no process holds the whole model, from the file on."""

import json
import subprocess
import sys

import pytest
import torch
from launching import ROOT, marked, wrap
from tiny import plain_model, run_config

from quietstar.backbone.loading import load_base, stored_dtypes
from quietstar.config.loading import save_config

LARGE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
         "num_attention_heads": 8, "num_key_value_heads": 8}  # fmt: skip
MEASURE = """
import json, sys, threading, time
from pathlib import Path

from quietstar.config.loading import load_config
from quietstar.data import load_tokenizer
from quietstar.distributed import WrappedModule, build_strategy
from quietstar.training.build import build_accelerator, build_model

def memory():  # without the pages of mapped files, which the system takes back when it needs them
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

def watch():
    while True:
        seen.append(memory())
        time.sleep(0.002)

config = load_config(sys.argv[1])
strategy = build_strategy(build_accelerator(config), config)
tokenizer = load_tokenizer("bytes")
build_model(load_config(sys.argv[2]), tokenizer)  # imports and self-check come first
seen = [memory()]
threading.Thread(target=watch, daemon=True).start()
model = build_model(config, tokenizer, strategy)
strategy.shard(WrappedModule(model))
def size(module):
    return sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters()) * 4
figures = {"peak": max(seen) - seen[0], "whole": size(model)}
figures["layer"] = size(model.causal_lm.model.layers[0])
rank = strategy.accelerator.process_index
Path(sys.argv[3], f"{rank}.json").write_text(json.dumps(figures))
strategy.accelerator.wait_for_everyone()
strategy.accelerator.end_training()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("strategy", [marked("fsdp2"), marked("zero3")])
def test_no_process_holds_the_whole_model(strategy, tmp_path):
    """51M parameters, stored in bfloat16, to be trained in float32 by two processes."""
    plain_model(**LARGE, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    model = {"model__name_or_path": str(tmp_path / "base"), "model__config": None}
    save_config(run_config(tmp_path, **model, model__tokenizer="bytes"), tmp_path / "large.yaml")
    save_config(run_config(tmp_path), tmp_path / "tiny.yaml")
    (tmp_path / "measure.py").write_text(MEASURE, encoding="utf-8")
    files = [str(tmp_path / name) for name in ("measure.py", "large.yaml", "tiny.yaml")]
    call, environment = wrap(strategy, [*files, str(tmp_path)])
    environment["MALLOC_MMAP_THRESHOLD_"] = "262144"  # count what is held, not holes of the heap
    done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    for rank in (0, 1):
        figures = json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8"))
        slack = 24 * 2**20  # allocator and communication buffers
        assert figures["peak"] < figures["whole"] / 2 + 2 * figures["layer"] + slack, figures


def test_weights_keep_the_dtype_of_their_file_whatever_the_config_says(tmp_path):
    plain_model().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    fields = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(fields | {"dtype": "bfloat16"}), encoding="utf-8")
    model = load_base(str(tmp_path), dtype="stored")
    assert model.dtype == torch.float32
    assert stored_dtypes(model) == {torch.float32}
