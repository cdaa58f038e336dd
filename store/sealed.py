"""Secrets at rest: encrypted with a key derived from the service's secret, so that a copy of the database alone
gives none away.
"""

import secrets
from base64 import b64encode, urlsafe_b64encode
from typing import Final

from cryptography.fernet import Fernet, InvalidToken
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from store.errors import StoreError

PREFIX: Final = "whsec_"
"""What Standard Webhooks has secrets begin with, before 24 to 64 bytes in base64."""
_USE: Final = b"seuf webhook secrets v1"  # another use gets another key


def new_secret() -> str:
    """A secret that a webhook's messages are signed with: 32 random bytes."""
    return PREFIX + b64encode(secrets.token_bytes(32)).decode()


class SealedError(StoreError):
    """The service's secret is not the one that this was encrypted with."""

    code = "sealed_with_another_secret"

    def __init__(self) -> None:
        super().__init__(
            "The secret of a webhook was encrypted under another SEUF_SECRET.",
            "Bring that secret back, or rotate the webhook's.",
        )


class Sealer:
    """Encrypts and decrypts short texts (Fernet: AES-128-CBC with HMAC-SHA256)."""

    def __init__(self, secret: bytes) -> None:
        """`secret`: Settings.secret_bytes()."""
        key = HKDF(SHA256(), 32, salt=None, info=_USE).derive(secret)
        self._fernet = Fernet(urlsafe_b64encode(key))

    def seal(self, text: str) -> str:
        """Encrypted, another time another result."""
        return self._fernet.encrypt(text.encode()).decode()

    def open(self, sealed: str) -> str:
        """What was sealed; SealedError under another secret."""
        try:
            return self._fernet.decrypt(sealed.encode()).decode()
        except InvalidToken as error:
            raise SealedError from error
