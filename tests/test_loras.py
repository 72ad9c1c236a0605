"""LoRAs: what is merged, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

import handler
from src.errors import StartError
from src.generation.attention import FusedSlicedAttnProcessor
from src.model import loras, repository
from src.settings import Settings
from tests.support import forks, hub
from tests.support.engines import build, generate, pipe_of
from tests.support.processes import run_handler
from tests.support.single_files import Tensors, expected_change, kohya, kohya_of_2022, layers_of, peft, trained
from tests.support.v1_4 import SMALL, make_repository

Names = Callable[..., Tensors]
UNREAD = "it does not fit this model, or diffusers cannot read it: "


@pytest.fixture(scope="module")
def v1_shaped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose UNet has v1-4's layers, each with few channels."""
    unet = {"sample_size": 8, "block_out_channels": (32,) * 4, "cross_attention_dim": 32}
    return make_repository(tmp_path_factory.mktemp("shaped"), SMALL | {"unet": unet})


@pytest.fixture(scope="module")
def plain(v1_shaped: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(v1_shaped)


def make(file: Path, pipe: StableDiffusionPipeline, names: Names = kohya, wanted: Any = trained) -> Path:
    save_file(names(*layers_of(pipe, wanted)), file)
    return file


@pytest.mark.parametrize(
    ("wanted", "unet", "text_encoder"),
    [(trained, 192, 12), (lambda layer: trained(layer) or isinstance(layer[1], torch.nn.Conv2d), 256, 12)],
    ids=["LoRA", "LoCon"],
)
def test_every_layer_changes_as_the_arithmetic_says(
    v1_shaped: Path, plain: StableDiffusionPipeline, tmp_path: Path, wanted: Any, unet: int, text_encoder: int
):
    layers = layers_of(plain, wanted)
    tensors = kohya(*layers)
    save_file(tensors, tmp_path / "detail.safetensors")
    merged = pipe_of(build(v1_shaped, lora=f"{tmp_path}/detail.safetensors:0.7"))
    for part, count, named in zip(("unet", "text_encoder"), (unet, text_encoder), layers, strict=True):
        assert len(named) == count
        before, after = (getattr(pipe, part).state_dict() for pipe in (plain, merged))
        assert before.keys() == after.keys()
        changed = {f"{name}.weight": expected_change(tensors, name, 0.7) for name, _ in named}
        for name, weights in after.items():
            expected = before[name] + changed.get(name, 0)
            torch.testing.assert_close(weights, expected, rtol=0, atol=1e-5)
            assert torch.equal(weights, before[name]) == (name not in changed)


def test_all_kinds_of_names_give_the_picture_of_diffusers(
    v1_shaped: Path, plain: StableDiffusionPipeline, tmp_path: Path
):
    without = generate(build(v1_shaped)).pictures[0].image
    for names in (kohya, kohya_of_2022, peft):
        file = make(tmp_path / f"{names.__name__}.safetensors", plain, names)
        engine = build(v1_shaped, lora=f"{file}:0.5", attention_slicing="max")
        processors = pipe_of(engine).unet.attn_processors.values()
        assert all(isinstance(processor, FusedSlicedAttnProcessor) for processor in processors)
        theirs = StableDiffusionPipeline.from_pretrained(v1_shaped)
        theirs.load_lora_weights(str(file), unet_config=theirs.unet.config)
        theirs.fuse_lora(lora_scale=0.5)
        expected = theirs("a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(3)).images[0]
        picture = generate(engine).pictures[0].image
        assert picture.tobytes() == expected.tobytes() != without.tobytes()


def test_several_loras_add_up_and_one_may_be_named_twice(
    v1_shaped: Path, plain: StableDiffusionPipeline, tmp_path: Path
):
    one, other = (make(tmp_path / f"{name}.safetensors", plain) for name in ("one", "other"))
    twice, once = (build(v1_shaped, lora=lora) for lora in (f"{one}:0.25, {one} , {other}:-0.5", f"{one}:0.75"))
    assert twice.model_name == f"{v1_shaped.name} + one:0.25 + one + other:-0.5"
    for name, weights in pipe_of(twice).unet.state_dict().items():
        torch.testing.assert_close(weights, pipe_of(once).unet.state_dict()[name], rtol=0, atol=1e-5)


def test_float16_rounds_no_more_than_once_each_way(v1_shaped: Path, plain: StableDiffusionPipeline, tmp_path: Path):
    file = make(tmp_path / "detail.safetensors", plain)
    half, whole = (
        pipe_of(handler.build_engine(Settings(model_id=str(v1_shaped), lora=str(file)), dtype)).unet.state_dict()
        for dtype in (torch.float16, torch.float32)
    )
    assert {weights.dtype for weights in half.values()} == {torch.float16}
    for name, weights in half.items():
        torch.testing.assert_close(weights.float(), whole[name], rtol=2e-3, atol=2e-4)


def test_parts_without_a_place_are_counted(v1_shaped: Path, plain: StableDiffusionPipeline, tmp_path: Path):
    file = make(tmp_path / "detail.safetensors", plain)
    tensors = kohya(*layers_of(plain, trained))
    for end, shape in (("lora_down.weight", (4, 32)), ("lora_up.weight", (32, 4))):
        tensors[f"lora_unet_down_blocks_7_attentions_0_proj_in.{end}"] = torch.zeros(shape)
    save_file(tensors, file)
    lora = repository.find(Settings(model_id=str(v1_shaped), lora=f"{file}:0.5")).loras[0]
    pipe = StableDiffusionPipeline.from_pretrained(v1_shaped)
    assert loras.merge(pipe, lora) == "LoRA detail:0.5: 408 of 410 tensors merged"


def rename(begin: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(begin, new): tensor for name, tensor in tensors.items()}


def of_width(width: int) -> Callable[[Tensors], Tensors]:
    end = "attn2_to_k.lora_down.weight"
    return lambda tensors: {n: torch.zeros(4, width) if n.endswith(end) else t for n, t in tensors.items()}


def only_unknown(tensors: Tensors) -> Tensors:
    return {f"mid_block.attentions.0.proj_in.lora_{each}.weight": torch.zeros(4, 4) for each in "AB"}


def with_down(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    """With matrices changed that do not tell the width of the context."""
    return lambda tensors: {name: change(t) if "to_q.lora_down" in name else t for name, t in tensors.items()}


def with_tensor(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: torch.zeros(1, 1)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (rename("lora_unet_", "lora_unet_x_"), UNREAD),
        (
            lambda tensors: {f"x.lora_{each}.weight": torch.zeros(4, 4) for each in "AB"},
            "no part of it fits this model",
        ),
        (of_width(2048), "a LoRA for Stable Diffusion XL, the model is another model (a context of 32 channels)"),
        (of_width(768), "a LoRA for Stable Diffusion 1.x, the model is another model"),
        (with_tensor("lora_te2_text_model_x.lora_up.weight"), "a LoRA for Stable Diffusion XL, which cannot be merged"),
        (
            with_tensor("lora_unet_x.hada_w1_a"),
            "a LoHa, which cannot be merged into this model: use a plain LoRA",
        ),
        (with_tensor("lora_unet_x.oft_blocks"), "an OFT, which cannot be merged into this model"),
        (with_tensor("lora_unet_x.on_input"), "an IA3, which cannot be merged into this model"),
        (with_tensor("lora_unet_x.a1.weight"), "a GLoRA, which cannot be merged into this model"),
        (with_tensor("lora_unet_x.w_norm"), "a LoRA with norms, which cannot be merged into this model"),
        (
            with_tensor("lora_unet_double_blocks_0_x.lora_up.weight"),
            "a LoRA for Flux, which cannot be merged",
        ),
        (with_tensor("bundle_emb.cat.clip_l"), "it holds tensors that belong to no LoRA, such as an embedding's"),
        (with_tensor("lora_unet_x.lora_mid.weight"), "a LoCon with Tucker decomposition, which cannot be merged"),
        (with_tensor("lora_unet_x.dora_scale"), "a DoRA, which cannot be merged"),
        (with_tensor("unet.x.lora_magnitude_vector"), "a DoRA, which cannot be merged"),
        (with_tensor("transformer.transformer_blocks.0.x.lora_A.weight"), "a LoRA for Stable Diffusion 3 or Flux"),
        (
            lambda _: {"unet.x.attn2.to_k.lora.down.weight": torch.zeros(4, 768)},
            "a LoRA for Stable Diffusion 1.x, the model is another model",
        ),
        (
            with_down(lambda tensor: tensor.new_zeros(4, 999)),
            "it does not fit this model: its tensors have other shapes",
        ),
        (with_down(lambda tensor: tensor.to(torch.int8)), "its tensors are integers"),
        (lambda tensors: {name: tensor.flatten() for name, tensor in tensors.items()}, UNREAD),
        (
            lambda tensors: {name: t for name, t in tensors.items() if "lora_up" not in name},
            "it lacks lora_up tensors",
        ),
        (
            lambda tensors: {
                n: t[:0] if "lora_down" in n else t[:, :0] if "lora_up" in n else t for n, t in tensors.items()
            },
            "its rank is 0",
        ),
        (
            with_tensor("lora_unet_x.diff"),
            f"{UNREAD}ValueError: The following keys have not been correctly renamed: lora_",
        ),
        (lambda tensors: {"emb_params": torch.zeros(1)}, "no LoRA, but a textual inversion: add it to a directory"),
        (
            lambda tensors: {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)},
            "no LoRA, but a checkpoint: set MODEL_ID to it",
        ),
    ],
)
def test_lora_of_another_kind_or_family_is_refused(
    v1_shaped: Path,
    plain: StableDiffusionPipeline,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    change: Callable[[Tensors], Tensors],
    said: str,
):
    file = tmp_path / "detail.safetensors"
    save_file(change(kohya(layers_of(plain, trained)[0], [])), file)
    with pytest.raises(StartError) as refused:
        build(v1_shaped, lora=f"{file}:0.7")
    assert str(refused.value).startswith(f"LORA={file}: {said}")
    assert "\n" not in str(refused.value)
    logged = capfd.readouterr()
    assert logged.err == "" and len(logged.out.splitlines()) <= 2
    assert not refused.value.may_recover


def test_text_encoder_part_that_diffusers_cannot_read_is_refused(
    v1_shaped: Path, plain: StableDiffusionPipeline, tmp_path: Path
):
    file = make(tmp_path / "detail.safetensors", plain, wanted=lambda layer: layer[0].endswith("q_proj"))
    with pytest.raises(StartError, match=f"{UNREAD}ValueError: Could not automatically"):
        build(v1_shaped, lora=str(file))


@pytest.mark.parametrize(
    ("setting", "read"),
    [
        ("a.safetensors", [("a.safetensors", 1.0)]),
        ("/x/a b.safetensors : 0.7", None),
        ("/x/a b.safetensors: 0.7", [("/x/a b.safetensors", 0.7)]),
        ("/x:0.5/a:1.safetensors", [("/x:0.5/a:1.safetensors", 1.0)]),
        ("a/b/c.safetensors:-1,b.safetensors", [("a/b/c.safetensors", -1.0), ("b.safetensors", 1.0)]),
        *((f"a.safetensors:{scale}", None) for scale in ("x", "0", "nan", "inf", "11", "1:2", "0,7")),
        ("owner/name", None),
        ("a.ckpt", None),
        ("a.safetensors, ,", [("a.safetensors", 1.0)]),
    ],
)
def test_setting_is_read_strictly(setting: str, read: list[tuple[str, float]] | None):
    if read:
        assert Settings(lora=setting).lora == tuple(read)
    else:
        with pytest.raises(StartError, match=r"^LORA=.*: (the scale must be a number|must be a .safetensors file)"):
            Settings.from_environment({"LORA": setting})


def test_missing_file_is_named(v1_4_repository: Path):
    for missing in ("/nowhere/a.safetensors", "./a.safetensors"):
        with pytest.raises(StartError, match=f"^LORA={missing}: no such file or directory$"):
            repository.find_local(Settings(model_id=str(v1_4_repository), lora=missing))
    with pytest.raises(StartError, match=r"^LORA=a\.safetensors: no such file; one on the hub is named owner"):
        repository.find_local(Settings(model_id=str(v1_4_repository), lora="a.safetensors"))


@pytest.mark.process
def test_lora_on_the_hub_is_downloaded_and_named_after_its_repository(
    v1_shaped: Path, plain: StableDiffusionPipeline, tmp_path: Path
):
    make(tmp_path / "pytorch_lora_weights.safetensors", plain)
    code = (
        "from src.model import repository; from src.settings import Settings\n"
        "for step in (repository.find_local, repository.find, repository.find_local):\n"
        "    found = step(Settings.from_environment()); print(found and [found.name, found.weight_files[-1].name])"
    )
    with hub.serve("someone/lcm-lora", tmp_path) as (address, fetched):
        environment = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home")}
        lora = "someone/lcm-lora/pytorch_lora_weights.safetensors:0.5"
        said = forks.python(code, MODEL_ID=str(v1_shaped), LORA=lora, **environment)
    found = f"['{v1_shaped.name} + lcm-lora:0.5', 'pytorch_lora_weights.safetensors']\n"
    assert said == f"None\n{found}{found}"
    file = "pytorch_lora_weights.safetensors"
    assert fetched == [f"{file}:0-100000", f"{file}:0-100000", file]


@pytest.mark.process
def test_lora_is_named_along_when_the_first_picture_is_nan(v1_4_repository: Path, tmp_path: Path):
    small = StableDiffusionPipeline.from_pretrained(v1_4_repository)
    file = make(tmp_path / "detail.safetensors", small)
    save_file({name: tensor * torch.nan for name, tensor in load_file(file).items()}, file)
    ran = run_handler(tmp_path, "--check", MODEL_ID=str(v1_4_repository), LORA=str(file))
    assert "INFO   | LoRA detail: 120 of 120 tensors merged" in ran.stdout
    assert f"the worker cannot start: MODEL_ID={v1_4_repository}, LORA={file}: its first picture is NaN" in ran.stdout
    assert ran.stderr == ""
