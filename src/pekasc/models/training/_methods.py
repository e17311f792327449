"""Registry of parameter-efficient fine-tuning methods, all from the PEFT library."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import AdaLoraConfig, HRAConfig, LoraConfig, MissConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn

from pekasc.models.encoders import Depth, Encoder, EncoderNetwork
from pekasc.models.runtime import Registry


# "Bone" became "MiSS" in peft 0.19: the block affine adapter is init_weights=True, its transform variant "bat"
def _bone(rank: int, targets: list[str]) -> PeftConfig:
    return MissConfig(r=rank, target_modules=targets, init_weights=True)


def _bat(rank: int, targets: list[str]) -> PeftConfig:
    return MissConfig(r=rank, target_modules=targets, init_weights="bat")


def _lora(rank: int, targets: list[str]) -> PeftConfig:
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)


def _dora(rank: int, targets: list[str]) -> PeftConfig:
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, use_dora=True)


def _adalora(rank: int, targets: list[str]) -> PeftConfig:
    # PEFT initialises factors with 0.02 and singular values with 0, and divides by the rank: with LoRA's alpha, updates
    # would be a hundredth of LoRA's. `with_steps` fills in the steps once the length of the training is known
    return AdaLoraConfig(
        init_r=rank * 3 // 2, target_r=rank, lora_alpha=128 * rank, target_modules=targets, total_step=1
    )


def _hra(rank: int, targets: list[str]) -> PeftConfig:
    return HRAConfig(r=rank, target_modules=targets)


# functions from rank and layer names to the PEFT configuration
METHODS: Registry[Callable[[int, list[str]], PeftConfig]] = Registry(
    "method", {"bone": _bone, "bat": _bat, "lora": _lora, "dora": _dora, "adalora": _adalora, "hra": _hra}
)

Method = str | PeftConfig | None
_MIN_ADALORA_STEPS = 2


def known_methods() -> list[str]:
    """Return the names of the registered methods."""
    return list(METHODS)


def method_name(method: Method) -> str:
    """Return the name of a method for tables and logs; ``"frozen"`` without one."""
    if method is None:
        return "frozen"
    return method if isinstance(method, str) else str(getattr(method.peft_type, "value", method.peft_type)).lower()


def check_method(method: Method) -> Method:
    """Check that a method can be trained, and return it.

    Raises
    ------
    ValueError
        If it is the name of no method, or a configuration that trains parts of the encoder itself.
    TypeError
        If it is neither a string, a ``PeftConfig`` nor None.
    """
    if isinstance(method, str):
        METHODS.find("method", method, "a peft.PeftConfig, or None for the frozen encoder")
    if not isinstance(method, str | PeftConfig | None):
        raise TypeError(f"`method` must be a name, a peft.PeftConfig or None, got {type(method).__name__}.")
    if isinstance(method, PeftConfig) and not hasattr(method, "target_modules"):
        raise ValueError(
            f"`method`: {type(method).__name__} is no adapter of linear layers (it has no `target_modules`), and "
            "encoders of images take no prompts. Give a configuration such as LoraConfig, or a name: "
            f"{', '.join(METHODS)}."
        )
    for name in ("modules_to_save", "trainable_token_indices"):
        if getattr(method, name, None):
            raise ValueError(
                f"`method`: the configuration's `{name}={getattr(method, name)!r}` would train parts of the encoder "
                "itself. Leave it out: an adapter is added to an encoder that stays frozen."
            )
    return method


def last_block(encoder: EncoderNetwork, depth: Depth) -> int:
    """Return the number of the last block that features at `depth` need."""
    return encoder.n_blocks if depth is None else max(depth)


def adapter_targets(encoder: Encoder, method: Method) -> tuple[str, ...]:
    """Return the layers of a block to adapt: ``target_modules`` of a configuration, else the encoder's defaults."""
    own = getattr(method, "target_modules", None)
    if not own or own == "all-linear":
        return encoder.adapter_targets
    return (own,) if isinstance(own, str) else tuple(sorted(own))


def target_layers(encoder: EncoderNetwork, depth: Depth, blocks: str | int, method: Method = None) -> list[str]:
    """Return the names of the layers to adapt, in all blocks up to `depth` or in the last of them.

    Parameters
    ----------
    encoder
        The encoder.
    depth
        Block(s) after which features are taken.
    blocks
        Number of blocks, counted back from `depth`, or ``"all"``; ``"auto"`` is checked like ``"all"``.
    method
        The method; a configuration can name layers of a block (``target_modules=["attn.qkv", "mlp.fc1"]``).

    Raises
    ------
    ValueError
        If the encoder has no such layers, or fewer blocks than `blocks`.
    """
    n = last_block(encoder, depth)
    blocks = "all" if blocks == "auto" else blocks
    if blocks != "all" and (isinstance(blocks, bool) or not isinstance(blocks, int) or not 1 <= blocks <= n):
        raise ValueError(
            f'`blocks={blocks!r}` does not fit: features are taken after block {n}, so give "auto", "all" or 1 to {n}.'
        )
    first = 0 if blocks == "all" else n - int(blocks)
    linear = {name for name, module in encoder.model.named_modules() if isinstance(module, nn.Linear)}
    targets = adapter_targets(encoder.encoder, method)
    wanted = [f"blocks.{i}.{target}" for i in range(first, n) for target in targets]
    pattern = getattr(method, "target_modules", None)
    if isinstance(pattern, str) and pattern != "all-linear" and not linear & set(wanted):
        # a regular expression over full names, as PEFT takes it; only the blocks to adapt count
        within = [name for i in range(first, n) for name in sorted(linear) if name.startswith(f"blocks.{i}.")]
        wanted = [name for name in within if re.fullmatch(pattern, name)] or wanted
    missing = [name for name in wanted if name not in linear]
    if missing or not wanted:
        tails = sorted({".".join(name.split(".")[2:]) for name in linear if name.startswith("blocks.")})
        raise ValueError(
            f"An adapter needs linear layers {list(targets)} in the blocks of encoder {encoder.encoder.short!r}, but "
            f"{missing[:2] or 'such'} are not there (its blocks have: {tails or 'none'}). "
            "Name others with `pekasc.models.Encoder(..., adapter_targets=(...))`, or take `method=None` for the "
            "frozen encoder."
        )
    return wanted


def make_config(method: str | PeftConfig, rank: int, targets: list[str]) -> PeftConfig:
    """Return the PEFT configuration of a method, with the full names of the layers."""
    if isinstance(method, PeftConfig):
        config: Any = type(method).from_peft_type(**{**method.to_dict(), "target_modules": targets})
        return config
    return METHODS[method](rank, targets)


def config_values(config: PeftConfig) -> dict[str, Any]:
    """Return a PEFT configuration as plain values, as PEFT's ``save_pretrained`` writes them."""
    return {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}


def config_from(values: Any) -> PeftConfig:
    """Return the configuration whose values :func:`config_values` gave.

    Raises
    ------
    ValueError
        If they would import code, or are those of no adapter.
    """
    if not isinstance(values, dict):
        raise ValueError(f"it holds a {type(values).__name__}")
    for name in ("megatron_config", "auto_mapping"):  # name modules to import
        if values.get(name):
            raise ValueError(f"its `{name}` names code to import")
    kept = {name: value for name, value in values.items() if name != "runtime_config"}
    config: Any = PeftConfig.from_peft_type(**PeftConfig.check_kwargs(**kept))
    check_method(config)
    return config


def with_steps(config: PeftConfig, n_steps: int) -> PeftConfig:
    """Return the configuration for a training of at most `n_steps`, over which AdaLoRA schedules its ranks.

    By default, it starts to reduce ranks after a tenth of the steps, and stops a third before the end.
    """
    if not isinstance(config, AdaLoraConfig) or config.total_step != 1:
        return config
    if n_steps < _MIN_ADALORA_STEPS:
        raise ValueError(
            f"AdaLoRA plans its ranks over the steps of the training, and {n_steps} are too few: give more spots or "
            f"`Recipe.epochs`, at least {_MIN_ADALORA_STEPS} batches, or take another method."
        )
    plan: Any = {**config.to_dict(), "total_step": n_steps, "tinit": n_steps // 10, "tfinal": n_steps // 3}
    return type(config).from_peft_type(**plan)


def attach(encoder: EncoderNetwork, config: PeftConfig, random_state: int) -> PeftModel:
    """Attach a new adapter to the encoder's model, in place; ``unload()`` of the returned model removes it."""
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
        return tuned_model(encoder, config)


def tuned_model(encoder: EncoderNetwork, config: PeftConfig) -> PeftModel:
    """Return PEFT's model on the encoder's, which keeps the values of its own parameters that are trained, too."""
    own = dict(encoder.model.named_parameters())
    peft_model = get_peft_model(encoder.model, config)
    encoder.originals = [(p, p.detach().clone()) for p in own.values() if p.requires_grad]
    return peft_model


@contextmanager
def attached(encoder: EncoderNetwork, config: PeftConfig, random_state: int) -> Iterator[PeftModel]:
    """Attach a new adapter to the encoder's model within the block, and restore the encoder afterwards.

    Some configurations train the encoder's own biases (``bias="all"``): those are restored as well, so that nothing
    leaks from one fold to the next.
    """
    peft_model = attach(encoder, config, random_state)
    for parameter, _ in encoder.originals:
        parameter.data = parameter.data.float()  # half precision would lose small steps of the optimiser
    try:
        yield peft_model
    finally:
        encoder.model = peft_model.unload()
        with torch.no_grad():
            for parameter, before in encoder.originals:
                parameter.data = before.to(parameter.device)
        encoder.originals = []
        encoder.requires_grad_(False)
