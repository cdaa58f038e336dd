"""What all parts of the speed benchmark share: the shapes' checkpoints, the data, and the method of each loss."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final, Literal, ParamSpec, TypeVar, get_args

import torch

from benchmarks.measure import LIMIT_SECONDS, TURN_SECONDS, Variant, in_process, interleaved
from benchmarks.shapes import SHAPES, TINY_LAYERS, tiny_fields, write_shape
from seuf_core.attribution.scores import score_experts
from seuf_core.data.batches import Encoded
from seuf_core.job import load
from seuf_core.method import Method
from seuf_core.unlearning.terms import TrainingData

P = ParamSpec("P")
T = TypeVar("T")
Targets = dict[int, tuple[int, ...]]
Size = Literal["full", "small"]
Objective = Literal["rmu", "npo", "gradient_difference"]
Router = Literal["freeze", "train"]
Place = Literal["early", "middle", "late"]
# Which tokens of a sequence are labels: of a running text all but the first, of a prompt with its answer the answer,
# which is the second half here.
Labels = Literal["texts", "answers"]

# A step sees 4 forget and 4 retain sequences of 64 tokens: 512 tokens.
BATCH_SIZE, LENGTH = 4, 64
EXAMPLES: Final = 32  # of each set: an epoch is 8 steps
SMALL_LENGTH, SMALL_EXAMPLES = 16, 8
RMU_COEFFICIENT: Final = 20.0


@dataclass(frozen=True)
class Setting:
    """What is measured on.

    folder: of the checkpoints. shapes: names in benchmarks.shapes. size: "small" makes every model tiny, for a test of
    the benchmark itself. rounds: how often interleaved variants take their turn at most. objectives: of the steps.
    """

    folder: Path
    shapes: tuple[str, ...] = ("olmoe-125m", "qwen2-moe-1b", "olmoe-1b-7b")
    size: Size = "full"
    rounds: int = 3
    objectives: tuple[Objective, ...] = get_args(Objective)

    def medians(self, variants: Mapping[str, Variant]) -> dict[str, float]:
        """Seconds a call of each variant: see benchmarks.measure.interleaved."""
        turn, limit = (TURN_SECONDS, LIMIT_SECONDS) if self.size == "full" else (0.0, 0.0)
        return interleaved(variants, self.rounds, turn, limit)

    def apart(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`function(...)` in a process of its own; of size small in this one, where only its result matters."""
        return in_process(function, *args, **kwargs) if self.size == "full" else function(*args, **kwargs)

    def checkpoint(self, name: str, **changed: int) -> Path:
        """The checkpoint of a shape, written when it is not there; with arguments of `write_shape` where given."""
        fields = tiny_fields(name) if self.size == "small" else {}
        label = "-".join([name, *(f"{field}-{value}" for field, value in changed.items())])
        path = self.folder / self.size / label
        if not (path / "tokenizer.json").exists():  # the last file: what is half written is written again
            shutil.rmtree(path, ignore_errors=True)
            write_shape(name, path, **{**fields, **changed})
        return path

    def layers(self, name: str) -> dict[str, int]:
        """Where experts are trained: `early`, `middle`, `late` -> decoder layer."""
        layers = TINY_LAYERS if self.size == "small" else SHAPES[name].layers
        return dict(zip(("early", "middle", "late"), layers, strict=True))

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return LENGTH if self.size == "full" else SMALL_LENGTH

    def data(self, name: str, labels: Labels) -> TrainingData:
        """What a shape's steps see."""
        examples = EXAMPLES if self.size == "full" else SMALL_EXAMPLES
        return training_data(self.vocabulary(name), examples, self.length, labels)

    def dtype(self, name: str) -> torch.dtype:
        """Of the weights."""
        return SHAPES[name].dtype

    def target(self, name: str, layer: int, folder: Path | None = None) -> Targets:
        """The expert of a layer that most tokens of `training_data` are sent to, as {layer: (expert,)}.

        What attribution chooses is used a lot; in a model of random weights some experts see no token at all.
        """
        return {layer: (_busiest(folder or self.checkpoint(name), self.vocabulary(name))[layer],)}

    def vocabulary(self, name: str) -> int:
        """Token ids of a shape."""
        fields = tiny_fields(name) if self.size == "small" else SHAPES[name].fields
        return int(fields["vocab_size"])


def method_of(objective: Objective, *, router: Router = "freeze", steps: int = 1) -> Method:
    """One run of fixed strength that trains one expert, with the retain term that open-unlearning has."""
    return Method(
        objective=objective,
        retain_loss="hidden_mse" if objective == "rmu" else "cross_entropy",
        router=router,
        rmu_coefficient=RMU_COEFFICIENT,
        attribution="affinity",
        experts=1,
        strength="fixed",
        learning_rate=1e-4,
        steps=steps,
        evaluate_every=steps,
        batch_size=BATCH_SIZE,
        max_length=LENGTH,
    )


@lru_cache
def _busiest(folder: Path, vocab_size: int) -> dict[int, int]:
    view, _ = load(folder, hold=())
    rows = training_data(vocab_size).forget
    scored = score_experts(view, rows, [], method_of("npo").model_copy(update={"attribution": "token_share"}))
    return dict(zip(view.layer_indices, scored.matrix.argmax(dim=1).tolist(), strict=True))


def texts(vocab_size: int, number: int, length: int, seed: int) -> list[list[int]]:
    """Random sequences of token ids."""
    source = random.Random(seed)
    return [[source.randrange(3, vocab_size) for _ in range(length)] for _ in range(number)]


def labels_from(length: int, labels: Labels) -> int:
    """Position of a sequence's first label."""
    return 1 if labels == "texts" else length // 2


def encoded(vocab_size: int, number: int, length: int, seed: int, labels: Labels = "texts") -> list[Encoded]:
    """The same as sequences with labels."""
    first = labels_from(length, labels)
    return [Encoded(ids, first, truncated=False) for ids in texts(vocab_size, number, length, seed)]


def training_data(
    vocab_size: int, number: int = EXAMPLES, length: int = LENGTH, labels: Labels = "texts"
) -> TrainingData:
    """Forget and retain examples of a benchmark's step."""
    forget, retain = (encoded(vocab_size, number, length, seed, labels) for seed in (1, 2))
    return TrainingData(forget, retain)


def write_texts(path: Path, ids: list[list[int]], labels: Labels = "texts") -> Path:
    """A set as a job reads it, in the words of benchmarks.shapes.tokenizer."""
    lines = (json.dumps(_record([f"t{token}" for token in one], labels)) for one in ids)
    path.write_text("\n".join(lines) + "\n")
    return path


def _record(words: list[str], labels: Labels) -> dict[str, str]:
    if labels == "texts":
        return {"text": " ".join(words)}
    first = labels_from(len(words), labels)
    return {"prompt": " ".join(words[:first]), "completion": " ".join(words[first:])}


def write_probes(path: Path, vocab_size: int) -> Path:
    """The smallest evaluation set a job takes: two questions a side, with two answers of one word."""
    words = texts(vocab_size, 4, 6, seed=4)
    lines = (
        json.dumps(
            {
                "prompt": " ".join(f"t{token}" for token in question[:4]),
                "choices": [f"t{token}" for token in question[4:]],
                "answer": 0,
                "set": side,
            }
        )
        for question, side in zip(words, ("forget", "forget", "retain", "retain"), strict=True)
    )
    path.write_text("\n".join(lines) + "\n")
    return path
