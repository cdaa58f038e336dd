"""What a job is held against: the smallest FastAPI + SQLAlchemy service that keeps a document of the same size.

No key, no tenant, no audit, no events, no outbox: POST is one insert, GET one select by primary key. Run by uvicorn
like ours, on the same database.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, ConfigDict
from sqlalchemy import JSON, DateTime, String, create_engine, event, make_url
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

url = make_url(os.environ["BARE_DATABASE_URL"])
engine = create_engine(url.set(drivername="postgresql+psycopg") if url.drivername == "postgresql" else url)
if url.get_backend_name() == "sqlite":
    # As ours has it; without it a reader would wait for a writer.
    event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA journal_mode = WAL"))


class Base(DeclarativeBase):
    """Of one table."""


class Thing(Base):
    """A document with an id."""

    __tablename__ = "things"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    status: Mapped[str] = mapped_column(String(16))
    created_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    document: Mapped[dict[str, Any]] = mapped_column(JSON)


class ThingIn(BaseModel):
    """What is posted."""

    document: dict[str, Any]


class ThingOut(BaseModel):
    """What is answered."""

    model_config = ConfigDict(from_attributes=True)
    id: str
    status: str
    created_at: datetime
    document: dict[str, Any]


Base.metadata.create_all(engine)
app = FastAPI()


@app.get("/healthz")
def healthz() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@app.post("/things", status_code=202)
def create(body: ThingIn) -> ThingOut:
    """One insert."""
    row = Thing(id=uuid4().hex, status="queued", created_at=datetime.now(UTC), document=body.document)
    with Session(engine, expire_on_commit=False) as session:
        session.add(row)
        session.commit()
    return ThingOut.model_validate(row)


@app.get("/things/{thing_id}")
def get(thing_id: str) -> ThingOut:
    """One select by primary key."""
    with Session(engine) as session:
        row = session.get(Thing, thing_id)
        if row is None:
            raise HTTPException(404)
        return ThingOut.model_validate(row)
