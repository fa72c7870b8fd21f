"""Exact deduplication by content hash, with 16 bytes of memory per document."""

import hashlib
import os
from pathlib import Path

import numpy as np

DIGEST = np.dtype("S16")


def digest(text: str) -> bytes:
    """Return the first 16 bytes of the SHA-256 of a text's UTF-8; collisions are not expected in practice."""
    return hashlib.sha256(text.encode()).digest()[: DIGEST.itemsize]


class SeenTexts:
    """Set of text digests: sorted runs, merged as they grow, as in a log-structured merge tree.

    Added digests are also appended to a file, from which a killed build restores the set.

    Args:
        path: the file.
        count: valid digests in the file; the rest was appended after the state that the build resumes from, and is cut.
    """

    def __init__(self, path: Path, count: int):
        self.count = count
        self._path = path
        self._unsaved: list[np.ndarray] = []
        with open(path, "ab"):
            os.truncate(path, count * DIGEST.itemsize)
        self._runs = [np.sort(np.fromfile(path, DIGEST))] if count else []

    def add(self, digests: np.ndarray) -> np.ndarray:
        """Add digests, dtype S16 [n]; return bool [n], true for the first occurrence of each."""
        new = np.zeros(len(digests), dtype=bool)
        new[np.unique(digests, return_index=True)[1]] = True
        for run in self._runs:
            places = np.minimum(np.searchsorted(run, digests), len(run) - 1)
            new &= run[places] != digests
        added = digests[new]
        if len(added):
            self._unsaved.append(added)
            self._runs.append(np.sort(added))
            self.count += len(added)
        # each run is more than twice as long as the next: O(log n) runs to search, O(log n) merges per digest
        while len(self._runs) > 1 and len(self._runs[-2]) <= 2 * len(self._runs[-1]):
            self._runs[-2:] = [np.sort(np.concatenate(self._runs[-2:]))]
        return new

    def save(self) -> None:
        """Append the unsaved digests to the file and sync it."""
        with open(self._path, "ab") as stream:
            for added in self._unsaved:
                stream.write(added.tobytes())
            stream.flush()
            os.fsync(stream.fileno())
        self._unsaved = []
