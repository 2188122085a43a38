"""What a model costs: parameters, arithmetic, activations, structure and speed (docs/analyze.md)."""
