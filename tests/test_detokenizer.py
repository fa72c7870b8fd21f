"""Streamed text equals the decoding of prompt and answer together, for every decoder and any tokens."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from fusiontree.inference.detokenizer import TextStream

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["▁the", "▁", "▁▁▁", "a", "é", "京", "�", ".", "▁x", "n't", "</s>"]


def byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(["</s>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def llama2() -> Tokenizer:
    vocabulary = {token: i for i, token in enumerate(["<unk>", *WORDS, *BYTES])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), *((word, -1.0) for word in WORDS)], unk_id=0))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return tokenizer


def wordpiece() -> Tokenizer:
    words = ["[UNK]", "the", "##re", ".", "n't", "a", "##é", "京", "</s>"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece(cleanup=True)
    return tokenizer


def bpe_suffix() -> Tokenizer:
    words = ["<unk>", "a", "b</w>", "c</w>", "é</w>", "</s>"]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.BPEDecoder()
    return tokenizer


def bare() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2, "</s>": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


KINDS = [byte_level, llama2, metaspace, wordpiece, bpe_suffix, bare]


def stream(tokenizer: Tokenizer, prompt: list[int], new: list[int]) -> str:
    pieces: list[str] = []
    text = TextStream(tokenizer, prompt, on_text=pieces.append)
    for token in new:
        text.add(token)
    assert text.finish() == "".join(pieces)
    return "".join(pieces)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_add_up_to_the_decoding_of_the_whole(kind) -> None:
    tokenizer, draw = kind(), random.Random(0)
    tokenizer.add_special_tokens(["</s>"])
    size = tokenizer.get_vocab_size()
    for _ in range(2000):
        prompt = tokenizer.encode(draw.choice(["the", "a é", "京", "a x.", "the  "]), add_special_tokens=False).ids
        new = [draw.randrange(size) for _ in range(draw.randrange(9))]
        before, whole = tokenizer.decode(prompt), tokenizer.decode(prompt + new)
        if whole.startswith(before):
            assert before + stream(tokenizer, prompt, new) == whole, (prompt, new)
        else:  # bytes made the prompt's last character invalid, or the decoder changes it
            assert kind is llama2
            assert stream(tokenizer, prompt, new)


def test_a_space_between_prompt_and_answer_is_kept() -> None:
    tokenizer = llama2()
    prompt, word = tokenizer.encode("the").ids, tokenizer.token_to_id("▁x")
    assert tokenizer.decode([word]) == "x"
    assert stream(tokenizer, prompt, [word, word]) == " x x"


def test_text_is_shown_as_soon_as_it_is_final() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("a京b").ids
    pieces: list[str] = []
    text = TextStream(tokenizer, ids[:1], on_text=pieces.append)
    seen = []
    for token in ids[1:]:
        text.add(token)
        seen.append("".join(pieces))
    assert seen == ["", "", "京", "京b"]
    tokenizer, pieces = llama2(), []
    text = TextStream(tokenizer, tokenizer.encode("the").ids, on_text=pieces.append)
    for byte in "京".encode():
        text.add(tokenizer.token_to_id(f"<0x{byte:02X}>"))
    assert pieces == []  # one more invalid byte would make all four invalid
    text.add(tokenizer.token_to_id("a"))
    assert pieces == ["京a"]


def test_tokens_from_the_stop_on_are_ignored() -> None:
    tokenizer = bare()
    text = TextStream(tokenizer, [1], stop=3)
    for token in (2, 1, 3, 2):
        text.add(token)
    assert (text.finish(), text.new_tokens) == (" b a", 2)


def test_the_decoded_window_stays_short() -> None:
    class Counting:
        longest = 0

        def __init__(self, tokenizer: Tokenizer):
            self.id_to_token, self._tokenizer = tokenizer.id_to_token, tokenizer
            self.get_added_tokens_decoder = tokenizer.get_added_tokens_decoder

        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            self.longest = max(self.longest, len(ids))
            return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    tokenizer = byte_level()
    counting = Counting(tokenizer)
    ids = tokenizer.encode("a京" * 500).ids
    text = TextStream(counting, ids[:4])
    for token in ids[4:]:
        text.add(token)
    assert text.finish() == ("a京" * 500)[2:]
    assert counting.longest <= 8
