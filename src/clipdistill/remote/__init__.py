"""Data on other machines by their URL (s3, gs, az, https, hf, memory: any of fsspec's), and tars out of a `pipe:`.

The core asks `remote_path` for a name that is a URL and goes on as with a pathlib.Path; what is read is one version of
an object, in ranges, retried, and in the order in which it would be read from a disk.
"""

from clipdistill.registry import lazy_package

__getattr__ = lazy_package(
    __name__,
    {
        "clipdistill.remote.path": "RemotePath read_ahead",
        "clipdistill.remote.names": "remote_path typed",
        "clipdistill.remote.pipe": "allow_pipe",
        "clipdistill.remote.copies": "local_cache",
        "clipdistill.remote.retry": "RemoteError",
    },
)
