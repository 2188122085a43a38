"""A model with its post-processing as one file that runs without this package: ONNX, or a `torch.export` program."""
