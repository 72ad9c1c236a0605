import re
from pathlib import Path

import huggingface_hub
import pytest
import runpod

from src.errors import StartError
from src.settings import Settings, typo_hints


def refusal(**environment: str) -> str:
    with pytest.raises(StartError) as refused:
        Settings.from_environment(environment)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_empty_environment_gives_the_defaults():
    assert Settings.from_environment({}) == Settings()
    assert Settings.from_environment({"MODEL_ID": "", "HF_TOKEN": " "}) == Settings()


def test_every_variable_is_read():
    settings = Settings.from_environment(
        {
            "MODEL_ID": " demo ",
            "MODEL_REVISION": "main",
            "HF_TOKEN": "hf_secret",
            "ATTENTION_SLICING": "off",
            "ACCELERATION": "graphs",
            "SAFETY_CHECKER": "false",
            "MAX_CONCURRENCY": "3",
            "MAX_BATCH_IMAGES": "8",
            "STALL_TIMEOUT": "60",
            "MAX_RESULT_BYTES": "20000000",
            "BUCKET_ENDPOINT_URL": "https://storage.example.com",
            "BUCKET_ACCESS_KEY_ID": "key",
            "BUCKET_SECRET_ACCESS_KEY": "secret",
            "BUCKET_NAME": "pictures",
            "BUCKET_REGION": "auto",
        }
    )
    secrets = {
        "hf_token": "hf_secret",
        "bucket_access_key_id": "key",
        "bucket_secret_access_key": "secret",
    }
    assert settings.model_dump() | secrets == {
        "model_id": "demo",
        "model_revision": "main",
        "hf_token": "hf_secret",
        "attention_slicing": "off",
        "acceleration": "graphs",
        "safety_checker": False,
        "max_concurrency": 3,
        "max_batch_images": 8,
        "stall_timeout": 60,
        "max_result_bytes": 20_000_000,
        "bucket_endpoint_url": "https://storage.example.com",
        "bucket_access_key_id": "key",
        "bucket_secret_access_key": "secret",
        "bucket_name": "pictures",
        "bucket_region": "auto",
    }
    for name, secret in secrets.items():
        assert getattr(settings, name).get_secret_value() == secret


def test_bucket_is_set_up_completely_or_not_at_all():
    said = refusal(BUCKET_NAME="pictures", BUCKET_ACCESS_KEY_ID="key", BUCKET_SECRET_ACCESS_KEY="hidden")
    assert said == "BUCKET_ENDPOINT_URL not set: set all of BUCKET_* or none"
    said = refusal(BUCKET_ENDPOINT_URL="https://storage.example.com")
    assert said.startswith("BUCKET_ACCESS_KEY_ID, BUCKET_SECRET_ACCESS_KEY, BUCKET_NAME not set")
    assert refusal(BUCKET_REGION="auto").endswith("BUCKET_NAME not set: set all of BUCKET_* or none")
    assert refusal(BUCKET_ENDPOINT_URL="storage.example.com").startswith("BUCKET_ENDPOINT_URL=storage.example.com: ")


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("ATTENTION_SLICING", "fast", "auto, max or off"),
        ("SAFETY_CHECKER", "perhaps", "true or false"),
        ("MAX_CONCURRENCY", "0", "an integer from 1 to 100"),
        ("MAX_CONCURRENCY", "2.5", "an integer from 1 to 100"),
        ("MAX_BATCH_IMAGES", "1000", "an integer from 1 to 64"),
        ("MAX_BATCH_IMAGES", "1_0", "an integer from 1 to 64"),
        ("MAX_BATCH_IMAGES", "٣", "an integer from 1 to 64"),
        ("MAX_RESULT_BYTES", "10MB", "an integer from 1000 to 20000000"),
        ("MAX_RESULT_BYTES", "-1", "an integer from 1000 to 20000000"),
    ],
)
def test_error_names_the_bad_value_and_what_is_allowed(name: str, value: str, allowed: str):
    assert refusal(**{name: value}) == f"{name}={value}: must be {allowed}"


def test_error_shortens_a_long_value():
    said = refusal(MAX_BATCH_IMAGES="9" * 5000)
    assert said == f"MAX_BATCH_IMAGES={'9' * 40}...: must be an integer from 1 to 64"


@pytest.mark.parametrize("name", [name.upper() for name in Settings.model_fields])
def test_errors_are_never_in_the_validators_own_words(name: str):
    for value in ("?", "-1", "9" * 5000, "a b"):
        try:
            Settings.from_environment({name: value})
        except StartError as error:
            assert re.fullmatch(r"\w+(=.*)?: must .*|.* not set: set all of BUCKET_\* or none", str(error))


def test_name_of_the_embedded_model_ignores_case():
    assert Settings.from_environment({"MODEL_ID": "Demo"}) == Settings(model_id="demo")
    assert Settings.from_environment({"MODEL_ID": "Demo/Model"}).model_id == "Demo/Model"


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("MAX_CONCURENCY", "MAX_CONCURRENCY"),
        ("max_concurrency", "MAX_CONCURRENCY"),
        ("MAX_BATCH_IMAGE", "MAX_BATCH_IMAGES"),
        ("SAFTEY_CHECKER", "SAFETY_CHECKER"),
        ("BUCKET_ENDPOINT", "BUCKET_ENDPOINT_URL"),
        ("BUCKET_ACCESS_KEY", "BUCKET_ACCESS_KEY_ID"),
        ("MODELID", "MODEL_ID"),
    ],
)
def test_misspelt_variable_is_reported(variable: str, meant: str):
    hint = f"{variable} is not a setting: did you mean {meant}?"
    assert typo_hints({variable: "1", "PATH": "/bin"}) == [hint]
    assert refusal(**{variable: "1", "ATTENTION_SLICING": "x"}).endswith(f"; {hint}")


def test_variables_of_libraries_are_not_taken_for_misspelt_settings():
    """Checks every variable whose name stands in the code of RunPod's SDK or of huggingface_hub."""
    asked = set()
    for library in (runpod, huggingface_hub):
        for path in Path(library.__file__).parent.rglob("*.py"):
            asked |= set(re.findall(r"(?:environ(?:\.get)?|getenv)[\[(]\s*\"(\w+)\"", path.read_text(encoding="utf-8")))
    assert {"RUNPOD_POD_ID", "HF_HOME", "HF_TOKEN", "BUCKET_ENDPOINT_URL"} <= asked
    assert typo_hints(dict.fromkeys(asked, "1")) == []


def test_bad_values_are_reported_together_and_the_token_never():
    said = refusal(HF_TOKEN="hf_secret", ATTENTION_SLICING="x", SAFETY_CHECKER="maybe")
    assert "ATTENTION_SLICING=x" in said
    assert "SAFETY_CHECKER=maybe" in said
    assert "hf_secret" not in said
    assert "hf_secret" not in repr(Settings.from_environment({"HF_TOKEN": "hf_secret"}))


@pytest.mark.parametrize("value", ["hf_a hf_b", "hf_\x1b[1m", "hf_a\nhf_b", '"hf_a"', "'hf_a'", "hf_\u200ba"])
def test_token_that_no_http_header_can_hold_is_refused_without_its_value(value: str):
    assert refusal(HF_TOKEN=value) == "HF_TOKEN: must be a token alone, without spaces, quotes and control characters"


@pytest.mark.parametrize("name", ["HF_TOKEN", "BUCKET_ACCESS_KEY_ID", "BUCKET_SECRET_ACCESS_KEY"])
def test_secret_that_runpod_has_not_filled_in_is_refused(name: str):
    said = refusal(**{name: "{{ RUNPOD_SECRET_token }}"})
    assert said == f"{name}: must be a secret of your account: RunPod has found none of that name"
