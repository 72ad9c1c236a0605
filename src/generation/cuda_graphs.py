"""Runs the UNet as CUDA graphs: a step of a known shape takes a few launches instead of hundreds."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from runpod import RunPodLogger

from src.generation.cuda_errors import is_out_of_memory, release_frames
from src.generation.timesteps import on_device

log = RunPodLogger()

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Latents (n, channels, height / 8, width / 8), timestep (), text embeddings (n, tokens, width), on one device.

With guidance, n is twice the number of images.
"""
Step = Callable[..., torch.Tensor]
"""Takes ``Inputs`` and predicts a tensor of the latents' shape."""

MAX_GRAPHS = 32
"""Enough for eight sizes in batches of 1 to 4 images. Graphs share their memory, so one more takes little."""
WARM_UP_RUNS = 3
"""Runs before a capture, in which cuDNN and cuBLAS choose kernels, as in ``torch.cuda.make_graphed_callables``."""


class CaptureInvalidated(RuntimeError):
    """A step failed while it was being captured."""


class GraphedStep:
    """A UNet's ``forward`` that captures a graph for each recurring shape and replays it from then on.

    The shape of the first batch, which is the warm-up, is captured at once. Any other shape is captured when a second
    batch has it, so a size that is asked for only once costs no capture. Calls with arguments that a graph does not
    support run eagerly, and so do shapes that do not fit in memory.

    At most ``max_graphs`` graphs are kept; the least recently used one is dropped first.

    After ``CaptureInvalidated`` nothing more is captured; existing graphs stay in use. PyTorch 2.13 then never frees
    the memory that the graphs share, even when they are dropped (fixed by
    https://github.com/pytorch/pytorch/pull/190348). Capturing ends so that this can happen only once.
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
        """By shape, how many batches had ended when it was first seen."""
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
        # schedulers use int64 or float32; the UNet begins by converting to float32
        inputs = (sample, on_device(timestep.to(torch.float32), sample), encoder_hidden_states)
        key = tuple((each.shape, each.dtype) for each in inputs)
        if key in self._graphs:
            self._graphs.move_to_end(key)
        elif self._is_worth_capturing(key):
            self._capture_graph(key, inputs)
        step = self._graphs.get(key, self._eager)
        return (step(*inputs),)

    def end_batch(self) -> None:
        """Marks the end of a batch: later steps belong to another one."""
        self._batches += 1

    def clear(self) -> bool:
        """Drops all graphs, which frees their memory; their shapes are captured again on next use.

        Returns:
            Whether there were any.
        """
        dropped = bool(self._graphs)
        self._graphs.clear()
        return dropped

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
            # the memory that the other graphs hold may be enough
            self._too_large.add(key)
            self.clear()
            torch.cuda.empty_cache()
        else:
            self._capturing = False


class Pace:
    """Keeps the host at most one step ahead of the device.

    A replay takes so few launches that the launch queue could hold all steps of a batch: progress would be reported
    too early, and the remaining steps of a cancelled job could not be stopped.
    """

    def __init__(self, new_event: Callable[[], Any]) -> None:
        self._new_event = new_event
        self._latest: Any = None

    def wait_for_previous_step(self) -> None:
        """Waits until the device has finished the previous step."""
        event, before = self._new_event(), self._latest
        event.record()
        self._latest = event
        if before:
            before.synchronize()


class Capture:
    """Captures steps as CUDA graphs, which can share memory because only one runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        # the same for all captures, because cuBLAS keeps a workspace for each stream that it has seen
        self._side = torch.cuda.Stream()
        self._pace = Pace(lambda: torch.cuda.Event(blocking=True))

    def __call__(self, step: Step, inputs: Inputs) -> Step:
        """Runs ``step`` until its kernels are chosen, then captures it.

        Raises:
            CaptureInvalidated: if it does something that cannot be captured, such as waiting for the device, or runs
                out of memory during the capture.
            RuntimeError: if it fails before the capture.
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
                # thread_local, so that threads that encode pictures can continue meanwhile
                with torch.cuda.graph(graph, pool=self._pool, stream=self._side, capture_error_mode="thread_local"):
                    predicted = step(*static)
            except Exception as error:
                raise CaptureInvalidated(f"{type(error).__name__}: {error}") from error
        finally:
            # a failed capture may leave the capture's stream current
            torch.cuda.set_stream(current)

        def replay(*new: torch.Tensor) -> torch.Tensor:
            for kept, given in zip(static, new, strict=True):
                kept.copy_(given)
            graph.replay()
            # a copy, because schedulers keep it and the next replay writes to the same memory
            output = predicted.clone()
            self._pace.wait_for_previous_step()
            return output

        return replay
