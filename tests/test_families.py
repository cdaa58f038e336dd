"""Counts and names as the rows give them; tests/families hold the rows against transformers itself."""

import pytest

from seuf_core.errors import ModelError
from seuf_core.families import (
    FAMILIES,
    family_of,
    has_experts,
    num_experts,
    num_experts_per_tok,
    num_layers,
    require_experts,
)
from tests.tiny import DENSE
from tests.tiny_configs import CONFIGS


def test_every_row_has_a_tiny_config_and_every_tiny_config_a_row():
    assert set(CONFIGS) - set(DENSE) == set(FAMILIES)


def test_names_of_one_expert():
    assert family_of("mixtral").expert_names(3, 1) == {
        "gate_up_proj": (
            "model.layers.3.block_sparse_moe.experts.1.w1.weight",
            "model.layers.3.block_sparse_moe.experts.1.w3.weight",
        ),
        "down_proj": ("model.layers.3.block_sparse_moe.experts.1.w2.weight",),
    }
    assert family_of("gpt_oss").expert_names(0, 5)["down_proj_bias"] == (
        "model.layers.0.mlp.experts.down_proj_bias[5]",
    )
    assert family_of("gpt_oss").router_names(0) == {
        "weight": "model.layers.0.mlp.router.weight",
        "bias": "model.layers.0.mlp.router.bias",
    }


@pytest.mark.parametrize(
    ("key", "per_token"),
    [
        ("num_experts", "num_experts_per_tok"),
        ("num_local_experts", "num_experts_per_tok"),  # what transformers 5 saves for Qwen3
        ("n_routed_experts", "num_experts_per_tok"),
        ("moe_num_experts", "moe_k"),
        ("num_experts", "moe_topk"),
        ("num_experts", "num_experts_per_token"),
    ],
)
def test_counts_under_the_names_of_each_family(key, per_token):
    config = {key: 128, per_token: 8, "num_hidden_layers": 48}
    assert (num_experts(config), num_experts_per_tok(config), num_layers(config)) == (128, 8, 48)


def test_one_number_a_layer_is_a_count_when_all_are_the_same():
    """As Hunyuan-A13B gives its top-K."""
    assert num_experts_per_tok({"moe_topk": [8, 8, 8]}) == 8
    with pytest.raises(ModelError, match="'moe_topk'"):
        num_experts_per_tok({"moe_topk": [8, 8, 4]})


def test_unknown_model_type_lists_the_known_ones():
    with pytest.raises(ModelError) as caught:
        family_of("brand_new_moe")
    assert caught.value.code == "unknown_architecture"
    assert all(known in str(caught.value) for known in FAMILIES)


@pytest.mark.parametrize("value", [None, 0, -1, "8", True, 2.5, [], [8, 4]])
def test_a_count_that_is_no_count_names_the_key(value):
    with pytest.raises(ModelError, match="'num_experts'") as caught:
        num_experts({"num_experts": value})
    assert caught.value.code == "incomplete_config"


def test_a_score_the_config_does_not_say():
    with pytest.raises(ModelError, match="expert_selection_fn") as caught:
        family_of("cohere2_moe").score_function({"expert_selection_fn": "argmax"})
    assert caught.value.code == "incomplete_config"


def test_has_experts_reads_any_family():
    assert has_experts({"n_routed_experts": 64})
    assert not has_experts({"hidden_size": 64, "num_experts": 0})
    assert not has_experts({"num_experts": 1})


def test_a_scope_of_experts_needs_experts():
    require_experts("olmoe", (0, 1))
    with pytest.raises(ModelError) as caught:
        require_experts("llama", ())
    error = caught.value
    assert (error.code, error.pointer) == ("dense_model", "/method/scope")
    assert "llama" in error.message
    assert error.fix is not None
    assert "lora or full" in error.fix
