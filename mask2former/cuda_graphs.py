"""CUDA graphs: all kernels of a forward pass, recorded once for each shape of the batch and then launched together.

With one image at a time a GPU is often done before the host has launched the next of about a thousand kernels. A graph
is a single launch.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from mask2former.modeling.mask2former import Mask2Former
from mask2former.modeling.precision import float32_settings
from mask2former.modeling.structures import MaskPrediction

_WARM_UP = 3  # passes before a capture, in which libraries choose kernels and a compiler compiles

Forward = Callable[[Tensor], Sequence[Tensor]]
Capture = Callable[[Forward, Tensor], Forward]
"""From a forward pass and a batch to the same pass for batches of this shape and type; results never share memory."""


class GraphedModel:
    """A model in evaluation mode with the methods that prediction needs, whose forward passes are CUDA graphs.

    A graph belongs to the shape and type of the padded batch and to the modes it was made in: ``precision`` or, without
    one, PyTorch's settings for products of float32; autocast; and the number of decoder layers. Threads may share one;
    their passes run one after the other, as all graphs use the same memory.

    Parameters and buffers are read where they are: changes in place, such as an optimizer's or those of
    ``load_state_dict``, are seen; tensors put in their place, as by ``model.to`` or ``load_state_dict(assign=True)``,
    are not, and neither is any other change to the model. Take a new one then.
    """

    def __init__(self, model: Mask2Former, capacity: int, *, capture: Capture | None = None) -> None:
        """Set up; nothing is captured yet.

        Args:
            model: in evaluation mode, on a CUDA device. Compile it before.
            capacity: graphs that are kept; the one that was not used for the longest time goes first. The memory of a
                graph is its own input and results, and with the other graphs together what the largest one needs
                between them.
            capture: makes a graph; None: for CUDA.

        Raises:
            ValueError: if ``capacity`` is below 1, or ``capture`` is None and the model is on another device.
        """
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        if capture is None and model.device.type != "cuda":
            raise ValueError(f"model must be on a CUDA device, got one on {model.device}")
        self.model = model
        self.capacity = capacity
        self._capture = CudaCapture(model.device) if capture is None else capture
        self._graphs: OrderedDict[Hashable, Forward] = OrderedDict()  # the one that was used last is the last
        self._lock = threading.Lock()

    def batch_images(self, images: Sequence[Tensor]) -> Tensor:
        """As `Mask2Former.batch_images`."""
        return self.model.batch_images(images)

    def predict(self, batch: Tensor, all_layers: bool | None = None) -> list[MaskPrediction]:
        """As `Mask2Former.predict`, without gradients.

        Raises:
            RuntimeError: if the model is in training mode.
        """
        outputs = self._run(
            f"predict, all layers {bool(all_layers)}",
            lambda batch: [x for prediction in self.model.predict(batch, bool(all_layers)) for x in prediction],
            batch,
        )
        return [MaskPrediction(*outputs[i : i + 2]) for i in range(0, len(outputs), 2)]

    def predict_with_queries(self, batch: Tensor) -> tuple[MaskPrediction, Tensor]:
        """As `Mask2Former.predict_with_queries`, without gradients.

        Raises:
            RuntimeError: if the model is in training mode.
        """
        class_logits, mask_logits, queries = self._run("with queries", self._with_queries, batch)
        return MaskPrediction(class_logits, mask_logits), queries

    def _with_queries(self, batch: Tensor) -> Sequence[Tensor]:
        prediction, queries = self.model.predict_with_queries(batch)
        return *prediction, queries

    @torch.no_grad()
    def _run(self, name: str, forward: Forward, batch: Tensor) -> Sequence[Tensor]:
        if self.model.training:
            raise RuntimeError("model must be in evaluation mode for a CUDA graph, got one in training mode")
        device_type = self.model.device.type
        autocast = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
        products = float32_settings() if self.model.precision is None else None  # which a mode decides alone
        layers = getattr(self.model.sem_seg_head.predictor, "num_test_layers", None)
        key = (name, batch.shape, batch.dtype, self.model.precision, autocast, products, layers)

        def uncached(batch: Tensor) -> Sequence[Tensor]:
            # weights that autocast has converted are freed at its end, but a graph would go on reading them
            with torch.autocast(device_type, autocast, enabled=autocast is not None, cache_enabled=False):
                return forward(batch)

        with self._lock:
            graph = self._graphs.pop(key, None)
            if graph is None:
                while len(self._graphs) >= self.capacity:  # before the capture, which then has their memory
                    self._graphs.popitem(last=False)
                graph = self._capture(uncached, batch)
            self._graphs[key] = graph
            return graph(batch)


class CudaCapture:
    """Captures forward passes on a device into one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        """Set up."""
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        self._done = torch.cuda.Event()

    def __call__(self, forward: Forward, example: Tensor) -> Forward:
        """Capture a forward pass that neither waits for the device nor copies from the host."""
        with torch.cuda.device(self._device):
            with torch.inference_mode(False):  # what is made in inference mode can be written to only there
                batch = torch.empty(example.shape, dtype=example.dtype, device=self._device)
            batch.copy_(example)
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(_WARM_UP):
                    forward(batch)
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # other threads may use the device meanwhile, as those that pin memory do
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                outputs = forward(batch)

        def replay(new: Tensor) -> list[Tensor]:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(self._done)  # of another thread with another stream
            batch.copy_(new)
            graph.replay()
            results = [output.clone() for output in outputs]  # the next pass overwrites the outputs
            self._done.record(stream)
            return results

        return replay
