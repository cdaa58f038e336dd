"""Reads Dockerfile and docker-compose.yml for the tests of this folder, as Docker does where we use it."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]

# ${NAME:?message}, ${NAME:-default}; a bare $NAME or ${NAME} is not ours: it would be silently empty.
VARIABLE = re.compile(r"\$\$|\$\{(\w+):([?-])([^}]*)\}|\$")


@dataclass
class Stage:
    """One FROM of the Dockerfile: its name, what it starts from, and its (INSTRUCTION, text) pairs."""

    name: str
    parent: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def all(self, instruction: str) -> list[str]:
        """The texts of one kind of instruction, in order."""
        return [text for name, text in self.instructions if name == instruction]


def stages() -> dict[str, Stage]:
    """The stages of the Dockerfile by name. Raises ValueError on what Docker would not understand either."""
    found: dict[str, Stage] = {}
    current = Stage("", "")
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        instruction, _, rest = line.strip().partition(" ")
        if instruction not in {"ARG", "FROM", "ENV", "RUN", "COPY", "WORKDIR", "USER", "VOLUME", "EXPOSE"} | {
            "HEALTHCHECK",
            "CMD",
        }:
            raise ValueError(f"Not an instruction that this project uses: {instruction}")
        if instruction == "FROM":
            parent, _, name = rest.partition(" AS ")
            current = found[name] = Stage(name, parent)
        else:
            current.instructions.append((instruction, rest.strip()))
    return found


def interpolate(value: Any, given: dict[str, str]) -> Any:
    """`value` with its variables filled in; KeyError with the message of compose when one is missing."""
    if isinstance(value, dict):
        return {key: interpolate(part, given) for key, part in value.items()}
    if isinstance(value, list):
        return [interpolate(part, given) for part in value]
    return VARIABLE.sub(lambda match: _filled(match, given), value) if isinstance(value, str) else value


def _filled(match: re.Match[str], given: dict[str, str]) -> str:
    if match.group() == "$$":
        return "$"
    name, kind, rest = match.groups()
    if name is None:
        raise ValueError(f"{match.string!r}: write ${{NAME:?message}}, ${{NAME:-default}} or $$")
    if given.get(name):
        return given[name]
    if kind == "?":
        raise KeyError(f"{name}: {rest}")
    return str(rest)


def compose(given: dict[str, str]) -> dict[str, Any]:
    """docker-compose.yml with merges, anchors and variables resolved."""
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
    filled: dict[str, Any] = interpolate(loaded, given)
    return filled
