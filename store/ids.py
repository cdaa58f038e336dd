"""Identifiers: a prefix that says what it is, then 100 random bits in lower-case base32."""

import secrets

ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"


def random_base32(length: int) -> str:
    """`length` random characters, 5 bits each."""
    return "".join(secrets.choice(ALPHABET) for _ in range(length))


def new_id(prefix: str) -> str:
    """For example new_id("job") -> "job_" and 20 characters (100 bits: never seen twice)."""
    return f"{prefix}_{random_base32(20)}"
