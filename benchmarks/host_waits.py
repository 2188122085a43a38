"""Counts where a program would make the host wait for a GPU, on a machine that has none.

    with PretendedGPU() as gpu:
        model.to("cuda")
        gpu.clear()
        model.losses(images, targets)
    print(gpu.waits)

Inside, tensors "on cuda" are computed on the CPU, but say that they are on a GPU, so that a program takes the branches
that it has for one; what Python or PyTorch's own composite operators ask of them goes through PyTorch's dispatcher as
on a GPU. Counted are operators that there wait for the result of a kernel, and copies that wait. What a kernel does
inside of itself is not seen: `WAITING` names those operators that are known to wait.
"""

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

GPU = torch.device("cuda")
WAITING = frozenset(
    {
        "_local_scalar_dense",  # item(), bool() and float() of a tensor
        "nonzero",
        "masked_select",
        "_unique2",
        "unique_dim",
        "unique_consecutive",
        "bincount",
        "equal",
    }
)
_INDEXING = frozenset({"index", "index_put", "index_put_", "_index_put_impl_"})
_CONVERTING = _INDEXING | {"where"}  # kernels take single numbers of the host as arguments, but these copy them
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
_MATHEMATICAL_ATTENTION = 0  # the one of which PyTorch has no kernel for each device


class _OnGPU(Tensor):
    """A tensor that says it is on a GPU; to PyTorch's C++ code it is on the meta device, for which nothing is special.

    Its numbers are in ``kept``, on the CPU.
    """

    kept: Tensor

    @staticmethod
    def __new__(cls, kept: Tensor) -> "_OnGPU":
        layout = {"strides": kept.stride(), "storage_offset": kept.storage_offset(), "dtype": kept.dtype}
        make: Any = Tensor._make_wrapper_subclass  # type: ignore[attr-defined]
        with torch.inference_mode(False):  # which is a fact of the numbers; as a view of weights it would be refused
            wrapper: Any = make(cls, kept.shape, device="meta", **layout)
        wrapper.kept = kept
        return wrapper

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{function}: a tensor of a pretended GPU is used outside of it")


class PretendedGPU(TorchFunctionMode):
    """Inside of a ``with`` block there is a GPU.

    Attributes:
        waits: how often each operator made the host wait.
        copies: between host and GPU, those included that the host does not wait for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self._operators = _Operators(self.waits, self.copies)

    def clear(self) -> None:
        """Count anew."""
        self.waits.clear()
        self.copies.clear()

    def __enter__(self) -> "PretendedGPU":
        super().__enter__()
        self._operators.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._operators.__exit__(*error)
        super().__exit__(*error)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What Python calls: devices are translated, as PyTorch would look for a GPU."""
        if function is Tensor.pin_memory:
            return args[0]
        if function is torch._has_compatible_shallow_copy_type:  # type: ignore[attr-defined]
            return False
        if function is Tensor.tolist and isinstance(args[0], _OnGPU):
            return args[0].cpu().tolist()
        if getattr(function, "__name__", "") == "__get__":  # an attribute
            return function(*args, **(kwargs or {}))
        args, kwargs = tree_map(_to_meta, (tuple(args), dict(kwargs or {})))
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return function(*args, **kwargs).to(device)  # made on the host; PyTorch does not show that copy
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*CUDA is not available")
            return function(*args, **kwargs)


class _Operators(TorchDispatchMode):
    """Runs operators on what the tensors keep."""

    def __init__(self, waits: Counter[str], copies: Counter[str]) -> None:
        super().__init__()
        self.waits, self.copies = waits, copies

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """An operator of PyTorch."""
        kwargs = dict(kwargs or {})
        if torch.is_inference_mode_enabled() and _is_composite(function.name()):  # elsewhere its parts come
            with self:
                return function._op_dk(_COMPOSITE, *args, **kwargs)
        name = function.name().partition("::")[2].partition(".")[0]
        inputs = list(_tensors((args, kwargs)))
        from_gpu = any(isinstance(x, _OnGPU) for x in inputs)
        wanted = kwargs.get("device")
        to_gpu = from_gpu if wanted is None else torch.device(wanted).type == "meta"
        if from_gpu or to_gpu:
            self._count(name, args, kwargs, from_gpu=from_gpu, to_gpu=to_gpu)
        if wanted is not None:
            kwargs["device"] = torch.device("cpu")
        if name == "_fused_sdp_choice":
            return _MATHEMATICAL_ATTENTION
        wrappers = {id(x.kept): x for x in inputs if isinstance(x, _OnGPU)}
        output = function(*tree_map(_kept, args), **tree_map(_kept, kwargs))
        return tree_map(lambda x: _wrapped(x, wrappers), output) if to_gpu else output

    def _count(self, name: str, args: Sequence[Any], kwargs: dict[str, Any], *, from_gpu: bool, to_gpu: bool) -> None:
        if name in _CONVERTING and any(not isinstance(x, _OnGPU) for x in _tensors((args, kwargs))):
            self._count_copy(True, False)  # single numbers and indices of the host
        if name in WAITING or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            self.waits[name] += 1
        elif name in _INDEXING and any(_is_mask(index) for index in args[1]):
            self.waits[f"{name} by a mask"] += 1
        elif name == "copy_":
            if isinstance(args[0], _OnGPU) != isinstance(args[1], _OnGPU):
                self._count_copy(isinstance(args[0], _OnGPU), args[2] if len(args) > 2 else kwargs.get("non_blocking"))
        elif name == "_to_copy":
            if from_gpu != to_gpu:
                self._count_copy(to_gpu, kwargs.get("non_blocking"))
        elif from_gpu and name not in _INDEXING and any(_is_host_array(x) for x in _tensors((args, kwargs))):
            raise RuntimeError(f"{name}: tensors must be on one device")

    def _count_copy(self, is_to_gpu: bool, non_blocking: bool | None) -> None:
        where = "copy to the GPU" if is_to_gpu else "copy to the host"
        self.copies[where] += 1
        if not non_blocking:
            self.waits[where] += 1


def _tensors(values: Any) -> Iterable[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


def _to_meta(value: Any) -> Any:
    if isinstance(value, torch.device) or (isinstance(value, str) and value.startswith("cuda")):
        return torch.device("meta") if torch.device(value).type == "cuda" else value
    return value


def _kept(value: Any) -> Any:
    return value.kept if isinstance(value, _OnGPU) else value


def _wrapped(value: Any, wrappers: dict[int, _OnGPU]) -> Any:
    """What an operator gave; changed in place it is the tensor that it was."""
    if not isinstance(value, Tensor):
        return value
    return wrappers[id(value)] if id(value) in wrappers else _OnGPU(value)


def _is_composite(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")


def _is_host_array(x: Tensor) -> bool:
    return not isinstance(x, _OnGPU) and x.dim() > 0


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)
