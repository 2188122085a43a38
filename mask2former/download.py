"""Files from the network whose name holds the beginning of their SHA-256: fetched once, checked, resumed.

What has arrived stands in ``<name>.part`` until it is complete and its hash is right; only then does the file get its
name. A process that fetches a file holds a lock on ``.<name>.lock``, which the system takes from a process that dies;
others wait, and then find the file.

A partial file is continued whatever server or day it is from: its hash tells what it has to become, so that no ETag is
needed. If the whole then has another hash, it is fetched once more from the beginning.
"""

import hashlib
import http.client
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

CACHE_VARIABLE = "MASK2FORMER_CACHE"
_CHUNK = 1 << 18
_SECONDS_BETWEEN_LOOKS = 0.2


class DownloadError(OSError):
    """A file could not be had; the message is a sentence for the user that says what to do."""


class _NetworkError(Exception):
    """A request that brought nothing or not everything; ``has_begun``: the server had answered."""

    def __init__(self, reason: str, *, has_begun: bool) -> None:
        super().__init__(reason)
        self.has_begun = has_begun


def cache_folder() -> Path:
    """Where downloaded files are kept: $MASK2FORMER_CACHE, else ~/.cache/mask2former; perhaps not there yet."""
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/mask2former").expanduser()


def has_hash(path: Path, sha256_prefix: str) -> bool:
    """Whether a file is there and its SHA-256, in hexadecimal, begins so."""
    return path.is_file() and str(_digest_of(path)[0].hexdigest()).startswith(sha256_prefix)


@dataclass(frozen=True, kw_only=True)
class Download:
    """A file that is to be had.

    Attributes:
        url: where it is, http or https. Proxies are those of the environment, as urllib reads it.
        path: where it is to be, below the cache folder; folders are made.
        sha256_prefix: the first digits of its SHA-256, in lower-case hexadecimal.
        timeout: seconds that the network may be silent.
        attempts: requests at most, if a transfer breaks off; it is given up at once if the first is not answered.
        pause: seconds between the first two requests, doubled from then on.
    """

    url: str
    path: Path
    sha256_prefix: str
    timeout: float = 30.0
    attempts: int = 5
    pause: float = 1.0

    def fetch(self) -> Path:
        """Fetch the file unless it is there; a file that is there is checked and, if damaged, replaced.

        Returns:
            The path. Without a request if the file is there: the folder need not be writable then.

        Raises:
            DownloadError: if the network, the server, the folder or the content is at fault. No file, or the old one,
                has the name then. The partial file is kept for the next time, unless its hash is wrong.
        """
        try:
            if has_hash(self.path, self.sha256_prefix):
                return self.path
            if self.path.exists():
                _tell(f"{self.path} is damaged: its SHA-256 does not begin with {self.sha256_prefix}")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path.with_name(f".{self.path.name}.lock"), f"another process fetches {self.path}"):
                if not has_hash(self.path, self.sha256_prefix):
                    self._fetch_part()
                    self._part.replace(self.path)
        except DownloadError:
            raise
        except OSError as error:
            raise DownloadError(
                f"{self.path} cannot be stored ({_reason(error)}): set {CACHE_VARIABLE} to a folder that has room and "
                "may be written to"
            ) from error
        return self.path

    @property
    def _part(self) -> Path:
        return self.path.with_name(f"{self.path.name}.part")

    @property
    def _by_hand(self) -> str:
        return f"get the file elsewhere and put it at {self.path}"

    def _fetch_part(self) -> None:
        """Make the partial file complete, with the right hash."""
        if has_hash(self._part, self.sha256_prefix):
            return
        _tell(f"{self.url} is fetched to {self.path}")
        for _ in range(2):
            found, was_continued = self._request_until_complete()
            if found.startswith(self.sha256_prefix):
                return
            size = self._part.stat().st_size
            self._part.unlink()
            if not was_continued:
                break
            _tell("what was continued is not the right file; it is fetched again from the beginning")
        raise DownloadError(
            f"{self.url} gave {size} bytes whose SHA-256 begins with {found[: len(self.sha256_prefix)]} and not with "
            f"{self.sha256_prefix}, so that they were removed: try again later, or {self._by_hand}"
        )

    def _request_until_complete(self) -> tuple[str, bool]:
        """Request what is missing, again where the transfer breaks off; see `_request`."""
        has_begun, attempt = False, 0
        while True:
            attempt += 1
            try:
                return self._request()
            except _NetworkError as error:
                has_begun |= error.has_begun
                if not has_begun:
                    raise DownloadError(
                        f"{self.url} cannot be reached ({error}): check the connection, or {self._by_hand}"
                    ) from error
                arrived = _megabytes(self._part.stat().st_size)
                if attempt >= self.attempts:
                    raise DownloadError(
                        f"{self.url} broke off {attempt} times, at last after {arrived} ({error}): try again, which "
                        f"goes on from there, or {self._by_hand}"
                    ) from error
                _tell(f"broken off after {arrived} ({error}), going on in a moment")
                time.sleep(self.pause * 2 ** (attempt - 1))

    def _request(self) -> tuple[str, bool]:
        """Request what is missing once.

        Returns:
            SHA-256 of the file, which is complete as far as the server told its size, and whether it begins with what
            was there before.

        Raises:
            _NetworkError: if there was no answer, or not all of it; the file has what arrived.
            DownloadError: if the server refuses.
        """
        digest, size = _digest_of(self._part) if self._part.exists() else (hashlib.sha256(), 0)
        response, start = self._answer(size)
        if start == 0:
            digest = hashlib.sha256()
        with response, self._part.open("ab" if start else "wb") as file:
            self._append(response, file, digest, start)
            file.flush()
            os.fsync(file.fileno())  # before it gets its name
        return digest.hexdigest(), start > 0

    def _append(self, response: Any, file: IO[bytes], digest: Any, start: int) -> None:
        total = None if response.length is None else start + response.length
        done = start
        with tqdm(
            desc=self.path.name, initial=start, total=total, unit="B", unit_scale=True, disable=None, leave=False
        ) as bar:
            while done != total and (chunk := _chunk_of(response)):
                file.write(chunk)
                digest.update(chunk)
                bar.update(len(chunk))
                done += len(chunk)
        if total is not None and done < total:
            raise _NetworkError(f"the server closed the connection {_megabytes(total - done)} early", has_begun=True)

    def _answer(self, start: int) -> tuple[Any, int]:
        """The response to a request for the bytes from ``start`` on, and where it begins: there, or at 0."""
        wanted = {"Range": f"bytes={start}-"} if start else {}
        request = urllib.request.Request(self.url, headers={"User-Agent": "mask2former", **wanted})
        try:
            # not urlopen, which keeps the proxies that the environment named first
            response = urllib.request.build_opener().open(request, timeout=self.timeout)
        except urllib.error.HTTPError as error:
            error.close()
            if start and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                return self._answer(0)
            raise DownloadError(
                f"{self.url} was refused by the server ({error.code} {error.reason}): check the address, or "
                f"{self._by_hand}"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise _NetworkError(_reason(error), has_begun=False) from error
        return response, start if response.status == http.HTTPStatus.PARTIAL_CONTENT else 0


def _chunk_of(response: Any) -> bytes:
    try:
        return bytes(response.read1(_CHUNK))  # what there is, not waiting for more: nothing is lost if it breaks off
    except (OSError, http.client.HTTPException) as error:
        raise _NetworkError(_reason(error), has_begun=True) from error


def _reason(error: Exception) -> str:
    """An error in a few words."""
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    text = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)
    return text or type(cause).__name__


def _digest_of(path: Path) -> tuple[Any, int]:
    """SHA-256 of a file, as an object that takes more, and its size."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return digest, size


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def _locked(path: Path, occupied: str) -> Iterator[None]:
    """Hold the lock on a file, which is made and removed; waits for other processes, after telling ``occupied``."""
    is_told = False
    while True:
        with path.open("ab") as file:
            if _try_lock(file.fileno()):
                # the holder before may have removed the file between our opening and locking it
                if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                    try:
                        yield
                    finally:
                        if os.name == "posix":  # elsewhere an open file cannot be removed; it stays, empty
                            path.unlink(missing_ok=True)
                    return
                continue
        if not is_told:
            _tell(f"{occupied}: waiting for it")
            is_told = True
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _try_lock(descriptor: int) -> bool:
    """Lock an open file if no other process has; closing it unlocks it.

    Raises:
        OSError: if the file system has no locks.
    """
    try:
        if sys.platform == "win32":
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True
