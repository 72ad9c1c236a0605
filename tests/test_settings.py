import re
from pathlib import Path

import huggingface_hub
import pytest
import runpod
from botocore.exceptions import BotoCoreError
from pydantic import SecretStr

from src.errors import StartError, shortened
from src.settings import Settings, typo_hints
from tests.support.internals import sign_a_link


def refusal(**environment: str) -> str:
    with pytest.raises(StartError) as refused:
        Settings.from_environment(environment)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def settings_of(environment: dict[str, str]) -> dict[str, object]:
    return {name.lower(): SecretStr(value) if "ACCESS_KEY" in name else value for name, value in environment.items()}


def test_empty_environment_gives_the_defaults():
    assert Settings.from_environment({}) == Settings()
    assert Settings.from_environment({"MODEL_ID": "", "HF_TOKEN": " "}) == Settings()


def test_every_variable_is_read():
    values: dict[str, object] = {
        "model_id": "demo",
        "model_revision": "main",
        "hf_token": SecretStr("hf_secret"),
        "base_model": "/model",
        "lora": (("a.safetensors", 0.7),),
        "attention_slicing": "off",
        "acceleration": "off",
        "safety_checker": False,
        "max_concurrency": 3,
        "max_batch_images": 8,
        "stall_timeout": 60,
        "max_result_bytes": 20_000_000,
        "bucket_endpoint_url": "https://storage.example.com",
        "bucket_access_key_id": SecretStr("key"),
        "bucket_secret_access_key": SecretStr("secret"),
        "bucket_name": "pictures",
        "bucket_region": "auto",
    }
    texts = {name: each.get_secret_value() if isinstance(each, SecretStr) else each for name, each in values.items()}
    texts["lora"] = "a.safetensors:0.7"
    environment = {name.upper(): f" {text} " for name, text in texts.items()}
    assert Settings.from_environment(environment).model_dump() == values


def test_bucket_is_set_up_completely_or_not_at_all():
    said = refusal(BUCKET_NAME="pictures", BUCKET_ACCESS_KEY_ID="key", BUCKET_SECRET_ACCESS_KEY="hidden")
    assert said == "BUCKET_ENDPOINT_URL not set: set all of BUCKET_* or none"
    said = refusal(BUCKET_ENDPOINT_URL="https://storage.example.com")
    assert said.startswith("BUCKET_ACCESS_KEY_ID, BUCKET_SECRET_ACCESS_KEY, BUCKET_NAME not set")
    assert refusal(BUCKET_REGION="auto").endswith("BUCKET_NAME not set: set all of BUCKET_* or none")


BUCKET = {
    "BUCKET_ENDPOINT_URL": "https://s3.amazonaws.com",
    "BUCKET_ACCESS_KEY_ID": "key",
    "BUCKET_SECRET_ACCESS_KEY": "secret",
    "BUCKET_NAME": "pictures",
}
REFUSED_BY_BOTOCORE = {
    "BUCKET_ENDPOINT_URL": "a.b|//a.b|ftp://a.b|s3://pics|https:/a.b|https://|https:///x|http://my_minio:9000|http://[::1|"
    "http://[zz]|https://<account>.r2.cloudflarestorage.com|https://a..b|https://-a.b|https://a.b:port|https://a.b:70000|"
    f"https://a.b:-1|https://a.b/?x=1|https://*.b|https://a%20.b|https://é|https://{'a' * 64}.b|https://{'a.' * 128}b",
    "BUCKET_NAME": f'my bucket|a/b|"a"|s3://a|{{{{ RUNPOD_SECRET_x }}}}|é|a\u200b|arn:aws:s3:::a|{"a" * 256}',
    "BUCKET_REGION": f'"us-east-1"|[us-east-1]|us_east_1|us east|us.east|123|-a|{"a" * 64}',
}
REFUSED_BY_ANY_STORAGE = {
    "BUCKET_ENDPOINT_URL": "https://a.b/<bucket>|https://a.b/c d|https://a.b/#x",
    "BUCKET_NAME": ".|..|-a",
    "BUCKET_ACCESS_KEY_ID": 'a b|"key"|ключ',
}
ACCEPTED = {
    "BUCKET_ENDPOINT_URL": "HTTPS://a.b|http://[::1]:9000|http://minio:9000/|https://a.b.|https://x.supabase.co/storage/v1/s3",
    "BUCKET_NAME": "a_b|A.b-c|arn:aws:s3:us-east-1:123456789012:accesspoint/mine",
    "BUCKET_REGION": "auto|US-EAST-1|us-west-004",
}


def each(values: dict[str, str]) -> pytest.MarkDecorator:
    pairs = [(name, value) for name, joined in values.items() for value in joined.split("|")]
    return pytest.mark.parametrize(("name", "value"), pairs)


@each(REFUSED_BY_BOTOCORE)
def test_what_botocore_would_refuse_without_a_network_is_a_bad_setting(name: str, value: str):
    with pytest.raises((ValueError, BotoCoreError)):
        sign_a_link(Settings.model_construct(**settings_of(BUCKET | {name: value})))
    assert refusal(**BUCKET | {name: value}).startswith(f"{name}={shortened(value)}: must be ")


@each(REFUSED_BY_ANY_STORAGE)
def test_what_no_storage_could_accept_is_a_bad_setting(name: str, value: str):
    assert refusal(**BUCKET | {name: value}).startswith(name)


@each(ACCEPTED)
def test_what_botocore_accepts_is_accepted(name: str, value: str):
    assert sign_a_link(Settings.from_environment(BUCKET | {name: value})).startswith("http")


def test_no_part_of_a_secret_is_told():
    assert refusal(**BUCKET | {"BUCKET_ENDPOINT_URL": "https://key:hidden@a.b"}) == (
        "BUCKET_ENDPOINT_URL: must hold no user and no password"
    )
    for name in ("BUCKET_SECRET_ACCESS_KEY", "BUCKET_ACCESS_KEY_ID", "HF_TOKEN", "MODEL_ID"):
        assert refusal(**BUCKET | {name: "hidden\udcff"}) == f"{name}: must be text in UTF-8"


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
    for value in ("?", "-1", "9" * 5000, "a b", "\udcff"):
        try:
            Settings.from_environment(BUCKET | {name: value})
        except StartError as error:
            assert re.fullmatch(r"\w+(=.*)?: must .*", str(error))


def test_words_of_a_setting_ignore_case():
    settings = Settings.from_environment({"ATTENTION_SLICING": "MAX", "ACCELERATION": "Graphs"})
    assert settings == Settings(attention_slicing="max", acceleration="graphs")


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


def test_faults_of_a_bucket_of_each_lora_and_of_other_variables_are_told_along():
    with pytest.raises(StartError) as refused:
        Settings.from_environment(
            {"BUCKET_NAME": "?", "MAX_CONCURRENCY": "0", "LORA": "a.ckpt, b.safetensors, c.safetensors:11"},
            ["RUNPOD_X"],
        )
    assert [fault.split(":")[0] for fault in str(refused.value).split("; ")] == [
        "RUNPOD_X",
        "BUCKET_ENDPOINT_URL, BUCKET_ACCESS_KEY_ID, BUCKET_SECRET_ACCESS_KEY not set",
        "LORA=a.ckpt",
        "LORA=c.safetensors",
        "MAX_CONCURRENCY=0",
        "BUCKET_NAME=?",
    ]


@pytest.mark.parametrize("value", ["hf_a hf_b", "hf_\x1b[1m", "hf_a\nhf_b", '"hf_a"', "'hf_a'", "hf_\u200ba"])
def test_token_that_no_http_header_can_hold_is_refused_without_its_value(value: str):
    assert refusal(HF_TOKEN=value) == "HF_TOKEN: must be just a token, without spaces, quotes or control characters"


@pytest.mark.parametrize("name", ["HF_TOKEN", "BUCKET_ACCESS_KEY_ID", "BUCKET_SECRET_ACCESS_KEY"])
def test_secret_that_runpod_has_not_filled_in_is_refused(name: str):
    said = refusal(**BUCKET | {name: "{{ RUNPOD_SECRET_token }}"})
    assert said == f"{name}: must be a secret of your account: RunPod found none with that name"
