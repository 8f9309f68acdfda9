"""From text files to exactly U unique tokens, E times, in a keyed order that no rank changes.

Imports nothing of ours and no torch at module level.
"""
