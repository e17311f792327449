"""The call of a fit as text that can be typed again, which the adapter keeps: what somebody needs to repeat it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from peft import PeftConfig

from pekasc.models import Encoder
from pekasc.tl._options import FitCall

_MOST = 40  # names that are written out


def fit_call(call: FitCall, arguments: Mapping[str, Any]) -> str:
    """Return a call of ``fit_adapter``: what was given, and the option objects as they were resolved.

    What only says where and how a call runs (``compute``) is left out: it changes nothing that is learned, and names
    folders and machines.

    Parameters
    ----------
    call
        The resolved arguments.
    arguments
        The others, as they were given; those that are None are left out.
    """
    o = call.options
    given: dict[str, Any] = {name: value for name, value in arguments.items() if value is not None}
    method = given.pop("method", None)
    encoder = given.pop("encoder", None)
    parts = {
        # a description of one's own may name files of this machine
        "encoder": _shown(call.encoder.short if isinstance(encoder, Encoder) else encoder),
        "teacher": _shown(call.teacher.name) if method is not None else "",
        "method": f"<{type(method).__name__}>" if isinstance(method, PeftConfig) else _shown(method),
        **{name: _shown(value) for name, value in given.items()},
        "recipe": f"pk.{o.recipe!r}" if method is not None else "",
        "readout": f"pk.{o.readout!r}",
        "random_state": _shown(o.random_state),
    }
    return f"pk.tl.fit_adapter(sdata, {', '.join(f'{name}={text}' for name, text in parts.items() if text)})"


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_shown(name)}: {_shown(item)}" for name, item in value.items()) + "}"
    if isinstance(value, str) or value is None or np.ndim(value) == 0:
        return repr(value)
    n = len(value)
    mask = np.asarray(value)
    if mask.dtype == bool:
        return f"<mask, {int(mask.sum())} of {n}>"
    if isinstance(value, Sequence) and n <= _MOST:
        return repr([str(item) for item in value])
    return f"<{n} names>"
