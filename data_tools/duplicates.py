"""Exact duplicates by content hash, in 16 bytes of memory a document."""

import hashlib
import os
from pathlib import Path

import numpy as np

DIGEST = np.dtype("S16")


def digest(text: str) -> bytes:
    """The first 16 bytes of the SHA-256 of a text's UTF-8: two texts that differ never share them, in practice."""
    return hashlib.sha256(text.encode()).digest()[: DIGEST.itemsize]


class SeenTexts:
    """The texts that came before, as sorted runs of digests that are merged as they grow, like a log-structured tree.

    What is added is also kept in a file, so that a build that was killed knows it again.

    Args:
        path: the file.
        count: digests of it that count; what lies behind them was written after the state that a build goes on from.
    """

    def __init__(self, path: Path, count: int):
        self.count = count
        self._path = path
        self._recent: list[np.ndarray] = []  # not in the file yet
        with open(path, "ab"):
            os.truncate(path, count * DIGEST.itemsize)
        self._runs = [np.sort(np.fromfile(path, DIGEST))] if count else []

    def add(self, digests: np.ndarray) -> np.ndarray:
        """Whether each of the digests, dtype S16 [n], is new, the earlier ones of the same call seen: bool [n]."""
        new = np.zeros(len(digests), dtype=bool)
        new[np.unique(digests, return_index=True)[1]] = True
        for run in self._runs:
            places = np.minimum(np.searchsorted(run, digests), len(run) - 1)
            new &= run[places] != digests
        added = digests[new]
        if len(added):
            self._recent.append(added)
            self._runs.append(np.sort(added))
            self.count += len(added)
        while len(self._runs) > 1 and len(self._runs[-2]) <= 2 * len(self._runs[-1]):
            self._runs[-2:] = [np.sort(np.concatenate(self._runs[-2:]))]
        return new

    def save(self) -> None:
        """Make what was added durable."""
        with open(self._path, "ab") as stream:
            for added in self._recent:
                stream.write(added.tobytes())
            stream.flush()
            os.fsync(stream.fileno())
        self._recent = []
