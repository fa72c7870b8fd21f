"""The run's data: from its configuration to open datasets and the stream. Free of torch."""

from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from fusiontree.config import RunConfig
from fusiontree.data.format import Dataset
from fusiontree.data.remote import Cache
from fusiontree.data.sources import Sources
from fusiontree.data.stream import Recipe, TrainStream
from fusiontree.errors import UserError
from fusiontree.files import parse_json


class Data(NamedTuple):
    """The splits of the run's datasets; nothing held out if validation is off."""

    train: Sources
    validation: Sources | None


def open_data(config: RunConfig) -> Data:
    """Open the run's datasets.

    Raises:
        UserError: one is missing, does not fit the model or the others, or nothing is held out though validation is on.
    """
    train = open_training(config)
    if config.validation.every == 0:
        return Data(train, None)
    cache = _cache(config)
    held_out = {name: Dataset(location, "validation", cache) for name, location in config.data.locations.items()}
    held_out = {name: dataset for name, dataset in held_out.items() if dataset.num_rows}
    if not held_out:
        where = ", ".join(config.data.locations.values())
        raise UserError(
            f"{where} has nothing held out; build it with --holdout from two documents or more, or train without "
            "validation: validation.every=0"
        )
    return Data(train, Sources(held_out))


def open_training(config: RunConfig) -> Sources:
    """Open the training split of the run's datasets.

    Raises:
        UserError: none is given, one is missing, or does not fit the model or the others.
    """
    if not config.data.locations:
        raise UserError("data.path is missing; add data.path=DIR, a folder made by `fusiontree data build`")
    cache = _cache(config)
    sources = Sources({name: Dataset(location, "train", cache) for name, location in config.data.locations.items()})
    for location, dataset in zip(config.data.locations.values(), sources.datasets, strict=True):
        require_vocabulary(config, location, dataset.manifest.vocab_size)
    return sources


def make_recipe(config: RunConfig) -> Recipe:
    """What the configuration decides of the order of training."""
    data = config.data
    caps = [None] if data.sources is None else [source.max_epochs for source in data.sources.values()]
    return Recipe(
        seed=config.seed,
        batch_tokens=config.batch.tokens,
        lengths=data.lengths,
        weights=tuple((step, tuple(map(_exact, weights.values()))) for step, weights in data.weight_table),
        max_epochs=tuple(None if cap is None else _exact(cap) for cap in caps),
    )


def open_stream(
    config: RunConfig, sources: Sources, rank: int = 0, world_size: int = 1, workers: int = 0
) -> TrainStream:
    """One rank's stream of training batches, at its beginning.

    Raises:
        UserError: the batch does not divide among the ranks, a length or a step of the tables does not fit the shards,
            or the epoch caps leave too little for the whole run.
    """
    stream = TrainStream(sources, make_recipe(config), config.batch.micro_rows, rank, world_size, workers)
    if stream.last_step is not None and stream.last_step < config.schedule.steps:
        capped = [name for name, source in (config.data.sources or {}).items() if source.max_epochs is not None]
        raise UserError(
            f"the sources are used up after step {stream.last_step} of schedule.steps {config.schedule.steps}; raise "
            f"max_epochs of {' or '.join(capped)}, lower schedule.steps, or add a source"
        )
    return stream


def _cache(config: RunConfig) -> Cache:
    return Cache(config.data.cache, int(config.data.cache_gb * 1e9))


def _exact(value: float) -> Fraction:
    """The decimal that was written: 0.7 is seven tenths, so shares carry no rounding however far the run goes."""
    return Fraction(repr(value))


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
        vocab_size = parse_json((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
        fingerprint = parse_json((folder / "fusiontree.json").read_text(encoding="utf-8"))["tokenizer_fingerprint"]
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
        manifest = parse_json(path.read_text(encoding="utf-8"))
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
