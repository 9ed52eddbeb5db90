"""What the Hub of the tests (`tests.helpers.hub`) answers to one request of huggingface_hub."""

from __future__ import annotations

import base64
import hashlib
import importlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, unquote

from huggingface_hub import get_session

from .hub_facts import LARGE, USERS, Entry, Refusal, User, card_errors, digest, flipped

if TYPE_CHECKING:
    from .hub import Fault, Hub, Repository

# httpx or httpx2, by the version
http: Any = importlib.import_module(type(get_session()).__module__.partition(".")[0])
HUB, STORAGE = "https://huggingface.co", "https://storage.test"


ID = r"(?P<repo>[\w.-]+/[\w.-]+)"
API = f"/api/models/{ID}"
REV = r"(?P<revision>[^/]+)"
DIGEST = r"/(?P<digest>[0-9a-f]{64})"
ROUTES = {
    "hub": (
        ("POST", "/api/repos/create", "create"),
        ("POST", "/api/validate-yaml", "validate_yaml"),
        ("GET", f"{API}(?:/revision/{REV})?", "info"),
        ("GET", f"{API}/tree/{REV}", "tree"),
        ("GET HEAD", rf"/{ID}/resolve/{REV}/(?P<path>.+)", "resolve"),
        ("POST", f"{API}/preupload/{REV}", "preupload"),
        ("POST", rf"/{ID}\.git/info/lfs/objects/batch", "lfs_batch"),
        ("POST", f"{API}/lfs-verify", "lfs_verify"),
        ("POST", f"{API}/commit/{REV}", "commit"),
        ("POST", f"{API}/branch/{REV}", "branch"),
    ),
    "storage": (
        ("GET HEAD", f"/{ID}/{REV}/(?P<path>.+)", "storage_get"),
        ("PUT", DIGEST, "storage_put"),
    ),
}


class Exchange:
    """One request and its answer."""

    def __init__(self, hub: Hub, request: Any) -> None:
        self.hub = hub
        self.method = request.method
        self.body = request.read()
        self.range = request.headers.get("Range", "")
        path, _, query = request.url.raw_path.decode().partition("?")
        self.query = {name: values[-1] for name, values in parse_qs(query).items()}
        origin = "storage" if request.url.host in STORAGE else "hub"
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        agent = request.headers.get("User-Agent", "")
        self.entry = Entry(origin, self.method, path, token, agent)
        hub.log.append(self.entry)

    def answer(self) -> Any:
        if self.hub.error:
            raise self.hub.error
        try:
            for methods, pattern, name in ROUTES[self.entry.origin]:
                match = re.fullmatch(pattern, self.entry.path)
                if match and self.method in methods.split():
                    found = {key: unquote(text) for key, text in match.groupdict().items() if text}
                    self.entry.route = name
                    self.entry.found = found
                    return self._on(name, found)
            raise Refusal(404, f"no such route: {self.method} {self.entry.path}")
        except Refusal as refusal:
            return self.reply_json({"error": str(refusal)}, refusal.status, refusal.headers)

    def _on(self, name: str, found: dict[str, str]) -> Any:
        if self.fault("hang"):
            raise http.ReadTimeout("the Hub is silent")
        if self.fault("drop"):
            raise http.RemoteProtocolError("the Hub hung up")
        if fault := self.fault("status"):
            raise Refusal(int(fault.value), f"the Hub was told to answer {fault.value}")
        if fault := self.fault("redirect"):
            return self.reply(b"", 302, {"Location": str(fault.value)})
        return getattr(self, name)(**found)

    def fault(self, *kinds: str) -> Fault | None:
        subject = self.entry.found.get("path") or self.entry.path
        return self.hub.faults.take(kinds, self.entry.route, self.method, subject)

    def reply(self, body: bytes, status: int = 200, headers: Mapping[str, str] = {}) -> Any:
        self.entry.status = status
        headers = {"Content-Length": str(len(body)), **headers}
        sent = b"" if self.method == "HEAD" else body
        fault = self.fault("die") if self.method == "GET" and "ETag" in headers else None
        stream = _Broken(sent[: int(fault.value)]) if fault else http.ByteStream(sent)
        return http.Response(status, headers=headers, stream=stream)

    def reply_json(self, value: Any, status: int = 200, headers: Mapping[str, str] = {}) -> Any:
        kind = {"Content-Type": "application/json; charset=utf-8"}
        return self.reply(json.dumps(value).encode(), status, {**kind, **headers})

    def reply_file(self, data: bytes, headers: Mapping[str, str]) -> Any:
        """A file or its end from the byte that was asked for, under the faults of bodies."""
        fault = self.fault("flip", "longer") if self.method == "GET" else None
        if fault and fault.kind == "flip":
            data = flipped(data, len(data) // 2 if fault.value is None else fault.value)
        if fault and fault.kind == "longer":
            data += b"\n" * int(fault.value)
        start = re.fullmatch(r"bytes=(\d+)-", self.range)
        if not start:
            return self.reply(data, 200, headers)
        told = {**headers, "Content-Range": f"bytes {start[1]}-{len(data) - 1}/{len(data)}"}
        return self.reply(data[int(start[1]) :], 206, told)

    # --- who asks, and for what ---

    def _user(self) -> User | None:
        if self.entry.token and self.entry.token not in USERS:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return USERS.get(self.entry.token)

    def _writer(self, namespace: str) -> None:
        user = self._user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        if user.role != "write":
            raise Refusal(403, "Forbidden: you must use a write token to upload to a repository.")
        if user.name != namespace:
            raise Refusal(403, f'Forbidden: no rights to write under the namespace "{namespace}"')

    def _repository(self, repo: str, *, write: bool = False) -> Repository:
        user = self._user()
        found = self.hub.repositories.get(repo)
        if found is None or (found.private and not (user and user.name == found.namespace)):
            raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        if write:
            self._writer(found.namespace)
        return found

    def _at(self, repo: str, revision: str) -> str:
        commit = self._repository(repo).refs.get(revision, revision)
        if commit not in self._repository(repo).titles:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def create(self) -> Any:
        asked = json.loads(self.body)
        namespace = asked.get("organization") or "org"
        self._writer(namespace)
        repo = f"{namespace}/{asked['name']}"
        url = f"{HUB}/{repo}"
        if repo in self.hub.repositories:
            return self.reply_json({"error": "You already created this repo", "url": url}, 409)
        made = self.hub.new(repo, asked.get("visibility") == "private")
        self.hub.repositories[repo] = made
        self.hub.grow(made, "main", {".gitattributes": b"*.bin filter=lfs\n"}, "initial commit")
        return self.reply_json({"url": url, "name": repo})

    def validate_yaml(self) -> Any:
        errors = [{"message": error} for error in card_errors(json.loads(self.body)["content"])]
        return self.reply_json({"errors": errors, "warnings": []}, 400 if errors else 200)

    # --- what is in a repository ---

    def info(self, repo: str, revision: str = "main") -> Any:
        repository = self._repository(repo)
        commit = self._at(repo, revision)
        wrong = self.fault("commit")
        if move := self.fault("move"):
            repository.refs["main"] = move.value
        return self.reply_json(
            {
                "id": repo,
                "sha": wrong.value if wrong else commit,
                "private": repository.private,
                "gated": repository.gated,
                "tags": [],
                "siblings": list(self._siblings(self.hub.files(commit, repo))),
            }
        )

    def _siblings(self, files: Mapping[str, bytes]) -> Iterator[dict[str, Any]]:
        for name, data in files.items():
            size, oid = self.hub.listed.get(name, (len(data), digest(name, data)))
            facts = {"rfilename": name, "size": size, "blobId": oid}
            if name.endswith(LARGE):
                facts["lfs"] = {"oid": oid, "sha256": oid, "size": size, "pointerSize": 130}
            yield facts

    def tree(self, repo: str, revision: str) -> Any:
        rows = self._siblings(self.hub.files(self._at(repo, revision), repo))
        return self.reply_json(
            [{**r, "type": "file", "path": r["rfilename"], "oid": r["blobId"]} for r in rows]
        )

    def resolve(self, repo: str, revision: str, path: str) -> Any:
        repository = self._repository(repo)
        user = self._user()
        is_friend = user and user.name in (repository.namespace, *repository.granted)
        if repository.gated and not is_friend:
            raise Refusal(403 if user else 401, f"Access to {repo} is restricted.", "GatedRepo")
        commit = self._at(repo, revision)
        wrong = self.fault("commit")
        named = str(wrong.value) if wrong else commit
        data = self.hub.files(commit, repo).get(path)
        if data is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", named)
        etag = f'"{self.hub.etags.get(path, digest(path, data))}"'
        if self.hub.all_regular or not path.endswith(LARGE):
            return self.reply_file(data, {"X-Repo-Commit": named, "ETag": etag})
        url = f"{STORAGE}/{repo}/{commit}/{quote(path)}?signature=signed"
        told = {"X-Linked-Etag": etag, "X-Linked-Size": str(len(data))}
        return self.reply(b"", 302, {"X-Repo-Commit": named, "Location": url, **told})

    # --- changing it ---

    def preupload(self, repo: str, revision: str) -> Any:
        self._repository(repo, write=True)
        there = self.hub.files(self._at(repo, revision), repo)
        rows = []
        for asked in json.loads(self.body)["files"]:
            path = asked["path"]
            is_binary = path.endswith(LARGE) and not self.hub.all_regular
            oid = digest(path, there[path]) if path in there else None
            mode = "lfs" if is_binary else "regular"
            rows.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return self.reply_json({"files": rows})

    def lfs_batch(self, repo: str) -> Any:
        self._repository(repo, write=True)
        verify = {"href": f"{HUB}/api/models/{repo}/lfs-verify"}
        objects = []
        for asked in json.loads(self.body)["objects"]:
            upload = {"href": f"{STORAGE}/{asked['oid']}?signature=signed"}
            actions = {"actions": {"upload": upload, "verify": verify}}
            objects.append({**asked, **({} if asked["oid"] in self.hub.contents else actions)})
        return self.reply_json({"transfer": "basic", "objects": objects})

    def lfs_verify(self, repo: str) -> Any:
        self._repository(repo, write=True)
        self._large(json.loads(self.body)["oid"])
        return self.reply_json({})

    def _large(self, oid: str) -> bytes:
        if oid not in self.hub.contents:
            raise Refusal(400, f"LFS object {oid} was not uploaded")
        return self.hub.contents[oid]

    def commit(self, repo: str, revision: str) -> Any:
        repository = self._repository(repo, write=True)
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        head = self._at(repo, revision)
        if header.get("parentCommit", head) != head:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = self._changed(self.hub.files(head, repo), lines)
        answer = {}
        if "create_pr" in self.query:
            number = 1 + sum(ref.startswith("refs/pr/") for ref in repository.refs)
            revision = f"refs/pr/{number}"
            repository.refs[revision] = head
            answer["pullRequestUrl"] = f"{HUB}/{repo}/discussions/{number}"
        made = self.hub.grow(repository, revision, files, header["summary"])
        url = f"{HUB}/{repo}/commit/{made}"
        return self.reply_json({"success": True, "commitOid": made, "commitUrl": url, **answer})

    def _changed(self, files: dict[str, bytes], lines: list[dict[str, Any]]) -> dict[str, bytes]:
        """A tree after changes: deletions first, as they ride with what replaces them."""
        for line in sorted(lines, key=lambda line: not line["key"].startswith("deleted")):
            path = line["value"].get("path", "")
            if line["key"].startswith("deleted"):
                gone = (path, path.rstrip("/") + "/")
                files = {n: d for n, d in files.items() if n != path and not n.startswith(gone[1])}
            elif line["key"] == "lfsFile":
                files[path] = self._large(line["value"]["oid"])
            elif line["key"] == "file":
                data = base64.b64decode(line["value"]["content"])
                files[path] = flipped(data) if self.fault("flip") else data
        return dict(sorted(files.items()))

    def branch(self, repo: str, revision: str) -> Any:
        repository = self._repository(repo, write=True)
        if revision in repository.refs:
            raise Refusal(409, f"Reference already exists: {revision}")
        start = json.loads(self.body).get("startingPoint", "main")
        repository.refs[revision] = self._at(repo, start)
        return self.reply_json({})

    # --- the storage: for whoever has a signed URL ---

    def storage_get(self, repo: str, revision: str, path: str) -> Any:
        self._check_signature()
        data = self.hub.files(revision, repo)[path]
        return self.reply_file(data, {"ETag": f'"{digest(path, data)}"'})

    def storage_put(self, digest: str) -> Any:
        self._check_signature()
        if hashlib.sha256(self.body).hexdigest() != digest:
            raise Refusal(400, "the content has another sha256 than its name")
        self.hub.contents[digest] = self.body
        return self.reply(b"")

    def _check_signature(self) -> None:
        if self.entry.token:
            raise Refusal(400, "Only one auth mechanism allowed")
        if self.query.get("signature") != "signed":
            raise Refusal(403, "the signature does not match")


class _Broken(http.SyncByteStream):  # type: ignore[misc]  # either library's
    """A body that breaks off."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __iter__(self) -> Iterator[bytes]:
        yield self.data
        raise http.RemoteProtocolError("the connection broke off")
