"""A local stand-in for the Hugging Face Hub: repositories in a folder, served to the real huggingface_hub client.

Inside `with serve_hub(folder) as hub:` this process's client uses `hub.url` by default. A subprocess needs `hub.environment`:
HF_ENDPOINT and HF_HUB_DISABLE_XET=1, because a client that finds hf_xet uploads large files with it whatever the server
answers; without it they go by LFS over HTTP, which is what this server speaks. Any token will do, and writing without one is
refused. A commit's whole tree lies in folder/owner/name/<sha>; a repository begins with one that holds .gitattributes.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock
from urllib.parse import parse_qs, unquote, urlsplit

USER = "tester"
LFS = (".safetensors", ".png")
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS).encode()


class Refused(Exception):
    """The status, the message and the X-Error-Code of an error; the client chooses its exception by the code."""


@dataclass
class Hub:
    """What is served, and in `requests` what was asked, in order."""

    root: Path
    url: str
    requests: list[str] = field(default_factory=list)
    private: dict[str, bool] = field(default_factory=dict)
    commits: dict[str, dict[str, str]] = field(default_factory=dict)  # sha to title, `main` last
    objects: dict[str, bytes] = field(default_factory=dict)  # what was uploaded by LFS
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def environment(self) -> dict[str, str]:
        return {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1"}

    def folder(self, repo_id: str, revision: str = "main") -> Path:
        if repo_id not in self.commits:
            raise Refused(404, "Repository not found", "RepoNotFound")
        commits = list(self.commits[repo_id])
        if revision not in ("main", *commits):
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.root / repo_id / (commits[-1] if revision == "main" else revision)

    def record(self, repo_id: str, title: str, tree: dict[str, bytes]) -> str:
        before = self.commits.get(repo_id, {})
        sha = hashlib.sha1(repr([repo_id, *before, title, sorted(tree.items())]).encode()).hexdigest()
        for path, content in tree.items():
            file = self.root / repo_id / sha / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        self.commits[repo_id] = before | {sha: title}
        return sha


def files_in(folder: Path) -> dict[str, bytes]:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def described(path: str, content: bytes) -> dict:
    size, sha256 = len(content), hashlib.sha256(content).hexdigest()
    oid = hashlib.sha1(b"blob %d\0" % size + content).hexdigest()  # what git calls it
    entry = {"type": "file", "path": path, "rfilename": path, "size": size, "oid": oid, "etag": oid}
    if path.endswith(LFS) and content:  # the client never sends an empty file by LFS
        entry |= {"etag": sha256, "lfs": {"oid": sha256, "sha256": sha256, "size": size, "pointerSize": 134}}
    return entry


class Handler(BaseHTTPRequestHandler):
    """HTTP/1.0, a connection for each request: over a kept one the client would be answered after the server has stopped."""

    def answer(self) -> None:
        self.hub: Hub = self.server.hub
        self.hub.requests.append(f"{self.command} {self.path}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            answer = self.route()
        except Refused as refused:
            status, message, code = refused.args
            answer = json.dumps({"error": message}).encode(), {"X-Error-Code": code}, status
        content, headers, status = answer if isinstance(answer, tuple) else (json.dumps(answer).encode(), {}, 200)
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else content)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def log_message(self, format: str, *arguments: object) -> None: ...

    def route(self) -> dict | list | tuple:
        for methods, pattern, needs_token, action in ROUTES:
            match = re.fullmatch(pattern, urlsplit(self.path).path)
            if match and self.command in methods:
                if needs_token and "Authorization" not in self.headers:
                    # The client takes 401 for a missing repository from an https address, from this one by the code.
                    raise Refused(401, "Invalid username or password.", "RepoNotFound" if match.groups() else "")
                return action(self, *map(unquote, match.groups("main")))
        raise Refused(404, f"Nothing answers {self.command} {self.path} here", "")

    def create_repo(self) -> tuple:
        asked = json.loads(self.body)
        repo_id = f"{asked['organization'] or USER}/{asked['name']}"
        answer, status = {"url": f"{self.hub.url}/{repo_id}"}, 200
        with self.hub.lock:
            if repo_id in self.hub.commits:  # the address is answered all the same: with exist_ok the client reads it
                answer["error"], status = "You already created this model repo", 409
            else:
                self.hub.private[repo_id] = asked.get("visibility") == "private"
                self.hub.record(repo_id, "initial commit", {".gitattributes": GITATTRIBUTES})
        return json.dumps(answer).encode(), {}, status

    def model_info(self, repo_id: str, revision: str) -> dict:
        sha, private = self.hub.folder(repo_id, revision).name, self.hub.private[repo_id]
        return {"id": repo_id, "sha": sha, "private": private, "tags": [], "siblings": self.tree(repo_id, revision)}

    def tree(self, repo_id: str, revision: str) -> list[dict]:
        return [described(*file) for file in files_in(self.hub.folder(repo_id, revision)).items()]

    def paths_info(self, repo_id: str, revision: str) -> list[dict]:
        asked = parse_qs(self.body.decode())["paths"]
        return [entry for entry in self.tree(repo_id, revision) if entry["path"] in asked]

    def resolve(self, repo_id: str, revision: str, path: str) -> tuple:
        folder = self.hub.folder(repo_id, revision)
        if not (folder / path).is_file():
            raise Refused(404, "Entry not found", "EntryNotFound")
        content = (folder / path).read_bytes()
        etag = f'"{described(path, content)["etag"]}"'
        linked = {"X-Linked-Etag": etag, "X-Linked-Size": str(len(content))} if path.endswith(LFS) else {}
        return content, {"ETag": etag, "X-Repo-Commit": folder.name, **linked}, 200

    def preupload(self, repo_id: str, revision: str) -> dict:
        etags, files = {entry["path"]: entry["etag"] for entry in self.tree(repo_id, revision)}, []
        for path in [file["path"] for file in json.loads(self.body)["files"]]:
            mode = "lfs" if path.endswith(LFS) else "regular"
            # By the oid the client leaves out of its commit what has not changed.
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": etags.get(path)})
        return {"files": files}

    def batch(self, repo_id: str) -> dict:
        self.hub.folder(repo_id)
        objects = [{"oid": file["oid"], "size": file["size"]} for file in json.loads(self.body)["objects"]]
        for file in [file for file in objects if file["oid"] not in self.hub.objects]:
            links = {"upload": f"lfs/{file['oid']}/{file['size']}", "verify": f"{repo_id}.git/info/lfs/verify"}
            file["actions"] = {name: {"href": f"{self.hub.url}/{link}"} for name, link in links.items()}
        return {"objects": objects}

    def upload(self, oid: str, size: str) -> dict:
        if len(self.body) != int(size) or hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "The content is not of the size and the sha256 that were announced", "")
        self.hub.objects[oid] = self.body
        return {}

    def verify(self, repo_id: str) -> dict:
        asked = json.loads(self.body)
        if len(self.hub.objects.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(400, "The object is not here in that size", "")
        return {}

    def commit(self, repo_id: str, revision: str) -> dict:
        header, *changes = [json.loads(line) for line in self.body.splitlines()]
        with self.hub.lock:
            head = self.hub.folder(repo_id)
            if revision != "main" or not head.name.startswith(header["value"].get("parentCommit", "")):
                raise Refused(412, "A commit has happened since. Please refresh and try again.", "")
            tree = files_in(head)
            for key, value in [(change["key"], change["value"]) for change in changes]:
                if key == "lfsFile" and value["oid"] not in self.hub.objects:
                    raise Refused(400, f"The LFS object of {value['path']} was never uploaded", "")
                if key.startswith("deleted"):
                    gone = value["path"].rstrip("/") + "/"
                    tree = {path: content for path, content in tree.items() if not f"{path}/".startswith(gone)}
                else:
                    lfs = key == "lfsFile"
                    tree[value["path"]] = self.hub.objects[value["oid"]] if lfs else base64.b64decode(value["content"])
            sha = self.hub.record(repo_id, header["value"]["summary"], tree)
        return {"commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}", "commitOid": sha}


ID, REVISION = r"([\w.-]+(?:/[\w.-]+)?)", "([^/]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", True, lambda handler: {"type": "user", "name": USER, "orgs": []}),
    ("POST", "/api/validate-yaml", False, lambda handler: {"errors": [], "warnings": []}),
    ("POST", "/api/repos/create", True, Handler.create_repo),
    ("GET", f"/api/models/{ID}(?:/revision/{REVISION})?", False, Handler.model_info),
    ("GET", f"/api/models/{ID}/tree/{REVISION}", False, Handler.tree),
    ("POST", f"/api/models/{ID}/preupload/{REVISION}", True, Handler.preupload),
    ("POST", f"/api/models/{ID}/commit/{REVISION}", True, Handler.commit),
    ("POST", rf"/{ID}\.git/info/lfs/objects/batch", True, Handler.batch),
    ("POST", rf"/{ID}\.git/info/lfs/verify", True, Handler.verify),
    ("PUT", "/lfs/([0-9a-f]{64})/([0-9]+)", False, Handler.upload),
    ("GET", f"/api/datasets/{ID}(?:/revision/{REVISION})?", False, Handler.model_info),
    ("GET", f"/api/datasets/{ID}/tree/{REVISION}(?:/.*)?", False, Handler.tree),
    ("POST", f"/api/datasets/{ID}/paths-info/{REVISION}", False, Handler.paths_info),
    ("GET HEAD", f"(?:/datasets)?/{ID}/resolve/{REVISION}/(.+)", False, Handler.resolve),
]


@contextmanager
def serve_hub(root: Path) -> Iterator[Hub]:
    """Serve an empty Hub over `root` until the block ends, and make it this process's default one for as long."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.socket.listen(64)  # the client downloads over many connections at once
    hub = server.hub = Hub(root, f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    defaults = {"ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_DISABLE_XET": True}
    client = mock.patch.multiple("huggingface_hub.constants", **defaults)  # it reads its environment at import
    ours = mock.patch("huggingface_hub.hf_api.api.endpoint", hub.url)
    with (
        server,
        client,
        ours,
        mock.patch("transformers.utils.hub._hf_api", None),
    ):  # transformers keeps a client of its own
        try:
            yield hub
        finally:
            server.shutdown()
