"""Masking strategies by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

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
        ValueError: If the name is unknown, or an option is unknown or out of its range.
    """
    known = masking_options(name)
    for option in options:
        if option not in known:
            choices = ", ".join(known) or "none at all"
            takers = [other for other in list_maskings() if option in masking_options(other)]
            hint = f"; {', '.join(takers)} would take {option!r}" if takers else ""
            raise ValueError(f"masking {name!r} has no option {option!r}; it takes {choices}{hint}")
    return _strategy_class(name)(**options)


def _strategy_class(name: str) -> type[MaskingStrategy]:
    if name not in _STRATEGIES:
        raise ValueError(f"unknown masking {name!r}; choose from {_names()}")
    return _STRATEGIES[name]


def _names() -> str:
    return ", ".join(list_maskings())
