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

from seuf_core.method import GROUPS, PRESETS, RELATIVE_RATES, Method

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "method.md"
ABOUT = """# The fields of a method

Made by `python scripts/method_reference.py` from `seuf_core.method`; what they do stands in
[the method](../explanation/method.md), which to take in [Choose a method](../how-to/choose-a-method.md). The same
fields are the `method` of `POST /jobs`, the arguments of `seuf_core.Method`, and options of `seuf run`, `seuf submit`
and `seuf attribute`, there with dashes: `--npo-beta 0.2`. A field that is not given has its default, unless the
preset sets it or it follows another field."""


def page() -> str:
    """The whole page."""
    schema = Method.model_json_schema()
    lines = [ABOUT]
    for name, field in schema["properties"].items():
        if name in GROUPS:
            lines += [
                "",
                f"## {GROUPS[name]}",
                "",
                "| field | values | default | meaning |",
                "|---|---|---|---|",
            ]
        lines.append(row(name, field, schema))
    lines += ["", "## Presets", "", "| preset | sets |", "|---|---|"]
    for name, fields in PRESETS.items():
        lines.append(
            f"| `{name}` | {', '.join(f'`{k}: {v}`' for k, v in fields.items()) or 'the defaults above'} |"
        )
    lines += [
        "",
        "## Rates of learning_rate: auto",
        "",
        "Times the root mean square of the trained weights, in the order tried.",
        "",
        "| scope | rates |",
        "|---|---|",
    ]
    for name, rates in RELATIVE_RATES.items():
        lines.append(
            f"| {'`full`' if name == 'full' else 'others'} | {', '.join(f'{rate:g}' for rate in rates)} |"
        )
    return "\n".join([*lines, ""])


def row(name: str, field: dict[str, Any], schema: dict[str, Any]) -> str:
    """One field as a row of the table."""
    value = Method.model_fields[name].get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        value = " / ".join(str(part) for part in value.model_dump().values())
    default = value if isinstance(value, str) else json.dumps(value)
    meaning = field.get("description", "").replace("|", "\\|")  # a bar would end the cell
    return f"| `{name}` | {values(field, schema)} | `{default}` | {meaning} |"


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
    if field.get("type") == "array":
        least, most = field.get("minItems", 0), field.get("maxItems", "any number")
        return f"{least} to {most} of {values(field['items'], schema)}"
    if field.get("type") == "string":
        return f"text of {field.get('minLength', 0)} to {field['maxLength']} characters"
    low = field.get("minimum", field.get("exclusiveMinimum"))
    high = field.get("maximum", field.get("exclusiveMaximum"))
    bounds = "" if low is None else f" {'>' if 'exclusiveMinimum' in field else '>='} {low:.10g}"
    bounds += "" if high is None else f", {'<' if 'exclusiveMaximum' in field else '<='} {high:.10g}"
    return f"{field.get('type', '')}{bounds}"


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(PAGE.read_text() != page())
    PAGE.write_text(page())
