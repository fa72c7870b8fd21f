"""The undocumented attributes of DeepSpeed that this package uses, and the check that the engine has them.

DeepSpeed may rename any of them in a release. The check turns that into one line at the start of a run, where an
AttributeError would otherwise end the first save or resume. `tests/test_zero_internals.py` compares lists and code.
"""

import importlib
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from fusiontree.errors import UserError

SUPPORTED = "deepspeed>=0.19.8,<0.20"  # equals the requirement in pyproject.toml

OPS = ("__compatible_ops__",)  # of the module deepspeed.ops
ENGINE = (
    *("checkpoint_engine", "global_rank", "micro_steps", "param_names"),
    *("_copy_recovery_script", "zero_nvme_offload_optimizer"),
)
# of the engine's optimizer; without ZeRO that is torch's own
OPTIMIZER_STAGE_1_2 = (
    *("averaged_gradients", "bit16_groups", "optimizer", "overflow", "single_partition_of_fp32_groups"),
    "update_lp_params",
)
OPTIMIZER_STAGE_3 = (
    *("averaged_gradients", "checkpoint_event_epilogue", "checkpoint_event_prologue", "dp_process_group"),
    *("fp16_groups", "fp32_partitioned_groups_flat", "get_param_id", "grad_partitions_flat_buffer", "grad_position"),
    *("micro_step_id", "optimizer", "overflow", "overlapping_partition_gradients_reduce_epilogue"),
    *("parameter_offload", "sub_group_to_group_id", "swap_optimizer"),
    *("_epilogue_ran_this_backward", "_grad_acc_hooks", "_leaf_module_hooks"),
    "_reassign_or_swap_out_partitioned_parameters",
)
PARAMETER_OFFLOAD = ("_remove_module_hooks",)  # of the optimizer's parameter_offload, which has the hooks
OPTIMIZER_NVME = (
    *("_optimizer_states_and_gradient_swap_in", "_optimizer_states_and_gradient_swap_out"),
    "_swappable_optimizer_subgroup",
)
PARAMETER_STAGE_1_2 = ("_hp_mapping", "_index_in_param_group")
FRAGMENT = ("get_lp_grad_fragment", "hp_fragment_address", "lp_fragment_address")  # of a parameter's _hp_mapping
ADDRESS = ("numel", "start")  # of a fragment's addresses
PARAMETER_STAGE_3 = (
    *("convert_to_zero_parameters", "ds_numel", "ds_persist", "ds_shape", "ds_tensor", "partition_numel"),
)
# classes, by dotted path
MUON = "deepspeed.runtime.zero.muon.muon_optimizer.MuonWithAuxAdam"
ASYNC_IO = "deepspeed.ops.op_builder.AsyncIOBuilder"
PICKLED = frozenset(  # in checkpoint files, next to the tensors
    {
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
    }
)


def check_engine(engine: Any) -> None:
    """Check that `engine` has every undocumented attribute that its ZeRO stage and offload make this package use.

    Raises:
        UserError: one is missing.
    """
    for owner, names in _used_attributes(engine):
        require(owner, names)
    for path in sorted(PICKLED):
        require_class(path)


def require(owner: Any, names: tuple[str, ...]) -> None:
    """Raise UserError if `owner`, an object of DeepSpeed, lacks one of the attributes `names`."""
    for name in names:
        if not hasattr(owner, name):
            raise _unsupported(f"{getattr(owner, '__name__', type(owner).__name__)}.{name}")


def require_class(path: str) -> Any:
    """Import and return the class at the dotted `path` inside DeepSpeed.

    Raises:
        UserError: the module or the class does not exist.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        raise _unsupported(path) from None


def _unsupported(missing: str) -> UserError:
    """Return the error for an installed DeepSpeed that lacks `missing`."""
    return UserError(f"DeepSpeed {version('deepspeed')} has no {missing}, which FusionTree uses; install '{SUPPORTED}'")


def _used_attributes(engine: Any) -> Iterator[tuple[Any, tuple[str, ...]]]:
    """Yield each object of DeepSpeed that is accessed for `engine`, with the attributes used."""
    yield engine, ENGINE
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    parameters = list(engine.module.parameters())
    if stage in (1, 2):
        yield optimizer, OPTIMIZER_STAGE_1_2
        for parameter in parameters:
            yield parameter, PARAMETER_STAGE_1_2[:1]
        # a parameter has no fragment on ranks whose partition does not overlap it
        mapped = next((parameter for parameter in parameters if parameter._hp_mapping is not None), None)
        if mapped is not None:
            fragment = mapped._hp_mapping
            yield mapped, PARAMETER_STAGE_1_2
            yield fragment, FRAGMENT
            yield fragment.lp_fragment_address, ADDRESS
            yield fragment.hp_fragment_address, ADDRESS
    if stage == 3:
        yield optimizer, OPTIMIZER_STAGE_3
        yield optimizer.parameter_offload, PARAMETER_OFFLOAD
        yield parameters[0], PARAMETER_STAGE_3
        if optimizer.swap_optimizer:
            yield optimizer, OPTIMIZER_NVME
