"""Trains the embedded model: ``python -m builder.demo_model.train``.

Four stages, each of which resumes from its last checkpoint when it is run again:

1. text encoder: a CLIP tokenizer and text encoder, trained to recognize what a caption asks for. Captions cost nothing
   next to pictures, so words and word order are learned here, before the first picture is seen;
2. pictures: paint the training scenes;
3. autoencoder: 128 x 128 pictures to 8 x 16 x 16 latents and back;
4. UNet: the denoiser, on the latents and the text encoder's hidden states.

The result is written in diffusers' directory format, in float16.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.training_utils import EMAModel, compute_snr
from tokenizers import pre_tokenizers
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from builder.demo_model.captions import caption, nonsense, words
from builder.demo_model.scenes import ATTRIBUTES, HELD_OUT, LANDSCAPE_SCENES, SHAPE_SCENES, SIZE, Scene, draw
from builder.fetch_model import save

PICTURES = 24_000
MERGES = 400
TOKENS = 77
"""Length of a tokenized prompt, as in Stable Diffusion 1."""
TEXT_STEPS, TEXT_BATCH = 2_500, 64
VAE_STEPS, VAE_SHARP_STEPS, VAE_POLISH_STEPS, DECODER_STEPS, VAE_BATCH = 4_000, 2_500, 1_200, 3_000, 8
UNET_STEPS, UNET_BATCH = 8_000, 32
LATENT_CHANNELS = 8
SNR_GAMMA = 5.0
"""Min-SNR weighting (Hang et al. 2023, arXiv 2303.09556), with the paper's value. One is added to the weight in terms
of the clean picture, so that the noisiest steps, where colours are settled, keep counting."""
NOISE_OFFSET = 0.1
"""Strength of one more normal number per latent channel, shared by all its pixels (Guttenberg 2023, "Diffusion with
offset noise"): v1-4's schedule ends before the signal does, and the colours of that remainder would outvote the
prompt."""
PROMPT_DROP = 0.1
"""Share of pictures whose prompt is dropped, for classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598)."""

TRAINING_KINDS = [[scene for scene in kind if scene not in HELD_OUT] for kind in (SHAPE_SCENES, LANDSCAPE_SCENES)]
"""The shapes and the landscapes that training may see."""

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def training_scenes(count: int) -> list[Scene]:
    """Shapes and landscapes in equal numbers, none of a held-out combination."""
    return [Random(i).choice(TRAINING_KINDS[i % 2]) for i in range(count)]


def training_pictures(scenes: list[Scene], build: Path) -> np.ndarray:
    """The pictures of ``scenes``: uint8, (count, 128, 128, 3)."""
    path = build / "pictures.npy"
    if not path.exists():
        painted = np.stack([np.asarray(draw(scene, Random(i))) for i, scene in enumerate(scenes)])
        np.save(build / "painting.npy", painted)
        (build / "painting.npy").rename(path)
    pictures: np.ndarray = np.load(path, mmap_mode="r")
    return pictures


def as_tensor(pictures: np.ndarray, device: torch.device = DEVICE) -> Tensor:
    """uint8 (n, h, w, 3) to float32 (n, 3, h, w) in -1 to 1."""
    return torch.from_numpy(np.array(pictures)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def fit(
    name: str,
    build: Path,
    model: nn.Module,
    loss_of: Callable[[Random], Tensor],
    *,
    steps: int,
    learning_rate: float,
    ema: EMAModel | None = None,
    checkpoint_every: int = 500,
) -> None:
    """Trains ``model`` for ``steps`` steps with AdamW and a one-cycle schedule, from its checkpoint where there is one.

    Each step draws all its random numbers from its own seed, so a resumed run equals an uninterrupted one.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.08)
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": schedule}
    if ema:
        parts["ema"] = ema
    path, first = build / f"{name}.pt", 0
    if path.exists():
        saved = torch.load(path, map_location=DEVICE)
        first = saved.pop("step")
        for key, part in parts.items():
            part.load_state_dict(saved[key])
    started, losses = time.monotonic(), []
    for step in range(first, steps):
        torch.manual_seed(step)
        loss = loss_of(Random(f"{name} {step}"))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if ema:
            ema.step(model.parameters())
        losses.append(loss.item())
        if (step + 1) % 100 == 0 or step + 1 == steps:
            pace = (time.monotonic() - started) / (step + 1 - first)
            print(f"{name} step {step + 1}/{steps} loss {np.mean(losses[-100:]):.4f} {pace:.3f} s a step", flush=True)
        if (step + 1) % checkpoint_every == 0 or step + 1 == steps:
            torch.save(
                {"step": step + 1} | {key: part.state_dict() for key, part in parts.items()}, path.with_suffix(".new")
            )
            path.with_suffix(".new").rename(path)


def train_tokenizer(scenes: list[Scene], folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer in its original files (vocab.json, merges.txt), its merges learned from captions."""
    learner = CLIPTokenizer().backend_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner.train_from_iterator(
        (caption(scene, Random(i)) for i, scene in enumerate(scenes)),
        BpeTrainer(
            vocab_size=2 * len(alphabet) + MERGES,
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    merges = [" ".join(pair) for pair in json.loads(learner.to_str())["model"]["merges"]][:MERGES]
    words = [*alphabet, *(byte + "</w>" for byte in alphabet), *(merge.replace(" ", "") for merge in merges)]
    vocabulary = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS}, indent=2) + "\n"
    )
    return CLIPTokenizer.from_pretrained(folder)


def tokenize(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    """Token ids as the pipeline makes them: int64, (n, 77)."""
    tokens = tokenizer(prompts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    ids: Tensor = tokens.input_ids
    return ids.to(DEVICE)


class Reader(nn.Module):
    """The text encoder, and one linear head for each attribute on its hidden states."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        width = 128
        self.encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=width,
                intermediate_size=4 * width,
                projection_dim=width,
                num_hidden_layers=4,
                num_attention_heads=4,
                max_position_embeddings=TOKENS,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(values)) for name, values in ATTRIBUTES.items()})

    def loss(self, ids: Tensor, scenes: list[Scene]) -> Tensor:
        """Cross-entropy of every attribute, at every position from the end of the prompt on: the padding carries the
        whole prompt to the UNet's cross-attention."""
        hidden = self.encoder(ids)[0]
        ended = ids == self.encoder.config.eos_token_id
        losses = []
        for name, values in ATTRIBUTES.items():
            label = torch.tensor([values.index(getattr(scene, name)) for scene in scenes], device=ids.device)
            losses.append(F.cross_entropy(self.heads[name](hidden[ended]), label[:, None].expand_as(ids)[ended]))
        return torch.stack(losses).sum()


def train_text_encoder(tokenizer: CLIPTokenizer, build: Path) -> CLIPTextModel:
    reader = Reader(tokenizer).to(DEVICE)

    def loss_of(rng: Random) -> Tensor:
        scenes = [rng.choice(TRAINING_KINDS[i % 2]) for i in range(TEXT_BATCH)]
        prompts = [caption(scene, rng) for scene in scenes]
        for i in range(0, TEXT_BATCH, 20):
            scenes[i], prompts[i] = Scene(), nonsense(rng)
        return reader.loss(tokenize(tokenizer, prompts), scenes)

    fit("text_encoder", build, reader, loss_of, steps=TEXT_STEPS, learning_rate=2e-3)
    return reader.encoder.eval().requires_grad_(False)


def train_vae(pictures: np.ndarray, build: Path) -> AutoencoderKL:
    """The autoencoder, its scaling factor set so that latents have unit variance.

    At first the posterior's noise spreads the latents evenly; then it is nearly removed to sharpen edges. Finally the
    decoder alone is trained further, while the latents stay fixed.
    """
    channels = (16, 32, 64, 96)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIZE,
        mid_block_add_attention=False,
    ).to(DEVICE)

    def picture_loss(rng: Random, latents_of: Callable[[DiagonalGaussianDistribution], Tensor]) -> tuple[Tensor, Any]:
        target = as_tensor(pictures[sorted(rng.sample(range(len(pictures)), VAE_BATCH))])
        with torch.autocast(DEVICE.type, torch.bfloat16):
            posterior = vae.encode(target).latent_dist
            picture = vae.decode(latents_of(posterior)).sample.float()
        edges = sum((torch.diff(picture, dim=d) - torch.diff(target, dim=d)).abs().mean() for d in (2, 3))
        return F.l1_loss(picture, target) + F.mse_loss(picture, target) + edges, posterior

    def blurred_loss(rng: Random) -> Tensor:
        loss, posterior = picture_loss(rng, lambda posterior: posterior.sample())
        divergence: Tensor = posterior.kl()
        return loss + 1e-6 * divergence.mean()

    def sharp_loss(rng: Random) -> Tensor:
        loss, posterior = picture_loss(rng, lambda posterior: posterior.mean + 0.05 * torch.randn_like(posterior.mean))
        mean: Tensor = posterior.mean
        return loss + 1e-4 * mean.float().square().mean()

    fit("vae", build, vae, blurred_loss, steps=VAE_STEPS, learning_rate=2e-3)
    fit("vae_sharp", build, vae, sharp_loss, steps=VAE_SHARP_STEPS, learning_rate=1.5e-3)
    fit("vae_polish", build, vae, sharp_loss, steps=VAE_POLISH_STEPS, learning_rate=4e-4)
    vae.encoder.requires_grad_(False)
    fit("decoder", build, vae.decoder, sharp_loss, steps=DECODER_STEPS, learning_rate=6e-4)
    vae.eval().requires_grad_(False)
    vae.register_to_config(scaling_factor=round(1 / encode(vae, pictures[:512]).float().std().item(), 5))
    return vae


def encode(vae: AutoencoderKL, pictures: np.ndarray) -> Tensor:
    """Unscaled latents of ``pictures``: float16, (n, 8, 16, 16)."""
    latents = []
    for i in range(0, len(pictures), 32):
        with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16):
            latents.append(vae.encode(as_tensor(pictures[i : i + 32])).latent_dist.mode())
    return torch.cat([batch.half() for batch in latents])


def training_latents(vae: AutoencoderKL, pictures: np.ndarray, build: Path) -> Tensor:
    """Scaled latents of the pictures: float16, (count, 8, 16, 16)."""
    path = build / "latents.pt"
    if not path.exists():
        torch.save(encode(vae, pictures) * vae.config.scaling_factor, path)
    latents: Tensor = torch.load(path, map_location=DEVICE)
    return latents


def noise_schedule() -> DDIMScheduler:
    """Stable Diffusion v1-4's own, but for the velocity prediction (Salimans and Ho 2022, arXiv 2202.00512), which
    learns colours, settled where noise is high, in fewer steps. PNDM, v1-4's sampler, extrapolates velocities badly: it
    needs 50 steps where DDIM needs 10."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


def train_unet(
    latents: Tensor,
    scenes: list[Scene],
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    build: Path,
) -> UNet2DConditionModel:
    """The denoiser, its weights averaged over the last steps."""
    unet = UNet2DConditionModel(
        sample_size=latents.shape[-1],
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        # no attention on the 16 x 16 level: 2.5 times as fast
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(48, 96, 128),
        layers_per_block=1,
        cross_attention_dim=text_encoder.config.hidden_size,
        attention_head_dim=4,
        norm_num_groups=16,
    ).to(DEVICE)
    schedule = noise_schedule()

    def loss_of(rng: Random) -> Tensor:
        picked = [rng.randrange(len(scenes)) for _ in range(UNET_BATCH)]
        prompts = [
            nonsense(rng)
            if rng.random() < PROMPT_DROP / 3
            else ""
            if rng.random() < PROMPT_DROP
            else caption(scenes[i], rng)
            for i in picked
        ]
        clean = latents[picked].float()
        noise = torch.randn_like(clean) + NOISE_OFFSET * torch.randn(*clean.shape[:2], 1, 1, device=DEVICE)
        timesteps = torch.randint(0, schedule.config.num_train_timesteps, (UNET_BATCH,), device=DEVICE)
        noisy = schedule.add_noise(clean, noise, timesteps)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            hidden = text_encoder(tokenize(tokenizer, prompts))[0]
            predicted = unet(noisy, timesteps, hidden).sample.float()
        error = F.mse_loss(predicted, schedule.get_velocity(clean, noise, timesteps), reduction="none")
        snr = compute_snr(schedule, timesteps)
        weight: Tensor = (snr.clamp(max=SNR_GAMMA) + 1) / (snr + 1)
        return (error.mean(dim=(1, 2, 3)) * weight).mean()

    ema = EMAModel(unet.parameters(), decay=0.999)
    fit("unet", build, unet, loss_of, steps=UNET_STEPS, learning_rate=1.2e-3, ema=ema)
    ema.copy_to(unet.parameters())
    return unet.eval()


def train(build: Path, export: Path) -> None:
    build.mkdir(parents=True, exist_ok=True)
    scenes = training_scenes(PICTURES)
    tokenizer = train_tokenizer(scenes, build / "tokenizer")
    text_encoder = train_text_encoder(tokenizer, build)
    pictures = training_pictures(scenes, build)
    vae = train_vae(pictures, build)
    unet = train_unet(training_latents(vae, pictures, build), scenes, tokenizer, text_encoder, build)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=noise_schedule(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    save(pipeline.to(dtype=torch.float16), export)
    (export / "words.json").write_text(words())


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded model; run again to resume after an interruption.")
    parser.add_argument("--build", type=Path, default=Path(__file__).parent / "build", help="pictures and checkpoints")
    parser.add_argument("--export", type=Path, default=Path("src/model/demo"), help="where the finished model goes")
    arguments = parser.parse_args()
    train(arguments.build, arguments.export)


if __name__ == "__main__":
    main()
