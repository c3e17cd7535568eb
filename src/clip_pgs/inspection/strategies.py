"""Strategies as they are named on the command line: `pgs`, or `pgs:edges=false,temperature=0.2`."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from clip_pgs.masking import MaskingStrategy, create_masking, masking_options

_WORDS: dict[str, Any] = {"true": True, "false": False, "none": None, "null": None}


@dataclass(frozen=True)
class StrategySpec:
    """A strategy to be built, at any mask ratio.

    Args:
        title: What it is called in figures and tables.
        name: Of the strategy.
        options: Of its constructor; they win over the ratios that `build` is given.
    """

    title: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def takes(self, option: str) -> bool:
        """Return whether the strategy has an option.

        Raises:
            ValueError: If the name is unknown.
        """
        return option in masking_options(self.name)

    def build(
        self, *, mask_ratio: float | None = None, mask_ratio_min: float | None = None
    ) -> MaskingStrategy:
        """Build the strategy with those of the ratios that it takes.

        A default lower bound gives way to a ratio below it.

        Raises:
            ValueError: If the name or an option is unknown, of the wrong type or out of its range.
        """
        options = dict(self.options)
        for option, ratio in (("mask_ratio", mask_ratio), ("mask_ratio_min", mask_ratio_min)):
            if ratio is not None and self.takes(option):
                options.setdefault(option, ratio)
        default, ratio = masking_options(self.name).get("mask_ratio_min"), options.get("mask_ratio")
        if default is not None and isinstance(ratio, int | float):
            options.setdefault("mask_ratio_min", min(default, ratio))
        return create_masking(self.name, **options)


def parse_spec(text: str) -> StrategySpec:
    """Read NAME or NAME:KEY=VALUE,KEY=VALUE.

    Values are Python literals, or true, false and none in any case; anything else is text.

    Raises:
        ValueError: If an option is no KEY=VALUE.
    """
    name, _, tail = text.partition(":")
    options = {}
    for pair in tail.split(",") if tail else ():
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise ValueError(f"options are written as {name}:KEY=VALUE,KEY=VALUE, got {text!r}")
        options[key.replace("-", "_")] = _literal(value)
    return StrategySpec(text, name, options)


def parse_specs(
    texts: Iterable[str], *, mask_ratio: float | None = None, mask_ratio_min: float | None = None
) -> list[StrategySpec]:
    """Read several strategies and build each once, so that errors come early.

    Args:
        texts: See `parse_spec`.
        mask_ratio: Ratio that at least one of them must take, where given.
        mask_ratio_min: Lower bound that at least one of them must take, where given.

    Raises:
        ValueError: If one is wrong or given twice, or a ratio has no effect on any.
    """
    specs: list[StrategySpec] = []
    for text in texts:
        if text in (spec.title for spec in specs):
            raise ValueError(f"masking {text} is given twice")
        specs.append(parse_spec(text))
    ratios = {"mask_ratio": mask_ratio, "mask_ratio_min": mask_ratio_min}
    for option, ratio in ratios.items():
        if ratio is not None and not any(spec.takes(option) for spec in specs):
            raise ValueError(f"{option} has no effect on {', '.join(s.title for s in specs)}")
    for spec in specs:
        spec.build(mask_ratio=mask_ratio, mask_ratio_min=mask_ratio_min)
    return specs


def create_strategies(
    texts: Iterable[str], *, mask_ratio: float | None = None, mask_ratio_min: float | None = None
) -> dict[str, MaskingStrategy]:
    """Build strategies as `parse_specs` reads them, each under its title."""
    specs = parse_specs(texts, mask_ratio=mask_ratio, mask_ratio_min=mask_ratio_min)
    return {
        spec.title: spec.build(mask_ratio=mask_ratio, mask_ratio_min=mask_ratio_min)
        for spec in specs
    }


def _literal(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
