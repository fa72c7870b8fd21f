"""Peer models of 1.3 to 1.4 billion parameters, trained the way their users commonly train them.

That is: bf16 weights and moments, fused AdamW, gradient clipping, torch's attention, full recomputation. None of the
peers separates packed documents: each packed row is one document.
"""

import importlib
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fusiontree.config import RunConfig
from fusiontree.data.batch import Batch
from fusiontree.device import default_dtype_and_device
from fusiontree.errors import RunError, UserError, short_cause

_SMALL = 100_000_000  # a configuration with fewer parameters is compared with a small peer
_FUSED_PATH = ("mamba_ssm", "causal_conv1d")  # packages whose kernels the fused path of a Mamba-2 peer calls


class Spec(NamedTuple):
    """Class and shape of a peer; vocabulary and tied embeddings come from the configuration it is compared with."""

    family: str  # module of transformers.models
    name: str  # class name without ForCausalLM
    shape: dict[str, Any]
    small: dict[str, Any]  # overrides of `shape` for a small configuration
    fused_scan: str | None = None  # mamba-ssm function that the training pass must call; None: no scan


PEERS = {
    "hf-llama": Spec(
        "llama",
        "Llama",
        {
            "hidden_size": 2048,
            "num_hidden_layers": 29,
            "intermediate_size": 5632,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
        },
        {"hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 256, "num_attention_heads": 4},
    ),
    "hf-falcon-h1": Spec(
        "falcon_h1",
        "FalconH1",
        {
            "hidden_size": 2048,
            "num_hidden_layers": 24,
            "intermediate_size": 4096,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "mamba_d_ssm": 3072,
            "mamba_n_heads": 48,
            "mamba_d_head": 64,
            "mamba_n_groups": 1,
            "mamba_d_state": 256,
            "mamba_chunk_size": 256,
        },
        {
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "intermediate_size": 256,
            "num_attention_heads": 4,
            "head_dim": 32,
            "mamba_d_ssm": 128,
            "mamba_n_heads": 4,
            "mamba_d_head": 32,
            "mamba_d_state": 16,
            "mamba_chunk_size": 64,
        },
        "mamba_split_conv1d_scan_combined",
    ),
    "fla-mamba2": Spec(
        "mamba2",
        "Mamba2",
        {
            "hidden_size": 2048,
            "num_hidden_layers": 48,
            "num_heads": 64,
            "head_dim": 64,
            "state_size": 128,
            "n_groups": 1,
            "chunk_size": 256,
        },
        {
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 32,
            "state_size": 16,
            "chunk_size": 64,
        },
        "mamba_split_conv1d_scan_combined",
    ),
}


def check_peer(name: str, device: torch.device) -> None:
    """Raise UserError if the peer does not exist or cannot run its fused kernels on `device`."""
    if name not in PEERS:
        raise UserError(f"--peer {name} is unknown; choose from {', '.join(PEERS)}")
    if PEERS[name].fused_scan is None or device.type == "cpu":
        return
    for package in _FUSED_PATH:
        try:
            importlib.import_module(package)
        except Exception as error:  # compiled packages raise anything: OSError or RuntimeError for a missing library
            raise UserError(
                f"--peer {name} needs {package} for its fused kernels, and importing it fails ({short_cause(error)}); "
                f"pip install --no-build-isolation {package.replace('_', '-')}, or choose --peer hf-llama"
            ) from None


class Peer:
    """A peer with random weights and its optimizer."""

    def __init__(self, name: str, config: RunConfig, device: torch.device, recompute: bool):
        """Build the peer on `device`; with `recompute`, keep only the inputs of its layers for the backward pass.

        Raises:
            RunError: on a GPU, the peer would run torch's slow scan instead of the fused one.
        """
        self.name, self.device, self.clip = name, device, config.optimizer.grad_clip
        self.convolution = "causal_conv1d" if device.type == "cuda" else "torch"
        with default_dtype_and_device(torch.bfloat16, device):
            self.model = _build(name, config, device)
        self.scan = _scan_of(name, self.model)
        if device.type == "cuda" and self.scan is not None and not self.scan.startswith("mamba_ssm"):
            raise RunError(
                f"--peer {name} would run its scan in {self.scan} instead of mamba_ssm, an unfair comparison; "
                "install mamba-ssm, or choose --peer hf-llama"
            )
        if recompute:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.optimizer.lr, fused=True)

    def update(self, batches: list[Batch], step: int) -> None:
        """Run one optimizer update on the rows of `batches`, each row one document; `step` is unused."""
        for batch in batches:
            ids = torch.from_numpy(batch.input_ids).to(self.device)
            loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
            (loss / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip or float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def describe(self) -> dict[str, Any]:
        """Return the class, the size, the kernels and the differences that make the comparison unequal."""
        kernels = {"attention": getattr(self.model.config, "_attn_implementation", None), "scan": self.scan}
        return {
            "model": f"{type(self.model).__module__}.{type(self.model).__name__}",
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "kernels": kernels if self.scan is None else {**kernels, "convolution": self.convolution},
            "weights": "bf16 with bf16 moments, no fp32 master weights",
            "documents": "not separated: each row is one document",
        }


def _build(name: str, config: RunConfig, device: torch.device) -> Any:
    spec = PEERS[name]
    small = spec.small if config.model.parameter_count() < _SMALL else {}
    shape = {"vocab_size": config.model.vocab_size, "tie_word_embeddings": config.model.tie_embeddings}
    shape |= {**spec.shape, **small}
    longest = {} if spec.family == "mamba2" else {"max_position_embeddings": config.data.seq_len}
    module = _module_of(name, device)
    settings = getattr(module, f"{spec.name}Config")(**shape, **longest, use_cache=False)
    return getattr(module, f"{spec.name}ForCausalLM")(settings)


def _module_of(name: str, device: torch.device) -> types.ModuleType:
    """Return the module with the peer's classes: fla's if asked for and installed, otherwise that of transformers."""
    if name.startswith("fla-") and device.type == "cuda":
        try:
            return importlib.import_module(f"fla.models.{PEERS[name].family}")
        except (
            Exception
        ):  # fla-core ships without models, and its modules raise anything; `describe` names the class that was used
            return importlib.import_module(f"transformers.models.{PEERS[name].family}")
    return importlib.import_module(f"transformers.models.{PEERS[name].family}")


def _scan_of(name: str, model: Any) -> str | None:
    """Return the module of the function that runs the model's scan in training; None for a model without a scan."""
    wanted = PEERS[name].fused_scan
    if wanted is None:
        return None
    module = sys.modules[type(model).__module__]
    # transformers renames the function and wraps the implementation that it found
    function: Callable[..., Any] | None = getattr(module, wanted.replace("mamba_", "mamba2_"), None)
    function = function or getattr(module, wanted, None)
    if function is None:
        return "torch"
    return str(inspect.getclosurevars(function).nonlocals.get("implementation", function).__module__)
