"""What a reference model knows and how its routers share the work: the figures of report.json."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from seuf_core.data.reader import read_probes
from seuf_core.evaluate.probes import encode_probes, score_probes, summarise
from seuf_core.moe.forward import TOKENS_PER_LOOK, Forward
from seuf_core.moe.routing import capture_routing
from seuf_core.moe.view import moe_view
from seuf_core.reference.facts import DOMAINS, FORGET
from seuf_core.reference.training import Sentence, collate, domain_router_means, mutual_information


def knowledge(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, probes: Path
) -> dict[str, dict[str, float]]:
    """Per domain the share of probes answered right: `choice` of four (chance .25) and `open` (greedy)."""
    encoded = encode_probes(tokenizer, read_probes(probes), max_length=64)
    figures: dict[str, dict[str, float]] = {}
    for row in summarise(encoded, score_probes(Forward(moe_view(model), tokens=TOKENS_PER_LOOK), encoded)):
        if row["name"] in ("choice", "open"):
            figures.setdefault(row["domain"], {"n": row["n"]})[row["name"]] = round(row["value"], 4)
    return figures


@torch.no_grad()
def routing_figures(model: PreTrainedModel, sentences: Sequence[Sentence], pad: int) -> list[dict[str, Any]]:
    """How each layer's router treats the domains, over all `sentences`; each domain counts the same.

    Per layer: `load`, share of routing slots of each expert (E numbers, sum 1); `best_expert`, the one whose
    share on the forget domain most exceeds its share on the rest, with both shares; `mutual_information` of
    domain and router in nats.
    """
    batch = collate(sentences, pad, prompt_weight=1.0)
    domains = batch.domains.flatten()
    view = moe_view(model)
    with capture_routing(view) as routing:
        model.model(batch.ids, use_cache=False)
    figures = []
    for layer in view.layer_indices:
        shares = _slot_shares(routing.indices[layer], domains, view.num_experts)
        information = mutual_information(*domain_router_means(routing.logits[layer], domains, len(DOMAINS)))
        figures.append({"layer": layer, "mutual_information": round(float(information), 4), **_loads(shares)})
    return figures


def environment(threads: int, fact_versions: dict[str, str]) -> dict[str, Any]:
    """Versions, processor and threads: with the same of each, the same weights come out."""
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "packages": {name: version(name) for name in ("torch", "transformers", "tokenizers")} | fact_versions,
    }


def _slot_shares(selected: Tensor, domains: Tensor, num_experts: int) -> Tensor:
    """[D, E]: of a domain's routing slots, the share that each expert gets; each row sums to 1."""
    rows = [
        torch.bincount(selected[domains == d].flatten(), minlength=num_experts) for d in range(len(DOMAINS))
    ]
    counts = torch.stack(rows).float()
    return counts / counts.sum(-1, keepdim=True)


def _loads(shares: Tensor) -> dict[str, Any]:
    forget = shares[DOMAINS.index(FORGET)]
    retain = (shares.sum(0) - forget) / (len(DOMAINS) - 1)
    best = int((forget - retain).argmax())
    return {
        "load": [round(share, 4) for share in shares.mean(0).tolist()],
        "best_expert": best,
        "best_expert_forget_share": round(float(forget[best]), 4),
        "best_expert_retain_share": round(float(retain[best]), 4),
    }
