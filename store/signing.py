"""The key that signs heads of the audit log: ed25519, in a file that only the service reads.

A process that only shows the public key (the API) may be given a file of that alone.
"""

from pathlib import Path
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from store.errors import StoreError
from store.secretfile import read_or_make
from store.settings import Settings

_MAKE: Final = "`openssl genpkey -algorithm ed25519 -out audit-key.pem` makes one."


class KeyFileError(StoreError):
    """The key file is missing, or holds something else."""

    code = "audit_key_unreadable"


def private_key(settings: Settings) -> Ed25519PrivateKey | None:
    """What heads are signed with; None: this service has no key file, or one of the public key only.

    A service on one machine makes its key on first use. KeyFileError for a file that holds no such key.
    """
    pem = _pem(settings)
    if pem is None or b"PUBLIC KEY" in pem:
        return None
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _unreadable(settings) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise _unreadable(settings)
    return key


def public_key(settings: Settings) -> Ed25519PublicKey | None:
    """What heads are checked with; None: this service has no key file."""
    private = private_key(settings)
    if private is not None:
        return private.public_key()
    pem = _pem(settings)
    if pem is None:
        return None
    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise _unreadable(settings) from error
    if not isinstance(key, Ed25519PublicKey):
        raise _unreadable(settings)
    return key


def as_pem(key: Ed25519PublicKey) -> str:
    """The public key as openssl reads it."""
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def _pem(settings: Settings) -> bytes | None:
    if settings.audit_key_file:
        try:
            return Path(settings.audit_key_file).read_bytes()
        except OSError as error:
            raise _unreadable(settings) from error
    # Many machines would make many keys.
    return read_or_make(settings.data_dir / "audit-key", _new) if settings.lane == "database" else None


def _new() -> bytes:
    key = Ed25519PrivateKey.generate()
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _unreadable(settings: Settings) -> KeyFileError:
    where = settings.audit_key_file or settings.data_dir / "audit-key"
    return KeyFileError(f"{where} is not a readable PEM file of an ed25519 key.", _MAKE)
