"""Tars that a command writes: `pipe:CURL ... | ...`, as WebDataset has them.

The command runs in a shell with the rights of whoever typed it, so it must have been typed: on the command line, or
given to `open_pairs` or `allow_pipe` by a program. One that stands in a recipe or any file is refused.
"""

from __future__ import annotations

import os
import re
import selectors
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from clipdistill.errors import InputError
from clipdistill.remote.path import RemotePath
from clipdistill.remote.retry import RemoteError, Temporary, attempts, time_limit
from clipdistill.remote.store import Info

_typed: set[str] = set()
_PIECE = 1 << 20
_SEVERAL = re.compile(r"\{(\d+\.\.\d+|[^{}]*,[^{}]*)\}")


def allow_pipe(*texts: str) -> None:
    """Let the `pipe:` names that are part of these texts (arguments of the command line, names in a program) be run."""
    _typed.update(texts)


def _is_tar(path: Path) -> bool:
    """Whether a file begins with a tar's header (the sum of its bytes is right)."""
    with path.open("rb") as file:
        header = file.read(512)
    stored = header[148:156].strip(b" \0")
    right = sum(header[:148]) + 8 * ord(" ") + sum(header[156:])
    return len(header) == 512 and stored.isdigit() and int(stored, 8) == right


class PipePath(RemotePath):
    """The output of a command, which is run when it is first asked for and kept while the program runs."""

    def __init__(self, name: str, allowed: bool = False) -> None:
        command = name.partition(":")[2].strip()
        if not command or "\0" in command:
            raise InputError(f"{name!r}: no command behind pipe:")
        if not allowed and not any(name in text for text in _typed):
            raise InputError(
                f"'{name}' is a command and stands in a file or a setting: only one that is typed is run; name it with "
                "--data on the command line, or in a program with clipdistill.remote.allow_pipe"
            )
        super().__init__(f"pipe://{command}", Info(-1, ranges=False))
        self.url, self.command = name, command
        self._copy: Path | None = None

    @property
    def is_web(self) -> bool:
        return False

    @property
    def _pure(self) -> Any:
        words = [word.strip("'\"") for word in self.command.split()]
        named = next((word for word in reversed(words) if word.partition("?")[0].endswith(".tar")), words[-1])
        return Path(named.partition("?")[0].rpartition("/")[2] or "pipe")

    @property
    def parent(self) -> RemotePath:
        return self

    def exists(self) -> bool:
        return _SEVERAL.search(self.command) is None  # else it is a pattern

    def is_file(self) -> bool:
        return self.exists()

    def is_dir(self) -> bool:
        return False

    def __truediv__(self, name: Any) -> RemotePath:
        raise FileNotFoundError(f"{self.url} has nothing below it")

    def open(self, mode: str = "rb", *rest: Any, **more: Any) -> Any:
        return self._whole_copy().open(mode, *rest, **more)

    def read_range(self, start: int, size: int) -> bytes:
        with self._whole_copy().open("rb") as file:
            file.seek(start)
            return file.read(size)

    def _whole_copy(self) -> Path:
        if self._copy is None or not self._copy.exists():
            self._copy = super()._whole_copy()
        return self._copy

    def _write(self, path: Path) -> None:
        """Run the command; what it writes is kept only where it ends well."""
        reason = ""
        for number in range(min(3, attempts())):
            time.sleep(number)
            try:
                self._run(path)
                return
            except Temporary as error:
                reason = str(error)
        raise RemoteError(f"{self.url}: {reason}, three times: try the command in a shell")

    def _run(self, path: Path) -> None:
        limit = 10 * time_limit()
        with path.open("wb") as file, tempfile.TemporaryFile() as said:
            process = subprocess.Popen(
                ["/bin/sh", "-c", self.command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=said,
                start_new_session=True,
            )
            assert process.stdout is not None
            try:
                with selectors.DefaultSelector() as selector:
                    selector.register(process.stdout, selectors.EVENT_READ)
                    while True:
                        if not selector.select(limit):
                            raise Temporary(f"the command wrote nothing for {limit:g} s")
                        piece = os.read(process.stdout.fileno(), _PIECE)
                        if not piece:
                            break
                        file.write(piece)
                try:
                    code = process.wait(limit)
                except subprocess.TimeoutExpired:
                    raise Temporary(f"the command did not end within {limit:g} s of its last byte") from None
            finally:
                process.stdout.close()
                if process.poll() is None:
                    with suppress(ProcessLookupError, PermissionError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            if not code and not _is_tar(path):
                raise InputError(f"{self.url}: the command's output is no tar: only tars are read out of a pipe")
            if code:
                said.seek(max(0, said.seek(0, os.SEEK_END) - 2000))
                lines = said.read().decode("utf-8", "replace").strip().splitlines()
                raise Temporary(f"the command ended with code {code}" + (f" ({lines[-1][:200]})" if lines else ""))
