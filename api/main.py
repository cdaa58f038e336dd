"""`uvicorn api.main:app`: the API with the settings of the environment (SEUF_...)."""

from api.app import create_app
from api.settings import ApiSettings

app = create_app(ApiSettings())
