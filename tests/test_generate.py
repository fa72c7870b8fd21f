"""Batched prompts equal single prompts; invalid prompts are refused; Ctrl-C leaves nothing."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import SMALL, build, in_process, write_run
from safetensors.torch import load_file, save_file

from fusiontree.cli import main
from fusiontree.errors import RunError, UserError
from fusiontree.export.exporter import export
from fusiontree.export.options import ExportOptions
from fusiontree.inference import generate
from fusiontree.inference.decoder import PREFILL_TOKENS, Decoder
from fusiontree.inference.generate import generate_text, generate_texts, read_prompts, stream_tokens
from fusiontree.inference.loading import encode, exported_name, load_export, read_facts, trained_name
from fusiontree.inference.sampling import Sampling
from fusiontree.model.lm import HybridLM


@pytest.fixture(scope="module")
def run(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = dataclasses.replace(SMALL, vocab_size=512, srte="learned")
    run = tmp_path_factory.mktemp("runs") / "run"
    write_run(run, config, build(vocab_size=512, srte="learned").state_dict(), tokenizer_folder, 0, 1)
    return run


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    export(run, run / "out")
    return run / "out"


@pytest.mark.slow
def test_a_prompt_from_a_file_is_continued_as_it_is_alone(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    prompts = ["tree", "gate branch scan " * 6, "window\\tstate", "a shard of rows"]
    (tmp_path / "p.txt").write_text("\n".join(prompts) + "\n")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    sampling = Sampling(temperature=0.9, top_p=0.9, seed=3)
    alone = [generate_text(exported, prompt, 12, sampling) for prompt in prompts]
    for name in ("p.txt", "p.jsonl"):
        given = read_prompts(tmp_path / name)
        assert list(generate_texts(exported, given, 12, sampling, rows=3)) == alone
    words = ["generate", str(exported), "--prompts", str(tmp_path / "p.txt"), "--max-new-tokens", "12"]
    options = ["--temperature", "0.9", "--top-p", "0.9", "--seed", "3", "--batch", "2"]
    assert main([*words, *options, "--json"]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == alone
    assert main([*words, *options]) == 0
    assert capsys.readouterr().out == "".join(f"{each['prompt']}{each['text']}\n\n" for each in alone)


def test_a_large_batch_is_split_where_its_cache_exceeds_the_limit(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, sampling = {f"line {number}": "tree " * (1 + number % 3) for number in range(9)}, Sampling(temperature=0)
    whole = list(generate_texts(exported, prompts, 4, sampling, rows=4096))
    batches, stream = [], generate.stream_tokens

    def recorded(model: HybridLM, batch: list[list[int]], *others: object) -> Iterator[list[int]]:
        batches.append(len(batch))
        return stream(model, batch, *others)

    monkeypatch.setattr(generate, "stream_tokens", recorded)
    row_bytes = generate._BATCH_BYTES // generate._fitting_rows(load_export(exported)[0], 16)
    monkeypatch.setattr(generate, "_BATCH_BYTES", 4 * row_bytes)
    assert list(generate_texts(exported, prompts, 4, sampling, rows=4096)) == whole
    assert batches == [4, 4, 1]


def test_only_a_newline_ends_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "odd.jsonl").write_text('{"prompt": "a\u2028b\x85"}\r\n{"prompt": "c"}', encoding="utf-8")
    (tmp_path / "odd.txt").write_text("a\fb\nc\n")
    assert [*read_prompts(tmp_path / "odd.jsonl").values()] == ["a\u2028b\x85", "c"]
    assert [*read_prompts(tmp_path / "odd.txt").values()] == ["a\fb", "c"]


@pytest.mark.parametrize(
    "facts", ["{", "{}", "[]", "3", "[" * 100_000, '{"tokenizer_fingerprint": "", "seq_len": 8, "eos_id": "q"}']
)
def test_damaged_export_facts_are_reported(facts: str, exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "out")
    (tmp_path / "out" / "fusiontree.json").write_text(facts)
    error = in_process("generate", tmp_path / "out", "a", code=1).stderr
    assert "fusiontree.json is damaged" in error
    assert error.count("\n") == 1


def test_a_spelled_out_special_token_is_text(exported: Path) -> None:
    _, tokenizer = load_export(exported)
    spelled = tokenizer.id_to_token(read_facts(exported)["eos_id"])
    ids = encode(tokenizer, spelled)
    assert len(ids) > 1
    assert tokenizer.decode(ids) == spelled


@pytest.mark.slow
def test_weights_come_from_the_index_or_the_single_file(exported: Path, run: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "one")
    weights = load_file(exported / "model.safetensors")
    save_file(
        {name: torch.zeros_like(value) for name, value in weights.items()}, tmp_path / "one" / "zeros.safetensors"
    )
    model, _ = load_export(tmp_path / "one")
    assert all(torch.equal(value, weights[exported_name(name)]) for name, value in model.named_parameters())
    *rest, (name, _) = weights.items()
    save_file(dict(rest), tmp_path / "one" / "model.safetensors")
    with pytest.raises(RunError, match=f'is a damaged export .*"{trained_name(name)}"'):
        load_export(tmp_path / "one")
    export(run, tmp_path / "more", ExportOptions(max_shard_size="50KB"))
    index = tmp_path / "more" / "model.safetensors.index.json"
    index.write_text(re.sub("model-00001", "../more/model-00001", index.read_text()))
    with pytest.raises(RunError, match="which is outside its folder"):
        load_export(tmp_path / "more")


def test_invalid_prompts_and_options_are_refused_in_one_line(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    files = {"gap.txt": "a\n\nb\n", "none.txt": "", "bad.jsonl": '{"text": "a"}\n', "number.jsonl": '{"prompt": 3}\n'}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    folder = [str(exported)]
    for words, message in (
        ([*folder, ""], "the prompt is empty"),
        ([*folder, "tree " * 200], "exceed the learned time encoding's 128 positions; use fewer tokens"),
        (
            [*folder, "tree", "--max-new-tokens", "128"],
            "exceed the learned time encoding's 128 positions; use fewer tokens",
        ),
        (folder, "give either PROMPT or --prompts FILE"),
        ([*folder, "a", "--prompts", str(tmp_path / "gap.txt")], "give either PROMPT or --prompts FILE"),
        ([*folder, "--prompts", str(tmp_path / "gap.txt")], "gap.txt line 2 is empty"),
        ([*folder, "--prompts", str(tmp_path / "none.txt")], "none.txt has no prompts; write one per line"),
        ([*folder, "--prompts", str(tmp_path / "missing")], "no prompts file at"),
        ([*folder, "--prompts", str(tmp_path)], "no prompts file at"),
        ([*folder, "--prompts", str(tmp_path / "deep.jsonl")], "deep.jsonl line 1 is not an object such as"),
        ([*folder, "a", "--repetition-penalty", "inf"], "--repetition-penalty is inf; it must be above 0 and finite"),
        ([*folder, "--prompts", str(tmp_path / "latin.txt")], "latin.txt is not UTF-8 text"),
        ([*folder, "--prompts", str(tmp_path / "bad.jsonl")], "bad.jsonl line 1 is not an object such as"),
        ([*folder, "--prompts", str(tmp_path / "number.jsonl")], "prompt is 3; it must be a string"),
        ([*folder, "a", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (
            [*folder, "a", "--max-new-tokens", str(10**11)],
            "is 100000000000; it must be from 1 to 2^31 - 1",
        ),
        ([*folder, "a", "--seed", str(2**63)], "--seed is 9223372036854775808; it must be from 0 to 2^63 - 1"),
        ([str(tmp_path), "a"], "is not an exported model"),
    ):
        assert main(["generate", *words]) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.err.count("\n") == 1
        assert captured.out == ""


def test_prefill_in_pieces_bounds_the_memory() -> None:
    model, pieces = build(), []
    model.register_forward_pre_hook(lambda _module, inputs: pieces.append(inputs[0].numel()))
    Decoder(model, 3, room=1500).prefill(torch.ones(3, 1500, dtype=torch.int64))
    assert sum(pieces) == 3 * 1500
    assert max(pieces) <= PREFILL_TOKENS["cpu"] <= 4096  # of all rows


def test_a_cache_larger_than_memory_is_refused() -> None:
    words = "not enough memory for the cache of 1 rows of 100,000,000,000,001 tokens; lower --max-new-tokens"
    with pytest.raises(UserError, match=words):
        next(stream_tokens(build(), [[1]], 10**14, Sampling(), None))


@pytest.mark.parametrize(
    ("prompt", "words"), [([5, 96], "token 96 is out of range"), ([-1], "token -1"), ([], "no token")]
)
def test_ids_outside_the_vocabulary_are_refused(prompt: list[int], words: str) -> None:
    with pytest.raises(UserError, match=words):
        next(stream_tokens(build(), [[1], prompt], 4, Sampling(), None))


@pytest.mark.slow
def test_a_token_outside_the_vocabulary_is_refused_before_any_output(
    tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write_run(tmp_path / "run", SMALL, build().state_dict(), tokenizer_folder, 0, 1)  # with a larger tokenizer
    export(tmp_path / "run", tmp_path / "out")
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "out"), "a tree", "--max-new-tokens", "9"]) == 2
    output = capsys.readouterr()
    assert re.fullmatch(
        r"fusiontree: error: the prompt: token \d+ is out of range; the model's are 0 to 95\n", output.err
    )
    assert output.out == ""


# Ctrl-C at a fixed place on any machine: the first call of `place.name` interrupts its own process
INTERRUPTED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite started in the background ignores it
import fusiontree.{module} as place
from fusiontree.cli import main
original = place.{name}
def interrupted(*arguments, **options):
    os.kill(os.getpid(), signal.SIGINT)
    return original(*arguments, **options)
place.{name} = interrupted
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_an_interrupted_export_leaves_nothing(run: Path, tmp_path: Path) -> None:
    code = INTERRUPTED.format(module="export.exporter", name="prove")
    command = [sys.executable, "-c", code, "export", str(run), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "interrupted; no partial output is left under its final name" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_interrupted_generation_ends_with_one_line(exported: Path) -> None:
    code = INTERRUPTED.format(module="inference.generate", name="draw")
    command = [sys.executable, "-c", code, "generate", str(exported), "tree", "--max-new-tokens", "9"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stdout == "tree"
    assert done.stderr == "fusiontree: interrupted; no partial output is left under its final name\n"
