"""dLoss/dc of every expert against fused gradients, by hand and by finite differences; and what it costs."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from seuf_core.attribution.gradient import Derivatives
from seuf_core.data.batches import Encoded, collate, length_bucketed
from seuf_core.families import FAMILIES
from seuf_core.moe.view import MoEView, moe_view
from tests import tiny
from tests.attribution.written import routed
from tests.scored import expert_derivatives
from tests.sequences import LENGTHS, sequences


def mean_nll(model: PreTrainedModel, rows: list[Encoded]) -> torch.Tensor:
    """Mean over sequences of the mean negative log-likelihood of their labels, each sequence alone."""
    losses = []
    for row in rows:
        log_probs = model(input_ids=torch.tensor([row.input_ids]), use_cache=False).logits[0].log_softmax(-1)
        labels = range(row.labels_from, len(row.input_ids))
        losses.append(-sum(log_probs[t - 1, row.input_ids[t]] for t in labels) / len(labels))
    return torch.stack(losses).mean()


def uneven() -> list[Encoded]:
    """Sequences with one, two, ... label tokens, so that a mean over all tokens is another number."""
    return [
        Encoded(row.input_ids, max(1, len(row.input_ids) - 1 - i), False) for i, row in enumerate(sequences())
    ]


def fused(view: MoEView, rows: list[Encoded]) -> torch.Tensor:
    """Sum over every parameter of each expert of gradient * weight, from gradients of the fused tensors."""
    for layer in view.layers:
        layer.experts.requires_grad_(True)
    mean_nll(view.model, rows).backward()
    per_layer = []
    for layer in view.layers:
        products = [(p.grad * p.detach()).flatten(1).sum(1) for p in layer.experts.parameters()]
        assert len(products) >= 2
        per_layer.append(torch.stack(products).sum(0))
    view.model.zero_grad()
    return torch.stack(per_layer).double()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_it_equals_the_fused_gradients(family: str) -> None:
    rows = uneven()
    view = moe_view(tiny.build_model(family))
    found = expert_derivatives(view, length_bucketed(rows, tokens_per_batch=24, pad_token_id=0))
    expected = fused(view, rows)
    assert found.sequences == len(rows)
    assert found.mean.dtype == torch.float64
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(
        found.mean, expected, rtol=1e-3, atol=2e-6 * float(expected.abs().max()) + 2e-6
    )


def test_biases_count_where_experts_have_them() -> None:
    """Fresh models have biases of 0, which would hide them."""
    view = moe_view(tiny.build_model("gpt_oss"))
    with torch.no_grad():
        for layer in view.layers:
            layer.experts.gate_up_proj_bias.normal_(generator=torch.Generator().manual_seed(layer.index))
            layer.experts.down_proj_bias.normal_(generator=torch.Generator().manual_seed(layer.index))
    rows = uneven()
    found = expert_derivatives(view, [collate(rows)]).mean
    torch.testing.assert_close(found, fused(view, rows), rtol=1e-3, atol=1e-5)


def test_it_is_the_slope_of_the_loss_when_an_expert_is_scaled() -> None:
    """Central difference: all parameters of one expert times 1.01 and times .99, in fp64."""
    rows = uneven()
    view = moe_view(tiny.build_model("mixtral").double())
    view.model.set_experts_implementation("eager")  # grouped_mm has no fp64
    found = expert_derivatives(view, [collate(rows)]).mean
    for row, expert in ((0, 0), (1, 3), (2, 2)):
        losses = []
        for factor in (1.01, 0.99 / 1.01, 1 / 0.99):
            for parameter in view.layers[row].experts.parameters():
                parameter.data[expert] *= factor
            losses.append(mean_nll(view.model, rows).detach())
        slope = float(losses[0] - losses[1]) / 0.02
        assert float(found[row, expert]) == pytest.approx(slope, rel=5e-3, abs=1e-5)


def test_an_expert_that_no_token_chose_has_none() -> None:
    scores = [[0.4, 0.3, 0.2, 0.1]] * 3
    with routed(scores, [[0, 2], [2, 0], [0, 2]]) as view:
        found = expert_derivatives(view, [collate([Encoded([5, 6, 7], 1, False)])]).mean
    assert found[0, 1] == found[0, 3] == 0.0
    assert found[0, 0] != 0.0
    assert found[0, 2] != 0.0


def test_batches_and_padding_change_nothing_and_sets_add_up() -> None:
    view = moe_view(tiny.build_model("qwen2_moe"))
    rows = uneven()
    together = expert_derivatives(view, [collate(rows, pad_token_id=0)])
    apart = expert_derivatives(view, [collate([row], pad_token_id=200) for row in rows])
    torch.testing.assert_close(apart.mean, together.mean, rtol=1e-4, atol=1e-7)
    padded = expert_derivatives(view, [collate(rows, pad_token_id=77)])
    torch.testing.assert_close(padded.mean, together.mean, rtol=1e-4, atol=1e-7)
    first, second = (expert_derivatives(view, [collate(part)]) for part in (rows[:2], rows[2:]))
    assert (first + second).sequences == len(LENGTHS)
    torch.testing.assert_close((first + second).mean, together.mean, rtol=1e-4, atol=1e-7)


def test_no_sequence_gives_zeros() -> None:
    none = expert_derivatives(moe_view(tiny.build_model("olmoe")), [])
    assert none.sequences == 0
    assert torch.equal(none.mean, torch.zeros(3, 8, dtype=torch.float64))
    two = Derivatives(torch.full((1, 2), 3.0, dtype=torch.float64), 2)
    assert (none.mean.shape, two.mean.tolist()) == ((3, 8), [[1.5, 1.5]])


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation made; views of the model's weights are not memory."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.numel = 0
        self.own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.own:
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize(
    ("family", "width"), [("qwen2_moe", "moe_intermediate_size"), ("gpt_oss", "intermediate_size")]
)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_no_gradient_of_the_expert_tensors_is_built(family: str, width: str, implementation: str) -> None:
    view = moe_view(tiny.build_model(family, num_hidden_layers=1, **{width: 256}))
    view.model.set_experts_implementation(implementation)
    fused_numel = view.layers[0].experts.down_proj.numel()
    row = Encoded([5, 6, 7], 1, False)
    with Largest(view.model) as largest:
        expert_derivatives(view, [collate([row])])
    assert 0 < largest.numel < fused_numel / 4
    view.model.requires_grad_(True)
    with Largest(view.model) as naive:
        mean_nll(view.model, [row]).backward()
    assert naive.numel >= fused_numel  # so the figure above means something


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_the_model_is_left_as_it_was(family: str) -> None:
    model = tiny.build_model(family)
    view = moe_view(model)
    frozen = {name for name, _ in list(model.named_parameters())[::2]}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    implementation = model.config._experts_implementation
    with pytest.raises(RuntimeError, match="stop"):
        expert_derivatives(view, (raise_stop() for _ in range(1)))
    expert_derivatives(view, [collate(sequences())])
    assert model.config._experts_implementation == implementation
    assert not any(hasattr(layer.experts, "_seuf_scales") for layer in view.layers)
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert parameter.requires_grad == (name not in frozen)
        assert torch.equal(parameter, before[name])


def test_weights_that_require_a_gradient_keep_no_more_of_the_activations() -> None:
    kept = []
    for trainable in (False, True):
        view = moe_view(tiny.build_model("olmoe").requires_grad_(trainable))
        saved: list[int] = []

        def count(tensor: torch.Tensor, saved: list[int] = saved) -> torch.Tensor:
            saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            expert_derivatives(view, [collate(sequences())])
        kept.append(sum(saved))
    assert kept[0] == kept[1] > 0


def test_it_takes_gradients_where_a_caller_wants_none_and_runs_the_models_own_experts_function() -> None:
    view, calls = moe_view(tiny.build_model("olmoe")), []
    grouped = ALL_EXPERTS_FUNCTIONS["grouped_mm"]

    def counted(self: object, *inputs: torch.Tensor) -> torch.Tensor:
        calls.append(self)
        result: torch.Tensor = grouped(self, *inputs)
        return result

    ALL_EXPERTS_FUNCTIONS.register("seuf_test_counted", counted)
    view.model.set_experts_implementation("seuf_test_counted")
    with torch.no_grad():
        found = expert_derivatives(view, [collate(sequences())])
    there = [layer.experts for layer in view.layers]
    assert calls == [*there, *reversed(there)]  # forward, and each once more on the way back
    assert found.mean.abs().max() > 1e-3


def raise_stop() -> None:
    raise RuntimeError("stop")
