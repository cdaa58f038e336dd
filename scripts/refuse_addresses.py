"""Refuse files that name a path of somebody's machine or the address of a package registry.

usage: python scripts/refuse_addresses.py FILE...
Both break on the next machine: a path that is not there, a registry that is not reached. Where a registry
must be named (a build argument, pip's own settings) the person who runs the build gives it.
"""

import re
import sys
from pathlib import Path

RULES: dict[str, re.Pattern[str]] = {
    "a path of one machine": re.compile(
        r"(?<![\w}.*)/-])/(?:work|root|home/\w+|Users/\w+)/|/tmp/\w|(?<!\w)\.librar[y]\b"
    ),
    "a registry's address": re.compile(
        r"\b(?:pypi\.org|pythonhosted\.org|download\.pytorch\.org|registry\.npmjs\.org|registry\.yarnpkg\.com"
        r"|proxy\.golang\.org|index\.crates\.io|static\.crates\.io|deb\.debian\.org)"
    ),
}


def offences(path: Path) -> list[str]:
    """Every line of `path` that breaks a rule, as "path:line: rule: match"; none if it is not text."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return []
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        for rule, pattern in RULES.items():
            match = pattern.search(line)
            if match:
                found.append(f"{path}:{number}: {rule}: {match.group()}")
    return found


def main() -> int:
    """Print the offences of the files named on the command line; 1 if there is one."""
    found = [offence for name in sys.argv[1:] for offence in offences(Path(name))]
    for offence in found:
        print(offence)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
