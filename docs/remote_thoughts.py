"""Thoughts of a server: ``python remote_thoughts.py CONFIG.yaml HOST:PORT`` starts one."""

import json
import os
import queue
import sys
import threading
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Listener

import torch
from safetensors.torch import load, save

from quietstar.backbone.devices import find_device
from quietstar.config.loading import load_config
from quietstar.errors import UserError, reason_of
from quietstar.sampling.samplers.rollout import Rollout
from quietstar.sampling.thoughts import Sampling, Texts, ThoughtBatch
from quietstar.training.build import build_model, find_tokenizer

SPEC = ("num_thoughts", "thought_length", "temperature", "seed", "top_p", "top_k")
WEIGHT = "weight "  # before the names of weights


def send(connection, header, tensors):
    """Send a message: JSON, then tensors as safetensors."""
    connection.send_bytes(json.dumps(header).encode())
    whole = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    connection.send_bytes(save(whole))


def receive(connection):
    """Return the next message."""
    return json.loads(connection.recv_bytes()), load(connection.recv_bytes())


def setting(name, default=None):
    """Return a variable of the environment, which must be set without a default."""
    value = os.environ.get(name, default)
    if value is None:
        raise UserError(f"{name}: is not set in the environment. Set it as docs/samplers.md says.")
    return value


class Remote:
    """Has a server draw the thoughts; each process of a run has one of its own."""

    def __init__(self):
        servers = setting("THOUGHT_SERVER").split(",")
        self.address = servers[int(os.environ.get("RANK", "0")) % len(servers)]
        self.key = setting("THOUGHT_SERVER_KEY").encode()
        self.every = int(setting("THOUGHT_SERVER_EVERY", "1"))
        self.timeout = float(setting("THOUGHT_SERVER_TIMEOUT", "600"))
        self.connection = self.version = None
        self.number, self.steps = 0, 0  # of the weights sent; since then

    def sample(self, model, texts, positions, spec):
        """Return the server's thoughts, after sending it newer weights if they are due."""
        if model.passes_together:
            raise UserError("thoughts.sampler (Remote): needs whole weights. Train without shards.")
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        version = sum(p._version for p in trained.values())  # every step changes them in place
        self.steps, self.version = self.steps + (version != self.version), version
        tensors = {"input_ids": texts.input_ids, "sample_ids": texts.sample_ids}
        if positions is not None:
            tensors["positions"] = positions
        if self.connection is None or self.steps >= self.every:
            self.number, self.steps = self.number + 1, 0
            tensors |= {WEIGHT + name: p for name, p in trained.items()}
        header = {
            "weights": self.number,
            "spec": {name: getattr(spec, name) for name in SPEC},
            "stop": model.thoughts.stop,
            "autocast": torch.is_autocast_enabled(texts.input_ids.device.type),
        }
        answer, drawn = self.ask(header, tensors)
        if "error" in answer:
            raise UserError(f"THOUGHT_SERVER ({self.address}): it says: {answer['error']}")
        tokens = drawn["tokens"].to(texts.input_ids.device)
        return ThoughtBatch.of_texts(texts, positions, tokens)

    def ask(self, header, tensors):
        """Wait for the answer in a thread, which is left behind if the server never gives it."""
        answers, connection, self.connection = queue.SimpleQueue(), self.connection, None

        def exchange():
            try:
                host, _, port = self.address.rpartition(":")
                line = connection or Client((host, int(port)), authkey=self.key)
                send(line, header, tensors)
                answers.put((line, receive(line)))
            except Exception as problem:
                answers.put(problem)

        threading.Thread(target=exchange, daemon=True).start()
        try:
            answer = answers.get(timeout=self.timeout)
        except queue.Empty:
            answer = TimeoutError(f"no answer within {self.timeout:g} seconds")
        if isinstance(answer, Exception):
            raise UserError(
                f"THOUGHT_SERVER ({self.address}): gives no thoughts ({reason_of(answer)}). Start "
                "it with the same THOUGHT_SERVER_KEY, and go on with --resume auto."
            ) from answer
        self.connection, answer = answer
        return answer


def serve(model, listener):
    """Answer one trainer after the other, each until it leaves."""
    while True:
        number = None
        try:
            with listener.accept() as connection:
                while True:
                    header, tensors = receive(connection)
                    try:
                        number = take_weights(model, header, tensors, number)
                        answer = {}, {"tokens": draw(model, header, tensors)}
                    except Exception as problem:
                        answer = {"error": f"{type(problem).__name__}: {reason_of(problem)}"}, {}
                    send(connection, *answer)
        except (OSError, EOFError, AuthenticationError) as problem:
            print(f"a trainer has left ({type(problem).__name__})", flush=True)


@torch.no_grad()
def take_weights(model, header, tensors, number):
    """Copy new weights into the model; return their number."""
    own = dict(model.named_parameters())
    new = {name.removeprefix(WEIGHT): x for name, x in tensors.items() if name.startswith(WEIGHT)}
    for name, x in new.items():
        own[name].copy_(x)
    if not new and number != header["weights"]:
        raise UserError(f"it has weights {number}, not {header['weights']}. Start the run again.")
    return header["weights"]


@torch.no_grad()
def draw(model, header, tensors):
    """Return the tokens that the local rollout draws."""
    if header["stop"] != model.thoughts.stop:
        model.configure(model.thoughts.model_copy(update={"stop": header["stop"]}))
    texts = {name: x.to(model.device) for name, x in tensors.items()}
    ids, spec = texts["input_ids"], Sampling(**header["spec"], stop=model.stop)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=header["autocast"]):
        return (
            Rollout()
            .sample(model, Texts(ids, ids, None, texts["sample_ids"]), texts.get("positions"), spec)
            .tokens
        )


if __name__ == "__main__":
    config = load_config(sys.argv[1], ["--thoughts.sampler", "rollout"])
    model = build_model(config, find_tokenizer(config)).to(find_device(None)).eval()
    host, _, port = sys.argv[2].rpartition(":")
    with Listener((host, int(port)), authkey=setting("THOUGHT_SERVER_KEY").encode()) as listener:
        print("thoughts at {}:{}".format(*listener.address), flush=True)
        serve(model, listener)
