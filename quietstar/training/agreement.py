"""All ranks of a launch train the same run on the same texts, or none does."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from quietstar.backbone.loading import HUB_ID, split_revision
from quietstar.config import Config
from quietstar.config.messages import shortened
from quietstar.data import DataReport, EvalData, TrainData
from quietstar.data.batches import FIRST_SAMPLES
from quietstar.errors import UserError
from quietstar.system.inputs import open_input
from quietstar.system.processes import Processes
from quietstar.training.run_dir import flat, inputs_of
from quietstar.version import __version__

BLOCK, MOST_BLOCKS = 2**20, 1024
"""Bytes of a block of a file, and blocks that are read of one input: all of it up to a gigabyte."""
ENDINGS = {".jsonl", ".json", ".txt", ".parquet", ".safetensors", ".model", ".j2", ".jinja"}
"""Of the files of a folder that are data, weights, settings or tokenizers."""
MOST_SHOWN = 4
logger = logging.getLogger(__name__)


def check_agreement(
    config: Config, processes: Processes, data: Sequence[tuple[TrainData, EvalData, DataReport]]
) -> None:
    """Compares the ranks' configs, texts and files, in one exchange.

    Files of more than a gigabyte are compared by evenly spaced parts, models on the hub by their
    commit, and texts from anywhere by those of the evaluations and the first ones of training.

    Raises:
        UserError: On all ranks, if two of them differ.
    """
    if processes.count == 1:
        return
    facts, digests = flat(config), {}
    for (stage, stage_config), (train, held_out, report) in zip(
        config.stage_configs().items(), data, strict=True
    ):
        prefix = f"stages.{stage}." if config.stages else ""
        for key, name in inputs_of(stage_config):
            if name not in digests:
                digests[name] = digest_input(name)
            facts[f"the content of {prefix}{key}"] = digests[name]
        digest = hashlib.blake2b(digest_size=6)
        first = train.samples.read(0, FIRST_SAMPLES, range(FIRST_SAMPLES))
        for text in (*held_out.samples, *first):
            for part in (text.ids, text.targets, text.marked):
                digest.update(part.tobytes())
        count = "a stream" if report.documents is None else f"{report.documents:,} documents"
        facts[f"the content of {prefix}data"] = f"{count}, {digest.hexdigest()}"
    versions = {name: version(name) for name in ("torch", "transformers", "tokenizers")}
    versions["quietstar"] = __version__
    facts |= {f"the version of {name}": number for name, number in versions.items()}
    ranks = processes.gather(lambda: facts)
    differences = []
    for key in dict.fromkeys(key for one in ranks for key in one):
        values = [one.get(key, "absent") for one in ranks]
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is None:
            continue
        first, second = (shortened(value, 200) for value in (values[0], values[other]))
        text = f"{key} is {first} on rank 0 and {second} on rank {other}"
        if not key.startswith("the version of"):
            differences.append(text)
        elif processes.is_main:
            logger.warning("%s: they may compute different numbers", text)
    if differences:
        more = len(differences) - MOST_SHOWN
        rest = f"; and {more} more" if more > 0 else ""
        raise UserError(
            f"the ranks of this launch differ: {'; '.join(differences[:MOST_SHOWN])}{rest}. Start "
            "all with one config, and the same data and models on every machine."
        )


def digest_input(name: str) -> str:
    """Returns size and digest of a file, or of those of a folder; of a hub model its commit."""
    path = Path(name).expanduser()
    if not path.exists():
        (hub_id, revision), found = split_revision(name), None
        if HUB_ID.fullmatch(hub_id):
            found = try_to_load_from_cache(hub_id, "config.json", revision=revision)
        return Path(found).parent.name if isinstance(found, str) else "no file"
    paths = [path]
    if path.is_dir():
        inside = (p for p in path.rglob("*") if p.suffix in ENDINGS and p.is_file())
        paths = sorted(p for p in inside if not p.name.startswith("."))
    sizes = [p.stat().st_size for p in paths]
    step = max(BLOCK, sum(sizes) // MOST_BLOCKS)
    digest = hashlib.blake2b(digest_size=6)
    for file, size in zip(paths, sizes, strict=True):
        digest.update(f"{file.relative_to(path)} {size}\n".encode())
        with open_input(file) as stream:
            for place in (*range(0, size, step), max(0, size - BLOCK)):
                stream.seek(place)
                digest.update(stream.read(BLOCK))
    return f"{sum(sizes):,} bytes, {digest.hexdigest()}"
