"""Weights gathered and gradients reduced block by block at ZeRO stage 3, on DeepSpeed's partitions.

DeepSpeed gathers each module's parameters in fp32 when the module runs, and reduces gradients through one bucket.
Both are driven by Python hooks of every module and leave the device idle. `BlockGather` removes these hooks and works
on units, as torch's FSDP2 does (arXiv 2304.11277): a unit is a block of the model, or a parameter outside the blocks.

- Forward: a unit's shards are gathered before it runs, while the unit before it computes; then its weights are freed.
- Backward: the same in reverse order. When all gradients of a unit exist, one reduce-scatter sums them over the ranks
  and each rank adds its mean to DeepSpeed's gradient partition, in fp32.
- Update: the optimizer steps DeepSpeed's flat fp32 partitions, which are the master weights, and the shards in the
  compute dtype are refreshed from them. So each weight is cast once per update, and a gather moves 2 bytes per weight.

Partitions, optimizer states, gradient partitions and checkpoints stay DeepSpeed's. Weights that the model uses in fp32
are gathered in fp32. Small ("persistent") parameters stay gathered between updates, as DeepSpeed keeps them.
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _coalescing_manager

# torch 2.13 renamed them; earlier versions have the second names only
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_REDUCTIONS = 2  # that may be in flight; each holds the fp32 gradient of a unit


class _Unit:
    """Parameters that are gathered and reduced together."""

    def __init__(self, parameters: list[Any], gradients: list[Tensor]):
        self.parameters = parameters  # with DeepSpeed's attributes
        self.gradients = gradients  # this rank's gradient partition of each parameter, fp32
        self.gathered = [parameter for parameter in parameters if not parameter.ds_persist]
        self.shards: list[Tensor] = []  # this rank's partition of each of `gathered`, in the dtype of its gather
        self.pending: tuple[list[Tensor], list[Any]] | None = None  # outputs and works of a gather in flight
        self.full = False  # whether the weights are gathered
        self.missing: set[int] = set()  # ids of the parameters whose gradient the backward pass has not yet computed


class BlockGather:
    """Gathers and reductions of a ZeRO-3 engine without offloading, in place of DeepSpeed's own."""

    def __init__(
        self, engine: Any, blocks: Sequence[nn.Module], cast: Collection[Tensor], dtype: torch.dtype, one_step: bool
    ):
        """Take over the gathers and reductions of `engine`.

        Args:
            engine: DeepSpeed's, at stage 3, before its first forward pass.
            blocks: of the engine's module, in the order in which they run.
            cast: parameters that the model uses in `dtype`; the others are gathered in fp32.
            dtype: of activations.
            one_step: step all partitions at once, by the optimizer as it is. Else DeepSpeed's step computes the norm,
                clips and steps one sub-group after the other.
        """
        self.zero = engine.optimizer
        self.group = self.zero.dp_process_group
        self.ranks = dist.get_world_size(self.group)
        self.forwarding = False  # between the start and the end of the model's forward pass
        self.in_flight: list[tuple[_Unit, list[Tensor], list[Tensor], list[Any]]] = []  # inputs, outputs, works
        self._remove_hooks()
        self.gradients = self._gradient_partitions()
        self._build_units(engine.module, blocks, cast if dtype != torch.float32 else (), dtype)
        self._add_hooks(engine.module, blocks)
        self._replace_methods(one_step)
        self.zero.checkpoint_event_epilogue()

    # --- construction ---

    def _remove_hooks(self) -> None:
        """Remove DeepSpeed's hooks."""
        self.zero.parameter_offload._remove_module_hooks()
        for handle in (*self.zero._grad_acc_hooks, *self.zero._leaf_module_hooks):
            handle.remove()

    def _gradient_partitions(self) -> list[list[Tensor]]:
        """Return views of DeepSpeed's flat gradient partition, fp32, one per parameter of each sub-group."""
        sizes = [parameter.partition_numel() for group in self.zero.fp16_groups for parameter in group]
        views = iter(self.zero.grad_partitions_flat_buffer.split(sizes))
        return [[next(views) for _ in group] for group in self.zero.fp16_groups]

    def _build_units(
        self, module: nn.Module, blocks: Sequence[nn.Module], cast: Collection[Tensor], dtype: torch.dtype
    ) -> None:
        gradient_of = {
            id(parameter): gradient
            for group, gradients in zip(self.zero.fp16_groups, self.gradients, strict=True)
            for parameter, gradient in zip(group, gradients, strict=True)
        }
        in_blocks = [list(block.parameters()) for block in blocks]
        inside = {id(parameter) for parameters in in_blocks for parameter in parameters}
        outside = [[parameter] for parameter in module.parameters() if id(parameter) not in inside]
        self.units = [_Unit(unit, [gradient_of[id(one)] for one in unit]) for unit in (*in_blocks, *outside)]
        self.blocks, self.roots = self.units[: len(blocks)], self.units[len(blocks) :]
        low = {id(parameter) for parameter in cast}
        kept = [parameter for unit in self.units for parameter in unit.gathered if id(parameter) in low]
        self.masters = [parameter.ds_tensor for parameter in kept]
        self.casts = [torch.empty_like(master, dtype=dtype) for master in self.masters]
        shard_of = dict(zip(map(id, kept), self.casts, strict=True))
        for unit in self.units:
            unit.shards = [shard_of.get(id(one), one.ds_tensor) for one in unit.gathered]
        self.persistent = _Unit([one for unit in self.units for one in unit.parameters if one.ds_persist], [])
        self.persistent.gathered = self.persistent.parameters
        self.persistent.shards = [one.ds_tensor for one in self.persistent.gathered]

    def _add_hooks(self, module: nn.Module, blocks: Sequence[nn.Module]) -> None:
        for unit in self.units:
            self._release(unit)  # with the dtype of the gather, before autograd notes the dtype for the gradient
            for parameter in unit.parameters:
                parameter.register_post_accumulate_grad_hook(partial(self._accumulated, unit))
        module.register_forward_pre_hook(self._start_forward)
        module.register_forward_hook(self._end_forward)
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(self._before, number))
            block.register_forward_hook(partial(self._after, number))
            block.register_full_backward_pre_hook(partial(self._before, number))

    def _replace_methods(self, one_step: bool) -> None:
        """Let DeepSpeed call this object after a backward pass, for a step, and after it has loaded weights."""
        zero = self.zero
        step: Callable[..., None] = self._step if one_step else zero.step
        gather_persistent: Callable[[], None] = zero.checkpoint_event_epilogue

        def step_and_refresh(closure: None = None) -> None:
            step()
            self._refresh()

        def restore() -> None:
            gather_persistent()
            self._refresh()

        zero.step, zero.checkpoint_event_epilogue = step_and_refresh, restore
        zero.overlapping_partition_gradients_reduce_epilogue = self._end_backward

    # --- weights ---

    @torch.no_grad()
    def _refresh(self) -> None:
        """Refresh the shards and the persistent parameters from the master weights; drop older gathered weights."""
        if self.casts:
            torch._foreach_copy_(self.casts, self.masters)
        for unit in self.units:
            self._release(unit)
        self.persistent.full = False
        self._gather(self.persistent)

    def _prefetch(self, unit: _Unit) -> None:
        """Start to gather a unit's weights."""
        if unit.full or unit.pending is not None or not unit.gathered:
            return
        if self.ranks == 1:
            unit.pending = unit.shards, []
            return
        outputs = [
            torch.empty(shard.numel() * self.ranks, dtype=shard.dtype, device=shard.device) for shard in unit.shards
        ]
        unit.pending = outputs, _coalesced(_all_gather, outputs, unit.shards, self.group)

    @torch.no_grad()
    def _gather(self, unit: _Unit) -> None:
        """Make the weights of a unit available to the next kernels."""
        self._prefetch(unit)
        if unit.pending is None:
            return
        outputs, works = unit.pending
        for work in works:
            work.wait()
        for parameter, output in zip(unit.gathered, outputs, strict=True):
            parameter.data = output[: parameter.ds_numel].view(parameter.ds_shape)
        unit.pending, unit.full = None, True

    @torch.no_grad()
    def _release(self, unit: _Unit) -> None:
        """Free the gathered weights of a unit."""
        if unit.pending is not None:
            for work in unit.pending[1]:
                work.wait()  # the collective still writes
        for parameter, shard in zip(unit.gathered, unit.shards, strict=True):
            parameter.data = shard.new_empty(0)
        unit.pending, unit.full = None, False

    # --- hooks ---

    def _start_forward(self, *_: Any) -> None:
        self.forwarding = True
        for unit in (*self.roots, *self.blocks[:1]):
            self._prefetch(unit)
        for unit in self.roots:
            self._gather(unit)
        for unit in self.units:
            unit.missing = {id(parameter) for parameter in unit.parameters}

    def _end_forward(self, *_: Any) -> None:
        self.forwarding = False
        if not torch.is_grad_enabled():
            for unit in self.units:
                self._release(unit)

    def _before(self, number: int, *_: Any) -> None:
        """Gather the weights of block `number`, and start to gather those of the block that runs after it."""
        self._gather(self.blocks[number])
        following = number + 1 if self.forwarding else number - 1
        if 0 <= following < len(self.blocks):
            self._prefetch(self.blocks[following])

    def _after(self, number: int, *_: Any) -> None:
        """Free the weights of block `number`, unless its backward pass is next."""
        if self.forwarding and number + 1 < len(self.blocks):
            self._release(self.blocks[number])

    def _accumulated(self, unit: _Unit, parameter: Tensor) -> None:
        """Note that the gradient of `parameter` is complete; reduce the unit's gradients if it is the last one."""
        unit.missing.discard(id(parameter))
        if not unit.missing:
            self._reduce(unit)

    # --- gradients ---

    @torch.no_grad()
    def _reduce(self, unit: _Unit) -> None:
        """Start to sum the gradients of a unit over the ranks; free its weights and full gradients."""
        if self.ranks == 1:
            self._add(unit, [parameter.grad.flatten() for parameter in unit.parameters])
        else:
            while len(self.in_flight) >= _REDUCTIONS:
                self._finish()
            self.in_flight.append((unit, *self._scatter(unit)))
        for parameter in unit.parameters:
            parameter.grad = None
        self._release(unit)

    def _scatter(self, unit: _Unit) -> tuple[list[Tensor], list[Tensor], list[Any]]:
        """Start a reduce-scatter; return its inputs, its outputs and its works."""
        lengths = [gradient.numel() for gradient in unit.gradients]
        flat = torch.empty(sum(lengths) * self.ranks, device=unit.gradients[0].device)
        inputs = list(flat.split([length * self.ranks for length in lengths]))
        real = []  # without padding
        for parameter, values in zip(unit.parameters, inputs, strict=True):
            values[parameter.ds_numel :] = 0.0
            real.append(values[: parameter.ds_numel])
        torch._foreach_copy_(real, [parameter.grad.flatten() for parameter in unit.parameters])
        outputs = list(torch.empty(sum(lengths), device=flat.device).split(lengths))
        return inputs, outputs, _coalesced(_reduce_scatter, outputs, inputs, self.group)

    @torch.no_grad()
    def _finish(self) -> None:
        """Wait for the oldest reduction and add its result."""
        unit, _, outputs, works = self.in_flight.pop(0)
        for work in works:
            work.wait()
        torch._foreach_div_(outputs, self.ranks)  # DeepSpeed's convention: the mean over ranks
        self._add(unit, outputs)

    def _add(self, unit: _Unit, gradients: list[Tensor]) -> None:
        """Add gradients to this rank's partitions; those of an update's first backward pass replace the old values."""
        if self.zero.micro_step_id == 0:
            torch._foreach_copy_(unit.gradients, gradients)
        else:
            torch._foreach_add_(unit.gradients, gradients)

    def _end_backward(self) -> None:
        """Complete the reductions of a backward pass, and hand the gradients to DeepSpeed.

        A parameter that the loss does not depend on has no gradient. Its unit is reduced here, with zeros for it.
        """
        for unit in self.units:
            if unit.missing:
                for parameter in unit.parameters:
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
                unit.missing = set()
                self._reduce(unit)
        while self.in_flight:
            self._finish()
        self.zero.averaged_gradients.update(enumerate(map(list, self.gradients)))  # DeepSpeed drops the lists
        self.zero._epilogue_ran_this_backward = True  # the next forward pass counts a micro-step

    # --- the update ---

    def _step(self) -> None:
        """Step all flat partitions at once."""
        optimizer, start = self.zero.optimizer, 0
        for number, flat in enumerate(self.zero.fp32_partitioned_groups_flat):
            flat.grad = self.zero.grad_partitions_flat_buffer.narrow(0, start, flat.numel())
            optimizer.param_groups[self.zero.sub_group_to_group_id[number]]["params"].append(flat)
            start += flat.numel()
        optimizer.step()
        for number, flat in enumerate(self.zero.fp32_partitioned_groups_flat):
            flat.grad = None
            # the parameters' partitions are views of `flat` or, on some devices, copies of it
            self.zero._reassign_or_swap_out_partitioned_parameters(number)
        for group in optimizer.param_groups:
            group["params"] = []


def _coalesced(
    function: Callable[..., Any], outputs: Sequence[Tensor], inputs: Sequence[Tensor], group: Any
) -> list[Any]:
    """Start the collective `function` for each pair of tensors, in one launch per dtype; return the works.

    Gloo flattens the tensors of a launch into one, and corrupts memory if their dtypes differ.
    """
    works = []
    for dtype in dict.fromkeys(values.dtype for values in inputs):
        with _coalescing_manager(group, async_ops=True) as work:
            for output, values in zip(outputs, inputs, strict=True):
                if values.dtype == dtype:
                    function(output, values, group=group)
        works.append(work)
    return works
