"""``handler.py`` with a pipeline that fails, or is slow, when a prompt or an environment variable tells it to."""

import functools
import os
import socket
import threading
import time
from typing import Any

import handler
from src.startup.import_libraries import import_libraries

SECRETS = f"at {__file__} on {socket.gethostname()} with token {os.environ.get('RUNPOD_AI_API_KEY')}"
"""Text that no client must ever see."""


STEP_SECONDS = 0.1
"""How much longer each step takes with the prompt "slow", in which the machine can rest."""


def hang(*_: object, **__: object) -> None:
    threading.Event().wait()


def refuse_thread(_: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def main() -> None:
    import_libraries()
    import torch
    from diffusers import StableDiffusionPipeline

    from src.model import loading

    class FaultyPipeline(StableDiffusionPipeline):
        @functools.wraps(StableDiffusionPipeline.__call__)
        def __call__(self, prompt: list[str], **kwargs: Any) -> Any:
            if "out of memory" in prompt or ("needs a call alone" in prompt and len(prompt) > 1):
                raise torch.OutOfMemoryError(f"CUDA out of memory {SECRETS}")
            if "crash" in prompt:
                raise RuntimeError(f"crashed {SECRETS}")
            if os.environ.get("ALWAYS_CRASH"):
                raise RuntimeError("no kernel image is available")
            if "hang" in prompt or os.environ.get("ALWAYS_HANG"):
                self.unet.forward = hang
            if "no more threads" in prompt:
                threading.Thread.start = refuse_thread  # type: ignore[method-assign]
            if "device-side assert" in prompt:
                # an index out of bounds, on a CUDA device
                torch.zeros(1, device=self.device)[torch.ones(1, dtype=torch.int64, device=self.device)]
            if "poison" in prompt or os.environ.get("ALWAYS_POISON"):
                raise torch.AcceleratorError(f"CUDA error: an illegal memory access was encountered {SECRETS}")
            pause = self.unet.register_forward_pre_hook(lambda *_: time.sleep(STEP_SECONDS * ("slow" in prompt)))
            try:
                generated = super().__call__(prompt=prompt, **kwargs)
            finally:
                pause.remove()
            for i, asked in enumerate(prompt):
                if asked == "nan" or os.environ.get("ALWAYS_NAN"):
                    generated.images[i] = float("nan")
            return generated

    loading.StableDiffusionPipeline = FaultyPipeline  # type: ignore[misc]
    handler.main()


if __name__ == "__main__":
    main()
