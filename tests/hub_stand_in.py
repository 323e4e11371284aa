"""A local stand-in of the Hub's HTTP API, as far as uploading and downloading a model needs it.

It refuses what the Hub refuses: unknown and missing tokens, foreign namespaces, repositories and revisions that do not
exist, metadata that does not parse, and uploads whose bytes do not have the announced hash. Private and missing
repositories cannot be told apart from outside. A route that it lacks is answered by 501 and kept in `unknown`.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

LARGE_FILES = ("*.safetensors", "*.bin", "*.png")  # stored apart from git, as the Hub's .gitattributes has it


@dataclass
class Repository:
    """Commits are maps of paths to contents; branches point to them."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: dict[str, list[str]] = field(default_factory=dict)

    def commit(self, branch: str, message: str, files: dict[str, bytes]) -> str:
        listing = {path: hashlib.sha256(content).hexdigest() for path, content in files.items()}
        oid = hashlib.sha1(json.dumps([message, self.branches.get(branch), listing]).encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        self.messages.setdefault(branch, []).append(message)
        return oid

    def files(self, branch: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches[branch]]


class Refusal(Exception):
    """An answer that is an error: status, message and the code by which huggingface_hub knows it."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class HubStandIn(ThreadingHTTPServer):
    """The server; use as a context manager.

    Args:
        tokens: The user whom each valid token belongs to. A user writes to and reads the own namespace.
    """

    daemon_threads = True

    def __init__(self, tokens: dict[str, str]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.tokens = tokens
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, int]] = []  # method, path, status
        self.unknown: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.shutdown()
        self.server_close()


def _is_large(path: str) -> bool:
    return any(fnmatch(path, pattern) for pattern in LARGE_FILES)


def _object_id(path: str, content: bytes) -> str:
    """SHA-256 of a large file, git's SHA-1 of another."""
    if _is_large(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


ID = r"(?P<repo>[\w.-]+/[\w.-]+)"
REVISION = r"(?P<revision>[^/]+)"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubStandIn
    routes = (
        ("POST", r"/api/repos/create", "create_repository"),
        ("POST", r"/api/validate-yaml", "validate_metadata"),
        ("POST", rf"/api/models/{ID}/branch/{REVISION}", "create_branch"),
        ("POST", rf"/api/models/{ID}/preupload/{REVISION}", "choose_upload_modes"),
        ("POST", rf"/{ID}\.git/info/lfs/objects/batch", "large_file_actions"),
        ("PUT", rf"/upload/{ID}/(?P<oid>[0-9a-f]{{64}})/(?P<size>\d+)", "receive_large_file"),
        ("POST", rf"/verify/{ID}", "verify_large_file"),
        ("POST", rf"/api/models/{ID}/commit/{REVISION}", "commit"),
        ("GET", rf"/api/models/{ID}(/revision/{REVISION})?", "describe"),
        ("GET", rf"/api/models/{ID}/tree/{REVISION}(/.*)?", "list_files"),
        ("GET", rf"/{ID}/resolve/{REVISION}/(?P<path>.+)", "resolve"),
        ("GET", r"/content/(?P<oid>[0-9a-f]{64})", "send_large_file"),
    )

    # Requests ---------------------------------------------------------------------------------------------------------
    def dispatch(self):
        self.body = self._read_body()
        path = urlsplit(self.path).path
        try:
            for method, pattern, name in self.routes:
                # HEAD is GET without a body.
                match = re.fullmatch(pattern, path) if method == self.command.replace("HEAD", "GET") else None
                if match:
                    getattr(self, name)(**{key: unquote(value or "") for key, value in match.groupdict().items()})
                    break
            else:
                self.server.unknown.append(f"{self.command} {path}")
                raise Refusal(501, f"The stand-in has no {self.command} {path}")
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            self.answer({"error": refusal.message}, refusal.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = dispatch

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self, content, status: int = 200, headers: dict | None = None):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.server.requests.append((self.command, urlsplit(self.path).path, status))
        self.send_response(status)
        for key, value in {"Content-Length": len(body), **(headers or {})}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass

    # Rights -----------------------------------------------------------------------------------------------------------
    @property
    def user(self) -> str | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        user = self.server.tokens.get(header.removeprefix("Bearer "))
        if user is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return user

    def readable(self, repo: str) -> Repository:
        user, repository = self.user, self.server.repositories.get(repo)
        if repository is None or (repository.private and user != repo.split("/")[0]):
            raise Refusal(401 if user is None else 404, "Repository not found", "RepoNotFound")
        return repository

    def writable(self, repo: str) -> Repository:
        repository = self.readable(repo)
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        if self.user != repo.split("/")[0]:
            raise Refusal(403, "You don't have the rights to write to this repository")
        return repository

    @staticmethod
    def commit_id(repository: Repository, revision: str) -> str:
        oid = repository.branches.get(revision, revision)
        if oid not in repository.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid

    @staticmethod
    def branch(repository: Repository, revision: str) -> str:
        if revision not in repository.branches:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return revision

    # Writing ----------------------------------------------------------------------------------------------------------
    def create_repository(self):
        request = json.loads(self.body)
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        owner = request.get("organization") or self.user
        if owner != self.user:
            raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        repo = f"{owner}/{request['name']}"
        url = {"url": f"{self.server.url}/{repo}", "name": repo}
        if repo in self.server.repositories:
            return self.answer({"error": "You already created this model repo", **url}, 409)
        private = request.get("visibility") == "private" or bool(request.get("private"))
        self.server.repositories[repo] = Repository(private)
        attributes = "\n".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text" for pattern in LARGE_FILES)
        self.server.repositories[repo].commit("main", "initial commit", {".gitattributes": attributes.encode()})
        return self.answer(url)

    def validate_metadata(self):
        content = json.loads(self.body)["content"]
        block = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        try:
            metadata = yaml.safe_load(block[1]) if block else None
        except yaml.YAMLError as error:
            return self.answer({"errors": [{"message": str(error)}], "warnings": []}, 400)
        warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
        return self.answer({"errors": [], "warnings": warnings})

    def create_branch(self, repo, revision):
        repository = self.writable(repo)
        if revision in repository.branches:
            raise Refusal(409, f"Reference already exists: {revision}")
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        repository.branches[revision] = self.commit_id(repository, start)
        self.answer({}, 201)

    def choose_upload_modes(self, repo, revision):
        repository = self.writable(repo)
        present = repository.files(self.branch(repository, revision))
        request = json.loads(self.body)
        ignored = request.get("gitIgnore", "").split()
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if _is_large(file["path"]) else "regular",
                "shouldIgnore": any(fnmatch(file["path"], pattern) for pattern in ignored),
                "oid": _object_id(file["path"], present[file["path"]]) if file["path"] in present else None,
            }
            for file in request["files"]
        ]
        self.answer({"files": files})

    def large_file_actions(self, repo):
        self.writable(repo)
        request = json.loads(self.body)
        if request["operation"] != "upload" or request["hash_algo"] != "sha256" or "basic" not in request["transfers"]:
            raise Refusal(422, "Unsupported operation, hash or transfer")
        objects = []
        for item in request["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.server.large_files:
                upload = f"{self.server.url}/upload/{repo}/{item['oid']}/{item['size']}"
                entry["actions"] = {"upload": {"href": upload}, "verify": {"href": f"{self.server.url}/verify/{repo}"}}
            objects.append(entry)
        self.answer({"transfer": "basic", "objects": objects})

    def receive_large_file(self, repo, oid, size):
        # The address is the permission, as with the Hub's signed ones.
        if len(self.body) != int(size) or hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "The content does not have the announced size and hash")
        self.server.large_files[oid] = self.body
        self.answer(b"")

    def verify_large_file(self, repo):
        self.writable(repo)
        request = json.loads(self.body)
        if len(self.server.large_files.get(request["oid"], b"")) != request["size"]:
            raise Refusal(404, "Not uploaded")
        self.answer({})

    def commit(self, repo, revision):
        repository = self.writable(repo)
        branch = self.branch(repository, revision)
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        if header["key"] != "header" or not header["value"]["summary"]:
            raise Refusal(400, "A commit needs a header with a summary")
        if header["value"].get("parentCommit", repository.branches[branch]) != repository.branches[branch]:
            raise Refusal(412, "A commit has happened since")
        files = dict(repository.files(branch))
        for operation in operations:
            kind, value = operation["key"], operation["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"], validate=True)
            elif kind == "lfsFile":
                if value["oid"] not in self.server.large_files:
                    raise Refusal(400, f"{value['path']} was not uploaded")
                files[value["path"]] = self.server.large_files[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
            else:
                raise Refusal(400, f"Unknown operation {kind}")
        oid = repository.commit(branch, header["value"]["summary"], files)
        self.answer({"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{repo}/commit/{oid}"})

    # Reading ----------------------------------------------------------------------------------------------------------
    def describe(self, repo, revision):
        repository = self.readable(repo)
        oid = self.commit_id(repository, revision or "main")
        siblings = [{"rfilename": path} for path in repository.commits[oid]]
        about = {"_id": repo, "id": repo, "modelId": repo, "private": repository.private, "tags": []}
        self.answer({**about, "sha": oid, "siblings": siblings, "downloads": 0, "likes": 0})

    def list_files(self, repo, revision):
        repository = self.readable(repo)
        listing = []
        for path, content in repository.commits[self.commit_id(repository, revision)].items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": _object_id(path, content)}
            if _is_large(path):
                entry["lfs"] = {"oid": entry["oid"], "size": len(content), "pointerSize": 134}
            listing.append(entry)
        self.answer(listing)

    def resolve(self, repo, revision, path):
        repository = self.readable(repo)
        commit = self.commit_id(repository, revision)
        content = repository.commits[commit].get(path)
        headers = {"X-Repo-Commit": commit}
        if content is None:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        oid = _object_id(path, content)
        if not _is_large(path):
            return self.answer(content, headers={**headers, "ETag": f'"{oid}"'})
        headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": len(content)}
        # Another host: huggingface_hub looks no further for the headers when it is sent away.
        elsewhere = f"http://localhost:{self.server.server_port}/content/{oid}"
        return self.answer(b"", 302, {**headers, "Location": elsewhere})

    def send_large_file(self, oid):
        self.answer(self.server.large_files[oid], headers={"ETag": f'"{oid}"'})
