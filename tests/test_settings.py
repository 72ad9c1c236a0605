import pytest

from src.settings import Settings, StartError


def refusal(**environment: str) -> str:
    with pytest.raises(StartError) as refused:
        Settings.from_environment(environment)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_nothing_set_gives_the_defaults():
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
            "MAX_RESULT_BYTES": "20000000",
            "BUCKET_ENDPOINT_URL": "https://storage.example.com",
            "BUCKET_ACCESS_KEY_ID": "key",
            "BUCKET_SECRET_ACCESS_KEY": "secret",
            "BUCKET_NAME": "pictures",
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
        "max_result_bytes": 20_000_000,
        "bucket_endpoint_url": "https://storage.example.com",
        "bucket_access_key_id": "key",
        "bucket_secret_access_key": "secret",
        "bucket_name": "pictures",
    }
    for name, secret in secrets.items():
        assert getattr(settings, name).get_secret_value() == secret


def test_a_bucket_is_set_up_as_a_whole_or_not_at_all():
    said = refusal(BUCKET_NAME="pictures", BUCKET_ACCESS_KEY_ID="key", BUCKET_SECRET_ACCESS_KEY="hidden")
    assert said == "BUCKET_ENDPOINT_URL not set: set all of BUCKET_* or none"
    said = refusal(BUCKET_ENDPOINT_URL="https://storage.example.com")
    assert said.startswith("BUCKET_ACCESS_KEY_ID, BUCKET_SECRET_ACCESS_KEY, BUCKET_NAME not set")
    assert refusal(BUCKET_ENDPOINT_URL="storage.example.com").startswith("BUCKET_ENDPOINT_URL=storage.example.com: ")


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("ATTENTION_SLICING", "fast", "'auto', 'max' or 'off'"),
        ("SAFETY_CHECKER", "perhaps", "boolean"),
        ("MAX_CONCURRENCY", "0", "greater than or equal to 1"),
        ("MAX_BATCH_IMAGES", "1000", "less than or equal to 64"),
        ("MAX_RESULT_BYTES", "10MB", "integer"),
        ("MAX_RESULT_BYTES", "-1", "greater than or equal to 1000"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(name: str, value: str, allowed: str):
    said = refusal(**{name: value})
    assert said.startswith(f"{name}={value}: ")
    assert allowed in said


def test_all_bad_values_are_told_together_and_the_token_never():
    said = refusal(HF_TOKEN="hf_secret", ATTENTION_SLICING="x", SAFETY_CHECKER="maybe")
    assert "ATTENTION_SLICING=x" in said
    assert "SAFETY_CHECKER=maybe" in said
    assert "hf_secret" not in said
    assert "hf_secret" not in repr(Settings.from_environment({"HF_TOKEN": "hf_secret"}))
