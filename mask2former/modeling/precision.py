"""The numerical modes of a model: what its products are computed in, and PyTorch's settings for that.

- ``strict``: float32, and nothing that PyTorch offers to compute it faster and less exactly.
- ``tf32``: float32, and TensorFloat-32 in products (10 bits of mantissa) where the device has it.
- ``fast``: products in bfloat16, summed in float32. Sampling coordinates, softmax, statistics of normalisations and
  losses stay float32; products of float32 that are left are those of ``tf32``.

No mode (None) is the published behaviour: float32, or the caller's autocast, which does not reach the deformable pixel
decoder, in the caller's settings.
"""

import threading
from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple, get_args

import torch

Precision = Literal["strict", "tf32", "fast"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_precision(name: str, value: object) -> None:
    """Raise ValueError, with the argument's name, unless the value is a mode or None."""
    if value is not None and value not in PRECISIONS:
        raise ValueError(f"{name} must be one of {', '.join(PRECISIONS)} or None, got {value!r}")


def check_dtype(dtype: torch.dtype, precision: Precision | None) -> None:
    """Raise ValueError unless a model of this mode can be run in an autocast of this type, float32 for none."""
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, _DTYPES))}, got {dtype!r}")
    if precision is not None and dtype is not torch.float32:
        raise ValueError(f"dtype must be float32 where precision is {precision!r}, which decides alone, got {dtype}")


def forward_mode(precision: Precision | None, device_type: str) -> AbstractContextManager[None]:
    """What a forward pass runs in: the settings of `float32_products`, and autocast to bfloat16, or none at all."""
    return nullcontext() if precision is None else _forward_mode(precision, device_type)


def float32_products(precision: Precision | None) -> AbstractContextManager[None]:
    """PyTorch's settings for products of float32, which a backward pass needs, too; put back at the end.

    They are of the process, not of the thread. Threads that want the same settings have them together; one that wants
    others waits until these are done.

    Raises:
        RuntimeError: if this thread is already inside of a mode with other settings, for which it would wait forever.
    """
    return nullcontext() if precision is None else _SETTINGS.held("ieee" if precision == "strict" else "tf32")


def float32_settings() -> Hashable:
    """PyTorch's settings for products of float32 as they are now; equal if they are the same."""
    return _read()


@contextmanager
def _forward_mode(precision: Precision, device_type: str) -> Iterator[None]:
    # the cache of converted weights is one for all threads, and each weight is used about once
    autocast = torch.autocast(device_type, torch.bfloat16, enabled=precision == "fast", cache_enabled=False)
    with float32_products(precision), autocast:
        yield


class _State(NamedTuple):
    """PyTorch's settings; None for those that cannot be read, or are not there before PyTorch 2.9.

    Attributes:
        matmul: of products of matrices on all devices.
        cudnn: of convolutions on a GPU.
        single: of each operation of each library, as PyTorch 2.9 and later keep them.
    """

    matmul: str | None
    cudnn: bool | None
    single: tuple[str, ...] | None


def _libraries() -> list[Any]:
    """What has a setting of its own from PyTorch 2.9 on."""
    backends: Any = torch.backends
    if not hasattr(backends.cuda.matmul, "fp32_precision"):
        return []
    cpu, gpu = backends.mkldnn, backends.cudnn
    return [backends.cuda.matmul, gpu.conv, gpu.rnn, cpu.matmul, cpu.conv, cpu.rnn]


def _read() -> _State:
    # The older settings raise once a program has changed the newer ones, of which they are a summary, one by one.
    try:
        matmul: str | None = torch.get_float32_matmul_precision()
    except RuntimeError:
        matmul = None
    try:
        cudnn: bool | None = torch.backends.cudnn.allow_tf32
    except RuntimeError:
        cudnn = None
    libraries = _libraries()
    return _State(matmul, cudnn, tuple(library.fp32_precision for library in libraries) if libraries else None)


def _write(state: _State) -> None:
    # older settings first: they change the newer ones with them
    if state.matmul is not None:
        torch.set_float32_matmul_precision(state.matmul)
    if state.cudnn is not None:
        torch.backends.cudnn.allow_tf32 = state.cudnn
    for library, value in zip(_libraries(), state.single or (), strict=True):
        library.fp32_precision = value


class _Settings:
    """Changes PyTorch's settings while anybody wants them, and puts them back."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._holders: list[int] = []  # threads, as often as they have entered
        self._value = ""
        self._saved: _State | None = None

    @contextmanager
    def held(self, value: str) -> Iterator[None]:
        """Inside, products of float32 are computed in "ieee" or "tf32"."""
        self._take(value)
        try:
            yield
        finally:
            self._give_back()

    def _take(self, value: str) -> None:
        thread = threading.get_ident()
        with self._changed:
            if thread in self._holders and self._value != value:
                raise RuntimeError(
                    f"precision must be the same inside and outside of a forward pass or a step: {self._value!r} "
                    f"products of float32 are in use by this thread, got {value!r}"
                )
            self._changed.wait_for(lambda: not self._holders or self._value == value)
            if not self._holders:
                self._saved = _read()
                singles = (value,) * len(_libraries()) if self._saved.single is not None else None
                _write(_State("highest" if value == "ieee" else "high", value == "tf32", singles))
                self._value = value
            self._holders.append(thread)

    def _give_back(self) -> None:
        with self._changed:
            self._holders.remove(threading.get_ident())
            if not self._holders and self._saved is not None:
                _write(self._saved)
                self._saved = None
                self._changed.notify_all()


_SETTINGS = _Settings()
