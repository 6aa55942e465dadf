"""Small models, texts and run configs that the tests share."""

import json

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from quietstar import QuietStarForCausalLM
from quietstar.config import (
    Config,
    MixingHeadConfig,
    ThoughtsConfig,
    TuningConfig,
    loss_config,
)
from quietstar.data import load_tokenizer
from quietstar.sampling.samplers.rollout import Rollout
from quietstar.sampling.thoughts import Texts, ThoughtBatch

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
GPT2 = {
    "model_type": "gpt2",
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
    "bos_token_id": 256,
    "eos_token_id": 256,
}
MARKERS = {"start_init": "-", "end_init": "-"}
"""One token for the tokenizer of bytes."""
BYTES_VOCAB = 258
"""Tokens of the byte-level tokenizer."""


def plain_model(fields=LLAMA, *, dtype=torch.float32, seed=0, **more):
    """A causal LM with weights large enough that its predictions are far from uniform."""
    config = AutoConfig.for_model(**{"vocab_size": BYTES_VOCAB, **fields, **more})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.normal_(std=0.4)
    return model.to(dtype).eval()


def thinking_model(
    base=None, *, thoughts=None, loss=None, head=None, tuning=None, randomise=True, seed=1
):
    """A Quiet-STaR model; with ``randomise`` its vectors and mixing head are not the initial."""
    model = QuietStarForCausalLM.from_base(
        plain_model() if base is None else base,
        tokenizer=load_tokenizer("bytes"),
        thoughts=ThoughtsConfig(**{"length": 2, "lookahead": 2, **MARKERS, **(thoughts or {})}),
        mixing_head=MixingHeadConfig(**(head or {})),
        loss=loss_config(**(loss or {})),
        tuning=TuningConfig(**(tuning or {})),
    )
    if randomise:
        randomise_own_weights(model, seed)
    return model


def tuning_by(method):
    """Settings of a method, with three virtual tokens where it has any."""
    options = {"num_virtual_tokens": 3} if method in ("prompt", "prefix") else {}
    return {"method": method, "lora_r": 2, "options": options}


@torch.no_grad()
def randomise_own_weights(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if not name.startswith("language_model."):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)


def random_texts(batch=2, length=9, vocab=BYTES_VOCAB, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab, (batch, length), generator=generator)


def write_texts(path, count=40):
    """A .jsonl file of short sums, 14 to 38 tokens each; returns its name."""
    pairs = [(a, b) for a in range(8) for b in range(5)][:count]
    lines = [f"{a} plus {b} is {a + b}" + ", and so on" * (a % 3) for a, b in pairs]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def run_config(folder, **changes):
    """Config of a run of a few small steps in ``folder``; ``changes`` name keys with ``__``."""
    settings = {
        "model": {"config": dict(LLAMA), "tokenizer": "bytes"},
        "thoughts": {"length": 2, "lookahead": 2, "num_thoughts": 2, **MARKERS},
        "data": {"train": None, "seq_len": 12, "eval_sequences": 4, "eval_fraction": 0.2},
        "optim": {"learning_rate": 0.01, "warmup_steps": 0},
        "training": {
            "max_steps": 3,
            "global_batch_size": 8,
            "micro_batch_size": 8,
            "mixed_precision": "no",
            "cpu_threads": 1,  # the models are so small that a second thread only costs
            "eval_steps": 0,
            "save_steps": 0,
            "output_dir": str(folder / "run"),
        },
        "logging": {"report_to": [], "thought_steps": 0},
    }
    if "data__train" not in changes:
        changes["data__train"] = write_texts(folder / "texts.jsonl")
    for key, value in changes.items():
        section, name = key.split("__")
        settings.setdefault(section, {})[name] = value
    return Config.model_validate(settings)


def read_metrics(run_folder, kind=None):
    """Records of metrics.jsonl, all or of one kind."""
    text = (run_folder / "metrics.jsonl").read_text(encoding="utf-8")
    records = [json.loads(line) for line in text.splitlines()]
    return [r for r in records if kind in (None, r["kind"])]


class OneOrTwo:
    """Draws thoughts of one and of two tokens, in turn."""

    def sample(self, model, texts, positions, spec):
        batch = Rollout().sample(model, texts, positions, spec)
        lengths = 1 + torch.arange(batch.lengths[0].numel()).view(batch.lengths[0].shape) % 2
        texts = Texts(batch.input_ids, batch.labels, batch.answer_mask, batch.sample_ids)
        lengths = lengths.expand(batch.lengths.shape)
        return ThoughtBatch.of_texts(texts, batch.positions, batch.tokens, lengths)


def end_early(model):
    """Have a model's thoughts end before their most tokens."""
    model.configure(model.thoughts.model_copy(update={"sampler": "tiny:OneOrTwo"}))
    return model


def think(model, input_ids, attention_mask=None, labels=None, *, positions=None, **sampling):
    """Draw thoughts, everywhere by default, and score them."""
    texts = (attention_mask, labels)
    drawn = model.draw(input_ids, *texts, positions=positions, **sampling)
    return model.score(input_ids, drawn, *texts)
