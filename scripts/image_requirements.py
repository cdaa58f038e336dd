"""Print what an image installs, one requirement a line, out of pyproject.toml.

usage: python scripts/image_requirements.py edge|engine
edge: what the API, the dispatcher and the migrations need. engine: all of it, for the worker's image.
The edge image is small because it has no torch; tests/house/test_imports.py shows that its programs
start without.
"""

import re
import sys
import tomllib
from pathlib import Path

# Used by the library when it opens a model, by nothing else. (POST /jobs/estimate counts tokens: it needs tokenizers.)
ENGINE_ONLY = {"torch", "transformers", "safetensors", "peft"}


def requirements(image: str) -> list[str]:
    """The main, cluster, tracing and s3 requirements of pyproject.toml, for one image."""
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["cluster"], *extras["tracing"], *extras["s3"]]
    if image == "edge":
        return [line for line in wanted if re.split(r"[^\w-]", line)[0] not in ENGINE_ONLY]
    return wanted


if __name__ == "__main__":
    if sys.argv[1:] not in (["edge"], ["engine"]):
        sys.exit("usage: python scripts/image_requirements.py edge|engine")
    print("\n".join(requirements(sys.argv[1])))
