"""The run's data: checks before launch, opening of datasets, the training stream. Free of torch."""

from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from fusiontree.config import RunConfig
from fusiontree.data.format import MANIFEST, Dataset, Manifest
from fusiontree.data.remote import Cache
from fusiontree.data.sources import Sources, held_out_sources
from fusiontree.data.stream import Recipe, TrainStream
from fusiontree.errors import UserError
from fusiontree.files import parse_json
from fusiontree.paths import is_address


class Data(NamedTuple):
    """The splits of the run's datasets."""

    train: Sources
    validation: Sources | None  # None: validation is off


def check_data(config: RunConfig) -> None:
    """Check the run's datasets and its teacher against the model, from their JSON files alone.

    Datasets at an address (``s3://...``) are skipped: `open_data` checks them in the ranks.

    Raises:
        UserError: no dataset is configured, a manifest is missing or invalid, or a vocabulary or tokenizer differs.
    """
    locations = _locations(config)
    local = {location: Manifest.load(Path(location)) for location in locations.values() if not is_address(location)}
    for location, manifest in local.items():
        _check_vocabulary(config, location, manifest)
    first = local.get(next(iter(locations.values())))
    _check_teacher(config, None if first is None else first.tokenizer_fingerprint)


def open_data(config: RunConfig) -> Data:
    """Open the run's datasets and check its teacher against them.

    Raises:
        UserError: a dataset is missing, or does not fit the model, the teacher or the other datasets; or validation is
            on and no dataset has held-out rows.
    """
    train = open_training(config)
    _check_teacher(config, train.datasets[0].manifest.tokenizer_fingerprint)
    if config.validation.every == 0:
        return Data(train, None)
    remedy = ", or disable validation: validation.every=0"
    return Data(train, held_out_sources(_open_split(config, "validation"), remedy))


def open_training(config: RunConfig) -> Sources:
    """Open the training split of the run's datasets.

    Raises:
        UserError: no dataset is configured, one is missing, or one does not fit the model or the others.
    """
    sources = Sources(_open_split(config, "train"))
    for dataset in sources.datasets:
        _check_vocabulary(config, dataset.location, dataset.manifest)
    return sources


def make_recipe(config: RunConfig) -> Recipe:
    """Return the settings that determine the training order."""
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
    """Open one rank's stream of training batches, at its beginning.

    Raises:
        UserError: the batch is not divisible by the ranks, a length or a step of a table does not fit the shards, or
            the epoch caps leave too few rows for the schedule.
    """
    stream = TrainStream(sources, make_recipe(config), config.batch.micro_rows, rank, world_size, workers)
    if stream.last_step is not None and stream.last_step < config.schedule.steps:
        capped = [name for name, source in (config.data.sources or {}).items() if source.max_epochs is not None]
        raise UserError(
            f"the sources are exhausted after step {stream.last_step} of schedule.steps {config.schedule.steps}; raise "
            f"max_epochs of {' or '.join(capped)}, lower schedule.steps, or add a source"
        )
    return stream


def _locations(config: RunConfig) -> dict[str, str]:
    """Return the location of each dataset by source name, "" for `data.path`.

    Raises:
        UserError: no dataset is configured, or a local folder has no manifest.
    """
    if not config.data.locations:
        raise UserError("data.path is missing; add data.path=DIR, a folder made by `fusiontree data build`")
    for name, location in config.data.locations.items():
        if not is_address(location) and not (Path(location) / MANIFEST).is_file():
            key = f"data.sources.{name}.path" if name else "data.path"
            raise UserError(f"{key} {location}: no manifest.json there; build it with `fusiontree data build`")
    return dict(config.data.locations)


def _open_split(config: RunConfig, split: str) -> dict[str, Dataset]:
    cache = Cache(config.data.cache, config.data.cache_bytes)
    return {name: Dataset(location, split, cache) for name, location in _locations(config).items()}


def _check_vocabulary(config: RunConfig, location: str, manifest: Manifest) -> None:
    """Raise UserError if the model has no embedding for some tokens of the dataset at `location`."""
    if manifest.vocab_size > config.model.vocab_size:
        raise UserError(
            f"dataset {location}: its tokenizer has {manifest.vocab_size} tokens, more than model.vocab_size "
            f"{config.model.vocab_size}; raise model.vocab_size or build the data with a smaller tokenizer"
        )


def _check_teacher(config: RunConfig, data_fingerprint: str | None) -> None:
    """Check the teacher, if there is one, against the model and the data.

    Args:
        data_fingerprint: of the data's tokenizer; None if it is not known yet.

    Raises:
        UserError: the folder is no export, or its vocabulary size or tokenizer differs.
    """
    folder = config.distill.teacher
    if folder is None:
        return
    try:
        vocab_size = parse_json((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
        fingerprint = parse_json((folder / "fusiontree.json").read_text(encoding="utf-8"))["tokenizer_fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"distill.teacher {folder} is not an exported folder; name one made by `fusiontree export`"
        ) from None
    if vocab_size != config.model.vocab_size:
        raise UserError(
            f"distill.teacher {folder} has model.vocab_size {vocab_size}, but this run has {config.model.vocab_size}; "
            "use a teacher with the same vocabulary, or set model.vocab_size"
        )
    if data_fingerprint is not None and data_fingerprint != fingerprint:
        raise UserError(
            f"distill.teacher {folder} has another tokenizer ({fingerprint[:12]}) than the data "
            f"({data_fingerprint[:12]}); use a teacher trained with the same tokenizer"
        )


def _exact(value: float) -> Fraction:
    """Return the decimal as written in the configuration: 0.7 is exactly 7/10, so shares of sources never round."""
    return Fraction(repr(value))
