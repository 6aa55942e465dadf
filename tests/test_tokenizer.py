import pytest
from transformers import AutoTokenizer

from quietstar.data import byte_tokenizer, check_tokenizer_fits, load_tokenizer
from quietstar.errors import UserError


@pytest.mark.parametrize(
    "text",
    [
        "plain text",
        "  blanks \t\n\r\n twice",
        "äöü €𝄞 汉字 👩‍🔬",
        "".join(map(chr, range(0x300))),
        "don't 's",
        "",
    ],
    ids=["ascii", "blanks", "wide", "all-low", "clitics", "empty"],
)
def test_bytes_round_trip_any_text(text):
    tokenizer = byte_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_bytes_has_one_token_per_byte_and_eos_and_pad_apart():
    tokenizer = byte_tokenizer()
    assert len(tokenizer) == 258
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 257)
    assert tokenizer("a<|endoftext|>")["input_ids"] == [97, 256]
    assert len(tokenizer("---")["input_ids"]) == 3


def test_bytes_saves_and_reloads(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    text = "Grüße  \n1 + 1 = 2 ."
    for again in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))):
        assert again(text)["input_ids"] == list(text.encode())
        assert again.decode(again(text)["input_ids"]) == text
        assert (again.eos_token_id, again.pad_token_id) == (256, 257)
        assert again.is_fast


def test_a_missing_pad_token_becomes_eos_without_a_new_row(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.pad_token_id == loaded.eos_token_id == 256
    assert len(loaded) == len(tokenizer)


def test_a_folder_without_tokenizer_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        load_tokenizer(str(tmp_path), what="model.tokenizer")
    assert "\n" not in str(caught.value)
    assert "'bytes'" in str(caught.value)
    with pytest.raises(UserError, match="its tokenizer cannot be loaded") as caught:
        load_tokenizer(str(tmp_path), what="model.name_or_path")
    assert "bytes" not in str(caught.value)  # which is no model
    with pytest.raises(UserError, match=r"^model.tokenizer \(.*none\): .*there is no such folder"):
        load_tokenizer(str(tmp_path / "none"), what="model.tokenizer")


def test_a_tokenizer_with_ids_beyond_the_embedding_is_refused():
    check_tokenizer_fits(byte_tokenizer(), 258)
    check_tokenizer_fits(byte_tokenizer(), 320)
    with pytest.raises(UserError, match="needs 258 rows but the model's embedding has 257"):
        check_tokenizer_fits(byte_tokenizer(), 257)
