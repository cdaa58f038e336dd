"""Registered base models of one tenant."""

from typing import Any

from sqlalchemy import or_

from store.errors import NameTakenError
from store.ids import new_id
from store.repository import Page, Repository
from store.tables import Model


class Models(Repository):
    """The models of one tenant."""

    def create(self, name: str, path: str, digest: str, facts: dict[str, Any]) -> Model:
        """Register a model folder.

        `facts`: what seuf_core.checkpoint.inspect found. NameTakenError if the name exists.
        """
        if self.session.scalars(self._select(Model).where(Model.name == name)).first() is not None:
            raise NameTakenError(f"A model named {name!r} is registered already.", "Choose another name.")
        return self._add(Model(id=new_id("model"), name=name, path=path, digest=digest, facts=facts))

    def get(self, id_or_name: str) -> Model:
        """The model of this id or name, or NotFoundError.

        (A name cannot look like an id: the API refuses that.)
        """
        query = self._select(Model).where(or_(Model.id == id_or_name, Model.name == id_or_name))
        return self._one(query, "model", id_or_name)

    def list(self, cursor: str | None = None, limit: int = 20) -> Page[Model]:
        """Newest first."""
        return self._page(self._select(Model), Model, cursor, limit)
