"""Token ids and possible targets, the same for every objective."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenSpace:
    """Ids of a tokenizer for objectives and model.

    Ids in `never_targets` and padding columns have probability zero in the noise and in the
    softmax, so that `num_targets` (K) is the number of outcomes of every prediction.
    """

    vocab_size: int
    """Ids of the tokenizer."""
    padded_vocab_size: int
    """Rows of the embedding."""
    pad_id: int
    mask_id: int
    doc_id: int
    """Separator before (or after) documents; also the input of AR before the first token."""
    never_targets: tuple[int, ...]
    """Ids that no target takes: pad, mask and the control ids that text cannot produce."""

    def __post_init__(self) -> None:
        assert self.padded_vocab_size >= self.vocab_size
        assert self.mask_id in self.never_targets
        assert self.pad_id in self.never_targets
        assert self.doc_id not in self.never_targets

    @property
    def num_targets(self) -> int:
        """Number K of ids that a target can take; the bound of a uniform prediction is ln K."""
        return self.vocab_size - len(set(self.never_targets))

    @property
    def excluded_columns(self) -> list[int]:
        """Columns of the head that carry probability zero."""
        return sorted(set(self.never_targets)) + list(
            range(self.vocab_size, self.padded_vocab_size)
        )
