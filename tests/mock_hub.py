"""A stand-in for the Hugging Face Hub on the loopback, speaking what huggingface_hub's own client asks of it.

    with MockHub(tmp_path / "repos") as hub:
        subprocess.run([sys.executable, "push.py"], env=hub.environment(tmp_path / "home", token="hf_x"), check=True)
        assert hub.private["org/name"] and "README.md" in hub.uploads["org/name"]

The client reads its endpoint on import: call it in a fresh process. As at the Hub, a token is wanted to write and to
read a private repo or a Space's variables, and a file that has not changed is not sent again. Model repos and Spaces,
one revision, no LFS, no Xet.
"""

import base64
import hashlib
import json
import os
import re
import shutil
import threading
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


USER = "tester"  # whose token it is
FRONT_MATTER = re.compile(r"\s*---\r?\n.*?\S.*?\n---\s*(\n|$)", re.DOTALL)
Answer = tuple[int, dict[str, str], bytes]


def reply(content: object, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
    """`content` as a JSON answer."""
    return status, {"Content-Type": "application/json", **(headers or {})}, json.dumps(content).encode()


def refuse(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> Answer:
    """An error answer; the client raises by `code`, the Hub's `X-Error-Code` (may be empty)."""
    return reply({"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})})


def blob_id(content: bytes) -> str:
    """Git's name for a file's content, which the client compares with its own."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class MockHub:
    """Serves `root/ORG/NAME/` as the repo ORG/NAME and writes what is pushed there; Spaces are `spaces/ORG/NAME`.

    Attributes:
        requests (`list[tuple[str, str]]`): method and path (no query) of each request, in order.
        tokens (`list[str]`): the Authorization header of each request that carried one.
        uploads (`dict[str, dict[str, bytes]]`): what was committed: repo, then path in it, then content.
        private (`dict[str, bool]`): repos created here, and whether private. Set one to hide a served repo.
        variables (`dict[str, dict[str, str]]`): of Spaces.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root).resolve()
        self.requests: list[tuple[str, str]] = []
        self.tokens: list[str] = []
        self.uploads: dict[str, dict[str, bytes]] = defaultdict(dict)
        self.private: dict[str, bool] = {}
        self.variables: dict[str, dict[str, str]] = defaultdict(dict)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "MockHub":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path, token: str = "") -> dict[str, str]:
        """This process's environment, changed so that a new process knows no other Hub, cache or token."""
        kept = {name: value for name, value in os.environ.items() if not re.match("HF_|HUGGING|TRANSFORMERS_", name)}
        hub = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": token, "HF_HUB_DISABLE_TELEMETRY": "1"}
        return {**kept, **hub, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}

    def files(self, repo: str) -> dict[str, bytes]:
        """Path and content of each file of `repo`, sorted by path."""
        folder = self.root / repo
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}

    def sha(self, repo: str) -> str:
        """The commit that `main` of `repo` stands at: a hash of its paths and contents."""
        lines = [f"{blob_id(content)} {path}\n" for path, content in self.files(repo).items()]
        return hashlib.sha1("".join(lines).encode()).hexdigest()

    def answer(self, method: str, target: str, token: str, body: bytes) -> Answer:
        """Record a request, let it in or refuse it, and answer it by its route."""
        path = urlsplit(target).path
        self.requests.append((method, path))
        self.tokens += [token] if token else []
        route, parts = _find_route("GET" if method == "HEAD" else method, path)
        if route is None:
            return refuse(404, "", f"the mock Hub has no route for {method} {path}")
        if parts.pop("kind", "") == "spaces":
            parts["repo"] = f"spaces/{parts['repo']}"
        repo, revision = parts.get("repo", ""), parts.pop("revision", "")
        is_closed = self.private.get(repo) or route is MockHub._variables
        if not token and (method == "POST" or is_closed):
            return refuse(401, "RepoNotFound" if repo else "", "Invalid username or password.")
        if repo and not (self.root / repo).is_dir():
            return refuse(404, "RepoNotFound", f"Repository {repo} not found")
        if repo and revision not in ("", "main", self.sha(repo)):
            return refuse(404, "RevisionNotFound", f"{repo} has only main, at {self.sha(repo)}")
        return route(self, **parts, target=target, body=body)

    def _info(self, repo: str, **_: object) -> Answer:
        siblings = [{"rfilename": path} for path in self.files(repo)]
        private = self.private.get(repo, False)
        name = repo.removeprefix("spaces/")
        return reply({"id": name, "sha": self.sha(repo), "private": private, "tags": [], "siblings": siblings})

    def _tree(self, repo: str, folder: str, target: str, **_: object) -> Answer:
        """The files under `folder`; the folders between go unlisted, the client's downloads drop them anyway."""
        start = f"{folder}/" if folder else ""
        files = {path: content for path, content in self.files(repo).items() if path.startswith(start)}
        if folder and not files:
            return refuse(404, "EntryNotFound", f"{folder} does not exist in {repo}")
        if "recursive=true" not in target.lower():
            files = {path: content for path, content in files.items() if "/" not in path.removeprefix(start)}
        return reply([{"type": "file", "path": k, "oid": blob_id(v), "size": len(v)} for k, v in files.items()])

    def _resolve(self, repo: str, path: str, **_: object) -> Answer:
        commit, content = {"X-Repo-Commit": self.sha(repo)}, self.files(repo).get(path)
        if content is None:
            return refuse(404, "EntryNotFound", f"{path} does not exist in {repo}", commit)
        return 200, {**commit, "ETag": f'"{blob_id(content)}"'}, content

    def _whoami(self, **_: object) -> Answer:
        auth = {"type": "access_token", "accessToken": {"displayName": "mock", "role": "write"}}
        return reply({"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": auth})

    def _validate_yaml(self, body: bytes, **_: object) -> Answer:
        """Warn of a card without front matter; whether the front matter is good YAML stays unchecked."""
        bare = not FRONT_MATTER.match(json.loads(body)["content"])
        return reply({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}] * bare})

    def _create(self, body: bytes, **_: object) -> Answer:
        wanted = json.loads(body)
        repo = f"{wanted.get('organization') or USER}/{wanted['name']}"
        if wanted.get("type") == "space":
            repo = f"spaces/{repo}"
            if wanted.get("sdk") not in ("gradio", "docker", "static"):
                return refuse(400, "", f"sdk is {wanted.get('sdk')}")
        if (self.root / repo).is_dir():
            return reply({"error": "You already created this repo", "url": f"{self.url}/{repo}"}, 409)
        (self.root / repo).mkdir(parents=True)
        self.private[repo] = wanted.get("visibility") == "private"
        return reply({"url": f"{self.url}/{repo}", "name": repo.removeprefix("spaces/")})

    def _variables(self, repo: str, body: bytes, **_: object) -> Answer:
        """A Space's variables, after the one in the request's body, if there is one, was set."""
        if body:
            wanted = json.loads(body)
            self.variables[repo][wanted["key"]] = wanted["value"]
        return reply({name: {"value": value} for name, value in self.variables[repo].items()})

    def _preupload(self, repo: str, body: bytes, **_: object) -> Answer:
        oids = {path: {"oid": blob_id(content)} for path, content in self.files(repo).items()}
        paths = [file["path"] for file in json.loads(body)["files"]]
        regular = {"uploadMode": "regular", "shouldIgnore": False}
        return reply({"files": [{"path": path, **regular, **oids.get(path, {})} for path in paths]})

    def _commit(self, repo: str, body: bytes, **_: object) -> Answer:
        """Write and delete what the lines after the first, the commit's message, say."""
        for line in map(json.loads, body.splitlines()[1:]):
            key, name = line["key"], line["value"]["path"]
            path = (self.root / repo / name).resolve()
            if key not in ("file", "deletedFile", "deletedFolder") or self.root / repo not in path.parents:
                return refuse(400, "", f"the mock Hub cannot commit {key} {name}")
            if key == "file":
                path.parent.mkdir(parents=True, exist_ok=True)
                self.uploads[repo][name] = base64.b64decode(line["value"]["content"])
                path.write_bytes(self.uploads[repo][name])
            elif not path.exists():
                return refuse(404, "EntryNotFound", "A file with this name doesn't exist")
            else:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        sha = self.sha(repo)
        return reply({"success": True, "commitOid": sha, "commitUrl": f"{self.url}/{repo}/commit/{sha}"})


KIND, REPO, REVISION = "(?P<kind>models|spaces)", r"(?P<repo>\w[\w.-]*/\w[\w.-]*)", "(?P<revision>[^/]+)"
ROUTES: dict[str, Callable[..., Answer]] = {
    f"GET /api/{KIND}/{REPO}(/revision/{REVISION})?": MockHub._info,
    f"GET /api/{KIND}/{REPO}/tree/{REVISION}(/(?P<folder>.+))?": MockHub._tree,
    f"GET (/(?P<kind>spaces))?/{REPO}/resolve/{REVISION}/(?P<path>.+)": MockHub._resolve,
    "GET /api/whoami-v2": MockHub._whoami,
    "POST /api/validate-yaml": MockHub._validate_yaml,
    "POST /api/repos/create": MockHub._create,
    f"POST /api/{KIND}/{REPO}/preupload/{REVISION}": MockHub._preupload,
    f"POST /api/{KIND}/{REPO}/commit/{REVISION}": MockHub._commit,
    f"(GET|POST) /api/(?P<kind>spaces)/{REPO}/variables": MockHub._variables,
}


def _find_route(method: str, path: str) -> tuple[Callable[..., Answer] | None, dict[str, str]]:
    """The method that answers `path`, and the parts of the path that it takes."""
    for pattern, route in ROUTES.items():
        if match := re.fullmatch(pattern, f"{method} {path}"):
            return route, {name: unquote(part or "") for name, part in match.groupdict().items()}
    return None, {}


class _Handler(BaseHTTPRequestHandler):
    """Carries bytes between the socket and a `MockHub`, which does the thinking."""

    def __init__(self, hub: MockHub, *args: object) -> None:
        self.hub = hub
        super().__init__(*args)

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        token = self.headers.get("Authorization", "")
        status, headers, content = self.hub.answer(self.command, self.path, token, body)
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_HEAD = do_POST = do_GET

    def log_message(self, *_: object) -> None:
        """Keep the tests' output clean: `MockHub.requests` has it all."""
