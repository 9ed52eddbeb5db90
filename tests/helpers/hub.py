"""A Hub on 127.0.0.1 that the real huggingface_hub pushes to and pulls from, for tests.

    python -m tests.helpers.hub --port 8899

serves one until Ctrl-C, to try things out. In a test `hub.faults.add(...)` makes things go wrong
and `hub.log` holds every request. As on the real Hub, large files come from another origin, with a
signed URL and without the token.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml  # huggingface_hub needs it too

LFS_ENDINGS = (".safetensors", ".bin", ".pt", ".zip")
LICENSES = (
    *("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc0-1.0"),
    *("gpl-3.0", "llama3.1", "other", "unknown"),
)
SIGNATURE = "signed"


@dataclass(frozen=True)
class User:
    """Whom a token stands for: may read, and with the role "write" write, under its namespaces."""

    name: str
    role: str = "write"
    namespaces: tuple[str, ...] = ()

    def owns(self, namespace: str) -> bool:
        return bool({namespace, "*"} & {self.name, *self.namespaces})


@dataclass
class Entry:
    """One request; `status` stays 0 where no answer was given."""

    origin: str  # "hub" or "storage"
    method: str
    path: str
    token: bool
    agent: str
    status: int = 0


@dataclass
class Fault:
    """One thing that goes wrong, for requests that match all of the patterns.

    Attributes:
        kind: flip (one bit, of byte `value` or the middle one), longer (by `value` bytes), die
            (after `value` bytes), drop (no answer), hang, status `value`, redirect to `value`,
            commit (name `value` instead), move (main to `value`, once
            answered).
        path: of the file in the repository; of the URL where the request names no file.
        route: info, resolve, storage_get, storage_put, commit, ...
        times: how often it happens; None for always.
    """

    kind: str
    path: str = "*"
    route: str = "*"
    method: str = "*"
    times: int | None = None
    value: Any = None

    def flipped(self, data: bytes) -> bytes:
        place = (len(data) // 2 if self.value is None else int(self.value)) % len(data)
        return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


class Faults(list[Fault]):
    """The faults that are switched on."""

    def add(self, kind: str, path: str = "*", **options: Any) -> None:
        self.append(Fault(kind, path, **options))

    def take(self, kinds: tuple[str, ...], route: str, method: str, path: str) -> Fault | None:
        """The first fault that the request matches; it happens once less from now on."""
        for fault in list(self):
            patterns = ((path, fault.path), (route, fault.route), (method, fault.method))
            if (
                fault.kind in kinds
                and fault.times != 0
                and all(map(fnmatchcase, *zip(*patterns, strict=True)))
            ):
                if fault.times is not None:
                    fault.times -= 1
                return fault
        return None


@dataclass(frozen=True)
class File:
    """One file of a tree."""

    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def blob_id(self) -> str:
        """Git's name of the content, or of the pointer to a large one."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\n"
        data = f"{pointer}size {len(self.data)}\n".encode() if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.blob_id

    def facts(self) -> dict[str, Any]:
        lfs = {
            "oid": self.sha256,
            "sha256": self.sha256,
            "size": len(self.data),
            "pointerSize": 130,
        }
        return {"size": len(self.data), **({"lfs": lfs} if self.lfs else {})}


@dataclass(frozen=True)
class Commit:
    """A whole tree, and how it came about."""

    id: str
    parent: str | None
    title: str
    author: str
    files: Mapping[str, File]


@dataclass
class Repository:
    """Everything known of one repository; refs by their full names."""

    id: str
    private: bool = False
    gated: str | bool = False
    granted: list[str] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    @property
    def namespace(self) -> str:
        return self.id.partition("/")[0]

    def find(self, revision: str) -> Commit | None:
        names = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        sha = next((self.refs[name] for name in names if name in self.refs), revision)
        return self.commits.get(sha)

    def open_pull_request(self, head: Commit) -> int:
        number = 1 + sum(ref.startswith("refs/pr/") for ref in self.refs)
        self.refs[f"refs/pr/{number}"] = head.id
        return number

    def commit(self, ref: str, files: Mapping[str, File], title: str, author: str) -> Commit:
        """Let a ref stand for a new tree; one that stays as it was makes no commit."""
        head = self.find(ref)
        if head is not None and head.files == files:
            return head
        parent = head.id if head else None
        tree = {path: file.blob_id for path, file in sorted(files.items())}
        identity = json.dumps([self.id, parent, title, len(self.commits), tree])
        sha = hashlib.sha1(identity.encode()).hexdigest()
        self.commits[sha] = Commit(sha, parent, title, author, dict(sorted(files.items())))
        self.refs[ref if ref.startswith("refs/") else f"refs/heads/{ref}"] = sha
        return self.commits[sha]


class Refusal(Exception):
    """An answer that the client maps to an error by its headers."""

    def __init__(self, status: int, message: str, code: str = "", commit: str = "") -> None:
        super().__init__(message)
        named = {"X-Error-Message": message, "X-Error-Code": code, "X-Repo-Commit": commit}
        self.status = status
        self.headers = {name: text for name, text in named.items() if text}


class Hub:
    """The two origins, serving from threads until `close`; everything is kept in memory.

    Args:
        users: token -> user.
        port: of the Hub, 0 for any free one.
        all_regular: nothing goes to the storage, as with some self-hosted Hubs.
    """

    def __init__(
        self, users: Mapping[str, User], port: int = 0, *, all_regular: bool = False
    ) -> None:
        self.users = dict(users)
        self.all_regular = all_regular
        self.repositories: dict[str, Repository] = {}
        self.contents: dict[str, bytes] = {}
        self.faults = Faults()
        self.log: list[Entry] = []
        self.crashes: list[str] = []
        self.closing = threading.Event()
        self.lock = threading.RLock()
        self._servers = [_Server(port, "hub", self), _Server(0, "storage", self)]
        self.url, self.storage_url = (server.url for server in self._servers)

    def create(self, repo: str, author: str = "org", private: bool = False) -> Repository:
        """A new repository: like the Hub's, with one commit."""
        repository = self.repositories[repo] = Repository(repo, private)
        lines = "".join(
            f"*{ending} filter=lfs diff=lfs merge=lfs -text\n" for ending in LFS_ENDINGS
        )
        first = {".gitattributes": File(lines.encode(), lfs=False)}
        repository.commit("main", first, "initial commit", author)
        return repository

    def head(self, repo: str) -> str | None:
        """The commit that main is at; None if there is no such repository."""
        return (
            self.repositories[repo].refs["refs/heads/main"] if repo in self.repositories else None
        )

    def swap(self, repo: str, commit: str, path: str, data: bytes) -> None:
        """Exchange a file in a commit that has been made: what no honest server does."""
        old = self.repositories[repo].commits[commit]
        new = File(data, old.files[path].lfs)
        self.contents[new.sha256] = data
        self.repositories[repo].commits[commit] = replace(old, files={**old.files, path: new})

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, *error: object) -> None:
        self.closing.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()


class _Server(ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True
    request_queue_size = 64

    def __init__(self, port: int, origin: str, hub: Hub) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.origin = origin
        self.hub = hub
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news; anything else is a mistake of this server."""
        if not re.search("ConnectionResetError|BrokenPipeError", error := traceback.format_exc()):
            self.hub.crashes.append(error)


API = r"/api/models/(?P<repo>[\w.-]+/[\w.-]+)"
REV = r"(?P<revision>[^/]+)"
DIGEST = r"/(?P<digest>[0-9a-f]{64})"
ROUTES = {
    "hub": (
        ("GET", "/api/whoami-v2", "whoami"),
        ("POST", "/api/repos/create", "create"),
        ("POST", "/api/validate-yaml", "validate_yaml"),
        ("PUT", f"{API}/settings", "settings"),
        ("POST", f"{API}/user-access-request/grant", "grant"),
        ("GET", f"{API}(?:/revision/{REV})?", "info"),
        ("GET", f"{API}/tree/{REV}", "tree"),
        ("GET", f"{API}/refs", "refs"),
        ("GET", f"{API}/commits/{REV}", "commits"),
        ("GET HEAD", rf"/(?P<repo>[\w.-]+/[\w.-]+)/resolve/{REV}/(?P<path>.+)", "resolve"),
        ("POST", f"{API}/preupload/{REV}", "preupload"),
        ("POST", r"/(?P<repo>[\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("POST", f"{API}/lfs-verify", "lfs_verify"),
        ("POST", f"{API}/commit/{REV}", "commit"),
        ("POST", f"{API}/(?P<what>tag|branch)/{REV}", "name_commit"),
        ("POST", f"{API}/discussions", "open_discussion"),
        ("GET", f"{API}/discussions/(?P<number>[0-9]+)", "discussion"),
    ),
    "storage": (
        ("GET HEAD", f"{DIGEST}/(?P<path>.+)", "storage_get"),
        ("PUT", DIGEST, "storage_put"),
    ),
}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60
    server: _Server

    def do_GET(self) -> None:
        self.hub = self.server.hub
        split = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(split.query).items()}
        self.token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        agent = self.headers.get("User-Agent", "")
        self.entry = Entry(self.server.origin, self.command, self.path, bool(self.token), agent)
        self.hub.log.append(self.entry)
        try:
            self.body = self._read_body()
            for methods, pattern, name in ROUTES[self.server.origin]:
                match = re.fullmatch(pattern, split.path)
                if match and self.command in methods.split():
                    found = {key: unquote(text) for key, text in match.groupdict().items() if text}
                    with self.hub.lock if name == "commit" else threading.Lock():
                        return self._answer(name, found.get("path") or split.path, found)
            raise Refusal(404, f"no such route: {self.command} {split.path}")
        except Refusal as refusal:
            self.reply_json({"error": str(refusal)}, refusal.status, refusal.headers)
        except ConnectionError:
            self.close_connection = True
        except Exception:  # noqa: BLE001  # a mistake of this server; tests look for it
            self.hub.crashes.append(traceback.format_exc())
            self.reply_json({"error": "the loopback Hub itself is at fault"}, 500)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815  # the names http.server looks for

    def _answer(self, name: str, subject: str, found: dict[str, str]) -> None:
        self.route = name
        self.subject = subject
        if self.fault("hang"):
            self.hub.closing.wait()
            raise ConnectionError
        if self.fault("drop"):
            raise ConnectionError
        if fault := self.fault("status"):
            raise Refusal(int(fault.value), f"the loopback Hub was told to answer {fault.value}")
        if fault := self.fault("redirect"):
            return self.reply(b"", 302, {"Location": str(fault.value)})
        getattr(self, name)(**found)
        return None

    def fault(self, *kinds: str) -> Fault | None:
        return self.hub.faults.take(kinds, self.route, self.command, self.subject)

    def reply(self, body: bytes, status: int = 200, headers: Mapping[str, str] = {}) -> None:
        self.entry.status = status
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def reply_json(self, value: Any, status: int = 200, headers: Mapping[str, str] = {}) -> None:
        kind = {"Content-Type": "application/json; charset=utf-8"}
        self.reply(json.dumps(value).encode(), status, {**kind, **headers})

    def reply_file(self, data: bytes, headers: Mapping[str, str]) -> None:
        """A file or its end from the byte that was asked for, under the faults of bodies."""
        fault = self.fault("flip", "longer", "die") if self.command == "GET" else None
        if fault and fault.kind == "flip":
            data = fault.flipped(data)
        if fault and fault.kind == "longer":
            data += b"\n" * int(fault.value)
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        rest = data[int(start[1]) :] if start else data
        told = {"Accept-Ranges": "bytes", "Content-Length": str(len(rest)), **headers}
        if start:
            told["Content-Range"] = f"bytes {start[1]}-{len(data) - 1}/{len(data)}"
        if fault and fault.kind == "die":
            rest = rest[: int(fault.value)]
            self.close_connection = True
        self.reply(rest, 206 if start else 200, told)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def log_message(self, format: str, *arguments: Any) -> None:
        """The log is a list; nothing is printed."""

    # --- who asks, and for what ---

    def _user(self) -> User | None:
        if self.token and self.token not in self.hub.users:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.hub.users.get(self.token)

    def _writer(self, namespace: str) -> User:
        user = self._user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        if user.role != "write":
            raise Refusal(403, "Forbidden: you must use a write token to upload to a repository.")
        if not user.owns(namespace):
            raise Refusal(403, f'Forbidden: no rights to write under the namespace "{namespace}"')
        return user

    def _repository(self, repo: str, *, write: bool = False) -> Repository:
        user = self._user()
        found = self.hub.repositories.get(repo)
        if found is None or (found.private and not (user and user.owns(found.namespace))):
            raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        if write:
            self._writer(found.namespace)
        return found

    def _at(self, repo: str, revision: str) -> Commit:
        found = self._repository(repo).find(revision)
        if found is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def whoami(self) -> None:
        user = self._user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        role = {"accessToken": {"role": user.role}}
        self.reply_json({"name": user.name, "type": "user", "orgs": [], "auth": role})

    def create(self) -> None:
        asked = json.loads(self.body)
        user = self._user()
        namespace = asked.get("organization") or (user.name if user else "")
        author = self._writer(namespace).name
        repo = f"{namespace}/{asked['name']}"
        url = f"{self.hub.url}/{repo}"
        if repo in self.hub.repositories:
            return self.reply_json({"error": "You already created this repo", "url": url}, 409)
        self.hub.create(repo, author, asked.get("visibility") == "private")
        return self.reply_json({"url": url, "name": repo})

    def settings(self, repo: str) -> None:
        self._repository(repo, write=True).gated = json.loads(self.body)["gated"]
        self.reply_json({})

    def grant(self, repo: str) -> None:
        self._repository(repo, write=True).granted.append(json.loads(self.body)["user"])
        self.reply_json({})

    def validate_yaml(self) -> None:
        errors = [{"message": error} for error in card_errors(json.loads(self.body)["content"])]
        self.reply_json({"errors": errors, "warnings": []}, 400 if errors else 200)

    # --- what is in a repository ---

    def info(self, repo: str, revision: str = "main") -> None:
        repository = self._repository(repo)
        commit = self._at(repo, revision)
        wrong = self.fault("commit")
        move = self.fault("move")
        siblings = [
            {"rfilename": path, "blobId": file.blob_id, **file.facts()}
            for path, file in commit.files.items()
        ]
        if move:
            repository.refs["refs/heads/main"] = move.value
        self.reply_json(
            {
                "id": repo,
                "sha": wrong.value if wrong else commit.id,
                "private": repository.private,
                "gated": repository.gated,
                "tags": [],
                "siblings": siblings,
            }
        )

    def tree(self, repo: str, revision: str) -> None:
        files = self._at(repo, revision).files
        self.reply_json(
            [
                {"type": "file", "oid": file.blob_id, "path": path, **file.facts()}
                for path, file in files.items()
            ]
        )

    def refs(self, repo: str) -> None:
        kinds = {"branches": "refs/heads/", "tags": "refs/tags/", "pullRequests": "refs/pr/"}
        rows: dict[str, Any] = {"converts": []}
        for kind, start in kinds.items():
            rows[kind] = [
                {"name": ref.removeprefix(start), "ref": ref, "targetCommit": sha}
                for ref, sha in self._repository(repo).refs.items()
                if ref.startswith(start)
            ]
        self.reply_json(rows)

    def commits(self, repo: str, revision: str) -> None:
        known = self._repository(repo).commits
        history = [self._at(repo, revision)]
        while history[-1].parent:
            history.append(known[history[-1].parent])
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        self.reply_json(
            [
                {"id": made.id, "title": made.title, "message": "", "date": date, "authors": []}
                for made in history
            ]
        )

    def resolve(self, repo: str, revision: str, path: str) -> None:
        repository = self._repository(repo)
        user = self._user()
        is_friend = user and (user.owns(repository.namespace) or user.name in repository.granted)
        if repository.gated and not is_friend:
            raise Refusal(403 if user else 401, f"Access to {repo} is restricted.", "GatedRepo")
        commit = self._at(repo, revision)
        file = commit.files.get(path)
        wrong = self.fault("commit")
        named = str(wrong.value) if wrong else commit.id
        if file is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", named)
        if not file.lfs:
            told = {"X-Repo-Commit": named, "ETag": f'"{file.etag}"'}
            return self.reply_file(file.data, told)
        url = f"{self.hub.storage_url}/{file.sha256}/{quote(path)}?signature={SIGNATURE}"
        told = {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.data))}
        return self.reply(b"", 302, {"X-Repo-Commit": named, "Location": url, **told})

    # --- changing it ---

    def preupload(self, repo: str, revision: str) -> None:
        self._repository(repo, write=True)
        there = self._at(repo, revision).files
        rows = []
        for asked in json.loads(self.body)["files"]:
            path = asked["path"]
            binary = path.endswith(LFS_ENDINGS) or b"\0" in base64.b64decode(asked["sample"])
            mode = "lfs" if binary and not self.hub.all_regular else "regular"
            oid = there[path].etag if path in there else None
            rows.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.reply_json({"files": rows})

    def lfs_batch(self, repo: str) -> None:
        self._repository(repo, write=True)
        verify = {"href": f"{self.hub.url}/api/models/{repo}/lfs-verify"}
        objects = []
        for asked in json.loads(self.body)["objects"]:
            upload = {"href": f"{self.hub.storage_url}/{asked['oid']}?signature={SIGNATURE}"}
            actions = {"actions": {"upload": upload, "verify": verify}}
            objects.append({**asked, **({} if asked["oid"] in self.hub.contents else actions)})
        self.reply_json({"transfer": "basic", "objects": objects})

    def lfs_verify(self, repo: str) -> None:
        self._repository(repo, write=True)
        self._large(json.loads(self.body)["oid"])
        self.reply_json({})

    def _large(self, digest: str) -> File:
        if digest not in self.hub.contents:
            raise Refusal(400, f"LFS object {digest} was not uploaded")
        return File(self.hub.contents[digest], lfs=True)

    def commit(self, repo: str, revision: str) -> None:
        repository = self._repository(repo, write=True)
        author = self._writer(repository.namespace).name
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        head = self._at(repo, revision)
        if header.get("parentCommit", head.id) != head.id:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = self._changed(head.files, [line for line in lines if line["key"] != "header"])
        answer = {}
        if "create_pr" in self.query:
            number = repository.open_pull_request(head)
            revision = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/{number}"
        made = repository.commit(revision, files, header["summary"], author)
        url = f"{self.hub.url}/{repo}/commit/{made.id}"
        self.reply_json({"success": True, "commitOid": made.id, "commitUrl": url, **answer})

    def _changed(self, files: Mapping[str, File], lines: list[dict[str, Any]]) -> dict[str, File]:
        """A tree after changes: deletions first, as they ride with what replaces them."""
        kept = dict(files)
        for line in sorted(lines, key=lambda line: not line["key"].startswith("deleted")):
            path = line["value"]["path"]
            if line["key"].startswith("deleted"):
                kept = {
                    name: file
                    for name, file in kept.items()
                    if name != path and not name.startswith(path.rstrip("/") + "/")
                }
            elif line["key"] == "lfsFile":
                kept[path] = self._large(line["value"]["oid"])
            else:
                data = base64.b64decode(line["value"]["content"])
                fault = self.fault("flip")
                kept[path] = File(fault.flipped(data) if fault else data, lfs=False)
        return kept

    def name_commit(self, repo: str, what: str, revision: str) -> None:
        """Make a tag (of a revision) or a branch (by its name)."""
        repository = self._repository(repo, write=True)
        asked = json.loads(self.body)
        name = asked["tag"] if what == "tag" else revision
        start = revision if what == "tag" else asked.get("startingPoint", "main")
        ref = f"refs/{'tags' if what == 'tag' else 'heads'}/{name}"
        if ref in repository.refs:
            raise Refusal(409, f"Reference already exists: {name}")
        repository.refs[ref] = self._at(repo, start).id
        self.reply_json({})

    def open_discussion(self, repo: str) -> None:
        number = self._repository(repo, write=True).open_pull_request(self._at(repo, "main"))
        self.reply_json({"num": number})

    def discussion(self, repo: str, number: str) -> None:
        head = self._at(repo, f"refs/pr/{number}")
        self.reply_json(
            {
                "num": int(number),
                "title": head.title,
                "status": "draft",
                "isPullRequest": True,
                "events": [],
                "createdAt": "2026-01-01T00:00:00.000Z",
                "author": {"name": head.author},
                "repo": {"name": repo, "type": "model"},
                "changes": {"base": "refs/heads/main"},
                "filesWithConflicts": False,
            }
        )

    # --- the storage: contents by sha256, for whoever has a signed URL ---

    def storage_get(self, digest: str, path: str) -> None:
        self._check_signature()
        self.reply_file(self.hub.contents[digest], {"ETag": f'"{digest}"'})

    def storage_put(self, digest: str) -> None:
        self._check_signature()
        if hashlib.sha256(self.body).hexdigest() != digest:
            raise Refusal(400, "the content has another sha256 than its name")
        self.hub.contents[digest] = self.body
        self.reply(b"", 200, {"ETag": f'"{digest}"'})

    def _check_signature(self) -> None:
        if self.token:
            raise Refusal(400, "Only one auth mechanism allowed")
        if self.query.get("signature") != SIGNATURE:
            raise Refusal(403, "the signature does not match")


def card_errors(card: str) -> list[str]:
    """What the Hub does not accept in the front matter of a card: the part probes can break."""
    match = re.match(r"---\r?\n(.*?)\r?\n---\s*(\n|$)", card, re.DOTALL)
    try:
        front = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError as error:
        return [f"invalid YAML: {error}"]
    errors = []
    if front.get("license", "other") not in LICENSES:
        errors.append(f'"license" must be one of [{", ".join(LICENSES)}]')
    for name in ("base_model", "datasets"):
        values = front.get(name) or []
        for value in values if isinstance(values, list) else [values]:
            if not re.fullmatch(r"([\w-][\w.-]*/)?[\w-][\w.-]*", str(value)):
                errors.append(f'"{name}" with value "{value}" is not valid')
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description="A Hub on 127.0.0.1 for trying out push and pull.")
    parser.add_argument("--port", type=int, default=8899)
    parser.add_argument("--token", default="hf_loopback", help="the token that may write")
    asked = parser.parse_args()
    with Hub({asked.token: User("me", namespaces=("*",))}, asked.port) as hub:
        print(
            f"export HF_ENDPOINT={hub.url} HF_TOKEN={asked.token} HF_HUB_DISABLE_XET=1", flush=True
        )
        try:
            hub.closing.wait()
        except KeyboardInterrupt:
            print("stopped", flush=True)


if __name__ == "__main__":
    main()
