"""The training engine: one interface, two hosts."""
