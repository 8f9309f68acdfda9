"""Readers of text: sources are listed as units, units are read as documents.

`source` and `document` are the values, `listing` finds the files, `units` chooses the reader,
`text`, `json_file`, `csv_file`, `tabular` and `builtin` read; `fields` makes documents of records.
"""
