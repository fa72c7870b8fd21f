"""The model's shape: the fields a user sets and the sizes that follow from them. Free of torch."""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

_SIZES = (
    *("vocab_size", "hidden_size", "num_layers", "mlp_size", "num_heads", "num_kv_heads", "head_dim", "window"),
    *("ssm_heads", "ssm_head_dim", "ssm_state_size", "ssm_groups", "conv_kernel", "chunk_size"),
    *("gate_rank", "srte_rank", "max_positions"),
)  # fields that are at least 1


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a hybrid language model; every block runs a Mamba-2 and an attention branch and fuses them.

    Raises:
        ValueError: two fields disagree; the message names both and what to change.
    """

    # read by pydantic when a run's configuration is parsed; spelt as data so that this file needs no pydantic
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    vocab_size: int  # rows of the embedding table; at least the tokenizer's
    hidden_size: int  # width H of the residual stream
    num_layers: int
    mlp_size: int  # inner width of the SwiGLU

    num_heads: int  # N query heads
    num_kv_heads: int  # K key-value heads, shared by N / K query heads each
    head_dim: int  # D
    global_heads: int  # query heads that see the whole document; the rest see `window` tokens. Whole groups only
    window: int  # tokens a windowed head sees, the current one included
    window_schedule: Literal["constant", "pyramid"] = "constant"  # pyramid: W/8, W/4, W/2, W by quarter of the depth
    rope_base: float = 500_000.0

    ssm_heads: int = 16
    ssm_head_dim: int = 64  # P
    ssm_state_size: int = 128  # S
    ssm_groups: int = 1  # heads of one group share B and C
    conv_kernel: int = 4  # taps of the causal depthwise convolution
    chunk_size: int = 256  # tokens per chunk of the scan

    fusion: Literal["channel", "token", "static", "sum"] = "channel"
    gate_rank: int = 64  # inner width of the gate; read by `channel` and `token`
    branch_drop: float = 0.0  # probability that a layer loses one branch for a training step

    srte: Literal["none", "sincos", "learned"] = "sincos"  # shared relative time encoding of the Mamba branch's input
    srte_rank: int = 16  # rank of the learned table
    srte_shared: bool = True  # one instance for all layers
    max_positions: int = 32_768  # rows of the learned table: the longest document it can encode, in tokens

    norm_eps: float = 1e-5
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        for name in _SIZES:
            _require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}; change one of them",
        )
        _require(
            0 <= self.global_heads <= self.num_heads and self.global_heads % self.queries_per_kv == 0,
            f"global_heads {self.global_heads} must be a multiple of num_heads / num_kv_heads = {self.queries_per_kv} "
            f"from 0 to num_heads {self.num_heads}, so that no key-value head is both global and windowed",
        )
        _require(self.head_dim % 2 == 0, f"head_dim {self.head_dim} must be even for rotary positions")
        _require(
            self.srte != "sincos" or self.hidden_size % 2 == 0,
            f"hidden_size {self.hidden_size} must be even for srte sincos",
        )
        _require(
            self.ssm_heads % self.ssm_groups == 0,
            f"ssm_heads {self.ssm_heads} is not a multiple of ssm_groups {self.ssm_groups}; change one of them",
        )
        _require(
            self.window_schedule == "constant" or self.window % 8 == 0,
            f"window {self.window} must be a multiple of 8 for window_schedule pyramid, whose first layers see W / 8",
        )
        _require(0.0 <= self.branch_drop < 1.0, f"branch_drop {self.branch_drop} must be at least 0 and below 1")

    @property
    def queries_per_kv(self) -> int:
        """Query heads that share one key-value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def global_kv_heads(self) -> int:
        """Key-value heads of the global query heads; they come first."""
        return self.global_heads // self.queries_per_kv

    @property
    def ssm_size(self) -> int:
        """Inner width of the Mamba branch: heads times head size."""
        return self.ssm_heads * self.ssm_head_dim

    @property
    def conv_size(self) -> int:
        """Channels of the convolution: the scan's x, B and C."""
        return self.ssm_size + 2 * self.ssm_groups * self.ssm_state_size

    @property
    def ssm_projection_size(self) -> int:
        """Width of the Mamba branch's input projection: z, the convolution's channels and dt."""
        return self.ssm_size + self.conv_size + self.ssm_heads

    @property
    def residual_std(self) -> float:
        """Deviation that projections into the residual stream start with: depth does not raise the stream's scale."""
        return 0.02 / (2 * self.num_layers) ** 0.5

    def window_at(self, layer: int) -> int:
        """Tokens that the windowed heads of `layer` (from 0) see, the current one included."""
        if self.window_schedule == "constant":
            return self.window
        return self.window >> (3 - 4 * layer // self.num_layers)

    def kv_heads_by_window(self, layer: int) -> list[tuple[int, int | None]]:
        """Key-value heads of each kind in `layer` and the window of that kind (None: the whole document); none is 0."""
        windowed = self.num_kv_heads - self.global_kv_heads
        kinds = [(self.global_kv_heads, None), (windowed, self.window_at(layer))]
        return [(heads, window) for heads, window in kinds if heads]

    def parameter_count(self) -> int:
        """Trainable parameters of the whole model, by formula; tests hold it to the modules' own sum."""
        H = self.hidden_size
        attention_width = self.num_heads * self.head_dim
        attention = 2 * H * attention_width + 2 * H * self.num_kv_heads * self.head_dim
        attention_norms = 2 * self.head_dim + attention_width
        ssm = H * self.ssm_projection_size + self.ssm_size * H
        ssm_small = self.conv_size * (self.conv_kernel + 1) + 3 * self.ssm_heads + self.ssm_size
        gate = {
            "channel": 3 * H * self.gate_rank + H,
            "token": 2 * H * self.gate_rank + self.gate_rank + 1,
            "static": H,
            "sum": 0,
        }[self.fusion]
        block = attention + attention_norms + ssm + ssm_small + gate + 3 * H * self.mlp_size + 2 * H
        srte = self.srte_rank * (self.max_positions + H) if self.srte == "learned" else 0
        srte *= 1 if self.srte_shared else self.num_layers
        embeddings = (1 if self.tie_embeddings else 2) * self.vocab_size * H
        return embeddings + self.num_layers * block + srte + H

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, fit for YAML and JSON."""
        return asdict(self)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
