"""Files behind a URL, by fsspec: s3://, gs://, https:// and the other file systems that it knows.

Credentials are found in the library's own ways (environment, configuration files, roles). A URL's
user, password and query (the signature of a presigned one) reach the server and nothing else:
messages, journal and manifest have the URL without them.
"""

import asyncio
import errno
import os
import re
import threading
import time
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from pipeline.errors import BadImage, UserError, one_line
from pipeline.folders import MAX_FOLDERS, Left, as_url, left_aside
from pipeline.images import Limits
from tools.packing.containers import Blob

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

T = TypeVar("T")

_HTTP = re.compile("https?:", re.IGNORECASE)
_CHAIN = re.compile(r"::[a-z][a-z0-9+.-]*:/", re.IGNORECASE)  # of fsspec: zip://a::https://b

WAITS = (0.5, 1, 2, 4, 8, 16)
"""Seconds before a request is tried again; after the last of these it fails."""
MOST_FAILURES = 4
"""Requests in a row that fail in spite of these, of any file; then the command ends."""
BLOCK = 2 << 20
"""Bytes of an archive or table that are read at once."""
_SILENCE = 60  # seconds without a byte, after which a connection counts as lost
_HINT = "see how the library of this kind of URL finds them"
_PERMANENT = {
    "NotImplementedError": "the server does not send parts of a file",
    "FileNotFoundError": "no such file",
    "NotADirectoryError": "no such file",
    "IsADirectoryError": "a folder",
    "InvalidURL": "no valid URL",
    "TooManyRedirects": "redirected without end",
    "PermissionError": f"access denied to these credentials: {_HINT}",
    "NoCredentialsError": f"no credentials: {_HINT}",
    "PartialCredentialsError": f"no credentials: {_HINT}",
    "TokenRetrievalError": f"no credentials: {_HINT}",
}
"""What is said of errors that will not pass, by the names of their classes: those of libraries that
may not be installed are among them."""
_RETRIED_STATUS = (408, 425, 429)  # of HTTP's 4xx: too slow, too early, too many


def place(text: str) -> "Path | Remote":
    """A path of this machine, or a URL; for a parser of options, whose errors show no URL."""
    if _CHAIN.search(text):
        raise ArgumentTypeError("a chain of URLs: give the URL of a file or folder")
    if not as_url(text):
        return Path(text)
    try:
        parts = urlsplit(text)
        valid = not _HTTP.match(text) or (parts.hostname and parts.port != 0)
    except ValueError:
        valid = False
    if not valid:
        raise ArgumentTypeError("no valid URL: its host or port cannot be")
    return Remote.of(text)


class Remote:
    """A file or folder behind a URL, with the parts of a Path that sources use. Its `str` has no
    credentials.
    """

    def __init__(self, url: str, query: str, connect: "Server") -> None:
        self._url, self._query, self._connect = url, query, connect

    @classmethod
    def of(cls, url: str) -> "Remote":
        """The place of a URL. Nothing is asked of the server."""
        kind, mark, rest = url.partition(":")
        url = kind.lower() + mark + rest
        head, mark, query = url.rstrip("/").partition("?")
        return cls(head, mark + query, Server(url))

    def __str__(self) -> str:
        parts = urlsplit(self._url)
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))

    def __truediv__(self, name: str) -> "Remote":
        part = quote(name) if self._is_http else name
        return Remote(f"{self._url}/{part}", self._query, self._connect)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return unquote(self._url.rpartition("/")[2])

    @property
    def parent(self) -> "Remote":
        """The folder."""
        return Remote(self._url.rpartition("/")[0], self._query, self._connect)

    @property
    def _is_http(self) -> bool:
        return bool(_HTTP.match(self._url))

    def walk(self, left: Left, start: str = "") -> Iterator[tuple[str, str]]:
        """As `pipeline.folders.walk`. Raises UserError if a folder cannot be listed: fsspec's own
        walk would leave it out.
        """
        pending, count = [("", self)], 0
        while pending:
            above, folder = pending.pop()
            if (count := count + 1) > MAX_FOLDERS:
                raise UserError(f"{self}: more than {MAX_FOLDERS:,} folders")
            for part, is_folder in folder._entries():
                if not (above or part.startswith(start)):
                    continue
                if reason := left_aside(part, is_folder):
                    left[reason] += 1
                elif is_folder:
                    pending.append((f"{above}{part}/", folder / part))
                else:
                    yield above + part, ""

    def _entries(self) -> list[tuple[str, bool]]:
        """Name of each entry of a folder, and whether it is a folder. Raises UserError."""
        try:
            listed = again(lambda fs: fs.ls(self._path(fs), detail=True), self._connect)
            here = self._path(self._connect()).partition("?")[0].rstrip("/")
        except OSError as error:
            raise UserError(f"{self}: {error.strerror}") from None
        entries = []
        for entry in listed:
            path = entry["name"].partition("?")[0] if self._is_http else entry["name"]
            name = path.rstrip("/").rpartition("/")[2]
            if path.rstrip("/") != here and name not in ("", ".", ".."):
                is_folder = entry["type"] == "directory"
                entries.append((unquote(name) if self._is_http else name, is_folder))
        return entries

    def open(self) -> "RemoteBlob":
        """Raises OSError."""
        return RemoteBlob(self._path, self._connect)

    def read(self, limits: Limits) -> bytes:
        """All bytes of an image file. Raises BadImage."""

        def read(fs: "AbstractFileSystem") -> bytes:
            path, most = self._path(fs), limits.max_bytes + 1
            if self._is_http:
                from fsspec.asyn import sync

                return bytes(sync(fs.loop, _get, fs, path, most))
            with fs.open(path, "rb", cache_type="none") as file:
                return bytes(file.read(most))

        try:
            data = again(read, self._connect)
        except OSError as error:
            raise BadImage(error.strerror or "cannot be read") from None
        limits.check_bytes(len(data))
        return data

    def _path(self, fs: "AbstractFileSystem") -> str:
        """As the file system wants it."""
        return str(fs._strip_protocol(self._url)) + self._query


async def _get(file_system: Any, url: str, most: int) -> bytes:
    """A file over HTTP, or the beginning of one that is larger than `most` bytes.

    fsspec's own calls have no limit, or pass each piece from thread to thread.
    """
    session = await file_system.set_session()
    async with session.get(file_system.encode_url(url), **file_system.kwargs) as response:
        file_system._raise_not_found_for_status(response, url)
        parts, size = [], 0
        async for part in response.content.iter_any():
            parts.append(part)
            if (size := size + len(part)) >= most:
                break
    return b"".join(parts)


class RemoteBlob(Blob):
    """A file behind a URL, of which the last block that was read is kept."""

    def __init__(
        self,
        path: Callable[["AbstractFileSystem"], str],
        connect: "Server",
    ) -> None:
        super().__init__()
        self._path, self._connect = path, connect
        self._block = 0, b""
        size = again(lambda fs: fs.size(path(fs)), connect)
        if size is None:
            raise OSError(errno.EIO, "the server does not say how large it is")
        self.size = int(size)

    def pread(self, size: int, offset: int) -> bytes:
        start, block = self._block
        stop = min(offset + size, self.size)
        if stop <= offset or offset < 0:
            return b""
        if not start <= offset <= stop <= start + len(block):
            start, block = offset, self._fetch(offset, min(max(stop, offset + BLOCK), self.size))
            self._block = start, block
        return block[offset - start : stop - start]

    def _fetch(self, start: int, stop: int) -> bytes:
        def fetch(fs: "AbstractFileSystem") -> bytes:
            data = bytes(fs.cat_file(self._path(fs), start=start, end=stop))
            if len(data) == self.size > stop - start:
                raise NotImplementedError
            if len(data) != stop - start:
                raise ConnectionError
            return data

        return again(fetch, self._connect)


def _file_system(url: str) -> "AbstractFileSystem":
    """fsspec's, which keeps one of each kind. Raises UserError."""
    try:
        import fsspec

        options: dict[str, Any] = {}
        if _HTTP.match(url):
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=_SILENCE, sock_read=_SILENCE)
            options = {"client_kwargs": {"timeout": timeout}}
        elif url.startswith(("s3:", "s3a:")):  # its libraries would try 25 times, for each of ours
            once = {"retries": {"total_max_attempts": 1}}
            silence = {"read_timeout": _SILENCE, "connect_timeout": _SILENCE}
            options = {"config_kwargs": once | silence}
        file_system: AbstractFileSystem = fsspec.core.url_to_fs(url, **options)[0]
        if "config_kwargs" in options:
            file_system.retries = 1
        return file_system
    except (ImportError, ValueError) as error:
        name = as_url(url).partition(":")[0]
        reason = one_line(str(error)).replace(url, "the URL")[:200]
        raise UserError(f"{name}://: {reason} (pip install slotstream[remote])") from None


class Server:
    """Gives the file system of a URL, and counts the requests in a row that failed for good."""

    def __init__(self, url: str) -> None:
        self._url, self._lock = url, threading.Lock()
        self._failures = 0
        self._last = ""

    def __call__(self) -> "AbstractFileSystem":
        """Raises UserError if there is no such file system, or if the server does not answer."""
        if self._failures >= MOST_FAILURES:
            name = as_url(self._url).partition("://")[2].partition("/")[0]
            raise UserError(
                f"{name}: {MOST_FAILURES} requests in a row failed ({self._last}): the server does"
                " not answer; the same command resumes"
            )
        return _file_system(self._url)

    def note(self, failure: str = "") -> None:
        """The last request succeeded, or failed for good."""
        with self._lock:
            self._failures = self._failures + 1 if failure else 0
            self._last = failure


def again(action: Callable[["AbstractFileSystem"], T], connect: Server) -> T:
    """The result of `action`, which is repeated after `WAITS` if the connection fails.

    Raises:
        OSError: with a `strerror` that repeats nothing of a URL.
        UserError: if there is no such file system, or if its server does not answer: then no other
            file waits for it.
    """
    for wait in (*WAITS, None):
        try:
            result = action(connect())
        except (UserError, BadImage, MemoryError):
            raise
        except Exception as error:  # libraries of all kinds
            reason, permanent = _reason(error)
            if permanent or wait is None:
                tries = "" if permanent else f", {len(WAITS) + 1} times"
                connect.note("" if permanent else reason + tries)
                raise OSError(errno.EIO, reason + tries) from None
            time.sleep(wait)
        else:
            connect.note()
            return result
    raise AssertionError


def _reason(error: Exception) -> tuple[str, bool]:
    """What went wrong, without the URL and what a server wrote; and whether it will again."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and type(cause).__module__.startswith("aiohttp"):
        return _reason(cause)  # type: ignore[arg-type]  # so fsspec calls all errors of HTTP
    status = getattr(error, "status", None)
    if isinstance(status, int) and 400 <= status < 600:
        return f"HTTP status {status}", status < 500 and status not in _RETRIED_STATUS
    for kind in type(error).__mro__:
        if kind.__name__ in _PERMANENT:
            return _PERMANENT[kind.__name__], True
    if isinstance(error, asyncio.TimeoutError | TimeoutError):
        return "no answer in time", False
    known = isinstance(error, OSError) and error.errno
    reason = os.strerror(error.errno) if known else type(error).__name__  # type: ignore[attr-defined]
    return f"the connection failed ({reason})", False
