"""What the browser calls a slot: a number that tells nothing of when it was made, or how often it was shown.

Slots are numbered as they are made, and those of checks and repeats are made late and never taken over: the
bare numbers and leases would give them away. A key is `slot-lease`, a token `slot-lease-attempt`. Hidden,
the number holds both, and 0 stands for the lease. The numbers from FIRST on are a permutation (a Feistel
network, Luby and Rackoff 1988) that needs the secret.
"""

import hashlib
import hmac
from functools import lru_cache

FIRST = 10**18
HALF = 31
"""Bits: slot and lease below 2^62 together, so that a hidden one has 19 digits."""
MASK = (1 << HALF) - 1
LEASE = 20
"""Bits of them for the lease."""
ROUNDS = range(6)


@lru_cache(maxsize=2**14)  # a page is told of the same tasks several times
def hidden(secret: str, key: str) -> str:
    """The key or token with its slot and lease hidden."""
    slot, lease, rest = _parted(key)
    number = slot << LEASE | lease
    left, right = number >> HALF, number & MASK
    for place in ROUNDS:
        left, right = right, left ^ _mix(secret, place, right)
    return f"{FIRST + (left << HALF | right)}-0{rest}"


def is_hidden(key: str) -> bool:
    number, lease, _ = _parted(key)
    return lease == 0 and FIRST <= number < FIRST + (1 << 2 * HALF)


def plain(secret: str, key: str) -> str:
    """The key or token with slot and lease as the database has them; one that is not hidden stays."""
    if not is_hidden(key):
        return key
    number, _, rest = _parted(key)
    left, right = number - FIRST >> HALF, number - FIRST & MASK
    for place in reversed(ROUNDS):
        left, right = right ^ _mix(secret, place, left), left
    number = left << HALF | right
    return f"{number >> LEASE}-{number & (1 << LEASE) - 1}{rest}"


def _parted(key: str) -> tuple[int, int, str]:
    slot, lease, *rest = key.split("-")
    return int(slot), int(lease), "".join(f"-{attempt}" for attempt in rest)


def _mix(secret: str, place: int, half: int) -> int:
    text = f"{place} {half}".encode()
    return int.from_bytes(hmac.digest(secret.encode(), text, hashlib.sha256)[:4], "big") & MASK
