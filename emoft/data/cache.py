"""Where what was read and tokenized is kept for the next run: the cache of `datasets`, if it can be written."""

import atexit
import contextlib
import errno
import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import datasets

from emoft.errors import UserError, warn

PART = 1 << 20  # bytes that are hashed at a time
CURE = "set HF_HOME to a folder that can be written"


def cache_dir() -> str:
    """Return the folder of the cache; one that lasts as long as this process where the usual one cannot be written."""
    return _writable(str(datasets.config.HF_DATASETS_CACHE))


@functools.cache
def _writable(usual: str) -> str:
    try:
        os.makedirs(usual, exist_ok=True)
        with tempfile.TemporaryFile(dir=usual) as file:
            file.write(bytes(PART))  # a full disk makes an empty file, and says so only then
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        folder = tempfile.mkdtemp(prefix="emoft-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        warn(
            f"the cache in {usual} cannot be written ({error.strerror or error}): what is read is kept in {folder}"
            f" until the end of this run; {CURE}"
        )
        return folder
    return usual


def fingerprint(*parts: str) -> str:
    """Return the name under which `datasets` caches a result: a hash of all that it depends on.

    Left alone, the library hashes the function, and that hash changes with any state the function refers to.
    """
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def content_hash(path: Path) -> str:
    """Return the SHA-256 of a file, by which the cache knows it: its time and size may be those of another one."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(PART):
            digest.update(part)
    return digest.hexdigest()


@contextlib.contextmanager
def cache_in_use() -> Iterator[None]:
    """Tell in a line that the cache could not be written, if that happens while this context is open.

    Raises:
        UserError: it did.
    """
    try:
        yield
    except OSError as error:
        raise cache_fault(error) from None


def cache_fault(error: OSError) -> UserError:
    """Return what to say of a cache that could not be written after all."""
    what = "is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else f"cannot be used ({error.strerror or error})"
    return UserError(f"the disk of the cache, {cache_dir()}, {what}: free some of it, or {CURE}")
