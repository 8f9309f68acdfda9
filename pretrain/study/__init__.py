"""Costs, fits and figures: FLOP accounting and what is drawn from finished runs."""
