"""Judges the embedded model: ``python -m builder.demo_model.evaluate``.

Asks for combinations that training never saw, with the pipeline's default steps and guidance, and prints how often the
picture has what was asked, attribute by attribute. Colours are read off the pixels. Shape, terrain and time of day are
judged by a small classifier, trained here on drawn scenes and itself checked on scenes it has not seen. The
autoencoder alone is judged by the PSNR of unseen scenes.
"""

import argparse
import time
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from builder.demo_model.captions import caption
from builder.demo_model.scenes import ATTRIBUTES, COLORS, HELD_OUT, LANDSCAPE_SCENES, SHAPE_SCENES, SIZE, Scene, draw
from builder.demo_model.train import as_tensor

CPU = torch.device("cpu")
TARGETS = {"color": 0.95, "background": 0.95, "shape": 0.85, "time": 0.95, "terrain": 0.90}
JUDGED = ("shape", "terrain", "time")
"""What the classifier judges."""
PSNR_TARGET = 30.0
"""In dB."""


def pixels(pictures: list[Image.Image]) -> np.ndarray:
    """uint8, (n, 128, 128, 3)."""
    return np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])


def shape_colors(picture: np.ndarray) -> tuple[str, str]:
    """Names the colours of a shape and of its background, by the nearest of the ten.

    Args:
        picture: uint8, (128, 128, 3).

    The background is what the border shows; the shape is what differs most from it.
    """
    edge = SIZE // 16
    background = np.median(np.concatenate([picture[:edge], picture[-edge:]]).reshape(-1, 3), axis=0)
    contrast = np.linalg.norm(picture - background, axis=-1)
    shape = np.median(picture[contrast > 0.5 * contrast.max()], axis=0)
    return _nearest(shape), _nearest(background)


def _nearest(color: np.ndarray) -> str:
    return min(COLORS, key=lambda name: float(np.linalg.norm(color - np.array(COLORS[name]))))


class Judge(nn.Module):
    """A small classifier of shape, terrain and time of day."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            *(
                layer
                for channels, wider in ((3, 16), (16, 32), (32, 64), (64, 64))
                for layer in (nn.Conv2d(channels, wider, 3, stride=2, padding=1), nn.BatchNorm2d(wider), nn.ReLU())
            ),
            nn.Flatten(),
        )
        self.heads = nn.ModuleDict({name: nn.LazyLinear(len(ATTRIBUTES[name])) for name in JUDGED})

    def forward(self, pictures: np.ndarray) -> dict[str, Tensor]:
        """Logits of every attribute for uint8 pictures of (n, 128, 128, 3)."""
        x = as_tensor(pictures, CPU)
        features = self.trunk(F.avg_pool2d(x, 2))
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def names(self, pictures: np.ndarray) -> list[dict[str, str | None]]:
        judged = {name: logits.argmax(1).tolist() for name, logits in self(pictures).items()}
        return [{name: ATTRIBUTES[name][judged[name][i]] for name in JUDGED} for i in range(len(pictures))]


def scene_pictures(count: int, seed: int) -> tuple[list[Scene], np.ndarray]:
    """Scenes of both kinds, held-out combinations among them, and their pictures."""
    rng = Random(seed)
    scenes = [rng.choice((SHAPE_SCENES, LANDSCAPE_SCENES)[i % 2]) for i in range(count)]
    return scenes, pixels([draw(scene, rng) for scene in scenes])


def train_judge(count: int = 6_000, epochs: int = 4) -> Judge:
    torch.manual_seed(0)
    judge = Judge()
    scenes, pictures = scene_pictures(count, seed=10)
    judge(pictures[:2])
    optimizer = torch.optim.AdamW(judge.parameters(), lr=1e-3)
    for _ in range(epochs):
        for picked in torch.randperm(count).split(64):
            logits = judge(pictures[picked])
            loss = torch.stack(
                [
                    F.cross_entropy(
                        logits[name],
                        torch.tensor([ATTRIBUTES[name].index(getattr(scenes[i], name)) for i in picked]),
                    )
                    for name in JUDGED
                ]
            ).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return judge.eval()


def score(scenes: list[Scene], pictures: np.ndarray, judge: Judge) -> dict[str, float]:
    """The share of pictures that have each attribute of their scene."""
    right, asked = Counter[str](), Counter[str]()
    for scene, picture, names in zip(scenes, pictures, judge.names(pictures), strict=True):
        seen = dict(names)
        if scene.shape:
            seen["color"], seen["background"] = shape_colors(picture)
        for name in TARGETS:
            if wanted := getattr(scene, name):
                asked[name] += 1
                right[name] += seen.get(name) == wanted
    return {name: right[name] / asked[name] for name in TARGETS}


def psnr(pipe: StableDiffusionPipeline, pictures: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of the autoencoder alone, the mean over ``pictures``."""
    target = as_tensor(pictures, CPU)
    ratios = []
    for batch in target.split(16):
        with torch.no_grad():
            back = pipe.vae.decode(pipe.vae.encode(batch).latent_dist.mode()).sample.clamp(-1, 1)
        ratios.append(-10 * torch.log10(((back - batch) / 2).square().mean(dim=(1, 2, 3))))
    return torch.cat(ratios).mean().item()


def generate(pipe: StableDiffusionPipeline, prompts: list[str], seed: int) -> np.ndarray:
    """Pictures of ``prompts`` with the pipeline's default steps and guidance."""
    pictures = []
    for first in range(0, len(prompts), 8):
        generators = [torch.Generator().manual_seed(seed + first + i) for i in range(len(prompts[first : first + 8]))]
        pictures += pipe(prompts[first : first + 8], generator=generators).images
    return pixels(pictures)


def grid(pictures: np.ndarray, columns: int) -> Image.Image:
    rows = [np.concatenate(list(pictures[i : i + columns]), axis=1) for i in range(0, len(pictures), columns)]
    return Image.fromarray(np.concatenate(rows))


def cpu_seconds_per_picture(pipe: StableDiffusionPipeline) -> float:
    """CPU time of one picture on one core, in seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    generate(pipe, ["warm-up"], seed=0)
    started = time.process_time()
    generate(pipe, ["snowy mountains at sunset"], seed=0)
    torch.set_num_threads(threads)
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description="Judge the embedded model.")
    parser.add_argument("--model", type=Path, default=Path("src/model/demo"), help="the model's directory")
    parser.add_argument("--pictures", type=int, default=400, help="how many to generate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--grid", type=Path, help="where to save a picture of the first 36")
    arguments = parser.parse_args()

    judge = train_judge()
    pipe = StableDiffusionPipeline.from_pretrained(arguments.model, dtype=torch.float32, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)

    unseen, real = scene_pictures(1_000, seed=20)
    checked = score(unseen, real, judge)
    rng = Random(arguments.seed)
    held_out = [sorted(HELD_OUT.intersection(kind), key=str) for kind in (SHAPE_SCENES, LANDSCAPE_SCENES)]
    scenes = [rng.choice(held_out[i % 2]) for i in range(arguments.pictures)]
    generated = generate(pipe, [caption(scene, rng) for scene in scenes], arguments.seed)
    found = score(scenes, generated, judge)
    print(f"{'attribute':<12}{'generated':>10}{'target':>10}{'judge on real scenes':>24}")
    for name, target in TARGETS.items():
        print(f"{name:<12}{found[name]:>10.1%}{target:>10.0%}{checked[name]:>24.1%}")
    print(f"autoencoder PSNR on unseen scenes: {psnr(pipe, real[:200]):.1f} dB (target {PSNR_TARGET:.0f})")
    print(f"CPU time of a 50-step picture on one core: {cpu_seconds_per_picture(pipe):.2f} s (target 2)")
    if arguments.grid:
        grid(generated[:36], columns=6).save(arguments.grid)


if __name__ == "__main__":
    main()
