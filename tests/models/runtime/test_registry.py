"""Registries: looked up by the name that a user gave, listed in order, added to but never replaced."""

from __future__ import annotations

import pytest

from pekasc.models.runtime import Registry


@pytest.fixture
def heads() -> Registry[int]:
    return Registry("head", {"ridge": 1, "ridge-per-gene": 2, "mlp": 3})


def test_it_is_a_mapping_in_the_order_of_registration(heads: Registry[int]) -> None:
    heads.register("aaa", 4)
    assert list(heads) == ["ridge", "ridge-per-gene", "mlp", "aaa"] and len(heads) == 4
    assert heads["mlp"] == heads.find("head", "mlp") == 3 and "mlp" in heads and "lasso" not in heads
    with pytest.raises(KeyError):
        heads["lasso"]


def test_a_name_that_is_taken_stays(heads: Registry[int]) -> None:
    with pytest.raises(ValueError, match=r"The head 'ridge' is there already \(1\): take another name"):
        heads.register("ridge", 9)
    assert heads["ridge"] == 1


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "Ridge",
            r"`head='Ridge'` is not known\. Close names: ridge.* Choose one of \['ridge', 'ridge-per-gene', ",
        ),
        ("ridge_per_gene", r"Close names: ridge-per-gene"),
        ("qqq", r"`head='qqq'` is not known\. Choose one of"),
        (3, r"`head=3` is not known\. Choose one of"),
        (None, r"`head=None` is not known\. Choose one of"),
        (["ridge"], r"is not known\."),  # what cannot be hashed
    ],
)
def test_a_name_that_is_not_there(heads: Registry[int], value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        heads.find("head", value)


def test_what_an_argument_takes_besides_is_told(heads: Registry[int]) -> None:
    with pytest.raises(ValueError, match=r"Close names: vit_tiny\. Choose one of .*'mlp'\], or a timm model\."):
        heads.find("encoder", "vit_tinny", "or a timm model", ["vit_tiny", "resnet18"])
