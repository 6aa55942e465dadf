"""``quietstar generate`` as a user runs it: prompts, a chat, a gate."""

import json
import shutil

import pytest
import torch
from tiny import plain_model, thinking_model

from quietstar import QuietStarForCausalLM
from quietstar.cli import main as cli
from quietstar.cli.generate import thought_text
from quietstar.data import load_tokenizer
from quietstar.errors import visible

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

    assert "there is nothing to do; give one of --prompt" in said()
    assert "--prompt: is empty" in said("--prompt", " ")
    assert "is no Quiet-STaR model" in said("--prompt", "a", model="plain")
    assert "Set --no-thoughts" in said("--prompt", "a", model="plain")
    assert "does not go with" in said("--prompt", "a", "--no-thoughts", "--show-thoughts")
    for gate in ("calibrated", "often:1", "entropy", "entropy:-1", "entropy:x"):
        told = f"--gate ({gate}): must be entropy and a threshold in nats, as in entropy:1.5"
        assert told in said("--prompt", "a", "--gate", gate)
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
    assert generate(folder, "--chat", "--max-new-tokens", 4, model="chat") == 0
    printed = capsys.readouterr().out
    assert printed.count("⟨") >= 4  # thoughts of the later answers alone
    assert "/reset starts over" in printed.splitlines()[0]
    assert "fewer than" in printed  # the turn that is too long, after which the talk goes on
    assert generate(folder, "--chat") == 2
    assert "without a chat template; use --prompt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mode", "idle", "reason"),
    [
        (("--prompt", "two"), ("--system", "be kind"), "--system: has no effect without --chat"),
        (("--prompt", "two"), ("--batch-size", 2), "--batch-size: has no effect without --prompts"),
        (("--prompt", "two"), ("--context", 9), "--context: has no effect without --inspect"),
        (("--inspect", "two"), ("--gate", "entropy:1"), "--gate: has no effect with --inspect"),
        (("--inspect", "two"), ("--temperature", 1), "--temperature: has no effect with --inspect"),
    ],
)
def test_an_option_of_another_mode_is_warned_of(folder, capsys, mode, idle, reason):
    few = ("--max-new-tokens", 1) if mode[0] == "--prompt" else ()
    assert generate(folder, *mode, *few, *idle) == 0
    assert f"quietstar: warning: {reason}; leave it out\n" in capsys.readouterr().err


def test_a_gate_thinks_above_its_threshold_alone(folder, capsys):
    shown = ("--prompt", "two", "--max-new-tokens", 3, "--show-thoughts")
    for nats, thoughts in ((0, 3), (1000, 0)):
        assert generate(folder, *shown, "--gate", f"entropy:{nats}") == 0
        assert capsys.readouterr().out.count("⟨") == thoughts


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
    assert generate(tmp_path, "--chat", "--system", "be kind", model="chat") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


@pytest.mark.parametrize(
    "call",
    [
        ["generate", "--prompt", "a", "--no-thoughts"],
        ["generate", "--chat", "--no-thoughts"],
        ["generate", "--inspect", "some text"],
        ["eval", "--tasks", "demo", "--untrained"],
        ["export", "--out", "out"],
        ["judge", "--pairs", "pairs.jsonl", "--out", "o.jsonl"],
    ],
    ids=lambda call: " ".join(call[:2]),
)
def test_code_in_a_model_folder_is_refused_not_asked_for(folder, tmp_path, monkeypatch, call):
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
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "candidates": ["b", "c"]}')
    monkeypatch.chdir(tmp_path)
    for name in ("model", "plain"):
        assert cli.main([*call, "--model", name]) == 2
        assert not asked
        assert not (tmp_path / "canary").exists()
