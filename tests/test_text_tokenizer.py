"""Text is data for every kind of tokenizer: no special token in it, none added, nothing random; the export agrees."""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from data_tools.tokenizers import copy_tokenizer, load_tokenizer
from fusiontree.data.tokenizer import load_text_tokenizer, open_tokenizer, require_golden
from fusiontree.errors import RunError, UserError
from fusiontree.export.tokenizer import prove_tokenizer, write_tokenizer

CORPUS = [
    "def main(x):\n    return x + 1  # 2026\n",
    "the tree </ s> < s > gate's window, 12 shards. <s",
    "Das Übermaß 東京",
] * 9
SPECIAL = ["<unk>", "<s>", "</s>"]


def byte_level(**options) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def merged() -> Tokenizer:
    """Return a BPE tokenizer whose merges make `</s>` from text."""
    tokenizer = byte_level()
    values = json.loads(tokenizer.to_str())
    vocabulary = values["model"]["vocab"]
    for piece in ("</", "</s"):
        vocabulary.setdefault(piece, len(vocabulary))
    merges = [["<", "/"], ["</", "s"], ["</s", ">"]]
    values["model"]["merges"] = merges + [merge for merge in values["model"]["merges"] if merge not in merges]
    return Tokenizer.from_str(json.dumps(values))


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", initial_alphabet=list("<>/s"), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def word_level() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(vocab_size=99, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def ordinary_eos() -> Tokenizer:
    """Return a tokenizer to which `</s>` was added as an ordinary token."""
    values = json.loads(byte_level().to_str())
    values["added_tokens"][2]["special"] = False
    return Tokenizer.from_str(json.dumps(values))


KINDS = {
    "byte-level": byte_level,
    "ignored merges": lambda: byte_level(ignore_merges=True),
    "merges": merged,
    "unigram": unigram,
    "words": word_level,
    "word pieces": word_piece,
    "ordinary end": ordinary_eos,
}
ESCAPED = {"ignored merges", "merges", "unigram", "words", "word pieces"}


def save(tokenizer: Tokenizer, folder: Path, **config) -> Path:
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", **config}))
    return folder


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(KINDS[kind](), tmp_path_factory.mktemp("tok") / "tok")


def test_a_special_token_spelled_in_text_is_characters(kind: str, folder: Path) -> None:
    tokenizer = load_text_tokenizer(folder)
    assert bool(tokenizer.escaped) == (kind in ESCAPED)
    special = {tokenizer.tokenizer.token_to_id(token) for token in ("<s>", "</s>")}
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert special & set(raw.encode("tree </s> <s>").ids)
    for text in ("</s>", " </s> ", "a</s>b", "</s></s>", "tree </s>\n<s> gate", "</<s>/s>", "<</s>>"):
        ids = tokenizer.tokenizer.encode(text, add_special_tokens=False).ids
        assert ids
        assert not special & set(ids), (text, ids)
        if kind in ("byte-level", "ignored merges", "merges", "ordinary end"):
            assert tokenizer.tokenizer.decode(ids) == text


def test_other_text_keeps_its_ids(folder: Path) -> None:
    tokenizer = open_tokenizer(folder)
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in [*CORPUS, "<s", "/s>", "< s >", "</ s>", "s>"]:
        assert tokenizer.encode(text, add_special_tokens=False).ids == raw.encode(text, add_special_tokens=False).ids


def test_the_copy_in_a_dataset_encodes_equally(folder: Path, tmp_path: Path) -> None:
    copy_tokenizer(folder, tmp_path / "copy", None)
    info = load_tokenizer(folder)[1]
    assert load_tokenizer(tmp_path / "copy")[1] == info
    require_golden(info.golden, tmp_path / "copy")


REBUILDING = {
    "GPT2Tokenizer": {"add_prefix_space": True},
    "LlamaTokenizerFast": {"add_bos_token": True, "legacy": True, "bos_token": "<s>"},
    "T5Tokenizer": {"extra_ids": 3, "additional_special_tokens": ["<new>"]},
    "OurTokenizer": {"auto_map": {"AutoTokenizer": ["ours.OurTokenizer", None]}, "pad_token": "<pad>"},
}


@pytest.mark.parametrize("name", list(REBUILDING))
def test_the_export_gives_the_ids_of_training_whatever_class_its_source_names(
    name: str, kind: str, folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ends = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    source = save(
        tokenizer, tmp_path / "source", tokenizer_class=name, chat_template="{{ bos_token }}", **REBUILDING[name]
    )
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("\n".join(CORPUS), encoding="utf-8")
    write_tokenizer(source, tmp_path / "out")
    compared = prove_tokenizer(source, tmp_path / "out")
    assert compared["texts"] > 50
    assert compared["tokens"] > 300
    exported = AutoTokenizer.from_pretrained(tmp_path / "out")
    trained = open_tokenizer(source)
    for text in ("a b  c", "tree </s> gate"):
        ids = exported(text, split_special_tokens=True).input_ids  # also without add_special_tokens=False
        assert ids == trained.encode(text, add_special_tokens=False).ids
    assert (exported.eos_token, exported.pad_token, exported.bos_token) == ("</s>", "</s>", None)
    assert exported.chat_template == "{{ bos_token }}"
    # asked for, as transformers does by default: fine-tuning ends its texts so
    assert exported("tree</s>").input_ids[-1] == exported.eos_token_id
    # `generate` opens the exported files as training opened the run's
    assert open_tokenizer(tmp_path / "out").encode("a</s>b").ids == trained.encode("a</s>b").ids


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer_class": "GPT2Tokenizer"}, r"\(GPT2Tokenizer\) has another vocabulary"),
        ({"extra_special_tokens": ["<new>"]}, "has another vocabulary"),
        ({"eos_token": "<s>"}, "has the end-of-document token '<s>', not '</s>'"),
        ({"eos_token": 5}, "transformers cannot load the tokenizer"),
        ({"split_special_tokens": True, "unk_token": "!"}, "decodes the tokens of .* differently"),
    ],
)
def test_an_export_whose_tokenizer_differs_fails_the_proof(change: dict, message: str, tmp_path: Path) -> None:
    source = save(byte_level(), tmp_path / "source")
    (tmp_path / "out").mkdir()
    write_tokenizer(source, tmp_path / "out")
    prove_tokenizer(source, tmp_path / "out")
    path = tmp_path / "out" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(RunError, match=f"export failed its parity proof: .*{message}.*; nothing was written"):
        prove_tokenizer(source, tmp_path / "out")


def test_a_post_processor_of_the_exported_file_fails_the_proof(tmp_path: Path) -> None:
    source = save(byte_level(), tmp_path / "source")
    (tmp_path / "out").mkdir()
    write_tokenizer(source, tmp_path / "out")
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(tmp_path / "out" / "tokenizer.json"))
    with pytest.raises(RunError, match="encodes .The quick brown .* differently than training"):
        prove_tokenizer(source, tmp_path / "out")


def test_an_export_keeps_a_tokenizer_file_that_needs_no_change(tmp_path: Path) -> None:
    source = save(byte_level(), tmp_path / "source")
    (tmp_path / "out").mkdir()
    write_tokenizer(source, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_padding_and_truncation_of_the_file_are_left_out(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    source = save(tokenizer, tmp_path / "source")
    (tmp_path / "out").mkdir()
    write_tokenizer(source, tmp_path / "out")
    prove_tokenizer(source, tmp_path / "out")
    assert len(open_tokenizer(tmp_path / "out").encode("a b c d e f").ids) > 4


def refused(values: dict, tmp_path: Path, message: str, eos: str = "</s>") -> None:
    folder = tmp_path / "tok"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(values))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    with pytest.raises(UserError, match=message) as caught:
        open_tokenizer(folder)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_with_dropout_is_refused(tmp_path: Path) -> None:
    values = json.loads(byte_level().to_str())
    values["model"]["dropout"] = 0.1
    refused(values, tmp_path, r"encodes at random \(BPE dropout 0.1\); set model.dropout in tokenizer.json to null")


@pytest.mark.parametrize(
    ("vocabulary", "unknown", "eos", "message"),
    [
        ({"</s>": 0, "a": 1}, "</s>", "</s>", "encodes characters outside its vocabulary as the end-of-document token"),
        (
            {"<unk>": 0, ".": 1, "a": 2},
            "<unk>",
            ".",
            "encodes the text '.' as the special token .* another token as --eos",
        ),
        ({"</s>": 0, "a": 1}, None, "</s>", r"cannot encode every text \(WordLevel error: .*\); add an unknown token"),
    ],
)
def test_a_tokenizer_that_cannot_keep_text_and_end_apart_is_refused(
    vocabulary: dict, unknown: str | None, eos: str, message: str, tmp_path: Path
) -> None:
    tokenizer = Tokenizer(models.WordLevel(vocabulary, **({"unk_token": unknown} if unknown else {})))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    refused(json.loads(tokenizer.to_str()), tmp_path, message, eos)


def test_a_tokenizer_that_encodes_few_words_is_refused_with_a_post_processor_too(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"</s>": 0, "x": 1}))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    refused(json.loads(tokenizer.to_str()), tmp_path, r"cannot encode every text \(WordLevel error: .*\)")


def test_the_tokens_of_a_post_processor_are_reported(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]),
        ]
    )
    loaded = load_text_tokenizer(save(tokenizer, tmp_path / "tok"))
    assert loaded.omitted == ("<s>", "</s>")
    assert loaded.tokenizer.encode("a").tokens == ["a"]
    assert load_text_tokenizer(save(byte_level(), tmp_path / "bare")).omitted == ()


def test_an_added_token_that_is_not_special_stays_one_token(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    loaded = open_tokenizer(save(tokenizer, tmp_path / "tok"))
    assert loaded.encode("a<think>b").tokens == ["a", "<think>", "b"]
