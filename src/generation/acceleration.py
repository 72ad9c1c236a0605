"""What makes a loaded pipeline faster or smaller: decoding image by image, attention slicing, memory layout, graphs."""

from diffusers import StableDiffusionPipeline

from src.generation.attention import enable_attention_slicing
from src.generation.cuda_graphs import Capture, GraphedStep
from src.generation.memory_layout import use_fastest_layout
from src.generation.timesteps import accept_from_cpu
from src.settings import Settings


def accelerate(pipe: StableDiffusionPipeline, settings: Settings) -> GraphedStep | None:
    """Applies ``settings`` to a pipeline on its device.

    Returns:
        The UNet's CUDA graphs, if they are on and there is a CUDA device.
    """
    # one image at a time: decoding a whole batch would need more memory than denoising it
    pipe.vae.enable_slicing()
    accept_from_cpu(pipe.unet)
    graphs = None
    if settings.acceleration == "graphs" and pipe.device.type == "cuda":
        pipe.fuse_qkv_projections()
        for model in (pipe.unet, pipe.vae):
            use_fastest_layout(model)
        graphs = pipe.unet.forward = GraphedStep(pipe.unet.forward, Capture())
    # after fusing, which replaces the attention processors
    enable_attention_slicing(pipe, settings.attention_slicing)
    return graphs
