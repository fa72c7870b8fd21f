"""The model's shape: the user's fields and derived sizes. Free of torch."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal

_SIZE = 2**18  # far above any useful one; a tensor of two of them has fewer than 2^63 bytes
# greatest value of each field that must be at least 1
_LIMITS = {"num_layers": 2**12, "vocab_size": 2**26, "window": 2**30, "max_positions": 2**30} | dict.fromkeys(
    (
        *("hidden_size", "mlp_size", "num_heads", "num_kv_heads", "head_dim", "ssm_heads", "ssm_head_dim"),
        *("ssm_state_size", "ssm_groups", "conv_kernel", "chunk_size", "gate_rank", "srte_rank"),
    ),
    _SIZE,
)

LayerKind = Literal["hybrid", "mamba", "attention"]  # the branches of a layer: both, or one of them


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a hybrid language model, whose blocks fuse a Mamba-2 and an attention branch.

    Raises:
        ValueError: fields are invalid or inconsistent; the message names them and the remedy.
    """

    # read by pydantic when it parses a run's configuration; plain data, as exported models need no pydantic
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    vocab_size: int  # rows of the embedding table; at least the tokenizer's
    hidden_size: int  # width H of the residual stream
    num_layers: int
    mlp_size: int  # inner width of the SwiGLU

    num_heads: int  # N query heads
    num_kv_heads: int  # K key-value heads, shared by N / K query heads each
    head_dim: int  # D
    global_heads: int  # query heads that see their full document; the others see a window
    window: int  # tokens that a windowed head sees, the current one included
    window_schedule: Literal["constant", "pyramid"] = "constant"  # pyramid: W/8, W/4, W/2, W by quarter of the depth
    rope_base: float = 500_000.0

    ssm_heads: int = 16
    ssm_head_dim: int = 64  # P
    ssm_state_size: int = 128  # S
    ssm_groups: int = 1  # the heads of a group share B and C
    conv_kernel: int = 4  # taps of the causal depthwise convolution
    chunk_size: int = 256  # tokens per chunk of the scan

    fusion: Literal["channel", "token", "static", "sum"] = "channel"
    gate_rank: int = 64  # inner width of the gate; used by `channel` and `token`
    branch_drop: float = 0.0  # probability that a layer drops one branch in a training step

    srte: Literal["none", "sincos", "learned"] = "sincos"  # time encoding added to the Mamba branch's input
    srte_rank: int = 16  # rank of the learned table
    srte_shared: bool = True  # one instance for all layers, or one per layer
    max_positions: int = 32_768  # rows of the learned table: the longest document that it encodes, in tokens

    norm_eps: float = 1e-5
    tie_embeddings: bool = True

    layer_kinds: tuple[LayerKind, ...] | None = None  # remaining branches of each layer after pruning; None: both
    layer_global_heads: tuple[int, ...] | None = None  # remaining global heads of each layer; None: global_heads

    def __post_init__(self) -> None:
        for name, limit in _LIMITS.items():
            value = getattr(self, name)
            _require(value >= 1, f"{name} is {value}; it must be at least 1")
            _require(value <= limit, f"{name} is {value}; it must be at most {limit}")
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}; change one of them",
        )
        _require(
            0 <= self.global_heads <= self.num_heads and self.global_heads % self.queries_per_kv == 0,
            f"global_heads {self.global_heads} must be a multiple of num_heads / num_kv_heads = {self.queries_per_kv} "
            f"from 0 to num_heads {self.num_heads}, because a key-value head is global or windowed",
        )
        _require(self.head_dim % 2 == 0, f"head_dim {self.head_dim} must be even for RoPE")
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
        for name in ("norm_eps", "rope_base"):
            _require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}; it must be above 0")
        _require(0.0 <= self.branch_drop < 1.0, f"branch_drop {self.branch_drop} must be at least 0 and below 1")
        for name in ("layer_kinds", "layer_global_heads"):
            given = getattr(self, name)
            _require(
                given is None or len(given) == self.num_layers,
                f"{name} has {len(given or ())} entries for num_layers {self.num_layers}; set one per layer, or null",
            )
        for layer, heads in enumerate(self.layer_global_heads or ()):
            _require(
                0 <= heads <= self.global_heads
                and heads % self.queries_per_kv == 0
                and (heads > 0 or self.global_heads < self.num_heads),
                f"layer_global_heads has {heads} for layer {layer}; it must be a multiple of num_heads / num_kv_heads "
                f"= {self.queries_per_kv} up to global_heads {self.global_heads}, and leave the layer a head",
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """Build a shape from the output of `to_dict` or from JSON; keys that are not fields are ignored."""
        given: dict[str, Any] = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        for name in ("layer_kinds", "layer_global_heads"):
            if given.get(name) is not None:
                given[name] = tuple(given[name])  # JSON has no tuples
        return cls(**given)

    @property
    def queries_per_kv(self) -> int:
        """Number of query heads that share a key-value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def global_kv_heads(self) -> int:
        """Number of key-value heads of the global query heads; they come first."""
        return self.global_heads // self.queries_per_kv

    @property
    def ssm_size(self) -> int:
        """Inner width of the Mamba branch: SSM heads times SSM head size."""
        return self.ssm_heads * self.ssm_head_dim

    @property
    def conv_size(self) -> int:
        """Number of channels of the convolution: the scan's x, B and C."""
        return self.ssm_size + 2 * self.ssm_groups * self.ssm_state_size

    @property
    def ssm_projection_size(self) -> int:
        """Output width of the Mamba branch's input projection: z, the convolution's channels and dt."""
        return self.ssm_size + self.conv_size + self.ssm_heads

    @property
    def residual_std(self) -> float:
        """Initial standard deviation of projections into the residual stream, scaled by depth as in GPT-2."""
        return 0.02 / (2 * self.num_layers) ** 0.5

    @property
    def embedding_std(self) -> float:
        """Initial standard deviation of embedding and head: 0.5 divided by √H gives the initial logits 0.5."""
        return 0.5 / math.sqrt(self.hidden_size)

    def kind_at(self, layer: int) -> LayerKind:
        """Return the branches of `layer` (from 0)."""
        return "hybrid" if self.layer_kinds is None else self.layer_kinds[layer]

    def has(self, branch: Literal["mamba", "attention"], layer: int) -> bool:
        """Return whether `layer` has `branch`."""
        return self.kind_at(layer) in ("hybrid", branch)

    def kv_heads_at(self, layer: int) -> tuple[int, int]:
        """Return the numbers of global and windowed key-value heads of `layer`; zeros without attention."""
        if not self.has("attention", layer):
            return 0, 0
        heads = self.global_heads if self.layer_global_heads is None else self.layer_global_heads[layer]
        return heads // self.queries_per_kv, self.num_kv_heads - self.global_kv_heads

    def window_at(self, layer: int) -> int:
        """Return the window of `layer` (from 0) in tokens, the current one included."""
        if self.window_schedule == "constant":
            return self.window
        return self.window >> (3 - 4 * layer // self.num_layers)

    def kv_heads_by_window(self, layer: int) -> list[tuple[int, int | None]]:
        """Return (key-value heads, window) of the global heads, with window None, and of the windowed heads, if any."""
        global_kv, windowed = self.kv_heads_at(layer)
        kinds = [(global_kv, None), (windowed, self.window_at(layer))]
        return [(heads, window) for heads, window in kinds if heads]

    def parameter_count(self) -> int:
        """Compute the number of trainable parameters by formula; a test compares it with the modules."""
        H, layers = self.hidden_size, range(self.num_layers)
        srte = self.srte_rank * (self.max_positions + H) if self.srte == "learned" else 0
        srte *= 1 if self.srte_shared else sum(self.has("mamba", layer) for layer in layers)
        embeddings = (1 if self.tie_embeddings else 2) * self.vocab_size * H
        return embeddings + sum(map(self._block_parameters, layers)) + srte + H

    def _block_parameters(self, layer: int) -> int:
        H = self.hidden_size
        count = 3 * H * self.mlp_size + 2 * H
        if self.has("attention", layer):
            kv_heads = sum(self.kv_heads_at(layer))
            width = kv_heads * self.queries_per_kv * self.head_dim
            count += 2 * H * width + 2 * H * kv_heads * self.head_dim + 2 * self.head_dim + width
        if self.has("mamba", layer):
            count += H * self.ssm_projection_size + self.ssm_size * H
            count += self.conv_size * (self.conv_kernel + 1) + 3 * self.ssm_heads + self.ssm_size
        if self.kind_at(layer) == "hybrid":
            count += {
                "channel": 3 * H * self.gate_rank + H,
                "token": 2 * H * self.gate_rank + self.gate_rank + 1,
                "static": H,
                "sum": 0,
            }[self.fusion]
        return count

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values for YAML and JSON."""
        return asdict(self)


def _require(valid: bool, message: str) -> None:
    if not valid:
        raise ValueError(message)
