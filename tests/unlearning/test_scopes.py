"""Every scope under every router mode that a method allows, through real training: what moves, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from seuf_core.errors import Cancelled, MethodError, ModelError
from seuf_core.method import Method, Scope
from seuf_core.moe.disk import all_tensors
from seuf_core.moe.forward import Forward
from seuf_core.moe.routing import capture_routing
from seuf_core.moe.view import MoEView, moe_view
from seuf_core.unlearning.loop import Run, train_rung
from seuf_core.unlearning.objectives import TrainingData, build_objective
from seuf_core.unlearning.scopes import SCOPES, Trainable, assign, build_trainable, snapshot
from tests import tiny
from tests.unlearning.test_loop import Recorder, same
from tests.unlearning.test_loop import make_run as loop_run
from tests.unlearning.test_objectives import FORGET, RETAIN
from tests.unlearning.test_project import inputs_by_expert

# Scope -> the router modes that Method lets it have.
ALLOWED: dict[str, tuple[str, ...]] = {
    "seuf": ("freeze", "train", "project"),
    "random_expert": ("freeze", "train", "project"),
    "top_m": ("freeze", "train", "project"),
    "esft": ("freeze",),
    "experts_only": ("freeze",),
    "router_only": ("train", "project"),
    "lora": ("freeze",),
    "full": ("freeze", "train"),
}
COMBINATIONS = [(scope, router) for scope, routers in ALLOWED.items() for router in routers]
EVERY = pytest.mark.parametrize(("scope", "router"), COMBINATIONS)
# One of each kind: the other scopes differ from seuf in how their experts are chosen, which is not done here.
KINDS = pytest.mark.parametrize(
    ("scope", "router"), [pair for pair in COMBINATIONS if pair[0] in ("seuf", "router_only", "lora", "full")]
)
FAMILIES = pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v2"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
LAYERS = (1, 2)


def method_of(scope: str, router: str, **fields: Any) -> Method:
    count = {"experts": 3} if scope == "top_m" else {}
    chosen = {"scope": scope, "router": router, "lora_rank": 2, "project_energy": 0.9, **count}
    return Method.model_validate({"steps": 4, "batch_size": 5, "evaluate_every": 2, **chosen, **fields})


def busiest(view: MoEView) -> dict[int, tuple[int, ...]]:
    """Two experts of one layer and one of the next that forget tokens really use: others would not move."""
    found = {}
    with capture_routing(view) as routing, torch.no_grad():
        view.model(input_ids=torch.tensor([FORGET[1].input_ids]))
    for layer, count in zip(LAYERS, (2, 1), strict=True):
        uses = routing.selected(layer).sum(dim=0)
        found[layer] = tuple(sorted(uses.topk(count).indices.tolist()))
    return found


def build(view: MoEView, method: Method, targets: Mapping[int, tuple[int, ...]], **fields: Any) -> Trainable:
    given: dict[str, Any] = {"on_disk": None, "retain": RETAIN, "observer": Recorder(), **fields}
    return build_trainable(view, method, targets, **given)


def make_run(
    work: Path, family: str, method: Method, observer: Recorder | None = None
) -> tuple[Run, MoEView]:
    view = moe_view(tiny.build_model(family))
    targets = busiest(view) if method.selects_experts else {}
    trainable = build(view, method, targets)
    template, _ = loop_run(work, observer=observer)
    run = replace(
        template,
        method=method,
        trainable=trainable,
        initial=snapshot(trainable),
        objective=build_objective(Forward(view), method, TrainingData(FORGET, RETAIN), targets),
    )
    return run, view


def expected_names(
    scope: str, router: str, names: set[str], targets: Mapping[int, tuple[int, ...]]
) -> set[str]:
    """Names on disk of what a scope trains, from what the names say."""
    experts = {
        f"model.layers.{layer}.mlp.experts.{expert}.{kind}_proj.weight"
        for layer, chosen in targets.items()
        for expert in chosen
        for kind in ("gate", "up", "down")
    }
    routers = {f"model.layers.{layer}.mlp.gate.weight" for layer in targets}
    if scope == "full":
        return names
    if scope == "lora":
        linear = re.compile(
            r"(self_attn|shared_experts?|mlp)\.\w+_(proj|mqa|gate)\.weight|shared_expert_gate\.weight"
        )
        return {name for name in names if linear.search(name) and ".experts." not in name}
    if scope == "router_only":
        return routers
    return experts | routers if router != "freeze" else experts


def bits(tensors: Mapping[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: tensor.contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


@EVERY
@FAMILIES
def test_training_moves_what_the_scope_names_and_nothing_else(
    family: str, scope: str, router: str, tmp_path: Path
) -> None:
    method = method_of(scope, router)
    run, view = make_run(tmp_path, family, method)
    targets = busiest(view) if method.selects_experts else {}
    before = bits(all_tensors(view))
    train_rung(run, 0, 3e-3)
    if scope != "full":
        assert bits(all_tensors(view)) == before, "the model changed before merge"
    run.trainable.merge()
    after = bits(all_tensors(view))
    changed = {name for name, content in after.items() if content != before[name]}
    assert changed == expected_names(scope, router, set(after), targets)
    written = run.trainable.disk_tensors()
    assert changed == set(written)
    assert bits(written) == {name: after[name] for name in written}


@KINDS
def test_the_optimiser_has_state_for_what_is_trained_only(scope: str, router: str, tmp_path: Path) -> None:
    run, view = make_run(tmp_path, "qwen2_moe", method_of(scope, router))
    optimizer = torch.optim.AdamW(run.trainable.named_parameters().values(), lr=1e-3)
    with run.trainable.attached():
        run.objective([0, 1, 2, 3, 4], [0, 1, 2, 3]).total(run.method).backward()
    optimizer.step()
    moments = sum(t.numel() for state in optimizer.state.values() for t in state.values() if t.dim())
    assert moments == 2 * sum(leaf.numel() for leaf in run.trainable.named_parameters().values())
    if scope != "full":
        assert all(parameter.grad is None for parameter in view.model.parameters())


@KINDS
def test_a_cancelled_run_goes_on_to_the_same_bits(scope: str, router: str, tmp_path: Path) -> None:
    method = method_of(scope, router)
    expected, _ = make_run(tmp_path / "a", "qwen2_moe", method)
    train_rung(expected, 0, 3e-3)
    stopped, _ = make_run(tmp_path / "b", "qwen2_moe", method, Recorder(1))
    with pytest.raises(Cancelled):
        train_rung(stopped, 0, 3e-3)
    observer = Recorder()
    resumed, _ = make_run(tmp_path / "b", "qwen2_moe", method, observer)
    train_rung(resumed, 0, 3e-3)
    assert observer.of("step", "step") == [2, 3, 4]
    assert same(snapshot(resumed.trainable), snapshot(expected.trainable))
    assert not same(snapshot(resumed.trainable), resumed.initial)


@KINDS
@DTYPES
def test_the_initial_values_give_the_base_back_bit_for_bit(
    scope: str, router: str, dtype: torch.dtype
) -> None:
    """What `measure` does: before, after, and the values of before again."""
    view = moe_view(tiny.build_model("qwen2_moe").to(dtype))
    base = bits(dict(view.model.named_parameters()))
    trainable = build(view, method_of(scope, router), busiest(view))
    initial = snapshot(trainable)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for leaf in trainable.named_parameters().values():
            leaf.add_(0.1 * torch.randn(leaf.shape, generator=generator))
    final = snapshot(trainable)
    merged = []
    for values in (initial, final, initial, final, final):
        assign(trainable, values)
        trainable.merge()
        merged.append(bits(dict(view.model.named_parameters())))
    assert merged[0] == merged[2] == base
    assert merged[1] == merged[3] == merged[4] != base


@KINDS
def test_a_bf16_model_takes_a_step(scope: str, router: str) -> None:
    view = moe_view(tiny.build_model("qwen2_moe").bfloat16())
    method, targets = method_of(scope, router), busiest(view)
    trainable = build(view, method, targets)
    initial = snapshot(trainable)
    objective = build_objective(
        Forward(view), method, TrainingData(FORGET, RETAIN), targets if method.selects_experts else {}
    )
    optimizer = torch.optim.AdamW(trainable.named_parameters().values(), lr=1e-2, weight_decay=0.0)
    with trainable.attached():
        objective([0, 1], [0, 1]).total(method).backward()
        optimizer.step()
        trainable.constrain()
    values = snapshot(trainable)
    assert all(bool(value.isfinite().all()) for value in values.values())
    assert not same(values, initial)


def test_a_whole_model_in_16_bits_is_refused_or_warned_about() -> None:
    """AdamW's 1e-8 is 0 in float16, so its first step divides by 0 whatever the rate."""
    observer = Recorder()
    half = moe_view(tiny.build_model("qwen2_moe").half())
    with pytest.raises(ModelError) as refused:
        build(half, method_of("full", "freeze"), {}, observer=observer)
    assert refused.value.code == "float16_model"
    for scope in ("seuf", "lora"):  # their leaves are float32
        build(half, method_of(scope, "freeze"), busiest(half), observer=observer)
    build(moe_view(tiny.build_model("qwen2_moe")), method_of("full", "freeze"), {}, observer=observer)
    assert not observer.events
    build(
        moe_view(tiny.build_model("qwen2_moe").bfloat16()), method_of("full", "freeze"), {}, observer=observer
    )
    assert observer.of("warning", "code") == ["bfloat16_rounding"]


@pytest.mark.parametrize(("scope", "router"), [("lora", "freeze"), ("full", "train")])
def test_a_dense_model_has_adapters_and_a_whole(scope: str, router: str, tmp_path: Path) -> None:
    run, view = make_run(tmp_path, "llama", method_of(scope, router))
    before = bits(all_tensors(view))
    train_rung(run, 0, 3e-3)
    run.trainable.merge()
    changed = {name for name, content in bits(all_tensors(view)).items() if content != before[name]}
    assert changed == set(run.trainable.disk_tensors())
    assert changed == expected_names(scope, router, set(before), {})


def test_every_scope_of_the_method_has_a_row() -> None:
    assert set(SCOPES) == set(get_args(Scope)) == set(ALLOWED)


@pytest.mark.parametrize("scope", ["seuf", "router_only"])
def test_what_retain_tokens_see_of_a_projected_router_is_the_energy_left_to_it(
    scope: str, tmp_path: Path
) -> None:
    """All of it held: nothing; half of it: something; under router `train`: more."""
    seen = {}
    for name, router, energy in (("whole", "project", 1.0), ("half", "project", 0.5), ("none", "train", 0.5)):
        run, view = make_run(tmp_path / name, "qwen2_moe", method_of(scope, router, project_energy=energy))
        inputs = {layer: inputs_by_expert(view, layer, RETAIN) for layer in LAYERS}
        train_rung(run, 0, 3e-3)
        seen[name] = 0.0
        for layer, found in inputs.items():
            key = f"layers.{layer}.router"
            change = run.trainable.named_parameters()[key].detach() - run.initial[key]
            for x, row in zip(found, change, strict=True):
                seen[name] = max([seen[name], *(x @ row).abs().tolist()])
    assert seen["whole"] < 1e-5
    assert 1e-3 < seen["half"] < seen["none"]


@pytest.mark.parametrize("router", ["train", "project"])
def test_routers_alone_leave_every_expert_as_it_is(router: str) -> None:
    view = moe_view(tiny.build_model("qwen2_moe"))
    trainable = build(view, method_of("router_only", router), {1: (0, 5), 2: (3,)})
    assert list(trainable.named_parameters()) == ["layers.1.router", "layers.2.router"]


def test_experts_alone_leave_every_router_as_it_is() -> None:
    view = moe_view(tiny.build_model("qwen2_moe"))
    names = list(build(view, method_of("experts_only", "freeze"), {1: (0,)}).named_parameters())
    assert names == ["layers.1.experts.0.gate_up_proj", "layers.1.experts.0.down_proj"]


def test_routers_that_retain_tokens_hold_whole_are_refused_when_nothing_else_is_trained() -> None:
    """One token for each of 32 dimensions and more: the inputs of every expert span everything."""
    view = moe_view(tiny.build_model("mixtral"))
    generator = torch.Generator().manual_seed(0)
    many = [type(row)(torch.randint(3, 259, (90,), generator=generator).tolist(), 1, False) for row in RETAIN]
    method = method_of("router_only", "project", project_energy=1.0)
    with pytest.raises(MethodError) as refused:
        build(view, method, {1: (0,)}, retain=many)
    assert refused.value.code == "router_held"
    assert "all 4 router rows" in refused.value.message
    assert "Lower project_energy" in str(refused.value.fix)
    observer = Recorder()
    trainable = build(
        view, method_of("seuf", "project", project_energy=1.0), {1: (0,)}, retain=many, observer=observer
    )
    assert len(trainable.named_parameters()) == 3
    assert observer.of("warning", "code") == ["router_rows_held"]
    assert "4 of 4 router rows" in observer.of("warning", "message")[0]


def test_rows_that_can_move_are_not_warned_about() -> None:
    view = moe_view(tiny.build_model("mixtral"))
    observer = Recorder()
    build(view, method_of("router_only", "project", project_energy=0.5), {1: (0,)}, observer=observer)
    assert not observer.events


@KINDS
def test_a_second_run_gets_the_gradients_of_the_first(scope: str, router: str, tmp_path: Path) -> None:
    """The rates of a ladder are tried one after the other on one Trainable."""
    run, _ = make_run(tmp_path, "qwen2_moe", method_of(scope, router))
    found = []
    for _ in range(2):
        with run.trainable.attached():
            run.objective([0, 1], [0, 1]).total(run.method).backward()
        leaves = run.trainable.named_parameters()
        found.append({name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None})
        for leaf in leaves.values():
            leaf.grad = None
    assert found[0]
    assert same(found[0], found[1])


def test_adapters_have_the_rank_and_the_scale_of_the_method() -> None:
    view = moe_view(tiny.build_model("qwen2_moe"))
    trainable = build(view, method_of("lora", "freeze", lora_rank=4, lora_alpha=10.0), {})
    leaves = trainable.named_parameters()
    layer = "model.layers.0.self_attn.o_proj"
    down, up = leaves[f"{layer}.lora_A"], leaves[f"{layer}.lora_B"]
    assert (down.shape, up.shape) == ((4, 32), (32, 4))
    weight = view.model.get_submodule(layer).weight
    base = weight.detach().clone()
    with torch.no_grad():
        up.fill_(0.5)
    trainable.merge()
    torch.testing.assert_close(weight.detach(), base + 2.5 * (up @ down).detach())


@pytest.mark.parametrize("seed", [0, 1])
def test_adapters_start_from_the_seed_of_the_method(seed: int) -> None:
    def first(of: int) -> dict[str, torch.Tensor]:
        return snapshot(
            build(moe_view(tiny.build_model("qwen2_moe")), method_of("lora", "freeze", seed=of), {})
        )

    assert same(first(seed), first(seed))
    assert not same(first(seed), first(seed + 1))
