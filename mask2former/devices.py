"""Where models can run."""

import torch


def device_problem(device: str | torch.device) -> str:
    """Why nothing can be computed on a device here, in a line; empty if it can."""
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # which of them depends on how PyTorch was built
        return str(error).splitlines()[0]
    return ""
