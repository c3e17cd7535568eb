"""Masking strategies by name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from numbers import Integral, Real
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

from clip_pgs.masking.types import MaskingStrategy

_STRATEGIES: dict[str, type[MaskingStrategy]] = {}

StrategyClass = TypeVar("StrategyClass", bound=type[MaskingStrategy])


def register_masking(name: str) -> Callable[[StrategyClass], StrategyClass]:
    """Register a strategy class under a name.

    Args:
        name: What users type after `--masking`.

    Raises:
        ValueError: If the name is taken.
    """

    def register(strategy_class: StrategyClass) -> StrategyClass:
        if name in _STRATEGIES:
            raise ValueError(f"masking {name!r} is registered already; taken: {_names()}")
        _STRATEGIES[name] = strategy_class
        return strategy_class

    return register


def list_maskings() -> list[str]:
    """Return the registered names, sorted."""
    return sorted(_STRATEGIES)


def masking_options(name: str) -> dict[str, Any]:
    """Return a strategy's options and their defaults, in the order of its constructor.

    Args:
        name: A registered name.

    Raises:
        ValueError: If the name is unknown.
    """
    parameters = inspect.signature(_strategy_class(name)).parameters
    return {option: parameter.default for option, parameter in parameters.items()}


def create_masking(name: str, **options: Any) -> MaskingStrategy:
    """Build a strategy from its name and options.

    Args:
        name: A registered name.
        **options: The strategy's own options; see `masking_options`.

    Raises:
        ValueError: If the name is unknown, or an option is unknown, of the wrong type or out of
            its range.
    """
    known = masking_options(name)
    hints = get_type_hints(_strategy_class(name).__init__)
    for option, value in options.items():
        if option not in known:
            choices = ", ".join(known) or "none at all"
            takers = [other for other in list_maskings() if option in masking_options(other)]
            hint = f"; {', '.join(takers)} would take {option!r}" if takers else ""
            raise ValueError(f"masking {name!r} has no option {option!r}; it takes {choices}{hint}")
        problem = _type_problem(hints.get(option), value)
        if problem:
            raise ValueError(f"masking {name!r}: {option} takes {problem}, got {value!r}")
    return _strategy_class(name)(**options)


def _type_problem(hint: Any, value: Any) -> str:
    """Say what an option takes instead of a value; "" if it takes that, or anything.

    Options come from command lines and configs, and `0.0 <= "a"` is an error that names nothing.
    """
    allowed = get_args(hint) or (hint,)
    if value is None and NoneType in allowed:
        return ""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if bool in allowed:
        return "" if isinstance(value, bool) else "true or false"
    if str in allowed:
        return "" if isinstance(value, str) else "a name"
    if int in allowed:
        return "" if is_number and isinstance(value, Integral) else "a whole number"
    if float in allowed and not is_number:
        return "a number"
    if float in allowed:
        return "" if _is_finite(value) else "a finite number"
    return ""


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _strategy_class(name: str) -> type[MaskingStrategy]:
    if name not in _STRATEGIES:
        raise ValueError(f"unknown masking {name!r}; choose from {_names()}")
    return _STRATEGIES[name]


def _names() -> str:
    return ", ".join(list_maskings())
