"""Registered base models of one tenant."""

from typing import Any

from sqlalchemy import case, or_
from sqlalchemy.exc import IntegrityError

from store.errors import NameTakenError
from store.ids import new_id
from store.repository import Page, Repository
from store.tables import Model


class Models(Repository):
    """The models of one tenant."""

    def create(self, name: str, path: str, digest: str, facts: dict[str, Any]) -> Model:
        """Register a model folder.

        `facts`: what seuf_core.checkpoint.inspect found. NameTakenError if the name exists; the caller's
        transaction stays usable.
        """
        model = Model(id=new_id("model"), name=name, path=path, digest=digest, facts=facts)
        try:
            with self.session.begin_nested():
                return self._add(model)
        except IntegrityError as error:  # the only rule such a row can break; a look beforehand could race
            raise NameTakenError(
                f"A model named {name!r} is registered already.", "Choose another name."
            ) from error

    def get(self, id_or_name: str) -> Model:
        """The model of this id, or else of this name, or NotFoundError."""
        query = self._select(Model).where(or_(Model.id == id_or_name, Model.name == id_or_name))
        id_first = query.order_by(case((Model.id == id_or_name, 0), else_=1)).limit(1)
        return self._one(id_first, "model", id_or_name)

    def list(self, cursor: str | None = None, limit: int = 20) -> Page[Model]:
        """Newest first."""
        return self._page(self._select(Model), Model, cursor, limit)
