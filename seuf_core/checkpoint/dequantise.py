"""Write the bfloat16 form of a checkpoint quantised in fp8 or MXFP4, which can then be trained.

python -m seuf_core.checkpoint.dequantise MODEL OUT
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

from seuf_core.checkpoint.index import read_index
from seuf_core.checkpoint.inspect import read_config
from seuf_core.checkpoint.staging import staged
from seuf_core.checkpoint.writer import companions
from seuf_core.errors import ModelError, SeufError

_CONFIGS = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}


def dequantise(model: Path, out: Path) -> None:
    """Read a quantised checkpoint and write it to the new folder `out`, which appears whole or not at all.

    Memory: the whole model in bfloat16.

    Raises:
        ModelError: not_dequantisable, and as read_config and read_index do.
        WriteError: output_exists, output_busy.
    """
    method = (read_config(model).get("quantization_config") or {}).get("quant_method")
    if method not in _CONFIGS:
        raise ModelError(
            "not_dequantisable",
            f"{model} is not quantised in one of {', '.join(sorted(_CONFIGS))}; its config says {method}.",
            "Use the 16 or 32 bit checkpoint it was made from.",
        )
    files = companions(Path(model), read_index(Path(model)))
    with staged(Path(out).absolute()) as folder:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model,
            quantization_config=_CONFIGS[method](dequantize=True),
            dtype=torch.bfloat16,
            local_files_only=True,
            trust_remote_code=False,
        )
        # How it was loaded, which save_pretrained reverses: it cannot reverse dequantising (fp8: an error, MXFP4:
        # the quantised names). Without it, names are those of the family's own 16 bit form.
        loaded._weight_conversions = None
        loaded.save_pretrained(folder)
        for name in files:
            if not name.endswith(".index.json"):  # the one just written is the right one
                shutil.copyfile((Path(model) / name).resolve(strict=True), folder / name)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        dequantise(Path(sys.argv[1]), Path(sys.argv[2]))
    except SeufError as error:
        sys.exit(str(error))
