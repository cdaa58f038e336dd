"""pytest-alembic's checks of the migrations as a whole, on both databases."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from alembic.config import Config
from pytest_alembic.tests import (
    test_model_definitions_match_ddl,
    test_single_head_revision,
    test_up_down_consistency,
    test_upgrade,
)
from sqlalchemy import Engine

from store import migrate
from store.database import Database

__all__ = [
    "test_model_definitions_match_ddl",
    "test_single_head_revision",
    "test_up_down_consistency",
    "test_upgrade",
]


@pytest.fixture
def alembic_config(empty_database_url: str) -> Config:
    """As store.migrate has it."""
    return migrate.alembic_config(empty_database_url)


@pytest.fixture
def alembic_engine(empty_database_url: str) -> Iterator[Engine]:
    """What the checks look at the result with."""
    database = Database(empty_database_url)
    yield database.writing_engine
    database.dispose()
