"""Tokens and keys are found in texts, each by its own rule; what is none is not taken for one."""

import hashlib
import json
from pathlib import Path

import pytest

from refalign.credentials import ANYWHERE, RULES, find_credential
from refalign.privacy import check_nothing_private


ROOT = Path(__file__).parents[2]
ALL = "a1B2c3D4e5" * 12  # made up, as is all here; cut into pieces, so that no scanner takes it for true
UPPER, HEX = "A1B2C3D4E5" * 8, "a1b2c3d4e5" * 8
FOUND = {
    "Hugging Face": ["hf_" + ALL[:34], "api_org_" + "aBcDeFgHiJ" * 3 + "kLmN", "TOKENhf_" + ALL[:34] + "old"],
    "OpenAI, Anthropic or another": ["sk-" + ALL[:48], "sk-proj-" + ALL[:60], "sk-ant-" + "api03-" + ALL[:60]],
    "GitHub": ["ghp_" + ALL[:36], "ghs_" + ALL[:36], "github_pat_" + ALL[:22] + "_" + ALL[:59]],
    "GitLab": ["glpat-" + ALL[:20], "gldt-" + ALL[:20], "glrt-" + ALL[:20]],
    "Amazon": ["AKIA" + UPPER[:16], "ASIA" + UPPER[:16], "ABSK" + ALL[:110]],
    "Google": ["AIza" + ALL[:35], "ya29." + ALL[:40], "GOCSPX-" + ALL[:28], "1//0" + ALL[:50]],
    "Microsoft Azure": ["AccountKey=" + ALL[:86] + "==", "SharedAccessKey=" + ALL[:43] + "="],
    "Slack": ["xoxb-" + "123456789012", "xapp-1-" + ALL[:30], "https://hooks.slack.com/services/" + ALL[:44]],
    "Discord": ["https://discord.com/api/webhooks/123456/" + ALL[:68]],
    "Stripe": ["sk_live_" + ALL[:24], "rk_test_" + ALL[:24], "whsec_" + ALL[:32]],
    "npm": ["npm_" + ALL[:36]],
    "PyPI": ["pypi-" + ALL[:80]],
    "Docker": ["dckr_pat_" + ALL[:27]],
    "Weights & Biases": ["wandb_v1_" + ALL[:60]],
    "Replicate": ["r8_" + ALL[:37]],
    "Groq": ["gsk_" + ALL[:52]],
    "xAI": ["xai-" + ALL[:80]],
    "Perplexity": ["pplx-" + ALL[:48]],
    "RunPod": ["rpa_" + UPPER[:44]],
    "DigitalOcean": ["dop_v1_" + HEX[:64]],
    "Databricks": ["dapi" + HEX[:32]],
    "SendGrid": ["SG." + ALL[:22] + "." + ALL[:43]],
    "Shopify": ["shpat_" + HEX[:32]],
    "Vault": ["hvs." + ALL[:95]],
    "Grafana": ["glsa_" + ALL[:32] + "_" + HEX[:8]],
    "Supabase": ["sbp_" + HEX[:40], "sb_secret_" + ALL[:30]],
    "age": ["AGE-SECRET-" + "KEY-1" + UPPER[:58]],
    "a private key": [
        *(f"-----BEGIN {kind}PRIVATE " + "KEY-----" for kind in ("", "RSA ", "EC ", "OPENSSH ", "ENCRYPTED ")),
        "-----BEGIN PGP PRIVATE " + "KEY BLOCK-----",
        "---- BEGIN SSH2 ENCRYPTED PRIVATE " + "KEY ----",
        "PuTTY-User-" + "Key-File-3: ssh-ed25519",
    ],
    "a JSON web token": ["eyJ" + "hbGciOiJIUzI1" + ".eyJ" + "zdWIiOiIxMjM0" + "." + "SflKxwRJSMeKKF2Q"],
    "a URL's user": ["https://me:" + "pass@example.com"],
    "a variable": ["WANDB_API_KEY=" + HEX[:40], "AWS_SECRET_ACCESS_KEY: '" + ALL[:40] + "'"],
}
CASES = [(service, value) for service, values in FOUND.items() for value in values]
SERVICE_ACCOUNT = {"type": "service_account", "private_key": "-----BEGIN PRIVATE " + "KEY-----\nMIIE\n"}
HARMLESS = {
    "digests": "sha256:" + hashlib.sha256(b"weights").hexdigest(),
    "a commit": "revision: " + hashlib.sha1(b"commit").hexdigest(),
    "options of words": "sk-toggleable__label-arrow task-oriented-dialogue_with_references mask-xoxb",
    "special tokens": 'EOS_TOKEN = "</s>"; MAX_TOKEN=512; PAD_TOKEN: <pad>; HF_TOKEN=$HF_TOKEN; HF_TOKEN=hf_...',
    "inside a word": "BAKIA" + UPPER[:16],
    "a link": "https://huggingface.co/org/model/blob/main/README.md#usage",
    "a certificate": "-----BEGIN CERTIFICATE-----\n-----BEGIN PUBLIC KEY-----",
}


def test_each_service_has_a_value():
    assert FOUND.keys() == RULES.keys() | ANYWHERE.keys()


@pytest.mark.parametrize(("service", "value"), CASES, ids=[f"{service} {value[:9]}" for service, value in CASES])
def test_a_credential_is_found_and_not_repeated(service, value):
    told = find_credential(f"First line.\nThe value is {value}, of course.\n")
    assert told is not None and told.startswith(f"{service}: ") and value not in told


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_none_is_not_taken_for_one(name):
    assert find_credential(HARMLESS[name]) is None


@pytest.mark.parametrize(
    "content", [SERVICE_ACCOUNT, {"env": {"WANDB_API_KEY": HEX[:40]}}, ["hf_" + ALL[:34]]], ids=str
)
def test_one_in_json_is_found(content, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(content), "utf-8")
    with pytest.raises(ValueError, match=r"config\.json holds what looks like a token or key"):
        check_nothing_private(tmp_path)


@pytest.mark.parametrize(
    "folder", ["model_cards", "docs", "training/configs", "pipelines/refalign/sprites/model", "pipelines"]
)
def test_our_own_files_hold_none(folder):
    files = [path for path in (ROOT / folder).rglob("*") if path.suffix in (".md", ".json", ".py", ".yaml", ".txt")]
    assert files
    assert {path.name: told for path in files if (told := find_credential(path.read_text("utf-8")))} == {}
