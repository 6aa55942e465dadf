"""``quietstar generate``, ``chat`` and ``calibrate`` as a user runs them."""

import json
import shutil

import pytest
import torch
from tiny import plain_model, thinking_model, write_texts

from quietstar import QuietStarForCausalLM
from quietstar.cli import main as cli
from quietstar.cli.generate import thought_text
from quietstar.data import load_tokenizer
from quietstar.errors import visible
from quietstar.evaluation.calibration import Measured, fit_probes, threshold_at, try_gate
from quietstar.generation.gates import Gate

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("console")
    base = plain_model(max_position_embeddings=128, eos_token_id=256)
    base.save_pretrained(folder / "plain")
    tokenizer = load_tokenizer("bytes")
    tokenizer.save_pretrained(folder / "plain")
    model = thinking_model(base, thoughts={"length": 3})
    model.save_pretrained(folder / "model", tokenizer)
    tokenizer = load_tokenizer("bytes")
    tokenizer.chat_template = TEMPLATE
    model.save_pretrained(folder / "chat", tokenizer)
    return folder


def generate(folder, *arguments, model="model"):
    command = ["generate", "--model", str(folder / model), "--device", "cpu"]
    return cli.main([*command, *map(str, arguments)])


def continuations(folder, prompts, new=6, **how):
    """What `generate` of the model itself gives."""
    model = QuietStarForCausalLM.from_pretrained(folder / "model")
    tokenizer = load_tokenizer("bytes")
    texts = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False,
            pad_token_id=257, return_dict_in_generate=True, **how,
        )  # fmt: skip
        text = tokenizer.decode(out.sequences[0, ids.shape[1] :], skip_special_tokens=True)
        texts.append((text, out.thoughts[0] if how.get("think", True) else None))
    return texts


def plainly(text):
    """As the terminal shows it."""
    return visible(text)


@pytest.mark.parametrize("flag", [(), ("--no-thoughts",)])
def test_what_is_printed_is_what_the_model_generates(folder, capsys, flag):
    assert generate(folder, "--prompt", "two and", "--max-new-tokens", 6, *flag) == 0
    ((text, _),) = continuations(folder, ["two and"], think=not flag)
    assert capsys.readouterr().out.strip("\n") == plainly("two and" + text).strip("\n")


def test_thoughts_stand_before_their_tokens(folder, capsys):
    assert generate(folder, "--prompt", "two", "--max-new-tokens", 3, "--show-thoughts") == 0
    printed = capsys.readouterr().out
    ((_, thoughts),) = continuations(folder, ["two"], new=3)
    place = 0
    for step in thoughts.tolist():
        shown = thought_text(load_tokenizer("bytes"), step).plain
        assert shown in printed[place:]
        place = printed.index(shown, place) + len(shown)


def test_a_file_of_prompts_is_answered_in_batches(folder, capsys, tmp_path):
    prompts = ["two and", "a", "much longer than that"]
    (tmp_path / "prompts").write_text("\n".join(prompts) + "\n\n")
    arguments = ("--prompts", tmp_path / "prompts", "--max-new-tokens", 5, "--batch-size", 2)
    assert generate(folder, *arguments) == 0
    printed = capsys.readouterr().out
    for prompt, (text, _) in zip(prompts, continuations(folder, prompts, 5), strict=True):
        assert plainly(prompt + text) in printed
    assert generate(folder, *arguments, "--show-thoughts") == 0
    assert capsys.readouterr().out.count("⟨") == 15


def test_mistakes_are_told_in_one_line(folder, tmp_path, capsys):
    def said(*arguments, **more):
        assert generate(folder, *arguments, **more) == 2
        return capsys.readouterr().err

    assert "give either --prompt TEXT or --prompts FILE" in said()
    assert "--prompt: is empty" in said("--prompt", " ")
    assert "is no Quiet-STaR model" in said("--prompt", "a", model="plain")
    assert "Set --no-thoughts" in said("--prompt", "a", model="plain")
    assert "does not go with" in said("--prompt", "a", "--no-thoughts", "--show-thoughts")
    assert "holds no gate" in said("--prompt", "a", "--gate", "calibrated")
    assert "there is no gate 'often'" in said("--prompt", "a", "--gate", "often:1")
    assert "must be calibrated, or a kind" in said("--prompt", "a", "--gate", "entropy")
    assert "at most" in said("--prompt", "a" * 100, "--max-new-tokens", 99)
    assert "is no Unicode character but half of a surrogate pair; is the text UTF-8" in said(
        "--prompt", "a\udcffb"
    )
    assert generate(folder, "--prompt", "abc" * 40, "--max-new-tokens", 99) == 2
    assert capsys.readouterr().out == ""  # no prompt before the error
    assert "--top-p (0): must be a number above 0" in said("--prompt", "a", "--top-p", 0)


def test_chat_answers_turn_by_turn(folder, capsys, monkeypatch):
    said = iter(["hello", "a\udcffb", "/thoughts", "again", "/reset", "x" * 300, "hello", "/quit"])
    monkeypatch.setattr("builtins.input", lambda *_: next(said))
    arguments = ["chat", "--model", str(folder / "chat"), "--device", "cpu",
                 "--max-new-tokens", "4"]  # fmt: skip
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.count("⟨") >= 4  # thoughts of the later answers alone
    assert "/reset starts over" in printed.splitlines()[0]
    assert "fewer than" in printed  # the turn that is too long, after which the talk goes on
    assert cli.main(["chat", "--model", str(folder / "model"), "--device", "cpu"]) == 2
    assert "without a chat template; use quietstar generate" in capsys.readouterr().err


# --- Calibration ----------------------------------------------------------------------------------


def test_a_calibrated_gate_keeps_what_it_promises(folder, tmp_path, capsys):
    data = write_texts(tmp_path / "texts.jsonl")
    arguments = ["calibrate", "--model", str(folder / "model"), "--data", data, "--device", "cpu",
                 "--seq-len", "16", "--timed-tokens", "8", "--json", str(tmp_path / "f.json"),
                 "--plot", str(tmp_path / "f.html")]  # fmt: skip
    assert cli.main([*arguments, "--speed", "2"]) == 0
    figures = json.loads((tmp_path / "f.json").read_text())
    assert 4 / figures["chosen"]["passes_a_token"] >= 2
    kinds = [row["gate"] for row in figures["rows"]]
    assert {kind: kinds.count(kind) for kind in ("entropy", "weight", "gain")} == {
        "entropy": 5, "weight": 5, "gain": 5,
    }  # fmt: skip
    gate = Gate.load(folder / "model")
    assert gate.kind == figures["chosen"]["gate"]
    assert "</svg>" in (tmp_path / "f.html").read_text()
    capsys.readouterr()
    gated = ("--gate", "calibrated", "--max-new-tokens", 4)
    assert generate(folder, "--prompt", "two and", *gated) == 0
    arguments.append("--force")
    assert cli.main([*arguments, "--speed", "9"]) == 2
    assert "never thinks is 4 times faster" in capsys.readouterr().err
    assert cli.main([*arguments, "--speed", "2", "--quality", "1"]) == 2
    assert "does not go with --quality" in capsys.readouterr().err


def measured(count=400, seed=0):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(count, 6, generator=generator)
    gain = states[:, 0].clamp(min=0)
    base = torch.full((count,), 2.0)
    right = torch.ones(count, dtype=torch.bool)
    return Measured(
        text=torch.arange(count) // 10, states=states, entropy=states[:, 1], weight=states[:, 2],
        base_nll=base, mixed_nll=base - gain, base_right=gain == 0, mixed_right=right,
        answer=torch.arange(count) % 10 == 9,
    )  # fmt: skip


def test_probes_find_where_thinking_pays():
    found = measured()
    probes = fit_probes(found)
    weight = probes["gain"].weight
    assert weight[0] > 5 * weight[1:].abs().max()
    assert torch.allclose(probes["weight"](found.states), found.weight, atol=0.05)


def test_what_a_gate_gives_is_what_its_tokens_give():
    found = measured()
    scores = found.states[:, 0]
    gate = Gate("entropy", threshold_at(scores, 0.25))
    setting = try_gate(gate, found, scores, thought_length=4)
    assert setting.think_fraction == pytest.approx(0.25)
    assert setting.passes == pytest.approx(2.0)
    thinks = scores > gate.threshold
    assert setting.nll == pytest.approx(torch.where(thinks, found.mixed_nll, 2.0).mean().item())
    answers = found.where(found.answer)
    right = answers.base_right | (answers.states[:, 0] > gate.threshold)
    assert setting.accuracy == pytest.approx(right.double().mean().item())
    assert (
        try_gate(Gate("entropy", threshold_at(scores, 1.0)), found, scores, 4).think_fraction == 1
    )
    assert (
        try_gate(Gate("entropy", threshold_at(scores, 0.0)), found, scores, 4).think_fraction == 0
    )


# --- What a folder may bring ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{% for m in messages %}{{ m.nothing.at_all }}{% endfor %}", "has no attribute"),
        ("{% if %}", "the chat template of the tokenizer fails"),
        ("", "gives an empty text"),
    ],
)
def test_a_chat_template_that_fails_is_told_in_one_line(folder, tmp_path, capsys, template, words):
    shutil.copytree(folder / "chat", tmp_path / "chat")
    for file in tmp_path.glob("chat/chat_template*"):
        file.unlink()
    path = tmp_path / "chat" / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "chat_template": template}))
    call = ["chat", "--model", str(tmp_path / "chat"), "--device", "cpu", "--system", "be kind"]
    assert cli.main(call) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


@pytest.mark.parametrize(
    "command", ["generate", "chat", "inspect", "eval", "calibrate", "merge", "judge"]
)
def test_code_in_a_model_folder_is_refused_not_asked_for(folder, tmp_path, monkeypatch, command):
    asked = []
    monkeypatch.setattr("builtins.input", lambda *question: asked.append(question) or "y")
    shutil.copytree(folder / "chat", tmp_path / "model")
    shutil.copytree(folder / "plain", tmp_path / "plain")
    evil = f"open({str(tmp_path / 'canary')!r}, 'w').close()\nclass Evil: pass\n"
    for name in ("model", "plain"):
        (tmp_path / name / "evil.py").write_text(evil)
        for file in ("config.json", "tokenizer_config.json", "language_model/config.json"):
            path = tmp_path / name / file
            if not path.parent.is_dir():
                continue
            settings = json.loads(path.read_text()) if path.exists() else {}
            kind = "AutoTokenizer" if file.startswith("tokenizer") else "AutoModelForCausalLM"
            entry = ["evil.Evil", None] if kind == "AutoTokenizer" else "evil.Evil"
            more = {"auto_map": {kind: entry, "AutoConfig": "evil.Evil"}, "model_type": "evil"}
            path.write_text(json.dumps({**settings, **more}))
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "a", "candidates": ["b", "c"]}')
    options = {"generate": ["--prompt", "a", "--no-thoughts"], "inspect": ["--text", "some text"],
               "chat": ["--no-thoughts"], "eval": ["--tasks", "demo", "--untrained"],
               "calibrate": [], "merge": ["--out", str(tmp_path / "out")],
               "judge": ["--pairs", str(pairs), "--out", str(tmp_path / "o.jsonl")]}  # fmt: skip
    for name in ("model", "plain"):
        assert cli.main([command, "--model", str(tmp_path / name), *options[command]]) == 2
        assert not asked
        assert not (tmp_path / "canary").exists()
