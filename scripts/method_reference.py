"""Write docs/reference/method.md from seuf_core.method, so that the page cannot say anything else.

python scripts/method_reference.py          # writes
python scripts/method_reference.py --check  # exit code 1 when the page is out of date
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from seuf_core.method import LADDERS, PRESETS, Method

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "method.md"


def page() -> str:
    """The whole page."""
    schema = Method.model_json_schema()
    rows = [row(name, field, schema) for name, field in schema["properties"].items()]
    presets = [
        f"| `{name}` | {', '.join(f'`{k}: {v}`' for k, v in fields.items()) or 'the defaults above'} |"
        for name, fields in PRESETS.items()
    ]
    ladders = [
        f"| `{name}` | {', '.join(f'{rate:g}' for rate in rates)} |" for name, rates in LADDERS.items()
    ]
    return "\n".join(
        [
            "# The fields of a method",
            "",
            "Made by `python scripts/method_reference.py` from `seuf_core.method`; what they do stands in",
            "[the method](../explanation/method.md). The same fields are the `method` of `POST /jobs`, the",
            "arguments of `seuf_core.Method` and `--set name=value` of `seuf run` and `seuf submit`. A field that",
            "is not given has its default, unless the preset sets it.",
            "",
            "| field | values | default | meaning |",
            "|---|---|---|---|",
            *rows,
            "",
            "## Presets",
            "",
            "| preset | sets |",
            "|---|---|",
            *presets,
            "",
            "## Ladders of learning_rate: auto",
            "",
            "| scope | rates, in the order tried |",
            "|---|---|",
            *ladders,
            "",
        ]
    )


def row(name: str, field: dict[str, Any], schema: dict[str, Any]) -> str:
    """One field as a row of the table."""
    value = Method.model_fields[name].get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        value = " / ".join(str(part) for part in value.model_dump().values())
    default = f"`{json.dumps(value)}`".replace('"', "")
    return f"| `{name}` | {values(field, schema)} | {default} | {field.get('description', '')} |"


def values(field: dict[str, Any], schema: dict[str, Any]) -> str:
    """The allowed values in words."""
    if "anyOf" in field:
        return " or ".join(values(part, schema) for part in field["anyOf"])
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if "$ref" in field:
        parts = schema["$defs"][field["$ref"].rsplit("/", 1)[1]]["properties"]
        return "shares " + ", ".join(f"`{part}`" for part in parts)
    low = field.get("minimum", field.get("exclusiveMinimum"))
    high = field.get("maximum", field.get("exclusiveMaximum"))
    bounds = "" if low is None else f" {'>' if 'exclusiveMinimum' in field else '>='} {low:g}"
    bounds += "" if high is None else f", {'<' if 'exclusiveMaximum' in field else '<='} {high:g}"
    return f"{field.get('type', '')}{bounds}"


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(PAGE.read_text() != page())
    PAGE.write_text(page())
