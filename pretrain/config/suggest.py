"""Suggestion of a known name for a misspelt one.

`difflib` alone would suggest `log_interval` for `learning_rate`, because it compares letters only.
But users write a longer or a shorter form of a name far more often than they mistype a letter. So
initials (`lr`, `tp`), common words (`batch_size`, `n_layers`) and the usual synonyms of the field
count too.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher

_SYNONYMS = {
    "n": "num",
    "nb": "num",
    "dim": "size",
    "len": "length",
    "max": "seq",
    "bs": "global_batch_size",
    "bsz": "global_batch_size",
    "batch_size": "global_batch_size",
    "d_model": "hidden_size",
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_heads": "num_attention_heads",
    "grad_clip": "clip_grad_norm",
    "gradient_clipping": "clip_grad_norm",
    "max_steps": "stop_step",
    "wd": "weight_decay",
    "dtype": "precision",
    "dp": "data_parallel_size",
    "tp": "tensor_parallel_size",
    "pp": "pipeline_parallel_size",
    "cp": "context_parallel_size",
    "output_dir": "dir",
    "ctx": "seq_length",
}
"""Names in other projects, for a whole name of ours or for one word of it."""


def closest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Known (dotted) name that is most similar to `name`; None where none is similar enough."""
    best = max(((_likeness(name, k), k) for k in known), default=(0.0, ""))
    return best[1] if best[0] >= cutoff else None


def _likeness(given: str, known: str) -> float:
    """Similarity: 0 for unrelated names, above 1 for the same leaf in the same section."""
    given_section, _, given_leaf = given.rpartition(".")
    section, _, leaf = known.rpartition(".")
    score = max(_leaf_likeness(variant, leaf) for variant in _variants(given_leaf))
    if given_section == section:
        score += 0.4
    elif given_section:
        score += 0.1 * SequenceMatcher(None, given_section, section).ratio()
    return score


def _variants(leaf: str) -> set[str]:
    """Forms of a name: itself, and with its synonyms replaced."""
    lower = leaf.lower().replace("-", "_")
    words = "_".join(_SYNONYMS.get(word, word) for word in lower.split("_"))
    return {lower, words, _SYNONYMS.get(lower, lower)}


def _leaf_likeness(given: str, known: str) -> float:
    if given == known:
        return 1.0
    letters = SequenceMatcher(None, given, known).ratio()
    initials = "".join(word[0] for word in given.split("_") if word)
    if len(known) > 1 and initials == known:
        return max(letters, 0.9)
    mine, theirs = set(given.split("_")), set(known.split("_"))
    words = len(mine & theirs) / len(mine | theirs)
    return max(letters, 0.6 + 0.3 * words if words >= 0.5 else 0.0)
