"""From a checkpoint to a folder that Hugging Face tools load, proven equal to the trained model before it appears."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from fusiontree import __version__, checkpoint
from fusiontree.config import RunConfig, load_config
from fusiontree.console import console
from fusiontree.errors import RunError, UserError
from fusiontree.files import refuse_existing, staged_folder, write_atomic
from fusiontree.generate import FACTS
from fusiontree.kernels import DTYPES
from fusiontree.model.documents import Documents
from fusiontree.model.lm import HybridLM

# largest difference of logits that passes, as a share of their standard deviation. The weights are the same numbers in
# the same precision; only decoding with the cache sums in another order, which bf16 shows
TOLERANCE = 1e-3
CACHED_TOLERANCES = {"fp32": 1e-3, "bf16": 0.1}


def export(source: Path, output: Path, dtype: str = "fp32", overwrite: bool = False) -> dict[str, Any]:
    """Export the newest checkpoint of a run, or a checkpoint, to `output`.

    The folder loads with ``AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True)`` where this project
    is not installed. It appears only if its logits equal the trained model's (`parity.json`).

    Args:
        source: a run's folder or a checkpoint's.
        dtype: `fp32` or `bf16`, of all weights but the scan's state parameters, which stay fp32.
        overwrite: replace what `output` holds.

    Returns:
        Where, the step, parameters, bytes of the weights, and the parity figures.

    Raises:
        UserError: no checkpoint, or `output` holds something. RunError: a damaged checkpoint, or failed parity.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype!r} is unknown; choose from {', '.join(DTYPES)}")
    refuse_existing(output, overwrite, marker=FACTS)
    found = checkpoint.resolve(source)
    config = load_config(str(found / checkpoint.CONFIG))
    state = checkpoint.read_state(found)
    tokenizer = found.parent.parent / "tokenizer"
    if not tokenizer.is_dir():
        raise UserError(f"no tokenizer at {tokenizer}; copy the one that the data was built with there")
    trained = HybridLM(config.model, compute_dtype=DTYPES[dtype])
    trained.load_state_dict(checkpoint.read_weights(found), strict=True)
    with staged_folder(output, overwrite, marker=FACTS) as partial, tempfile.TemporaryDirectory() as modules:
        # transformers copies a folder's code there to import it; read when it is first imported, below
        os.environ["HF_MODULES_CACHE"] = modules
        try:
            _write_folder(partial, trained, config, state, tokenizer, dtype)
        except SafetensorError as error:  # how it words a full disk
            raise RunError(f"{output} could not be written: {error}; free disk space and export again") from None
        console.print("proving the export: logits and cached decoding against the trained model")
        parity = prove(partial, trained.eval(), dtype)
        write_atomic(partial / "parity.json", json.dumps(parity, indent=1))
        size = sum(path.stat().st_size for path in partial.glob("*.safetensors"))
    return {
        "output": str(output),
        "checkpoint": str(found),
        "step": state["step"],
        "dtype": dtype,
        "parameters": config.model.parameter_count(),
        "weights_bytes": size,
        "parity": parity,
    }


@torch.inference_mode()
def prove(folder: Path, trained: HybridLM, dtype: str) -> dict[str, Any]:
    """Compare the model that transformers loads from `folder` with the trained one, on rows past a chunk and a window.

    Returns:
        By check, the largest difference of logits over their standard deviation; and the tolerance.

    Raises:
        RunError: one is beyond the tolerance.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    exported = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=DTYPES[dtype]).eval()
    shape = trained.config
    length = max(shape.chunk_size, shape.window) + 37
    if shape.srte == "learned":
        length = min(length, shape.max_positions)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(trained.config.vocab_size, (2, length), generator=generator)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, : length // 3] = False  # padding on the left
    expected = trained(ids).logits
    padded = trained(ids, Documents.from_mask(mask)).logits
    differences = {
        "logits": _difference(exported(ids).logits, expected),
        "left_padding": _difference(exported(ids, attention_mask=mask).logits[mask], padded[mask]),
        "cached_decoding": _difference(_decode(exported, ids, mask, steps=16)[mask], padded[mask]),
    }
    tolerances = dict.fromkeys(differences, TOLERANCE) | {"cached_decoding": CACHED_TOLERANCES[dtype]}
    for check, difference in differences.items():
        tolerance = tolerances[check]
        if not difference <= tolerance:
            raise RunError(
                f"export fails its proof: {check} differs from the trained model by {difference:.2g} of the logits' "
                f"standard deviation, more than {tolerance:g}; nothing was written"
            )
    return {**differences, "tolerances": tolerances, "tokens": length}


def _decode(exported: Any, ids: Tensor, mask: Tensor, steps: int) -> Tensor:
    """Logits of a prefill and then `steps` tokens one by one, [B, L, V]."""
    prefill = ids.shape[1] - steps
    output = exported(ids[:, :prefill], attention_mask=mask[:, :prefill], use_cache=True)
    pieces = [output.logits]
    for end in range(prefill + 1, ids.shape[1] + 1):
        output = exported(ids[:, end - 1 : end], attention_mask=mask[:, :end], past_key_values=output.past_key_values)
        pieces.append(output.logits)
    return torch.cat(pieces, 1)


def _difference(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.std())


def _write_folder(
    folder: Path, trained: HybridLM, config: RunConfig, state: dict[str, Any], tokenizer: Path, dtype: str
) -> None:
    """Weights, configuration, modelling code, tokenizer, generation defaults, model card and the run's facts."""
    from transformers import GenerationConfig
    from transformers.utils.logging import disable_progress_bar

    from fusiontree.model.hf import FusionTreeConfig, FusionTreeForCausalLM

    disable_progress_bar()
    eos, pad = state["eos_id"], state["pad_id"]
    shape = FusionTreeConfig(**config.model.to_dict(), eos_token_id=eos, pad_token_id=pad, bos_token_id=eos)
    model = FusionTreeForCausalLM(shape)
    model.model.load_state_dict(trained.state_dict())
    for name, parameter in model.named_parameters():
        if not name.endswith(FusionTreeForCausalLM.FP32_NAMES):
            parameter.data = parameter.data.to(DTYPES[dtype])
    model.config.dtype = DTYPES[dtype]
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=pad, bos_token_id=eos)
    model.save_pretrained(folder)
    for path in tokenizer.iterdir():
        shutil.copyfile(path, folder / path.name)
    facts = {"fusiontree_version": __version__, "seq_len": config.data.seq_len, "run": config.name, **state}
    write_atomic(folder / FACTS, json.dumps(facts, indent=1))
    write_atomic(folder / "README.md", model_card(config, state))


def model_card(config: RunConfig, state: dict[str, Any]) -> str:
    """The exported folder's README, from the run's facts."""
    model = config.model
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {config.name}

A hybrid language model of {model.parameter_count():,} parameters pretrained with FusionTree: {model.num_layers} layers
of width {model.hidden_size}, each a Mamba-2 branch ({model.ssm_heads} heads of {model.ssm_head_dim}, state
{model.ssm_state_size}) beside an attention branch ({model.num_heads} heads of {model.head_dim}, {model.global_heads}
of them global, the rest with a window of {model.window} tokens), fused by a learned gate (`{model.fusion}`).

| | |
|---|---|
| updates | {state["step"]:,} |
| tokens | {state["tokens"]:,} |
| row length | {config.data.seq_len:,} tokens |
| peak learning rate | {config.optimizer.lr:g} |
| precision | {config.precision} |

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(".")
inputs = tokenizer("def main(", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```

`parity.json` holds the differences from the trained model that the export measured.
"""
