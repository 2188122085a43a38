"""Writes exported graphs, and runs them."""

import io
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mask2former.checkpoint import ModelDescription, Task, write_atomically
from mask2former.export.graph import OUTPUTS, SegmentationGraph

OPSET = 18
METADATA_KEY = "mask2former"  # of ONNX's metadata
METADATA_FILE = "mask2former.json"  # in a program
_EXAMPLE_SIZE = (90, 131)  # no side is special: no multiple of anything, one shorter than the other

Run = Callable[[NDArray[np.float32]], dict[str, NDArray[Any]]]
"""(1, 3, H, W) float32 RGB -> the outputs by name."""


class MissingPackageError(ImportError):
    """A package that exporting needs is not there; the text is for the user."""


def trace(graph: SegmentationGraph) -> torch.export.ExportedProgram:
    """The program of a graph, for images of any height and width."""
    image = torch.zeros(1, 3, *_EXAMPLE_SIZE)
    any_size = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    with torch.no_grad(), _quiet():
        program = torch.export.export(graph.eval(), (image,), dynamic_shapes={"image": any_size})
    for part in program.graph_module.modules():  # the graph, and its parts without autocast
        if isinstance(part, torch.fx.GraphModule):
            for node in part.graph.nodes:
                node.meta.pop("stack_trace", None)  # has paths of this machine
    return program


def write_program(path: str | Path, program: torch.export.ExportedProgram, details: Mapping[str, Any]) -> None:
    """Write a `torch.export` program, which PyTorch alone can load.

    The file appears complete or not at all.

    Args:
        path: the file, in an existing folder.
        program: from `trace`.
        details: from `metadata`; they go into the file.

    Raises:
        OSError: if the file cannot be written.
    """
    buffer = io.BytesIO()
    with _quiet():
        torch.export.save(program, buffer, extra_files={METADATA_FILE: json.dumps(details, ensure_ascii=False)})
    write_atomically(path, buffer.getvalue())


def write_onnx(path: str | Path, program: torch.export.ExportedProgram, details: Mapping[str, Any]) -> None:
    """Write an ONNX model of opset 18; arguments and errors as of `write_program`.

    Raises:
        MissingPackageError: if onnx or onnxscript is not there.
    """
    require("onnx", "onnxscript")
    with _quiet():
        converted = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=["image"],
            output_names=list(OUTPUTS[details["task"]]),
            verbose=False,
        )
    assert converted is not None  # None is for a file that the exporter writes itself
    converted.model.metadata_props[METADATA_KEY] = json.dumps(details, ensure_ascii=False)
    for node in converted.model.graph:
        node.metadata_props.clear()  # where in the source it comes from, with paths of this machine
    write_atomically(path, converted.model_proto.SerializeToString())


def metadata(task: Task, description: ModelDescription) -> dict[str, Any]:
    """What a program that uses the file has to know; plain values."""
    return {
        "task": task,
        "shortest": description.settings.shortest,
        "longest": description.settings.longest,
        "categories": [category._asdict() for category in description.categories],
    }


def onnx_runner(path: str | Path) -> Run:
    """Runs an ONNX file on the CPU.

    Raises:
        MissingPackageError: if onnxruntime is not there.
    """
    require("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only: it warns of each float16 product that it has no form of for the CPU
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda image: dict(zip(names, session.run(None, {"image": image}), strict=True))


def program_runner(path: str | Path) -> Run:
    """Runs a file of `write_program`."""
    return module_runner(torch.export.load(path).module())


def module_runner(module: Callable[[torch.Tensor], Mapping[str, torch.Tensor]]) -> Run:
    """Runs a graph in PyTorch."""

    def run(image: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        with torch.no_grad():
            return {name: x.numpy() for name, x in module(torch.from_numpy(image)).items()}

    return run


def require(*packages: str) -> None:
    """Refuse if one of the packages is not there.

    Raises:
        MissingPackageError: naming those that are not.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise MissingPackageError(f"this needs {' and '.join(missing)}: pip install {' '.join(missing)}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' notes on each operator."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "torch.onnx", "torch.export", "torch.fx")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
