"""Memory and time of a layout before anything runs: arithmetic over numbers of a model.

Free of torch and of any knowledge of models, so that thousands of layouts for thousands of ranks
take a second. Weights, optimizer and gradients are exact; activations and times are estimates.
"""
