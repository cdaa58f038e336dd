"""Settings of every process, from the environment (SEUF_...) with defaults that run on one machine."""

import secrets
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from store.secretfile import read_or_make

MIB = 1024 * 1024


class Settings(BaseSettings):
    """Read once at start.

    Every field can be set by its name in upper case after SEUF_, e.g. SEUF_DATA_DIR.
    """

    model_config = SettingsConfigDict(env_prefix="SEUF_", frozen=True, extra="ignore")

    data_dir: Path = Field(Path("~/.seuf"), description="Folder of everything this service writes.")
    database_url: str = Field(
        "", description="sqlite:/// or postgresql:// address; default: seuf.db in data_dir."
    )
    artefacts_url: str = Field(
        "", description="Local folder or fsspec address; default: artefacts in data_dir."
    )
    broker_url: str = Field("", description="Redis address for the celery lane; empty: the database lane.")
    lane: Literal["", "celery", "database"] = Field(
        "", description="How workers hear of jobs; default: celery when broker_url is set, else database."
    )
    host: str = Field("127.0.0.1", description="Address the API listens on.")
    port: int = Field(8321, ge=0, le=65535, description="Port the API listens on; 0 picks a free one.")
    secret: SecretStr = Field(
        SecretStr(""),
        description="HMAC secret of the API keys; default: a file in data_dir, made on first use.",
    )
    lease_seconds: float = Field(
        60, gt=0, description="A worker silent for this many seconds has lost its job."
    )
    heartbeat_seconds: float = Field(10, gt=0, description="Seconds between two signs of life of a worker.")
    cancel_grace_seconds: float = Field(
        120,
        gt=0,
        description="Seconds between asking an engine to stop and killing it (one step and one checkpoint).",
    )
    engine_entry: str = Field(
        "seuf_core:unlearn",
        pattern=r"^[\w.]+:\w+$",
        description="What the engine process calls, module:function with the signature of seuf_core.unlearn.",
    )
    warm_engine: bool = Field(
        True,
        description="Keep an engine ready that has loaded the library (half a GB of memory), so that a job starts "
        "at once; false: load it when a job comes.",
    )
    max_attempts: int = Field(
        3,
        gt=0,
        description="How often a job is started before the loss of its workers or engines is taken for its own doing.",
    )
    max_job_seconds: float = Field(
        7 * 86_400,
        gt=0,
        description="Longest time a job may ask for, in seconds since its first start; also that of a job that asks "
        "for none.",
    )
    max_job_memory_bytes: int = Field(
        0,
        ge=0,
        description="Most main memory a job may ask for, in bytes; also that of a job that asks for none. 0: what is "
        "free when it starts.",
    )
    keep_work_days: float = Field(
        7,
        ge=0,
        description="Days that the training checkpoints of a failed or cancelled job are kept for a retry.",
    )
    orphan_grace_seconds: float = Field(
        86_400,
        gt=0,
        description="Age in seconds from which stored bytes that no row names are deleted.",
    )
    audit_key_file: str = Field(
        "",
        description="PEM file of the ed25519 key that signs heads of the audit log (for the API, the public key is "
        "enough); default: on one machine audit-key in data_dir, made on first use, else no head is signed.",
    )
    audit_head_seconds: float = Field(
        3600,
        gt=0,
        le=86_400,
        description="Seconds after which new rows of the audit log are signed; without new rows it is signed daily.",
    )
    max_upload_bytes: int = Field(64 * MIB, gt=0, description="Largest upload, in bytes.")

    @model_validator(mode="after")
    def _fill(self) -> Self:
        """Defaults that depend on other fields."""
        data_dir = self.data_dir.expanduser().absolute()
        filled = {
            "data_dir": data_dir,
            "database_url": self.database_url or f"sqlite:///{data_dir / 'seuf.db'}",
            "artefacts_url": self.artefacts_url or str(data_dir / "artefacts"),
            "lane": self.lane or ("celery" if self.broker_url else "database"),
        }
        if filled["lane"] == "celery" and not self.broker_url:
            raise ValueError("The celery lane needs a broker. Set SEUF_BROKER_URL, or SEUF_LANE=database.")
        if self.heartbeat_seconds * 2 > self.lease_seconds:
            raise ValueError(
                "Two heartbeats must fit in one lease. "
                "Lower SEUF_HEARTBEAT_SECONDS or raise SEUF_LEASE_SECONDS."
            )
        for name, value in filled.items():
            object.__setattr__(self, name, value)  # frozen for everybody else
        return self

    @property
    def work_dir(self) -> Path:
        """Folder of the engines' work folders, one per job."""
        return self.data_dir / "work"

    def environment(self) -> dict[str, str]:
        """The variables that give a worker process these settings: all of the store's but the secret."""
        fields = Settings.model_fields.keys() - {"secret"}
        return {f"SEUF_{name.upper()}": str(getattr(self, name)) for name in sorted(fields)}

    def secret_bytes(self) -> bytes:
        """The HMAC secret: SEUF_SECRET, or data_dir/secret, made with mode 0600 on first use."""
        if given := self.secret.get_secret_value():
            return given.encode()
        return read_or_make(self.data_dir / "secret", lambda: secrets.token_urlsafe(32).encode())
