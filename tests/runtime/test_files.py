"""Files and folders that are whole or not there, and JSON read with one sentence for what is wrong."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest

from clipdistill.errors import InputError
from clipdistill.runtime import files


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"é": 1})
    files.write_json(tmp_path / "a.json", {"é": 2})
    assert files.read_json(tmp_path / "a.json") == {"é": 2}
    assert names(tmp_path) == ["a.json"]
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o666 & ~files._umask()


def test_an_error_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    files.write_text(tmp_path / "a", "old")

    def fail() -> None:
        with files.new_file(tmp_path / "a") as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_content_is_synced_before_its_name_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    sync, rename = files.sync, Path.replace
    monkeypatch.setattr(files, "sync", lambda path: (events.append(Path(path).name), sync(path)))
    monkeypatch.setattr(Path, "replace", lambda self, to: (events.append("rename"), rename(self, to)))
    files.write_text(tmp_path / "a.txt", "x")
    assert events[0].startswith(".a.txt.writing-")
    assert events[1:] == ["rename", tmp_path.name]


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127])
def test_the_longest_names_can_be_written(tmp_path: Path, name: str) -> None:
    files.write_text(tmp_path / name, "x")
    assert names(tmp_path) == [name]


def test_a_folder_is_made_where_a_link_leads(tmp_path: Path) -> None:
    """The link (to a larger disk, say) stays one, also when an earlier result there is replaced."""
    (tmp_path / "large").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "large")
    for content in ("1", "2"):
        with files.new_folder(tmp_path / "out", lambda folder: (folder / "mark").exists(), "export") as temporary:
            (temporary / "mark").write_text(content)
        assert (tmp_path / "out").is_symlink()
        assert (tmp_path / "large" / "mark").read_text() == content
    assert names(tmp_path) == ["large", "out"]


def test_a_folder_replaces_its_like_only(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for content in ("1", "2"):
        with files.new_folder(out, lambda folder: (folder / "mark").exists(), "export") as temporary:
            (temporary / "mark").write_text(content)
    assert (out / "mark").read_text() == "2"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "diary").write_text("mine")
    with (
        pytest.raises(InputError, match="exists and is no export"),
        files.new_folder(tmp_path / "other", lambda folder: False, "export"),
    ):
        pass
    assert names(tmp_path) == ["other", "out"]


def test_what_the_user_has_put_into_a_folder_stays_when_it_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def write(name: str) -> None:
        made = {"mark", "old", "new", "both", "both/old", "both/new"}
        with files.new_folder(out, lambda folder: True, "export", lambda part: part.as_posix() in made) as temporary:
            (temporary / name).write_text(name)
            (temporary / "both").mkdir()
            (temporary / "both" / name).write_text(name)

    write("old")
    (out / "notes").write_text("mine")
    (out / "notes").chmod(0o640)
    (out / ".git").mkdir()
    (out / ".git" / "nowhere").symlink_to("/absent")
    (out / "dead").symlink_to("/absent")
    (out / "both" / "mine" / "empty").mkdir(parents=True)
    (out / "both" / "mine" / "old").write_text("mine")
    (out / "both" / "list").symlink_to("nowhere")
    write("new")
    assert names(out) == [".git", "both", "dead", "new", "notes"]
    assert names(out / "both") == ["list", "mine", "new"]
    assert names(out / "both" / "mine") == ["empty", "old"]
    assert (out / "notes").read_text() == "mine"
    assert (out / "notes").stat().st_mode & 0o777 == 0o640
    assert (out / "dead").is_symlink()
    assert (out / ".git" / "nowhere").is_symlink()
    assert names(tmp_path) == ["out"]


def test_what_a_killed_writer_left_goes_with_the_next(tmp_path: Path) -> None:
    (tmp_path / ".out.writing-dead").mkdir()
    (tmp_path / ".other.writing-dead").mkdir()
    with files.new_folder(tmp_path / "out", lambda folder: False, "export"):
        pass
    assert names(tmp_path) == [".other.writing-dead", "out"]
    files.remove_leftovers(tmp_path, older_than=3600)
    assert names(tmp_path) == [".other.writing-dead", "out"]
    files.remove_leftovers(tmp_path)
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("age", "full", "goes"),
    [
        (7200, False, True),
        (10, False, False),
        (-10, False, False),  # of a machine whose clock is a little fast
        (-7200, False, True),  # written before the clock was set back: it would stay until the clock is there again
        (10, True, False),  # a full disk tells no time of its own: what others write there is not old for that
        (7200, True, True),
    ],
)
def test_a_clock_that_was_set_back_and_a_full_disk_make_nothing_old_or_new(
    age: float, full: bool, goes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(**_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    left = tmp_path / ".a.json.writing-dead"
    left.write_text("{")
    os.utime(left, (time.time() - age, time.time() - age))
    if full:
        monkeypatch.setattr(files.tempfile, "TemporaryFile", no_room)
    files.remove_leftovers(tmp_path, older_than=3600)
    assert left.exists() != goes


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "empty"),
        (b"\0" * 50, "holds only NUL bytes"),
        (b"[1]", "expected a JSON object, found a list"),
        (b'"a"', "found a text"),
        (b"1", "found a number"),
        (b"null", "found null"),
        (b'{"a": ', "line 1"),
        (b'{"a": "\xff"}', "not readable as UTF-8"),
        (b"[" * 100_000, "not readable as JSON"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "not readable as JSON"),
    ],
)
def test_json_that_is_none_of_ours(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=sentence) as caught:
        files.read_json(tmp_path / "a.json", "make it again")
    assert str(caught.value).startswith(str(tmp_path / "a.json"))
    assert str(caught.value).endswith("make it again")


def test_json_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        files.read_json(tmp_path / "none.json")
    with pytest.raises(InputError, match="cannot be read"):
        files.read_json(tmp_path)


def test_places_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "deep")
    for name, reason in (
        ("file", "in the way"),
        ("file/below", "file"),
        ("dangling", "in the way"),
        ("x" * 256, "too long"),
    ):
        with pytest.raises(InputError, match=reason):
            files.make_folder(tmp_path / name, "run")
    if os.getuid():
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(InputError, match="permission"):
            files.make_folder(tmp_path / "closed" / "run", "run")


def test_places_of_files_are_looked_at_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "deep")
    assert files.require_place(tmp_path / "new" / "a.json", "scores") == tmp_path / "new" / "a.json"
    for name, reason in ((".", "this is a folder"), ("dangling", "in the way"), ("x" * 256, "too long")):
        with pytest.raises(InputError, match=reason):
            files.require_place(tmp_path / name, "scores")


def test_two_writers_of_one_folder_do_not_take_each_others_work_for_a_leftover(tmp_path: Path) -> None:
    with files.new_folder(tmp_path / "made", lambda _: True, "export") as first:
        (first / "a").write_text("first")
        with files.new_folder(tmp_path / "made", lambda _: True, "export") as second:
            assert first.is_dir()
            (second / "a").write_text("second")
        assert (tmp_path / "made" / "a").read_text() == "second"
    assert (tmp_path / "made" / "a").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_file_that_a_living_process_writes_is_no_leftover(tmp_path: Path) -> None:
    (tmp_path / ".a.json.writing-dead").write_text("half")
    (tmp_path / ".b.json.writing-dead").write_text("half")
    with files.new_file(tmp_path / "a.json") as temporary:
        temporary.write_text("mine")
        files.remove_leftovers(tmp_path, "a.json")
        assert temporary.exists()
    assert (tmp_path / "a.json").read_text() == "mine"
    assert names(tmp_path) == [".b.json.writing-dead", "a.json"]


def test_a_name_with_a_nul_is_one_sentence(tmp_path: Path) -> None:
    for check in (files.make_folder, files.require_place):
        with pytest.raises(InputError, match="NUL"):
            check(f"{tmp_path}/a\0b", "export")


def test_text_that_is_no_unicode_has_a_digest() -> None:
    assert files.digest_of({"name": "\ud800"}) != files.digest_of({"name": "\ud801"})
