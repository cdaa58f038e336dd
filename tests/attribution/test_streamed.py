"""Attribution of a model whose layers are on disk: the same scores, and what is read and held meanwhile."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch

from seuf_core.attribution import gradient
from seuf_core.attribution.scores import Scored, score_experts
from seuf_core.checkpoint.index import read_index
from seuf_core.data.batches import Encoded
from seuf_core.families import FAMILIES, LAYER_PREFIX
from seuf_core.method import Attribution, Method
from seuf_core.moe import sweep
from seuf_core.moe.skeleton import open_model
from seuf_core.moe.view import MoEView, moe_view
from seuf_core.unlearning.project import held_by_retain
from tests import tiny
from tests.sequences import sequences

FORGET, RETAIN = sequences(0), sequences(1, lengths=(4, 8, 6))


def scored(view: MoEView, name: Attribution, scratch: Path | None = None) -> Scored:
    """In several batches."""
    return score_experts(
        view,
        FORGET,
        RETAIN,
        Method(attribution=name),
        tokens_per_batch=18,
        tokens_per_backward=18,
        scratch=scratch,
    )


def assert_equal(found: Scored, wanted: Scored) -> None:
    assert torch.equal(found.matrix, wanted.matrix)
    assert torch.equal(found.forget.answer_experts, wanted.forget.answer_experts)
    assert found.forget.layers == wanted.forget.layers
    assert len(found.halves) == len(wanted.halves) == 2
    for one, other in zip(found.halves, wanted.halves, strict=True):
        assert torch.equal(one.matrix, other.matrix)


# Plain; experts with biases; something carried from layer to layer; dense layers first; layers without attention.
GRADIENTS: list[tuple[str, Attribution]] = [
    (family, "gradient") for family in ("olmoe", "gpt_oss", "glm_moe_dsa", "deepseek_v3", "jamba")
]


@pytest.mark.parametrize(("family", "name"), [*((family, "contrast") for family in FAMILIES), *GRADIENTS])
def test_every_score_is_that_of_the_resident_model_to_the_last_bit(
    family: str, name: Attribution, tmp_path: Path
) -> None:
    folder = tiny.write_model(tmp_path, family)
    streamed, resident = open_model(folder), moe_view(tiny.build_model(family))
    assert_equal(scored(streamed, name), scored(resident, name))


def test_in_bfloat16_too(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path, "hunyuan_v1_moe", dtype=torch.bfloat16)  # with routers in fp32
    streamed, held = open_model(folder), open_model(folder)
    held.weights.hold(range(held.num_layers))
    assert_equal(scored(streamed, "contrast"), scored(held, "contrast"))


class Reads:
    """Bytes read of each tensor at the system call, and how many layers were in memory at most when one was."""

    def __init__(self, folder: Path, view: MoEView) -> None:
        self.index, self.view = read_index(folder), view
        self.ranges: list[tuple[str, int, int]] = []
        self.most = 0

    def note(self, file: int, offset: int, size: int) -> None:
        self.ranges.append((Path(f"/proc/self/fd/{file}").readlink().name, offset, size))
        layers = self.view.model.get_decoder().layers
        self.most = max(
            self.most, sum(not any(t.is_meta for t in x.state_dict().values()) for x in layers) + 1
        )

    def times_read(self) -> list[set[float]]:
        """Of each layer: how often each of its tensors was read, in bytes read by bytes there are."""
        found = []
        for layer in range(self.view.num_layers):
            records = self.index.with_prefix(LAYER_PREFIX.format(layer=layer))
            assert records
            found.append({
                sum(
                    size
                    for shard, offset, size in self.ranges
                    if shard == record.shard and record.offset <= offset < record.offset + record.bytes
                )
                / record.bytes
                for record in records
            })  # fmt: skip
        return found


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reads:
    """A streamed OLMoE of four layers whose reads are counted from here on."""
    folder = tiny.write_model(tmp_path / "model", "olmoe", num_hidden_layers=4)
    view = open_model(folder)
    reads, real = Reads(folder, view), os.preadv

    def counting(file: int, buffers: list[memoryview], offset: int) -> int:
        size = real(file, buffers, offset)
        reads.note(file, offset, size)
        return size

    monkeypatch.setattr(os, "preadv", counting)
    return reads


@pytest.mark.parametrize("name", ["affinity", "contrast"])
def test_a_pass_over_all_sets_and_halves_reads_every_layer_once_and_holds_one(
    counted: Reads, name: Attribution
) -> None:
    scored(counted.view, name)
    assert counted.times_read() == [{1.0}] * 4
    assert counted.most == 1  # the next one is in the page cache at most


def test_the_gradient_reads_every_layer_once_more_there_and_once_back(counted: Reads) -> None:
    scored(counted.view, "gradient")
    # Three passes; the last layer of the way there is the first of the way back, and is still there.
    assert counted.times_read() == [{3.0}, {3.0}, {3.0}, {2.0}]
    assert counted.most == 1


def test_groups_of_the_gradient_read_again_and_change_nothing(
    counted: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = scored(counted.view, "gradient")
    del counted.ranges[:]
    monkeypatch.setattr(gradient, "BYTES_OF_A_GROUP", 18 * 5 * 32 * 4)  # one batch
    assert_equal(scored(counted.view, "gradient"), whole)
    assert min(counted.times_read()[0]) > 3


def test_projection_reads_up_to_its_highest_layer_once(counted: Reads) -> None:
    held_by_retain(counted.view, (0, 2), RETAIN, 1.0, sweep.no_progress)
    assert counted.times_read() == [{1.0}, {1.0}, {1.0}, {0.0}]


def test_layers_that_are_held_are_not_read(counted: Reads) -> None:
    counted.view.weights.hold([1])
    del counted.ranges[:]
    scored(counted.view, "affinity")
    assert counted.times_read() == [{1.0}, {0.0}, {1.0}, {1.0}]


@pytest.mark.parametrize("name", ["contrast", "gradient"])
@pytest.mark.parametrize("family", ["olmoe", "glm_moe_dsa"])
def test_states_on_disk_and_masks_made_anew_change_nothing_and_leave_nothing(
    family: str, name: Attribution, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    view, files = moe_view(tiny.build_model(family)), []
    wanted, real = scored(view, name), tempfile.TemporaryFile

    def noted(**where: Path) -> object:
        files.append(where["dir"])
        return real(**where)

    monkeypatch.setattr(tempfile, "TemporaryFile", noted)
    monkeypatch.setattr(sweep, "MASKS_IN_MEMORY", 0)
    monkeypatch.setattr(sweep, "STATES_IN_MEMORY", 2000)
    monkeypatch.setattr(gradient, "STATES_IN_MEMORY", 2000)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    assert_equal(scored(view, name, scratch), wanted)
    assert files
    assert set(files) == {scratch}
    assert not list(scratch.iterdir())


def test_nothing_above_the_last_router_is_run() -> None:
    """Its experts neither, nor the layers and the head above."""
    view = moe_view(tiny.build_model("qwen2_moe", num_hidden_layers=4, mlp_only_layers=[3]))
    assert view.layer_indices == (0, 1, 2)
    run: list[object] = []
    watched = [view.layer(1).experts, view.layer(2).router, view.layer(2).experts]
    for module in (*watched, view.model.get_decoder().layers[3], view.model.get_output_embeddings()):
        module.register_forward_hook(lambda module, *_: run.append(module))
    scored(view, "affinity")
    assert run
    assert set(run) == set(watched[:2])


def test_no_sequence_reads_nothing_wrong(counted: Reads) -> None:
    rows: list[Encoded] = []
    found = score_experts(counted.view, rows, rows, Method(attribution="gradient"))
    assert found.matrix.shape == (4, 8)
    assert not found.matrix.any()
