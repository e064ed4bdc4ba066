"""The tokenizer around real ones of the `tokenizers` library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers

from molink_common.errors import ModelError
from molink_common.messages import FileOffer
from molink_gateway.api_errors import ApiError
from molink_gateway.model_files import check_offers
from molink_gateway.tokenizer import Tokenizer, load_tokenizer
from tests.integration.test_gateway_pool import WORDS, make_tokenizer

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def byte_level(tmp_path: Path) -> Tokenizer:
    make_tokenizer(tmp_path)
    return load_tokenizer(tmp_path)


@pytest.fixture
def sentencepiece_like(tmp_path: Path) -> Tokenizer:
    """As Llama's first tokenizers: spaces are ▁, unknown characters are bytes."""
    names = ["<unk>", "<s>", "▁", "▁the", "▁a", "t", "h", "e", "a", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {name: number for number, name in enumerate(names)}
    backend = Backend(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(tmp_path)


def streamed(tokenizer: Tokenizer, tokens: list[int], context: list[int]) -> str:
    detokenizer = tokenizer.detokenizer(context)
    return "".join(map(detokenizer.feed, tokens)) + detokenizer.flush()


@pytest.mark.parametrize("text", [WORDS, "日本語テキスト", "👩‍👩‍👧‍👦 family", "tab\tand\nline", "x" * 50])
def test_byte_level_text_survives_token_by_token(byte_level: Tokenizer, text: str) -> None:
    tokens = byte_level.encode(text, add_special_tokens=False)
    assert streamed(byte_level, tokens, []) == text
    assert b"".join(byte_level.text_of(token).data for token in tokens) == text.encode()


def test_special_tokens_are_not_shown(byte_level: Tokenizer) -> None:
    tokens = byte_level.encode("Hello<|im_end|>", add_special_tokens=False)
    assert tokens[-1] == 2
    assert streamed(byte_level, tokens, []) == "Hello"
    assert byte_level.text_of(2).text == "<|im_end|>"


def test_byte_fallback_text_survives_token_by_token(sentencepiece_like: Tokenizer) -> None:
    text = "the a 😀 ä"
    tokens = sentencepiece_like.encode(text, add_special_tokens=False)
    assert len(tokens) > len(text)
    assert streamed(sentencepiece_like, tokens, []) == text
    assert streamed(sentencepiece_like, tokens, sentencepiece_like.encode("a", add_special_tokens=False)) == " " + text
    assert b"".join(sentencepiece_like.text_of(token).data for token in tokens) == (" " + text).encode()


def test_a_character_that_no_tokens_make_up_is_found(tmp_path: Path, sentencepiece_like: Tokenizer) -> None:
    assert sentencepiece_like.unwritable("日本語 \x00") is None
    backend = Backend(models.BPE({"▁": 0, "a": 1, "é": 2}, []))
    backend.save(str(tmp_path / "tokenizer.json"))
    few = load_tokenizer(tmp_path)
    assert few.unwritable("a é") is None
    assert few.unwritable("aéb") == "b"


def test_fewest_tokens_is_a_lower_bound(byte_level: Tokenizer) -> None:
    for text in ("", WORDS, " " * 100, "日本語" * 20):
        assert byte_level.fewest_tokens(text) <= len(byte_level.encode(text, add_special_tokens=False))


def load_with_template(folder: Path, template: str) -> Tokenizer:
    make_tokenizer(folder, chat_template=template)
    return load_tokenizer(folder)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception('only one system message') }}",
        "{{ messages[0]['content'] + 5 }}",
        "{% for x in %}",
    ],
)
def test_a_template_that_fails_is_a_400(tmp_path: Path, template: str) -> None:
    with pytest.raises(ApiError) as caught:
        load_with_template(tmp_path, template).render(HELLO)
    assert caught.value.status == 400
    assert caught.value.param == "messages"


def test_no_code_of_a_model_is_run(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    config: dict[str, Any] = {
        "tokenizer_class": "Trap",
        "auto_map": {"AutoTokenizer": ["trap.Trap", "trap.Trap"]},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "trap.py").write_text("raise SystemExit('the trap was sprung')")
    assert load_tokenizer(tmp_path).encode("Hello", add_special_tokens=False)


@pytest.mark.parametrize("content", ["", "{", "{}", '{"model": {"type": "Nonsense"}}'])
def test_files_that_are_no_tokenizer_are_a_model_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../tokenizer.json", "/etc/passwd", "a/b.json", "code.py", ".hidden.json", "x.json\n", "", "tokenizer.json.exe"],
)
def test_names_that_lead_elsewhere_are_not_fetched(name: str) -> None:
    with pytest.raises(ModelError, match="plain"):
        check_offers((FileOffer(name=name, size_bytes=1, sha256="0"),))


def test_too_many_or_too_large_files_are_not_fetched() -> None:
    offer = FileOffer(name="tokenizer.json", size_bytes=1, sha256="0")
    check_offers((offer,))
    for offers in ((), (offer,) * 17, (offer.model_copy(update={"size_bytes": 2**40}),)):
        with pytest.raises(ModelError):
            check_offers(offers)
