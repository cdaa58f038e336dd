"""`uvicorn api.main:app`: the API with the settings of the environment; not without a secret."""

from api.app import create_app
from api.settings import ApiSettings
from telemetry import logs, tracing

settings = ApiSettings().require_secret()
logs.configure(settings.log_format, settings.log_level)
if settings.tracing:
    tracing.start("seuf-api")
app = create_app(settings)
