"""Specs are values: equal by content, frozen, checked when they are made."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest
import torch

from attn_compiler.errors import BadOption
from attn_compiler.variants.base import VariantSpec
from attn_compiler.variants.el import ELAttention
from attn_compiler.variants.flash import Flash
from attn_compiler.variants.gau import GAU
from attn_compiler.variants.linear_attention import LinearAttention
from attn_compiler.variants.selective import Selective
from attn_compiler.variants.spion import SPION, Pattern
from attn_compiler.variants.switchhead import SwitchHead

SPECS = [ELAttention, Flash, GAU, LinearAttention, SPION, Selective, SwitchHead]
EYE = [[True, False], [True, True]]

DEFAULTS: dict[type[VariantSpec], dict[str, Any]] = {
    Flash: {},
    ELAttention: {"keep_key_bias": False, "only_where_faster": False, "beams": 1},
    LinearAttention: {"window": 64},
    Selective: {"head": 0, "select_from": "qk", "start": "direct", "budgets": None},
    SPION: {
        "mode": "CF", "alpha": "auto", "density": "auto", "block": "auto", "filter": "auto",
        "softmax": "neg_inf", "per_head": False, "max_lost_mass": 0.05, "pattern": None,
    },
    SwitchHead: {
        "heads": "auto", "experts": "auto", "k": "auto", "head_dim": "auto",
        "experts_on": ("v", "o"), "shared_selection": False, "expert_dropout": 0.0,
        "init": "fresh", "positions": "auto", "feed_forward": None,
    },
    GAU: {
        "chunk": "auto", "s": "auto", "expansion": "auto", "scale_mode": "rowcount",
        "relative_bias": True, "rope": True, "init": "fresh",
    },
}  # fmt: skip


@pytest.mark.parametrize("spec", SPECS)
def test_fields_and_defaults_are_the_fixed_ones(spec: type[VariantSpec]) -> None:
    made = spec()
    assert {f.name: getattr(made, f.name) for f in fields(made)} == DEFAULTS[spec]
    assert not hasattr(made, "__dict__")
    assert all(f.kw_only for f in fields(spec))


VALUES: list[tuple[VariantSpec, VariantSpec, VariantSpec]] = [
    (ELAttention(), ELAttention(keep_key_bias=False), ELAttention(keep_key_bias=True)),
    (LinearAttention(), LinearAttention(window=64), LinearAttention(window=65)),
    (Selective(budgets=[3, 5]), Selective(budgets=(3, 5)), Selective(budgets=[5, 3])),
    (
        Selective(budgets={"a": 3, "b": 5}),
        Selective(budgets={"b": 5, "a": 3}),
        Selective(budgets={"a": 3, "b": 7}),
    ),
    (SPION(pattern=EYE), SPION(pattern=torch.tensor(EYE)), SPION(pattern=[[1, 1], [0, 1]])),
    (SPION(pattern={"a": EYE}), SPION(pattern={"a": Pattern.of(EYE)}), SPION(pattern={"b": EYE})),
    (
        SwitchHead(experts_on=("o", "v")),
        SwitchHead(experts_on=("v", "o")),
        SwitchHead(experts_on=("o",)),
    ),
    (GAU(chunk=64, s=32), GAU(s=32, chunk=64), GAU(chunk=None, s=32)),
]


@pytest.mark.parametrize(("one", "same", "other"), VALUES)
def test_equal_content_is_an_equal_spec(
    one: VariantSpec, same: VariantSpec, other: VariantSpec
) -> None:
    assert one == same
    assert hash(one) == hash(same)
    assert one != other
    for again in (pickle.loads(pickle.dumps(one)), copy.deepcopy(one), replace(one)):
        assert again == one
        assert hash(again) == hash(one)


def test_a_spec_does_not_change_with_what_it_was_made_of() -> None:
    mask, budgets = torch.tensor(EYE), {"a": 3}
    spec, selective = SPION(pattern=mask), Selective(budgets=budgets)
    mask.fill_(False)
    budgets["a"] = 7
    assert spec == SPION(pattern=EYE)
    assert selective.budgets == {"a": 3}
    with pytest.raises(FrozenInstanceError):
        spec.block = 64  # type: ignore[misc]


WRONG: list[tuple[type[VariantSpec], dict[str, Any], str]] = [
    (ELAttention, {"keep_key_bias": 1}, "keep_key_bias"),
    (LinearAttention, {"window": 0}, "window"),
    (LinearAttention, {"window": True}, "window"),
    (LinearAttention, {"window": 2.5}, "window"),
    (Selective, {"head": -1}, "head"),
    (Selective, {"head": True}, "head"),
    (Selective, {"select_from": "probabilities"}, "select_from"),
    (Selective, {"start": "cold"}, "start"),
    (Selective, {"budgets": 32}, "budgets"),
    (Selective, {"budgets": []}, "budgets"),
    (Selective, {"budgets": {32, 64}}, "budgets"),
    (Selective, {"budgets": "many"}, "budgets"),
    (Selective, {"budgets": [32, 1]}, "budgets"),
    (Selective, {"budgets": {"layer": 2.5}}, "budgets"),
    (SPION, {"mode": "CFF"}, "mode"),
    (SPION, {"alpha": 0.0}, "alpha"),
    (SPION, {"alpha": 1.0}, "alpha"),
    (SPION, {"alpha": "high"}, "alpha"),
    (SPION, {"density": 0.0}, "density"),
    (SPION, {"density": 1.5}, "density"),
    (SPION, {"density": True}, "density"),
    (SPION, {"block": 48}, "block"),
    (SPION, {"block": 0}, "block"),
    (SPION, {"block": -64}, "block"),
    (SPION, {"filter": 30}, "filter"),
    (SPION, {"filter": -31}, "filter"),
    (SPION, {"softmax": "zero"}, "softmax"),
    (SPION, {"per_head": None}, "per_head"),
    (SPION, {"per_head": True, "pattern": EYE}, "per_head"),
    (SPION, {"max_lost_mass": 1.01}, "max_lost_mass"),
    (SPION, {"pattern": [[True, False]]}, "pattern"),
    (SPION, {"pattern": [[0.5, 1.0], [1.0, 1.0]]}, "pattern"),
    (SPION, {"pattern": [[True], [True, True]]}, "pattern"),
    (SPION, {"pattern": [[True, True], [False, False]]}, "pattern"),
    (SPION, {"pattern": torch.ones(2, 3, 3, dtype=torch.bool)}, "pattern"),
    (SPION, {"pattern": {"layer": "all"}}, "pattern"),
    (SwitchHead, {"heads": 0}, "heads"),
    (SwitchHead, {"experts": -4}, "experts"),
    (SwitchHead, {"k": 1.0}, "k"),
    (SwitchHead, {"k": 5, "experts": 4}, "k"),
    (SwitchHead, {"head_dim": "wide"}, "head_dim"),
    (SwitchHead, {"experts_on": ()}, "experts_on"),
    (SwitchHead, {"experts_on": "vo"}, "experts_on"),
    (SwitchHead, {"experts_on": ("v", "v")}, "experts_on"),
    (SwitchHead, {"experts_on": ("v", "x")}, "experts_on"),
    (SwitchHead, {"shared_selection": "yes"}, "shared_selection"),
    (SwitchHead, {"positions": "alibi"}, "positions"),
    (SwitchHead, {"positions": "rope", "init": "convert"}, "positions"),
    (SwitchHead, {"expert_dropout": 1.0}, "expert_dropout"),
    (SwitchHead, {"init": "copy"}, "init"),
    (SwitchHead, {"feed_forward": "moe"}, "feed_forward"),
    (GAU, {"chunk": 0}, "chunk"),
    (GAU, {"chunk": True}, "chunk"),
    (GAU, {"s": -2}, "s"),
    (GAU, {"s": 33}, "s"),
    (GAU, {"expansion": 0}, "expansion"),
    (GAU, {"expansion": float("inf")}, "expansion"),
    (GAU, {"scale_mode": "fixed(0)"}, "scale_mode"),
    (GAU, {"scale_mode": "rows"}, "scale_mode"),
    (GAU, {"scale_mode": "chunk", "chunk": None}, "scale_mode"),
    (GAU, {"relative_bias": 0}, "relative_bias"),
    (GAU, {"init": "warm"}, "init"),
]


@pytest.mark.parametrize(("spec", "given", "field"), WRONG)
def test_a_wrong_value_is_refused_with_advice(
    spec: type[VariantSpec], given: dict[str, Any], field: str
) -> None:
    with pytest.raises(BadOption) as error:
        spec(**given)
    assert error.value.where == f"option {field}"
    assert error.value.do


RIGHT: list[VariantSpec] = [
    LinearAttention(window=1),
    Selective(budgets=[2, 97], start="dedicated_head"),
    SPION(mode="C", density=1.0, block=1, filter=1, max_lost_mass=0),
    SwitchHead(heads=2, experts=1, k=1, experts_on=("q", "k", "v", "o"), expert_dropout=0.5),
    GAU(chunk=1, s=33, rope=False, expansion=1.5, scale_mode="fixed(512)"),
]


@pytest.mark.parametrize("spec", RIGHT)
def test_values_at_the_edge_are_taken(spec: VariantSpec) -> None:
    assert replace(spec) == spec


def test_a_pattern_gives_its_tensor_back() -> None:
    mask = torch.rand(11, 11, generator=torch.Generator().manual_seed(3)) < 0.3
    mask.fill_diagonal_(True)
    pattern = Pattern.of(mask)
    assert torch.equal(pattern.tensor(), mask)
    assert (pattern.side, pattern.blocks) == (11, int(mask.sum()))
    assert pattern.density == int(mask.sum()) / 121


def test_experts_of_a_net_start_afresh() -> None:
    with pytest.raises(BadOption, match="start afresh"):
        SwitchHead(init="convert", feed_forward="sigma_moe")


def test_specs_and_sizes_do_without_sympy() -> None:
    names = ["el", "flash", "gau", "linear_attention", "selective", "spion", "switchhead"]
    code = f"""
import sys
from importlib import import_module
import attn_compiler.variants
for name in {names}: import_module("attn_compiler.variants." + name)
from attn_compiler.variants.gau import GAU, filled
filled(GAU(), width=512, replaced=12 * 512**2, length=4096)
assert "sympy" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
