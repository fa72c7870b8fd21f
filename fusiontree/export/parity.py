"""Parity proof of an export: logits of the exported and the trained model, each in memory one module at a time."""

import contextlib
import ctypes
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusiontree.checkpoint.tensor_files import from_safetensors
from fusiontree.errors import RunError
from fusiontree.kernels import DTYPES
from fusiontree.model.config import ModelConfig
from fusiontree.model.documents import Documents
from fusiontree.model.lm import HybridLM

# Tolerances of the root mean square (RMS) difference of logits, relative to their standard deviation. Weights and
# precision are identical; only cached decoding sums in another order, and in bf16 its rounding grows with depth.
TOLERANCE = 1e-3
CACHED_TOLERANCES = {"fp32": 1e-3, "bf16": 0.05}
COMPARED = (
    128  # maximum number of tokens per row whose logits are compared: with all tokens they would not fit in memory
)
LAST = 32  # of these, tokens at the row's end, which is also decoded; the others are spread over the row
PIECES = 4  # of a prefill: bounds the activations that are in memory together with the cache
STEPS = 5  # decoded tokens: the convolution at the last one sees no token of the prompt


class Row(NamedTuple):
    """One row of tokens, in the form transformers takes and in ours (`documents`)."""

    ids: Tensor  # int64 [1, L]
    mask: Tensor  # bool [1, L], false on padding
    documents: Documents


@torch.inference_mode()
def prove(folder: Path, config: ModelConfig, weights: Mapping[str, Tensor], dtype: str) -> dict[str, Any]:
    """Compare the model that transformers loads from `folder` with the trained one, on rows past a chunk and a window.

    One row is one document, one is left-padded, one packs three documents. Rows are computed one at a time, because the
    activations of all three would exceed the largest weight of a large model.

    Args:
        config: of the trained model, as `weights`.
        dtype: `fp32` or `bf16`, of the exported weights.

    Returns:
        The relative RMS difference of logits by check, the `tolerances`, and the `tokens` of a row.

    Raises:
        RunError: a difference exceeds its tolerance, or the folder's weights do not match its model.
    """
    rows = _rows(config)
    positions = _compared_positions(rows["logits"].ids.shape[1])
    with torch.device("meta"):
        trained = HybridLM(config, compute_dtype=DTYPES[dtype]).eval()
    with on_demand(trained, weights, DTYPES[dtype]):
        expected = {check: trained(row.ids, row.documents, keep_logits=positions).logits for check, row in rows.items()}
    with isolated_code(), on_demand(exported := _exported_model(folder, dtype), from_safetensors(folder)):
        differences = {
            check: _relative_rms(_logits(exported, row, positions), expected[check], row.mask[:, positions])
            for check, row in rows.items()
        }
        differences["cached_decoding"] = _decoding_difference(exported, rows, expected)
    tolerances = dict.fromkeys(differences, TOLERANCE) | {"cached_decoding": CACHED_TOLERANCES[dtype]}
    for check, difference in differences.items():
        if not difference <= tolerances[check]:
            raise RunError(
                f"export failed its parity proof: {check} differs from the trained model by {difference:.2g} of the "
                f"logits' standard deviation, more than {tolerances[check]:g}; nothing was written"
            )
    return {**differences, "tolerances": tolerances, "tokens": rows["logits"].ids.shape[1]}


def _rows(config: ModelConfig) -> dict[str, Row]:
    """Return the row of each check but `cached_decoding`, which reuses two of them."""
    reach = max(config.chunk_size, config.window)
    length = reach + reach // 4 + 37
    if config.srte == "learned":
        length = min(length, config.max_positions)
    ids = torch.randint(config.vocab_size, (3, length), generator=torch.Generator().manual_seed(0))
    single, padded, packed = torch.ones(3, 1, length, dtype=torch.int32)  # document of each token; padding is 0
    padded[:, : length // 8] = 0
    for start in (length // 16, length - 20):  # the middle document is longer than `reach`
        packed[:, start:] += 1
    checks = {"logits": single, "left_padding": padded, "packed": packed}
    return {
        check: Row(ids[i : i + 1], numbers > 0, Documents.from_seq_idx(numbers))
        for i, (check, numbers) in enumerate(checks.items())
    }


@contextlib.contextmanager
def isolated_code() -> Iterator[None]:
    """Let transformers import an exported folder's code through a temporary module cache, and undo the import."""
    from transformers import dynamic_module_utils

    def imported() -> dict[str, ModuleType]:
        return {name: module for name, module in sys.modules.items() if name.split(".")[0] == "transformers_modules"}

    cache, path, before = dynamic_module_utils.HF_MODULES_CACHE, list(sys.path), imported()
    with tempfile.TemporaryDirectory() as folder:
        for name in before:
            del sys.modules[name]
        dynamic_module_utils.HF_MODULES_CACHE = folder
        sys.path.insert(0, folder)  # ahead of the real cache, which may have a package of this name
        try:
            yield
        finally:
            dynamic_module_utils.HF_MODULES_CACHE, sys.path[:] = cache, path
            for name in imported():
                del sys.modules[name]
            sys.modules.update(before)


def _exported_model(folder: Path, dtype: str) -> Any:
    """Load the model with the folder's own code, on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=True, dtype=DTYPES[dtype]).eval()


def _compared_positions(length: int) -> Tensor:
    """Return the indices, ascending, at which logits of a row of `length` tokens are compared."""
    spread, last = torch.linspace(0, length - 1, COMPARED - LAST).long(), torch.arange(max(0, length - LAST), length)
    return torch.cat([spread, last]).unique()


def _logits(exported: Any, row: Row, positions: Tensor) -> Tensor:
    output = exported(
        row.ids, attention_mask=row.mask, position_ids=row.documents.position_ids, logits_to_keep=positions
    )
    return output.logits


def _relative_rms(actual: Tensor, expected: Tensor, real: Tensor) -> float:
    """Return the RMS difference of logits [1, n, V] over their standard deviation, where `real`, bool [1, n]."""
    reference = expected[real]
    return float((actual[real] - reference).square().mean().sqrt() / reference.std())


def _decoding_difference(exported: Any, rows: Mapping[str, Row], expected: Mapping[str, Tensor]) -> float:
    """Return the difference at the end of two rows, one padded, prefilled in pieces and then decoded by token."""
    batch = [(rows[check], expected[check]) for check in ("logits", "left_padding")]
    ids, mask = torch.cat([row.ids for row, _ in batch]), torch.cat([row.mask for row, _ in batch])
    logits, cache, done = [], None, 0
    first_step = ids.shape[1] - STEPS
    pieces = [ids.shape[1] * piece // PIECES for piece in range(1, PIECES)]
    for end in [*pieces, *range(first_step, ids.shape[1] + 1)]:
        output = exported(
            ids[:, done:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        last, cache = output.to_tuple()
        logits.append(last)
        done = end
    decoded = torch.cat(logits[len(pieces) :], 1)
    last = slice(-decoded.shape[1], None)
    return max(
        _relative_rms(decoded[i : i + 1], row_logits[:, last], row.mask[:, last])
        for i, (row, row_logits) in enumerate(batch)
    )


@contextlib.contextmanager
def on_demand(model: nn.Module, weights: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Iterator[None]:
    """Run a model from the meta device: each module's weights are in memory only during its own forward.

    Args:
        dtype: matrices are cast to it on load, or else their layers would keep a second copy; None: no cast.

    Raises:
        RunError: names or shapes of `weights` do not match the model.
    """
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    for name in sorted({*shapes, *weights}):
        if name not in shapes or name not in weights:
            raise RunError(f"the weights do not match the model: {name} is only in one of them; export again")
    handles = []
    names = {id(value): name for name, value in model.named_parameters()}  # one name for tied weights
    for module in model.modules():
        own = {name: names[id(value)] for name, value in module._parameters.items() if value is not None}
        if not own:
            continue
        empty = dict(module._parameters)
        handles.append(
            module.register_forward_pre_hook(lambda m, _, own=own: _load_parameters(m, own, weights, shapes, dtype))
        )
        handles.append(module.register_forward_hook(lambda m, *_, empty=empty: _unload_parameters(m, empty)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _unload_parameters(module: nn.Module, empty: Mapping[str, Any]) -> None:
    module._parameters.update(empty)
    # glibc keeps freed blocks below 32 MiB for reuse: up to 0.6 GiB of activations
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _load_parameters(
    module: nn.Module,
    own: Mapping[str, str],
    weights: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype | None,
) -> None:
    for name, full in own.items():
        value = weights[full]
        if tuple(value.shape) != shapes[full]:
            raise RunError(
                f"weight {full} has shape {list(value.shape)}, the model's has {list(shapes[full])}; export again"
            )
        if value.ndim == 2:
            value = value.to(dtype or value.dtype)
        module._parameters[name] = nn.Parameter(value, requires_grad=False)
