"""Starting the ranks of a run, watching them, stopping them together.

A run is known here as a command, a folder and a number of ranks; nothing of ours is imported.
"""
