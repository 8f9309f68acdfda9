"""Which known name a misspelt one means.

`difflib` alone answers `learning_rate` with `log_interval`; people write the long or the short
form of a name far more often than they mistype a letter. So initials (`lr`, `tp`), words in common
(`batch_size`, `n_layers`) and the field's usual synonyms count beside letters in common.
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
"""Names that other projects use for ours, whole or word by word."""


def closest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known (dotted) name that `name` most likely means; None when nothing comes near."""
    best = max(((_likeness(name, k), k) for k in known), default=(0.0, ""))
    return best[1] if best[0] >= cutoff else None


def _likeness(given: str, known: str) -> float:
    """0 for strangers, above 1 for the same leaf in the same section."""
    given_section, _, given_leaf = given.rpartition(".")
    section, _, leaf = known.rpartition(".")
    score = max(_leaf_likeness(variant, leaf) for variant in _variants(given_leaf))
    if given_section == section:
        score += 0.4
    elif given_section:
        score += 0.1 * SequenceMatcher(None, given_section, section).ratio()
    return score


def _variants(leaf: str) -> set[str]:
    """The name itself and what its synonyms turn it into."""
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
