"""Which sequence comes at which position: budget, order, mixture, loader."""
