"""A server that speaks S3: workers, changed and missing objects, wrong names, a server that ends."""

from __future__ import annotations

import os
import time

import pytest

boto3 = pytest.importorskip("boto3")
pytest.importorskip("s3fs")
pytest.importorskip("moto")

from clipdistill.data.loader import PairLoader  # noqa: E402
from clipdistill.data.open import open_pairs  # noqa: E402
from clipdistill.data.views import ImageSpec  # noqa: E402
from clipdistill.errors import ClipdistillError, InputError  # noqa: E402
from clipdistill.remote import RemoteError, local_cache, store  # noqa: E402
from tests.data.helpers import FakeModel  # noqa: E402
from tests.remote.servers import FaultyProxy, fill_bucket, s3_server  # noqa: E402


@pytest.fixture
def bucket(shards, monkeypatch):
    """A server of the test's own, with the shards in the bucket `own`."""
    monkeypatch.setenv("CLIPDISTILL_REMOTE_TIMEOUT", "3")
    monkeypatch.setenv("CLIPDISTILL_REMOTE_ATTEMPTS", "2")
    with s3_server("own"):
        fill_bucket(shards, "own")
        yield boto3.client("s3")


@pytest.mark.parametrize(
    ("workers", "start"), [(0, None), (2, "fork"), pytest.param(2, "spawn", marks=pytest.mark.slow)]
)
def test_workers_get_the_same_batches(workers, start, bucket, shards):
    near, far = open_pairs(str(shards)), open_pairs("s3://own/{00000..00002}.tar")
    settings = {"batch_size": 5, "student": FakeModel(ImageSpec(size=16)), "steps": 9, "seed": 3}
    ours = PairLoader(far, workers=workers, start_method=start, **settings)
    for a, b in zip(PairLoader(near, **settings), ours, strict=True):
        assert a.keys == b.keys
        assert a.student_images.equal(b.student_images)
        assert b.problems == []


@pytest.fixture
def proxy(bucket, monkeypatch):
    """The same server behind a proxy that spoils requests, named by the environment's endpoint."""
    with FaultyProxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_address[1]}")
        store._stores.clear()
        yield proxy
        store._stores.clear()


def test_requests_that_a_proxy_spoils_are_made_again(proxy, shards):
    far, near = open_pairs("s3://own/{00000..00002}.tar"), open_pairs(str(shards))
    for spoilt, fault in enumerate((500, 503, "slow", "reset"), 1):
        proxy.faults = [fault]
        assert [far.image_bytes(i) for i in (spoilt, 22 - spoilt)] == [
            near.image_bytes(i) for i in (spoilt, 22 - spoilt)
        ]
        assert proxy.spoilt == spoilt


@pytest.mark.slow
@pytest.mark.parametrize("fault", [500, 503, "reset"])
def test_a_store_that_always_fails_is_one_sentence(fault, proxy):
    far = open_pairs("s3://own/{00000..00002}.tar")
    proxy.always = fault
    with pytest.raises(RemoteError, match=r"s3://own/00001\.tar") as told:
        far.image_bytes(9)
    assert "\n" not in str(told.value)


def test_an_object_that_changes_is_told(bucket):
    far = open_pairs("s3://own/{00000..00002}.tar")
    far.image_bytes(9)
    content = bucket.get_object(Bucket="own", Key="00001.tar")["Body"].read()
    bucket.put_object(Bucket="own", Key="00001.tar", Body=content.replace(b"caption 9", b"caption !"))
    with pytest.raises(RemoteError, match=r"s3://own/00001\.tar changed since it was opened"):
        far.image_bytes(10)
    assert open_pairs("s3://own/00001.tar").captions(1) == ("caption !",)


def test_an_object_that_is_removed_is_told(bucket):
    far = open_pairs("s3://own/{00000..00002}.tar")
    bucket.delete_object(Bucket="own", Key="00001.tar")
    with pytest.raises(RemoteError, match=r"s3://own/00001\.tar: gone since it was opened"):
        far.image_bytes(9)


def test_copies_serve_when_the_server_has_ended(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPDISTILL_REMOTE_TIMEOUT", "2")
    monkeypatch.setenv("CLIPDISTILL_REMOTE_ATTEMPTS", "2")
    near = open_pairs(str(shards))
    for name in ("CLIPDISTILL_LOCAL_CACHE", "CLIPDISTILL_LOCAL_CACHE_SIZE"):
        monkeypatch.setenv(name, "")
    with s3_server("own") as url:
        fill_bucket(shards, "own")
        local_cache(tmp_path / "copies", "1GB")
        far = open_pairs("s3://own/{00000..00001}.tar")
        far.image_bytes(0), far.image_bytes(8)
        other = open_pairs("s3://own/00002.tar")
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)  # not that of another test's server, which knows the bucket too
    assert [far.image_bytes(i) for i in range(16)] == [near.image_bytes(i) for i in range(16)]
    begun = time.monotonic()
    with pytest.raises(RemoteError, match=r"s3://own/00002\.tar"):
        other.image_bytes(0)
    assert time.monotonic() - begun < 30


@pytest.mark.parametrize("name", ["s3://own/missing.tar", "s3://nowhere/00000.tar", "s3://own/none/"])
def test_what_is_not_there_is_one_sentence(name, bucket):
    with pytest.raises(InputError, match="nothing of that name") as caught:
        open_pairs(name)
    assert "\n" not in str(caught.value)


def test_missing_credentials_are_one_sentence(bucket, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("clipdistill.remote.store._stores", {})
    with pytest.raises(ClipdistillError, match="credentials"):
        open_pairs("s3://own/00000.tar")
