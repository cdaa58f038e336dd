"""What the store refuses, one class per rule.

The API maps each class to a problem; the worker maps them to exits.
"""


class StoreError(Exception):
    """A refused act.

    `code` is stable and snake_case, `message` names the offender and the rule, `fix` what to do.
    """

    code = "store_error"

    def __init__(self, message: str, fix: str) -> None:
        super().__init__(f"{message} {fix}")
        self.message = message
        self.fix = fix


class NotFoundError(StoreError):
    """No such row for this tenant (another tenant's row is not found either)."""

    code = "not_found"

    def __init__(self, kind: str, id_or_name: str) -> None:
        super().__init__(f"There is no {kind} {id_or_name!r}.", f"List the {kind}s to see which exist.")
        self.kind = kind


class NameTakenError(StoreError):
    """A model of that name exists already."""

    code = "name_taken"


class FileInUseError(StoreError):
    """A file that a queued or running job still reads cannot be deleted."""

    code = "file_in_use"


class FileDeletedError(StoreError):
    """The file was deleted; that it was, and when, is all that is left of it."""

    code = "file_deleted"


class UploadCompleteError(StoreError):
    """A part was sent to an upload that is a file already."""

    code = "upload_complete"


class UploadIncompleteError(StoreError):
    """The parts that are there are not a whole: one is missing, or they are not what was announced."""

    code = "upload_incomplete"


class UploadTooLargeError(StoreError):
    """The parts together are over the largest size of a file, or over what was announced."""

    code = "file_too_large"


class UploadChangedError(StoreError):
    """A part was replaced while the upload was being completed."""

    code = "upload_changed"


class TooManyUploadsError(StoreError):
    """A tenant has as many open uploads as it may have."""

    code = "too_many_uploads"


class TransitionRefusedError(StoreError):
    """The job's state does not allow this (see store.transitions.TRANSITIONS)."""

    code = "transition_refused"


class InvalidCursorError(StoreError):
    """A list cursor that this service did not hand out."""

    code = "invalid_cursor"


class StorageAway(StoreError):  # noqa: N818  (a state, not a mistake)
    """The storage of the artefacts does not answer, refuses, or is full."""

    code = "storage_away"

    def __init__(self, cause: str) -> None:
        super().__init__(
            f"The storage of files and checkpoints failed ({cause}).",
            "Try again in a moment; if it stays, look at /readyz and at the log of the service.",
        )


class SchemaMismatchError(StoreError):
    """The database has not the tables that this version works with."""

    code = "schema_mismatch"


class LeaseLost(StoreError):  # noqa: N818  (the name of the contract between store and worker)
    """The caller's lease token is not the job's current one, or the job is finished: nothing was written."""

    code = "lease_lost"

    def __init__(self, job_id: str, token: int) -> None:
        super().__init__(
            f"Lease {token} of {job_id} is no longer current, so nothing was written.",
            "Stop working on this job: another worker may hold it, or it is finished.",
        )


class UnknownScopeError(StoreError):
    """A scope that does not exist, or none at all."""

    code = "unknown_scope"


class MissingScopeError(StoreError):
    """A key was to give, or to take, a scope that it does not have itself."""

    code = "missing_scope"


class ExpiryRefusedError(StoreError):
    """An expiry in the past, or one that outlives the key that asks for it."""

    code = "expiry_refused"


class TooManyKeysError(StoreError):
    """A tenant has as many valid keys as it may have."""

    code = "too_many_keys"


class QuotaExceededError(StoreError):
    """What is asked for would take the tenant over one of its limits."""

    code = "quota_exceeded"


class KeyEndedError(StoreError):
    """A key that is revoked, expired or replaced cannot be rotated."""

    code = "key_ended"


class InvalidNameError(StoreError):
    """A name that a tenant cannot have."""

    code = "invalid_name"


class IdempotencyKeyReusedError(StoreError):
    """An Idempotency-Key that came with another request before."""

    code = "idempotency_key_reused"


class InFlightError(StoreError):
    """The first request of an Idempotency-Key is still at work."""

    code = "request_in_flight"

    def __init__(self, key: str) -> None:
        super().__init__(
            f"A request with the Idempotency-Key {key!r} is still at work.",
            "Send it again after the seconds in Retry-After.",
        )


class TooManyWebhooksError(StoreError):
    """A tenant has as many webhooks as it may have."""

    code = "too_many_webhooks"


class WebhookDisabledError(StoreError):
    """Nothing is sent to a webhook that is disabled."""

    code = "webhook_disabled"
