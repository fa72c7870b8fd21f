"""The benchmarks run the code that users run, and their figures are consistent. Nothing here asserts a speed."""

import contextlib
import json
import math
import statistics
import sys
import types
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MICRO, cli
from torch import Tensor

from fusiontree.bench import operations, rows
from fusiontree.bench import train as bench
from fusiontree.bench.decode import bench_decode, random_model
from fusiontree.bench.peers import PEERS, Peer, _build, check_peer
from fusiontree.bench.profiling import Kernel, _busy_seconds, _device_kernels, kind_of
from fusiontree.config import RunConfig, load_config
from fusiontree.device import device_name, oom_context, peak_flops
from fusiontree.errors import RunError, UserError
from fusiontree.inference import speed
from fusiontree.model import flops
from fusiontree.model.kernel_registry import OPERATIONS

CPU = torch.device("cpu")
SHAPE = [f"{key}={value}" for key, value in MICRO.items() if key.startswith("model.")]


def micro(*overrides: str, seq_len: int = 96) -> RunConfig:
    return bench.bench_config("tiny", [*SHAPE, *overrides], CPU, bench.Workload(seq_len=seq_len))


# --- rows ------------------------------------------------------------------------------------------------------------


def test_rows_are_filled_exactly_and_differ_from_step_to_step() -> None:
    batch, same, other = (rows.synthetic_batch("packed", 2, 4096, 512, (0, step)) for step in (0, 0, 1))
    assert batch.input_ids.shape == (2, 4096)
    assert sum(batch.lengths) == 2 * 4096
    assert np.array_equal(batch.input_ids, same.input_ids)
    assert not np.array_equal(batch.input_ids, other.input_ids)
    assert batch.lengths != other.lengths
    assert set(np.unique(batch.input_ids)) == set(range(512))


def test_document_lengths_have_the_stated_distribution() -> None:
    lengths = np.array(rows.document_lengths("packed", 20_000_000, np.random.default_rng(0)))
    assert np.median(lengths) == pytest.approx(1024, rel=0.05)
    assert np.log(lengths).std() == pytest.approx(1.2, rel=0.02)


def test_a_single_document_fills_the_row() -> None:
    assert rows.synthetic_batch("single", 3, 128, 512, (0,)).lengths == [128] * 3


# --- training --------------------------------------------------------------------------------------------------------


def test_the_default_is_one_row_under_zero1() -> None:
    config = bench.bench_config("tiny", [], CPU)
    assert (config.batch.tokens, config.data.seq_len, config.deepspeed) == (1024, 1024, "zero1")
    assert (config.activation_checkpointing.policy, config.precision) == ("none", "fp32")
    config = bench.bench_config(
        "tiny", ["deepspeed=zero2"], CPU, bench.Workload(seq_len=512, batch_tokens=2048, recompute="full")
    )
    assert (config.batch.tokens, config.data.seq_len, config.deepspeed) == (2048, 512, "zero2")
    assert config.activation_checkpointing.policy == "full"
    assert bench.bench_config("1b", [], torch.device("cuda")).precision == "bf16"


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """Figures and profile of one run of the command, with a peer."""
    report = tmp_path_factory.mktemp("bench") / "step.md"
    options = ["--seq-len", 2048, "--batch-tokens", 4096, "--steps", 2, "--warmup", 1, "--peer", "hf-falcon-h1"]
    done = cli("bench", "train", "--preset", "tiny", *options, "--profile", report, "--json", *SHAPE)
    figures = json.loads(done.stdout)
    assert f": {figures['tokens_per_s']:,.0f} tokens/s; next: hf-falcon-h1" in done.stderr
    return figures, report.read_text()


def test_training_figures_agree_with_one_another(measured: tuple[dict[str, Any], str]) -> None:
    figures, _ = measured
    assert figures["tokens_per_s"] == pytest.approx(4096 / figures["step"]["median_seconds"])
    assert figures["step"]["min_seconds"] <= figures["step"]["median_seconds"] <= figures["step"]["max_seconds"]
    assert figures["kernels"] == dict.fromkeys(OPERATIONS, "reference")
    assert figures["loss"] == pytest.approx(math.log(512), rel=0.05)
    assert (figures["mfu"], figures["mfu_6n"], figures["peak_memory_bytes"]) == (None, None, None)
    assert sum(figures["model_tflop_share"].values()) == pytest.approx(1)
    assert figures["ratio"] == pytest.approx(figures["tokens_per_s"] / figures["peer"]["tokens_per_s"])


def test_model_flops_count_the_timed_rows(measured: tuple[dict[str, Any], str]) -> None:
    config = micro("batch.tokens=4096", seq_len=2048)
    assert config.accumulation_steps(1) == 2
    workload = bench.Workload(steps=2, warmup=1)
    totals = []
    for step in (0, 1, 2):
        batches = bench.synthetic_batches(config, workload, step)
        assert not np.array_equal(batches[0].input_ids, batches[1].input_ids)
        lengths = [length for batch in batches for length in batch.lengths]
        totals.append(sum(flops.update_flops(config.model, lengths).values()))
    assert measured[0]["model_tflop_per_step"] == pytest.approx(statistics.mean(totals[1:]) / 1e12)
    assert totals[0] != totals[1]  # so including the warm-up step would change the mean


def test_the_peer_describes_itself(measured: tuple[dict[str, Any], str]) -> None:
    peer = measured[0]["peer"]
    assert peer["model"].endswith("FalconH1ForCausalLM")
    assert "each row is one document" in peer["documents"]
    assert peer["kernels"]["attention"] == "sdpa"
    assert peer["kernels"]["scan"].startswith("transformers.")
    assert peer["recompute"] == "full"


def test_the_profile_ranks_kinds_and_kernels(measured: tuple[dict[str, Any], str]) -> None:
    figures, text = measured
    kinds, named = ([line.split("|") for line in part.splitlines()] for part in text.split("--:|\n|")[1:])
    shares = [float(cells[-2].strip(" %")) for cells in kinds if len(cells) > 3 and cells[-2].endswith("% ")]
    assert len(shares) == len(figures["profile"]["shares"])
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=1)
    assert sum(figures["profile"]["shares"].values()) == pytest.approx(1)
    assert any("aten::mm" in cell for cells in named for cell in cells)
    assert figures["profile"]["busy_seconds"] <= figures["profile"]["step_seconds"] * 1.01


def test_a_peer_out_of_memory_keeps_our_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    class TooLarge:
        def __init__(self, *_: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to get 2 GiB.")

    monkeypatch.setattr(bench, "Peer", TooLarge)
    figures = bench._measure_peer(bench.PeerRun("hf-llama", False), micro(), bench.Workload(steps=1), CPU)
    expected = "out of GPU memory with hf-llama, 1 x 96 tokens, recompute none: CUDA out of memory. Tried to get 2 GiB"
    assert figures["problem"] == expected


def test_out_of_memory_is_one_line() -> None:
    expected = pytest.raises(RunError, match=r"^out of GPU memory with 1 x 8 tokens: none left stack$")
    with expected, oom_context("1 x 8 tokens"):
        raise torch.OutOfMemoryError("none left\nstack")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--preset", "2b"], "configuration 2b is neither a file nor a preset"),
        (["train", "--preset", "tiny", "--peer", "gpt"], "--peer gpt is unknown; choose from hf-llama"),
        (["train", "--preset", "tiny", "--steps", "0"], "--steps is 0; it must be at least 1"),
        (["train", "--preset", "tiny", "--seq-len", "0"], "data.seq_len is 0"),
        (
            ["train", "--preset", "tiny", "--profile", "no/such/file.md"],
            "folder no/such does not exist; create it first",
        ),
        (["train", "--preset", "tiny", "--recompute", "some"], "activation_checkpointing.policy is 'some'"),
        (["decode", "--preset", "tiny", "--batch", "0"], "--batch is 0; it must be at least 1"),
        (["kernels", "--preset", "tiny", "--repeats", "0"], "--repeats is 0; it must be at least 1"),
    ],
)
def test_user_errors_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    from fusiontree.cli import main

    assert main(["bench", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_peak_flops_depend_on_the_device_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, peak in (
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("Another", None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(device_name(torch.device("cuda"))) == peak
    assert peak_flops(device_name(CPU)) is None


# --- profile ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NTN", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>", "matrix products"),
        ("kernel_cutlass_kernel_flash_attncuteflash_fwd_sm90FlashAttentionForwardSm90_object", "attention, forward"),
        ("kernel_cutlass_kernel_flash_attncuteflash_bwd_sm90FlashAttentionBackwardSm90", "attention, backward"),
        ("void flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", "attention, backward"),
        ("_chunk_state_fwd_kernel", "scan, forward"),
        ("_bmm_chunk_fwd_kernel", "scan, forward"),
        ("_chunk_scan_bwd_dcb_kernel", "scan, backward"),
        ("_state_passing_bwd_kernel", "scan, backward"),
        ("causal_conv1d_bwd_kernel", "convolution"),
        ("liger_cross_entropy_kernel", "loss head"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float>>", "optimizer and clipping"),
        ("_conv_backward_kernel", "convolution"),
        ("_scan_decay_kernel", "scan, forward"),
        ("_scan_outputs_kernel", "scan, forward"),
        ("_scan_inputs_backward_kernel", "scan, backward"),
        ("_scan_decay_backward_kernel", "scan, backward"),
        ("triton_red_fused__to_copy_convolution_rms_norm_softmax_0", "fused pointwise"),
        ("_gated_norm_backward_kernel", "fused pointwise"),
        ("_heads_forward_kernel", "fused pointwise"),
        ("triton_tem_fused_flex_attention_backward_1", "attention, backward"),
        ("void at::native::unrolled_elementwise_kernel<direct_copy_kernel_cuda>", "copies and casts"),
        ("Memcpy DtoD (Device -> Device)", "copies and casts"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "communication"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", "unfused pointwise"),
        ("a_kernel_of_no_known_kind", "other"),
    ],
)
def test_kernels_are_classified_by_name(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_the_device_is_busy_while_any_kernel_runs() -> None:
    spans = [Kernel("a", 10, 5), Kernel("b", 12, 1), Kernel("c", 14, 4), Kernel("d", 30, 2)]
    assert _busy_seconds(spans) == pytest.approx((8 + 2) / 1e6)


def test_only_device_events_count_as_device_time() -> None:
    kinds = ("kernel", "gpu_memcpy", "gpu_memset", "gpu_user_annotation", "cuda_runtime", "cpu_op")
    events = [{"cat": kind, "name": kind, "ts": 10.0 * i, "dur": 4.0} for i, kind in enumerate(kinds)]

    class Watched:
        def export_chrome_trace(self, path: str) -> None:
            Path(path).write_text(json.dumps({"traceEvents": [*events, {"ph": "M", "name": "process_name"}]}))

    found = _device_kernels(Watched())
    assert found == [Kernel("kernel", 0, 4), Kernel("gpu_memcpy", 10, 4), Kernel("gpu_memset", 20, 4)]
    assert _busy_seconds(found) == pytest.approx(12e-6)


# --- peers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("hf-llama", 1_410_979_840), ("hf-falcon-h1", 1_314_137_472), ("fla-mamba2", 1_344_052_224)],
)
def test_peers_of_the_one_billion_preset_have_its_size(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = _build(name, load_config("1b"), CPU)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", PEERS)
def test_peers_learn(name: str, recompute: bool) -> None:
    torch.manual_seed(0)
    config = micro("optimizer.lr=0.01")
    peer = Peer(name, config, CPU, recompute)
    batch = rows.synthetic_batch("packed", 1, 96, 512, (0,))
    ids = torch.from_numpy(batch.input_ids)
    before = peer.model(input_ids=ids, labels=ids).loss.item()
    for step in range(3):
        peer.update([batch], step)
    assert peer.model(input_ids=ids, labels=ids).loss.item() < before - 0.3
    assert peer.model.is_gradient_checkpointing == recompute
    assert {p.dtype for p in peer.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("missing", ["mamba_ssm", "causal_conv1d"])
def test_a_peer_without_its_kernels_is_refused_on_a_gpu(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("mamba_ssm", "causal_conv1d"):
        monkeypatch.setitem(sys.modules, package, None if package == missing else types.ModuleType(package))
    remedy = f"pip install --no-build-isolation {missing.replace('_', '-')}"
    with pytest.raises(UserError, match=f"needs {missing} for its fused kernels.*{remedy}"):
        check_peer("hf-falcon-h1", torch.device("cuda"))
    check_peer("hf-falcon-h1", torch.device("cpu"))
    check_peer("hf-llama", torch.device("cuda"))


def test_a_peer_with_its_kernels_is_accepted_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("mamba_ssm", "causal_conv1d"):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    check_peer("hf-falcon-h1", torch.device("cuda"))


# --- kernels ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_operation_is_measured_and_the_reference_equals_itself() -> None:
    figures = operations.bench_kernels("tiny", SHAPE, seq_len=96, repeats=1)["kernels"]
    assert {entry["op"] for entry in figures} == set(OPERATIONS)
    references = [entry for entry in figures if entry["backend"] == "reference"]
    assert len(references) == len({entry["input"] for entry in figures}) == 18
    for entry in references:
        assert entry["difference"] == 0
        unit = "tflop_per_s" if entry["op"] in ("attention", "loss") else "tb_per_s"
        if entry["op"] in ("prefill", "decode"):  # no backward pass
            assert entry["both_ms"] is None
            continue
        work = {name: entry[f"{name}_{unit}"] * entry[f"{name}_ms"] for name in ("forward", "both")}
        assert work["both"] == pytest.approx(3 * work["forward"])


@pytest.mark.parametrize("wrong_gradient", [False, True])
def test_a_wrong_back_end_is_reported(wrong_gradient: bool) -> None:
    case = next(case for case in operations._cases(micro().model, 4096, CPU, torch.float32) if case.op == "convolution")
    reference = operations._backend("convolution", "reference", CPU)

    def wrong(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor) -> Tensor:
        if not wrong_gradient:
            return reference(x, weight, bias, torch.zeros_like(seq_idx))  # ignores the documents
        return reference(x, weight, bias.detach() + 0 * bias, seq_idx)

    assert operations._difference(case, reference, reference) == 0
    assert operations._difference(case, wrong, reference) > 0.1


def test_attention_and_loss_count_the_operations_of_the_model() -> None:
    model = micro().model
    cases = {case.title: case for case in operations._cases(model, 96, CPU, torch.float32)}
    parts = flops.forward_flops(model, [96])
    assert cases["attention, 2 heads, global, single"].flops == parts["attention_global"] // model.num_layers
    assert cases["attention, 2 heads, window 32, single"].flops == parts["attention_windowed"] // model.num_layers
    assert cases["loss head, 64 to 512"].flops == parts["head"]


def test_a_back_end_set_by_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSIONTREE_SCAN", "reference")
    assert operations._backend("scan", "reference", CPU)
    monkeypatch.setattr(operations, "choose_kernels", lambda *_: types.SimpleNamespace(names={"scan": "reference"}))
    with pytest.raises(UserError, match="FUSIONTREE_SCAN sets the back-end of scan; unset it"):
        operations._backend("scan", "fast", CPU)


# --- decoding --------------------------------------------------------------------------------------------------------


def test_decoding_is_measured_for_every_batch_and_context() -> None:
    figures = bench_decode("tiny", SHAPE, batches=[1, 2], contexts=[40, 70], steps=3)
    assert [(entry["batch"], entry["context"]) for entry in figures["decode"]] == [(1, 40), (1, 70), (2, 40), (2, 70)]
    for entry in figures["decode"]:
        assert entry["tokens_per_s"] == pytest.approx(entry["batch"] / entry["step"]["median_seconds"])
        assert entry["prefill_tokens_per_s"] > 0
    small, _, large, _ = (entry["cache_bytes"] for entry in figures["decode"])
    assert large == pytest.approx(2 * small, abs=64)  # everything but the token count grows with the rows


def test_the_cache_of_the_untimed_prefill_is_freed_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref] = []

    class Watched(speed.Decoder):
        def __init__(self, *words):
            assert all(earlier() is None for earlier in made)
            super().__init__(*words)
            made.append(weakref.ref(self.cache))

    monkeypatch.setattr(speed, "Decoder", Watched)
    speed.measure_decoding(random_model(micro(), CPU), 1, 20, 1, prefills=2)
    assert len(made) == 3


def test_scan_parameters_stay_fp32_in_a_decoded_bf16_model() -> None:
    model = random_model(micro("precision=bf16"), CPU)
    dtypes = {name.rpartition(".")[2]: p.dtype for name, p in model.named_parameters()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {"A_log", "D", "dt_bias"}


def test_shared_storage_is_counted_once() -> None:
    whole = torch.zeros(10, dtype=torch.float64)
    held = types.SimpleNamespace(layers=[{"k": whole[2:], "v": whole}], again=(whole,), other=torch.zeros(3), n=3)
    assert speed.tensor_bytes(held) == 80 + 12


def test_out_of_memory_affects_only_its_own_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusiontree.inference import speed

    run = speed._run

    def scarce(model: Any, rows: int, *rest: Any) -> Any:
        if rows > 1:
            raise torch.OutOfMemoryError("no memory")
        return run(model, rows, *rest)

    monkeypatch.setattr(speed, "_run", scarce)
    first, second = bench_decode("tiny", SHAPE, batches=[1, 2], contexts=[20], steps=1)["decode"]
    assert first["tokens_per_s"] > 0
    assert second == {"batch": 2, "context": 20, "problem": "out of GPU memory with 2 rows of 20 tokens: no memory"}


def test_progress_and_library_output_stay_off_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    from fusiontree.cli import main

    words = ["bench", "decode", "--preset", "tiny", "--context", "20", "--steps", "1", "--json"]
    with contextlib.suppress(SystemExit):
        assert main([*words, *SHAPE]) == 0
    assert json.loads(capsys.readouterr().out)["decode"][0]["context"] == 20
