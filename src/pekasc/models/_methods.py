"""Parameter-efficient methods: one row each, all through the PEFT library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import LoraConfig, MissConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn

from pekasc.models._choose import Depth
from pekasc.models._encoders import FrozenEncoder

# "Bone" became "MiSS" in peft 0.19: the block affine adapter is init_weights=True, its transform variant "bat"
_METHODS: Mapping[str, Callable[[int, list[str]], PeftConfig]] = {
    "bone": lambda r, targets: MissConfig(r=r, target_modules=targets, init_weights=True),
    "bat": lambda r, targets: MissConfig(r=r, target_modules=targets, init_weights="bat"),
    "lora": lambda r, targets: LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets),
}

Method = str | PeftConfig | None


def method_name(method: Method) -> str:
    """Return the name of a method for tables and logs; ``"frozen"`` without one."""
    if method is None:
        return "frozen"
    return method if isinstance(method, str) else str(getattr(method.peft_type, "value", method.peft_type)).lower()


def check_method(method: Method) -> Method:
    """Return `method` if it is known.

    Raises
    ------
    ValueError
        If it is a string that names no method.
    TypeError
        If it is neither a string, a ``PeftConfig`` nor None.
    """
    if isinstance(method, str) and method not in _METHODS:
        raise ValueError(
            f"`method={method!r}` is not known. Choose one of {list(_METHODS)}, give a peft.PeftConfig, "
            "or None for the frozen encoder."
        )
    if not isinstance(method, str | PeftConfig | None):
        raise TypeError(f"`method` must be a name, a peft.PeftConfig or None, got {type(method).__name__}.")
    return method


def last_block(encoder: FrozenEncoder, depth: Depth) -> int:
    """Return the number of blocks that features after `depth` need."""
    return encoder.n_blocks if depth is None else max(depth)


def target_layers(encoder: FrozenEncoder, depth: Depth, blocks: str | int) -> list[str]:
    """Return the names of the layers that the adapter attaches to: in all blocks up to `depth`, or in the last few.

    Raises
    ------
    ValueError
        If the encoder has no such layers, or `blocks` does not fit.
    """
    n = last_block(encoder, depth)
    if blocks != "all" and (isinstance(blocks, bool) or not isinstance(blocks, int) or not 1 <= blocks <= n):
        raise ValueError(
            f'`blocks={blocks!r}` does not fit: features are taken after block {n}, so give "all" or 1 to {n}.'
        )
    first = 0 if blocks == "all" else n - int(blocks)
    linear = {name for name, module in encoder.model.named_modules() if isinstance(module, nn.Linear)}
    wanted = [f"blocks.{i}.{target}" for i in range(first, n) for target in encoder.encoder.adapter_targets]
    missing = [name for name in wanted if name not in linear]
    if missing or not wanted:
        tails = sorted({".".join(name.split(".")[2:]) for name in linear if name.startswith("blocks.")})
        raise ValueError(
            f"An adapter needs linear layers {list(encoder.encoder.adapter_targets)} in the blocks of encoder "
            f"{encoder.encoder.short!r}, but {missing[:2]} are not there (its blocks have: {tails or 'none'}). "
            "Name others with `pekasc.models.Encoder(..., adapter_targets=(...))`, or take `method=None` for the "
            "frozen encoder."
        )
    return wanted


def make_config(method: str | PeftConfig, rank: int, targets: list[str]) -> PeftConfig:
    """Return the PEFT configuration for a method, with the layers named one by one."""
    if isinstance(method, PeftConfig):
        config: Any = type(method).from_peft_type(**{**method.to_dict(), "target_modules": targets})
        return config
    return _METHODS[method](rank, targets)


def attach(encoder: FrozenEncoder, config: PeftConfig, random_state: int) -> PeftModel:
    """Put a fresh adapter into the encoder's model, in place; ``unload()`` of what is returned takes it out."""
    for name in config.target_modules or ():  # type: ignore[attr-defined]
        layer = encoder.model.get_submodule(name)
        if getattr(config, "init_weights", None) == "bat":
            r = config.r  # type: ignore[attr-defined]
            if layer.in_features % r or layer.out_features % r:
                raise ValueError(
                    f'`method="bat"` needs a rank that divides both sides of {name} '
                    f"({layer.in_features} and {layer.out_features}); got {r}."
                )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random_state)
        return get_peft_model(encoder.model, config)
