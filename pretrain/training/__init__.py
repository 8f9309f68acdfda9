"""The parts of a running training: session, hooks, batches made in advance."""
