"""Errors a person is meant to read: each names the offender, the rule and the fix.

Torch-free, so that the HTTP side can turn them into problem details without loading the library.
"""

from __future__ import annotations


class SeufError(Exception):
    """Base of every error of this library.

    Args:
        code: stable snake_case name, safe to match on in client code.
        message: one sentence naming the offender and the rule it broke.
        fix: one sentence saying what to do, or None when nothing can be done.
        pointer: JSON pointer into the request or config that caused it, when there is one.
    """

    def __init__(self, code: str, message: str, fix: str | None = None, pointer: str | None = None) -> None:
        super().__init__(message if fix is None else f"{message} {fix}")
        self.code = code
        self.message = message
        self.fix = fix
        self.pointer = pointer


class DataError(SeufError):
    """A forget, retain or evaluation set breaks a rule of seuf_core.data.records."""


class ModelError(SeufError):
    """A folder cannot be used as a base model."""


class MethodError(SeufError):
    """A method cannot be carried out on this model and these data."""


class WriteError(SeufError):
    """A checkpoint could not be written or did not read back as planned."""


class Cancelled(SeufError):  # noqa: N818 - an outcome somebody asked for, not a fault
    """The observer asked to stop; the last training checkpoint is on disk."""

    def __init__(self) -> None:
        super().__init__("cancelled", "The run was cancelled.", "Start it again to continue from its last step.")
