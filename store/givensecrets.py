"""Secrets that somebody gives: in a variable, or in the file that SEUF_..._FILE names; and which are too weak."""

import os
from pathlib import Path
from typing import Any, Final

from pydantic import SecretStr
from pydantic.fields import FieldInfo
from pydantic_settings import PydanticBaseSettingsSource
from sqlalchemy import make_url

MIN_CHARACTERS: Final = 32
MAKE: Final = "`openssl rand -hex 32` makes one."
# Beginnings of what manuals and examples have in the place of a secret.
_EXAMPLES: Final = (
    "changeme",
    "change-me",
    "change_me",
    "secret",
    "password",
    "default",
    "example",
    "your",
    "set it to",
)


def weakness(secret: str) -> str | None:
    """Why this is no secret to check keys with, or None. Never quotes it."""
    if len(secret) < MIN_CHARACTERS:
        return f"has {len(secret)} characters, fewer than {MIN_CHARACTERS}"
    if secret.lower().startswith(_EXAMPLES):
        return "begins like the example of a manual"
    if len(set(secret)) < 10:
        return "has hardly any different characters"
    return None


def with_password(url: str, password: str) -> str:
    """The address with this password; one that stands in it already is kept."""
    parsed = make_url(url)
    if not password or parsed.password is not None:
        return url
    if parsed.username is None and not parsed.drivername.startswith("redis"):
        raise ValueError("A password without a user. Name the user in the address, as in postgresql://seuf@host/seuf.")
    # "default" is who Redis means when no user is named.
    named = parsed.set(username=parsed.username or "default", password=password)
    return named.render_as_string(hide_password=False)


class SecretFiles(PydanticBaseSettingsSource):
    """SEUF_<NAME>_FILE for every setting that is a secret, as container platforms mount them."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """The content of the file, without the line's end. ValueError if value and file are both given."""
        variable = f"{self.config.get('env_prefix', '')}{field_name}".upper()
        path = os.environ.get(f"{variable}_FILE")
        if field.annotation is not SecretStr or not path:
            return None, field_name, False
        if os.environ.get(variable):
            raise ValueError(f"{variable} and {variable}_FILE are both set. Unset one of them.")
        return Path(path).read_text(encoding="utf-8").rstrip("\r\n"), field_name, False

    def __call__(self) -> dict[str, Any]:
        """Every secret that has a file."""
        found = {
            name: self.get_field_value(field, name)[0]
            for name, field in self.settings_cls.model_fields.items()
        }
        return {name: value for name, value in found.items() if value is not None}
