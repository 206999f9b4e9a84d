"""A sentencepiece model as tokenizer.json: the ids of the one are those of the other."""

from __future__ import annotations

import gzip
import io
import json
import random
import struct
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from blockllm_cli.data.sentencepiece_file import read_sentencepiece
from blockllm_cli.data.tokenizer import Tokenizer
from blockllm_cli.data.tokenizer_json import tokenizer_json
from blockllm_cli.data.tokenizer_training import draw_sample, train_tokenizer
from blockllm_cli.errors import InputError

tokenizers = pytest.importorskip("tokenizers")

AWKWARD = [
    "",
    " ",
    " " * 53,
    "  two  spaces, at the ends too  ",
    "lines\n\n\r\n\tand tabs\x00null\x85\u2028\ufeff",
    "\u2581\u2581 \u2581x",
    "\U0001f600 e\u0301 \u0639\u0631\u0628\u064a \u3000\u00a0 \ufffd",
    "</s> <0x0A> (</s>)",
    "aaaaaaaaaaaaaaaaa abababababa ==--==--== 1234567890 nothing",
]


def trained(texts, kind: str, vocab_size: int) -> bytes:
    sample = draw_sample(texts, sample_bytes=2**22, seed=0)
    return train_tokenizer(sample, vocab_size=vocab_size, kind=kind).model_bytes


def opened(model_bytes: bytes, opening: int | None = None):
    content = tokenizer_json(model_bytes, opening=opening)
    other = tokenizers.Tokenizer.from_str(json.dumps(content, ensure_ascii=False, allow_nan=False))
    other.encode_special_tokens = True
    return other


def assert_equal(model_bytes: bytes, texts: list[str], *, decoded: bool = True) -> None:
    ours, other = Tokenizer(model_bytes), opened(model_bytes)
    for text, ids in zip(texts, ours.encode(texts), strict=True):
        assert other.encode(text, add_special_tokens=False).ids == ids.tolist(), text
        if decoded:
            assert other.decode(ids.tolist()) == ours.decode(ids), text


@pytest.fixture(scope="module")
def tiny_texts(tiny_corpus: Path) -> list[str]:
    lines = [line for path in sorted(tiny_corpus.glob("train-*")) for line in path.read_text("utf-8").splitlines()]
    return [json.loads(line)["text"] for line in lines]


@pytest.fixture(scope="module")
def bpe(tiny_texts: list[str]) -> bytes:
    return trained([*tiny_texts, *["aaaa abab ababab     ==== =-=-=-="] * 200], "bpe", 420)


@pytest.fixture(scope="module")
def unigram(tiny_texts: list[str]) -> bytes:
    return trained([*tiny_texts, "(</s>) [<s>] <0x0A> <unk>"], "unigram", 330)


def written_model(pieces: list[tuple[str, float, int]], *, byte_fallback: bool = False) -> bytes:
    """A BPE model file with these pieces: text, score and kind (1 normal, 2 unknown, 3 control, 6 byte)."""

    def varint(number: int) -> bytes:
        return bytes([number]) if number < 128 else bytes([number % 128 + 128]) + varint(number // 128)

    def part(field: int, content: bytes) -> bytes:
        return varint(field * 8 + 2) + varint(len(content)) + content

    def number(field: int, value: int) -> bytes:
        return varint(field * 8) + varint(value)

    written = b"".join(
        part(1, part(1, text.encode()) + varint(2 * 8 + 5) + struct.pack("<f", score) + number(3, kind))
        for text, score, kind in pieces
    )
    trainer = number(3, 2) + number(4, len(pieces)) + number(35, byte_fallback)
    return written + part(2, trainer) + part(3, part(1, b"identity") + number(3, 1) + number(4, 0) + number(5, 1))


SPECIAL = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]


def test_models_of_random_pieces_have_the_same_ids() -> None:
    """Pieces that repeat themselves, made in several ways, with scores in any order: what no training would give."""
    draw = random.Random(11)
    for _ in range(60):
        pieces = {"\u2581", "a", "b"}
        for _ in range(draw.randrange(5, 25)):
            made = draw.choice(sorted(pieces)) + draw.choice(sorted(pieces))
            pieces |= {made} if len(made) < 10 else set()
        ranked = draw.sample(sorted(pieces), len(pieces))
        model_bytes = written_model([*SPECIAL, *((text, -float(rank), 1) for rank, text in enumerate(ranked))])
        texts = ["".join(draw.choices("ab ", k=draw.randrange(3, 40))) for _ in range(20)]
        texts += [("".join(draw.choices("ab", k=draw.randrange(1, 5))) * 12)[draw.randrange(3) : 30] for _ in range(20)]
        assert_equal(model_bytes, texts)


def test_the_name_of_a_byte_is_no_byte_and_unknown_letters_are_one_unknown() -> None:
    made = [(text, -1.0 - rank, 1) for rank, text in enumerate(["<0", "x0", "<0x0", "A>", *"\u2581<0xA>"])]
    bytes_ = [(f"<0x{value:02X}>", 0.0, 6) for value in range(256)]
    with_bytes = written_model([*SPECIAL, *bytes_, *made], byte_fallback=True)
    assert_equal(with_bytes, ["<0x0A>", "\n", "<0x0A>\n<0x0A>", "\u00e9<0xC3>"])
    without = written_model([*SPECIAL, *made])
    assert_equal(without, ["zz<0zzz", "z z", "\U0001f600\U0001f600<"], decoded=False)
    assert opened(without).encode("zz<0zzz").ids == Tokenizer(without).encode(["zz<0zzz"])[0].tolist()


def test_a_name_of_unknown_letters_alone_is_spelled_in_bytes() -> None:
    """An alphabet without any letter of `</s>`: the whole name is one run of unknown characters."""
    draw = random.Random(3)
    texts = [" ".join("".join(draw.choices("abcde", k=draw.randrange(2, 6))) for _ in range(20)) for _ in range(80)]
    assert_equal(trained(texts, "unigram", 300), ["</s>", "a<s>b", "<unk> <0x0A>", "<>", "\U0001f600\u00e9"])


@given(st.text(alphabet=st.one_of(st.sampled_from("ab =-\u2581"), st.characters()), max_size=60))
@example("abababaaabaaaababaa")
@example("</s><s><unk><0x0A>")
@settings(deadline=None, max_examples=300)
def test_any_text_has_the_same_ids_in_bpe(bpe: bytes, text: str) -> None:
    if any(0xD800 <= ord(letter) < 0xE000 for letter in text):
        return  # no text of UTF-8; the tokenizer replaces these before
    assert_equal(bpe, [text])


def test_awkward_texts_have_the_same_ids(bpe: bytes, unigram: bytes, tiny_texts: list[str]) -> None:
    for model_bytes in (bpe, unigram):
        assert_equal(model_bytes, [*AWKWARD, *tiny_texts])


def test_words_of_random_pieces_have_the_same_ids(bpe: bytes) -> None:
    draw = random.Random(3)
    ours = Tokenizer(bpe)
    assert_equal(bpe, [ours.decode([draw.randrange(3, ours.vocab_size) for _ in range(50)]) for _ in range(300)])


@pytest.mark.realtext
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_real_documents_have_the_same_ids(shared_dir: Path, kind: str) -> None:
    with gzip.open(
        shared_dir / "data/realtext/en/c4-validation.00000-of-00001.json.gz", "rt", encoding="utf-8"
    ) as file:
        texts = [json.loads(line)["text"] for line in file]
    assert len(texts) > 400
    assert_equal(trained(texts[:100], kind, 1024), texts)


def test_a_model_like_that_of_the_papers_has_the_same_ids(tiny_texts: list[str]) -> None:
    """T5's: unigram without bytes, text normalised, spaces folded, no bos, pad before eos before unk."""
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(tiny_texts),
        model_writer=made,
        model_type="unigram",
        vocab_size=100,
        minloglevel=2,
        normalization_rule_name="nmt_nfkc",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
    )
    odd = [
        "  many   spaces ",
        "\ttabs\n",
        "\uff21\uff22 wide, \ufb01 ligature",
        "\u4f60\u597d unknown",
        "   ",
        "",
        "</s> <<<",
    ]
    # An unknown character reads back as nothing there, and as a sign here.
    assert_equal(made.getvalue(), [*tiny_texts, *odd], decoded=False)
    assert_equal(made.getvalue(), tiny_texts)


def test_special_pieces_and_the_opening(bpe: bytes) -> None:
    other = opened(bpe, opening=1)
    assert [other.token_to_id(token) for token in ("<unk>", "<s>", "</s>")] == [0, 1, 2]
    (ids,) = Tokenizer(bpe).encode(["Document 1"])
    assert other.encode("Document 1").ids == [1, *ids.tolist()]
    assert other.decode([1, *ids.tolist(), 2]) == "Document 1"
    assert opened(bpe).encode("Document 1").ids == ids.tolist()


def test_the_file_says_what_the_library_says(bpe: bytes, unigram: bytes) -> None:
    for model_bytes, algorithm in ((bpe, "bpe"), (unigram, "unigram")):
        read, processor = read_sentencepiece(model_bytes), sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
        assert read.algorithm == algorithm
        assert (read.byte_fallback, read.charsmap, read.add_dummy_prefix) == (True, b"", True)
        assert (read.remove_extra_whitespaces, read.escape_whitespaces, read.space_ends_piece) == (False, True, False)
        assert [piece.text for piece in read.pieces] == [processor.id_to_piece(i) for i in range(len(read.pieces))]
        assert [piece.score for piece in read.pieces] == [processor.get_score(i) for i in range(len(read.pieces))]
        kinds = {0: "unknown", 1: "control", 2: "control", 3: "byte", 258: "byte", 259: "normal"}
        assert {i: read.pieces[i].kind for i in kinds} == kinds


@pytest.mark.parametrize("cut", [1, 7, 100, 4000])
def test_a_cut_file_is_refused(bpe: bytes, cut: int) -> None:
    for content in (bpe[:-1], bpe[:cut] + b"\xff" * 12):
        with pytest.raises(InputError, match="damaged"):
            read_sentencepiece(content)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"user_defined_symbols": "<tool>"}, "user-defined piece '<tool>'"),
        ({"model_type": "char"}, "'char'"),
        ({"treat_whitespace_as_suffix": True}, "unusual spaces"),
    ],
)
def test_what_the_format_cannot_say_is_refused(tiny_texts: list[str], settings: dict, words: str) -> None:
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(tiny_texts),
        model_writer=made,
        minloglevel=2,
        hard_vocab_limit=False,
        **({"model_type": "bpe", "vocab_size": 90} | settings),
    )
    with pytest.raises(InputError, match=words):
        tokenizer_json(made.getvalue(), opening=None)


def test_a_score_without_a_form_in_json_is_refused(unigram: bytes) -> None:
    score = next(piece.score for piece in read_sentencepiece(unigram).pieces if piece.kind == "normal")
    broken = unigram.replace(struct.pack("<f", score), struct.pack("<f", float("inf")))
    assert broken != unigram
    with pytest.raises(InputError, match="not finite"):
        tokenizer_json(broken, opening=None)
