"""The teachers of the cache's tests, on one thread as there."""

from tests.cache.conftest import _one_thread, teacher

__all__ = ["_one_thread", "teacher"]
