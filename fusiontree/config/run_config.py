"""The complete configuration of a run and the checks across its sections."""

import math
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from fusiontree.config.sections import (
    BatchConfig,
    CheckpointConfig,
    CheckpointingConfig,
    DataConfig,
    DistillConfig,
    HealthConfig,
    KernelsConfig,
    LocalPath,
    Location,
    LoggingConfig,
    LossConfig,
    OptimizerConfig,
    ScheduleConfig,
    Section,
    ValidationConfig,
    require,
)
from fusiontree.errors import UserError
from fusiontree.model.config import ModelConfig


class RunConfig(Section):
    """The complete configuration of a run.

    Raises:
        pydantic.ValidationError: a value has the wrong type or two values conflict; `load_config` converts it to a
            UserError.
    """

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$")  # the run's folder is output/name
    output: LocalPath = Path("runs")
    seed: int = Field(default=0, ge=0, lt=2**63)
    init_from: LocalPath | None = None  # folder made by `fusiontree export`, for the initial weights
    model: ModelConfig
    data: DataConfig
    batch: BatchConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    losses: LossConfig = LossConfig()
    distill: DistillConfig = DistillConfig()
    precision: Literal["bf16", "fp32", "fp8"] = "bf16"  # fp8: products of the blocks' linear layers; the rest bf16
    activation_checkpointing: CheckpointingConfig = CheckpointingConfig()
    deepspeed: Location = "zero1"  # a name in ds_configs/ or the path of a DeepSpeed JSON
    nvme_path: LocalPath | None = None  # folder on a local disk for the weights and moments of zero3_nvme
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
    logging: LoggingConfig = LoggingConfig()
    health: HealthConfig = HealthConfig()
    kernels: KernelsConfig = KernelsConfig()

    @model_validator(mode="after")
    def _values_agree(self) -> "RunConfig":
        schedule, row_tokens = self.schedule, self.data.seq_len * self.batch.micro_rows
        require(
            self.batch.tokens % row_tokens == 0,
            f"batch.tokens {self.batch.tokens} is not a multiple of data.seq_len {self.data.seq_len} x "
            f"batch.micro_rows {self.batch.micro_rows} = {row_tokens}; nearest multiples: "
            f"{_either(_multiples_around(self.batch.tokens, row_tokens))}",
        )
        for table in ("curriculum", "weights"):
            last = max(getattr(self.data, table) or {0: None})
            require(
                last < schedule.steps,
                f"data.{table}.{last} is not below schedule.steps {schedule.steps}: the run would end before it; "
                "remove it (null) or raise schedule.steps",
            )
        require(
            self.model.fusion != "sum" or not self.losses.shapes_gates,
            "losses.gate_balance and gate_entropy need a gate, but model.fusion sum has none; set both to 0",
        )
        require(
            self.model.srte != "learned" or self.model.max_positions >= self.data.seq_len,
            f"model.max_positions {self.model.max_positions} is below data.seq_len {self.data.seq_len}: srte learned "
            "has no encoding for the last tokens of a row; raise max_positions or lower seq_len",
        )
        if self.precision == "fp8":
            self._fits_fp8()
        return self

    def _fits_fp8(self) -> None:
        """Check that all sizes of the FP8 products are multiples of 16, as the hardware requires."""
        model = self.model
        widths = {
            "model.hidden_size": model.hidden_size,
            "model.mlp_size": model.mlp_size,
            "the Mamba branch, model.ssm_heads x ssm_head_dim": model.ssm_size,
            "the Mamba branch's input projection, which includes model.ssm_heads": model.ssm_projection_size,
            "an attention head, model.head_dim": model.head_dim,
            "a micro-batch, data.seq_len x batch.micro_rows": self.data.seq_len * self.batch.micro_rows,
        }
        for name, width in widths.items():
            require(
                width % 16 == 0,
                f"precision fp8 needs multiples of 16, but the size of {name} is {width}; change it or set "
                "precision=bf16",
            )

    @property
    def run_dir(self) -> Path:
        """The run's folder: configuration, metrics, checkpoints and logs."""
        return self.output / self.name

    def accumulation_steps(self, world_size: int) -> int:
        """Return the forward passes per optimizer step of each of `world_size` ranks.

        Raises:
            UserError: the batch is not divisible; the message gives the nearest batches and rank counts that work.
        """
        per_rank = self.data.seq_len * self.batch.micro_rows
        if self.batch.tokens % (per_rank * world_size) == 0:
            return self.batch.tokens // (per_rank * world_size)
        counts = _divisors(self.batch.tokens // per_rank)
        around = [max(c for c in counts if c < world_size), *[c for c in counts if c > world_size][:1]]
        raise UserError(
            f"batch.tokens {self.batch.tokens} does not divide among {world_size} ranks of batch.micro_rows "
            f"{self.batch.micro_rows} x data.seq_len {self.data.seq_len} = {per_rank} tokens; nearest batch.tokens for "
            f"{world_size} ranks: {_either(_multiples_around(self.batch.tokens, per_rank * world_size))}; nearest rank "
            f"counts for this batch: {_either(around)}"
        )


def _divisors(value: int) -> list[int]:
    """Return all divisors of `value`, ascending."""
    small = [number for number in range(1, math.isqrt(value) + 1) if value % number == 0]
    return sorted({*small, *(value // number for number in small)})


def _multiples_around(value: int, unit: int) -> list[int]:
    """Return the multiples of `unit` next below and above `value`, without 0."""
    below = value // unit * unit
    return [below, below + unit] if below else [unit]


def _either(numbers: list[int]) -> str:
    return " or ".join(map(str, numbers))
