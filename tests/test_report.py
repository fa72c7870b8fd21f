"""The report is one self-contained page: checked in a real browser, from disk, without a network."""

import json
import random
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import in_process
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from fusiontree import cli as command_line
from fusiontree.config import load_config, to_yaml
from fusiontree.errors import UserError
from fusiontree.report import write_report
from fusiontree.report.collect import MAX_COLUMNS, MAX_POINTS, collect, downsample
from fusiontree.run import incidents

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium here: apt-get install chromium")
LAYERS = 4  # of the preset tiny


def make_run(folder: Path, steps: int, name: str = "made", layers_every: int = 5, **changes: object) -> Path:
    """Write a run's folder as training leaves it after `steps` updates, with invented figures."""
    words = [f"name={name}", *(f"{key.replace('__', '.')}={value}" for key, value in changes.items())]
    run = folder / name
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(load_config("tiny", words)))
    draw = random.Random(0)
    lines: list[dict] = [{"step": 0, "tokens": 0, "val_loss": 9.0, "val_loss/a": 8.9, "val_loss/b": 9.1}]
    layers = []
    for step in range(1, steps + 1):
        figures = {"loss": 9 / step**0.2, "lr": 1e-3, "grad_norm": draw.random() + 0.1, "gate_mean": 0.5}
        measured = {"tokens_per_s": 1000.0, "tflop_per_s": 0.02, "mfu": 0.4, "memory_gib": 1.5, "perplexity": 9.0}
        lines.append({"step": step, "tokens": step * 4096, **figures, **measured})
        if step % layers_every == 0:
            by_layer = [draw.random() for _ in range(LAYERS)]
            names = ("gate_mean", "gate_std", "mamba_rms", "attention_rms", "grad_norm")
            layers.append({"step": step, **dict.fromkeys(names, by_layer), "flop_share": {"scan": 0.25, "mlp": 0.75}})
    parts = {"val_loss_by_length/0-256": 5.0, "val_loss_by_length/256-1K": 4.0}
    lines.append(
        {"step": steps, "tokens": steps * 4096, "val_loss": 4.5, "val_loss/a": 4.4, "val_loss/b": 4.6, **parts}
    )
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "layers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in layers))
    (run / "checkpoints" / f"step-{steps}").mkdir()
    save_file({"mean": torch.rand(LAYERS, 256)}, run / "checkpoints" / f"step-{steps}" / "gates.safetensors")
    return run


def browse(page: Path, folder: Path, script: str = "") -> str:
    """Return the page's DOM after its scripts and `script`; the console must have no error."""
    copy = folder / "browsed.html"
    copy.write_text(page.read_text().replace("</body>", f"<script>{script}</script></body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={folder}/b"]
    offline = ["--proxy-server=127.0.0.1:9", "--host-resolver-rules=MAP * ~NOTFOUND"]
    assert BROWSER is not None
    command = [BROWSER, *options, *offline, "--dump-dom", copy.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not console, console
    return done.stdout


def count(kind: str, dom: str) -> int:
    return len(re.findall(rf'class="{kind}"', dom))


@pytest.mark.slow
@needs_browser
def test_one_runs_page_draws_every_curve_and_cell(tmp_path: Path) -> None:
    run = make_run(tmp_path, 40)
    incidents.record(run, "skipped_update", 7, "a </script><b id=evil> & more", rank=3)
    incidents.record(run, "rollback", 9, "back to step 5")
    write_report([run])
    everything = (
        "for (const b of document.querySelectorAll('button')) { b.click(); b.click(); }"
        "document.querySelector('[value=tokens]').click();"
        "for (const s of document.querySelectorAll('figure > svg')) {"
        "  const box = s.getBoundingClientRect(), at = { clientX: box.left + 90, clientY: box.top + 20 };"
        "  s.dispatchEvent(new PointerEvent('pointermove', at));"
        "  s.dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowRight' })); }"
        "document.documentElement.dataset.done = document.getElementById('tip').textContent;"
    )
    dom = browse(run / "report.html", tmp_path, everything)
    # loss, three of validation, lr, gradient norm, throughput, MFU, gate, memory, by length
    assert count("curve", dom) == 11
    assert all(re.search(r'class="curve" d="M[^"]+L', line) for line in re.findall(r"<path[^>]*curve[^>]*>", dom))
    assert count("cell", dom) == LAYERS * (40 // 5 + 256)
    assert count("event", dom) == 3
    assert "<b id" not in dom
    assert "a &lt;/script&gt;&lt;b id=evil&gt; &amp; more" in dom
    assert re.search(r'data-done="[^"]+"', dom)


@pytest.mark.slow
@needs_browser
def test_several_runs_are_compared_on_one_page(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, 20, "one"), make_run(tmp_path, 30, "two", optimizer__lr=1e-4)]
    page = Path(write_report(runs)["report"])
    assert page == runs[0] / "compare.html"
    dom = browse(page, tmp_path)
    assert count("curve", dom) == 22
    assert count("cell", dom) == LAYERS * (4 + 6 + 2 * 256)
    (differences,) = re.findall(r'<table class="config differences">(.*?)</table>', dom)
    assert re.findall(r'scope="row">([^<]*)', differences) == ["name", "optimizer.lr"]
    assert "<td>0.003</td><td>0.0001</td>" in differences


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("kind", ["empty", "first validation only", "diverged"])
def test_a_run_with_few_or_invalid_figures_has_a_page(kind: str, tmp_path: Path) -> None:
    run = make_run(tmp_path, 6, layers_every=3)
    if kind != "diverged":
        shutil.rmtree(run / "checkpoints")
        (run / "layers.jsonl").unlink()
        kept = (run / "metrics.jsonl").read_text().splitlines(keepends=True)[:1]
        (run / "metrics.jsonl").write_text("".join(kept if kind == "first validation only" else []))
    else:
        bad = {"step": 7, "tokens": 1, "loss": float("nan"), "grad_norm": float("inf"), "gate_mean": 0.0}
        with open(run / "metrics.jsonl", "a") as stream:
            stream.write(json.dumps(bad) + "\n" + '{"step": 8, "lo')
        (run / "checkpoints" / "step-6" / "gates.safetensors").write_bytes(b"damaged")
    write_report([run])
    dom = browse(run / "report.html", tmp_path).partition("<footer")[0]
    assert count("curve", dom) == {"empty": 0, "first validation only": 3, "diverged": 11}[kind]
    assert ("No figures were recorded." in dom) is (kind == "empty")
    assert "NaN" not in dom


def test_the_page_is_self_contained(tmp_path: Path) -> None:
    run = make_run(tmp_path, 10)
    write_report([run])
    page = (run / "report.html").read_text()
    assert set(re.findall(r"\w+://[^\s\"']+", page)) == {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in page
    assert not re.search(r"<(link|img|iframe)\b|\bsrc=|@import|url\(", page)


@pytest.mark.slow
def test_a_long_run_has_a_small_page(tmp_path: Path) -> None:
    run = make_run(tmp_path, 100_000, layers_every=100)
    figures = write_report([run])
    assert figures["page_bytes"] < 1_000_000
    shown = collect(run)
    assert len(shown["curves"]["loss"][0]) <= MAX_POINTS
    assert shown["curves"]["loss"][0][-1] == 100_000
    assert len(shown["layers"]["steps"]) == MAX_COLUMNS
    assert shown["layers"]["steps"][-1] == 100_000


VALUES = st.floats(-1e6, 1e6)


@given(
    st.lists(VALUES, min_size=1, max_size=80) | st.lists(st.none() | VALUES, min_size=1, max_size=80),
    st.integers(6, 16),
)
def test_a_downsampled_curve_keeps_its_ends_and_its_peaks(values: list[float | None], limit: int) -> None:
    kept = downsample(np.array(values, dtype=np.float64), limit).tolist()
    assert len(kept) <= limit
    assert kept == sorted(set(kept))
    assert (kept[0], kept[-1]) == (0, len(values) - 1)
    heights = [value for value in values if value is not None]
    if heights:
        assert max(heights) in [values[index] for index in kept]
    if len(heights) == len(values):
        assert min(heights) in [values[index] for index in kept]


def test_a_configuration_is_shown_without_validation(tmp_path: Path) -> None:
    run = make_run(tmp_path, 5)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["gone"] = 1
    config["later"] = {"key": None}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    shown = collect(run)
    assert shown["config"]["later.key"] == "null"
    assert shown["facts"]["parameters"] == "—"


def test_invalid_arguments_are_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, 5)
    (tmp_path / "other").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.yaml").write_text("a: [1,")
    for words, message in (
        ([tmp_path / "other"], "other; give a run's folder, e.g. runs/NAME"),
        ([tmp_path / "none"], "no run at"),
        ([tmp_path / "broken"], "config.yaml cannot be read"),
        ([run, run], "a run is given twice"),
        ([run, "--out", tmp_path / "no" / "r.html"], "does not exist; create it first"),
        ([run, "--out", tmp_path], "is a folder; name a file"),
    ):
        assert command_line.main(["report", *map(str, words)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert list(run.glob("*.html")) == []


def test_the_command_reports_the_page(tmp_path: Path) -> None:
    run, page = make_run(tmp_path, 5), tmp_path / "page.html"
    figures = json.loads(in_process("report", run, "--out", page, "--json").stdout)
    assert figures == {"report": str(page), "runs": ["made"], "page_bytes": page.stat().st_size}


def test_runs_with_the_same_name_are_labelled_by_folder(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / side, 5) for side in ("left", "right")]
    assert write_report(runs, tmp_path / "p.html")["runs"] == [str(run) for run in runs]
    with pytest.raises(UserError, match="given twice"):
        write_report([runs[0], runs[0]])


MARKUP = "</script></title><b id=evil>&amp;'\"`${x}$title"


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """Write a run whose folder, name, values, sources, parts and incidents contain harmless markup."""
    run = make_run(tmp_path, 20)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config |= {"name": MARKUP + "\ud800", MARKUP: MARKUP}
    config["data"]["path"] = MARKUP
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    line = {"step": 20, "tokens": 1, "val_loss": 4.0, f"val_loss/{MARKUP}": 4.0, f"val_loss_by_length/{MARKUP}": 4.0}
    names = ("gate_mean", "gate_std", "mamba_rms", "attention_rms", "grad_norm")
    layers = {"step": 20, **{name: [0.5] * LAYERS for name in names}, "flop_share": {MARKUP: 1.0}}
    for name, record in (("metrics.jsonl", line), ("layers.jsonl", layers)):
        with open(run / name, "a") as stream:
            stream.write(json.dumps(record) + "\n")
    incidents.record(run, MARKUP, 7, MARKUP, rows=[{"shard": MARKUP}])
    return run.rename(tmp_path / "[b]<b id=evil>")


def test_markup_in_names_and_values_is_shown_as_text(hostile: Path) -> None:
    page = Path(write_report([hostile])["report"]).read_text()
    assert page.count("<title>") == page.count("</title>") == 1
    assert page.count("<script") == page.count("</script>") == 2
    assert "<b id=evil>" not in page
    data = page.partition('id="data">')[2].partition("</script>")[0]
    (shown,) = json.loads(data)
    assert shown["name"] == MARKUP + "?"
    assert MARKUP in shown["flop_share"]


@pytest.mark.slow
@needs_browser
def test_markup_in_names_and_values_makes_no_element(hostile: Path, tmp_path: Path) -> None:
    write_report([hostile])
    count_evil = "document.documentElement.dataset.evil = document.querySelectorAll('#evil').length;"
    hover = "for (const e of document.querySelectorAll('.event')) e.dispatchEvent(new PointerEvent('pointerenter'));"
    dom = browse(hostile / "report.html", tmp_path, hover + count_evil)
    assert 'data-evil="0"' in dom
    assert count("curve", dom) == 12


def test_a_configuration_with_aliases_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path, 5)
    (run / "config.yaml").write_text("a: &a [1, 1]\nb: &b [*a, *a]\nc: [*b, *b]\n")
    with pytest.raises(UserError, match="it has aliases"):
        collect(run)
