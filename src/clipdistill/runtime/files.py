"""Files and folders that are there whole or not at all, and our own JSON read with one sentence for what is wrong.

What is being written has a name of its own, `.NAME.writing-XXXX`, is synced, and takes its place by one rename.
A killed writer leaves only such names; `remove_leftovers` takes them away.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from clipdistill.errors import InputError, storage_error, system_number

WRITING = ".writing-"
ABANDONED = 600.0
"""Seconds after which what somebody was writing is a killed writer's, in places where others may be writing too."""
FUTURE = 60.0  # seconds that a file may lie in the future: clocks of machines that share a disk differ a little
CHECKSUM = "sha256"
_LARGEST_JSON = 1 << 30  # bytes
_URL = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)
"""How the path made of a URL begins."""


def temporary_prefix(path: Path) -> str:
    """How the temporary name of `path` begins; short enough for file systems that take 255 bytes."""
    name = path.name.encode("utf-8", "surrogateescape")[:200].decode("utf-8", "ignore")
    return f".{name}{WRITING}"


@contextlib.contextmanager
def new_file(path: Path | str) -> Iterator[Path]:
    """A temporary path beside `path`, to be written in the block; synced and renamed to `path` at its end.

    After an error `path` is as it was and nothing is left; what a killed writer left goes first. The file gets the
    permissions of any new file, also where the library that wrote it made it private. Raises InputError for a device,
    a pipe or a folder of that name, which the rename would replace.
    """
    path = Path(path)
    _refuse_no_file(path)
    remove_leftovers(path.parent, path.name)
    descriptor, name = tempfile.mkstemp(prefix=temporary_prefix(path), suffix=path.suffix[-20:], dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        with _held(temporary):
            yield temporary
        temporary.chmod(0o666 & ~_umask())
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        _say_where(error, path, temporary)
        raise


def write_together(contents: Mapping[Path, bytes | str | Mapping[str, Any]]) -> None:
    """Replace the files of one result (bytes, text in UTF-8, values as JSON with a checksum).

    None takes its name before all are written and synced, so that a disk that is full leaves what was there before.
    """
    with contextlib.ExitStack() as waiting:
        for path, content in contents.items():
            content = json_text(with_checksum(content)) if isinstance(content, Mapping) else content
            temporary = waiting.enter_context(new_file(path))
            try:
                temporary.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
                if len(contents) > 1:
                    sync(temporary)
            except OSError as error:
                error.filename = str(path)
                raise


def write_text(path: Path | str, text: str) -> None:
    """Replace a file in one step, synced before its name appears; in UTF-8."""
    write_together({Path(path): text})


def write_json(path: Path | str, values: Any, *, checked: bool = False) -> None:
    """Readable JSON with a final newline, replacing the file in one step.

    checked: with a checksum of its content, for files of ours that are believed later; `read_json` compares it.
    """
    write_text(path, json_text(with_checksum(values) if checked else values))


def json_text(values: Any) -> str:
    """As `write_json` writes it."""
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"


def with_checksum(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with the sha256 of their content, as it will be read, under the key "sha256"."""
    stored = json.loads(json.dumps({key: value for key, value in values.items() if key != CHECKSUM}))
    return {**values, CHECKSUM: digest_of(stored)}


def compare_checksum(values: dict[str, Any], where: str, hint: str = "", of: int | None = None) -> dict[str, Any]:
    """`values` without their checksum, which is compared.

    of: the format whose files must have one. Raises InputError where it is missing or does not fit.
    """
    recorded, stored = values.pop(CHECKSUM, None), values.get("format")
    if (recorded is not None or (of is not None and stored == of)) and recorded != digest_of(values):
        raise InputError(f"{where}: damaged or changed by hand (its checksum does not fit){_after(hint)}")
    return values


@contextlib.contextmanager
def new_folder(
    path: Path | str, replaces: Callable[[Path], bool], what: str, made: Callable[[Path], bool] = lambda _: True
) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name, synced, when the block ends without an error.

    replaces: whether the folder that stands there may be replaced (an empty one always may); anything else under the
    name is an InputError before any work is done. what: what is being made ("export"), for that sentence. made:
    whether a part of the folder that is replaced, by its path in it, was made with it: what the user has put there
    stays, at any depth.
    """
    path = require_new_folder(path, replaces, what)
    path = path.resolve() if path.is_symlink() else path  # a link to another disk stays one
    remove_leftovers(path.parent, path.name)
    temporary = Path(tempfile.mkdtemp(prefix=temporary_prefix(path), dir=path.parent))
    try:
        with _held(temporary):
            yield temporary
        for part in sorted(temporary.rglob("*"), reverse=True):
            part.chmod((0o777 if part.is_dir() else 0o666) & ~_umask())
            sync(part)
        _keep(path, temporary, made)
        temporary.chmod(0o777 & ~_umask())
        sync(temporary)
        if path.exists():
            aside = Path(tempfile.mkdtemp(prefix=temporary_prefix(path), dir=path.parent))
            path.rename(aside / "old")
            temporary.rename(path)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            temporary.rename(path)
        sync(path.parent)
    except BaseException as error:
        _say_where(error, path, temporary)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _keep(old: Path, new: Path, made: Callable[[Path], bool], inside: Path = Path()) -> None:
    """Copy what the user has put into a folder into the one that replaces it."""
    for part in sorted((old / inside).iterdir()) if old.exists() else ():
        name = inside / part.name
        folder = part.is_dir() and not part.is_symlink()
        if folder and (made(name) or (new / name).is_dir()):
            _keep(old, new, made if made(name) else lambda _: False, name)
        elif not made(name) and not os.path.lexists(new / name):
            (new / inside).mkdir(parents=True, exist_ok=True)
            if folder:
                shutil.copytree(part, new / name, symlinks=True)
            else:
                shutil.copy2(part, new / name, follow_symlinks=False)
            for copied in (new / name, *(new / name).rglob("*")):
                if not copied.is_symlink():
                    sync(copied)


def _say_where(error: BaseException | None, path: Path, temporary: Path) -> None:
    """Name the file of a write that failed, which the error does not know, or knows by its temporary name."""
    while error is not None and system_number(error) is None:
        error = error.__cause__
    named = getattr(error, "filename", None)
    if error is not None and (not named or str(named).startswith(str(temporary))):
        error.filename = str(path)  # type: ignore[attr-defined]


@contextlib.contextmanager
def _held(temporary: Path) -> Iterator[bool]:
    """False where a living process is writing this file or folder; others see it held until the block ends."""
    descriptor, free = None, True
    try:
        import fcntl

        descriptor = os.open(temporary, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        free = False
    except (ImportError, OSError):  # a system or a disk without such locks
        pass
    try:
        yield free
    finally:
        if descriptor is not None:
            os.close(descriptor)


def require_new_folder(path: Path | str, replaces: Callable[[Path], bool], what: str) -> Path:
    """See that `new_folder` may make `path`, before the work whose result it is for; makes the folders above it."""
    path = _named(path)
    try:
        if path.is_symlink() and not path.exists():
            raise InputError(f"{path}: is a link that leads nowhere: choose another place for the {what}")
        if path.exists() and not (path.is_dir() and (not any(path.iterdir()) or replaces(path))):
            raise InputError(f"{path}: exists and is no {what} that may be replaced: choose another place")
    except OSError as error:
        raise cannot_write(path, what, error) from error
    make_folder(path.parent, what)
    return path


def make_folder(path: Path | str, what: str) -> Path:
    """Make `path` and the folders above it, and see that files can be made in it.

    Raises InputError, naming `what` it is for, when a file or a dead link is in the way, a name is too long, or the
    place cannot be written; StorageError when the disk is full.
    """
    path = _named(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise cannot_write(path, what, error) from error
    return path


def require_place(path: Path | str, what: str, marks: Sequence[bytes] = ()) -> Path:
    """See that `path` can be written as a file, before the work whose result it is for; makes the folders above it.

    marks: what the beginning of an earlier file of the kind holds one of; a file without any of them is somebody's own.
    Raises InputError for such a file, where a folder, a device or a dead link is in the way, the name is too long, or
    the place cannot be written.
    """
    path = _named(path)
    try:
        if path.lstat() and path.is_symlink() and not path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        if path.is_dir():
            raise InputError(f"{path}: this is a folder; name a file for the {what}")
        _refuse_no_file(path)
        if marks and not holds_mark(path, marks):
            raise InputError(
                f"{path}: exists and is no file of {what} that was written here, so it is not replaced: choose another "
                "place"
            )
    except FileNotFoundError:
        pass
    except OSError as error:
        raise cannot_write(path, what, error) from error
    make_folder(path.parent, what)
    return path


def holds_mark(path: Path, marks: Sequence[bytes]) -> bool:
    """Whether a file is empty or holds one of `marks` in its first 64 kB."""
    with path.open("rb") as file:
        head = file.read(1 << 16)
    return not head.strip() or any(mark in head for mark in marks)


def _refuse_no_file(path: Path) -> None:
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: is a device, a pipe or a folder, not a file: choose another place")


def _named(path: Path | str) -> Path:
    if "\0" in str(path):
        raise InputError(f"{str(path)!r}: not the name of a file (it holds a NUL): choose another place")
    if _URL.match(str(path)):
        raise InputError(f"{path}: is a URL, and results are written to this machine: choose another place")
    return Path(path)


def cannot_write(path: Path | str, what: str, error: OSError) -> Exception:
    """The error to raise when `path`, the place for `what`, cannot be made or written."""
    full = storage_error(error)
    if full is not None and error.errno != errno.EROFS:
        return full
    reasons = {
        errno.EACCES: "permission is denied",
        errno.EPERM: "permission is denied",
        errno.EROFS: "the disk is read-only",
        errno.ENAMETOOLONG: "the name is too long for the disk",
        errno.EEXIST: "a file or a dead link of that name is in the way",
        errno.ENOTDIR: "a part of the path is a file",
        errno.ELOOP: "its links lead in a circle",
    }
    reason = reasons.get(error.errno or 0, error.strerror or str(error))
    return InputError(f"{path}: cannot be written as the place for the {what} ({reason}): choose another place")


def remove_leftovers(folder: Path | str, name: str | None = None, *, older_than: float = 0.0) -> None:
    """Take away what a killed writer left of `name` (default: of anything) in `folder`.

    What a living process of this machine is writing is left alone. older_than: seconds since the last change, for
    places where processes of other machines may be writing; a time in the future, of a clock that was set back, is old.
    """
    folder = Path(folder)
    now = disk_time(folder) if older_than else 0.0
    for path in folder.glob(f".*{WRITING}*"):
        if name is not None and not path.name.startswith(temporary_prefix(folder / name)):
            continue
        with contextlib.suppress(OSError):
            if older_than and -FUTURE <= now - path.lstat().st_mtime < older_than:
                continue
            with contextlib.nullcontext(True) if path.is_symlink() else _held(path) as free:
                if free and path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif free:
                    path.unlink()


def first_other(folder: Path, *ours: str) -> str | None:
    """The name of a thing in `folder` that no killed writer left and that does not begin like one of `ours`."""
    names = sorted(path.name for path in folder.iterdir())
    return next((n for n in names if not ((n.startswith(".") and WRITING in n) or n.startswith(ours))), None)


def sync(path: Path | str) -> None:
    """Make a file's or folder's content survive a power cut."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return  # a folder cannot be opened on some systems; the rename still orders the writes there
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.EROFS):  # places that cannot sync, such as pipes
            raise
    finally:
        os.close(descriptor)


def read_json(path: Path | str, hint: str = "", of: int | None = None) -> dict[str, Any]:
    """The JSON object in a file, compared with its checksum, which is taken out, where it has one.

    of: the format whose files must have one. Raises InputError that says in one sentence what is wrong with it
    (missing, empty, not UTF-8, not JSON and where, a key twice, not an object, another checksum), with `hint` for what
    to do.
    """
    value = parse_json(_read(Path(path), hint), str(path), hint)
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {_kind(value)}{_after(hint)}")
    return compare_checksum(value, str(path), hint, of)


def parse_json(content: bytes, where: str, hint: str = "") -> Any:
    """Any JSON value in UTF-8. Raises InputError beginning with `where`."""
    if not content.strip(b"\0 \t\r\n"):
        raise InputError(f"{where}: {'empty' if not content.strip() else 'holds only NUL bytes'}{_after(hint)}")
    try:
        return json.loads(content.decode("utf-8-sig", "surrogatepass"), object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} (line {error.lineno}): not readable as JSON: {error.msg}{_after(hint)}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not readable as UTF-8 text (byte {error.start}){_after(hint)}") from error
    except RecursionError as error:
        raise InputError(f"{where}: not readable as JSON: nested too deeply{_after(hint)}") from error
    except ValueError as error:  # integers of thousands of digits, a key twice
        raise InputError(f"{where}: not readable as JSON: {error}{_after(hint)}") from error


def read_text(path: Path, where: str | None = None, *, errors: str = "strict") -> str:
    """A UTF-8 file's text, lines ended by one sign. Raises InputError beginning with `where` (None: the path)."""
    try:
        return decoded(path.read_bytes(), errors).replace("\r\n", "\n").replace("\r", "\n")
    except OSError as error:
        raise InputError(f"{where or path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{where or path}: is not text in UTF-8 (byte {error.start})") from error


def text_lines(path: Path, where: str | None = None, *, errors: str = "strict") -> list[str]:
    """The lines of a UTF-8 file, as `read_text` reads it."""
    return lines_of(read_text(path, where, errors=errors))


def decoded(content: bytes, errors: str = "surrogateescape") -> str:
    """A user's text: UTF-16 where it begins with a byte order mark (Windows' "Unicode") and is that, else UTF-8."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        with contextlib.suppress(UnicodeDecodeError):
            return content.decode("utf-16")
    return content.decode("utf-8-sig", errors)


def lines_of(text: str) -> list[str]:
    """The lines of a text, ended as any system ends them. str.splitlines cuts at form feeds, U+0085 and U+2028 too,
    which captions and names may hold."""
    lines = re.split(r"\r\n?|\n", text)
    return lines if lines[-1] else lines[:-1]


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object_pairs_hook of json: raises ValueError for a key that stands twice, whose first value would be lost."""
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        again = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {again!r:.80} stands twice")
    return values


def _read(path: Path, hint: str) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_JSON + 1)
    except FileNotFoundError as error:
        hint = "only data are read from other machines: fetch it first" if _URL.match(str(path)) else hint
        raise InputError(f"{path}: no such file{_after(hint)}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}){_after(hint)}") from error
    except ValueError as error:  # a null character in the name
        raise InputError(f"{str(path)!r}: not the name of a file ({error})") from error
    if len(content) > _LARGEST_JSON:
        raise InputError(f"{path}: longer than {_LARGEST_JSON} bytes, so this is none of our files{_after(hint)}")
    return content


def require_readable(path: Path) -> None:
    """Raise InputError for a file that cannot be opened; safetensors calls every such file missing."""
    try:
        path.open("rb").close()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error


def sha256(path: Path | str) -> str:
    """sha256 (hex) of a file's content."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(values: Mapping[str, Any]) -> str:
    """sha256 (hex) of plain values, the same for equal content in any order of keys."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def is_inside(folder: Path, path: Path) -> bool:
    """Whether `path`, with every link in it followed, lies in `folder`."""
    root = os.path.realpath(folder)
    return os.path.realpath(path).startswith(root.rstrip(os.sep) + os.sep)


def refuse_links(folder: Path, what: str) -> None:
    """Raise InputError when anything below `folder` is a link to something outside it; `what` names the folder.

    The folder itself may be reached through a link: the user named it. Links below it are not: whoever made the folder
    made them, and appending to `log.jsonl` would append to any file it points at.
    """
    root = os.path.realpath(folder)
    waiting = [root]
    while waiting:
        try:
            entries = list(os.scandir(waiting.pop()))
        except FileNotFoundError:
            continue  # not made yet, or taken away by another process
        for entry in entries:
            if entry.is_symlink():
                if not is_inside(folder, Path(entry.path)) and os.path.realpath(entry.path) != root:
                    raise InputError(
                        f"{what} {folder}: '{os.path.relpath(entry.path, root)}' is a link that leads outside the "
                        "folder, and writing would follow it: copy what it points at, or link the folder as a whole"
                    )
            elif entry.is_dir(follow_symlinks=False):
                waiting.append(entry.path)


def _after(hint: str) -> str:
    return f": {hint}" if hint else ""


def _kind(value: Any) -> str:
    return {list: "a list", str: "a text", type(None): "null", bool: "true or false"}.get(type(value), "a number")


def _umask() -> int:
    """The process's mask for new files; it can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def disk_time(folder: Path) -> float:
    """The time by the clock of the disk that `folder` is on, which need not be this machine's (but is, where full)."""
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:  # without a name, where the disk can: a kill leaves nothing
            return os.fstat(probe.fileno()).st_mtime
    except OSError:
        return time.time()
