"""Alembic migrations of store.tables: `python -m migrations upgrade`."""
