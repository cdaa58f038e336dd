"""Errors of the command line: one line that says what is wrong and what to do, and exit code 1."""

from __future__ import annotations


class CommandError(Exception):
    """Something the user can put right."""

    def __init__(self, message: str, fix: str | None = None) -> None:
        super().__init__(message)
        self.fix = fix


def explain(error: BaseException) -> str | None:
    """The line for an error that a user is meant to read; None for one that is a fault of ours.

    Classes are known by name, so that a command loads no library it did not use.
    """
    kinds = {kind.__module__.partition(".")[0] + "." + kind.__name__ for kind in type(error).__mro__}
    if kinds & {"cli.CommandError", "client.ClientError", "seuf_core.SeufError", "store.StoreError"}:
        message = str(getattr(error, "message", None) or error)
        return _line(message, getattr(error, "fix", None))
    if "pydantic_core.ValidationError" in kinds:
        return _line(_validation(error), None)
    if isinstance(error, OSError) and error.filename is not None:
        return _line(f"{error.filename}: {error.strerror}.", None)
    return None


def _line(message: str, fix: str | None) -> str:
    return " ".join(f"{message} {fix or ''}".split())


def _validation(error: BaseException) -> str:
    """The first broken field, by its name."""
    first = error.errors()[0]  # type: ignore[attr-defined]  # pydantic's, known by name only
    # A part such as "literal['auto']" names a branch of a union, not a field.
    where = ".".join(
        str(part) for part in first["loc"] if "[" not in str(part) and "constrained" not in str(part)
    )
    message = str(first["msg"]).removeprefix("Value error, ")
    given = f" (it is {first['input']!r})" if isinstance(first["input"], (int, float, str)) else ""
    return f"{where}: {message}{given}." if where else f"{message}{given}."
