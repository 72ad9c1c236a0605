import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.docs import V1_4
from src.api.limits import MAX_SEED, ModelLimits
from src.api.messages import MAX_REPORTED_ERRORS
from src.api.request import ImageRequest
from src.errors import JobError

DEMO = ModelLimits(native_size=128, max_size=256, scheduler="DDIM")


def parse(limits: ModelLimits = V1_4, **job_input: object) -> ImageRequest:
    return ImageRequest.parse({"prompt": "a cat"} | job_input, limits)


def refusal(job_input: object, limits: ModelLimits = V1_4) -> str:
    with pytest.raises(JobError) as refused:
        ImageRequest.parse(job_input, limits)
    said = str(refused.value)
    assert said.startswith("invalid input: ")
    assert not refused.value.refresh_worker
    return said.removeprefix("invalid input: ")


def test_prompt_alone_gets_the_models_defaults():
    request = ImageRequest.parse({"prompt": "a cat"}, V1_4)
    assert (
        request.model_dump().items()
        >= {
            "prompt": "a cat",
            "negative_prompt": "",
            "width": 512,
            "height": 512,
            "num_inference_steps": 50,
            "guidance_scale": 7.5,
            "num_images": 1,
            "output_format": "png",
            "output_quality": 90,
            "scheduler": "PNDM",
        }.items()
    )
    assert 0 <= request.seed < 2**32
    assert parse(DEMO).width == parse(DEMO).height == 128


def test_null_means_the_default():
    names = set(ImageRequest.model_fields) - {"prompt", "seed"}
    assert parse(**dict.fromkeys(names), seed=1) == parse(seed=1)
    assert refusal({"prompt": None}) == "prompt: required"


def test_seed_is_drawn_at_random_and_counts_up_per_image():
    drawn = {parse().seed, parse().seed, parse(seed=-1).seed, parse(seed=-1.0).seed, parse(seed=None).seed}
    assert len(drawn) == 5
    assert min(drawn) >= 0 and max(drawn) < 2**32
    assert parse(seed=7, num_images=3).seeds == [7, 8, 9]


@pytest.mark.parametrize(
    ("field", "inside", "outside"),
    [
        (
            "prompt",
            ["x", "x" * 2000, "  " + "x" * 2000 + "\n"],
            ["", " \n\t ", "\ufeff", "\u200b \U000e0020", "x" * 2001],
        ),
        ("negative_prompt", ["", "x" * 2000], ["x" * 2001]),
        ("width", [64, 72, 1024, 512.0], [0, 56, 63, 65, 1023, 1032, 512.5, -64]),
        ("height", [64, 72, 1024, 512.0], [0, 56, 63, 65, 1023, 1032, 512.5, -64]),
        ("num_inference_steps", [1, 150, 20.0], [0, 151, -1, 1.5]),
        ("guidance_scale", [0, 30, 7.25, 7], [-0.001, 30.001, -1, 31]),
        ("seed", [0, MAX_SEED, 5.0], [-2, MAX_SEED + 1, 0.5]),
        ("num_images", [1, 4], [0, 5]),
        ("output_format", ["png", "jpeg", "webp"], ["", "PNG", "jpg", "gif"]),
        ("output_quality", [1, 100, 90.0], [0, 101, 0.9]),
        (
            "scheduler",
            [
                "PNDM",
                "DDIM",
                "KLMS",
                "K_EULER",
                "K_EULER_ANCESTRAL",
                "DPMSolverMultistep",
                "DPMSolverSinglestep",
                "UniPCMultistep",
            ],
            ["pndm", "", "EULER"],
        ),
    ],
)
def test_values_within_the_bounds_are_accepted_and_others_refused(field: str, inside: list, outside: list):
    for value in inside:
        accepted = getattr(parse(**{field: value}), field)
        assert accepted == (value.strip() if isinstance(value, str) else value)
        assert type(accepted) is not float or field == "guidance_scale"
    for value in outside:
        assert refusal({"prompt": "a cat", field: value}).startswith(f"{field}: must ")


def test_embedded_model_has_a_lower_size_limit():
    assert parse(DEMO, width=256).width == 256
    assert refusal({"prompt": "x", "width": 264}, DEMO) == "width: must be at most 256, got 264"


NOTHING_TAKES = [True, False, [], ["x"], {}, {"a": 1}, math.nan, math.inf, -math.inf]
TEXTS = ("prompt", "negative_prompt", "output_format", "scheduler", "image", "mask")


@pytest.mark.parametrize("field", list(ImageRequest.model_fields))
def test_wrong_type_is_refused(field: str):
    for value in [*NOTHING_TAKES, 512 if field in TEXTS else "512"]:
        assert refusal({"prompt": "a cat", field: value}).startswith(f"{field}: must be ")


@pytest.mark.parametrize("job_input", [None, [], ["x"], "a cat", 5, True])
def test_input_that_is_no_object_is_refused(job_input: object):
    assert refusal(job_input).startswith('must be an object such as {"prompt": "..."}, got ')


def test_error_for_an_unknown_format_lists_the_formats():
    assert refusal({"prompt": "x", "output_format": "gif"}) == "output_format: must be png, jpeg or webp, got gif"


def test_all_errors_are_reported_together():
    assert refusal({"promt": "a cat", "width": 515, "height": 10_000}) == (
        "prompt: required; width: must be a multiple of 8, got 515; height: must be at most 1024, got 10000; "
        "promt: unknown field, did you mean prompt?"
    )


def test_fields_that_do_not_fit_together_are_reported_beside_others_but_not_if_one_is_wrong_itself():
    last = f"seed: must be at most {MAX_SEED - 1} for 2 images, got {MAX_SEED}"
    assert refusal({"width": 515, "seed": MAX_SEED, "num_images": 2}) == (
        f"prompt: required; width: must be a multiple of 8, got 515; {last}"
    )
    assert refusal({"prompt": "x", "seed": MAX_SEED, "num_images": 5}) == "num_images: must be at most 4, got 5"
    assert refusal({"prompt": "x", "seed": MAX_SEED, "num_images": 2, "zzz": 1}) == f"zzz: unknown field; {last}"


MEANT = {
    "prompt": "promt Prompt prompts description text_prompts positive_prompt",
    "negative_prompt": "negativ_prompt negative-prompt negativePrompt negative neg_prompt uc n_prompt",
    "width": "Width image_width w",
    "height": "hieght heigth img_height h",
    "width and height": "size image_size image_dimensions imageSize aspect_ratio resolution",
    "num_inference_steps": "steps num_steps num_infrence_steps sampling_steps ddim_steps n_steps",
    "guidance_scale": "guidance guidence_scale cfg cfg_scale cfgScale scale",
    "seed": "seeds noise_seed random_seed",
    "num_images": "numImages batch_size n n_iter num_images_per_prompt num_outputs num_samples samples numberOfImages",
    "output_format": "output_fromat outputFormat format image_format",
    "output_quality": "quality output_compression jpeg_quality",
    "image": "image_url init_image init_images input_image images image_base64 source_image init_img starting_image",
    "mask": "mask_image mask_url masks inpaint_mask",
    "strength": "denoising_strength prompt_strength denoise image_strength init_strength",
    "scheduler": "schedule sampler sampler_index sampler_name samplerName scheduler_name",
}
"""Other tools' names and misspellings of each field."""


@pytest.mark.parametrize(("meant", "name"), [(meant, name) for meant, names in MEANT.items() for name in names.split()])
def test_nearest_field_name_is_suggested(name: str, meant: str):
    assert refusal({"prompt": "x", name: 1}) == f"{name}: unknown field, did you mean {meant}?"


OF_OTHER_TOOLS = "clip_skip lora hires_fix hr_prompt hr_negative_prompt subseed"


@pytest.mark.parametrize("name", ["zzz", "", "_", "output", "output_url", "num", *OF_OTHER_TOOLS.split()])
def test_unrelated_field_name_gets_no_suggestion(name: str):
    assert refusal({"prompt": "x", name: 1}) == f"{name}: unknown field"


@pytest.mark.parametrize("text", ["\n", "\u2028", "\x1b", "\u200b", "\u202e", "\ud800", "x" * 10_000_000])
def test_error_quotes_one_short_line_of_what_can_be_printed(text: str):
    quoted = f"a{'x' * 39}..." if len(text) > 1 else "a?b"
    assert refusal({"prompt": "x", "scheduler": f"a{text}b"}).endswith(f"LCM, got {quoted}")
    assert refusal({"prompt": "x", f"a{text}b": 1}) == f"{quoted}: unknown field"
    said = refusal({"prompt": "x", "output_format": f"a{text}b"})
    assert said in (
        f"output_format: must be png, jpeg or webp, got {quoted}",
        "output_format: must be valid Unicode, has a lone surrogate",
    )


def test_error_never_quotes_nothing():
    for name in ImageRequest.model_fields:
        for value in ("", "  "):
            if name not in ("prompt", "negative_prompt", "image", "mask"):
                assert ", got an empty string" in refusal({"prompt": "x", name: value})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_number_must_be_finite(value: float):
    for name in set(ImageRequest.model_fields) - set(TEXTS):
        assert refusal({"prompt": "x", name: value}).startswith(f"{name}: must be a finite number")


def test_error_with_many_faults_is_cut():
    fields = list(ImageRequest.model_fields)
    said = refusal({name: [] for name in fields} | {f"zz{i}" * 1000: 1 for i in range(len(fields))})
    assert said.endswith(f"; and {2 * len(fields) - MAX_REPORTED_ERRORS} more")
    assert len(said) < 2000


OF_A1111 = (
    "steps cfg_scale sampler_name batch_size denoising_strength init_images styles subseed subseed_strength tiling eta "
    "seed_resize_from_h seed_resize_from_w n_iter restore_faces do_not_save_samples do_not_save_grid s_min_uncond "
    "s_churn s_tmax s_tmin s_noise override_settings script_args send_images save_images alwayson_scripts hr_scale"
)


def test_names_that_mean_something_here_come_before_those_that_do_not():
    said = refusal({"prompt": "x", "width": 65} | dict.fromkeys(reversed(OF_A1111.split()), 1))
    for meant in ("num_inference_steps", "guidance_scale", "scheduler", "num_images", "strength", "image"):
        assert f"did you mean {meant}?" in said
    assert said.endswith("; and 9 more")


def test_error_for_very_many_unknown_fields_counts_them():
    flood = {f"zz{i}": 1 for i in range(900_000)} | {"prompt": "x"}
    assert refusal(flood).startswith("900,000 unknown fields; the fields are prompt, negative_prompt, width")


@pytest.mark.parametrize(
    "text", ["\ud800", "cat \udfff", "bell\x07", "nul\x00", "esc\x1b[0m", "del\x7f", "c1\x85", "cr\r", "cr\rlf\n"]
)
def test_unprintable_text_is_refused(text: str):
    for field in ("prompt", "negative_prompt"):
        assert refusal({"prompt": "x", field: text}).startswith(f"{field}: must ")


def test_text_that_is_too_long_and_unprintable_is_told_both():
    assert refusal({"prompt": "x\x07" * 1001}) == (
        "prompt: must not hold control characters other than newline and tab, and must have 1 to 2,000 characters, "
        "got 2,002"
    )


def test_windows_line_end_becomes_a_newline():
    request = parse(prompt="two\r\nlines\r\n", negative_prompt="a\r\n\r\nb", seed=1)
    assert request == parse(prompt="two\nlines", negative_prompt="a\n\nb", seed=1)


@pytest.mark.parametrize(
    "text", ["emoji 🎿🏔️", "中文山", "two\nlines\tand a tab", 'quotes " and \\ backslash', "العربية"]
)
def test_printable_text_is_kept(text: str):
    assert parse(prompt=text, negative_prompt=text).prompt == text


def test_seed_of_the_last_image_can_be_sent_again():
    assert parse(seed=MAX_SEED - 3, num_images=4).seeds[-1] == MAX_SEED
    assert refusal({"prompt": "x", "seed": MAX_SEED, "num_images": 2}) == (
        f"seed: must be at most {MAX_SEED - 1} for 2 images, got {MAX_SEED}"
    )


def test_error_never_repeats_the_prompt():
    assert "secret" not in refusal({"prompt": ["secret"], "negative_prompt": {"secret": "secret"}})
    assert "secret" not in refusal({"prompt": "secret\x00"})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters()), inner, max_size=3),
    max_leaves=5,
)


@given(JSON | st.dictionaries(st.sampled_from([*ImageRequest.model_fields, "extra"]), JSON))
def test_any_json_is_either_accepted_whole_or_refused_with_a_message(job_input: object):
    try:
        request = ImageRequest.parse(job_input, V1_4)
    except JobError as error:
        assert str(error).startswith("invalid input: ")
        json.dumps(str(error)).encode()
        str(error).encode()
    else:
        assert ImageRequest.parse(json.loads(request.model_dump_json()), V1_4) == request
