"""The proof of an export: the folder's model beside the trained one, each in memory one module at a time."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusiontree.errors import RunError
from fusiontree.kernels import DTYPES
from fusiontree.model.config import ModelConfig
from fusiontree.model.documents import Documents
from fusiontree.model.lm import HybridLM
from fusiontree.weights import of_safetensors

# largest difference of logits that passes, as a share of their standard deviation. The weights are the same numbers in
# the same precision; only decoding with the cache sums in another order, which bf16 shows
TOLERANCE = 1e-3
CACHED_TOLERANCES = {"fp32": 1e-3, "bf16": 0.1}
COMPARED = 256  # tokens at the end of each row whose logits are compared: all of a large vocabulary's would not fit
STEPS = 8  # tokens decoded one by one


@torch.inference_mode()
def prove(folder: Path, config: ModelConfig, weights: Mapping[str, Tensor], dtype: str) -> dict[str, Any]:
    """Compare the model that transformers makes of `folder` with the trained one, on rows past a chunk and a window.

    One row is a document, one is padded at its left, one packs three documents.

    Args:
        config, weights: of the trained model. dtype: `fp32` or `bf16`, of the exported weights.

    Returns:
        By check, the largest difference of logits over their standard deviation; the tolerances; the rows' tokens.

    Raises:
        RunError: one is beyond its tolerance, or the folder's weights are not those of its model.
    """
    ids, mask, positions, documents = _rows(config)
    with torch.device("meta"):
        trained = HybridLM(config, compute_dtype=DTYPES[dtype]).eval()
    with on_demand(trained, weights):
        expected = trained(ids, documents, keep_logits=COMPARED).logits
    exported = _exported(folder, dtype)
    real = mask[:, -COMPARED:]
    with on_demand(exported, of_safetensors(folder)):
        actual = exported(ids, attention_mask=mask, position_ids=positions, logits_to_keep=COMPARED).logits
        differences = {
            name: _difference(actual[row][real[row]], expected[row][real[row]])
            for row, name in enumerate(("logits", "left_padding", "packed"))
        }
        decoded = _decode(exported, ids[:2], mask[:2])
    decoded_real = real[:2, -decoded.shape[1] :]
    differences["cached_decoding"] = _difference(decoded[decoded_real], expected[:2, -decoded.shape[1] :][decoded_real])
    tolerances = dict.fromkeys(differences, TOLERANCE) | {"cached_decoding": CACHED_TOLERANCES[dtype]}
    for check, difference in differences.items():
        if not difference <= tolerances[check]:
            raise RunError(
                f"export fails its proof: {check} differs from the trained model by {difference:.2g} of the logits' "
                f"standard deviation, more than {tolerances[check]:g}; nothing was written"
            )
    return {**differences, "tolerances": tolerances, "tokens": ids.shape[1]}


def _rows(config: ModelConfig) -> tuple[Tensor, Tensor, Tensor, Documents]:
    """Three rows: token ids, mask, positions as transformers takes them, and the documents that they mean."""
    reach = max(config.chunk_size, config.window)
    length = reach + reach // 4 + 37
    if config.srte == "learned":
        length = min(length, config.max_positions)
    ids = torch.randint(config.vocab_size, (3, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, : length // 8] = False
    numbers = (~mask).logical_not().int()  # of each token's document: padding 0, what is real 1
    starts = [length // 16, length - 20]  # the document between them is longer than the reach
    for number, start in enumerate(starts, 2):
        numbers[2, start:] = number
    documents = Documents.from_seq_idx(numbers)
    return ids, mask, documents.position_ids, documents


def _exported(folder: Path, dtype: str) -> Any:
    """The model that the folder's own code makes, on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=True, dtype=DTYPES[dtype]).eval()


def _decode(exported: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits of the end of rows that are taken in in two pieces and then token by token."""
    pieces, cache, done = [], None, 0
    first_step = ids.shape[1] - STEPS
    for end in [ids.shape[1] // 2, *range(first_step, ids.shape[1] + 1)]:
        kept = 1 if end <= first_step else 0
        output = exported(
            ids[:, done:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True, logits_to_keep=kept
        )
        cache, done = output.past_key_values, end
        pieces.append(output.logits)
    return torch.cat(pieces[1:], 1)


def _difference(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.std())


@contextlib.contextmanager
def on_demand(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Let a model on the meta device compute: each module has its weights while its own forward runs, and no longer.

    The embedding and the head, which stand at both ends of every forward, stay.

    Raises:
        RunError: `weights` has not the names and shapes of the model.
    """
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    for name in sorted({*shapes, *weights}):
        if name not in shapes or name not in weights:
            raise RunError(f"the weights are not the model's: {name} is in one of them only")
    kept = ("embedding", "head")
    handles = []
    for path, module in model.named_modules():
        own = {name: f"{path}.{name}" if path else name for name in module._parameters}
        own = {name: full for name, full in own.items() if full in shapes}
        if not own:
            continue
        if path.rpartition(".")[2] in kept:
            _give(module, own, weights, shapes)
            continue
        empty = dict(module._parameters)
        handles.append(module.register_forward_pre_hook(lambda m, _i, own=own: _give(m, own, weights, shapes)))
        handles.append(module.register_forward_hook(lambda m, _i, _o, empty=empty: m._parameters.update(empty)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _give(
    module: nn.Module, own: Mapping[str, str], weights: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    for name, full in own.items():
        value = weights[full]
        if tuple(value.shape) != shapes[full]:
            raise RunError(f"{full} is {list(value.shape)}, not {list(shapes[full])} as the model's")
        module._parameters[name] = nn.Parameter(value, requires_grad=False)
