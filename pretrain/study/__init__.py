"""Studies: FLOP counts, curves and figures of finished runs."""
