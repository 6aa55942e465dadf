"""Draws the pictures of docs/idea.md from a trained demo, into docs/pictures.

accelerate launch train.py
python eval/run.py --model runs/demo --tasks demo --controls --out figures.json
python docs/draw_pictures.py runs/demo figures.json
"""

from __future__ import annotations

import json
import sys
from html import escape
from pathlib import Path

import torch

from quietstar import QuietStarForCausalLM
from quietstar.data import load_tokenizer
from quietstar.losses.estimators import leave_one_out
from quietstar.model.scoring import next_logits

PLACE = Path(__file__).with_name("pictures")
STYLE = """
text { font: 15px system-ui, sans-serif; fill: #1b1f24 }
.mono { font-family: ui-monospace, Menlo, Consolas, monospace } .small { font-size: 13px }
.muted { fill: #59616b } .middle { text-anchor: middle } .end { text-anchor: end }
.bold { font-weight: 600 } .line { stroke: #59616b; fill: none; stroke-width: 1.5 }
.base { fill: #4c535b } .thought { fill: #009e73 } .mixed { fill: #0072b2 }
.swapped { fill: #d55e00 } .pause { fill: #b8619a } .other { fill: #7d5a48 }
.box { fill: #e9eef2 } .soft { fill: #d5efe6 } .grid { fill: #eceff1 }
@media (prefers-color-scheme: dark) {
  text { fill: #e9ebee } .muted { fill: #a5adb7 } .line { stroke: #a5adb7 }
  .base { fill: #b9c0c8 } .thought { fill: #1fb58a } .mixed { fill: #56b4e9 }
  .swapped { fill: #e5742a } .pause { fill: #cc79a7 } .other { fill: #c49a82 }
  .box { fill: #2a323b } .soft { fill: #1d4437 } .grid { fill: #262d36 }
}"""
PROBLEM = "Mia stands on 4 . She does spin hop bow turn . Now Mia stands on"
SEED = 4
"""With it the four thoughts of the picture are of different worth."""
CHARACTER = 9.1
"""Width of a character of the fixed font, in pixels."""


class Picture:
    """Shapes of one SVG file."""

    def __init__(self, width: int, height: int, says: str) -> None:
        self.size, self.says = (width, height), says
        self.parts: list[str] = []

    def text(self, x: float, y: float, content: str, kind: str = "") -> None:
        """Writes one line."""
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(content)}</text>')

    def box(self, x: float, y: float, width: float, height: float, kind: str) -> None:
        """Draws a filled box."""
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 1):.1f}" height="{height:.1f}" '
            f'rx="3" class="{kind}"/>'
        )

    def arrow(self, *points: tuple[float, float]) -> None:
        """Draws a line with a head at its end."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polyline points="{path}" class="line" marker-end="url(#head)"/>')

    def tokens(self, x: float, y: float, words: list[str], kind: str) -> list[float]:
        """Writes words in boxes, one behind the other; returns where their middles are."""
        middles = []
        for word in words:
            width = CHARACTER * len(word) + 8
            self.box(x, y - 18, width, 25, kind)
            self.text(x + 4, y, word, "mono")
            middles.append(x + width / 2)
            x += width + 4
        return middles

    def bars(
        self, x: float, y: float, rows: list[tuple[str, float, str, str]], width: float
    ) -> None:
        """Draws a bar for each name, share and label, below each other."""
        for name, share, kind, label in rows:
            self.text(x - 8, y + 14, name, "end")
            self.box(x, y, width * share, 18, kind)
            self.text(x + max(width * share, 1) + 6, y + 14, label, "small")
            y += 27

    def save(self, name: str) -> None:
        """Writes the file."""
        width, height = self.size
        (PLACE / name).write_text(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">'
            f"<title>{escape(self.says)}</title><style>{STYLE}</style>"
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            'markerHeight="7" orient="auto"><path d="M0,0 L8,4 L0,8 z" class="muted"/></marker>'
            f"</defs>{''.join(self.parts)}</svg>\n",
            encoding="utf-8",
        )


def draw_thought(words: list[str], thought: list[str], plain: str, thinking: str) -> None:
    """The text, and a thought between its last token and the next."""
    picture = Picture(860, 190, "A thought between a text and its next token")
    middles = picture.tokens(20, 40, words, "box")
    picture.text(20, 82, "the text", "muted small")
    picture.arrow((middles[-1] + 14, 34), (middles[-1] + 44, 34))
    picture.text(middles[-1] + 50, 40, plain, "mono bold")
    picture.text(middles[-1] + 50, 62, "without", "muted small")
    x = middles[-1] - 250
    picture.arrow((middles[-1], 50), (middles[-1], 88), (x + 20, 88), (x + 20, 104))
    inner = picture.tokens(x, 130, ["start", *thought, "end"], "soft")
    picture.text(x, 176, "the thought: where she stands after each move", "muted small")
    picture.arrow((inner[-1] + 24, 124), (inner[-1] + 54, 124))
    picture.text(inner[-1] + 60, 130, thinking, "mono bold")
    picture.text(inner[-1] + 60, 152, "with it", "muted small")
    picture.save("thought.svg")


def draw_parallel(count: int = 6, length: int = 3) -> None:
    """Which tokens attend to which, for thoughts behind every token."""
    cell, left, top = 22, 190, 60
    picture = Picture(760, top + (count + count * length) * cell + 20, "The attention mask")
    columns = [f"x{i + 1}" for i in range(count)] + ["own thought"]
    for i, name in enumerate(columns[:-1]):
        picture.text(left + i * cell + cell / 2, top - 8, name, "middle small")
    picture.text(left + (count + 0.5) * cell, top - 8, "its own thought", "small")
    y = top
    for i in range(count):
        picture.text(left - 10, y + 16, f"text x{i + 1}", "end small")
        for j in range(count):
            picture.box(left + j * cell, y, cell - 2, cell - 2, "mixed" if j <= i else "grid")
        y += cell
    for i in range(count):
        for t in range(length):
            word = ("start", *(f"t{n + 1}" for n in range(length - 1)))[t]
            picture.text(left - 10, y + 16, f"behind x{i + 1}: {word}", "end small")
            for j in range(count):
                picture.box(left + j * cell, y, cell - 2, cell - 2, "mixed" if j <= i else "grid")
            for j in range(length):
                kind = "thought" if j <= t else "grid"
                picture.box(left + (count + 0.5 + j) * cell, y, cell - 2, cell - 2, kind)
            y += cell
    x = left + (count + length + 1.5) * cell
    for n, line in enumerate(
        ["Every thought reads the text", "up to its token, and itself.", "",
         "No thought reads another one,", "so all are written at once:", "",
         "one pass for the text, then", "one for each thought token,",
         "however long the text is."]
    ):  # fmt: skip
        picture.text(x, top + 20 + 22 * n, line)
    picture.save("parallel.svg")


def draw_mixture(rows: dict[str, list[float]], weight: float, truth: int) -> None:
    """The predictions of the answer: plain, behind the thought, and mixed."""
    picture = Picture(860, 232, "Three predictions of the answer")
    for n, (name, chances) in enumerate(rows.items()):
        x = 20 + 285 * n
        picture.text(x, 26, name, "bold")
        for place, chance in enumerate(chances):
            height = 130 * chance
            kind = ("base", "thought", "mixed")[n]
            picture.box(x + 25 * place, 170 - height, 20, max(height, 1), kind)
            bold = "middle bold" if place == truth else "middle muted"
            picture.text(x + 25 * place + 10, 190, str(place), bold)
        label = f"P({truth}) = {chances[truth]:.3f}"
        label += f", mixing weight {weight:.2f}" if n == 2 else ""
        picture.text(x, 216, label, "small")
    picture.save("mixture.svg")


def draw_reward(thoughts: list[str], rewards: list[float], advantages: list[float]) -> None:
    """Several thoughts of one place, what each achieved, and what is reinforced."""
    picture = Picture(860, 70 + 38 * len(thoughts), "Thoughts, their rewards and advantages")
    for x, name in ((20, "thought"), (330, "reward: log P(answer)"), (570, "advantage")):
        picture.text(x, 26, name, "bold")
    most = max(map(abs, advantages))
    for n, row in enumerate(zip(thoughts, rewards, advantages, strict=True)):
        thought, reward, advantage = row
        y = 58 + 38 * n
        picture.tokens(20, y, thought.split(), "soft")
        picture.text(330, y, f"{reward:+.2f}".replace("-", "−"), "mono")
        width = 110 * abs(advantage) / most
        middle = 690
        kind = "thought" if advantage > 0 else "swapped"
        picture.box(middle if advantage > 0 else middle - width, y - 14, width, 18, kind)
        word = "more of it" if advantage > 0 else "less of it"
        picture.text(middle + 8 if advantage < 0 else middle - 8, y,
                     word, "small" if advantage < 0 else "small end")  # fmt: skip
    picture.save("reward.svg")


def draw_content(task: dict) -> None:
    """The accuracy with the model's own thoughts, and with each control."""
    names = {"shuffled": "shuffled thoughts", "pause": "pause tokens", "generic": "a generic text",
             "blank": "blank thoughts", "swapped": "swapped thoughts"}  # fmt: skip
    rows = [("own thoughts", task["with_thoughts"]["accuracy"], "mixed", ""),
            ("no thoughts", task["without_thoughts"]["accuracy"], "base", "")]  # fmt: skip
    rows += [(names[control], task["controls"][control]["accuracy"],
              control if control in ("swapped", "pause") else "other", "")
             for control in ("swapped", "shuffled", "pause", "generic", "blank")]  # fmt: skip
    picture = Picture(760, 40 + 27 * len(rows), "Accuracy with own thoughts and with controls")
    rows = [(name, share, kind, f"{share:.3f}") for name, share, kind, _ in rows]
    picture.bars(180, 20, rows, 480)
    picture.save("content.svg")


@torch.no_grad()
def main(run: str, figures: str) -> None:
    """Thinks about one problem, and draws it."""
    folder = Path(run) / "final"
    model, tokenizer = QuietStarForCausalLM.from_pretrained(folder), load_tokenizer(str(folder))
    ids = tokenizer(PROBLEM, return_tensors="pt").input_ids
    last = torch.tensor([[ids.shape[1] - 1]])
    own = model.draw(ids, positions=last).tokens
    plain = model(ids, think=False).logits[0, -1].softmax(-1)
    mixed = next_logits(model, ids, own, last)[0, -1].softmax(-1)
    behind = next_logits(model, ids, own, last, fixed_mixing_weight=1.0)[0, -1].softmax(-1)
    places = [tokenizer.convert_tokens_to_ids(str(n)) for n in range(10)]
    truth = int(mixed[places].argmax())
    thought = tokenizer.decode(own[0, 0, 0]).split()
    answer = str(truth)
    draw_thought(PROBLEM.split()[-11:], thought, str(int(plain[places].argmax())) + " ?", answer)
    draw_parallel()
    longer = torch.cat([ids, torch.tensor([[places[truth]]])], 1)
    weight = model.score(longer, own, positions=last).mixing_weight[0, 0, 0, 0].item()
    rows = {"plain": plain, "behind the thought": behind, "mixed": mixed}
    draw_mixture({k: v[places].tolist() for k, v in rows.items()}, weight, truth)
    drawn = model.draw(longer, num_thoughts=4, temperature=1.5, positions=last, seed=SEED)
    several = model.score(longer, drawn)
    reward = several.thought_logprobs[0, 0, :, 0]
    advantage = leave_one_out(reward[None, None], None)[0, 0]
    texts = tokenizer.batch_decode(several.tokens[0, 0])
    draw_reward(texts, reward.tolist(), advantage.tolist())
    draw_content(json.loads(Path(figures).read_text())["tasks"]["demo"])


if __name__ == "__main__":
    main(*sys.argv[1:])
