"""What `mask2former.analysis.tasks` gives, as text."""

from collections.abc import Iterable, Mapping
from typing import Any

_COLUMNS = {"trainable": "trainable", "fixed": "fixed", "frozen_norm": "FrozenBN", "other_constants": "other constants"}


def report(results: Mapping[str, Any]) -> str:
    """The results by task, with "config" and, if there are images, "inputs"."""
    texts = {
        "parameter": _parameters,
        "flop": _flops,
        "activation": _activations,
        "structure": lambda tree: "structure, trainable parameters\n" + "\n".join(_tree(tree, "")),
        "throughput": _throughput,
    }
    blocks = [results["config"]]
    if "inputs" in results:
        blocks[0] += f"\n{_inputs(results['inputs'])}"
    return "\n\n".join([*blocks, *(text(results[task]) for task, text in texts.items() if task in results)])


def _inputs(inputs: Mapping[str, Any]) -> str:
    if inputs["padded_size"] is not None:
        height, width = inputs["padded_size"]
        sizes = f"{height}x{width} (height x width)"
    else:
        sizes = f"of {inputs['sizes']} sizes, {inputs['mean_pixels'] / 1e6:.3f} million pixels on average"
    number = "one image" if inputs["images"] == 1 else f"{inputs['images']} images"
    return f"{number}, {inputs['source']}; resized and padded: {sizes}"


def _parameters(result: Mapping[str, Any]) -> str:
    rows = {**result["parts"], "in all": result["total"]}
    lines = [["parameters and constants", *_COLUMNS.values()]]
    lines += [[name, *(f"{row[column]:,}" for column in _COLUMNS)] for name, row in rows.items()]
    return f"{_table(lines)}\ntrainable: {result['total']['trainable'] / 1e6:.2f} M"


def _flops(result: Mapping[str, Any]) -> str:
    lines = [["FLOPs of an image, a multiply-add is one", "G"]]
    lines += [[name, _billions(value)] for name, value in result["parts"].items()]
    lines.append(["in all", _billions(result["mean"])])
    lines += [[f"  {kind}", _billions(value)] for kind, value in result["kinds"].items()]
    return f"{_table(lines)}\n{_spread(result, 1e9, 'G')}; {_predictions(result)}"


def _activations(result: Mapping[str, Any]) -> str:
    lines = [["activations of an image: results of convolutions and matrix products", "M"]]
    lines += [[name, f"{value / 1e6:,.2f}"] for name, value in result["parts"].items()]
    lines.append(["in all", f"{result['mean'] / 1e6:,.2f}"])
    return f"{_table(lines)}\n{_spread(result, 1e6, 'M')}; {_predictions(result)}"


def _throughput(result: Mapping[str, Any]) -> str:
    peak = "not known" if result["peak_bytes"] is None else f"{result['peak_bytes'] / 2**20:,.0f} MiB"
    weights = "random weights" if result["weights"] is None else result["weights"]
    precision = "float32" if result["precision"] is None else f"precision {result['precision']}"
    pictures = "one picture" if result["pictures"] == 1 else f"{result['pictures']} pictures"
    return (
        f"throughput: {result['images_per_second']:.3g} images/s, {1000 * result['seconds']:.1f} ms an image with "
        f"post-processing\nmedian of {result['repeats']} runs on {pictures}, one at a time, {precision}, {weights}, "
        f"{result['device']}; peak memory {peak}\n{result['operators']}"
    )


def _tree(node: Mapping[str, Any], indent: str) -> list[str]:
    name = f"{node['name']}: " if node["name"] else ""
    lines = [f"{indent}{name}{node['class']} {node['parameters']:,}"]
    for child in node["children"]:
        lines += _tree(child, f"{indent}  ")
    return lines


def _spread(result: Mapping[str, Any], unit: float, letter: str) -> str:
    spread = result["standard_deviation"]
    deviation = f", standard deviation {spread / unit:.1f}" if spread else ""
    return f"mean {result['mean'] / unit:.1f} {letter}{deviation}"


def _predictions(result: Mapping[str, Any]) -> str:
    return "predictions of all layers" if result["all_layers"] else "prediction of the last layer"


def _billions(value: float) -> str:
    return f"{value / 1e9:,.2f}"


def _table(lines: Iterable[list[str]]) -> str:
    """Names to the left, numbers to the right."""
    lines = list(lines)
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )
