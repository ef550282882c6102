"""What the service takes on: sizes of requests, of batches and of the queue."""

from __future__ import annotations

from dataclasses import dataclass, fields

from clipdistill.errors import InputError

CONNECTIONS = 256
"""Open at a time; more are told to come back."""
HEADER_SECONDS, BODY_SECONDS, WRITE_SECONDS = 10.0, 30.0, 30.0
"""For the whole of a request's headers, for the whole of its body, and for a client to take its answer."""
LONGEST_HEADERS = 64 << 10
LONGEST_TEXT = 2000
"""Characters of one text. Byte-pair merging of one long word takes time in the square of its length."""
LARGEST_VALUES = 100_000
"""Commas and brackets of a JSON body: each value takes memory of its own, however short it is written."""
BODIES_AT_ONCE = 8
"""The bodies that are arriving or being looked at hold this many times the largest one together."""
LABELS_KEPT = 2048
"""Label texts whose embeddings are remembered."""


@dataclass(frozen=True)
class ServiceLimits:
    """Settings of the service. Raises InputError for numbers that do not fit together."""

    batch_size: int = 32
    """Pictures, or texts, that go through a tower together at most."""
    wait_ms: float = 5.0
    """Milliseconds that the first of a batch waits for more."""
    queue: int = 256
    """Pictures that may be on their way; beyond it the answer is 429."""
    timeout: float = 30.0
    """Seconds from a request's last byte to its answer."""
    pictures: int = 64
    """Of one request."""
    texts: int = 1024
    """Of one request; of a classification, labels times templates."""
    megabytes: int = 32
    """MiB of one request."""
    pixels: int = 25_000_000
    """Of one picture."""

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            least = 0 if setting.name == "wait_ms" else 1e-3 if setting.name == "timeout" else 1
            if not least <= value <= 1_000_000_000:
                option = setting.name.replace("_", "-")
                raise InputError(f"--{option} must be a number from {least:g} to a billion, got {value}")
        if self.wait_ms >= 1000 * self.timeout:
            raise InputError(
                f"--wait-ms {self.wait_ms:g} is no less than --timeout {self.timeout:g} s: a picture that comes alone "
                "would never be answered"
            )
        if self.queue < self.pictures:
            raise InputError(
                f"--queue {self.queue} is below --pictures {self.pictures}: a request of that size would never be taken"
            )

    @property
    def bytes(self) -> int:
        """Of one request's body."""
        return self.megabytes << 20

    @property
    def text_queue(self) -> int:
        """Texts that may be on their way."""
        return max(self.queue, 4 * self.texts)
