"""The duty that signs the heads of the audit logs."""

import logging
from datetime import timedelta

from store import audit, signing
from store.audit import Audit
from store.database import Database
from store.settings import Settings

log = logging.getLogger(__name__)


def sign_heads(database: Database, settings: Settings) -> None:
    """Sign the log of every tenant that is due. Twice at once gives two heads, one after the other: both are right."""
    with database.read() as session:
        tenants = audit.due(session, timedelta(seconds=settings.audit_head_seconds))
    if not tenants:
        return
    key = signing.private_key(settings)
    if key is None:
        log.warning("the audit log is not signed: SEUF_AUDIT_KEY_FILE names no private key")
        return
    for tenant in tenants:
        with database.write() as session:
            head = Audit(session, tenant).sign(key)
        log.info("audit log of %s signed at row %d", tenant, head.seq)
