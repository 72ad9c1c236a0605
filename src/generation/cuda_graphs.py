"""The UNet as CUDA graphs: a step of a known shape takes a few launches instead of hundreds."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from runpod import RunPodLogger

from src.generation.cuda_errors import is_out_of_memory, release_frames

log = RunPodLogger()

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Latents (n, channels, height / 8, width / 8), timestep (), text embeddings (n, tokens, width), on one device.

With guidance n is twice the number of images.
"""
Step = Callable[..., torch.Tensor]
"""Predicts from ``Inputs`` a tensor of the latents' shape."""

MAX_GRAPHS = 32
"""Graphs kept at once: eight sizes in batches of 1 to 4 images. They share their memory, so one more takes little."""
WARM_UP_RUNS = 3
"""Before a capture, as in ``torch.cuda.make_graphed_callables``: cuDNN and cuBLAS choose their kernels in them."""


class CaptureInvalidated(RuntimeError):
    """A step failed while it was being captured."""


class GraphedStep:
    """A UNet's ``forward`` that captures a graph for a shape which comes back, and replays it from then on.

    The first batch is the warm-up's: its shape is captured at once. Any other shape is captured when a second batch
    has it, so that sizes which are asked for once cost no capture. A call with arguments that a graph does not know
    runs eagerly, and so does a shape that does not fit in memory.

    At most ``max_graphs`` graphs are kept; the least recently used is dropped first.

    After ``CaptureInvalidated`` nothing is captured any more, and the graphs that exist go on. PyTorch 2.13 then never
    frees the memory that the graphs share, not even once they are dropped: it is lost to everything else until the
    process ends (mended by https://github.com/pytorch/pytorch/pull/190348). Since capturing ends, that happens once.
    """

    def __init__(
        self,
        forward: Callable[..., tuple[torch.Tensor]],
        capture: Callable[[Step, Inputs], Step],
        max_graphs: int = MAX_GRAPHS,
    ) -> None:
        self._forward = forward
        self._capture = capture
        self._max_graphs = max_graphs
        self._graphs: OrderedDict[tuple[Any, ...], Step] = OrderedDict()
        self._batches = 0
        self._first_batch: dict[tuple[Any, ...], int] = {}
        """By shape, the number of batches that were done when it was first met."""
        self._too_large: set[tuple[Any, ...]] = set()
        self._capturing = True

    def __call__(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        """``UNet2DConditionModel.forward`` as ``StableDiffusionPipeline`` calls it."""
        if return_dict or any(value is not None for value in others.values()):
            return self._forward(sample, timestep, encoder_hidden_states, return_dict=return_dict, **others)
        # schedulers count in int64 or float32; the UNet makes it float32 first thing
        inputs = (sample, timestep.to(sample.device, torch.float32), encoder_hidden_states)
        key = tuple((each.shape, each.dtype) for each in inputs)
        if key in self._graphs:
            self._graphs.move_to_end(key)
        elif self._is_worth_capturing(key):
            self._capture_graph(key, inputs)
        step = self._graphs.get(key, self._eager)
        return (step(*inputs),)

    def end_batch(self) -> None:
        """Says that the steps from now on are another batch's."""
        self._batches += 1

    def clear(self) -> None:
        """Drops all graphs, which frees their memory; their shapes are captured again on next use."""
        self._graphs.clear()

    def _eager(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self._forward(*inputs, return_dict=False)[0]

    def _is_worth_capturing(self, key: tuple[Any, ...]) -> bool:
        comes_back = self._first_batch.setdefault(key, self._batches) < self._batches
        return self._capturing and key not in self._too_large and (comes_back or not self._batches)

    def _capture_graph(self, key: tuple[Any, ...], inputs: Inputs) -> None:
        if len(self._graphs) == self._max_graphs:
            self._graphs.popitem(last=False)
        try:
            self._graphs[key] = self._capture(self._eager, inputs)
            return
        except Exception as error:
            failure = error
        release_frames(failure)
        shape = " x ".join(map(str, inputs[0].shape))
        log.warn(f"no CUDA graph for latents of {shape}, computed without: {type(failure).__name__}: {failure}")
        if is_out_of_memory(failure) and not isinstance(failure, CaptureInvalidated):
            # what the other graphs hold may be what is missing
            self._too_large.add(key)
            self.clear()
            torch.cuda.empty_cache()
        else:
            self._capturing = False


class Pace:
    """Keeps the host from running further ahead of the device than one step.

    A replay is so few launches that all steps of a batch would fit into the launch queue: progress would be reported
    before it is made, and the steps of a cancelled job could not be taken back.
    """

    def __init__(self, new_event: Callable[[], Any]) -> None:
        self._new_event = new_event
        self._latest: Any = None

    def wait_for_previous_step(self) -> None:
        """Waits until the device has done the step before."""
        event, before = self._new_event(), self._latest
        event.record()
        self._latest = event
        if before:
            before.synchronize()


class Capture:
    """Captures steps as CUDA graphs, which share their memory, since one runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        # one for all captures: cuBLAS keeps a workspace for each stream that it has seen
        self._side = torch.cuda.Stream()
        self._pace = Pace(lambda: torch.cuda.Event(blocking=True))

    def __call__(self, step: Step, inputs: Inputs) -> Step:
        """Runs ``step`` until its kernels are chosen, then captures it.

        Raises:
            CaptureInvalidated: if it does what a graph cannot hold, such as waiting for the device, or needs more
                memory than there is while it is captured.
            RuntimeError: if it fails before that.
        """
        static = [each.clone() for each in inputs]
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            self._side.wait_stream(current)
            with torch.cuda.stream(self._side):
                for _ in range(WARM_UP_RUNS):
                    step(*static)
            current.wait_stream(self._side)
            try:
                # other threads, such as those that encode pictures, may go on meanwhile
                with torch.cuda.graph(graph, pool=self._pool, stream=self._side, capture_error_mode="thread_local"):
                    predicted = step(*static)
            except Exception as error:
                raise CaptureInvalidated(f"{type(error).__name__}: {error}") from error
        finally:
            # a failed capture may leave the thread on the stream of the capture
            torch.cuda.set_stream(current)

        def replay(*new: torch.Tensor) -> torch.Tensor:
            for kept, given in zip(static, new, strict=True):
                kept.copy_(given)
            graph.replay()
            # schedulers keep what they are given, and the next replay writes to the same place
            output = predicted.clone()
            self._pace.wait_for_previous_step()
            return output

        return replay
