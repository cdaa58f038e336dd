"""The served API of tests/serving.py."""

from tests.serving import served, tenant, tiny_model

__all__ = ["served", "tenant", "tiny_model"]
