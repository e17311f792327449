"""How large a network `model_kwargs` may ask for: checked before timm allocates anything, since files name them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_MOST_PARAMETERS = 5e9  # the largest encoders of pathology have 1.1e9
_MOST = {"number": 65_536, "values": 64, "blocks": 1000, "img_size": 8192}
_BLOCKS = ("depth", "depths", "layers")
_WIDTHS = ("embed_dim", "dims", "channels", "widths", "base_width", "stem_width", "head_hidden_size")
# of the largest networks, for what is not given
_BLOCKS_OF_LARGE, _WIDTH_OF_LARGE, _PATCH_OF_LARGE, _RATIO_OF_LARGE = 48, 2048, 8, 4


def check_size(model_kwargs: Mapping[str, Any]) -> None:
    """Check that arguments of an architecture do not ask for a network far larger than any encoder.

    Raises
    ------
    ValueError
        If they do; the message names the argument.
    """
    numbers = {name: _numbers(value) for name, value in model_kwargs.items()}
    for name, values in numbers.items():
        most = _MOST["img_size"] if name == "img_size" else _MOST["number"]
        if len(values) > _MOST["values"]:
            raise ValueError(f"`model_kwargs`: {name!r} has {len(values)} values, more than {_MOST['values']}.")
        if bad := [value for value in values if not abs(value) <= most]:
            shown = min(max(bad[0], -1e300), 1e300)  # an int may be too large to be written
            raise ValueError(f"`model_kwargs`: {name!r} is {shown:g}, and must be at most {most}.")
    blocks = [name for name in _BLOCKS if numbers.get(name)]
    n_blocks = max((sum(numbers[name]) for name in blocks), default=_BLOCKS_OF_LARGE)
    if n_blocks > _MOST["blocks"]:
        raise ValueError(f"`model_kwargs`: {' and '.join(blocks)} ask for {n_blocks:g} blocks, more than 1000.")
    widths = [name for name in _WIDTHS if numbers.get(name)]
    width = max((max(numbers[name]) for name in widths), default=_WIDTH_OF_LARGE)
    ratio = max(numbers.get("mlp_ratio") or [_RATIO_OF_LARGE])
    side = max(numbers.get("img_size") or [0]) / max(min(numbers.get("patch_size") or [_PATCH_OF_LARGE]), 1)
    counts = {
        "blocks": (n_blocks * width**2 * (4 + 3 * ratio), [*blocks, *widths, "mlp_ratio"]),
        "positions": (side**2 * width, ["img_size", "patch_size", *widths]),
        "patches": (max(numbers.get("patch_size") or [0]) ** 2 * 3 * width, ["patch_size", *widths]),
        "classes": (max(numbers.get("num_classes") or [0]) * width, ["num_classes", *widths]),
    }
    for part, (count, names) in counts.items():
        if count > _MOST_PARAMETERS and (named := [name for name in names if name in model_kwargs]):
            given = ", ".join(f"{name}={model_kwargs[name]!r}" for name in named)
            raise ValueError(
                f"`model_kwargs`: {given} ask for about {count:.2g} parameters ({part}), more than "
                f"{_MOST_PARAMETERS:.0e}: such a network is not built."
            )


def _numbers(value: Any) -> list[float]:
    values = value if isinstance(value, list | tuple) else [value]
    return [number for number in values if isinstance(number, int | float) and not isinstance(number, bool)]
