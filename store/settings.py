"""Settings of every process, from the environment (SEUF_...) with defaults that run on one machine."""

import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from store.givensecrets import MAKE, SecretFiles, weakness, with_password
from store.limits import Limits
from store.receivers import Receivers
from store.secretfile import read_or_make

MIB = 1024 * 1024


class Settings(BaseSettings):
    """Read once at start.

    Every field can be set by its name in upper case after SEUF_, e.g. SEUF_DATA_DIR.
    """

    # What a setting was given never stands in an error: it may be a secret.
    model_config = SettingsConfigDict(
        env_prefix="SEUF_", frozen=True, extra="ignore", hide_input_in_errors=True
    )

    data_dir: Path = Field(Path("~/.seuf"), description="Folder of everything this service writes.")
    database_url: str = Field(
        "", description="sqlite:/// or postgresql:// address; default: seuf.db in data_dir."
    )
    artefacts_url: str = Field(
        "",
        description="Local folder, or s3://bucket/prefix; default: artefacts in data_dir.",
    )
    s3_endpoint_url: str = Field(
        "", description="Address of an S3 store that is not Amazon's, such as http://minio:9000."
    )
    s3_public_endpoint_url: str = Field(
        "", description="The address that clients reach it by, where that is another one."
    )
    s3_redirect: bool = Field(
        True,
        description="Send a download on to the object store, by an address that is signed; false: pass its bytes "
        "through the API.",
    )
    s3_redirect_seconds: int = Field(
        60, ge=1, le=3600, description="How long such an address may be used; a download may last longer."
    )
    broker_url: str = Field("", description="Redis address for the celery lane; empty: the database lane.")
    lane: Literal["", "celery", "database"] = Field(
        "", description="How workers hear of jobs; default: celery when broker_url is set, else database."
    )
    host: str = Field("127.0.0.1", description="Address the API listens on.")
    port: int = Field(8321, ge=0, le=65535, description="Port the API listens on; 0 picks a free one.")
    secret: SecretStr = Field(
        SecretStr(""),
        description="HMAC secret of the API keys, 32 characters or more; `seuf up` makes its own, a file in data_dir.",
    )
    database_password: SecretStr = Field(
        SecretStr(""), description="Password of database_url, where the address has none."
    )
    broker_password: SecretStr = Field(
        SecretStr(""), description="Password of broker_url, where the address has none."
    )
    requests_per_minute: int = Field(
        6000, ge=0, description="Requests a minute that each API key may make; 0: any number."
    )
    max_active_jobs: int = Field(
        1000, ge=0, description="Jobs of one tenant that are queued or running; 0: any number."
    )
    max_stored_bytes: int = Field(
        1 << 40,
        ge=0,
        description="Bytes of one tenant's sets, parts of uploads and checkpoints; 0: any number.",
    )
    idempotency_hours: float = Field(
        24, gt=0, description="Hours that the answer to an Idempotency-Key is kept."
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
    webhook_retry_seconds: str = Field(
        "5,300,1800,7200,18000,36000,50400,72000,86400",
        pattern=r"^[0-9.]+(,[0-9.]+)*$",
        description="Pauses in seconds before a message is sent again; after the last one it is given up.",
    )
    webhook_timeout_seconds: float = Field(
        15, gt=0, description="Seconds that a receiver of webhooks has to answer, connecting included."
    )
    webhook_concurrency: int = Field(
        16, gt=0, description="Receivers that are told at the same time; each gets one message at a time."
    )
    webhook_disable_days: float = Field(
        5, gt=0, description="Days without one success after which a failing webhook is disabled."
    )
    webhook_log_days: float = Field(
        30, gt=0, description="Days that messages of webhooks and how they went are kept."
    )
    webhook_http: bool = Field(False, description="Allow receivers without TLS (http://).")
    webhook_ports: str = Field(
        "443", pattern=r"^\d+(,\d+)*$", description="Ports that receivers may listen on, separated by commas."
    )
    webhook_allow: str = Field(
        "",
        description="Networks (10.1.0.0/16) and host names of receivers that are not public machines, separated by "
        "commas. A name is allowed with whatever private address it has; link-local ones only as a network.",
    )
    max_upload_bytes: int = Field(
        64 * MIB, gt=0, description="Largest upload in one request, in bytes; a larger file comes in parts."
    )
    max_file_bytes: int = Field(
        1024 * MIB,
        gt=0,
        description="Largest file in bytes, as sent in parts, and as the JSON Lines that are made of it.",
    )
    upload_part_bytes: int = Field(8 * MIB, gt=0, description="Largest part of an upload, in bytes.")
    upload_seconds: float = Field(
        2 * 86_400, gt=0, description="Seconds after its latest part that an upload in parts is given up."
    )
    slow_body_seconds: float = Field(
        30,
        gt=0,
        description="Seconds that a client may keep the API waiting for a request's body, and one more for each KiB "
        "of it.",
    )

    log_format: Literal["text", "json"] = Field(
        "text", description="Log lines for people, or one JSON object a line (so in the images)."
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO", description="From which level on our own lines are shown; of libraries never below INFO."
    )
    tracing: bool = Field(
        False,
        description="Send OpenTelemetry traces; OTEL_EXPORTER_OTLP_ENDPOINT and the other OTEL_ variables say where.",
    )

    @field_validator("webhook_allow")
    @classmethod
    def _readable(cls, allow: str) -> str:
        Receivers(allow=allow)
        return allow

    @model_validator(mode="after")
    def _fill(self) -> Self:
        """Defaults that depend on other fields."""
        data_dir = self.data_dir.expanduser().absolute()
        filled = {
            "data_dir": data_dir,
            "database_url": with_password(
                self.database_url or f"sqlite:///{data_dir / 'seuf.db'}",
                self.database_password.get_secret_value(),
            ),
            "broker_url": with_password(self.broker_url, self.broker_password.get_secret_value())
            if self.broker_url
            else "",
            "artefacts_url": self.artefacts_url or str(data_dir / "artefacts"),
            "lane": self.lane or ("celery" if self.broker_url else "database"),
        }
        if "://" in self.artefacts_url and not re.fullmatch(r"s3://[\w.-]+(/.*)?", self.artefacts_url):
            raise ValueError("Artefacts are in a folder or in s3://bucket/prefix. Set SEUF_ARTEFACTS_URL to one.")
        if filled["lane"] == "celery" and not self.broker_url:
            raise ValueError("The celery lane needs a broker. Set SEUF_BROKER_URL, or SEUF_LANE=database.")
        if self.heartbeat_seconds * 2 > self.lease_seconds:
            raise ValueError(
                "Two heartbeats must fit in one lease. "
                "Lower SEUF_HEARTBEAT_SECONDS or raise SEUF_LEASE_SECONDS."
            )
        given = self.secret.get_secret_value()
        if given and (weak := weakness(given)):
            raise ValueError(f"SEUF_SECRET {weak}: API keys are checked with it. {MAKE}")
        for name, value in filled.items():
            object.__setattr__(self, name, value)  # frozen for everybody else
        return self

    @property
    def work_dir(self) -> Path:
        """Folder of the engines' work folders, one per job."""
        return self.data_dir / "work"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003  (no file is ever read by itself)
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments, then the environment, then the files that SEUF_..._FILE names."""
        return init_settings, env_settings, SecretFiles(settings_cls)

    def limits(self) -> Limits:
        """What a tenant may have that has no limits of its own."""
        return Limits(self.max_active_jobs, self.max_stored_bytes, self.requests_per_minute)

    def environment(self) -> dict[str, str]:
        """The variables that give a worker process these settings: all of the store's but the secrets.

        (Addresses have their passwords in them.)
        """
        fields = Settings.model_fields.keys() - _secrets()
        return {f"SEUF_{name.upper()}": str(getattr(self, name)) for name in sorted(fields)}

    @staticmethod
    def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
        """The same variables but those that hold a secret or name its file: for a process that needs none."""
        told = {f"SEUF_{name.upper()}" for name in _secrets()}
        hidden = told | {f"{variable}_FILE" for variable in told}
        return {name: value for name, value in environment.items() if name not in hidden}

    def require_secret(self) -> Self:
        """ValueError unless a secret was given: several processes must have the same one, and it must be kept."""
        if not self.secret.get_secret_value():
            raise ValueError(
                "There is no SEUF_SECRET (or SEUF_SECRET_FILE): API keys are checked with it, by every process of this "
                f"service, so keep it. {MAKE} (`seuf up` makes its own.)"
            )
        return self

    def receivers(self) -> Receivers:
        """Where webhooks may go."""
        return Receivers(http=self.webhook_http, ports=self.webhook_ports, allow=self.webhook_allow)

    def webhook_pauses(self) -> tuple[float, ...]:
        """Pauses in seconds before the second, the third, ... attempt at a webhook."""
        return tuple(map(float, self.webhook_retry_seconds.split(",")))

    def secret_bytes(self) -> bytes:
        """The HMAC secret: SEUF_SECRET, or data_dir/secret, made with mode 0600 on first use."""
        if given := self.secret.get_secret_value():
            return given.encode()
        return read_or_make(self.data_dir / "secret", lambda: secrets.token_urlsafe(32).encode())


def _secrets() -> set[str]:
    """The fields that are secrets."""
    return {name for name, field in Settings.model_fields.items() if field.annotation is SecretStr}
