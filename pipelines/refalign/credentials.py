"""
Tokens and keys in texts, by the fixed beginnings that services give them.

A table of our own: gitleaks' rules come with a program in Go, not with a library. detect-secrets 1.5, which is one,
knows neither Hugging Face, Anthropic and Google nor the newer tokens of GitHub, OpenAI and Slack; its rules by entropy
take digests for keys.
"""

import re
from collections.abc import Iterator


# By service. A rule begins with letters, so that `re` looks for those first: vocabularies are texts of 20 MB
_RULES = {
    "Hugging Face": (r"hf_[A-Za-z0-9]{30,}", r"api_org_[A-Za-z]{30,}"),
    "OpenAI, Anthropic or another": (r"sk-(?=[A-Za-z_-]*\d)[A-Za-z0-9_-]{20,}",),
    "GitHub": (r"gh[pousr]_\w{30,}", r"github_pat_\w{20,}"),
    "GitLab": (r"gl(?:pat|dt|rt|rtr|cbt|ptt|ft|soat|imt|agent|oas|ffct)-[\w.-]{20,}",),
    "Amazon": (r"A(?:KIA|SIA|BIA|CCA)[A-Z0-9]{16}", r"ABSK[A-Za-z0-9+/]{100,}"),
    "Google": (r"AIza[\w-]{35}", r"ya29\.[\w-]{20,}", r"GOCSPX-[\w-]{24,}", r"1//0[\w-]{40,}"),
    "Microsoft Azure": (r"AccountKey=[A-Za-z0-9+/]{80,}", r"SharedAccessKey=[A-Za-z0-9+/]{40,}"),
    "Slack": (
        r"xox[abceoprs]-[\w-]{10,}",
        r"xapp-\d-[\w-]{20,}",
        r"hooks\.slack\.com/(?:services|workflows|triggers)/[\w/+-]{30,}",
    ),
    "Discord": (r"discord(?:app)?\.com/api/webhooks/\d+/[\w-]{40,}",),
    "Stripe": (r"[rs]k_(?:live|test|prod)_\w{20,}", r"whsec_\w{30,}"),
    "npm": (r"npm_[A-Za-z0-9]{36}",),
    "PyPI": (r"pypi-[\w-]{50,}",),
    "Docker": (r"dckr_(?:pat|oat)_[\w-]{20,}",),
    "Weights & Biases": (r"wandb_v\d_\w{40,}",),
    "Replicate": (r"r8_\w{37,}",),
    "Groq": (r"gsk_[A-Za-z0-9]{50,}",),
    "xAI": (r"xai-[A-Za-z0-9]{70,}",),
    "Perplexity": (r"pplx-[A-Za-z0-9]{40,}",),
    "RunPod": (r"rpa_[A-Z0-9]{30,}",),
    "DigitalOcean": (r"do[opr]_v1_[a-f0-9]{60,}",),
    "Databricks": (r"dapi[a-f0-9]{32}",),
    "SendGrid": (r"SG\.[\w-]{20,}\.[\w-]{40,}",),
    "Shopify": (r"shp(?:at|ca|pa|ss)_[a-fA-F0-9]{32}",),
    "Vault": (r"hv[sb]\.[\w-]{80,}",),
    "Grafana": (r"gl(?:sa|c)_[\w+/=-]{30,}",),
    "Supabase": (r"sb[ps]_[a-f0-9]{40}", r"sb_secret_[\w-]{20,}"),
    "age": (r"AGE-SECRET-KEY-1[0-9A-Z]{50,}",),
    "a private key": (
        r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----",  # OpenSSL, OpenSSH, PGP; in service accounts' JSON too
        r"---- BEGIN SSH2 (?:ENCRYPTED )?PRIVATE KEY ----",
        r"PuTTY-User-Key-File-\d",
    ),
    "a JSON web token": (r"eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}",),
}
# The user of a URL with a password; a variable of a service, with a value that has a digit
_ANYWHERE = {
    "a URL's user": r"://(?P<value>[^\s/:@]+:[^\s/@]+)@",
    "a variable": (
        r"[A-Z0-9]_(?:API_KEY|ACCESS_KEY|SECRET_KEY|SECRET|TOKEN|PASSWORD)[\"']?\s*[=:]\s*[\"']?"
        r"(?P<value>(?=[A-Za-z+/._-]*\d)[\w+/.-]{20,})"
    ),
}
RULES = {service: [re.compile(rule) for rule in rules] for service, rules in _RULES.items()}
ANYWHERE = {service: re.compile(rule) for service, rule in _ANYWHERE.items()}
SEEN = 7  # how many of its characters may be repeated


def find_credential(text: str) -> str | None:
    """The first token or key of a text, as one may be told of it: the service, and how it begins; `None` if there is
    none."""
    service, found = next(_find(text), (None, ""))
    return f"{service}: {found[:SEEN]}..." if service else None


def _find(text: str) -> Iterator[tuple[str, str]]:
    for service, rules in RULES.items():
        for rule in rules:
            for match in rule.finditer(text):
                is_inside_a_word = match.start() > 0 and text[match.start() - 1].isalnum()
                if not is_inside_a_word or service == "Hugging Face":
                    yield service, match[0]
    for service, rule in ANYWHERE.items():
        for match in rule.finditer(text):
            yield service, match["value"]
