"""A program that generates with too little memory on a CUDA device, and prints the outcome as JSON."""

import json

import torch

from src.errors import JobError
from tests.support import engines, internals
from tests.support.engines import generate, generate_together, request_for


def main(model: str) -> None:
    """Runs the program. It must have a process of its own, since it limits the process's memory.

    By calculation, a step with 16 images of 1024 x 1024 needs 8 GiB and decoding one 1.5; a picture of 512 x 512 needs
    0.4.
    """
    engine = engines.build(model, max_batch_images=16)
    engine.warm_up()
    size = engine.limits.max_size

    def allow(gib: float) -> None:
        """Limits what PyTorch may allocate beyond the weights."""
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + gib * 2**30) / total)

    allow(4)
    requests = [request_for(engine, num_images=4, seed=seed, width=size, height=size) for seed in (0, 10, 20, 30)]
    results = generate_together(engine, *requests)
    outcome = {
        "pictures": sum(len(result.pictures) for result in results),
        "fitting": internals.fitting_images(engine, size),
    }
    allow(0.8)
    try:
        generate(engine, width=size, height=size)
    except JobError as error:
        outcome["error"] = str(error)
    outcome["native"] = len(generate(engine).pictures)
    print(json.dumps(outcome))
