"""Plans by hand-worked numbers: bytes exact, decisions where the bytes say, more work never for less memory."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from seuf_core.method import Method
from seuf_core.plan import costs, phases
from seuf_core.plan.facts import LayerShape, Machine, TokenCounts
from seuf_core.plan.planner import Plan, make_plan
from seuf_core.plan.setting import Setting, Targets, worst_targets
from tests.plan.made import UNIT, shape, tokens, with_memory

ONE = Targets((2,), 1)  # of layers 0 to 3
NPO = Method(objective="npo", experts=1, strength="fixed", learning_rate=1e-4, steps=20, batch_size=4)


def plan(
    memory: int = 10**12, method: Method = NPO, targets: Targets | None = ONE, **changed: object
) -> Plan:
    return make_plan(
        shape(**changed),  # type: ignore[arg-type]
        tokens(),
        method,
        with_memory(memory),
        calibration=UNIT,
        targets=targets,
    )


def memory_of(made: Plan, name: str) -> dict[str, int]:
    return next(phase.memory for phase in made.phases if phase.name == name)


def peaks() -> dict[str, int]:
    """The smallest peak of each residency, and of all weights in memory with the whole batch."""
    setting = Setting(shape(), tokens(), NPO, ONE, UNIT)
    longest = setting.batch.longest
    return {
        name: max(d.peak for d in phases.drafts(replace(setting, residency=name, micro=micro)))
        for name in ("whole", "suffix", "streamed")
        for micro in [next(m for m in (80, 40, 20, 10) if m // 2 < longest)]
    }


def test_what_is_held_of_the_weights() -> None:
    one = 1_000_000_000
    whole = plan()
    assert whole.residency == "whole"
    assert {phase.memory["layers"] for phase in whole.phases} == {4 * one}
    suffix = plan(peaks()["whole"] - 1)
    assert suffix.residency == "suffix"
    assert memory_of(suffix, "attributing")["layers"] == one
    assert memory_of(suffix, "unlearning")["layers"] == 2 * one  # layers 2 and 3
    streamed = plan(peaks()["whole"] - 1, targets=Targets((0,), 1))
    assert streamed.residency == "streamed"
    assert memory_of(streamed, "unlearning")["layers"] == 2 * one  # layer 0, and one that comes and goes


def test_the_way_flips_where_the_bytes_say() -> None:
    need = peaks()
    assert need["suffix"] < need["whole"]
    assert plan(need["whole"]).residency == "whole"
    assert plan(need["whole"] - 1).residency == "suffix"
    assert plan(need["suffix"]).fits
    # On the way up to the target one layer more is there than those that stay.
    assert need["suffix"] - need["streamed"] > 900_000_000
    assert plan(need["suffix"] - 1).residency == "streamed"
    tight = plan(need["streamed"] - 1)
    assert not tight.fits
    assert "too much" in tight.residency_why


def test_streaming_is_taken_where_the_suffix_does_not_fit() -> None:
    made = shape(layers=8)
    setting = Setting(made, tokens(), NPO, Targets((2,), 1), UNIT, "suffix", 10)
    need = max(draft.peak for draft in phases.drafts(setting))

    def at(memory: int) -> Plan:
        return make_plan(made, tokens(), NPO, with_memory(memory), targets=Targets((2,), 1), calibration=UNIT)

    assert at(need).residency == "suffix"
    refused = at(need - 1)
    assert (refused.residency, refused.fits) == ("streamed", True)
    assert "suffix needs 7." in refused.residency_why
    # A step reads all layers above the target on the way up and again on the way down, a look only on the way up.
    unlearning = next(phase for phase in refused.phases if phase.name == "unlearning")
    assert unlearning.bytes_read == (2 * 20 + 2) * 5 * 1_000_000_000


def test_states_and_trained_numbers_by_hand() -> None:
    made = plan()
    # 100 forget and 100 retain sequences of 10 tokens, 100 numbers of 2 bytes each.
    assert memory_of(made, "attributing")["states"] == 2000 * 100 * 2
    # 3 * I * H numbers of one expert; 4 bytes; value, gradient, 2 moments, base, best, and a checkpoint twice.
    assert memory_of(made, "unlearning")["trained"] == 3000 * 4 * 12
    # With one look there is no checkpoint before the last one.
    once = plan(method=NPO.model_copy(update={"evaluate_every": NPO.steps}))
    assert memory_of(once, "unlearning")["trained"] == 3000 * 4 * 9
    assert (
        memory_of(once, "publishing")["trained"] == memory_of(made, "publishing")["trained"] == 3000 * 4 * 5
    )
    assert memory_of(made, "attributing")["process"] == 0  # as calibrated
    # Of a chunk of 128 positions: logits in 2 bytes and 12 bytes of fp32 beside them; a look has 20 * 5 labels.
    assert memory_of(made, "unlearning")["head"] == 100 * 1000 * 14


def test_operations_by_hand() -> None:
    made = plan()
    layer = 2 * (4000 + 2 * 3000)  # all of the dense part and 2 of 16 experts
    attributing = next(phase for phase in made.phases if phase.name == "attributing")
    assert attributing.flops == 4 * 2000 * layer
    # Without rates but 1 a second, reading 4 GB before anything can begin, and states of layers 1 to 3 left behind.
    assert attributing.seconds == 4 * 2000 * layer + 4_000_000_000 + 3 * 2000 * 200


def test_what_attribution_has_read_goes_on_at_the_start_layer() -> None:
    """1000 forget tokens, with contrast 1000 retain tokens, and 200 of probes; layer 2 of 0 to 3 is trained."""
    layer, base_look = 2 * (4000 + 2 * 3000), 200 * 2 * (4000 + 2 * 3000) - 100 * 2 * 2 * 3000
    asked = 2000 * 2 * (4000 + 2 * 3000) - 1000 * 2 * 2 * 3000  # of both sets: npo, and kl on retain
    head = (100 + 1000) * 2 * 100 * 1000
    for attribution, anew in (("contrast", 200), ("affinity", 1200)):
        made = plan(method=NPO.model_copy(update={"attribution": attribution}))
        found = next(phase.flops for phase in made.phases if phase.name == "constants")
        assert found == (2 * anew + 2200) * layer + base_look + asked + head
    long = replace(tokens(), forget=TokenCounts.of([(1000, 500)] * 15_000))
    setting = Setting(shape(), long, NPO.model_copy(update={"attribution": "affinity"}), ONE, UNIT)
    assert setting.trail == 1  # 4 GiB hold 15 million tokens' states of 200 bytes once, not twice


def test_storage_hides_behind_computing_and_loading_does_not() -> None:
    work = costs.Work(flops=10, read=8, stored=8, first=3, written=1, copied=1)
    assert work.seconds(UNIT) == 10 + 3 + 2
    assert replace(work, flops=1).seconds(UNIT) == 5 + 3 + 2
    # From the page cache 2 bytes a second: half of each byte's second is loading, which nothing hides.
    slow = replace(UNIT, reread_rate=2.0)
    assert work.seconds(slow) == (10 + 8 / 2) + 3 / 2 + 2
    assert replace(work, stored=0, first=0).seconds(slow) == 10 + 8 / 2 + 2
    assert (work.bytes_read, work.bytes_written) == (8 + 2, 2)


def test_what_does_not_fit_into_the_page_cache_comes_from_storage_every_time() -> None:
    """4.1 GB of files; streamed, all layers but the target's are read twice in each of 20 steps, and in 2 looks."""
    rates = replace(UNIT, layer_rate=math.inf, backward_rate=math.inf, head_rate=math.inf, step_rate=math.inf)
    seconds = [
        make_plan(
            shape(),
            tokens(),
            NPO,
            Machine(2_200_000_000, "what was given", {}, cache),
            calibration=replace(rates, write_rate=math.inf),
            targets=Targets((0,), 1),
        )
        for cache in (4_000_000_000, 4_100_000_000)
    ]
    cold, warm = (next(phase for phase in made.phases if phase.name == "unlearning") for made in seconds)
    assert cold.bytes_read == warm.bytes_read == (2 * 20 + 2) * 3 * 1_000_000_000
    assert (cold.seconds or 0) - (warm.seconds or 0) == pytest.approx(cold.bytes_read)


@pytest.mark.parametrize("name", ["forget", "retain", "selection", "test"])
@pytest.mark.parametrize("memory", [10**12, 3_000_000_000])
def test_more_tokens_never_need_less(name: str, memory: int) -> None:
    before = None
    for count in (10, 100, 1000, 5000):
        sets = replace(tokens(), **{name: TokenCounts.of([(10, 5)] * count)})
        made = make_plan(shape(), sets, NPO, with_memory(memory), calibration=UNIT, targets=ONE)
        assert made.seconds is not None
        if before is not None:
            assert made.peak_bytes >= before.peak_bytes
            assert made.seconds >= before.seconds
        before = made


def test_a_micro_batch_is_halved_before_weights_are_read_anew() -> None:
    """The whole batch is 80 padded tokens; with 40, half as many activations are kept."""
    wide = replace(
        shape(), width=100_000, layers=tuple(LayerShape(10**6, 4000, 400, ("s",)) for _ in range(4))
    )
    wide = replace(wide, shards={"s": 4 * 10**6}, outside_bytes=10)

    one = TokenCounts.of([(10, 5)])
    sets = replace(tokens(4, 4), selection=one, test=one)

    def at(memory: int) -> Plan:
        return make_plan(wide, sets, NPO, with_memory(memory), calibration=UNIT, targets=Targets((0,), 1))

    free = at(10**12)
    assert (free.residency, free.micro_batch_tokens) == ("whole", 80)
    tight = at(free.peak_bytes - 1)
    assert (tight.residency, tight.micro_batch_tokens) == ("whole", 40)
    assert memory_of(tight, "unlearning")["activations"] < memory_of(free, "unlearning")["activations"]


def test_the_worst_that_a_method_may_choose() -> None:
    sparse = replace(shape(), moe_layers=(1, 2, 3))
    assert worst_targets(sparse, Method()) == Targets((1, 2, 3), 3, guessed=True)
    assert worst_targets(sparse, Method(experts=2)) == Targets((1, 2), 2, guessed=True)
    assert worst_targets(sparse, Method(experts=2, spread="same_layer")) == Targets((1,), 2, guessed=True)
    assert worst_targets(sparse, Method(max_experts=1)) == Targets((1,), 1, guessed=True)
    assert worst_targets(sparse, Method(scope="esft", esft_share=0.25)) == Targets(
        (1, 2, 3), 12, guessed=True
    )
    assert worst_targets(sparse, Method(scope="full")) == Targets()


def test_a_bound_says_so_and_known_targets_do_not() -> None:
    bound = plan(targets=None)
    assert (bound.bound, bound.lowest_layer) == (True, 0)
    assert any("not known before attribution" in note for note in bound.notes)
    known = plan()
    assert (known.bound, known.lowest_layer, known.experts) == (False, 2, 1)
    assert known.peak_bytes <= bound.peak_bytes


@pytest.mark.parametrize(
    ("method", "why"),
    [
        (Method(scope="full", retain_loss="none"), "scope full"),
        (Method(scope="lora"), "scope lora"),
    ],
)
def test_what_goes_through_all_layers_keeps_them(method: Method, why: str) -> None:
    made = plan(2_000_000_000, method, None)
    assert (made.residency, made.fits) == ("whole", False)
    assert made.residency_why.startswith(why)


def test_a_whole_model_is_kept_several_times() -> None:
    made = plan(method=Method(scope="full", objective="gradient_ascent"), targets=None)
    numbers = 2_000_000_000
    held = memory_of(made, "unlearning")
    assert held["layers"] + held["outside"] + held["trained"] == 12 * 2 * numbers
    assert [phase.name for phase in made.phases] == ["unlearning", "evaluating", "publishing"]
    # Adapters go through the same layers and head, without a gradient of any weight but their own.
    adapters = plan(method=Method(scope="lora", objective="gradient_ascent"), targets=None)
    full, lora = (
        next(phase.flops for phase in one.phases if phase.name == "unlearning") for one in (made, adapters)
    )
    steps, size = Method(scope="full").steps, Method(scope="full").batch_size
    one_more = 4 * size * 10 * 20_000 - size * 5 * 12_000 + size * 5 * 2 * 100 * 1000
    assert full - lora == steps * one_more


def test_rmu_needs_nothing_above_its_layer_in_a_step() -> None:
    rmu = NPO.model_copy(update={"objective": "rmu", "retain_loss": "hidden_mse"})
    low, high = (plan(method=rmu, targets=Targets((layer,), 1)) for layer in (0, 3))
    work = [next(phase.flops for phase in made.phases if phase.name == "unlearning") for made in (low, high)]
    # Two looks at 20 probes of 10 tokens through layers 1 to 3, in the last of which experts run on their 100 labels.
    assert work[0] - work[1] == 2 * (3 * 200 * 2 * (4000 + 2 * 3000) - 100 * 2 * 2 * 3000)
    assert work[0] < next(p.flops for p in plan(targets=Targets((0,), 1)).phases if p.name == "unlearning")


def test_experts_of_the_last_layer_run_where_a_label_is_predicted() -> None:
    few = replace(shape(), layers=tuple(replace(layer, block=1000) for layer in shape().layers))
    frozen, trained = (
        make_plan(
            few,
            tokens(),
            NPO.model_copy(update={"router": router}),
            with_memory(10**12),
            calibration=UNIT,
            targets=Targets((3,), 1),
        )
        for router in ("freeze", "train")
    )
    assert costs.operations(few, (2, 3), 10, 4) == 10 * 2 * (2 * 10_000) - 6 * 2 * (1000 + 2 * 3000)
    assert costs.operations(few, (2, 3), 10) == 10 * 2 * (2 * 10_000)
    # Whoever trains the router of that layer anchors it, and an anchor is of all tokens.
    setting = Setting(few, tokens(), NPO.model_copy(update={"router": "train"}), Targets((3,), 1), UNIT)
    assert setting.at_labels(3, 4) is None
    assert (setting.at_labels(2, 4), replace(setting, method=NPO).at_labels(3, 4)) == (4, 4)
    steps = [next(p.flops for p in made.phases if p.name == "unlearning") for made in (frozen, trained)]
    assert steps[0] < steps[1]


def test_a_step_in_pieces_keeps_what_flows_into_each_layer() -> None:
    """Of 80 padded tokens in pieces of 20: 2 layers' states of all, and one layer's activations of a piece."""
    setting = Setting(shape(), tokens(), NPO, ONE, UNIT, "whole", 20)
    assert (setting.pieces, setting.recomputed) == (4, True)
    made = next(draft for draft in phases.drafts(setting) if draft.name == "unlearning")
    kept = 2 * 20 * (5 * 100 + 400 + 2 * (100 + 3 * 10)) + 2 * 80 * 100 * 2
    inside = costs.forward_bytes(shape(), 20)
    look = costs.forward_bytes(shape(), 200) + 200 * 100 * 2
    assert made.memory["activations"] == max(int(costs.STEP_SLACK * (kept + inside)), look)


def test_the_score_gradient_keeps_states_of_every_layer_and_logits_of_a_chunk() -> None:
    plain, found = (
        memory_of(plan(method=NPO.model_copy(update={"attribution": score})), "attributing")
        for score in ("affinity", "gradient")
    )
    assert plain["states"] == 1000 * 100 * 2
    assert found["states"] == 5 * 1000 * 100 * 2
    assert found["head"] == 250 * 1000 * 14  # a half of the set is 500 tokens, half of them labels
    assert found["activations"] > plain["activations"]


def test_adapted_matrices_are_kept_as_they_were_and_written() -> None:
    made = plan(method=NPO.model_copy(update={"scope": "lora"}), targets=None)
    rank = NPO.lora_rank
    assert memory_of(made, "publishing")["trained"] == 20 * rank * 1000 + 2 * 4 * 4000
    frozen = plan(method=NPO.model_copy(update={"scope": "full"}), targets=None)
    kept = [memory_of(one, "unlearning")["activations"] for one in (made, frozen)]
    assert kept[0] - kept[1] == pytest.approx(
        costs.STEP_SLACK * 4 * 16 * 80 * 100, abs=1
    )  # 4 layers, 80 tokens
    publishing = made.phases[-1]
    assert publishing.bytes_written == 4 * 1_000_000_000 + 2 * 4 * 4000


def test_every_rate_is_counted() -> None:
    searched = plan(method=NPO.model_copy(update={"strength": "auto", "learning_rate": "auto"}))
    assert searched.runs == 2
    assert searched.seconds is not None
    assert searched.seconds_all is not None
    unlearning = next(phase.seconds for phase in searched.phases if phase.name == "unlearning")
    assert searched.seconds_all - searched.seconds == pytest.approx(unlearning)
    fixed = plan()
    assert (fixed.runs, fixed.seconds_all) == (1, fixed.seconds)


def test_dirty_shards_are_written_and_read_back_and_no_others() -> None:
    made = plan()
    publishing = next(phase for phase in made.phases if phase.name == "publishing")
    assert publishing.bytes_written == 1_000_000_000 + 3000 * 2
    assert publishing.bytes_read == 2 * 1_000_000_000


def test_without_a_calibration_there_are_no_seconds_and_it_is_said() -> None:
    made = make_plan(shape(), tokens(), NPO, with_memory(10**12), missing="Nobody looked.")
    assert (made.seconds, made.seconds_all, made.seconds_missing) == (None, None, "Nobody looked.")
    assert {phase.seconds for phase in made.phases} == {None}


def test_the_device_is_chosen_by_its_memory() -> None:
    cards = {"cuda:0": 5_000_000_000, "cuda:1": 9_000_000_000}
    made = make_plan(shape(), tokens(), NPO, with_memory(10**12, **cards), targets=ONE)
    assert (made.device, made.budget_bytes) == ("cuda:1", 9_000_000_000)
    assert made.host_bytes + made.device_bytes >= made.peak_bytes > made.host_bytes
    small = make_plan(shape(), tokens(), NPO, with_memory(10**12, **{"cuda:0": 1_000_000_000}), targets=ONE)
    assert (small.device, small.device_bytes, small.budget_bytes) == ("cpu", 0, 10**12)
    assert "needs 1.10 GB" in small.device_why


def test_a_plan_is_plain_json() -> None:
    made = plan()
    shown = json.loads(json.dumps(made.as_dict()))
    assert shown["peak_bytes"] == max(phase["peak_bytes"] for phase in shown["phases"]) == made.peak_bytes
    assert shown["bytes_read"] == sum(phase["bytes_read"] for phase in shown["phases"])
    assert shown["calibration"]["layer_rate"] == 1.0
