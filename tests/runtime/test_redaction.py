"""What is hidden as a secret, and what only looks a little like one."""

import pytest

from clvr_train.runtime.redaction import HIDDEN, redact


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("key sk-abcdef1234567890 is wrong", f"key {HIDDEN} is wrong"),
        ("sk-proj-abc_DEF-123456", HIDDEN),
        ("token hf_abcdefghijABCDEFGHIJ0123456789", f"token {HIDDEN}"),
        ("ghp_abcdefghij0123456789", HIDDEN),
        ("https://me:pass@host:80/v1 and http://tok@h", f"https://{HIDDEN}@host:80/v1 and http://{HIDDEN}@h"),
        ("https:/me:pass@host/data", f"https:/{HIDDEN}@host/data"),
        ("Authorization: Bearer abc.def.ghi-jkl==", f"Authorization: Bearer {HIDDEN}"),
        ("judge.api_key=hello run=x", f"judge.api_key={HIDDEN} run=x"),
        ("{'password': 'hello', 'n': 1}", f"{{'password': '{HIDDEN}', 'n': 1}}"),
        ("http://h/?api_key=hello&n=1", f"http://h/?api_key={HIDDEN}&n=1"),
        ("AWS_SECRET_ACCESS_KEY: hello", f"AWS_SECRET_ACCESS_KEY: {HIDDEN}"),
        ("HF_TOKEN=hello", f"HF_TOKEN={HIDDEN}"),
        ("api_key: ${oc.env:OPENAI_API_KEY}", "api_key: ${oc.env:OPENAI_API_KEY}"),
    ],
)
def test_secrets_are_hidden(text: str, expected: str) -> None:
    assert redact(text) == expected and redact(expected) == expected


@pytest.mark.parametrize(
    "text",
    [
        "task-specific-learning at risk-adjusted rates",
        "a window of 48 tokens: max_tokens=512, image_tokens: 0",
        "unexpected token: 'stop'",
        "runs/hf_datasets/x and the key: value of a key",
        "http://localhost:8000/v1, mail me@host",
        "secretary: none",
    ],
)
def test_words_stay(text: str) -> None:
    assert redact(text) == text


def test_values_of_the_environment_are_hidden_wherever_they_stand(monkeypatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "plain words here")
    monkeypatch.setenv("SHORT_TOKEN", "1234567")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "falsefalse")
    assert redact("said plain words here 1234567 falsefalse") == f"said {HIDDEN} 1234567 falsefalse"


def test_what_json_holds_keeps_its_form() -> None:
    value = {
        "api_key": "hello", "password": 12345, "empty_token": "", "none_token": None, "run": "x", "n": 1.5, "yes": True,
        "secret": {"inner": "hf_abcdefghijABCDEFGHIJ"}, "urls": ["http://u:p@h"], "of_token": "${oc.env:A}",
    }  # fmt: skip
    assert redact(value) == value | {
        "api_key": HIDDEN, "password": HIDDEN, "secret": {"inner": HIDDEN}, "urls": [f"http://{HIDDEN}@h"]
    }  # fmt: skip
