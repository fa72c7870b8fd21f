"""The run's data: from its configuration to open datasets and the stream. Free of torch."""

from fractions import Fraction
from typing import NamedTuple

from fusiontree.config import RunConfig, require_vocabulary
from fusiontree.data.format import Dataset
from fusiontree.data.remote import Cache
from fusiontree.data.sources import Sources
from fusiontree.data.stream import Recipe, TrainStream
from fusiontree.errors import UserError


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
