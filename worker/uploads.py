"""The duty that ends uploads which nobody completed."""

from store.artefacts import Artefacts
from store.database import Database
from store.settings import Settings
from store.uploads import expired, folder_key, forget


def expire_uploads(database: Database, settings: Settings) -> None:
    """Delete the bytes of expired uploads, and then their rows: cut off between the two, it is done again."""
    artefacts = Artefacts.of(settings)
    while True:
        with database.read() as session:
            ids = expired(session)
        for upload_id in ids:
            artefacts.delete(folder_key(upload_id))
            with database.write() as session:
                forget(session, upload_id)
        if not ids:
            return
