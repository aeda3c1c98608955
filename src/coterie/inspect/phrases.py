"""Numbers and lists as parts of a sentence."""

from __future__ import annotations

from collections.abc import Sequence


def bits(value: float) -> str:
    """Two decimals, and more only where they would all be zero; 0 where only rounding is left."""
    if abs(value) < 5e-4:
        return "0.00"
    return f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.2g}"


def fixed(value: float) -> str:
    """Three decimals, and no sign of a zero."""
    text = f"{value:.3f}"
    return "0.000" if text == "-0.000" else text


def listing(parts: Sequence[str], last: str = "and") -> str:
    """``a, b and c``."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} {last} {parts[-1]}"


def label_name(label: int, class_names: Sequence[str]) -> str:
    """The name of a class, its number where it has none, ``none`` for no label."""
    if label < 0:
        return "none"
    return class_names[label] if label < len(class_names) else str(label)


def expert_name(index: int, names: Sequence[str]) -> str:
    """The name of an expert, its number where it has none."""
    return names[index] if index < len(names) else str(index)


def noise_name(low: float, high: float) -> str:
    """``t 0.2 to 0.3``."""
    return f"t {low:.2g} to {high:.2g}"
