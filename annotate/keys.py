"""What the browser calls a slot: a number that tells nothing of when the slot was made.

Slots are numbered as they are made, and those of checks and repeats are made late, so the bare numbers would
give them away. A key is `slot-lease`, a token `slot-lease-attempt`; only the slot is hidden. The numbers from
FIRST on are a permutation of the slots (a Feistel network, Luby and Rackoff 1988) that needs the secret.
"""

import hashlib
import hmac

FIRST = 10**14
HALF = 23
"""Bits: slots below 2^46, so that a hidden one has 15 digits."""
MASK = (1 << HALF) - 1
ROUNDS = range(6)


def hidden(secret: str, key: str) -> str:
    """The key or token with its slot hidden."""
    slot, rest = _parted(key)
    left, right = slot >> HALF, slot & MASK
    for number in ROUNDS:
        left, right = right, left ^ _mix(secret, number, right)
    return f"{FIRST + (left << HALF | right)}-{rest}"


def plain(secret: str, key: str) -> str:
    """The key or token with its slot as the database has it; one that is not hidden stays."""
    number, rest = _parted(key)
    if not FIRST <= number < FIRST + (1 << 2 * HALF):
        return key
    left, right = number - FIRST >> HALF, number - FIRST & MASK
    for place in reversed(ROUNDS):
        left, right = right ^ _mix(secret, place, left), left
    return f"{left << HALF | right}-{rest}"


def _parted(key: str) -> tuple[int, str]:
    slot, _, rest = key.partition("-")
    return int(slot), rest


def _mix(secret: str, place: int, half: int) -> int:
    text = f"{place} {half}".encode()
    return int.from_bytes(hmac.digest(secret.encode(), text, hashlib.sha256)[:3], "big") & MASK
