"""Prompts that a model can continue."""

from __future__ import annotations

TRAILING_SPACE = (
    "the space at the end of the prompt is left out: tokens begin with their space, so that a "
    "model has not learned to continue a text that ends with one"
)


def without_trailing_space(prompt: str) -> str:
    """Prompt without the spaces at its end, which the first token of the sample brings along."""
    return prompt.rstrip(" ")
