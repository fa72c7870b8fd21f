"""DeepSpeed's JSON settings: loading and validation."""

import difflib
import importlib.resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from fusiontree.config.keys import short
from fusiontree.config.run_config import RunConfig
from fusiontree.errors import UserError, short_cause
from fusiontree.files import parse_json
from fusiontree.zero.settings import OFFLOADED, find_problem, gathers_blocks

# settings that the run's configuration owns: a second value in the JSON could contradict it
_OWNED = {
    "train_batch_size": "batch.tokens",
    "train_micro_batch_size_per_gpu": "batch.micro_rows",
    "gradient_accumulation_steps": "batch.tokens and batch.micro_rows",
    "gradient_clipping": "optimizer.grad_clip",
    "optimizer": "optimizer.*",
    "scheduler": "schedule.*",
    "bf16": "precision",
    "bfloat16": "precision",
    "fp16": "precision",
    "amp": "precision",
    "torch_autocast": "precision",
    "data_types": "precision",
    "activation_checkpointing": "activation_checkpointing",
    "steps_per_print": "logging.every",
    "wandb": "logging.wandb",
    "tensorboard": "logging.tensorboard",
    "csv_monitor": "logging.*",
    "comet": "logging.*",
    "elasticity": "batch.*",
    "managed_gradient_accumulation": "batch.tokens",
    "curriculum_learning": "data.curriculum",
    "data_efficiency": "data.*",
    "progressive_layer_drop": "model.branch_drop",
}

# settings that would silently train a different model, and why
_UNFIT = {
    "sequence_parallel_size": "the scan needs complete rows, and DeepSpeed would split them among ranks",
    "tensor_parallel": "the model does not support tensor parallelism",
    "expert_parallel": "the model has no experts",
    "hybrid_engine": "it is for reinforcement learning, and replaces layers of the model",
    "quantize_training": "it changes the weights during training",
    "weight_quantization": "it changes the weights during training",
    "gradient_allreduce_op": "an update needs the mean of the ranks' gradients",
    "autotuning": "it starts runs of its own, with other batch sizes",
    "checkpoint": "FusionTree writes its own checkpoints, which resume at any number of ranks and any ZeRO stage",
}

# deprecated keys of zero_optimization and their replacements: DeepSpeed would translate them only after the checks and
# the memory estimate below have read the new ones
_REPLACED = {
    "cpu_offload": 'offload_optimizer: {"device": "cpu"}',
    "cpu_offload_param": 'offload_param: {"device": "cpu"}',
    "cpu_offload_use_pin_memory": "pin_memory of offload_optimizer and offload_param",
}
# settings of DeepSpeed's own gathers and reductions at stage 3, which run only with offloading
_OF_GATHERS = (
    *("allgather_bucket_size", "allgather_partitions", "contiguous_gradients", "overlap_comm", "reduce_bucket_size"),
    *("reduce_scatter", "stage3_allgather_sequential", "stage3_max_live_parameters", "stage3_max_reuse_distance"),
    *("stage3_module_granularity_threshold", "stage3_prefetch_bucket_size", "stage3_use_all_reduce_for_fetch_params"),
    *("zero_hpz_partition_size", "zero_quantized_gradients", "zero_quantized_weights", "zeropp_loco_param"),
)
_OF_REDUCTIONS = ("communication_data_type", "gradient_predivide_factor", "prescale_gradients")  # the same, top level


def deepspeed_json(config: RunConfig) -> dict[str, Any]:
    """Load DeepSpeed's settings, from ds_configs/ by name or from a file by path.

    Raises:
        UserError: the file is missing or not JSON, or it sets a key that the run's configuration owns or that the
            model does not support.
    """
    folder = importlib.resources.files("ds_configs")
    names = _shipped()
    source: Traversable = folder / f"{config.deepspeed}.json" if config.deepspeed in names else Path(config.deepspeed)
    if not source.is_file():
        raise UserError(f"deepspeed '{config.deepspeed}' is neither one of {', '.join(names)} nor a JSON file")
    try:
        settings = parse_json(source.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"deepspeed {config.deepspeed} is not valid JSON ({short_cause(error)}); fix it") from None
    if not isinstance(settings, dict):
        raise UserError(f"deepspeed {config.deepspeed} is {short(settings)}; it must be a JSON object")
    for key, owner in _OWNED.items():
        if key in settings:
            raise UserError(f"deepspeed {config.deepspeed} sets '{key}'; remove it and set {owner} instead")
    for key, reason in _UNFIT.items():
        if key in settings:
            raise UserError(f"deepspeed {config.deepspeed} sets '{key}'; remove it: {reason}")
    zero = settings.get("zero_optimization", {})
    _check_zero(f"deepspeed {config.deepspeed}: zero_optimization", zero)
    if gathers_blocks(zero):
        given = [key for key in _OF_REDUCTIONS if key in settings]
        for key in given + [f"zero_optimization.{key}" for key in _OF_GATHERS if key in zero]:
            raise UserError(
                f"deepspeed {config.deepspeed} sets '{key}'; remove it: without offloading, stage 3 does not use it, "
                "because FusionTree gathers weights and reduces gradients by block"
            )
    _place_on_nvme(config, zero)
    if config.optimizer.kind == "muon":
        _check_muon(config, zero)
    return settings


def check_deepspeed_file(config: RunConfig) -> None:
    """Check every key and value of a user's DeepSpeed JSON with the installed DeepSpeed, before a run starts.

    This takes seconds, so only the command that starts a run calls it. The files in ds_configs/ need no check.

    Raises:
        UserError: see `deepspeed_json`; or DeepSpeed does not know a key or refuses a value.
    """
    settings = deepspeed_json(config)
    problem = None if config.deepspeed in _shipped() else find_problem(settings)
    if problem is None:
        return
    hint = ""
    if problem.key is not None:
        near = difflib.get_close_matches(problem.key, problem.known, 1)
        hint = f"; did you mean '{near[0]}'?" if near else "; remove it"
        if near and near[0] in _OWNED:
            hint = f"; remove it and set {_OWNED[near[0]]} instead"
    raise UserError(f"deepspeed {config.deepspeed}: {problem.message}{hint}")


def _shipped() -> list[str]:
    """Return the names of the files in ds_configs/."""
    files = importlib.resources.files("ds_configs").iterdir()
    return sorted(file.name.removesuffix(".json") for file in files if file.name.endswith(".json"))


def _check_zero(where: str, zero: Any) -> None:
    """Check the types of zero_optimization's entries."""
    if not isinstance(zero, dict):
        raise UserError(f'{where} is {short(zero)}; it must be an object, e.g. {{"stage": 2}}')
    stage = zero.get("stage", 0)
    if type(stage) is not int or stage not in range(4):
        raise UserError(f"{where}.stage is {short(stage)}; it must be 0, 1, 2 or 3")
    for old, new in _REPLACED.items():
        if old in zero:
            raise UserError(f"{where}.{old} is deprecated in DeepSpeed; use {new} instead")
    for part in OFFLOADED:
        if not isinstance(zero.get(part, {}), dict):
            raise UserError(f'{where}.{part} is {short(zero[part])}; it must be an object, e.g. {{"device": "cpu"}}')


def _place_on_nvme(config: RunConfig, zero: dict[str, Any]) -> None:
    """Set the configuration's nvme_path on each part that is offloaded to NVMe."""
    for part in (zero[key] for key in OFFLOADED if key in zero):
        if "nvme_path" in part:
            raise UserError(f"deepspeed {config.deepspeed} sets 'nvme_path'; remove it and set the run's nvme_path")
        if part.get("device") == "nvme":
            if config.nvme_path is None:
                raise UserError(f"deepspeed {config.deepspeed} offloads to NVMe; set nvme_path=DIR on a local disk")
            part["nvme_path"] = str(config.nvme_path)


def _check_muon(config: RunConfig, zero: dict[str, Any]) -> None:
    if not zero.get("stage"):
        raise UserError(f"optimizer.kind muon needs ZeRO stage 1 to 3, but deepspeed {config.deepspeed} is stage 0")
    if zero.get("offload_optimizer", {}).get("device") == "nvme":
        raise UserError(f"optimizer.kind muon cannot offload to NVMe (deepspeed {config.deepspeed}); offload to cpu")
    if zero.get("reduce_scatter"):
        raise UserError(
            f"deepspeed {config.deepspeed} sets 'reduce_scatter', but Muon needs complete gradients; remove it"
        )
