"""What makes a loaded pipeline faster or smaller: decoding by image, attention slicing, CUDA graphs."""

import torch
from diffusers import StableDiffusionPipeline

from src.generation.attention import enable_attention_slicing
from src.generation.cuda_graphs import Capture, GraphedStep
from src.settings import Settings


def accelerate(pipe: StableDiffusionPipeline, settings: Settings) -> GraphedStep | None:
    """Applies ``settings`` to a pipeline on its device.

    Returns:
        The UNet's CUDA graphs, if they are asked for and there is a CUDA device.
    """
    # image by image: decoding a batch at once would need more memory than denoising it
    pipe.vae.enable_slicing()
    if settings.attention_slicing != "off":
        enable_attention_slicing(pipe, settings.attention_slicing)
    if settings.acceleration == "graphs" and pipe.device.type == "cuda":
        return enable_cuda_graphs(pipe, sliced=settings.attention_slicing != "off")
    return None


def enable_cuda_graphs(pipe: StableDiffusionPipeline, *, sliced: bool) -> GraphedStep:
    """Puts the weights into channels_last, which suits tensor cores, and runs the UNet as CUDA graphs."""
    for model in (pipe.unet, pipe.vae):
        model.to(memory_format=torch.channels_last)
    if not sliced:
        # attention slicing needs the projections one by one
        pipe.fuse_qkv_projections()
    graphs = GraphedStep(pipe.unet.forward, Capture())
    pipe.unet.forward = graphs
    return graphs
