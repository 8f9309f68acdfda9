"""Readers of text: formats, compression, the built-in corpus."""
