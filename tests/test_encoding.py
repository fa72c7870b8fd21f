"""The fast encoder gives the ids of the reference library, on real and adversarial text, or it is not used."""

import dataclasses
import json
import random
import shutil
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from data_tools import encoding
from data_tools.build import build_shards
from data_tools.encoding import Encoder
from data_tools.options import BuildOptions
from data_tools.tokenizers import load_tokenizer
from fusiontree.data.format import Dataset, Manifest, tokenizer_fingerprint
from fusiontree.data.tokenizer import GOLDEN_TEXTS
from fusiontree.errors import RunError, UserError

STDLIB = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def split_by(pattern: str) -> pre_tokenizers.Sequence:
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), last])


SUPPORTED = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "llama3": split_by(LLAMA3),
    "qwen2": split_by(LLAMA3.replace("{1,3}", "")),
}
UNSUPPORTED = {
    "digits": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "words": split_by(r"\w+|\W+"),
}
POOLS = [
    *(range(32, 127), range(0x300), range(0x300, 0x3000), range(0x3000, 0xD7FF), range(0x1F300, 0x1F700)),
    *([9, 10, 11, 12, 13, 0x1C, 0x20, 0x85, 0xA0, 0x2009, 0x200B, 0x200D, 0x2028, 0x3000, 0xFEFF, 0xFE0F],),
    *([ord(c) for c in "'sStTrReEvVmMlLdD0123456789_.-<|>/ \r\n"],),
    *(range(0x660, 0x66A), range(0x2070, 0x2090), [0xBD, 0x2460, 0x3007, 0x1D7CE, 0x10FFFF, 0xE000]),
]


def train(kind: str, folder: Path) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = (SUPPORTED | UNSUPPORTED)[kind]
    tokenizer.decoder = decoders.ByteLevel()
    if kind == "llama3":
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<s>", "</s>", "<|end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((path.read_text(encoding="utf-8") for path in STDLIB[:20]), trainer)
    if kind == "llama3":
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module", params=list(SUPPORTED))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(request.param, tmp_path_factory.mktemp("tok") / request.param)


@pytest.mark.slow
def test_real_text_gets_the_ids_of_the_reference(folder: Path) -> None:
    encoder = Encoder(folder)
    reference, info = load_tokenizer(folder)
    assert (encoder.name, encoder.note) == ("gigatoken", "")
    for path in STDLIB:
        text = path.read_bytes().decode("utf-8")
        assert encoder.encode(text).tolist() == [*reference.encode(text, add_special_tokens=False).ids, info.eos_id]


@pytest.mark.slow
def test_adversarial_text_gets_the_ids_of_the_reference(folder: Path) -> None:
    encoder = Encoder(folder)
    reference, info = load_tokenizer(folder)
    draw = random.Random(0)
    texts = ["".join(chr(draw.choice(draw.choice(POOLS))) for _ in range(draw.randint(1, 80))) for _ in range(3000)]
    texts += [*GOLDEN_TEXTS, "a" * 50_000, " " * 50_000, "\n" * 9999, "<|end|></s> <s>x", "ab" * 20_000, "🌲" * 9999]
    for text in texts:
        expected = [*reference.encode(text, add_special_tokens=False).ids, info.eos_id]
        assert encoder.encode(text).tolist() == expected, repr(text[:80])


def test_both_libraries_give_the_same_shards(folder: Path, corpus: Path, tmp_path: Path) -> None:
    for library in ("gigatoken", "tokenizers"):
        figures = build_shards([corpus], folder, tmp_path / library, BuildOptions(row_len=512, encoder=library))
        assert figures["encoder"] == library
    manifests = [Manifest.load(tmp_path / library) for library in ("gigatoken", "tokenizers")]
    assert manifests[0] == manifests[1]


def test_recreating_the_fast_encoder_bounds_its_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    created = []
    fast = encoding._fast_encoder
    monkeypatch.setattr(encoding, "_fast_encoder", lambda definition: created.append(1) or fast(definition))
    monkeypatch.setattr(encoding, "_RECREATE_CHARS", 1000)
    encoder = Encoder(folder)
    first = encoder.encode("tree " * 100)
    for _ in range(3):
        assert np.array_equal(encoder.encode("tree " * 100), first)
    assert len(created) == 1 + 1


@pytest.mark.parametrize("kind", list(UNSUPPORTED))
def test_unsupported_split_rules_use_the_reference(kind: str, tmp_path: Path) -> None:
    encoder = Encoder(train(kind, tmp_path / "tok"))
    reference, info = load_tokenizer(tmp_path / "tok")
    assert encoder.name == "tokenizers"
    for text in (*GOLDEN_TEXTS, "tree_gate 2026 !?"):
        assert encoder.encode(text).tolist() == [*reference.encode(text, add_special_tokens=False).ids, info.eos_id]


def write_wordpiece(folder: Path) -> Path:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "[EOS]": 1, "tree": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["[UNK]", "[EOS]"])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_unsupported_models_use_the_reference(tmp_path: Path) -> None:
    encoder = Encoder(write_wordpiece(tmp_path / "tok"))
    assert encoder.name == "tokenizers"
    assert encoder.note.startswith("gigatoken cannot load the tokenizer: ")
    assert encoder.encode("tree leaf").tolist() == [2, 0, 1]
    with pytest.raises(UserError, match="--encoder gigatoken: gigatoken cannot load the tokenizer"):
        Encoder(tmp_path / "tok", library="gigatoken")


def test_a_fast_library_that_disagrees_is_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "_fast_encoder", lambda definition: lambda text: np.zeros(len(text), np.uint32))
    encoder = Encoder(folder)
    assert encoder.name == "tokenizers"
    assert "encodes 'The quick brown fox didn'" in encoder.note.replace('"', "'")


def test_an_audit_finds_a_disagreement(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(folder)
    encoder.audit("tree gate")
    encoder._fast = lambda text: np.zeros(len(text), np.uint32)
    with pytest.raises(RunError, match="encode 'tree gate' differently; build with --encoder tokenizers"):
        encoder.audit("tree gate")


# --- characters on which the libraries differ ------------------------------------------------------------------------

NEW = "\ua7ce\ua7d2\U00010940\U00011db0\U00016ea0"  # letters of Unicode 17


def test_characters_unknown_to_the_reference_get_its_ids(folder: Path, corpus: Path, tmp_path: Path) -> None:
    encoder = Encoder(folder)
    reference, info = load_tokenizer(folder)
    for character in NEW:
        text = f"return{character}'s"
        ids = reference.encode(text, add_special_tokens=False).ids
        assert encoder._fast(text).tolist() != ids  # or the next lines show nothing
        assert encoder.encode(text).tolist() == [*ids, info.eos_id]
        encoder.audit(text)
    (tmp_path / "in.txt").write_text(f"{NEW}'s first document", encoding="utf-8")
    figures = build_shards([tmp_path / "in.txt", corpus], folder, tmp_path / "set", BuildOptions(row_len=512))
    assert figures["encoder"] == "gigatoken"


def test_marks_unknown_to_the_normal_form_of_the_reference_get_its_ids(tmp_path: Path) -> None:
    folder = train("llama3", tmp_path / "tok")
    encoder = Encoder(folder)
    reference, info = load_tokenizer(folder)
    # marks of Unicode 11 and 10 that are reordered, and pairs of Unicode 16 that are composed
    pairs = ("\U000105d2\u0307", "\U000113c2\U000113c2", "\U00016d67\U00016d67")
    for text in ("a\u0345\u07fd", "a\u0345\u1df6", *pairs):
        ids = reference.encode(text, add_special_tokens=False).ids
        assert encoder._fast(text).tolist() != ids
        assert encoder.encode(text).tolist() == [*ids, info.eos_id]


@pytest.mark.parametrize(
    "text",
    ["naïve café e\u0301", "東京タワー", "हिन्दी", "ไทย", "Ёжик", "🤩🫶👩\u200d👧\ufe0f", "한국어", "ﬁ①½", "\U0001d41b"],
)
def test_common_text_stays_with_the_fast_library(folder: Path, text: str) -> None:
    encoder = Encoder(folder)
    encoder._ids = None  # the reference
    assert len(encoder.encode(text)) > 1


def write_boundary_tokenizer(kind: str, folder: Path) -> Path:
    """Write a tokenizer with merges across each end of a non-ASCII character: its ids show where text is split."""
    alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    byte = [alphabet.pre_tokenize_str(chr(code))[0][0] for code in range(128)]
    high = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(byte))
    merges = [pair for near in "ab12 .'\n" for end in high for pair in ((byte[ord(near)], end), (end, byte[ord(near)]))]
    merges += [(first, second) for first in high for second in high]
    tokens = dict.fromkeys(["</s>", *byte, *high, *(first + second for first, second in merges)])
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = SUPPORTED[kind], decoders.ByteLevel()
    tokenizer.normalizer = normalizers.NFC() if kind == "llama3" else None
    tokenizer.add_special_tokens(["</s>"])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(SUPPORTED))
def test_every_code_point_gets_the_ids_of_the_reference(kind: str, tmp_path: Path) -> None:
    encoder = Encoder(write_boundary_tokenizer(kind, tmp_path / "tok"))
    assert encoder.name == "gigatoken"
    assert any(not encoder._agree(f"a{character}b") for character in NEW)  # the ids show the class of a character
    codes = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    sure = [character for character in codes if not encoder._divergence.possible(character)]
    assert len(sure) > 250_000
    # marks on either side show a character's combining class
    templates = ["a{0}b 1{0}2{0} ", " {0}{0}'s", ".{0}.'{0}", "\n{0}\u0334", "a\u0345{0}\u0301"]
    for start in range(0, len(sure), 256):
        # the planes of private use have one class and no marks
        for template in templates if sure[start] < "\U000f0000" else templates[:1]:
            text = "".join(template.format(character) for character in sure[start : start + 256])
            assert encoder._agree(text), (hex(ord(sure[start])), template)


def test_documents_do_not_get_the_tokens_of_a_post_processor(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = train("llama3", tmp_path / "tok")
    figures = build_shards([corpus], folder, tmp_path / "set", BuildOptions(row_len=512))
    assert figures["omitted"] == ("<s>",)
    assert "the tokenizer's post-processor adds <s> to each text; documents do not get it" in capsys.readouterr().err
    dataset = Dataset(tmp_path / "set", "train")
    assert not any((dataset.row(row)[0] == 0).any() for row in range(dataset.num_rows))


# --- tokenizer folders -----------------------------------------------------------------------------------------------


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "copy")


def test_the_end_of_document_token_is_read_from_the_configuration(copy: Path) -> None:
    assert load_tokenizer(copy)[1].eos_id == 1  # </s>, the only well-known one
    (copy / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|end|>"}, "pad_token": "<s>"}')
    info = load_tokenizer(copy)[1]
    assert (info.eos_id, info.pad_id) == (2, 0)
    (copy / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    assert load_tokenizer(copy)[1].eos_id == 1
    assert load_tokenizer(copy, "<s>")[1].eos_id == 0


def test_an_ambiguous_end_of_document_token_is_refused_with_candidates(copy: Path) -> None:
    path = copy / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace("</s>", "<eos>"), encoding="utf-8")
    assert load_tokenizer(copy)[1].eos_id == 1
    path.write_text(path.read_text(encoding="utf-8").replace("<eos>", "<fin>"), encoding="utf-8")
    with pytest.raises(
        UserError, match=r"names no end-of-document token; give --eos TOKEN, for example <fin> or <s> or"
    ):
        load_tokenizer(copy)
    with pytest.raises(UserError, match="--eos names '<none>', which is not in the vocabulary; give --eos TOKEN"):
        load_tokenizer(copy, "<none>")


def test_the_copied_tokenizer_names_the_given_eos_token(copy: Path, corpus: Path, tmp_path: Path) -> None:
    build_shards([corpus], copy, tmp_path / "set", BuildOptions(row_len=512, eos="<|end|>"))
    assert load_tokenizer(tmp_path / "set" / "tokenizer")[1] == load_tokenizer(copy, "<|end|>")[1]
    config = json.loads((tmp_path / "set" / "tokenizer" / "tokenizer_config.json").read_text())
    assert config["eos_token"] == "<|end|>"


def test_the_copied_tokenizer_names_padding_from_special_tokens_map(
    tokenizer_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    bare = shutil.copytree(tokenizer_folder, tmp_path / "bare")
    config = json.loads((bare / "tokenizer_config.json").read_text())
    pad = {"pad_token": config.pop("pad_token")}
    (bare / "tokenizer_config.json").write_text(json.dumps(config))
    (bare / "special_tokens_map.json").write_text(json.dumps(pad))
    build_shards([corpus], bare, tmp_path / "set", BuildOptions(row_len=512))
    assert Manifest.load(tmp_path / "set").tokenizer == load_tokenizer(tmp_path / "set" / "tokenizer")[1]


def test_golden_samples_are_compared(copy: Path) -> None:
    info = load_tokenizer(copy)[1]
    manifest = Manifest(512, "uint16", "s", info, {})
    assert list(info.golden) == list(GOLDEN_TEXTS)
    manifest.require_tokenizer(tokenizer_fingerprint(copy), copy)
    text, ids = next(iter(info.golden.items()))
    other = dataclasses.replace(info, golden=info.golden | {text: ids[:-1]})
    with pytest.raises(UserError, match="encodes 'The quick brown fox didn") as caught:
        dataclasses.replace(manifest, tokenizer=other).require_tokenizer(info.fingerprint, copy)
    assert "\n" not in str(caught.value)
