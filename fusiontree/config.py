"""A run's whole configuration: YAML in, one frozen and fully checked object out. Free of torch.

Every mistake a user can make here ends in one UserError line that says what, where and what to do.
"""

import difflib
import importlib.resources
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from importlib.resources.abc import Traversable
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from fusiontree.errors import UserError
from fusiontree.model.config import ModelConfig

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
Step = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0.0)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


class SourceConfig(_Section):
    """One of several datasets that are mixed."""

    path: str  # dataset folder or address, as data.path
    weight: float = Field(default=1.0, ge=0.0)  # its share of the tokens is weight / sum of the weights
    max_epochs: float | None = Field(default=None, gt=0.0)  # then it leaves the mixture; null: it repeats for ever


class DataConfig(_Section):
    """Where the tokens come from. Training needs `path` or `sources`."""

    path: str | None = None  # dataset folder, with manifest.json and the splits train and validation
    sources: dict[Name, SourceConfig] | None = None  # several datasets, by name
    weights: dict[Step, dict[Name, Weight]] | None = None  # from that step on, the weights of the sources named
    seq_len: Count  # tokens per training row; with a curriculum, at its end
    curriculum: dict[Step, Count] | None = None  # from that step on, tokens per training row; the batch stays constant
    workers: int = Field(default=2, ge=0)  # threads per rank that read ahead; 0: none
    cache: Path = Path("~/.cache/fusiontree")  # where rows of datasets at an address are kept, shared by a node
    cache_gb: float = Field(default=100.0, gt=0.0)  # GB (10^9 bytes) that they may take
    max_bad_rows: int = Field(default=100, ge=0)  # stored rows that may turn out damaged before the run stops

    @property
    def locations(self) -> dict[str, str]:
        """Dataset folders or addresses by source; the name "" is that of a `path` that stands alone."""
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
        _require(
            self.path is None or self.sources is None,
            f"path {self.path} and sources {', '.join(names)} are both given; take the one for a single dataset, or "
            "the others (path: null)",
        )
        _require(self.sources is None or bool(names), "sources is empty; name a dataset there, or take path")
        for step, changes in (self.weights or {}).items():
            unknown = next((name for name in changes if name not in names), None)
            _require(
                unknown is None, f"weights.{step}: {unknown} is not one of sources ({', '.join(names) or 'none given'})"
            )
            _require(step > 0, "weights.0: what holds from the first step on stands in sources.NAME.weight")
        for step, weights in self.weight_table:
            where = f"weights.{step}" if step else "sources"
            _require(any(weights.values()), f"{where}: every weight is 0; give at least one source a share")
        self._check_curriculum()
        return self

    def _check_curriculum(self) -> None:
        lengths = self.lengths
        _require(lengths[0][0] == 0, f"curriculum begins at step {lengths[0][0]}; give the length of step 0 too")
        _require(
            lengths[-1][1] == self.seq_len,
            f"curriculum ends at length {lengths[-1][1]}, seq_len is {self.seq_len}; make the last length seq_len",
        )
        for (_, before), (step, length) in pairwise(lengths):
            _require(length > before, f"curriculum.{step}: length {length} is not above the one before, {before}")
        for step, length in lengths:
            _require(
                self.seq_len % length == 0,
                f"curriculum.{step}: length {length} does not divide seq_len {self.seq_len}; take powers of two",
            )


class BatchConfig(_Section):
    """How many tokens an optimizer step takes."""

    tokens: Count  # global batch per optimizer step, in tokens, over all ranks and accumulation steps
    micro_rows: Count = 1  # rows of data.seq_len tokens per rank and forward pass; only memory and speed depend on it


class OptimizerConfig(_Section):
    """AdamW (arXiv 1711.05101), or Muon (arXiv 2502.16982) for the blocks' matrices and AdamW for the rest."""

    kind: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(gt=0.0)  # peak learning rate, reached at the end of the warm-up
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    beta2: float = Field(default=0.95, ge=0.0, lt=1.0)
    eps: float = Field(default=1e-8, gt=0.0)
    weight_decay: float = Field(default=0.1, ge=0.0)  # matrices only: norms, biases, gates and scan state are exempt
    momentum: float = Field(default=0.95, ge=0.0, lt=1.0)  # Muon's
    grad_clip: float = Field(default=1.0, ge=0.0)  # largest norm of the whole gradient; 0 = never clip

    @model_validator(mode="after")
    def _clips_gradients_only(self) -> "OptimizerConfig":
        _require(
            self.kind == "adamw" or self.grad_clip == 0,
            f"grad_clip {self.grad_clip:g} would cut Muon's update, which DeepSpeed makes before it clips; with kind "
            "muon set optimizer.grad_clip=0",
        )
        return self


class ScheduleConfig(_Section):
    """Learning rate by step. A length in tokens becomes one in steps as it is read: the first that reach the tokens."""

    kind: Literal["cosine", "wsd", "constant"] = "cosine"  # wsd: warm-up, stable, decay
    steps: Count  # optimizer steps of the whole run
    tokens: Count | None = None  # or its tokens
    warmup_steps: Step = 0  # optimizer steps of linear warm-up, the first of `steps`
    warmup_tokens: Step | None = None
    decay_steps: Count | None = None  # wsd: optimizer steps of decay, the last of `steps`; null: a fifth of them
    decay_tokens: Count | None = None
    min_lr_ratio: Fraction = 0.1  # learning rate at the end of cosine or decay, as a share of the peak

    @property
    def decay(self) -> int:
        """Optimizer steps of the decay of `wsd`."""
        return self.decay_steps or max(1, self.steps // 5)

    @model_validator(mode="after")
    def _phases_fit(self) -> "ScheduleConfig":
        wsd = self.kind == "wsd"
        _require(wsd or self.decay_steps is None, f"decay_steps is for kind wsd, but kind is {self.kind}; take one out")
        _require(
            self.warmup_steps < self.steps,
            f"warmup_steps {self.warmup_steps} is not below steps {self.steps}: the schedule would end before it has "
            "warmed up; lower warmup_steps or raise steps",
        )
        _require(
            not wsd or self.warmup_steps + self.decay <= self.steps,
            f"warmup_steps {self.warmup_steps} and decay_steps {self.decay} are together more than steps {self.steps}; "
            f"lower one of them or raise steps to {self.warmup_steps + self.decay}",
        )
        return self


class LossConfig(_Section):
    """What is added to the cross-entropy; what is reported as `loss` stays the cross-entropy alone."""

    z_loss: float = Field(default=0.0, ge=0.0)  # weight of the squared log-partition of the logits; 1e-4 is usual
    gate_balance: dict[Step, Weight] = {0: 0.0}  # weight of how far layers' mean gates lie outside the band, by step
    gate_target: Fraction = 0.5  # middle of the band; 1 is all Mamba
    gate_band: Fraction = 0.25  # on either side of the middle: there nothing is penalised
    gate_entropy: dict[Step, float] = {0: 0.0}  # weight of the mean gates' entropy: above 0 channels choose a branch

    @property
    def shapes_gates(self) -> bool:
        """Whether either of the gate's weights is ever other than 0."""
        return any([*self.gate_balance.values(), *self.gate_entropy.values()])


class DistillConfig(_Section):
    """Learning from the model of an exported folder beside the data; without `teacher`, from the data alone."""

    teacher: Path | None = None  # folder made by `fusiontree export`, of the same tokenizer
    weight: dict[Step, Weight] = {0: 1.0}  # of the divergence from the teacher, beside the cross-entropy's 1, by step
    temperature: float = Field(default=1.0, gt=0.0)
    top_k: Count = 64  # the teacher's likeliest tokens that stand alone; the others are one outcome together


class CheckpointingConfig(_Section):
    """Which activations the backward pass computes again. ``activation_checkpointing: full`` sets `policy` alone."""

    policy: Literal["none", "full", "every_n", "branch"] = "none"
    every: Count = 2  # every_n: one block of so many is computed again
    branch: Literal["mamba", "attention", "both"] = "both"  # branch: what is computed again of every block
    offload: bool = False  # what is kept of a recomputed part, its input, waits in the host's memory

    @model_validator(mode="after")
    def _offloads_something(self) -> "CheckpointingConfig":
        _require(
            not self.offload or self.policy != "none",
            "offload moves the inputs of recomputed parts, and policy none has none; set policy or offload: false",
        )
        return self


class CheckpointConfig(_Section):
    """When checkpoints are written and how many stay."""

    every: Count = 1000  # optimizer steps; the last step always writes one
    keep_last: Count = 3  # checkpoints that stay, the newest
    keep_every: Step = 0  # and those of a step that is a multiple of this, for ever; 0: none


class ValidationConfig(_Section):
    """When the held-out loss is measured."""

    every: int = Field(default=500, ge=0)  # optimizer steps; 0 = never
    rows: Count | None = None  # rows of data.seq_len tokens; null = all


class LoggingConfig(_Section):
    """What is reported while the run goes on."""

    every: Count = 10  # optimizer steps between two lines of metrics
    layers_every: int = Field(default=100, ge=0)  # optimizer steps between two looks at each layer; 0 = never
    wandb: bool = False
    tensorboard: bool = False  # event files in the run's folder


class HealthConfig(_Section):
    """What is done when training is not well."""

    max_bad_steps: Count = 5  # updates in a row whose loss or gradient is not finite; each is left out
    on_bad: Literal["rollback", "stop"] = "rollback"  # rollback: to the last checkpoint, then past the bad rows
    on_spike: Literal["ignore", "rollback", "stop"] = "ignore"  # ignore: it is recorded
    spike_score: float = Field(default=10.0, gt=0.0)  # a spike: so many robust deviations above the median loss
    spike_window: int = Field(default=128, ge=8)  # updates that the median is over
    max_rollbacks: Count = 3  # to one checkpoint; then the run stops
    hang_factor: float = Field(default=10.0, gt=1.0)  # a step that takes so many times their median hangs,
    hang_seconds: float = Field(default=300.0, gt=0.0)  # if it takes longer than this too
    timeout_seconds: float = Field(default=1800.0, gt=0.0)  # that a rank waits for the others anywhere else


class KernelsConfig(_Section):
    """Back-end of each operation; `auto` is the best that runs here."""

    scan: str = "auto"
    convolution: str = "auto"
    attention: str = "auto"
    prefill: str = "auto"  # attention of a prompt's later pieces to all before them
    decode: str = "auto"  # attention of one new token to the cache
    loss: str = "auto"
    pointwise: str = "auto"  # norms, rotations and gates between the rest: compiled or not


class RunConfig(_Section):
    """Everything that decides a run.

    Raises:
        pydantic.ValidationError: a value is of the wrong kind or two values disagree. `load_config` turns it into one
            UserError line.
    """

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$")  # the run's folder is output/name
    output: Path = Path("runs")
    seed: int = Field(default=0, ge=0)
    init_from: Path | None = None  # folder made by `fusiontree export`, whose weights the run starts from
    model: ModelConfig
    data: DataConfig
    batch: BatchConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    losses: LossConfig = LossConfig()
    distill: DistillConfig = DistillConfig()
    precision: Literal["bf16", "fp32"] = "bf16"
    activation_checkpointing: CheckpointingConfig = CheckpointingConfig()
    deepspeed: str = "zero1"  # a name in ds_configs/ or the path of a DeepSpeed JSON
    nvme_path: Path | None = None  # folder on a local disk, where zero3_nvme keeps weights and moments
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
    logging: LoggingConfig = LoggingConfig()
    health: HealthConfig = HealthConfig()
    kernels: KernelsConfig = KernelsConfig()

    @model_validator(mode="after")
    def _values_agree(self) -> "RunConfig":
        schedule, row_tokens = self.schedule, self.data.seq_len * self.batch.micro_rows
        _require(
            self.batch.tokens % row_tokens == 0,
            f"batch.tokens {self.batch.tokens} is not a multiple of data.seq_len {self.data.seq_len} x "
            f"batch.micro_rows {self.batch.micro_rows} = {row_tokens}; nearest batch.tokens that are: "
            f"{_either(_multiples_around(self.batch.tokens, row_tokens))}",
        )
        for table in ("curriculum", "weights"):
            last = max(getattr(self.data, table) or {0: None})
            _require(
                last < schedule.steps,
                f"data.{table}.{last} is not below schedule.steps {schedule.steps}: the run would end before it; take "
                "it out (null) or raise steps",
            )
        _require(
            self.model.fusion != "sum" or not self.losses.shapes_gates,
            "losses.gate_balance and gate_entropy shape a gate, and model.fusion sum has none; set both to 0",
        )
        _require(
            self.model.srte != "learned" or self.model.max_positions >= self.data.seq_len,
            f"model.max_positions {self.model.max_positions} is below data.seq_len {self.data.seq_len}: srte learned "
            "has no encoding for the last tokens of a row; raise max_positions or lower seq_len",
        )
        return self

    @property
    def run_dir(self) -> Path:
        """The folder of this run: configuration, metrics, checkpoints and logs."""
        return self.output / self.name

    def accumulation_steps(self, world_size: int) -> int:
        """Forward passes that each of `world_size` ranks makes per optimizer step.

        Raises:
            UserError: the batch does not divide; the message names the nearest batches and rank counts that do.
        """
        per_rank = self.data.seq_len * self.batch.micro_rows
        if self.batch.tokens % (per_rank * world_size) == 0:
            return self.batch.tokens // (per_rank * world_size)
        passes = self.batch.tokens // per_rank
        counts = [ranks for ranks in range(1, passes + 1) if passes % ranks == 0]
        around = [max(c for c in counts if c < world_size), *[c for c in counts if c > world_size][:1]]
        raise UserError(
            f"batch.tokens {self.batch.tokens} does not divide among {world_size} ranks of batch.micro_rows "
            f"{self.batch.micro_rows} x data.seq_len {self.data.seq_len} = {per_rank} tokens; nearest batch.tokens for "
            f"{world_size} ranks: {_either(_multiples_around(self.batch.tokens, per_rank * world_size))}; nearest rank "
            f"counts for this batch: {_either(around)}"
        )


def _keys_by_section() -> dict[str, tuple[str, ...]]:
    sections = {}
    for name, info in RunConfig.model_fields.items():
        kind = info.annotation
        if kind is ModelConfig:
            sections[name] = tuple(field.name for field in fields(kind))
        elif kind in _Section.__subclasses__():
            sections[name] = tuple(kind.model_fields)
    return sections


SECTIONS = _keys_by_section()
KEYS = tuple(
    f"{name}.{key}" if key else name for name in RunConfig.model_fields for key in SECTIONS.get(name, (None,))
)  # every dotted key, in order
_LISTS = ("model.layer_kinds", "model.layer_global_heads")  # keys whose value is a list
# keys below which the user chooses names, and how many names lead to a value: data.sources.NAME.weight, ...
TABLES = {"data.sources": 2, "data.weights": 2, "data.curriculum": 1}
# tables of values by step, joined by straight lines; a single value holds from step 0 on
POINTS = ("losses.gate_balance", "losses.gate_entropy", "distill.weight")
TABLES |= dict.fromkeys(POINTS, 1)
SHORT_FORMS = {"activation_checkpointing": "policy"}  # a single value given to the section is that of this key
_TABLE_HINTS = {
    "data.sources": "give data.sources.NAME.path and, if you like, weight and max_epochs",
    "data.weights": "give data.weights.STEP.NAME: the weight of source NAME from that step on",
    "data.curriculum": "give data.curriculum.STEP: the tokens per row from that step on",
    **{key: f"give one value, or {key}.STEP: values by step, joined by straight lines" for key in POINTS},
}

# a length's key in the other unit
_LENGTHS = {f"schedule.{name}steps": f"schedule.{name}tokens" for name in ("", "warmup_", "decay_")}
_LENGTHS |= {tokens: steps for steps, tokens in _LENGTHS.items()}


# --- reading ---------------------------------------------------------------------------------------------------------


def load_config(source: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a configuration and check all of it.

    Args:
        source: a preset's name (`tiny`) or a YAML file's path. A file may start from another: ``base: 1b`` (a preset,
            or a path relative to the file), whose values its own replace, key by key.
        overrides: ``key=value`` with a dotted key and a YAML value; later ones win.

    Raises:
        UserError: any mistake, in one line.
    """
    layers = [*_file_layers(source, ()), *[(f"override '{text}'", _parse_override(text)) for text in overrides]]
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for where, tree in layers:
        leaves = dict(_leaves(tree, where))
        for key, value in leaves.items():
            other = _LENGTHS.get(key)
            if other is not None and value is not None:
                _require_one_length(where, key, leaves)
                values[other] = None  # a length given in a later layer replaces one given in another unit
            _put(values, key, value)
            origins[key] = where
    _lengths_to_steps(values, origins)
    try:
        # through JSON, where pydantic's strict mode takes a string for a path and a mapping for a dataclass
        return RunConfig.model_validate_json(json.dumps(_nested(values)))
    except ValidationError as error:
        whole = " ".join([source, *overrides])
        raise UserError(_one_line(error.errors(), origins, whole)) from None


def _lengths_to_steps(values: dict[str, Any], origins: dict[str, str]) -> None:
    """Turn the schedule's lengths in tokens into steps."""
    batch = values.get("batch.tokens")
    for name in (name for name in _LENGTHS if name.endswith("tokens") and values.get(name) is not None):
        if type(values[name]) is not int:
            raise UserError(f"{origins[name]}: {name} is {_short(values[name])}; it must be a number of tokens")
        if type(batch) is int and batch > 0:  # else that is told with the rest
            values[_LENGTHS[name]], values[name] = -(-values[name] // batch), None
            origins[_LENGTHS[name]] = origins[name]
    for name in ("schedule.steps", "schedule.warmup_steps"):
        if name in values and values[name] is None:
            del values[name]


def _require_one_length(where: str, key: str, leaves: Mapping[str, Any]) -> None:
    other = _LENGTHS[key]
    if leaves.get(other) is not None:
        raise UserError(f"{where}: {key} {leaves[key]} and {other} {leaves[other]} are both given; take one out")


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a leaf; in a table, null takes an entry out with all below it."""
    if value is not None or _table(key) is None:
        values[key] = value
        return
    for below in [k for k in values if k == key or k.startswith(f"{key}.")]:
        del values[below]


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(p.name.removesuffix(".yaml") for p in _presets().iterdir() if p.name.endswith(".yaml"))


def _presets() -> Traversable:
    return importlib.resources.files("fusiontree") / "presets"


def _file_layers(source: str, seen: tuple[str, ...]) -> list[tuple[str, dict[str, Any]]]:
    """The trees of `source` and of all it starts from, the farthest first, each with its name for messages."""
    if source in seen:
        raise UserError(f"{source}: `base` leads back to itself ({' -> '.join([*seen, source])}); remove one")
    tree = _parse(_read(source, seen), source)
    base = tree.pop("base", None)
    if base is None:
        return [(source, tree)]
    if not isinstance(base, str):
        raise UserError(f"{source}: base is {base!r}; it must be a preset's name or the path of a YAML file")
    if base not in preset_names():
        base = str(Path(source).parent / base)
    return [*_file_layers(base, (*seen, source)), (source, tree)]


def _read(source: str, seen: tuple[str, ...]) -> str:
    if source in preset_names():
        return (_presets() / f"{source}.yaml").read_text(encoding="utf-8")
    needed_by = f"{seen[-1]}: base " if seen else "configuration "
    try:
        return Path(source).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        near = difflib.get_close_matches(source, preset_names(), 1)
        hint = f"; did you mean the preset '{near[0]}'?" if near else ""
        presets = ", ".join(preset_names())
        raise UserError(f"{needed_by}{source} is neither a file nor a preset ({presets}){hint}") from None
    except IsADirectoryError:
        raise UserError(f"{needed_by}{source} is a folder; name a YAML file or a preset") from None
    except PermissionError:
        raise UserError(f"{needed_by}{source} cannot be read; change its permissions") from None
    except UnicodeDecodeError:
        raise UserError(f"{needed_by}{source} is not UTF-8 text; save it as UTF-8") from None


def _parse(text: str, where: str) -> dict[str, Any]:
    tree = _load_yaml(text, where)
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{where}: holds {type(tree).__name__} {_short(tree)}; a configuration is `key: value` lines")
    return tree


def _parse_override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"override '{text}' is not of the form key=value, e.g. optimizer.lr=3e-4")
    return {key: _load_yaml(value, f"override '{text}'")}


def _load_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark and "\n" in text else ""
        raise UserError(f"{where}{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def _leaves(tree: Mapping[Any, Any], where: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted keys of `tree` and their values; each key must be one of KEYS."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key in SHORT_FORMS and isinstance(value, str):
            key = f"{key}.{SHORT_FORMS[key]}"
        table = _table(key)
        if isinstance(value, dict) and (value or key in SECTIONS):
            yield from _leaves(value, where, f"{key}.")
        elif key in POINTS and value is not None:
            yield key, None  # in place of whatever was there
            yield f"{key}.0", _plain(value, key, where)
        elif table is not None and value is not None and key.count(".") != table.count(".") + TABLES[table]:
            raise UserError(f"{where}: {key} is {_short(value)}; {_TABLE_HINTS[table]}")
        elif key in SECTIONS:
            raise UserError(f"{where}: '{key}' is a section, not a value; its keys are {', '.join(SECTIONS[key])}")
        elif key not in KEYS and table is None:
            raise UserError(f"{where}: unknown key '{key}'; {_suggestion(key)}")
        elif isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{where}: {key} is {value}; it must be finite")
        else:
            yield key, _plain(value, key, where)


def _table(key: str) -> str | None:
    """The one of TABLES that `key` is or lies in."""
    return next((table for table in TABLES if key == table or key.startswith(f"{table}.")), None)


def _plain(value: Any, key: str, where: str) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if key in _LISTS and isinstance(value, list):
        return value
    raise UserError(f"{where}: {key} is {_short(value)}; it must be a single value")


def _suggestion(key: str) -> str:
    """The valid key nearest to `key`; one with the same last name wins, so that `lr` finds `optimizer.lr`."""
    same_name = [k for k in KEYS if k.rpartition(".")[2] == key.rpartition(".")[2]]
    near = difflib.get_close_matches(key, same_name or [*KEYS, *SECTIONS], 1, 0.0 if same_name else 0.6)
    return f"did you mean '{near[0]}'?" if near else f"top-level keys are {', '.join(RunConfig.model_fields)}"


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return tree


def _one_line(errors: list[ErrorDetails], origins: Mapping[str, str], whole: str) -> str:
    """The first of pydantic's errors in one line, and how many follow."""
    error = errors[0]
    key = ".".join(part for part in map(str, error["loc"]) if part)
    where = origins.get(key, whole)
    if error["type"] == "missing":
        message = f"{where}: {key} is missing; give it, or start from a preset with `base: tiny`"
    elif error["type"] == "value_error":
        message = f"{where}: {key + ': ' if key else ''}{error['ctx']['error']}"
    elif error["type"] == "extra_forbidden":
        message = f"{where}: unknown key '{key}'; {_hint(key)}"
    elif error["type"] == "string_pattern_mismatch":
        message = f"{where}: {key} is {_short(error['input'])}; use letters, digits, '_', '-' and, not first, '.'"
    else:
        message = f"{where}: {key} is {_short(error['input'])}; {error['msg'].replace('Input should', 'it must', 1)}"
    rest = len(errors) - 1
    return message + (f" (and {rest} more to mend)" if rest else "")


def _hint(key: str) -> str:
    table = _table(key)
    return _TABLE_HINTS[table] if table else _suggestion(key)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: ``1e-4`` is a number, ``no`` a string; a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                problem = f"key '{key.value}' is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes whatever either version of YAML would not read back as the same string."""


_Loader.yaml_implicit_resolvers = {}  # in place of YAML 1.1's
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$")
for _tag, _pattern, _first in (
    ("null", re.compile(r"(~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", re.compile(r"[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


# --- writing and comparing -------------------------------------------------------------------------------------------


def to_yaml(config: RunConfig) -> str:
    """The whole configuration as YAML; `load_config` reads it back as the same object."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)


# what may change when a run is resumed: it moves neither the data nor the mathematics
_FREE_ON_RESUME = re.compile(
    r"name|output|init_from|data\.path|data\.sources\.[^.]+\.path|data\.(workers|max_bad_rows|cache|cache_gb)"
    r"|deepspeed|nvme_path|batch\.micro_rows"
    r"|(logging|validation|checkpoint|health|kernels|activation_checkpointing)\..+"
)


def config_differences(old: RunConfig, new: RunConfig) -> list[str]:
    """Dotted keys whose values differ and must not when a run is resumed."""
    before, after = (dict(_leaves(config.model_dump(mode="json"), "config")) for config in (old, new))
    differing = [key for key in before | after if before.get(key) != after.get(key)]
    return [key for key in differing if not _FREE_ON_RESUME.fullmatch(key)]


# --- what the configuration points at --------------------------------------------------------------------------------

# settings with an owner in the run's configuration: a second value in the JSON could only contradict it
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
    "elasticity": "batch.*",
    "curriculum_learning": "data.curriculum",
    "data_efficiency": "data.*",
    "progressive_layer_drop": "model.branch_drop",
}


def deepspeed_json(config: RunConfig) -> dict[str, Any]:
    """DeepSpeed's own settings, from ds_configs/ by name or from a file by path.

    Raises:
        UserError: missing, not JSON, or it sets what the run's configuration owns.
    """
    folder = importlib.resources.files("ds_configs")
    names = sorted(p.name.removesuffix(".json") for p in folder.iterdir() if p.name.endswith(".json"))
    source: Traversable = folder / f"{config.deepspeed}.json" if config.deepspeed in names else Path(config.deepspeed)
    if not source.is_file():
        raise UserError(f"deepspeed '{config.deepspeed}' is neither one of {', '.join(names)} nor a JSON file")
    try:
        settings = json.loads(source.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"deepspeed {config.deepspeed}: not valid JSON: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"deepspeed {config.deepspeed}: holds {_short(settings)}; DeepSpeed's settings are an object")
    for key, owner in _OWNED.items():
        if key in settings:
            raise UserError(f"deepspeed {config.deepspeed}: sets '{key}'; remove it there and set {owner} instead")
    zero = settings.get("zero_optimization", {})
    _place_on_nvme(config, zero)
    if config.optimizer.kind == "muon":
        _check_muon(config, zero)
    return settings


def keeps_optimizer_on_nvme(config: RunConfig) -> bool:
    """Whether the optimizer's states lie on NVMe, from where DeepSpeed's checkpoints do not get them whole."""
    part = deepspeed_json(config).get("zero_optimization", {}).get("offload_optimizer") or {}
    return part.get("device") == "nvme"


def _place_on_nvme(config: RunConfig, zero: dict[str, Any]) -> None:
    """Give what is offloaded to NVMe the folder of the run's configuration."""
    for part in (zero[key] for key in ("offload_param", "offload_optimizer") if zero.get(key)):
        if "nvme_path" in part:
            raise UserError(f"deepspeed {config.deepspeed}: sets 'nvme_path'; set nvme_path in the configuration")
        if part.get("device") == "nvme":
            if config.nvme_path is None:
                raise UserError(f"deepspeed {config.deepspeed} keeps states on NVMe; set nvme_path=DIR on a local disk")
            part["nvme_path"] = str(config.nvme_path)


def _check_muon(config: RunConfig, zero: dict[str, Any]) -> None:
    if not zero.get("stage"):
        raise UserError(f"optimizer.kind muon needs ZeRO stage 1 to 3, and deepspeed {config.deepspeed} is stage 0")
    if zero.get("offload_optimizer", {}).get("device") == "nvme":
        raise UserError(f"optimizer.kind muon cannot keep its states on NVMe (deepspeed {config.deepspeed}); take cpu")
    if zero.get("reduce_scatter"):
        raise UserError(
            f"deepspeed {config.deepspeed}: sets 'reduce_scatter', and Muon needs whole gradients; remove it"
        )


def dataset_manifest(config: RunConfig) -> dict[str, Any] | None:
    """Check the manifest of every dataset of the run, and the teacher, against the model; return the first one's.

    An address (``s3://...``) is left to the process that opens it: None.

    Raises:
        UserError: no dataset given, none there, its tokens do not fit the model's vocabulary, or the teacher's are
            others.
    """
    locations = config.data.locations
    if not locations:
        raise UserError("data.path is missing; add data.path=DIR, a folder made by `fusiontree data build`")
    manifests = [
        None if "://" in location else _local_manifest(f"data.sources.{name}.path" if name else "data.path", location)
        for name, location in locations.items()
    ]
    for location, manifest in zip(locations.values(), manifests, strict=True):
        if manifest is not None:
            require_vocabulary(config, location, manifest["tokenizer"]["vocab_size"])
    if config.distill.teacher is not None:
        _check_teacher(config, config.distill.teacher, manifests[0])
    return manifests[0]


def _check_teacher(config: RunConfig, folder: Path, manifest: dict[str, Any] | None) -> None:
    try:
        vocab_size = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
        fingerprint = json.loads((folder / "fusiontree.json").read_text(encoding="utf-8"))["tokenizer_fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"distill.teacher {folder} is not a folder that `fusiontree export` made; give one") from None
    if vocab_size != config.model.vocab_size:
        raise UserError(
            f"distill.teacher {folder} has model.vocab_size {vocab_size}, this run {config.model.vocab_size}; take a "
            "teacher of the same vocabulary, or set model.vocab_size"
        )
    ours = fingerprint if manifest is None else manifest["tokenizer"].get("fingerprint", fingerprint)
    if fingerprint != ours:
        raise UserError(
            f"distill.teacher {folder} has another tokenizer ({fingerprint[:12]}) than the data ({ours[:12]}); take "
            "a teacher trained on the same one"
        )


def _local_manifest(key: str, folder: str) -> dict[str, Any]:
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        raise UserError(f"{key} {folder}: no manifest.json there; build it with `fusiontree data build`")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        int(manifest["tokenizer"]["vocab_size"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a dataset's manifest ({error!r}); build the dataset again") from None
    return manifest


def require_vocabulary(config: RunConfig, location: str, vocab_size: int) -> None:
    """Raise UserError if the model has no embedding for some tokens of the dataset at `location`."""
    if vocab_size > config.model.vocab_size:
        raise UserError(
            f"dataset {location}: its tokenizer has {vocab_size} tokens, more than model.vocab_size "
            f"{config.model.vocab_size}; raise model.vocab_size or build the data with a smaller tokenizer"
        )


def _multiples_around(value: int, unit: int) -> list[int]:
    """The multiples of `unit` next to `value`, from below and from above, 0 excepted."""
    below = value // unit * unit
    return [below, below + unit] if below else [unit]


def _either(numbers: list[int]) -> str:
    return " or ".join(map(str, numbers))
