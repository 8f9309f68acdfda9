"""Tokenizers: text to token ids and back, behind one interface (`base`).

`load_tokenizer` opens a file of either kind, SentencePiece or Hugging Face; `train_sentencepiece`
makes a new one. Text that somebody types can never become a special id: pad, mask and document
separator are control symbols of the model, or ids appended behind its vocabulary where an existing
model has none.
"""

from data_pipeline.tokenizer.base import Tokenizer
from data_pipeline.tokenizer.load import load_tokenizer
from data_pipeline.tokenizer.sentencepiece_model import SentencePieceTokenizer
from data_pipeline.tokenizer.training import train_sentencepiece

__all__ = ["SentencePieceTokenizer", "Tokenizer", "load_tokenizer", "train_sentencepiece"]
