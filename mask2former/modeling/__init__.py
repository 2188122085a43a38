"""Layer 1: the model, its losses and its post-processing, in torch only (and scipy in the matcher)."""
