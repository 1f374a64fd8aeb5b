"""How the report writes numbers: counts, rates, scores and shares, as people read them. Knows no model."""

from __future__ import annotations

from ...terminal import scale


def write_count(count: float) -> str:
    """Write a number of parameters in decimal units, three digits: 6.29 B."""
    return scale(count, ("", " K", " M", " B", " T"))


def write_share(share: float | None) -> str:
    """Write a ratio as a percentage with one decimal; nothing where there is none."""
    if share is None:
        return ""
    return f"{share:.1%}" if share < 100 else f"{share:,.0f} times"


def write_score(value: float, percent: bool) -> str:
    """Write a score: 0-1 as points of 100 with one decimal, anything else with four digits."""
    return f"{100 * value:.1f}" if percent else write_figure(value)


def write_chance(chance: float, percent: bool) -> str:
    """Write what guessing gives, without a decimal that says nothing: 25."""
    return write_score(chance, percent).removesuffix(".0")


def write_spread(value: float, stderr: float | None, percent: bool, sign: str = "±") -> str:
    """Write a score with its standard error, where it has one: 59.2 ± 1.4."""
    return write_score(value, percent) + ("" if stderr is None else f" {sign} {write_score(stderr, percent)}")


def write_figure(value: float) -> str:
    """Write a perplexity, a rate or a metric: two decimals while it is small, then fewer."""
    size = abs(value)
    if size and size < 0.1 or size >= 1e7:
        return f"{value:.3g}"
    return f"{value:,.2f}" if size < 100 else f"{value:,.1f}" if size < 1000 else f"{value:,.0f}"


def join_words(words: list[str]) -> str:
    """Write a list as a sentence has it: a, b and c."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
