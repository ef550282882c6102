"""Stores of objects: what an object is, and its bytes, by fsspec's file systems (http.py has those of web servers)."""

from __future__ import annotations

import functools
import importlib
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from clipdistill.errors import InputError, MissingExtraError, first_line
from clipdistill.remote.retry import Changed, Refused, Temporary, time_limit

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "az": "az", "abfs": "az", "abfss": "az", "adl": "az"}
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs"}
_IDENTITIES = (
    *("ETag", "etag", "blob_id", "generation", "md5Hash", "content_md5", "checksum"),
    *("LastModified", "last_modified", "updated", "mtime", "modified", "created"),
)
"""What stores call that which changes with an object's content, the surest first."""
_LISTING = 30
"""Time limits for all pages of a listing, each of which has one of its own."""
_CHECKED = 10.0
"""Seconds for which an object that was looked at is taken to be the same, where a read itself cannot tell."""


@dataclass(frozen=True)
class Info:
    """size: bytes, -1 where only reading it all tells; identity: changes with the content (ETag, time), '' unknown.

    ranges: parts can be asked for; head: its first bytes, where they came along.
    """

    size: int
    identity: str = ""
    folder: bool = False
    ranges: bool = True
    head: bytes = b""


class Store(Protocol):
    """Each call is one try; errors are those of retry.py, FileNotFoundError, OSError."""

    def info(self, url: str) -> Info:
        """What lies there."""
        ...

    def read(self, url: str, start: int, end: int, info: Info) -> bytes:
        """Bytes start to end - 1 of the object that `info` describes. Raises Changed when it is another."""
        ...

    def whole(self, url: str) -> bytes:
        """All bytes of a small object."""
        ...

    def save(self, url: str, path: Path) -> None:
        """All bytes of any object, into a local file that is there already."""
        ...

    def children(self, url: str) -> list[tuple[str, Info]]:
        """(name, info) of what lies in a folder."""
        ...

    def tree(self, url: str) -> Sequence[tuple[str, Info]]:
        """(path below it, info) of every object below a folder."""
        ...


_stores: dict[tuple[int, str], Store] = {}


def store_of(url: str) -> Store:
    """The store that a URL means; each process has its own, since none survives a fork."""
    scheme = url.partition(":")[0].lower()
    key = (os.getpid(), scheme)
    if key not in _stores:
        if scheme in ("http", "https"):
            _stores[key] = importlib.import_module("clipdistill.remote.http").HttpStore()
        else:
            _stores[key] = FsspecStore(scheme, url)
    return _stores[key]


class FsspecStore:
    """One of fsspec's file systems, with the credentials that it finds by its own rules."""

    def __init__(self, scheme: str, url: str) -> None:
        import fsspec

        self.scheme = scheme
        self._looked: dict[str, float] = {}
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it prints each of its tries; `attempted` tells once
        try:
            # listings are not kept: an object may change while a program runs
            self.fs: Any = fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False)
        except ImportError as error:
            extra = _EXTRAS.get(scheme)
            if extra is None:
                raise InputError(f"'{url}' cannot be opened: {first_line(error)}") from error
            raise MissingExtraError(_PACKAGES[extra], extra, f"data '{url}'") from error
        except ValueError as error:
            if "not known" in str(error):
                raise InputError(f"'{url}': no way to read {scheme}:// is known (s3, gs, az, https, hf)") from error
            raise InputError(f"'{url}' cannot be opened: {first_line(error)}") from error
        except Exception as error:  # each library has errors of its own for missing credentials
            raise InputError(f"'{url}' cannot be opened: {first_line(error)}") from error
        _try_once(self.fs, _PACKAGES.get(_EXTRAS.get(scheme, "")))

    def _call(self, name: str, *arguments: Any, **options: Any) -> Any:
        """One of the file system's methods, which ends within a time limit, with errors that `attempted` knows."""
        most = (_LISTING if name == "find" else 2) * time_limit()
        try:
            if getattr(self.fs, "async_impl", False):
                import fsspec.asyn

                method = getattr(self.fs, f"_{name}")
                return fsspec.asyn.sync(self.fs.loop, method, *arguments, timeout=most, **options)
            if self.scheme == "memory":
                return getattr(self.fs, name)(*arguments, **options)
            return _within(most, lambda: getattr(self.fs, name)(*arguments, **options))
        except (FileNotFoundError, TimeoutError):
            raise
        except Exception as error:
            raise _known(error) from error

    def info(self, url: str) -> Info:
        found = self._call("info", self.fs._strip_protocol(url))
        return _info(found)

    def read(self, url: str, start: int, end: int, info: Info) -> bytes:
        path = self.fs._strip_protocol(url)
        if self.scheme in ("s3", "s3a") and info.identity:
            data = self._s3(path, start, end, info.identity)
        else:
            self._look(url, info)
            buffered = not getattr(self.fs, "async_impl", False) and self.scheme != "memory"
            more = {"cache_type": "none"} if buffered else {}  # they would read megabytes beyond the range
            data = self._call("cat_file", path, start=start, end=end, **more)
        if len(data) != end - start:
            self._looked.pop(url, None)
            self._look(url, info)
            raise Temporary(f"{len(data)} bytes came instead of {end - start}")
        return bytes(data)

    def _s3(self, path: str, start: int, end: int, identity: str) -> bytes:
        """A range under the condition that the object is still the one of this ETag."""
        import fsspec.asyn

        bucket, key, version = self.fs.split_path(path)
        more = {"VersionId": version} if version else {}

        async def get() -> bytes:
            wanted = {"Range": f"bytes={start}-{end - 1}", "IfMatch": f'"{identity}"'}
            answer = await self.fs._call_s3("get_object", Bucket=bucket, Key=key, **wanted, **more)
            async with answer["Body"] as body:
                data: bytes = await body.read()
            if answer.get("ETag", "").strip('"') not in ("", identity):
                raise Changed(f"its ETag is {answer['ETag']}")
            return data

        try:
            return fsspec.asyn.sync(self.fs.loop, get, timeout=2 * time_limit())
        except (FileNotFoundError, TimeoutError, Changed):
            raise
        except Exception as error:
            raise _known(error) from error

    def _look(self, url: str, info: Info) -> None:
        """See from time to time that the object is still the one that was opened."""
        now = time.monotonic()
        if self.scheme != "memory" and now - self._looked.get(url, -_CHECKED) < _CHECKED:
            return
        found = self.info(url)
        if (found.size, found.identity) != (info.size, info.identity):
            raise Changed(f"it had {info.size} bytes ({info.identity}) and has {found.size} ({found.identity})")
        self._looked[url] = now

    def whole(self, url: str) -> bytes:
        return bytes(self._call("cat_file", self.fs._strip_protocol(url)))

    def save(self, url: str, path: Path) -> None:
        data = self.whole(url)
        with path.open("r+b") as file:
            file.truncate(file.write(data))

    def children(self, url: str) -> list[tuple[str, Info]]:
        path = self.fs._strip_protocol(url).rstrip("/")
        found = [(entry["name"].rstrip("/"), _info(entry)) for entry in self._call("ls", path, detail=True)]
        return [(name.rpartition("/")[2], info) for name, info in found if name.strip("/") != path.strip("/")]

    def tree(self, url: str) -> list[tuple[str, Info]]:
        path = self.fs._strip_protocol(url).strip("/")
        found = self._call("find", path, detail=True)
        below = [(name.strip("/").removeprefix(path).lstrip("/"), _info(entry)) for name, entry in found.items()]
        return [(name, info) for name, info in below if name and not info.folder]


def _try_once(fs: Any, package: str | None) -> None:
    """Make the three libraries try once and wait for `time_limit()`: `attempted` tries again, and theirs would multiply
    with its own, to minutes for a place that cannot be reached."""
    limit = time_limit()
    if package == "s3fs":
        fs.retries, fs.connect_timeout, fs.read_timeout = 1, limit, limit
        fs.config_kwargs.setdefault("retries", {"total_max_attempts": 1})
    elif package == "gcsfs":
        import aiohttp

        fs._request = functools.partial(type(fs)._request.__wrapped__, fs)
        fs.requests_timeout = aiohttp.ClientTimeout(total=None, sock_connect=limit, sock_read=limit)
    elif package == "adlfs":
        fs.service_client._config.retry_policy.total_retries = 0
        waiting = fs.service_client._pipeline._transport.connection_config
        waiting.timeout = waiting.read_timeout = limit


def _info(found: dict[str, Any]) -> Info:
    value = next((found[key] for key in _IDENTITIES if found.get(key)), "")
    identity = str(value.timestamp() if hasattr(value, "timestamp") else value).strip('"')
    folder = found.get("type") == "directory"
    return Info(-1 if found.get("size") is None else int(found["size"]), identity, folder)


def _known(error: Exception) -> Exception:
    """An error of a library as one of ours."""
    kind, text = type(error).__name__, f"{error} {error.__cause__ or ''}"
    status = getattr(getattr(error, "response", None), "status_code", getattr(error, "code", None))
    if "Timeout" in kind:
        return TimeoutError(first_line(error))
    if (
        str(status) in ("401", "403")
        or isinstance(error, PermissionError)
        or "Credentials" in kind
        or "Unauthorized" in kind
        or "Forbidden" in kind
        or text.startswith("Forbidden: ")  # gcsfs
    ):
        return Refused(first_line(error))
    if "PreconditionFailed" in text or "pre-conditions" in text or kind == "FileExpired":
        return Changed("its ETag is another")
    if str(status) == "404" or "NotFound" in kind:  # the hub's and Azure's own
        return FileNotFoundError(str(error))
    return Temporary(first_line(error))


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """`call()` in a thread of its own. Raises TimeoutError when it takes longer; the thread is left behind."""
    result: list[Any] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            result.append(call())
        except BaseException as error:  # handed on to the caller
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError
    if failure:
        raise failure[0]
    return result[0]
