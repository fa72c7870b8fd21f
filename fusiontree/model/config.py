"""The model's shape: the fields a user sets and the sizes that follow from them. Free of torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal

_SIZES = (
    *("vocab_size", "hidden_size", "num_layers", "mlp_size", "num_heads", "num_kv_heads", "head_dim", "window"),
    *("ssm_heads", "ssm_head_dim", "ssm_state_size", "ssm_groups", "conv_kernel", "chunk_size"),
    *("gate_rank", "srte_rank", "max_positions"),
)  # fields that are at least 1

LayerKind = Literal["hybrid", "mamba", "attention"]  # the branches of a layer: both, or the one


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

    layer_kinds: tuple[LayerKind, ...] | None = None  # branches of each layer, as pruning leaves them; None: both
    layer_global_heads: tuple[int, ...] | None = None  # of each layer, likewise; None: global_heads

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
        for name in ("norm_eps", "rope_base"):
            _require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}; it must be above 0")
        _require(0.0 <= self.branch_drop < 1.0, f"branch_drop {self.branch_drop} must be at least 0 and below 1")
        for name in ("layer_kinds", "layer_global_heads"):
            given = getattr(self, name)
            _require(
                given is None or len(given) == self.num_layers,
                f"{name} has {len(given or ())} entries for num_layers {self.num_layers}; give one per layer, or null",
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
        """The shape among `values`, as `to_dict` or JSON gives them; what is no field of it is passed over."""
        given: dict[str, Any] = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        for name in ("layer_kinds", "layer_global_heads"):
            if given.get(name) is not None:
                given[name] = tuple(given[name])  # JSON knows lists only
        return cls(**given)

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

    def kind_at(self, layer: int) -> LayerKind:
        """The branches of `layer` (from 0)."""
        return "hybrid" if self.layer_kinds is None else self.layer_kinds[layer]

    def has(self, branch: Literal["mamba", "attention"], layer: int) -> bool:
        """Whether `layer` has that branch."""
        return self.kind_at(layer) in ("hybrid", branch)

    def kv_heads_at(self, layer: int) -> tuple[int, int]:
        """Key-value heads of `layer`, global and windowed; none in a layer without attention."""
        if not self.has("attention", layer):
            return 0, 0
        heads = self.global_heads if self.layer_global_heads is None else self.layer_global_heads[layer]
        return heads // self.queries_per_kv, self.num_kv_heads - self.global_kv_heads

    def window_at(self, layer: int) -> int:
        """Tokens that the windowed heads of `layer` (from 0) see, the current one included."""
        if self.window_schedule == "constant":
            return self.window
        return self.window >> (3 - 4 * layer // self.num_layers)

    def kv_heads_by_window(self, layer: int) -> list[tuple[int, int | None]]:
        """Key-value heads of each kind in `layer` and the window of that kind (None: the whole document); none is 0."""
        global_kv, windowed = self.kv_heads_at(layer)
        kinds = [(global_kv, None), (windowed, self.window_at(layer))]
        return [(heads, window) for heads, window in kinds if heads]

    def parameter_count(self) -> int:
        """Trainable parameters of the whole model, by formula; tests hold it to the modules' own sum."""
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
        """The fields as plain values, fit for YAML and JSON."""
        return asdict(self)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
