"""Token counts of a job's sets before a model is opened, by its tokenizer.json. Torch-free.

The counts are those of seuf_core.data.batches and seuf_core.evaluate.probes but where a token spans prompt and
completion, or a text's end is cut differently: a plan needs no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path

from seuf_core.data.records import BYTES_PER_TOKEN, Example, Probe
from seuf_core.inputs import Inputs
from seuf_core.method import Method
from seuf_core.plan.facts import JobTokens, TokenCounts

TOKENIZER = "tokenizer.json"

# Texts -> how many tokens each has, without special ones.
Count = Callable[[Sequence[str]], list[int]]


def count_tokens(model: Path, inputs: Inputs, method: Method) -> JobTokens:
    """The sets of a job as tokens, of at most `max_length` a sequence.

    Where the folder has no tokenizer.json, or the library `tokenizers` is not there or cannot read it, UTF-8 bytes / 4
    stand in, and `JobTokens.counted` says so.
    """
    count, counted = _counter(model)
    retain = inputs.retain.train if inputs.retain else []
    alternatives = inputs.forget.train if method.objective == "dpo" else []
    most = method.max_length
    return JobTokens(
        forget=_examples(count, inputs.forget.train, most),
        retain=_examples(count, retain, most),
        alternatives=_pairs(
            count, [(e.prompt, e.alternative or method.dpo_alternative) for e in alternatives], most
        ),
        selection=_probes(count, inputs.selection_probes, most),
        test=_probes(count, inputs.test_probes, most),
        counted=counted,
    )


def _counter(model: Path) -> tuple[Count, str]:
    file = model / TOKENIZER
    try:
        # Here, and not above: the HTTP side imports this module, and starts fast.
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(file))
    except Exception:  # tokenizers raises bare Exceptions
        return lambda texts: [-(-len(text.encode()) // BYTES_PER_TOKEN) for text in texts], "bytes"
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def count(texts: Sequence[str]) -> list[int]:
        return [len(one.ids) for one in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    return count, "tokenizer"


def _examples(count: Count, examples: Sequence[Example], most: int) -> TokenCounts:
    """Running texts become pieces that overlap by one token."""
    texts = [example for example in examples if not example.prompt]
    others = [(example.prompt, example.completion) for example in examples if example.prompt]
    lengths = count([example.completion for example in texts])
    pieces = chain.from_iterable(_pieces(length, most) for length in lengths)
    return TokenCounts.of(pieces) + _pairs(count, others, most)


def _pieces(length: int, most: int) -> Iterable[tuple[int, int]]:
    yield min(length, most), min(length, most) - 1
    left = length - most
    while left > 0:
        labels = min(left, most - 1)
        yield labels + 1, labels
        left -= labels


def _probes(count: Count, probes: Sequence[Probe], most: int) -> TokenCounts:
    return _pairs(count, [(probe.prompt, choice) for probe in probes for choice in probe.choices], most)


def _pairs(count: Count, pairs: Sequence[tuple[str, str]], most: int) -> TokenCounts:
    prompts = count([prompt for prompt, _ in pairs])
    answers = count([completion for _, completion in pairs])
    sequences = []
    for prompt, answer in zip(prompts, answers, strict=True):
        kept = min(answer, max(1, most - min(1, prompt)))
        sequences.append((min(most, prompt + kept), kept if prompt else kept - 1))
    return TokenCounts.of(sequences)
