"""Settings: typed sections, their composition, checks and messages."""
