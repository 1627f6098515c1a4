"""What tells whether samples are those of before: digests of all of them, in their order and in any."""

import hashlib
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

_BYTES = 16


@dataclass(frozen=True)
class Fingerprint:
    """count: of the samples. ordered: changes with any sample and with their order. unordered: not with
    that."""

    count: int
    ordered: str
    unordered: str


def fingerprint_of(samples: Iterable[Any]) -> Fingerprint:
    """Of samples of any kind: of all that they hold. 400,000 samples of 250 tokens take some
    15 seconds on one core, far less than to tokenise them."""
    count, total, whole = 0, 0, hashlib.blake2b(digest_size=_BYTES)
    for sample in samples:
        digest = _digest(sample)
        whole.update(digest)
        total += int.from_bytes(digest, "little")
        count += 1
    unordered = (total % (1 << 8 * _BYTES)).to_bytes(_BYTES, "little")
    return Fingerprint(count, whole.hexdigest(), unordered.hex())


def _digest(sample: Any) -> bytes:
    content = getattr(sample, "content", None)
    values = content() if content else [getattr(sample, field.name) for field in fields(sample)]
    digest = hashlib.blake2b(digest_size=_BYTES)
    for value in values:
        data = _bytes(value)
        digest.update(len(data).to_bytes(8, "little"))  # so that no two lists of values look alike
        digest.update(data)
    return digest.digest()


def _bytes(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, list):
        try:
            return array("i", value).tobytes()
        except (TypeError, OverflowError):  # no list of token numbers
            pass
    return repr(value).encode("utf-8", "surrogatepass")
