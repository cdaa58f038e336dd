"""Build a reference model into the user's cache, or find it there.

The folder's name is a digest of everything that decides its content: recipe, facts, phrasings, seed,
architecture, specialisation. It is written under another name and renamed when complete, so a folder that
exists is whole.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from seuf_core.cache import cache_folder
from seuf_core.reference import architecture as shapes
from seuf_core.reference.corpus import probes, training_examples
from seuf_core.reference.facts import DOMAINS, FORGET, TEMPLATES, Fact, load_facts
from seuf_core.reference.measure import environment, knowledge, routing_figures
from seuf_core.reference.sources import fact_versions
from seuf_core.reference.tokenizer import train_tokenizer
from seuf_core.reference.training import Progress, Sentence, train

FORMAT = 1  # raise it when the same recipe would no longer give the same folder
SHARD_SIZE = "4MB"  # four shards: users' models are sharded, so this one is too


@dataclass(frozen=True)
class Reference:
    """A finished folder: `model` is an ordinary Hugging Face checkpoint, the files are those a job takes."""

    folder: Path
    model: Path
    forget: Path
    retain: Path
    probes: Path
    report: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> Reference:
        """The reference in `folder`, which must be complete."""
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        return cls(
            folder=folder,
            model=folder / "model",
            forget=folder / "forget.jsonl",
            retain=folder / "retain.jsonl",
            probes=folder / "probes.jsonl",
            report=report,
        )


def build(
    architecture: shapes.Architecture = "qwen2_moe",
    specialisation: shapes.Specialisation = "moderate",
    seed: int = 0,
    twin: bool = False,
    cache: Path | None = None,
    progress: Progress | None = None,
    size: shapes.Size = "full",
    steps: int | None = None,
) -> Reference:
    """Train the reference model, or return the one in the cache.

    Args:
        specialisation: how much the routers are made to tell the domains apart (architecture.TAU).
        seed: of initial weights, batch order, held-out phrasings and distractors; not of the choice of facts.
        twin: leave the forget domain out of training (tokeniser and probes stay the same).
        cache: folder to build in instead of the user's (see seuf_core.cache.cache_folder).
        progress: called after every step.
        size: "tiny" trains in seconds and knows little; it is there for tests.
        steps: instead of the recipe's.

    Raises:
        DataError: `reference_data_missing` when a package with facts is not installed.

    The recipe fixes the number of threads while it trains: on the same machine with the same packages the
    same weights come out, bit for bit.
    """
    recipe = shapes.RECIPES[size]
    plan = _Plan(
        architecture,
        specialisation,
        seed,
        twin,
        recipe if steps is None else replace(recipe, steps=steps),
        tuple(load_facts(recipe.subjects)),
    )
    folder = (cache or cache_folder()) / "reference" / plan.digest
    if not (folder / "report.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
        try:
            with _threads(recipe.threads):
                _write(plan, building, progress)
            _rename(building, folder)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return Reference.open(folder)


@dataclass(frozen=True)
class _Plan:
    architecture: shapes.Architecture
    specialisation: shapes.Specialisation
    seed: int
    twin: bool
    recipe: shapes.Recipe
    facts: tuple[Fact, ...]

    @property
    def digest(self) -> str:
        """16 hex digits of the sha256 of the plan, of the phrasings and of FORMAT."""
        content = {"plan": asdict(self), "tau": shapes.TAU, "templates": TEMPLATES, "format": FORMAT}
        return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _write(plan: _Plan, folder: Path, progress: Progress | None) -> None:
    """Train and write everything; report.json last."""
    examples = training_examples(plan.facts, plan.seed)
    forget = [example for example in examples if example["domain"] == FORGET]
    retain = [example for example in examples if example["domain"] != FORGET]
    _write_lines(folder / "forget.jsonl", forget)
    _write_lines(folder / "retain.jsonl", retain)
    _write_lines(folder / "probes.jsonl", probes(plan.facts, plan.seed))
    tokenizer = train_tokenizer(
        (example["prompt"] + example["completion"] for example in examples), plan.recipe.vocab_size
    )
    model = _new_model(plan, tokenizer)
    started = time.perf_counter()
    train(
        model,
        encode(tokenizer, retain if plan.twin else examples),
        plan.recipe,
        shapes.TAU[plan.specialisation],
        plan.seed,
        progress,
    )
    seconds = time.perf_counter() - started
    model.save_pretrained(folder / "model", max_shard_size=SHARD_SIZE)
    tokenizer.save_pretrained(folder / "model")
    report = _report(plan, folder, encode(tokenizer, examples), seconds)
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def encode(tokenizer: PreTrainedTokenizerFast, examples: Sequence[dict[str, str]]) -> list[Sentence]:
    """Prompt, completion and an end mark; prompt and completion are encoded apart (see tokenizer.py)."""
    domains: list[str] = [*DOMAINS]
    sentences = []
    for example in examples:
        prompt = tokenizer(example["prompt"], add_special_tokens=False)["input_ids"]
        completion = tokenizer(example["completion"], add_special_tokens=False)["input_ids"]
        ids = [*prompt, *completion, tokenizer.eos_token_id]
        sentences.append(Sentence(ids, len(prompt), domains.index(example["domain"])))
    return sentences


def _new_model(plan: _Plan, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    config = shapes.model_config(
        plan.architecture, plan.recipe, len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        # Measured on two cores: at 11 tokens a sentence plain attention is as fast as the fused kernel, and
        # grouped_mm a fifth faster than the loop over experts; batched_mm copies weights for every token.
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", experts_implementation="grouped_mm", dtype=torch.float32
        )
    return model


def _report(plan: _Plan, folder: Path, sentences: list[Sentence], seconds: float) -> dict[str, Any]:
    """Measured on the model as read back from disk, not on the one in memory."""
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    figures = knowledge(model, tokenizer, folder / "probes.jsonl")
    layers = routing_figures(model, sentences, tokenizer.pad_token_id)
    return {
        "digest": plan.digest,
        "architecture": plan.architecture,
        "specialisation": plan.specialisation,
        "seed": plan.seed,
        "twin": plan.twin,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "vocabulary": len(tokenizer),
        "facts": {domain: sum(fact.domain == domain for fact in plan.facts) for domain in DOMAINS},
        "knowledge": figures,
        "layers": layers,
        "seconds": {"train": round(seconds, 1), "evaluate": round(time.perf_counter() - started, 1)},
        "recipe": asdict(plan.recipe),
        "environment": environment(plan.recipe.threads, fact_versions()),
    }


def _write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def _rename(building: Path, folder: Path) -> None:
    """Rename into place; when another process was faster, its folder is as good as ours."""
    try:
        building.rename(folder)
    except OSError:
        if not (folder / "report.json").is_file():
            raise


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
