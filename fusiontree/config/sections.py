"""The sections of a run's configuration: every key, its type, its default and its unit."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from fusiontree import paths

# far above any useful value, and small enough for floats, C integers and loops
Count = Annotated[int, Field(ge=1, le=10**15)]
Seconds = Annotated[float, Field(gt=0.0, le=1e8)]
Length = Annotated[int, Field(ge=2, le=2**30)]  # tokens; a row of one token has nothing to predict
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
Step = Annotated[int, Field(ge=0, le=10**15)]
Weight = Annotated[float, Field(ge=0.0)]


def _read_text(read: Callable[[str], object]) -> BeforeValidator:
    """Return a validator that reads strings by `read` and leaves other types to pydantic's error."""
    return BeforeValidator(lambda value: str(read(value)) if isinstance(value, str) else value)


LocalPath = Annotated[Path, _read_text(paths.local_path)]
Location = Annotated[str, _read_text(paths.location)]


class Section(BaseModel):
    """A frozen section that rejects unknown keys, values of another type, and infinities."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def require(condition: bool, message: str) -> None:
    """Raise ValueError, which pydantic reports as a validation error, unless `condition` is true."""
    if not condition:
        raise ValueError(message)


class SourceConfig(Section):
    """One dataset of a mixture."""

    path: Location  # dataset folder or address, as data.path
    weight: float = Field(default=1.0, ge=0.0)  # its share of the tokens is weight / sum of the weights
    max_epochs: float | None = Field(default=None, gt=0.0)  # then it leaves the mixture; null: unlimited


class DataConfig(Section):
    """The training data. Training needs `path` or `sources`."""

    path: Location | None = None  # dataset folder, with manifest.json and the splits train and validation
    sources: dict[Name, SourceConfig] | None = None  # several datasets, by name
    weights: dict[Step, dict[Name, Weight]] | None = None  # from that step on, the weights of the sources named
    seq_len: Length  # tokens per training row; with a curriculum, at its end
    curriculum: dict[Step, Length] | None = None  # from that step on, tokens per training row; the batch stays constant
    workers: int = Field(default=2, ge=0, le=1024)  # threads per rank that read ahead; 0: none
    cache: LocalPath | None = None  # rows of remote datasets, shared by a node's processes; null: ~/.cache/fusiontree
    cache_gb: float = Field(default=100.0, gt=0.0, le=1e9)  # its limit in GB (10^9 bytes)
    max_bad_rows: int = Field(default=100, ge=0)  # damaged rows after which the run stops
    max_bad_share: Fraction = 0.1  # the same, as a share of a source's rows; one row is tolerated if there are others

    @property
    def cache_bytes(self) -> int:
        """Limit of the cache in bytes."""
        return int(self.cache_gb * 1e9)

    @property
    def locations(self) -> dict[str, str]:
        """Dataset folders or addresses by source; a `path` without sources has the name ""."""
        if self.sources is not None:
            return {name: source.path for name, source in self.sources.items()}
        return {} if self.path is None else {"": self.path}

    @property
    def lengths(self) -> tuple[tuple[int, int], ...]:
        """(first step, tokens per training row) of each stage of the curriculum."""
        return tuple(sorted(self.curriculum.items())) if self.curriculum else ((0, self.seq_len),)

    @property
    def weight_table(self) -> tuple[tuple[int, dict[str, float]], ...]:
        """(first step, weight of every source), the first at step 0."""
        current = {name: source.weight for name, source in (self.sources or {}).items()} or {"": 1.0}
        table = [(0, current)]
        for step, changes in sorted((self.weights or {}).items()):
            current = current | changes
            table.append((step, current))
        return tuple(table)

    @model_validator(mode="after")
    def _tables_agree(self) -> "DataConfig":
        names = list(self.sources or {})
        require(
            self.path is None or self.sources is None,
            f"path {self.path} and sources {', '.join(names)} are both given; remove sources for a single dataset, or "
            "set path: null",
        )
        require(self.sources is None or bool(names), "sources is empty; add a dataset, or set path")
        for step, changes in (self.weights or {}).items():
            unknown = next((name for name in changes if name not in names), None)
            require(
                unknown is None, f"weights.{step}: {unknown} is not one of sources ({', '.join(names) or 'none given'})"
            )
            require(step > 0, "weights.0: set sources.NAME.weight instead, the weight from the first step on")
        for step, weights in self.weight_table:
            where = f"weights.{step}" if step else "sources"
            require(any(weights.values()), f"{where}: every weight is 0; give at least one source a share")
        self._check_curriculum()
        return self

    def _check_curriculum(self) -> None:
        lengths = self.lengths
        require(lengths[0][0] == 0, f"curriculum starts at step {lengths[0][0]}; add the length of step 0")
        require(
            lengths[-1][1] == self.seq_len,
            f"curriculum ends at length {lengths[-1][1]}, but seq_len is {self.seq_len}; end with seq_len",
        )
        for (_, before), (step, length) in pairwise(lengths):
            require(length > before, f"curriculum.{step}: length {length} is not above the previous {before}")
        for step, length in lengths:
            require(
                self.seq_len % length == 0,
                f"curriculum.{step}: length {length} does not divide seq_len {self.seq_len}; use powers of two",
            )


class BatchConfig(Section):
    """The size of an optimizer step."""

    tokens: int = Field(ge=1, le=2**36)  # tokens per optimizer step, over all ranks and accumulation steps
    micro_rows: Count = 1  # rows of data.seq_len tokens per rank and forward pass; affects only memory and speed


class OptimizerConfig(Section):
    """AdamW (arXiv 1711.05101), or Muon (arXiv 2502.16982) for the blocks' matrices and AdamW for the rest."""

    kind: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(gt=0.0)  # peak learning rate, reached at the end of the warm-up
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    beta2: float = Field(default=0.95, ge=0.0, lt=1.0)
    eps: float = Field(default=1e-8, gt=0.0)
    weight_decay: float = Field(default=0.1, ge=0.0)  # matrices only: norms, biases, gates and scan state are exempt
    momentum: float = Field(default=0.95, ge=0.0, lt=1.0)  # Muon's
    grad_clip: float = Field(default=1.0, ge=0.0)  # maximum global gradient norm; 0 = no clipping

    @model_validator(mode="after")
    def _clips_gradients_only(self) -> "OptimizerConfig":
        require(
            self.kind == "adamw" or self.grad_clip == 0,
            f"grad_clip {self.grad_clip:g} would clip Muon's updates, because DeepSpeed clips after it; "
            "set optimizer.grad_clip=0",
        )
        return self


class ScheduleConfig(Section):
    """Learning rate by step. Lengths in tokens are converted to steps on loading, rounded up."""

    kind: Literal["cosine", "wsd", "constant"] = "cosine"  # wsd: warm-up, stable, decay
    steps: Count  # optimizer steps of the run
    tokens: Count | None = None  # its length in tokens, instead of steps
    warmup_steps: Step = 0  # optimizer steps of linear warm-up, the first of `steps`
    warmup_tokens: Step | None = None
    decay_steps: Count | None = None  # wsd: optimizer steps of decay, the last of `steps`; null: a fifth of them
    decay_tokens: Count | None = None
    min_lr_ratio: Fraction = 0.1  # learning rate at the end of cosine or decay, as a share of the peak

    @property
    def decay(self) -> int:
        """Optimizer steps of the decay of `wsd`."""
        return self.decay_steps or max(1, self.steps // 5)

    @property
    def _least_steps(self) -> int:
        """The smallest `steps` that fits all phases."""
        if self.kind != "wsd":
            return self.warmup_steps + 1
        if self.decay_steps is not None:
            return self.warmup_steps + self.decay_steps
        # the decay grows with the steps, so the warm-up must fit in steps - steps // 5
        return max(self.warmup_steps + 1, 5 * (self.warmup_steps - 1) // 4 + 1)

    @model_validator(mode="after")
    def _phases_fit(self) -> "ScheduleConfig":
        wsd = self.kind == "wsd"
        require(
            wsd or self.decay_steps is None,
            f"decay_steps needs kind wsd, but kind is {self.kind}; remove decay_steps or set kind: wsd",
        )
        require(
            not wsd or self.warmup_steps + self.decay <= self.steps,
            f"warmup_steps {self.warmup_steps} and decay_steps {self.decay} together exceed steps {self.steps}; "
            f"lower one of them or raise steps to {self._least_steps}",
        )
        require(
            self.warmup_steps < self.steps,
            f"warmup_steps {self.warmup_steps} is not below steps {self.steps}: the schedule would end during its "
            f"warm-up; lower warmup_steps to {self.steps - 1} or raise steps to {self._least_steps}",
        )
        return self


class LossConfig(Section):
    """Terms added to the cross-entropy. The reported `loss` is the cross-entropy alone."""

    z_loss: float = Field(default=0.0, ge=0.0)  # weight of the squared log-partition of the logits; 1e-4 is usual
    gate_balance: dict[Step, Weight] = {0: 0.0}  # weight by step of the distance of layers' mean gates from the band
    gate_target: Fraction = 0.5  # middle of the band; 1 is all Mamba
    gate_band: Fraction = 0.25  # half its width; mean gates inside are not penalized
    gate_entropy: dict[Step, float] = {
        0: 0.0
    }  # weight by step of the mean gates' entropy; > 0 makes channels choose a branch

    @property
    def shapes_gates(self) -> bool:
        """True if a gate penalty has a nonzero weight at any step."""
        return any([*self.gate_balance.values(), *self.gate_entropy.values()])


class DistillConfig(Section):
    """Distillation from an exported model, off without `teacher`."""

    teacher: LocalPath | None = None  # folder made by `fusiontree export`, of the same tokenizer
    weight: dict[Step, Weight] = {0: 1.0}  # weight by step of the divergence from the teacher; the cross-entropy's is 1
    temperature: float = Field(default=1.0, gt=0.0)
    top_k: Count = 64  # the teacher's most likely tokens, one outcome each; all others are a single outcome


class CheckpointingConfig(Section):
    """Activations that the backward pass recomputes. ``activation_checkpointing: full`` sets only `policy`."""

    policy: Literal["none", "full", "every_n", "branch"] = "none"
    every: Count = 2  # every_n: recompute one block of every n
    branch: Literal["mamba", "attention", "both"] = "both"  # branch: the branches to recompute in every block
    offload: bool = False  # keep the inputs of recomputed parts in host memory

    @model_validator(mode="after")
    def _offloads_something(self) -> "CheckpointingConfig":
        require(
            not self.offload or self.policy != "none",
            "offload moves the inputs of recomputed parts, but policy none recomputes nothing; set policy, or offload: "
            "false",
        )
        return self


class CheckpointConfig(Section):
    """Frequency and retention of checkpoints."""

    every: Count = 1000  # optimizer steps; the last step always writes one
    keep_last: Count = 3  # newest checkpoints to keep
    keep_every: Step = 0  # also keep checkpoints at multiples of this step; 0: none


class ValidationConfig(Section):
    """Frequency and size of validation."""

    every: int = Field(default=500, ge=0)  # optimizer steps; 0 = never
    rows: Count | None = None  # rows of data.seq_len tokens; null = all


class LoggingConfig(Section):
    """Frequency and destinations of metrics."""

    every: Count = 10  # optimizer steps between lines of metrics
    layers_every: int = Field(default=100, ge=0)  # optimizer steps between lines of per-layer metrics; 0 = never
    wandb: bool = False
    tensorboard: bool = False  # event files in the run's folder


class HealthConfig(Section):
    """Detection of failures and the reaction to them."""

    max_bad_steps: Count = 5  # consecutive non-finite updates before `on_bad`; each is skipped
    on_bad: Literal["rollback", "stop"] = "rollback"  # rollback: to the last checkpoint, then past the bad rows
    on_spike: Literal["ignore", "rollback", "stop"] = "ignore"  # ignore: only record it
    spike_score: float = Field(default=10.0, gt=0.0)  # a spike is this many robust deviations above the median loss
    spike_window: int = Field(default=128, ge=8, le=10**6)  # updates in the median
    max_rollbacks: Count = 3  # to one checkpoint; then the run stops
    hang_factor: float = Field(default=10.0, gt=1.0)  # a step hangs if it exceeds this multiple of the median duration
    hang_seconds: Seconds = 300.0  # and this duration, which remote reads may need
    timeout_seconds: Seconds = 1800.0  # limit of a rank's wait for the others anywhere else


class KernelsConfig(Section):
    """Back-end of each operation; `auto` selects the best one available."""

    scan: str = "auto"
    convolution: str = "auto"
    attention: str = "auto"
    prefill: str = "auto"  # attention of a prompt's later chunks to the cache
    decode: str = "auto"  # attention of one new token to the cache
    loss: str = "auto"
    pointwise: str = "auto"  # norms, rotations and gates: compiled or not
