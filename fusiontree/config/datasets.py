"""The datasets and the teacher that a run's configuration points at, held against its model."""

from pathlib import Path
from typing import Any

from fusiontree.config.run import RunConfig
from fusiontree.errors import UserError
from fusiontree.files import parse_json


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
