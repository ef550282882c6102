"""The index follows the folder: what is new is encoded once, whatever happens in between."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from clipdistill.errors import InputError, Preempted
from clipdistill.runtime.files import CHECKSUM
from clipdistill.search.photographs import printable, scan
from clipdistill.search.store import FORMAT, SearchIndex, open_index
from clipdistill.search.update import update
from tests.search.conftest import StandIn, draw


def fresh(index: Path) -> SearchIndex:
    return open_index(index, dict(StandIn.description))


def vector_of(store: SearchIndex, path: str) -> np.ndarray:
    return store.vector(store.entries[path].row)


def check(store: SearchIndex, folder: Path) -> None:
    """Every vector in the store is that of the file's present content."""
    whole = fresh(folder / ".check")
    update(whole, folder, StandIn())
    assert set(store.entries) == set(whole.entries)
    for path in whole.entries:
        np.testing.assert_array_equal(vector_of(store, path), vector_of(whole, path))
    shutil.rmtree(folder / ".check")


def test_scan_takes_images_and_leaves_the_rest(tmp_path: Path) -> None:
    draw(tmp_path, 3)
    (tmp_path / ".hidden").mkdir()
    for name in ("UPPER.JPG", ".dot.png", "text.txt", ".hidden/a.png"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "dead.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "circle.png").symlink_to(tmp_path / "again.png")  # once, all that is listed after it was lost
    (tmp_path / "again.png").symlink_to(tmp_path / "circle.png")
    (tmp_path / "folder.png").mkdir()
    odd = os.fsdecode(b"caf\xe9.png")
    (tmp_path / odd).write_bytes(b"x")
    found, problems = scan(tmp_path)
    assert [p.path for p in found] == sorted(["UPPER.JPG", odd, "more/scene-02.png", "scene-00.png", "scene-01.png"])
    nowhere = "is a link that leads nowhere, or no file"
    assert problems == [("again.png", nowhere), ("circle.png", nowhere), ("dead.png", nowhere)]
    assert printable(odd) == "caf\N{REPLACEMENT CHARACTER}.png"
    assert printable("a\x1b[31m\u202eb") == "a\N{REPLACEMENT CHARACTER}[31m\N{REPLACEMENT CHARACTER}b"
    with pytest.raises(InputError, match="no such folder"):
        scan(tmp_path / "nowhere")


def test_only_what_is_new_or_changed_is_encoded(tmp_path: Path) -> None:
    paths = draw(tmp_path, 12)
    index = tmp_path / ".index"
    first = update(fresh(index), tmp_path, model := StandIn(), batch_size=5)
    assert (first.photographs, first.encoded, model.encoded) == (12, 12, 12)
    again = update(fresh(index), tmp_path, model := StandIn())
    assert (again.unchanged, again.encoded, model.encoded) == (12, 0, 0)

    paths[0].write_bytes(paths[1].read_bytes())  # changed, but its new content is known
    shutil.copy(paths[3], tmp_path / "copy.png")
    paths[4].rename(tmp_path / "moved.png")
    os.utime(paths[5], ns=(1, 1))
    paths[6].unlink()
    extra = draw(tmp_path / "extra", 14)[12:]
    for path in (tmp_path / "extra").rglob("*.png"):
        if path not in extra:
            path.unlink()
    store = fresh(index)
    done = update(store, tmp_path, model := StandIn())
    assert model.encoded == done.encoded == 2
    assert (done.recognised, done.removed, done.unchanged, done.photographs) == (4, 2, 8, 14)
    check(store, tmp_path)
    check(fresh(index), tmp_path)


def test_content_that_keeps_size_and_time_needs_rehash(tmp_path: Path) -> None:
    path = tmp_path / "a.bmp"
    draw(tmp_path / "x", 2)
    from PIL import Image

    for number in (0, 1):
        status = path.stat() if path.exists() else None
        Image.new("RGB", (9, 9), (200 * number, 9, 9)).save(path)
        if status:
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        if number == 0:
            update(fresh(tmp_path / ".i"), tmp_path, StandIn())
    assert update(fresh(tmp_path / ".i"), tmp_path, StandIn()).encoded == 0
    assert update(fresh(tmp_path / ".i"), tmp_path, StandIn(), rehash=True).encoded == 1
    check(fresh(tmp_path / ".i"), tmp_path)


def test_bad_files_are_listed_and_not_tried_twice(tmp_path: Path) -> None:
    paths = draw(tmp_path, 3)
    broken = tmp_path / "broken.png"
    broken.write_bytes(paths[0].read_bytes()[:60])
    first = update(fresh(tmp_path / ".i"), tmp_path, StandIn())
    assert [path for path, _ in first.bad] == ["broken.png"]
    second = update(fresh(tmp_path / ".i"), tmp_path, StandIn())
    assert second.bad == first.bad
    assert second.unchanged == 4
    broken.write_bytes(paths[0].read_bytes())
    assert update(fresh(tmp_path / ".i"), tmp_path, StandIn()).bad == []
    paths[1].write_bytes(b"gone bad")
    store = fresh(tmp_path / ".i")
    assert [path for path, _ in update(store, tmp_path, StandIn()).bad] == [paths[1].name]
    assert paths[1].name not in store.entries
    assert fresh(tmp_path / ".i").bad.keys() == {paths[1].name}


def test_a_request_to_stop_saves_and_the_next_run_goes_on(tmp_path: Path) -> None:
    draw(tmp_path, 10)
    with pytest.raises(Preempted, match="4 photographs are in the index"):
        update(fresh(tmp_path / ".i"), tmp_path, StandIn(), batch_size=4, stop=lambda: True)
    model = StandIn()
    done = update(fresh(tmp_path / ".i"), tmp_path, model, batch_size=4)
    assert (done.unchanged, model.encoded, done.photographs) == (4, 6, 10)
    check(fresh(tmp_path / ".i"), tmp_path)


def test_a_crash_costs_what_was_not_saved(tmp_path: Path) -> None:
    draw(tmp_path, 10)
    with pytest.raises(KeyboardInterrupt):
        update(fresh(tmp_path / ".i"), tmp_path, StandIn(fail_after=6), batch_size=2, save_seconds=0)
    (folder,) = (tmp_path / ".i").iterdir()
    (folder / "part-00000099.npy").write_bytes(b"left over")
    model = StandIn()
    update(fresh(tmp_path / ".i"), tmp_path, model)
    assert model.encoded == 4
    assert not (folder / "part-00000099.npy").exists()
    check(fresh(tmp_path / ".i"), tmp_path)


@pytest.mark.parametrize("damage", ["index.json", "part-00000001.safetensors"])
def test_a_damaged_index_is_made_again(tmp_path: Path, damage: str) -> None:
    draw(tmp_path, 5)
    update(fresh(tmp_path / ".i"), tmp_path, StandIn())
    (file,) = (tmp_path / ".i").glob(f"*/{damage}")
    file.write_bytes(file.read_bytes()[:-9])
    store = fresh(tmp_path / ".i")
    assert "damaged" in store.notices[0]
    update(store, tmp_path, model := StandIn())
    assert model.encoded == 5
    check(fresh(tmp_path / ".i"), tmp_path)


def test_parts_are_put_together(tmp_path: Path) -> None:
    paths = draw(tmp_path, 20)
    for path in paths:
        path.rename(path.with_suffix(".off"))
    for path in paths:
        path.with_suffix(".off").rename(path)
        update(fresh(tmp_path / ".i"), tmp_path, StandIn())
    assert len(list((tmp_path / ".i").glob("*/part-*.safetensors"))) < 17
    check(fresh(tmp_path / ".i"), tmp_path)
    for path in paths[:18]:
        path.unlink()
    update(fresh(tmp_path / ".i"), tmp_path, StandIn())
    store = fresh(tmp_path / ".i")
    assert store.rows == len(store.entries) == 2
    check(store, tmp_path)


def test_one_update_at_a_time_and_one_model_an_index(tmp_path: Path) -> None:
    draw(tmp_path, 2)
    store = fresh(tmp_path / ".i")
    with store.lock(), pytest.raises(InputError, match="another process is updating"):
        update(store, tmp_path, StandIn())
    update(store, tmp_path, StandIn())
    other = {**StandIn.description, "fingerprint": StandIn.fingerprint[:-1] + "0"}
    with pytest.raises(InputError, match="another model"):
        open_index(tmp_path / ".i", other)
    file = store.folder / "index.json"
    file.write_text(file.read_text().replace(f'"format": {FORMAT}', '"format": 99').replace(f'"{CHECKSUM}"', '"other"'))
    with pytest.raises(InputError, match="format 99"):
        fresh(tmp_path / ".i")


def test_what_another_process_saved_in_the_meantime_is_kept(tmp_path: Path) -> None:
    paths = draw(tmp_path, 12)
    for path in paths:
        path.rename(path.with_suffix(".off"))
    early = fresh(tmp_path / ".i")
    for path in paths:  # so many parts that they are put together, twice
        path.with_suffix(".off").rename(path)
        update(fresh(tmp_path / ".i"), tmp_path, StandIn())
    late = fresh(tmp_path / ".i")
    for path in paths[:9]:
        path.unlink()
    update(fresh(tmp_path / ".i"), tmp_path, StandIn())
    for stale in (early, late):
        update(stale, tmp_path, model := StandIn())
        assert model.encoded == 0
        assert fresh(tmp_path / ".i").notices == []
        check(fresh(tmp_path / ".i"), tmp_path)


def test_an_index_that_cannot_be_written_says_what_to_do(tmp_path: Path) -> None:
    draw(tmp_path, 1)
    (tmp_path / ".i").write_text("a file in the way")
    with pytest.raises(InputError, match="--index"):
        update(fresh(tmp_path / ".i"), tmp_path, StandIn())


@pytest.mark.slow
def test_a_killed_command_continues(tmp_path: Path, student: Path) -> None:
    draw(tmp_path / "p", 400)
    code = "import clipdistill.search.update as u; u.SAVE_SECONDS = 0; u.update.__kwdefaults__['save_seconds'] = 0; "
    code += "from clipdistill.cli import main; import sys; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "search", str(tmp_path / "p"), "--model", str(student), "--batch-size", "4"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("p/.clip*/*/part-00000003.safetensors")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    encoded = int(done.stdout.split("photographs in the index; ")[1].split()[0])
    assert "400 photographs in the index" in done.stdout
    assert encoded < 400
