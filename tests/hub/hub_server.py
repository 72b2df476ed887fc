"""A server on this machine that speaks the part of the Hub's protocol that uploads and loads models."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from huggingface_hub import ModelCard

# What the real server checks of these, as patterns.
_NAME = r"(?:[\w-]+/)?[\w.-]+"
_LICENSES = ("apache-2.0", "mit", "cc-by-4.0", "cc-by-sa-4.0", "bsd-3-clause", "gpl-3.0", "openrail", "other")
_RELATIONS = ("adapter", "merge", "quantized", "finetune")
CUT = "cut"


def metadata_errors(content: str) -> list[str]:
    """What the Hub refuses of the metadata of a model's card."""
    data = ModelCard(content).data.to_dict()
    found = []

    def check(is_right: bool, what: str) -> None:
        if not is_right:
            found.append(f'"{what}" is not valid')

    for key in ("tags", "datasets", "metrics"):
        values = data.get(key, [])
        check(isinstance(values, list) and all(isinstance(value, str) for value in values), key)
    for name in data.get("datasets", []):
        check(re.fullmatch(_NAME, name) is not None, "datasets")
    check(data.get("license", "mit") in _LICENSES, "license")
    check(data.get("license") != "other" or "license_name" in data, "license_name")
    check(re.fullmatch("[a-z]{2,3}|multilingual|code", data.get("language", "en")) is not None, "language")
    check(re.fullmatch(_NAME, data.get("base_model", "a/b")) is not None, "base_model")
    check(data.get("base_model_relation", "merge") in _RELATIONS, "base_model_relation")
    for entry in data.get("model-index", []):
        check(isinstance(entry.get("name"), str), "model-index.name")
        for result in entry["results"]:
            check(isinstance(result["task"].get("type"), str), "task.type")
            check(re.fullmatch(_NAME, result["dataset"].get("type", "")) is not None, "dataset.type")
            check(isinstance(result["dataset"].get("name"), str), "dataset.name")
            for metric in result["metrics"]:
                check(isinstance(metric.get("type"), str) and metric.get("value") is not None, "metrics")
    return found


@dataclass(frozen=True)
class Blob:
    content: bytes
    is_lfs: bool

    @property
    def oid(self) -> str:
        """SHA-256 of a large file, git's SHA-1 of another."""
        if self.is_lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repository:
    is_private: bool = False
    branches: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})
    commits: dict[str, dict[str, Blob]] = field(default_factory=lambda: {"0" * 40: {}})
    messages: list[str] = field(default_factory=list)

    def files(self, revision: str) -> dict[str, Blob]:
        return self.commits[self.branches.get(revision, revision)]

    def commit(self, branch: str, changes: dict[str, Blob], message: str) -> str:
        files = self.files(branch) | changes
        oid = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        self.messages.append(message)
        return oid


@dataclass
class Fault:
    """Answers requests to a path in a way of its own, so many times."""

    method: str
    path: str
    action: int | str
    times: int = 1
    message: str = "refused"
    only: Callable[[str], bool] = lambda path: True


class Hub(ThreadingHTTPServer):
    """The server: `with hub.running(): ...`; what it holds and was asked is in its attributes."""

    daemon_threads = True
    part_size = 4096

    def __init__(self, user: str = "me", token: str = "hf_secretSECRETsecret") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.user, self.token = user, token
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @contextmanager
    def running(self) -> Iterator["Hub"]:
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            self.server_close()
            thread.join()

    def asked(self, method: str, path: str) -> list[str]:
        """The paths of the requests so far that match."""
        return [there for how, there in self.requests if how == method and re.search(path, there)]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that was cut off on purpose is no error."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Head and body of an answer are sent apart, and would wait for each other.
    disable_nagle_algorithm = True
    server: Hub

    def log_message(self, *words: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    # Plumbing

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        path = parts.path
        self.server.requests.append((self.command, path))
        for fault in self.server.faults:
            if fault.times and fault.method == self.command and re.search(fault.path, path) and fault.only(path):
                fault.times -= 1
                return self._fail_as_told(fault)
        self.query = parse_qs(parts.query)
        body = self._body()
        for method, pattern, handle in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                return handle(self, body, *(unquote(part) for part in match.groups() if part is not None))
        return self._send(404, {"error": f"no route {self.command} {path}"})

    def _fail_as_told(self, fault: Fault) -> None:
        if fault.action == CUT:
            # In the middle of what the client sends.
            self.rfile.read(min(1000, int(self.headers.get("Content-Length", 1000))))
            self.close_connection = True
            self.connection.close()
            return
        self._body()
        self._send(fault.action, {"error": fault.message}, {"X-Error-Message": fault.message})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send(self, status: int, content: Any = b"", headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _error(self, status: int, code: str) -> None:
        self._send(status, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code})

    # Who, and what

    @property
    def _is_known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.server.token}"

    def _may_write(self, name: str) -> bool:
        if not self._is_known:
            self._send(401, {"error": "Invalid username or password."}, {"X-Error-Message": "Invalid credentials"})
            return False
        if name.split("/")[0] != self.server.user:
            message = "You don't have the rights to create a model under this namespace"
            self._send(403, {"error": message}, {"X-Error-Message": message})
            return False
        return True

    def _repository(self, name: str) -> Repository | None:
        found = self.server.repositories.get(name)
        if found is None or (found.is_private and not self._is_known):
            self._error(404 if self._is_known else 401, "RepoNotFound")
            return None
        return found

    # Writing

    def validate(self, body: bytes) -> None:
        errors = metadata_errors(json.loads(body)["content"])
        self._send(400 if errors else 200, {"errors": [{"message": one} for one in errors], "warnings": []})

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization'] or self.server.user}/{asked['name']}"
        if not self._may_write(name):
            return
        url = {"url": f"{self.server.endpoint}/{name}", "name": name}
        if name in self.server.repositories:
            message = "You already created this model repo"
            return self._send(409, url | {"error": message}, {"X-Error-Message": message})
        self.server.repositories[name] = Repository(asked.get("visibility") == "private")
        return self._send(200, url)

    def branch(self, body: bytes, name: str, branch: str) -> None:
        repository = self._repository(name)
        if repository is not None and self._may_write(name):
            is_new = branch not in repository.branches
            repository.branches.setdefault(branch, repository.branches["main"])
            self._send(200 if is_new else 409, {} if is_new else {"error": "Reference already exists"})

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        repository = self._repository(name)
        if repository is None or not self._may_write(name):
            return None
        if revision not in repository.branches:
            return self._error(404, "RevisionNotFound")
        there, files = repository.files(revision), []
        for one in json.loads(body)["files"]:
            mode = "lfs" if one["path"].endswith(".safetensors") else "regular"
            oid = there[one["path"]].oid if one["path"] in there else None
            files.append({"path": one["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return self._send(200, {"files": files})

    def batch(self, body: bytes, name: str) -> None:
        if not self._may_write(name):
            return
        objects = [self._upload_of(one["oid"], one["size"]) for one in json.loads(body)["objects"]]
        self._send(200, {"transfer": "basic", "objects": objects})

    def _upload_of(self, oid: str, size: int) -> dict[str, Any]:
        if oid in self.server.large:
            return {"oid": oid, "size": size}
        href = f"{self.server.endpoint}/storage/{oid}"
        if size <= self.server.part_size:
            action = {"href": href, "header": {}}
        else:
            n_parts = -(-size // self.server.part_size)
            parts = {str(number): f"{href}/{number}" for number in range(1, n_parts + 1)}
            action = {"href": f"{href}/complete", "header": {"chunk_size": str(self.server.part_size), **parts}}
        verify = {"href": f"{self.server.endpoint}/verify", "header": {}}
        return {"oid": oid, "size": size, "actions": {"upload": action, "verify": verify}}

    def store(self, body: bytes, oid: str) -> None:
        self._keep(oid, body)

    def store_part(self, body: bytes, oid: str, number: str) -> None:
        self.server.parts.setdefault(oid, {})[int(number)] = body
        self._send(200, b"", {"ETag": f'"{hashlib.md5(body).hexdigest()}"'})

    def complete(self, body: bytes, oid: str) -> None:
        parts = self.server.parts.pop(oid)
        self._keep(oid, b"".join(parts[one["partNumber"]] for one in json.loads(body)["parts"]))

    def _keep(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            return self._send(400, {"error": "the content is not what was announced"})
        self.server.large[oid] = content
        return self._send(200, b"{}")

    def verify(self, body: bytes) -> None:
        asked = json.loads(body)
        is_there = len(self.server.large.get(asked["oid"], b"")) == asked["size"]
        self._send(200 if is_there else 404, {})

    def commit(self, body: bytes, name: str, branch: str) -> None:
        repository = self._repository(name)
        if repository is None or not self._may_write(name):
            return
        header, *operations = [json.loads(line) for line in body.splitlines()]
        changes = {}
        for one in operations:
            value = one["value"]
            if one["key"] == "lfsFile":
                changes[value["path"]] = Blob(self.server.large[value["oid"]], True)
            else:
                changes[value["path"]] = Blob(base64.b64decode(value["content"]), False)
        oid = repository.commit(branch, changes, header["value"]["summary"])
        self._send(200, {"commitUrl": f"{self.server.endpoint}/{name}/commit/{oid}", "commitOid": oid})

    # Reading

    def info(self, body: bytes, name: str, revision: str = "main") -> None:
        repository = self._repository(name)
        if repository is None:
            return None
        if revision not in repository.branches and revision not in repository.commits:
            return self._error(404, "RevisionNotFound")
        siblings = [{"rfilename": path} for path in repository.files(revision)]
        sha = repository.branches.get(revision, revision)
        return self._send(200, {"id": name, "private": repository.is_private, "sha": sha, "siblings": siblings})

    def tree(self, body: bytes, name: str, revision: str, folder: str = "") -> None:
        repository = self._repository(name)
        if repository is None:
            return None
        files = {path: blob for path, blob in repository.files(revision).items() if path.startswith(folder.strip("/"))}
        if not files:
            return self._error(404, "EntryNotFound")
        entries = [{"type": "file", "path": p, "size": len(b.content), "oid": b.oid} for p, b in files.items()]
        return self._send(200, entries)

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        repository = self._repository(name)
        if repository is None:
            return None
        if revision not in repository.branches and revision not in repository.commits:
            return self._error(404, "RevisionNotFound")
        sha = repository.branches.get(revision, revision)
        blob = repository.files(revision).get(path)
        if blob is None:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        return self._send(200, blob.content, {"ETag": f'"{blob.oid}"', "X-Repo-Commit": sha})


_REPO = r"([^/]+/[^/]+)"
_ROUTES: list[tuple[str, str, Callable]] = [
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", f"/api/models/{_REPO}/branch/(.+)", _Handler.branch),
    ("POST", f"/api/models/{_REPO}/preupload/(.+)", _Handler.preupload),
    ("POST", f"/api/models/{_REPO}/commit/(.+)", _Handler.commit),
    ("POST", f"/{_REPO}\\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", "/storage/([0-9a-f]+)", _Handler.store),
    ("PUT", "/storage/([0-9a-f]+)/([0-9]+)", _Handler.store_part),
    ("POST", "/storage/([0-9a-f]+)/complete", _Handler.complete),
    ("POST", "/verify", _Handler.verify),
    ("GET", f"/api/models/{_REPO}", _Handler.info),
    ("GET", f"/api/models/{_REPO}/revision/(.+)", _Handler.info),
    ("GET", f"/api/models/{_REPO}/tree/([^/]+)(/.*)?", _Handler.tree),
    ("GET HEAD", f"/{_REPO}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
