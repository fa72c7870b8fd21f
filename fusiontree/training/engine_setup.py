"""Construction of the DeepSpeed engine from a configuration."""

import sys
from typing import TYPE_CHECKING, Any

import torch

from fusiontree.config import CheckpointingConfig, RunConfig, deepspeed_json
from fusiontree.distributed.collectives import World
from fusiontree.kernels import DTYPES, check_precision, choose_kernels
from fusiontree.model.layers import Linear
from fusiontree.model.lm import HybridLM, materialize
from fusiontree.model.recompute import Recompute
from fusiontree.training.clipping import EngineClipping, FusedClipping, is_fused
from fusiontree.training.init_weights import run_initializer
from fusiontree.training.optimizer import build_optimizer
from fusiontree.zero import setup
from fusiontree.zero.block_gather import BlockGather
from fusiontree.zero.settings import gathers_blocks

if TYPE_CHECKING:
    from fusiontree.model.triton_fp8 import Fp8Products


def build_engine(config: RunConfig, world: World, resuming: bool = False) -> tuple[Any, FusedClipping | EngineClipping]:
    """Return the model under DeepSpeed and the clipping of its gradients.

    Weights are fp32 master weights; activations follow `precision`. With `resuming` the weights are zeros, because the
    caller loads a checkpoint next.
    """
    settings = engine_settings(config, world)
    setup.require_async_io(settings["zero_optimization"])
    model = build_model(config, world, settings, resuming)
    optimizer = build_optimizer(model, config.optimizer)
    engine = setup.initialize(model, optimizer, settings)
    fused = is_fused(config.optimizer, settings["zero_optimization"])
    if gathers_blocks(settings["zero_optimization"]):
        cast = [layer.weight for layer in _linear_layers(model)]
        BlockGather(engine, list(model.blocks), cast, DTYPES[config.precision], one_step=fused)
    return engine, FusedClipping(engine, config.optimizer.grad_clip) if fused else EngineClipping(engine)


def fp8_products(config: RunConfig, engine: Any) -> "Fp8Products | None":
    """Let the linear layers of the blocks compute in FP8 if `precision` is fp8.

    The embedding, the head and the gate stay bf16: they have a small share of the products.
    """
    if config.precision != "fp8":
        return None
    check_precision(config.precision, engine.device)
    from fusiontree.model.triton_fp8 import Fp8Products  # needs Triton

    return Fp8Products(_linear_layers(engine.module), cached=engine.zero_optimization_stage() < 3)


def _linear_layers(model: HybridLM) -> list[Linear]:
    """Return the linear layers of the blocks; they cast their weights to the dtype of their input."""
    return [module for module in model.blocks.modules() if isinstance(module, Linear)]


def engine_settings(config: RunConfig, world: World) -> dict[str, Any]:
    """Return DeepSpeed's settings: those of the `deepspeed` file and those that the run's configuration determines."""
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.batch.micro_rows,
        "gradient_accumulation_steps": config.accumulation_steps(world.size),
        "gradient_clipping": config.optimizer.grad_clip,
        "zero_allow_untested_optimizer": True,  # torch's AdamW
        "zero_force_ds_cpu_optimizer": False,  # with offload too, instead of DeepSpeed's compiled CPUAdam
        "steps_per_print": sys.maxsize,
        **deepspeed_json(config),
    }
    zero = settings.setdefault("zero_optimization", {"stage": 0})
    # a single rank has no communication to overlap, and would wait for the device before every update
    zero.setdefault("overlap_comm", world.size > 1)
    zero.setdefault("reduce_scatter", config.optimizer.kind != "muon")  # Muon orthogonalizes full gradient matrices
    if is_fused(config.optimizer, zero):  # `FusedClipping` clips and computes the norm in DeepSpeed's place
        settings["gradient_clipping"] = 0.0
        if zero.get("stage", 0) in (1, 2):
            zero["compute_grad_norm"] = False
    if gathers_blocks(zero):
        zero["contiguous_gradients"] = False  # no bucket: `BlockGather` reduces without one
    return settings


def build_model(config: RunConfig, world: World, settings: dict[str, Any], resuming: bool = False) -> HybridLM:
    """Build the model with its initial weights (`run_initializer`), independent of the ranks and the ZeRO stage.

    At ZeRO-3 each module is partitioned as soon as it is materialized: no rank ever stores the full model.
    """
    dtype = DTYPES[config.precision]
    kernels = choose_kernels(world.device.type, config.kernels.model_dump(), config.model, dtype)
    with torch.device("meta"):
        model = HybridLM(config.model, kernels, dtype, _recompute(config.activation_checkpointing))
    modules = materialize(model, run_initializer(config, world.device, resuming), world.device)
    if settings["zero_optimization"].get("stage", 0) == 3:
        setup.partition_parameters(modules, settings)
    else:
        list(modules)  # materialize all of them
    return model


def _recompute(config: CheckpointingConfig) -> Recompute:
    every = {"full": 1, "every_n": config.every}.get(config.policy, 0)
    branches = ("mamba", "attention") if config.branch == "both" else (config.branch,)
    return Recompute(every, branches if config.policy == "branch" else (), config.offload)
