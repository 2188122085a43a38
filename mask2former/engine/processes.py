"""Starts the processes of a training, and connects Fabric to them."""

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from urllib.parse import urlparse

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision, Precision
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.strategies.single_device import SingleDeviceStrategy
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from mask2former import config
from mask2former.engine.yaml_files import ConfigError

# How long a process waits for the others, as in Detectron2. Those of a process that ended do not wait: the launcher
# ends them within seconds.
_TIMEOUT = timedelta(minutes=30)
_SECONDS_TO_SAVE = 120  # that the launcher leaves the processes after Ctrl-C; PyTorch's 30 are few for a large model


def is_launched() -> bool:
    """Whether this is one of the processes that torchrun, or `launch`, has started."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def launched_rank() -> int:
    """Of this process among those of all machines, known before they are connected; 0 if it was not launched."""
    return int(os.environ["RANK"]) if is_launched() else 0


def launch(
    program: Callable[..., Any], *arguments: Any, processes: int, machines: int = 1, machine: int = 0, url: str = "auto"
) -> None:
    """Run a program in several processes, on this machine and, if they do the same, on others.

    Args:
        program: a function of a module.
        arguments: of it.
        processes: on this machine.
        machines: how many there are.
        machine: the number of this one.
        url: tcp://host:port of machine 0; "auto" with one machine.

    Raises:
        ConfigError: if the address is missing or has another form.
        torch.distributed.elastic.multiprocessing.errors.ChildFailedError: if a process has failed; the others
            were ended.
    """
    if machines > 1 and url == "auto":
        raise ConfigError("--dist-url must be tcp://HOST:PORT of machine 0 with several machines, got 'auto'")
    address = urlparse("tcp://127.0.0.1:0" if url == "auto" else url)
    if address.scheme != "tcp" or not address.hostname or address.port is None:
        raise ConfigError(f"--dist-url must be tcp://HOST:PORT or auto, got {url!r}")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_SECONDS_TO_SAVE))  # older PyTorch does not read it
    is_alone = machines == 1 and url == "auto"
    settings = LaunchConfig(
        min_nodes=machines,
        max_nodes=machines,
        nproc_per_node=processes,
        run_id="mask2former",
        rdzv_backend="c10d" if is_alone else "static",
        rdzv_endpoint=f"{address.hostname}:{address.port}",
        rdzv_configs={} if is_alone else {"rank": machine, "timeout": 900},
        max_restarts=0,
        monitor_interval=1.0,
        start_method="spawn",
    )
    elastic_launch(settings, program)(*arguments)


def make_fabric(cfg: Any) -> Fabric:
    """Fabric for the device and precision of a config, over the processes that were launched.

    Raises:
        ConfigError: if the device is not there, or has fewer GPUs than there are processes.
    """
    device = cfg.MODEL.DEVICE
    local = int(os.environ["LOCAL_WORLD_SIZE"]) if is_launched() else 1
    world = int(os.environ["WORLD_SIZE"]) if is_launched() else 1
    _check_device(device, local)
    _check_norm(cfg, world)
    if device == "cpu" and local > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))  # or each would take all cores
    is_distributed = world > 1
    # A single process must not take a job of SLURM around it for its own processes.
    single = SingleDeviceStrategy(device="cuda:0" if device == "cuda" else device)
    fabric = Fabric(
        accelerator=device,
        devices=local,
        num_nodes=world // local,
        strategy=DDPStrategy(timeout=_TIMEOUT, broadcast_buffers=False) if is_distributed else single,
        plugins=[_precision(cfg), *([TorchElasticEnvironment()] if is_distributed else [])],
    )
    fabric.launch()
    return fabric


def _check_device(device: str, processes: int) -> None:
    if device not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"MODEL.DEVICE must be cpu, cuda or mps, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("MODEL.DEVICE must be cpu where PyTorch finds no GPU, got 'cuda'; add: MODEL.DEVICE cpu")
    if device == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("MODEL.DEVICE must be cpu where PyTorch finds no Apple GPU, got 'mps'")
    if device == "cuda" and processes > torch.cuda.device_count():
        raise ConfigError(f"--num-gpus must be at most {torch.cuda.device_count()} on this machine, got {processes}")
    if device == "mps" and processes > 1:
        raise ConfigError(f"--num-gpus must be 1 with MODEL.DEVICE mps, got {processes}")


def _check_norm(cfg: Any, processes: int) -> None:
    model = cfg.MODEL
    if "resnet" in model.BACKBONE.NAME and model.RESNETS.NORM == "SyncBN" and model.DEVICE != "cuda" and processes > 1:
        raise ConfigError(
            f"MODEL.RESNETS.NORM must be FrozenBN or BN with {processes} processes on MODEL.DEVICE {model.DEVICE}, got "
            "'SyncBN', which PyTorch has for GPUs only"
        )


def _precision(cfg: Any) -> Precision:
    """float32, or autocast; only half precision needs its loss scaled, bfloat16 has the range of float32."""
    dtype = config.step_arguments(cfg)["amp_dtype"]
    if dtype is None:
        return Precision()
    if dtype == "bfloat16":
        return MixedPrecision("bf16-mixed", cfg.MODEL.DEVICE)
    return MixedPrecision("16-mixed", cfg.MODEL.DEVICE, scaler=torch.amp.GradScaler(cfg.MODEL.DEVICE))


def say(text: str) -> None:
    """A message for the user on the error stream."""
    print(f"train_net.py: {text}", file=sys.stderr, flush=True)
