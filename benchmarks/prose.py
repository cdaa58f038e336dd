"""The words of the performance page."""

from __future__ import annotations

from typing import Final

INTRODUCTION: Final = """# How fast it is and how little it takes

Made by `make benchmark-speed` from [{name}.json]({name}.json); change nothing here. One part alone:
`make benchmark-speed ARGS="--only steps"`. What is measured stays with `ARGS=--continue`.

Models have random weights at the shapes of published ones (`benchmarks/shapes.py`): how long a step takes does not
depend on what a model knows. `olmoe-125m` (float32) and `qwen2-moe-1b` (bfloat16) are small models of ours. Every
ratio is of one run: both ways take turns on the same machine, and the medians are compared. A step sees 4 forget and
4 retain sequences of 64 tokens; one expert is trained. *Texts* are running texts, all of whose tokens but the first are
labels. *Answers* are prompts of 32 tokens with answers of 32, and only the answer's tokens are labels.

*Naive* is the ordinary way, the whole model and a second, frozen one in memory. **N1** is careful: all is frozen but
the fused experts of the target layer, a mask keeps the gradient of the target expert, experts are multiplied in groups,
AdamW is fused, and RMU computes no logits. **N0** is what open-unlearning and the WMDP code do: every parameter wants a
gradient and is in the optimiser. Where memory has no room for a second model, N1 uses the first in its place, which
takes as long. All ways use the same losses, and before the clock starts their first steps must give the same loss; in
float32 the expert that comes out must be the same.

Machine: {environment}.
"""

# Section -> title, what its table says.
SECTIONS: Final[dict[str, tuple[str, str]]] = {
    "glance": (
        "At a glance",
        """
*Times as fast*: as N1, the careful naive way; for attribution as `from_pretrained` with hooks, for writing as
`save_pretrained`. *N0*: the usual naive way, where it fits. *Memory*: peak anonymous memory, of steps at the
middle layer, and *otherwise* the same of the other way. Empty: not measured, or there is no room for the other way.
""",
    ),
    "steps": (
        "Training steps",
        """
`ARGS="--only steps"`. Seconds of one step when an expert of an early, a middle or a late layer is trained; with its
router frozen, as the default has it, or trained, as the paper has it. RMU stops at the target layer, and everything
below it is a constant: its step is one expert on the tokens that it sees, at any depth. Losses over logits need the
layers above the target, of the last one only attention at every token. *Of the floor*: the share of the step that is
matrix products which no exact method can do without, forward and backward through these layers and the head, measured
beside it on the same weights; *floor GFLOP/s* is the rate that the machine reaches on them. *Constants*: seconds before
the first step, once a job.
""",
    ),
    "memory": (
        "Memory of training",
        """
`ARGS="--only steps"`. On texts. Peak anonymous memory of a process that opens the model, as each way does, and trains
an expert of the middle layer. Ours holds the target layer, and for losses over logits the layers above it. An empty
cell: it does not fit on this machine.
""",
    ),
    "attribution": (
        "Attribution",
        """
`ARGS="--only attribution"`. Scoring every expert on 64 texts of 256 tokens, on 32 where the model is large, loading
included. *Streamed* (ours) reads one layer after the other and takes all texts through it; *resident* is
`from_pretrained` with hooks at the best of three batch sizes, of two where the model is large. Both must give the same
scores. Anonymous memory is what the process owns; the other column counts the pages of mapped files too, which the
system may drop.
""",
    ),
    "writing": (
        "Writing the checkpoint",
        """
`ARGS="--only writing"`. A model in which one expert is new. `save_pretrained` writes all of it. Ours writes what
changed: *first* from a base that it never saw, *again* from one whose digests it remembers, *copied* on a file system
where nothing can be shared. *delta* is the file of the change alone. What was written is opened by
`from_pretrained` and must be the base and the change. *To the disk*: until the disk has it; ours returns only then.
""",
    ),
    "jobs": (
        "The whole job",
        """
`ARGS="--only jobs"`. From files to files, on prompts with answers: 5 epochs, with *in 10GB* and *in 4GB* one. Ours
attributes, trains, looks at a small evaluation set, measures, writes and verifies; the naive way loads two models,
attributes with hooks, trains N1 and calls `save_pretrained`, and looks at nothing. Both choose the same expert. *In
3GB* and the like: what the job was allowed to use. *In memory*: what its plan therefore keeps while it trains, the
whole model, the suffix from the target layer on, or, streamed, the target layer alone. *By phase*: attributing,
unlearning, evaluating, publishing.
""",
    ),
    "scaling": (
        "What it grows with",
        """
`ARGS="--only scaling"`. `olmoe-125m` of 4 layers with one size doubled twice. The exponent is that of the power which
fits the medians best: 0 = does not grow, 1 = doubles when the size doubles. *At most* is what the arithmetic says:
an RMU step does not depend on depth; a token sees as many experts however many there are, but each is read once;
attention grows with the square of the length. Bytes are what the process grew by.
""",
    ),
    "plan": (
        "What the plan says beforehand",
        """
`ARGS="--only plan"`. Each job is planned, run, and compared: 1 = as planned, above 1 = it took more than planned. A
plan should be within a fifth for memory and a factor of 1.5 for seconds.
""",
    ),
}
