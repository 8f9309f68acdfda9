"""Readers of text: sources are listed as units, units are read as documents.

`source` and `document` are the values, `units` chooses the reader, `text`, `tabular` and `builtin`
read.
"""
