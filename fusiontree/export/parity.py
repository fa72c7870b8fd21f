"""The proof of an export: the folder's model beside the trained one, each in memory one module at a time."""

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

# root mean square of the difference of logits that passes, as a share of their standard deviation. The weights are the
# same numbers in the same precision; only decoding with the cache sums in another order, which bf16 shows the more the
# deeper the model is
TOLERANCE = 1e-3
CACHED_TOLERANCES = {"fp32": 1e-3, "bf16": 0.05}
COMPARED = 128  # tokens of each row whose logits are compared at most: all of a large vocabulary's would not fit
LAST = 32  # of these stand side by side at the row's end, which is decoded too; the others are spread over the row
PIECES = 4  # that prompts are taken in by, for what a piece needs is beside the whole cache
STEPS = 5  # tokens decoded one by one: the last sees no token of the prompt through the convolution


class Row(NamedTuple):
    """One row of tokens, as transformers takes it and what that means."""

    ids: Tensor  # int64 [1, L]
    mask: Tensor  # bool [1, L], false on padding
    documents: Documents


@torch.inference_mode()
def prove(folder: Path, config: ModelConfig, weights: Mapping[str, Tensor], dtype: str) -> dict[str, Any]:
    """Compare the model that transformers makes of `folder` with the trained one, on rows past a chunk and a window.

    One row is a document, one is padded at its left, one packs three documents. Rows are computed one by one: what the
    layers of a large model hold of all three together would be more than its largest weight.

    Args:
        config, weights: of the trained model. dtype: `fp32` or `bf16`, of the exported weights.

    Returns:
        By check, the root mean square of the difference of logits over their standard deviation; the tolerances; the
        tokens of a row.

    Raises:
        RunError: one is beyond its tolerance, or the folder's weights are not those of its model.
    """
    rows = _rows(config)
    places = _compared(rows["logits"].ids.shape[1])
    with torch.device("meta"):
        trained = HybridLM(config, compute_dtype=DTYPES[dtype]).eval()
    with on_demand(trained, weights, DTYPES[dtype]):
        expected = {check: trained(row.ids, row.documents, keep_logits=places).logits for check, row in rows.items()}
    with _code_apart(), on_demand(exported := _exported(folder, dtype), from_safetensors(folder)):
        differences = {
            check: _difference(_logits(exported, row, places), expected[check], row.mask[:, places])
            for check, row in rows.items()
        }
        differences["cached_decoding"] = _decoding_difference(exported, rows, expected)
    tolerances = dict.fromkeys(differences, TOLERANCE) | {"cached_decoding": CACHED_TOLERANCES[dtype]}
    for check, difference in differences.items():
        if not difference <= tolerances[check]:
            raise RunError(
                f"export fails its proof: {check} differs from the trained model by {difference:.2g} of the logits' "
                f"standard deviation, more than {tolerances[check]:g}; nothing was written"
            )
    return {**differences, "tolerances": tolerances, "tokens": rows["logits"].ids.shape[1]}


def _rows(config: ModelConfig) -> dict[str, Row]:
    """A row for each check of whole rows."""
    reach = max(config.chunk_size, config.window)
    length = reach + reach // 4 + 37
    if config.srte == "learned":
        length = min(length, config.max_positions)
    ids = torch.randint(config.vocab_size, (3, length), generator=torch.Generator().manual_seed(0))
    whole, padded, packed = torch.ones(3, 1, length, dtype=torch.int32)  # the document of each token, padding is 0
    padded[:, : length // 8] = 0
    for start in (length // 16, length - 20):  # the document between them is longer than the reach
        packed[:, start:] += 1
    checks = {"logits": whole, "left_padding": padded, "packed": packed}
    return {
        check: Row(ids[i : i + 1], numbers > 0, Documents.from_seq_idx(numbers))
        for i, (check, numbers) in enumerate(checks.items())
    }


@contextlib.contextmanager
def _code_apart() -> Iterator[None]:
    """Let transformers import a folder's code, which it copies to its cache to do so, and leave no trace of it."""
    from transformers import dynamic_module_utils

    def imported() -> dict[str, ModuleType]:
        return {name: module for name, module in sys.modules.items() if name.split(".")[0] == "transformers_modules"}

    cache, path, before = dynamic_module_utils.HF_MODULES_CACHE, list(sys.path), imported()
    with tempfile.TemporaryDirectory() as folder:
        for name in before:
            del sys.modules[name]
        dynamic_module_utils.HF_MODULES_CACHE = folder
        sys.path.insert(0, folder)  # before the cache, which may hold a package of the same name
        try:
            yield
        finally:
            dynamic_module_utils.HF_MODULES_CACHE, sys.path[:] = cache, path
            for name in imported():
                del sys.modules[name]
            sys.modules.update(before)


def _exported(folder: Path, dtype: str) -> Any:
    """The model that the folder's own code makes, on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=True, dtype=DTYPES[dtype]).eval()


def _compared(length: int) -> Tensor:
    """Where in a row of `length` tokens logits are compared, in order."""
    spread, last = torch.linspace(0, length - 1, COMPARED - LAST).long(), torch.arange(max(0, length - LAST), length)
    return torch.cat([spread, last]).unique()


def _logits(exported: Any, row: Row, places: Tensor) -> Tensor:
    output = exported(row.ids, attention_mask=row.mask, position_ids=row.documents.position_ids, logits_to_keep=places)
    return output.logits


def _difference(actual: Tensor, expected: Tensor, real: Tensor) -> float:
    """Of logits [1, n, V] where they are of a token that is `real`, bool [1, n], not padding."""
    of_real = expected[real]
    return float((actual[real] - of_real).square().mean().sqrt() / of_real.std())


def _decoding_difference(exported: Any, rows: Mapping[str, Row], expected: Mapping[str, Tensor]) -> float:
    """Of the end of two rows together, one padded, that are taken in piece by piece and then token by token."""
    together = [(rows[check], expected[check]) for check in ("logits", "left_padding")]
    ids, mask = torch.cat([row.ids for row, _ in together]), torch.cat([row.mask for row, _ in together])
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
        _difference(decoded[i : i + 1], logits_of[:, last], row.mask[:, last])
        for i, (row, logits_of) in enumerate(together)
    )


@contextlib.contextmanager
def on_demand(model: nn.Module, weights: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Iterator[None]:
    """Let a model on the meta device compute: each module has its weights while its own forward runs, and no longer.

    Args:
        dtype: of matrices, whose layers would otherwise make a copy in it beside them; None: as they are.

    Raises:
        RunError: `weights` has not the names and shapes of the model.
    """
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    for name in sorted({*shapes, *weights}):
        if name not in shapes or name not in weights:
            raise RunError(f"the weights are not the model's: {name} is in one of them only")
    handles = []
    for path, module in model.named_modules():
        own = {name: f"{path}.{name}" if path else name for name in module._parameters}
        own = {name: full for name, full in own.items() if full in shapes}
        if not own:
            continue
        empty = dict(module._parameters)
        handles.append(module.register_forward_pre_hook(lambda m, _, own=own: _give(m, own, weights, shapes, dtype)))
        handles.append(module.register_forward_hook(lambda m, *_, empty=empty: _take(m, empty)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _take(module: nn.Module, empty: Mapping[str, Any]) -> None:
    module._parameters.update(empty)
    # the C library of most Linuxes keeps what is freed in pieces of less than 32 MiB: up to 0.6 GiB of activations
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _give(
    module: nn.Module,
    own: Mapping[str, str],
    weights: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype | None,
) -> None:
    for name, full in own.items():
        value = weights[full]
        if tuple(value.shape) != shapes[full]:
            raise RunError(f"{full} is {list(value.shape)}, not {list(shapes[full])} as the model's")
        if value.ndim == 2:
            value = value.to(dtype or value.dtype)
        module._parameters[name] = nn.Parameter(value, requires_grad=False)
