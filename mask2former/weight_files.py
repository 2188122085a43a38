"""Reads and writes files of weights.

No file can run code when it is read: pickles may ask for arrays, tensors and containers only. None takes much more
memory than its own size.
"""

import io
import json
import pickle
import pickletools
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from mask2former.atomic_files import atomic_file, write_atomically

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pkl")
_INDEX_SUFFIX = ".index.json"

_BROKEN_PICKLE = (
    pickle.UnpicklingError,
    AssertionError,  # from torch.load
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,  # a damaged length
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no such file, or is damaged.
    """
    _require_file(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or is damaged: {error}") from error


def read_weights(path: Path) -> Mapping[str, Any]:
    """The content of a file of weights: a state dict, or a dict that has one as "model".

    Args:
        path: `.pkl` (pickled arrays, as of Detectron2), `.safetensors`, `.index.json` (names the files of a checkpoint
            of transformers that is in several), or anything else as of `torch.save`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, holds no dict, or asks for anything but numbers and plain containers.
    """
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]
    _require_file(path)
    if path.name.endswith(_INDEX_SUFFIX):
        return _read_shards(path)
    try:
        if path.suffix == ".pkl":
            with path.open("rb") as file:
                _check_memo(file)
                content = _ArrayUnpickler(file, encoding="latin1").load()  # files of Python 2 need latin1
        else:
            _check_archive(path)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except _BROKEN_PICKLE as error:
        raise ValueError(f"{path} cannot be read as weights: {str(error) or type(error).__name__}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold a dict of tensors, got {type(content).__name__}")
    return content


def state_dict_of(content: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """The state dict in what `read_weights` gives, as tensors, without a ``module.`` that all names have.

    Args:
        content: a state dict, or a dict that has one as "model".
        where: what errors call the source.

    Raises:
        ValueError: if a name is no string, or a value no array or tensor of numbers.
    """
    inner = content["model"] if _is_wrapped(content) else content
    if not all(isinstance(name, str) for name in inner):
        raise ValueError(f"{where} must hold tensors by name, got names that are no strings")
    cut = len("module.") if inner and all(name.startswith("module.") for name in inner) else 0
    return {name[cut:]: _as_tensor(name, value, where) for name, value in inner.items()}


def other_entries(content: Mapping[str, Any]) -> tuple[str, ...]:
    """What `read_weights` gives besides a state dict: names of entries, such as the state of an optimizer."""
    known = ("model", "__author__", "matching_heuristics")
    return tuple(str(name) for name in content if name not in known) if _is_wrapped(content) else ()


def _is_wrapped(content: Mapping[str, Any]) -> bool:
    return isinstance(content.get("model"), Mapping)


def write_weights(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    *,
    naming: str = "published",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors to a file that `read_weights` reads, with the same bits; it appears complete or not at all.

    Args:
        path: its ending says what to write: ``.safetensors``, ``.pth`` as of `torch.save`, ``.pkl`` of arrays.
        tensors: by name.
        naming: "published": `.pth` has the tensors as "model", as Detectron2 wants them; otherwise they are on top.
        metadata: of a safetensors file; None: what transformers wants to see there.

    Raises:
        ValueError: if the path ends with something else, or `.pkl` has no type for a tensor.
        OSError: if the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in WEIGHT_SUFFIXES:
        raise ValueError(f"a file of weights must end with {', '.join(WEIGHT_SUFFIXES)}, got {path}")
    plain = _standalone(tensors)
    if path.suffix == ".safetensors":
        write_atomically(path, safetensors.torch.save(plain, {"format": "pt"} if metadata is None else dict(metadata)))
        return
    arrays = {name: _as_array(name, tensor) for name, tensor in plain.items()} if path.suffix == ".pkl" else {}
    with atomic_file(path) as file:
        if path.suffix == ".pkl":
            pickle.dump({"model": arrays, "__author__": "mask2former"}, file, protocol=4)
        else:
            torch.save({"model": plain} if naming == "published" else plain, file)


def _standalone(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors in memory of their own: some formats store all that a view looks at, or refuse views."""
    result = {}
    seen = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        result[name] = tensor
    return result


def _as_array(name: str, tensor: Tensor) -> NDArray[Any]:
    if tensor.dtype == torch.bfloat16 or tensor.dtype.is_complex:
        raise ValueError(f".pkl files hold no {tensor.dtype}, as {name} is; .safetensors and .pth do")
    return tensor.numpy()


def _read_shards(path: Path) -> dict[str, Any]:
    """The tensors of all files that an index of transformers names; they lie next to it."""
    try:
        files = json.loads(path.read_bytes())["weight_map"]
        if not all(isinstance(file, str) for file in files.values()):
            raise TypeError("names of files must be strings")
        wanted = {file: {name for name in files if files[name] == file} for file in sorted(set(files.values()))}
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no index of a checkpoint in several files, or is damaged: {error!r}") from error
    result: dict[str, Any] = {}
    for file, names in wanted.items():
        if Path(file).name != file or file.endswith(_INDEX_SUFFIX):
            raise ValueError(f"{path} must name files next to it, got {file!r}")
        content = read_weights(path.with_name(file))
        if absent := names - content.keys():
            raise ValueError(f"{path.with_name(file)} lacks {min(absent)}, which should be in it as {path.name} says")
        result |= {name: content[name] for name in names}
    return result


def _require_file(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    if not path.is_file():
        raise ValueError(f"{path} must be a file, got a folder or a device")


def _as_tensor(name: str, value: Any, where: str) -> Tensor:
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_quantized:
            raise ValueError(f"{where} must hold dense tensors, got {value.layout} of {value.dtype} as {name!r}")
        if value.nbytes > value.untyped_storage().nbytes():  # as many as one likes, from a file of a few bytes
            rule = "must hold every value of a tensor"
            raise ValueError(f"{where} {rule}, got some repeated in {name!r} {tuple(value.shape)}")
        return value.detach()
    if isinstance(value, _PickledArray):
        value = value.values
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biuf":
        array = np.asarray(value)
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))  # a copy
    kind = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
    raise ValueError(f"{where} must hold arrays or tensors of numbers, got {kind} as {name!r}")


def _check_memo(file: IO[bytes]) -> None:
    """Refuse a pickle that numbers an object as none of its size can: Python would make room for all numbers below."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and isinstance(argument, int) and argument > count:
            raise pickle.UnpicklingError(f"it numbers an object {argument} after {count} steps")
    file.seek(0)


def _check_archive(path: Path) -> None:
    """Refuse an archive that says it unpacks to more than it is: `torch.save` does not compress."""
    if not zipfile.is_zipfile(path):
        return  # the form before 2020
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
    except zipfile.BadZipFile as error:
        raise ValueError(str(error)) from error
    if size > path.stat().st_size:
        raise pickle.UnpicklingError(f"it would unpack to {size} bytes, more than it has")


# Stand-ins for what pickles of arrays and tensors ask for. NumPy's own classes would believe a state that
# declares any bytes to be pointers to objects; torch's own function for storages would unpickle anything.


class _PickledDtype:
    """A type of numbers; holds nothing else."""

    def __init__(self, code: str, *_: object) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"b1|[iu][1248]|f[248]", code):
            raise pickle.UnpicklingError(f"arrays must hold numbers, got type {code!r}")
        self.dtype: np.dtype[Any] = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1]
        self.dtype = self.dtype.newbyteorder(order if order in ("<", ">") else "=")


class _PickledArray:
    """An array that gets its content later."""

    values: NDArray[Any]

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, is_fortran, data = state
        self.values = _array_of(data, dtype, shape, "F" if is_fortran else "C")


def _array_of(data: bytes | str, dtype: _PickledDtype, shape: Any, order: Any, *_: object) -> NDArray[Any]:
    raw = data.encode("latin1") if isinstance(data, str) else bytes(data)  # Python 2 wrote strings
    return np.frombuffer(raw, dtype.dtype).reshape(shape, order=order)


def _empty_array(*_: object) -> _PickledArray:
    return _PickledArray()


def _scalar(dtype: _PickledDtype, data: bytes | str) -> NDArray[Any]:
    return _array_of(data, dtype, (), "C")


def _storage(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _latin1(text: str, encoding: str) -> bytes:
    """For `codecs.encode`, by which pickles of protocol 2 store bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes must be encoded in latin1, got {encoding!r}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """For `bytes()`, by which pickles of protocol 2 store none; with a number it would make as many as one likes."""
    return b""


_ADMITTED: dict[str, Any] = {
    "numpy.ndarray": _PickledArray,
    "numpy.dtype": _PickledDtype,
    "numpy.core.multiarray._reconstruct": _empty_array,
    "numpy._core.multiarray._reconstruct": _empty_array,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _array_of,
    "numpy._core.numeric._frombuffer": _array_of,
    "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
    "torch._utils._rebuild_parameter": torch._utils._rebuild_parameter,
    "torch.storage._load_from_bytes": _storage,
    "torch.Size": torch.Size,
    "collections.OrderedDict": OrderedDict,
    "_codecs.encode": _latin1,
    "__builtin__.bytes": _no_bytes,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Reads arrays, tensors and plain containers, and refuses everything else before it can do anything."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        name = f"{module_name}.{global_name}"
        if name not in _ADMITTED:
            raise pickle.UnpicklingError(
                f"it asks for {name}, but only arrays, tensors and plain containers are read, "
                "because anything else could run code"
            )
        return _ADMITTED[name]
