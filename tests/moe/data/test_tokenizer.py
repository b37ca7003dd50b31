from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from moe.data import tokenizer as tokenizers
from moe.data.sources import Document
from moe.data.tokenizer import (
    check_tokenizer,
    encode,
    end_of_document,
    open_tokenizer,
    sample,
    train_tokenizer,
)
from parallel.errors import UserError

TEXTS = ["the cat sat on the mat\n", "    the dog sat on the café ☕\n"] * 3


def documents(texts: list[str]) -> list[Document]:
    return [Document(text, "d", str(number)) for number, text in enumerate(texts)]


def test_training_is_deterministic_and_lossless() -> None:
    tokenizer = train_tokenizer(TEXTS, 270)
    assert tokenizer.to_str() == train_tokenizer(TEXTS, 270).to_str()
    assert tokenizer.get_vocab_size() == 270
    assert [tokenizer.token_to_id(token) for token in ("<bos>", "<eos>", "<pad>")] == [0, 1, 2]
    unseen = "\tzażółć 🦊 \x00\r\n  end"
    assert tokenizer.decode(tokenizer.encode(unseen).ids) == unseen
    assert len(tokenizer.encode(TEXTS[0]).ids) < len(TEXTS[0]) / 2


def test_every_document_ends_once_whatever_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizers, "BATCH_CHARACTERS", 30)  # several batches
    trained = train_tokenizer(TEXTS, 300)
    trained.enable_truncation(4)  # as some released files do
    trained.enable_padding(length=64)
    trained.save(str(tmp_path / "tokenizer.json"))
    tokenizer = open_tokenizer(str(tmp_path / "tokenizer.json"))
    given = documents([*TEXTS, "a <eos> inside", "<bos>"])
    encoded = list(encode(tokenizer, given))
    assert [document for document, _ in encoded] == given
    for document, ids in encoded:
        assert ids.index(1) == len(ids) - 1 and not {0, 2} & set(ids)
        assert tokenizer.decode(ids[:-1]) == document.text


def test_sample_is_bounded_and_spread() -> None:
    taken = list(sample(documents([f"{n:04d}" for n in range(1000)]), 0.1))
    assert len(taken) == 100
    assert taken[0] == "0000" and int(taken[-1]) >= 900 and len({int(text) // 100 for text in taken}) == 10
    assert len(list(sample(documents(TEXTS), 1.0))) == len(TEXTS)


@pytest.mark.parametrize("token", tokenizers.END_TOKENS)
def test_common_end_tokens_are_found(token: str) -> None:
    assert end_of_document(Tokenizer(models.WordLevel({"a": 0, token: 5}, unk_token="a"))) == 5


def test_tokenizers_that_will_not_do(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        train_tokenizer(TEXTS, 258)
    assert str(caught.value) == (
        "`model.vocab_size` must hold the 256 bytes and 3 special tokens of a trained tokenizer, but is 258: "
        "use 259 or more"
    )
    sparse = Tokenizer(models.WordLevel({"a": 0, "</s>": 99}, unk_token="a"))
    check_tokenizer(sparse, 100)
    with pytest.raises(UserError) as caught:
        check_tokenizer(sparse, 99)
    assert str(caught.value) == (
        "`model.vocab_size` must hold every token of `data.tokenizer`, but is 99 for 100 tokens: "
        "use 100 or more"
    )
    with pytest.raises(
        UserError, match=r"^`data.tokenizer` must have a token that ends a document, .* add one"
    ):
        check_tokenizer(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), 100)
    broken = tmp_path / "tokenizer.json"
    for reason in ("No such file or directory", "Cannot instantiate"):
        with pytest.raises(UserError) as caught:
            open_tokenizer(str(broken))
        assert str(caught.value).startswith(
            f"`data.tokenizer` must be a tokenizer.json, but {broken} cannot be opened as one ({reason}"
        )
        broken.write_text("{")
