"""A prepared split behind a URL: ``s3://``, ``gs://``, ``https://``, whatever fsspec knows.

Manifest, index and names are fetched when the split is opened, each shard when it is first read; they are kept in the cache of
:mod:`nepa_dist.data.shard_cache`, which the processes of a machine share.
"""

from __future__ import annotations

import hashlib
import logging
import os
import queue
import random
import re
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import fsspec

from nepa_dist.data.containers import DataError
from nepa_dist.data.index import MANIFEST
from nepa_dist.data.prepared import Access, PreparedContainer
from nepa_dist.data.shard_cache import Expected, ShardCache

_log = logging.getLogger(__name__)

_CHUNK = 1 << 22
_MAX_DELAY = 60.0
_SLOWEST = 1 << 16
"""Bytes per second; a slower transfer is given up and tried again."""


class RemoteContainer(PreparedContainer):
    """One prepared split behind a URL. It can be forked and pickled like any container.

    Args:
        url: of the split; it holds ``manifest.json``.
        cache_dir: folder on a local disk, shared by all that run on this machine; default: below the temporary folder.
        cache_bytes: what all shards in the cache may take together; default: no limit. Reading is random: with less than the
            whole data set, shards are fetched again and again.
        retries: further attempts for each file.
        timeout_seconds: an attempt ends when nothing arrives for this long.
        backoff_seconds: wait before the first further attempt; it doubles each time, to a minute at most, and varies by a half.
        access, check: as in PreparedContainer.

    Raises:
        DataError: there is no usable split, the library for this kind of URL is missing, the cache cannot be used. Later, from
            ``read``: a shard could not be fetched; this ends a run, where an OSError would leave the sample out.
    """

    def __init__(
        self,
        url: str,
        *,
        cache_dir: Path | None = None,
        cache_bytes: int | None = None,
        retries: int = 5,
        timeout_seconds: float = 60.0,
        backoff_seconds: float = 0.5,
        access: Access = "auto",
        check: bool = False,
    ) -> None:
        source = _Source(url.rstrip("/"), retries, timeout_seconds, backoff_seconds)
        self._cache = ShardCache(source, _default_folder() if cache_dir is None else Path(cache_dir), cache_bytes)
        self._cache.open_split()
        super().__init__(self._cache.folder, access=access, check=check)

    def _check_shards(self) -> None:
        """They come later; here it is checked that they can."""
        limit = self._cache.limit
        sizes = [shard.bytes for shard in self.manifest.shards]
        if limit is not None and max(sizes) > limit:
            raise DataError(f"a cache of {limit} bytes does not hold a shard of {max(sizes)}: give it more room")
        if limit is not None and sum(sizes) > limit:
            _log.warning("the shards have %.1f GB, the cache %.1f: they will be fetched again", sum(sizes) / 1e9, limit / 1e9)

    def _open_descriptor(self, shard: int) -> int:
        for other in list(self._files):  # deleted ones take room on the disk as long as they are open
            if not os.path.exists(self.folder / self.manifest.shards[other].name):
                del self._files[other]
        return self._cache.open_shard(self.manifest.shards[shard])


class _Unwritable(Exception):
    """The cache cannot be written; another attempt would not change that."""


class _Source:
    """Fetches files from below a URL, with further attempts after a failure."""

    def __init__(self, url: str, retries: int, timeout_seconds: float, backoff_seconds: float) -> None:
        self._url = url
        self.shown = re.sub(r"//[^/@]*@", "//", url)  # without a password
        self._retries = retries
        self._timeout = timeout_seconds
        self._backoff = backoff_seconds
        try:
            fsspec.url_to_fs(url)
        except ImportError as error:
            raise DataError(f"{self.shown} needs a package that is not installed: {error}") from None
        except Exception as error:  # of a driver
            raise DataError(f"{self.shown} cannot be opened: {_reason(error)}") from None

    def fetch(self, name: str, out: BinaryIO, expected: Expected) -> None:
        """Write a file into ``out``. Raises DataError with the URL and what became of each attempt."""
        failures: list[str] = []
        for attempt in range(self._retries + 1):
            if attempt:
                delay = min(_MAX_DELAY, self._backoff * 2 ** (attempt - 1)) * random.uniform(0.5, 1.5)
                _log.warning("%s/%s: %s; trying again in %.1f s", self.shown, name, failures[-1], delay)
                time.sleep(delay)
            out.seek(0)
            try:
                self._attempt(name, out, expected)
                return
            except FileNotFoundError:
                failures.append("there is no such file")
                break
            except (ImportError, PermissionError, _Unwritable) as error:
                failures.append(_reason(error))
                break
            except Exception as error:  # whatever a driver raises when the network fails
                failures.append(_reason(error))
        tried = "; ".join(f"attempt {i}: {failure}" for i, failure in enumerate(failures, 1))
        raise DataError(f"{self.shown}/{name} cannot be fetched: {tried}")

    def _attempt(self, name: str, out: BinaryIO, expected: Expected) -> None:
        """One attempt, in a thread of its own: not every driver has a time-out, and one that hangs must be left behind."""
        chunks: queue.Queue[bytes | BaseException] = queue.Queue(maxsize=2)
        given_up = threading.Event()
        threading.Thread(target=_stream, args=(f"{self._url}/{name}", chunks, given_up), daemon=True).start()
        deadline = time.monotonic() + self._timeout + expected.limit / _SLOWEST
        digest, size = hashlib.sha256(), 0
        try:
            while chunk := self._next(chunks, deadline, size):
                size += len(chunk)
                if size > expected.limit:
                    raise ValueError(f"it has more than the {expected.limit} bytes that it should have")
                digest.update(chunk)
                try:
                    out.write(chunk)
                except OSError as error:
                    raise _Unwritable(f"the cache cannot be written: {error.strerror}") from None
        finally:
            given_up.set()
        if expected.size is not None and size != expected.size:
            raise ValueError(f"it ended after {size} of {expected.size} bytes")
        if expected.sha256 is not None and digest.hexdigest() != expected.sha256:
            raise ValueError(f"its SHA-256 is not the one in {MANIFEST}")

    def _next(self, chunks: queue.Queue[bytes | BaseException], deadline: float, size: int) -> bytes:
        """The next piece, empty at the end."""
        wait = min(self._timeout, deadline - time.monotonic())
        try:
            chunk = chunks.get(timeout=max(0.0, wait))
        except queue.Empty:
            slow = f"it arrives at less than {_SLOWEST} bytes per second" if wait < self._timeout else ""
            raise TimeoutError(slow or f"nothing arrived for {self._timeout:g} s after {size} bytes") from None
        if isinstance(chunk, BaseException):
            raise chunk
        return chunk


def _stream(url: str, chunks: queue.Queue[bytes | BaseException], given_up: threading.Event) -> None:
    """Put the pieces of a file into a queue, then an empty one, or the error that ended it."""

    def put(chunk: bytes | BaseException) -> None:
        while not given_up.is_set():
            with suppress(queue.Full):
                chunks.put(chunk, timeout=1.0)
                return

    try:
        filesystem, path = fsspec.url_to_fs(url)
        # As one stream over HTTP, since not every server gives parts; elsewhere in parts, without reading ahead.
        block = 0 if url.startswith("http") else _CHUNK
        with filesystem.open(path, "rb", block_size=block, cache_type="none") as file:
            while not given_up.is_set() and (chunk := file.read(_CHUNK)):
                put(chunk)
        put(b"")
    except BaseException as error:
        put(error)


def _default_folder() -> Path:
    """A folder of this user below the temporary one."""
    folder = Path(tempfile.gettempdir()) / f"nepa-dist-cache-{os.getuid()}"
    with suppress(FileNotFoundError):
        if os.lstat(folder).st_uid != os.getuid():
            raise DataError(f"the cache folder {folder} belongs to someone else; choose another one")
    return folder


def _reason(error: BaseException) -> str:
    """One line about an error of a driver."""
    text: Any = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(str(text or type(error).__name__).split())
