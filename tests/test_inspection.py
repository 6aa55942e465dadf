"""``quietstar generate --inspect``: figures of `think`, a page, texts that want to break it."""

import json
import math
import shutil
from statistics import fmean

import pytest
import torch
from tiny import end_early, plain_model, think, thinking_model

from quietstar.cli import main as cli
from quietstar.data import load_tokenizer
from quietstar.evaluation.controls import CONTROL_NAMES, GAINS, shuffle_tokens, swap_positions
from quietstar.evaluation.inspection import Reading, inspect_text, token_slices, windows
from quietstar.reports.pages import render_thoughts

NASTY = "a <script>alert(1)</script> & \"b\" 'c' </textarea>\x07\x1b[31m 😀é שלום \u202e‮ \n<!-- end"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspection")
    base = plain_model(max_position_embeddings=160, eos_token_id=256)
    base.save_pretrained(folder / "plain")
    load_tokenizer("bytes").save_pretrained(folder / "plain")
    for name, seed in (("model", 1), ("other", 2)):
        model = thinking_model(base, thoughts={"length": 3}, seed=seed)
        model.save_pretrained(folder / name, load_tokenizer("bytes"))
    return folder


def loaded():
    model = thinking_model(
        plain_model(max_position_embeddings=160, eos_token_id=256),
        thoughts={"length": 3, "lookahead": 1},
    )
    return model.eval(), load_tokenizer("bytes")


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("temperature", [None, 1.0])
def test_the_figures_are_those_of_think(temperature, early):
    model, tokenizer = loaded()
    if early:
        end_early(model)
    text = "a text of some thirty bytes: 3 + 4"
    reading = Reading(num_thoughts=1 if temperature is None else 3, temperature=temperature, seed=5)
    document = inspect_text(model, tokenizer, text, "m", reading)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    thoughts = think(model, ids, num_thoughts=reading.num_thoughts, temperature=temperature, seed=5)
    frame = thoughts.to_frame(tokenizer)
    assert len(frame) == (ids.shape[1] - 1) * reading.num_thoughts
    for _, row in frame.iterrows():
        token = document["tokens"][row["position"] + 1]
        thought = token["thoughts"][row["thought"]]
        assert thought["ids"] == row["tokens"]
        assert thought["text"] == row["thought_text"]
        names = {"mixing_weight": "mixing_weight", "mixed_logprob": "mixed_logprob",
                 "thought_logprob": "thought_logprob", "gain": "gain"}  # fmt: skip
        for ours, theirs in names.items():
            assert thought[ours] == pytest.approx(row[theirs], rel=1e-4, abs=2e-5)
        assert token["base_logprob"] == pytest.approx(row["base_logprob"], rel=1e-4)
        logprobs = thoughts.logprobs[0, row["position"], row["thought"]]
        probabilities = logprobs.exp()[: len(thought["ids"])].tolist()
        assert thought["probabilities"] == pytest.approx(probabilities, rel=1e-3)
    lengths = {len(k["ids"]) for token in document["tokens"][1:] for k in token["thoughts"]}
    assert lengths == ({1, 2} if early else {3})
    gains = [token["gain"] for token in document["tokens"][1:]]
    assert document["summary"]["all"]["gain"] == pytest.approx(sum(gains) / len(gains), abs=1e-5)
    assert sum(bar["count"] for bar in document["summary"]["histogram"]) == len(gains)


@pytest.mark.parametrize("context", [None, 20])
def test_the_thought_after_the_last_token_is_that_of_a_longer_text(context):
    model, tokenizer = loaded()
    text = "a text of some thirty bytes: 3 + 4"
    reading = Reading(num_thoughts=2, temperature=1.0, seed=5, context=context)
    found = inspect_text(model, tokenizer, text, "m", reading)["next"]
    assert found["position"] == len(text)
    part = text if context is None else text[1 - context :]
    ids = torch.tensor([tokenizer(part + "?")["input_ids"]])  # whatever comes, it is not read
    thoughts = think(model, ids, num_thoughts=2, temperature=1.0, seed=5)
    frame = thoughts.to_frame(tokenizer)
    last = frame[frame["position"] == ids.shape[1] - 2]
    for thought, (_, row) in zip(found["thoughts"], last.iterrows(), strict=True):
        assert thought["ids"] == row["tokens"]
        assert thought["mixing_weight"] == pytest.approx(row["mixing_weight"], rel=1e-4)
        assert not {"gain", "mixed_logprob", "controls"} & set(thought)
    base = model.causal_lm(ids[:, :-1]).logits[0, -1].softmax(-1)
    assert found["base_top"][0]["id"] == int(base.argmax())


def test_controls_are_what_the_model_predicts_with_their_thoughts():
    model, tokenizer = loaded()
    text = "a text of some thirty bytes: 3 + 4"
    reading = Reading(num_thoughts=2, temperature=1.0, all_controls=True)
    document = inspect_text(model, tokenizer, text, "m", reading)
    assert document["controls"] == CONTROL_NAMES
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    tokens = document["tokens"][1:]
    own = torch.tensor([[t["ids"] for t in token["thoughts"]] for token in tokens]).transpose(0, 1)
    own = own[None]
    positions = torch.arange(len(tokens))[None]
    given = {
        "swapped": swap_positions(own[0], seed=0)[None],
        "shuffled": shuffle_tokens(own, [0], seed=0),
        "pause": torch.full_like(own, model.pause_token_id),
        "generic": torch.tensor(tokenizer.encode(" I ")).expand(own.shape),
        "blank": torch.full_like(own[..., :1], -1),
    }
    for name, thoughts in given.items():
        scores = model.score(ids, thoughts.transpose(1, 2), positions=positions, lookahead=1)
        expected = scores.mixed_logprobs[0, :, :, 0].T  # (K, P)
        found = torch.tensor([[t["controls"][name] for t in x["thoughts"]] for x in tokens]).T
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
        gains = [fmean(t["mixed_logprob"] for t in token["thoughts"]) for token in tokens]
        gain = fmean(gains) - float(expected.mean())
        assert document["summary"]["all"][GAINS[name]] == pytest.approx(gain, abs=1e-5)
    without = inspect_text(model, tokenizer, text, "m", Reading(num_thoughts=2, temperature=1.0))
    assert list(without["controls"]) == ["swapped"]
    assert "gain_over_pause" not in without["summary"]["all"]


def test_top_predictions_are_the_most_likely_tokens():
    model, tokenizer = loaded()
    document = inspect_text(model, tokenizer, "some text", "m", Reading())
    ids = torch.tensor([tokenizer("some text")["input_ids"]])
    base = model.causal_lm(ids).logits[0].softmax(-1)
    for token in document["tokens"][1:]:
        top = base[token["position"] - 1].topk(5)
        assert [t["id"] for t in token["base_top"]] == top.indices.tolist()
        assert [t["probability"] for t in token["base_top"]] == pytest.approx(
            top.values.tolist(), rel=1e-3
        )
        for thought in token["thoughts"]:
            first = thought["mixed_top"][0]
            if first["id"] == token["id"]:
                assert first["probability"] == pytest.approx(math.exp(thought["mixed_logprob"]),
                                                             rel=1e-3)  # fmt: skip


@pytest.mark.parametrize(("length", "context"), [(2, None), (300, None), (300, 100), (301, 7)])
def test_windows_cover_every_position_once(length, context):
    seen = []
    for window in windows(length, context):
        assert context is None or window.stop + 1 - window.start <= context
        if window.start:
            assert window.first - window.start >= context - min(128, context // 2) - 1
        seen += range(window.first, window.stop)
    assert seen == list(range(length - 1))


def test_a_text_longer_than_the_model_is_read_in_windows(folder, capsys, tmp_path):
    model, tokenizer = loaded()
    text = "".join(f"{n} and " for n in range(40))
    document = inspect_text(model, tokenizer, text, "m", Reading(context=100))
    assert len(document["tokens"]) == len(text)
    window = list(windows(len(text), 100))[3]
    part = torch.tensor([tokenizer(text)["input_ids"][window.start : window.stop + 1]])
    thoughts = think(model, part)
    first = window.first - window.start
    for position in range(window.first, window.stop):
        got = document["tokens"][position + 1]["base_logprob"]
        want = thoughts.base_logprobs[0, first + position - window.first, 0].item()
        assert got == pytest.approx(want, rel=1e-4, abs=1e-5)
    (tmp_path / "long.txt").write_text(text)
    assert cli.main(["generate", "--model", str(folder / "model"), "--device", "cpu",
                     "--inspect-file", str(tmp_path / "long.txt")]) == 0  # fmt: skip
    assert "read in windows of" in capsys.readouterr().err


@pytest.mark.parametrize("text", [NASTY, "日本語 and ̈ combining", "x\r\ny"])
def test_tokens_together_are_the_text(text):
    tokenizer = load_tokenizer("bytes")
    assert "".join(token_slices(tokenizer, text, tokenizer(text)["input_ids"])) == text


# --- The page -------------------------------------------------------------------------------------


def test_nothing_of_a_text_or_thought_stands_raw_in_the_page():
    model, tokenizer = loaded()
    document = inspect_text(model, tokenizer, NASTY, "<b>model</b>", Reading())
    page = render_thoughts([document])
    data = page.split('id="documents">')[1].split("</script>")[0]
    assert "<" not in data
    assert data.isascii()
    assert json.loads(data) == [json.loads(json.dumps(document))]
    assert "<b>model" not in page
    assert page.count("<script") == 2


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("needs Chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser, path, errors, **settings):
    page = browser.new_page(**settings)
    page.on(
        "console", lambda message: errors.append(message.text) if message.type == "error" else 0
    )
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: errors.append(request.url)
            if not request.url.startswith(("file:", "data:")) else 0)  # fmt: skip
    page.goto(path.as_uri())
    return page


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_a_browser(folder, tmp_path, browser, scheme, width):
    out, errors = tmp_path / "page.html", []
    text = NASTY + " so it goes on and on, 3 + 4 = 7"
    (tmp_path / "text.txt").write_bytes(text.encode())
    shared = ["generate", "--model", str(folder / "model"), "--device", "cpu",
              "--inspect-file", str(tmp_path / "text.txt")]  # fmt: skip
    assert cli.main([*shared, "--out", str(out)]) == 0
    assert cli.main([*shared, "--out", str(tmp_path / "page.json")]) == 0
    document = json.loads((tmp_path / "page.json").read_text())
    page = opened(browser, out, errors, viewport={"width": width, "height": 800},
                  color_scheme=scheme)  # fmt: skip
    shown = page.eval_on_selector_all("#texts .reader span", "all => all.map(x => x.textContent)")
    assert len(shown) == len(document["tokens"]) + 1  # and what comes next
    assert "<script>alert(1)</script>" in "".join(shown)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator("#t0-5").click()
    assert page.locator("#t0-5").get_attribute("aria-selected") == "true"
    for index in (6, 7):
        page.keyboard.press("ArrowRight")
        told = page.locator("#detail").inner_text()
        token = document["tokens"][index]
        assert f"token {index}" in told
        sign = "−" if round(token["gain"], 3) < 0 else "+"
        assert f"Gain {sign}{abs(token['gain']):.3f} nats" in told
        weight = token["thoughts"][0]["mixing_weight"]
        assert f"mixing weight {weight:.3f}" in told
    page.keyboard.press("Home")
    assert "is not predicted" in page.locator("#detail").inner_text()
    page.keyboard.press("End")
    assert "What comes next" in page.locator("#detail").inner_text()
    for measure in ("weight", "nll", "gain_of_content", "gain"):
        page.locator("#measure").select_option(measure)
        assert page.locator("#quintiles").is_visible() == (measure in ("weight", "nll"))
    page.goto(page.url.split("#")[0] + "#t4")
    page.reload()
    assert "token 4" in page.locator("#detail").inner_text()
    page.locator("#mode").select_option("both")
    least = 0.2
    hits = sum(abs(token.get("gain", 0)) >= least for token in document["tokens"])
    assert page.locator("#matches").inner_text().startswith(f"{hits} tokens")
    assert page.locator(".reader span.hit").count() == hits
    if width > 1000:
        page.keyboard.press("Escape")
        page.locator("#t0-9").dispatch_event("pointerover", {"pointerType": "mouse"})
    assert errors == []
    page.close()


@pytest.mark.slow
def test_two_models_stand_side_by_side(folder, tmp_path, browser):
    out, errors = tmp_path / "page.html", []
    assert cli.main(["generate", "--model", str(folder / "model"), "--compare",
                     str(folder / "other"), "--inspect", "three and four", "--out", str(out),
                     "--device", "cpu"]) == 0  # fmt: skip
    page = opened(browser, out, errors)
    assert page.locator("#texts .reader").count() == 2
    page.locator("#t1-3").click()
    assert page.locator("#t0-3").get_attribute("aria-selected") == "true"
    assert page.locator("#detail .model").count() == 2
    assert errors == []
    page.close()


@pytest.mark.slow
def test_a_page_of_a_single_thought_shows_a_dash_for_what_cannot_be_measured(
    folder, tmp_path, browser
):
    out, errors = tmp_path / "page.html", []
    assert cli.main(["generate", "--model", str(folder / "model"), "--inspect", "ab", "--out",
                     str(out), "--device", "cpu"]) == 0  # fmt: skip
    page = opened(browser, out, errors)
    page.locator("#t0-1").click()
    assert "content –" in page.locator("#detail").inner_text()
    assert errors == []
    page.close()


@pytest.mark.slow
def test_thoughts_of_one_position_are_rows_of_which_one_is_shown_whole(folder, tmp_path, browser):
    out, errors = tmp_path / "page.html", []
    assert cli.main(["generate", "--model", str(folder / "model"), "--inspect", "three and four",
                     "--num-thoughts", "3", "--thought-temperature", "1", "--out", str(out),
                     "--device", "cpu"]) == 0  # fmt: skip
    page = opened(browser, out, errors)
    page.locator("#t0-5").click()
    rows = page.locator("#detail .several button")
    assert rows.count() == 3
    rows.nth(2).click()
    assert rows.nth(2).get_attribute("aria-pressed") == "true"
    assert "Thought 3, token by token" in page.locator("#detail").inner_text()
    assert errors == []
    page.close()


# --- Mistakes -------------------------------------------------------------------------------------


def test_mistakes_are_told_in_one_line(folder, tmp_path, capsys, monkeypatch):
    def said(*arguments, model="model"):
        command = ["generate", "--model", str(folder / model), "--device", "cpu"]
        assert cli.main([*command, *map(str, arguments)]) == 2
        return capsys.readouterr().err

    assert "--inspect: is empty" in said("--inspect", "  ")
    assert "is a single token" in said("--inspect", "a")
    (tmp_path / "old.json").write_text("{}")
    monkeypatch.chdir(tmp_path)  # the model is saved whole, and its base lies nowhere
    command = ["generate", "--model", str(folder / "model"), "--device", "cpu", "--inspect", "ab"]
    assert cli.main([*command, "--out", "old.json", "--force"]) == 0
    capsys.readouterr()
    both = said("--inspect", "ab", "--inspect-file", "old.json")
    assert "--inspect and --inspect-file do not go together" in both
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    assert "byte 3 is 0xe9, which is no UTF-8" in said("--inspect-file", tmp_path / "latin")
    assert "cannot be read" in said("--inspect-file", tmp_path / "none")
    assert "is no Quiet-STaR model" in said("--inspect", "some text", model="plain")
    assert "must end in .html" in said("--inspect", "abc", "--out", tmp_path / "x.pdf")
    (tmp_path / "x.html").write_text("mine")
    assert "exists. Give another name, or --force" in said("--inspect", "abc", "--out",
                                                           tmp_path / "x.html")  # fmt: skip
    assert (tmp_path / "x.html").read_text() == "mine"
    assert "greedy thoughts are all identical" in said("--inspect", "abc", "--num-thoughts", 2)
    assert "at most 155" in said("--inspect", "abc", "--context", 156)
