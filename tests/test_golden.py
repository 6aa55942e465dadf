"""A short run in float32 goes the way it has gone since it was recorded (`golden.json`).

``python tests/test_golden.py`` records anew: only with a reason, said in the commit.
"""

import json
from pathlib import Path

import pytest
import torch
from tiny import plain_model, random_texts, thinking_model

GOLDEN = Path(__file__).with_name("golden.json")
SETTINGS = {
    "all positions": ({}, {}),
    "all terms": ({}, {"entropy_weight": 0.1, "policy_weight": 2.0}),
    "paper": ({}, {"estimator": "paper", "reward": "mixed", "thought_weight": 0.0}),
    "entropy": ({"positions": "entropy", "position_fraction": 0.4}, {}),
    "random": ({"positions": "random", "position_fraction": 0.4, "num_thoughts": 3}, {}),
}


def trajectory(name, block_tokens=None, steps=8):
    """Loss and gain of every step."""
    thoughts, loss = SETTINGS[name]
    model = thinking_model(plain_model(), thoughts={"length": 3, **thoughts}, loss=loss).train()
    model.learn_chunk_tokens = block_tokens
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    figures = []
    for step in range(steps):
        output = model(random_texts(3, 12, seed=step), seed=step)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        figures.append([output.loss.item(), output.metrics.means()["gain"]])
    return figures


@pytest.mark.parametrize("block_tokens", [None, 60], ids=["at once", "in groups"])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_trajectory_is_the_recorded_one(name, block_tokens):
    recorded = json.loads(GOLDEN.read_text(encoding="utf-8"))[name]
    found = trajectory(name, block_tokens)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(recorded), rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    lines = [f"{json.dumps(name)}: {json.dumps(trajectory(name))}" for name in SETTINGS]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
