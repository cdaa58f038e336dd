"""The served API of tests/serving.py, on SQLite: the client cannot tell the databases apart."""

from tests.serving import served_on_sqlite as served
from tests.serving import tenant, tiny_model

__all__ = ["served", "tenant", "tiny_model"]
