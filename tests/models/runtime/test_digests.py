"""Digests of weights: of names, types, shapes and values, whatever the order or the device."""

from __future__ import annotations

import torch
from torch import nn

from pekasc._digests import sha256
from pekasc.models.runtime import weights_digest
from pekasc.models.runtime._digests import tensor_parts


def _model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def test_the_same_weights_have_the_same_digest() -> None:
    assert weights_digest(_model()) == weights_digest(_model()) != weights_digest(_model(1))
    assert len(weights_digest(_model())) == 64


def test_one_value_is_noticed_buffers_included() -> None:
    model = _model()
    before = weights_digest(model)
    model[1].running_mean[1] += 1e-6
    assert weights_digest(model) != before


def test_names_types_and_shapes_count_and_the_order_does_not() -> None:
    a, b = torch.arange(6.0), torch.ones(2)
    digest = sha256(*tensor_parts({"a": a, "b": b}))
    assert sha256(*tensor_parts({"b": b, "a": a})) == digest
    assert sha256(*tensor_parts({"c": a, "b": b})) != digest
    assert sha256(*tensor_parts({"a": a.reshape(2, 3), "b": b})) != digest
    assert sha256(*tensor_parts({"a": a.to(torch.float64), "b": b})) != digest
    # strides are no values
    turned = a.reshape(2, 3).T.contiguous().T
    assert sha256(*tensor_parts({"a": turned})) == sha256(*tensor_parts({"a": a.reshape(2, 3)}))


def test_half_precision_and_no_values_have_a_digest() -> None:
    halves = {"a": torch.ones(3, dtype=torch.bfloat16), "n": torch.tensor(4), "none": torch.empty(0, 2)}
    assert len(sha256(*tensor_parts(halves))) == 64
