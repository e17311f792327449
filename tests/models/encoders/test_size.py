"""A network far larger than any encoder is refused by name, before it is built; every encoder listed is not."""

from __future__ import annotations

import re
from typing import Any

import pytest

import pekasc as pk
from pekasc.models.encoders._size import check_size


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"embed_dim": 10**6}, "'embed_dim' is 1e+06, and must be at most 65536"),
        ({"embed_dim": 10**5000}, "'embed_dim' is 1e+300"),
        ({"img_size": 10**5}, "'img_size' is 100000, and must be at most 8192"),
        ({"mlp_ratio": float("inf")}, "'mlp_ratio' is 1e+300"),
        ({"init_values": float("nan")}, "'init_values' is nan"),
        ({"depths": [1] * 65}, "'depths' has 65 values, more than 64"),
        ({"depth": 1001}, "depth ask for 1001 blocks, more than 1000"),
        ({"depth": 200, "embed_dim": 8192}, "depth=200, embed_dim=8192 ask for about 2.1e+11 parameters (blocks)"),
        ({"mlp_ratio": 4000}, "mlp_ratio=4000 ask for about 2.4e+12 parameters (blocks)"),
        ({"dims": [96, 192, 384, 60_000]}, "dims=[96, 192, 384, 60000] ask for about"),
        (
            {"img_size": 8192, "patch_size": 1},
            "img_size=8192, patch_size=1 ask for about 1.4e+11 parameters (pos",
        ),
        ({"patch_size": 60_000}, "patch_size=60000 ask for about 2.2e+13 parameters (patches)"),
    ],
)
def test_an_enormous_network_is_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        pk.models.Encoder("vit_tiny_patch16_224", weights="random", model_kwargs=kwargs)
    with pytest.raises(ValueError, match=re.escape(message)):  # as an adapter's file names it
        pk.models.Encoder.from_dict({"name": "vit_tiny_patch16_224", "weights": "random", "model_kwargs": kwargs})


def test_what_encoders_have_is_not_refused() -> None:
    uni2 = {"depth": 24, "num_heads": 24, "embed_dim": 1536, "mlp_ratio": 5.33334, "reg_tokens": 8, "img_size": 224}
    for kwargs in (uni2, {"depth": 48}, {"img_size": (1024, 2048), "patch_size": 14}, {"depths": (2, 2, 18, 2)}, {}):
        check_size(kwargs)
