"""The UNet by CUDA graphs: a step of shapes seen before is one launch instead of a thousand."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from runpod import RunPodLogger

log = RunPodLogger()

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Latents (images, 4, height / 8, width / 8), timestep (), text embeddings (images, tokens, width), on one device."""
Step = Callable[..., torch.Tensor]
"""Predicts from ``Inputs`` a tensor of the latents' shape."""

MAX_GRAPHS = 8
"""Graphs kept at once: with guidance, two sizes of each of the shared calls of 1 to 4 images."""


class GraphedStep:
    """A UNet's ``forward`` that captures a graph for each shape when it first meets it, and replays it from then on.

    At most ``max_graphs`` graphs are kept; the one that has been unused for longest goes first. A shape that cannot be
    captured is computed as it always was, and so is a call with arguments that a graph does not know.
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
        self._steps: OrderedDict[tuple[Any, ...], Step] = OrderedDict()

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
        inputs = (sample, timestep.to(sample.device), encoder_hidden_states)
        key = tuple((each.shape, each.dtype) for each in inputs)
        step = self._steps.pop(key, None) or self._capture_or_eager(inputs)
        self._steps[key] = step
        if len(self._steps) > self._max_graphs:
            self._steps.popitem(last=False)
        return (step(*inputs),)

    def _eager(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self._forward(*inputs, return_dict=False)[0]

    def _capture_or_eager(self, inputs: Inputs) -> Step:
        try:
            return self._capture(self._eager, inputs)
        except Exception as error:
            shape = " x ".join(map(str, inputs[0].shape))
            log.warn(f"no CUDA graph for latents of {shape}, computed without: {type(error).__name__}: {error}")
            if isinstance(error, torch.OutOfMemoryError):
                # what the other graphs hold may be what is missing
                self._steps.clear()
                torch.cuda.empty_cache()
            return self._eager


class Capture:
    """Captures steps as CUDA graphs, which share their memory, since one runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step, inputs: Inputs) -> Step:
        """Runs ``step`` until its kernels are chosen, then records it.

        Raises:
            RuntimeError: if it does what a graph cannot hold, such as waiting for the device.
        """
        static = [each.clone() for each in inputs]
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(2):
                step(*static)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # other threads, such as those that encode pictures, may go on meanwhile
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            predicted = step(*static)

        def replay(*new: torch.Tensor) -> torch.Tensor:
            for kept, given in zip(static, new, strict=True):
                kept.copy_(given)
            graph.replay()
            # schedulers keep what they are given, and the next replay writes to the same place
            return predicted.clone()

        return replay
