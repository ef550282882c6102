"""Servers that fail: tried again, then one sentence with the object's name; never a hang, never a sample left out."""

from __future__ import annotations

import time

import pytest

from clipdistill.cli import main
from clipdistill.data.files import read_ahead
from clipdistill.data.loader import PairLoader
from clipdistill.data.open import open_pairs
from clipdistill.data.views import ImageSpec
from clipdistill.errors import ClipdistillError, InputError
from clipdistill.remote import RemoteError
from tests.data.helpers import FakeModel, encoded, sample_members, write_tar
from tests.remote.servers import FaultyProxy, found_at

FAULTS = [500, 502, 503, 429, 403, 404, 408, "reset", "short", "hang", "drip"]


@pytest.fixture
def served(web, shards):
    web.serve_folder(shards)
    return web


@pytest.fixture
def three_attempts(monkeypatch):
    monkeypatch.setenv("CLIPDISTILL_REMOTE_ATTEMPTS", "3")


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.sampled(2)
def test_one_failure_changes_nothing(fault, served, shards):
    near = open_pairs(str(shards))
    served.faults.append(fault)
    far = open_pairs(f"{served.url}/{{00000..00002}}.tar")
    assert far.fingerprint() == near.fingerprint()
    served.faults += [fault, fault]
    assert [far.image_bytes(i) for i in range(len(far))] == [near.image_bytes(i) for i in range(len(near))]
    assert not served.faults


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.sampled(2)
def test_an_object_that_always_fails_is_one_sentence(fault, served, three_attempts):
    far = open_pairs(f"{served.url}/{{00000..00002}}.tar")
    served.always["00001.tar"] = fault
    begun = time.monotonic()
    with pytest.raises(RemoteError, match=r"127\.0\.0\.1:\d+/00001\.tar") as caught:
        [far.image_bytes(i) for i in range(len(far))]
    assert "\n" not in str(caught.value)
    assert "3 attempts" in str(caught.value)
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize(
    ("fault", "most", "words"), [(503, 3, ""), ("reset", 3, ""), ("hang", 3, "no answer"), (403, 2, "is refused")]
)
@pytest.mark.parametrize(
    ("scheme", "package"),
    [("s3", "s3fs"), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in (("gs", "gcsfs"), ("az", "adlfs")))],
)
def test_only_we_try_a_store_again(scheme, package, fault, most, words, three_attempts, monkeypatch):
    """Its library would too: times ours, that took minutes until the sentence for a place that cannot be reached."""
    pytest.importorskip(package)
    monkeypatch.setenv("CLIPDISTILL_REMOTE_TIMEOUT", "1" if fault == "hang" else "10")
    url = f"{scheme}://pairs/a.json"
    with FaultyProxy("") as proxy, found_at(scheme, f"http://127.0.0.1:{proxy.server_address[1]}"):
        proxy.always = 404
        with pytest.raises(InputError, match=r"a\.json"):
            open_pairs(url)  # the library, and its client, take seconds to load
        proxy.always, proxy.spoilt, begun = fault, 0, time.monotonic()
        with pytest.raises(ClipdistillError, match=rf"{url}: .*{words}") as caught:
            open_pairs(url)
        assert time.monotonic() - begun < 9
    assert "\n" not in str(caught.value)
    # of one call: gcsfs asks for an object, then for a folder, aiohttp asks again at once where a connection breaks
    assert most <= proxy.spoilt <= most * (3 if scheme == "gs" else 1) * (2 if fault == "reset" else 1)


@pytest.mark.parametrize("fault", [500, 429, "reset", "hang"])
def test_a_shard_that_cannot_be_indexed_is_not_left_out(fault, served, three_attempts):
    served.always["00001.tar"] = fault
    with pytest.raises(ClipdistillError, match=r"/00001\.tar"):
        open_pairs(f"{served.url}/{{00000..00002}}.tar")


def test_a_missing_shard_and_a_refused_one_are_told_at_once(served):
    served.always["00001.tar"] = 403
    with pytest.raises(ClipdistillError, match=r"00001\.tar: access is refused \(HTTP 403"):
        open_pairs(f"{served.url}/{{00000..00002}}.tar")
    assert len([name for name, _ in served.asked if name == "00001.tar"]) <= 2
    served.always["00001.tar"] = 404
    with pytest.raises(InputError, match="1 of 3 shards do not exist"):
        open_pairs(f"{served.url}/{{00000..00002}}.tar")


@pytest.mark.parametrize("etags", [True, False])
def test_a_shard_that_changes_in_mid_run_is_told(etags, served, three_attempts):
    served.etags = etags
    far = open_pairs(f"{served.url}/{{00000..00002}}.tar")
    far.image_bytes(9)
    served.objects["00001.tar"] += b"\0" * 10240 if not etags else b""
    served.objects["00001.tar"] = served.objects["00001.tar"].replace(b"caption 9", b"caption !")
    with pytest.raises(RemoteError, match=r"00001\.tar changed since it was opened"):
        far.image_bytes(10)


def test_a_changed_shard_is_indexed_again_by_the_next_run(served, tmp_path):
    first = open_pairs(f"{served.url}/00001.tar")
    members = [m for k in range(5) for m in sample_members(k)]
    served.objects["00001.tar"] = write_tar(tmp_path / "new.tar", members).read_bytes()
    again = open_pairs(f"{served.url}/00001.tar")
    assert (len(first), len(again)) == (8, 5)
    assert again.image_bytes(4) == encoded(4)


def test_an_index_is_built_once_for_a_version(served):
    open_pairs(f"{served.url}/{{00000..00002}}.tar")
    served.asked.clear()
    open_pairs(f"{served.url}/{{00000..00002}}.tar")
    assert {wanted for _, wanted in served.asked} == {"bytes=0-4095"}


def test_headers_are_read_by_ranges_and_large_images_passed_over(web, tmp_path):
    members = [m for k in range(6) for m in ((f"{k}.jpg", bytes([k]) * 3_000_000), (f"{k}.txt", b"a caption"))]
    web.objects["large.tar"] = write_tar(tmp_path / "large.tar", members).read_bytes()
    far = open_pairs(f"{web.url}/large.tar")
    assert len(far) == 6
    assert web.sent["large.tar"] < 600_000
    assert far.image_bytes(5) == bytes([5]) * 3_000_000


def test_neighbours_are_one_request(served):
    far = open_pairs(f"{served.url}/{{00000..00002}}.tar")
    served.asked.clear()
    read_ahead(far, range(24))
    for i in range(24):
        far.image(i)
    assert len(served.asked) == 3


def test_a_set_of_a_mixture_is_fetched_ahead_beside_one_of_this_machine(served, shards):
    from clipdistill.data.open import open_training
    from clipdistill.data.pairs import DataConfig

    sets = [{"path": str(shards), "name": "near"}, {"path": f"{served.url}/{{00000..00002}}.tar", "name": "far"}]
    both = open_training(DataConfig(sets=sets))
    served.asked.clear()
    read_ahead(both, range(24))
    assert [both.image_bytes(i) for i in range(24)] == [both.image_bytes(24 + i) for i in range(24)]
    served.asked.clear()
    read_ahead(both, range(24, 48))
    assert [both.image_bytes(i) for i in range(24)] == [both.image_bytes(24 + i) for i in range(24)]
    assert len(served.asked) == 3


def test_images_of_a_folder_are_never_left_out_for_a_failure(web, everything, three_attempts):
    web.serve_folder(everything)
    far = open_pairs(f"{web.url}/pairs.csv")
    for fault in ("short", 500, "reset"):
        web.faults.append(fault)
        assert far.image_bytes(1) == web.objects["images/001.jpg"]
    web.always["images/001.jpg"] = 404
    with pytest.raises(RemoteError, match=r"images/001\.jpg"):
        far.image_bytes(1)


def test_a_row_group_is_never_left_out_for_a_failure(web, everything, three_attempts):
    web.serve_folder(everything)
    far = open_pairs(f"{web.url}/parquet")
    web.faults.append("short")
    assert far.image_bytes(0) == encoded(0)
    web.always["parquet/1.parquet"] = 500
    with pytest.raises(RemoteError, match=r"parquet/1\.parquet"):
        far.image_bytes(11)


def test_a_server_that_sends_whole_objects_only(web, shards):
    web.ranges = False
    web.serve_folder(shards)
    near, far = open_pairs(str(shards)), open_pairs(f"{web.url}/{{00000..00002}}.tar")
    web.asked.clear()
    assert [far.image_bytes(i) for i in range(24)] == [near.image_bytes(i) for i in range(24)]
    assert web.asked == []  # each was fetched once, when it was indexed


@pytest.mark.parametrize("workers", [0, 1])
def test_a_failure_in_a_worker_is_one_sentence(workers, served, three_attempts):
    far = open_pairs(f"{served.url}/{{00000..00002}}.tar")
    loader = PairLoader(far, batch_size=8, student=FakeModel(ImageSpec(size=16)), workers=workers, steps=9)
    batches = iter(loader)
    next(batches)
    served.always |= {f"{k:05d}.tar": 500 for k in range(3)}
    with pytest.raises(RemoteError) as caught:
        list(batches)
    said = str(caught.value)
    del batches, caught  # ends the workers
    assert said.startswith("http://127.0.0.1")
    assert "\n" not in said


def test_the_command_line_says_it_in_one_sentence(served, three_attempts, capsys, tmp_path):
    served.always["00001.tar"] = 500
    arguments = ["--recipe", "clip-kd", "--size", "debug", "--data", f"{served.url}/{{00000..00002}}.tar"]
    assert main(["train", *arguments, "--out", str(tmp_path / "run"), "--quiet"]) == 69
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("clipdistill: http://127.0.0.1")
    assert "/00001.tar: HTTP 500" in said[-1]


def test_secrets_of_a_url_are_not_told(web, three_attempts):
    web.objects["a.tar"] = b"x" * 2048
    web.always["a.tar"] = 500
    with pytest.raises(RemoteError) as caught:
        open_pairs(web.url.replace("http://", "http://me:secret@") + "/a.tar?signature=hidden")
    assert "secret" not in str(caught.value)
    assert "hidden" not in str(caught.value)
    assert web.headers[-1]["Authorization"].startswith("Basic ")


def test_an_address_where_nobody_listens(three_attempts):
    with pytest.raises(ClipdistillError, match=r"127\.0\.0\.1:1/x\.tar.*3 attempts"):
        open_pairs("http://127.0.0.1:1/x.tar")


def test_redirects_are_followed_and_passwords_stay(web, shards):
    from tests.remote.servers import WebServer

    near = open_pairs(str(shards / "00000.tar"))
    with WebServer({"x.tar": (shards / "00000.tar").read_bytes()}) as other:
        web.leads["00000.tar"] = other.url.replace("127.0.0.1", "localhost") + "/x.tar"
        far = open_pairs(web.url.replace("http://", "http://me:secret@") + "/00000.tar")
        assert [far.image_bytes(i) for i in range(8)] == [near.image_bytes(i) for i in range(8)]
        assert all("Authorization" in headers for headers in web.headers)
        assert not any("Authorization" in headers for headers in other.headers)


@pytest.mark.parametrize("place", ["file:///etc/passwd", "ftp://127.0.0.1/x", "/00000.tar"])
def test_a_redirect_to_elsewhere_or_in_a_circle_is_refused(place, web):
    web.leads["00000.tar"] = place
    with pytest.raises(ClipdistillError, match=r"00000\.tar: access is refused"):
        open_pairs(f"{web.url}/00000.tar")


def test_the_proxy_of_the_environment_is_used(served, shards, monkeypatch):
    monkeypatch.setenv("http_proxy", served.url)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    far = open_pairs("http://data.example/{00000..00002}.tar")
    assert far.fingerprint() == open_pairs(str(shards)).fingerprint()
