"""Write docs/reference/settings.md from the settings, so that the page cannot say anything else.

python scripts/settings_reference.py          # writes
python scripts/settings_reference.py --check  # exit code 1 when the page is out of date
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from api.settings import ApiSettings
from store.settings import Settings

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "settings.md"
ABOUT = """# Settings

Made by `python scripts/settings_reference.py` from `store.settings` and `api.settings`. Every process reads them once,
at its start, from its environment; all processes of one service must agree on them. A value that cannot be is refused
at the start, and the message names the variable. A secret may also be given as a file: `SEUF_SECRET_FILE=/path` in the
place of `SEUF_SECRET`.
"""
HEAD = "| variable | values | default | meaning |\n|---|---|---|---|"
BOUNDS = {Gt: ">", Ge: ">=", Lt: "<", Le: "<="}
WORDS = {str: "text", Path: "path", int: "integer", float: "number", bool: "true, false", SecretStr: "secret"}


def page() -> str:
    """The whole page."""
    own = ApiSettings.model_fields.keys() - Settings.model_fields.keys()
    every = [row(name, field) for name, field in Settings.model_fields.items()]
    api = [row(name, field) for name, field in ApiSettings.model_fields.items() if name in own]
    parts = [ABOUT, "## Of every process", "", HEAD, *every, "", "## Of the API alone", "", HEAD, *api, ""]
    return "\n".join(parts)


def row(name: str, field: FieldInfo) -> str:
    """One setting."""
    meaning = (field.description or "").replace("|", "\\|")  # a bar would end the cell
    assert meaning, f"{name} has no description"
    default = shown(field.default)
    return f"| `SEUF_{name.upper()}` | {values(field)} | {f'`{default}`' if default else ''} | {meaning} |"


def shown(default: Any) -> str:
    """A default as one would write it."""
    if isinstance(default, SecretStr):
        return default.get_secret_value()
    if isinstance(default, bool):
        return str(default).lower()
    return "" if default == () else str(default)


def values(field: FieldInfo) -> str:
    """What it may be, in words."""
    kind = field.annotation
    if get_args(kind) and get_origin(kind) is not tuple:
        return ", ".join(f"`{value}`" for value in get_args(kind) if value)
    bounds = [f"{BOUNDS[type(one)]} {number(one)}" for one in field.metadata if type(one) in BOUNDS]
    if get_origin(kind) is tuple:
        return "paths" if Path in get_args(kind) else "names"
    return " ".join([WORDS[kind], *bounds])  # type: ignore[index]


def number(bound: Any) -> Any:
    """Of a bound."""
    return next(getattr(bound, name) for name in ("gt", "ge", "lt", "le") if hasattr(bound, name))


def main() -> int:
    """Entry."""
    made = page()
    if "--check" in sys.argv:
        return int(not PAGE.exists() or PAGE.read_text(encoding="utf-8") != made)
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
