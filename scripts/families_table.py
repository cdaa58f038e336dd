"""Write docs/reference/families.md: the rows of seuf_core.families, and what the tests of each one showed.

python scripts/families_table.py          # writes the page from the rows and docs/results/families.json
python scripts/families_table.py --run    # runs tests/families first and writes what passed into that file
python scripts/families_table.py --check  # exit code 1 when the page is out of date
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from seuf_core.families import FAMILIES, Family

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "reference" / "families.md"
RESULTS = ROOT / "docs" / "results" / "families.json"
TESTS = ROOT / "tests" / "families"

# Test function in tests/families -> head of its column, and what it shows.
COLUMNS = {
    "test_router_scores": (
        "scores",
        "the captured router scores are those computed by hand, and the gates the experts get follow from them",
    ),
    "test_affinity_oracle": ("affinity", "affinity equals loops over sequences, tokens and experts"),
    "test_gradient_score": (
        "gradient",
        "the gradient score equals gradient times weight of the fused tensors",
    ),
    "test_target_training": (
        "target training",
        "training the targets alone equals training the fused tensors with masked gradients (fp32, 1e-5)",
    ),
    "test_scopes": ("scopes", "every scope and router mode moves what it says and nothing else"),
    "test_round_trip": (
        "round trip",
        "an edited expert and router come back through `from_pretrained`; every other byte of the files, their "
        "names and shards stay; base and delta give the same folder again",
    ),
    "test_whole_model": (
        "whole model",
        "all parameters have exactly the names of the files, and come back through `from_pretrained`",
    ),
    "test_bfloat16": (
        "bfloat16",
        "a bfloat16 checkpoint is trained through fp32 masters, and what was measured is what is read back",
    ),
    "test_masking": ("masking", "masked experts have score 0 and no effect, and everything is restored"),
    "test_layers_one_by_one": (
        "in parts",
        "embeddings, single layers and the tail one after the other are the whole forward pass, to the last bit",
    ),
    "test_the_route_needs_no_tokens": ("route", "how the model calls its layers follows from the mask alone"),
    "test_answers_and_states_are_the_whole_pass_where_a_label_is_predicted": (
        "answers",
        "states of answer tokens alone, of every layer, equal those of the whole forward pass",
    ),
    "test_it_is_what_from_pretrained_gives": (
        "read by layer",
        "a model whose layers are read when they are needed is what `from_pretrained` gives, to the last bit",
    ),
    "test_a_pass_from_constants": (
        "constants",
        "answers and gradients of a pass that begins with constants are those of the whole pass (fp64, 1e-6), with "
        "the router frozen and trained, also after it has drifted",
    ),
    "test_it_is_the_familys_own_loop": (
        "grouped",
        "experts as one product each, and their gradients, equal the family's own loop",
    ),
    "test_values_and_gradients_by_the_states": (
        "head",
        "the head a few positions at a time gives the values and gradients of all logits at once",
    ),
    "test_values_and_gradients_of_a_head_that_is_trained": ("trained head", "the same where the head is trained"),
}


def page(results: dict[str, Any]) -> str:
    """The whole page."""
    heads = [head for head, _ in COLUMNS.values()]
    return "\n".join(
        [
            "# Model families",
            "",
            "Made by `python scripts/families_table.py` from `seuf_core.families` and from what `tests/families`",
            f"showed (`make families`, transformers {results['transformers']}). A family is supported when every",
            "column below passed on a tiny random model of it; another one is a row and a tiny config:",
            "[add a family](../how-to/add-a-family.md).",
            "",
            "Models without experts need no row: they run with scope `lora` or `full`, and a scope that chooses",
            "experts is refused on them (`dense_model`). A family of experts without a row is refused",
            "(`unknown_architecture`). Quantised checkpoints (MXFP4, fp8, GPTQ, AWQ, bitsandbytes and others) are",
            "refused by the name of their method (`quantised`);",
            "`python -m seuf_core.checkpoint.dequantise MODEL OUT` writes the 16 bit form of MXFP4 and fp8.",
            "",
            "## What was tested",
            "",
            f"| `model_type` | {' | '.join(heads)} |",
            f"|---|{'---|' * len(heads)}",
            *(tested(family, results["passed"].get(family, {})) for family in sorted(FAMILIES)),
            "",
            *(f"- **{head}**: {meaning}." for head, meaning in COLUMNS.values()),
            "",
            "## What differs",
            "",
            "Score: what the router makes of its logits before top-K, and so what affinity is a mean of. On disk:",
            "the block of a sparse layer, inside `model.layers.N.`, and the names inside the block, where `E` is",
            "the expert's number. A fused tensor holds all experts of a layer; only the rows of the changed ones",
            "are written, and only they are in the delta. Some released models are published quantised (gpt-oss,",
            "DeepSeek-V3 and MiniMax-M2 among them): dequantise those first.",
            "",
            "| `model_type` | released models, for example | score | block | router | experts |",
            "|---|---|---|---|---|---|",
            *(described(FAMILIES[family]) for family in sorted(FAMILIES)),
            "",
        ]
    )


def tested(family: str, passed: dict[str, int]) -> str:
    """A family's row; a cell is empty where not every test passed."""
    cells = ["passed" if passed.get(test) else "" for test in COLUMNS]
    return f"| `{family}` | {' | '.join(cells)} |"


def described(family: Family) -> str:
    """A family's row of data."""
    by_config = family.score == "expert_selection_fn"
    score = f"as `{family.score}` of config.json says" if by_config else family.score
    stem = f"model.layers.0.{family.block}."
    router = ", ".join(f"`{name.removeprefix(stem)}`" for name in family.router_names(0).values())
    if family.fused:
        experts = "fused: " + ", ".join(f"`{name}`" for _, name in family.fused)
    else:
        experts = "`experts.E.` and " + ", ".join(f"`{name}`" for name in family.expert)
    return (
        f"| `{family.model_type}` | {family.released} | {score} | `{family.block}` | {router} | {experts} |"
    )


def run() -> dict[str, Any]:
    """Run tests/families and count what passed. One that failed or was skipped takes all of its kind away."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", str(TESTS), "-q", f"--junitxml={report}"]
        subprocess.run(command, cwd=ROOT, check=False)
        cases = ElementTree.parse(report).iter("testcase")
        passed: dict[str, dict[str, int]] = {}
        failed: set[tuple[str, str]] = set()
        for case in cases:
            test, _, parameters = case.attrib["name"].partition("[")
            family = next((part for part in re.split(r"[-\]]", parameters) if part in FAMILIES), None)
            if family is None or test not in COLUMNS:
                continue
            counts = passed.setdefault(family, {})
            counts[test] = counts.get(test, 0) + 1
            if len(case):
                failed.add((family, test))
    for family, test in failed:
        del passed[family][test]
    return {"transformers": version("transformers"), "torch": version("torch"), "passed": passed}


def main() -> None:
    """See the module's docstring."""
    if "--run" in sys.argv:
        RESULTS.write_text(json.dumps(run(), indent=1, sort_keys=True) + "\n")
    text = page(json.loads(RESULTS.read_text()))
    if "--check" in sys.argv:
        sys.exit(PAGE.read_text() != text)
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
