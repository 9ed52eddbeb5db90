"""What the loopback Hub answers.

The routes of huggingface_hub, with the Hub's headers and error codes.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import parse_qs, quote, urlencode

from tests.helpers.loopback_faults import Fault
from tests.helpers.loopback_http import Handler, Refusal
from tests.helpers.loopback_store import (
    COMMIT,
    Commit,
    File,
    Repository,
    StoreError,
    card_errors,
    entries,
    is_large,
)

if TYPE_CHECKING:
    from tests.helpers.loopback_hub import Hub, User

API = r"/api/(?P<kind>models|datasets)/(?P<repo>[\w.-]+/[\w.-]+)"
PAGE = r"/(?:(?P<kind>datasets)/)?(?P<repo>[\w.-]+/[\w.-]+)"
REV = r"(?P<revision>[^/]+)"
PATH = r"(?P<path>.+)"
DIGEST = r"(?P<digest>[0-9a-f]{64})"


class OriginHandler(Handler):
    @property
    def hub(self) -> Hub:
        return cast("Hub", self.server.served)


class StorageHandler(OriginHandler):
    """Contents by sha256, for whoever has a signed URL.

    A token is refused, as storage providers do.
    """

    origin = "storage"
    routes = (
        ("GET HEAD", f"/{DIGEST}/{PATH}", "storage_get"),
        ("PUT", f"/{DIGEST}", "storage_put"),
    )

    def storage_get(self, digest: str, path: str) -> None:
        self._check_signature("GET", digest)
        self.reply_file(self.hub.store.content(digest), {"ETag": f'"{digest}"'})

    def storage_put(self, digest: str) -> None:
        self._check_signature("PUT", digest)
        if hashlib.sha256(self.body).hexdigest() != digest:
            raise Refusal(400, "the content has another sha256 than its name")
        self.hub.store.put(self.body, lfs=True)
        self.reply(200, b"", {"ETag": f'"{digest}"'})

    def _check_signature(self, method: str, digest: str) -> None:
        if "Authorization" in self.headers:
            raise Refusal(400, "Only one auth mechanism allowed")
        if not hmac.compare_digest(
            self.query.get("signature", ""), self.hub.signature(method, digest)
        ):
            raise Refusal(403, "the signature does not match")


class HubHandler(OriginHandler):
    origin = "hub"
    routes = (
        ("GET", "/api/whoami-v2", "whoami"),
        ("POST", "/api/repos/create", "create"),
        ("DELETE", "/api/repos/delete", "delete"),
        ("POST", "/api/validate-yaml", "validate_yaml"),
        ("PUT", f"{API}/settings", "settings"),
        ("POST", f"{API}/user-access-request/grant", "grant"),
        ("GET", f"{API}/auth-check(?P<write>/write)?", "auth_check"),
        ("GET", f"{API}(?:/revision/{REV})?", "info"),
        ("GET", f"{API}/tree/{REV}(?:/{PATH})?", "tree"),
        ("POST", f"{API}/paths-info/{REV}", "paths_info"),
        ("GET", f"{API}/refs", "refs"),
        ("GET", f"{API}/commits/{REV}", "commits"),
        ("GET HEAD", f"{PAGE}/resolve/{REV}/{PATH}", "resolve"),
        ("POST", f"{API}/preupload/{REV}", "preupload"),
        ("POST", f"{PAGE}\\.git/info/lfs/objects/batch", "lfs_batch"),
        ("POST", f"{API}/lfs-verify", "lfs_verify"),
        ("POST", f"{API}/commit/{REV}", "commit"),
        ("POST DELETE", f"{API}/(?P<what>tag|branch)/{REV}", "name_commit"),
        ("POST", f"{API}/discussions", "open_discussion"),
        ("GET", f"{API}/discussions/(?P<number>[0-9]+)", "discussion"),
        ("GET POST DELETE", "/__faults__", "admin_faults"),
        ("GET DELETE", "/__log__", "admin_log"),
        ("POST", "/__swap__", "admin_swap"),
    )

    # --- who asks, and for what
    # -----------------------------------------------------------------------------------

    def _user(self) -> User | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        user = self.hub.users.get(header.removeprefix("Bearer "))
        if user is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return user

    def _writer(self, namespace: str) -> User:
        user = self._user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        if user.role != "write":
            raise Refusal(403, "Forbidden: you must use a write token to upload to a repository.")
        if not user.owns(namespace):
            raise Refusal(
                403,
                f'Forbidden: you don\'t have the rights to write under the namespace "{namespace}"',
            )
        return user

    def _repository(self, kind: str | None, repo: str, *, write: bool = False) -> Repository:
        user = self._user()
        repository = self.hub.store.get(kind or "models", repo)
        if repository is None or (
            repository.private and not (user and user.owns(repository.namespace))
        ):
            raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        if write:
            self._writer(repository.namespace)
        return repository

    def _at(self, repository: Repository, revision: str) -> Commit:
        found = repository.find(revision)
        if found is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def _json(self) -> Any:
        try:
            return json.loads(self.body)
        except ValueError:
            raise Refusal(400, "the body is not JSON") from None

    # --- accounts and repositories
    # --------------------------------------------------------------------------------

    def whoami(self) -> None:
        user = self._user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        orgs = [{"name": name, "type": "org"} for name in user.namespaces if name != "*"]
        self.reply_json(
            200,
            {
                "name": user.name,
                "type": "user",
                "orgs": orgs,
                "auth": {"accessToken": {"role": user.role}},
            },
        )

    def create(self) -> None:
        asked = self._json()
        kind = f"{asked.get('type') or 'model'}s"
        user = self._user()
        namespace = asked.get("organization") or (user.name if user else "")
        writer, repo = self._writer(namespace), f"{namespace}/{asked['name']}"
        url = f"{self.hub.url}/{'datasets/' if kind == 'datasets' else ''}{repo}"
        if kind not in ("models", "datasets") or not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
            raise Refusal(400, f"{kind} {repo} is not to be had here")
        with self.hub.store.lock:
            if self.hub.store.get(kind, repo):
                return self.reply_json(
                    409, {"error": "You already created this model repo", "url": url}
                )
            self.hub.store.create(
                kind, repo, writer.name, private=asked.get("visibility") == "private"
            )
        return self.reply_json(200, {"url": url, "name": repo})

    def delete(self) -> None:
        asked = self._json()
        self.hub.store.delete(
            self._repository(
                f"{asked.get('type') or 'model'}s",
                f"{asked['organization']}/{asked['name']}",
                write=True,
            )
        )
        self.reply_json(200, {})

    def settings(self, kind: str, repo: str) -> None:
        repository, asked = self._repository(kind, repo, write=True), self._json()
        repository.gated = asked.get("gated", repository.gated)
        repository.private = (
            asked.get("visibility", "private" if repository.private else "public") == "private"
        )
        self.hub.store.save(repository)
        self.reply_json(200, {})

    def grant(self, kind: str, repo: str) -> None:
        repository = self._repository(kind, repo, write=True)
        repository.granted.append(self._json()["user"])
        self.hub.store.save(repository)
        self.reply_json(200, {})

    def auth_check(self, kind: str, repo: str, write: str = "") -> None:
        self._check_gate(self._repository(kind, repo, write=bool(write)))
        self.reply_json(200, {})

    def validate_yaml(self) -> None:
        errors = card_errors(self._json()["content"])
        self.reply_json(
            400 if errors else 200,
            {"errors": [{"message": error} for error in errors], "warnings": []},
        )

    # --- what is in a repository
    # ----------------------------------------------------------------------------------

    def info(self, kind: str, repo: str, revision: str = "main") -> None:
        repository = self._repository(kind, repo)
        commit = self._at(repository, revision)
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in commit.files]
        if "blobs" in self.query:
            for sibling, (path, file) in zip(siblings, commit.files.items(), strict=True):
                lfs = (
                    {
                        "lfs": {
                            "sha256": file.sha256,
                            "size": file.size,
                            "pointerSize": file.pointer_size,
                        }
                    }
                    if file.lfs
                    else {}
                )
                sibling |= {"rfilename": path, "size": file.size, "blobId": file.blob_id, **lfs}
        wrong, move = self.fault("commit"), self.fault("move")
        answer = {
            "_id": repository.id,
            "id": repository.id,
            "author": repository.namespace,
            "sha": wrong.value if wrong else commit.id,
            "lastModified": commit.date,
            "private": repository.private,
            "gated": repository.gated,
            "disabled": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": siblings,
        }
        if move:
            repository.move("main", move.value)
        self.reply_json(200, answer)

    def tree(self, kind: str, repo: str, revision: str, path: str = "") -> None:
        commit = self._at(self._repository(kind, repo), revision)
        everything = entries(commit.files)
        inside = {
            name: entry
            for name, entry in everything.items()
            if not path or name.startswith(f"{path}/")
        }
        if not inside:
            raise Refusal(404, f"{path} does not exist on {revision}", "EntryNotFound", commit.id)
        if self.query.get("recursive", "").lower() != "true":
            depth = path.count("/") + 1 if path else 0
            inside = {name: entry for name, entry in inside.items() if name.count("/") == depth}
        start = int(self.query.get("cursor", 0))
        page = list(inside.values())[start : start + self.hub.page_size]
        headers = {}
        if start + self.hub.page_size < len(inside):
            following = urlencode({**self.query, "cursor": start + self.hub.page_size})
            headers["Link"] = (
                f'<{self.hub.url}{self.path.partition("?")[0]}?{following}>; rel="next"'
            )
        self.reply_json(200, page, headers)

    def paths_info(self, kind: str, repo: str, revision: str) -> None:
        everything = entries(self._at(self._repository(kind, repo), revision).files)
        asked = parse_qs(self.body.decode()).get("paths", [])
        self.reply_json(
            200, [everything[path.rstrip("/")] for path in asked if path.rstrip("/") in everything]
        )

    def refs(self, kind: str, repo: str) -> None:
        repository = self._repository(kind, repo)
        rows = {
            "branches": ("refs/heads/", repository.branches),
            "tags": ("refs/tags/", repository.tags),
            "converts": ("", {}),
        }
        if "include_prs" in self.query:
            rows["pullRequests"] = ("refs/pr/", repository.pull_requests)
        self.reply_json(
            200,
            {
                key: [
                    {"name": name, "ref": f"{start}{name}", "targetCommit": sha}
                    for name, sha in named.items()
                ]
                for key, (start, named) in rows.items()
            },
        )

    def commits(self, kind: str, repo: str, revision: str) -> None:
        repository = self._repository(kind, repo)
        history = repository.history(self._at(repository, revision))
        rows = [
            {
                "id": made.id,
                "title": made.title,
                "message": made.message,
                "date": made.date,
                "authors": [{"user": made.author}],
            }
            for made in history
        ]
        self.reply_json(200, rows)

    def resolve(self, repo: str, revision: str, path: str, kind: str | None = None) -> None:
        repository = self._repository(kind, repo)
        self._check_gate(repository)
        commit = self._at(repository, revision)
        file, wrong = commit.files.get(path), self.fault("commit")
        named = str(wrong.value) if wrong else commit.id
        if file is None or self.fault("missing"):
            raise Refusal(404, "Entry not found", "EntryNotFound", named)
        headers = {
            "X-Repo-Commit": named,
            "Content-Disposition": f"inline; filename*=UTF-8''{quote(PurePosixPath(path).name)}",
        }
        if not file.lfs:
            return self.reply_file(
                self.hub.store.content(file.sha256), {**headers, "ETag": f'"{file.etag}"'}
            )
        url = f"{self.hub.storage_url}/{file.sha256}/{quote(path)}?signature={self.hub.signature('GET', file.sha256)}"
        return self.reply(
            302,
            b"",
            {
                **headers,
                "Location": url,
                "X-Linked-Etag": f'"{file.etag}"',
                "X-Linked-Size": str(file.size),
            },
        )

    def _check_gate(self, repository: Repository) -> None:
        user = self._user()
        if repository.gated and not (
            user and (user.owns(repository.namespace) or user.name in repository.granted)
        ):
            raise Refusal(
                403 if user else 401,
                f"Access to model {repository.id} is restricted. You must have access to it.",
                "GatedRepo",
            )

    # --- changing it
    # ----------------------------------------------------------------------------------------------

    def preupload(self, kind: str, repo: str, revision: str) -> None:
        repository = self._repository(kind, repo, write=True)
        there, rows = self._at(repository, revision).files, []
        for file in self._json()["files"]:
            large = not self.hub.all_regular and is_large(
                file["path"], file["size"], base64.b64decode(file["sample"])
            )
            known = there.get(file["path"])
            oid = known.etag if known else None
            rows.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": False,
                    "oid": oid,
                }
            )
        self.reply_json(200, {"files": rows})

    def lfs_batch(self, repo: str, kind: str | None = None) -> None:
        repository = self._repository(kind, repo, write=True)
        verify = {"href": f"{self.hub.url}/api/{repository.kind}/{repository.id}/lfs-verify"}
        objects = []
        for wanted in self._json()["objects"]:
            upload = {
                "href": (
                    f"{self.hub.storage_url}/{wanted['oid']}?signature={self.hub.signature('PUT', wanted['oid'])}"
                )
            }
            there = self.hub.store.content(wanted["oid"]).exists()
            objects.append(
                {**wanted, **({} if there else {"actions": {"upload": upload, "verify": verify}})}
            )
        self.reply_json(200, {"transfer": "basic", "objects": objects})

    def lfs_verify(self, kind: str, repo: str) -> None:
        self._repository(kind, repo, write=True)
        self._large(self._json())
        self.reply_json(200, {})

    def _large(self, value: Mapping[str, Any]) -> File:
        path = self.hub.store.content(str(value["oid"]))
        if (
            not re.fullmatch(r"[0-9a-f]{64}", path.name)
            or not path.exists()
            or path.stat().st_size != value.get("size", path.stat().st_size)
        ):
            raise Refusal(400, f"LFS object {value['oid']} was not uploaded, or has another size")
        return self.hub.store.file(path.name, lfs=True)

    def commit(self, kind: str, repo: str, revision: str) -> None:
        repository = self._repository(kind, repo, write=True)
        header, changes = self._changes()
        author, parent = self._writer(repository.namespace).name, header.get("parentCommit")
        base, answer = revision, {}
        try:
            with self.hub.store.lock:
                if "create_pr" in self.query:
                    number = repository.open_pull_request(
                        header["summary"], self._at(repository, parent or revision).id
                    )
                    base, answer = (
                        f"refs/pr/{number}",
                        {"pullRequestUrl": f"{self.hub.url}/{repository.id}/discussions/{number}"},
                    )
                made = self.hub.store.commit(
                    repository,
                    base,
                    changes,
                    header["summary"],
                    header.get("description", ""),
                    author,
                    parent,
                )
        except StoreError as error:
            raise Refusal(error.status, str(error), error.code) from None
        self.reply_json(
            200,
            {
                "success": True,
                "commitOid": made.id,
                "commitUrl": f"{self.hub.url}/{repository.id}/commit/{made.id}",
                **answer,
            },
        )

    def _changes(self) -> tuple[dict[str, Any], dict[str, File | None]]:
        """The header of a commit, and path -> file; None deletes, and a folder's path ends in /."""
        header, changes = {}, {}
        for line in self.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            path = value.get("path", "")
            if key == "header":
                header = value
            elif key == "file":
                data = base64.b64decode(value["content"], validate=True)
                if path == "README.md" and (errors := card_errors(data.decode())):
                    raise Refusal(400, f"Invalid metadata in README.md. {' '.join(errors)}")
                fault = self.fault("flip")
                changes[path] = self.hub.store.put(
                    fault.flipped(data) if fault else data, lfs=False
                )
            elif key == "lfsFile":
                changes[path] = self._large(value)
            elif key in ("deletedFile", "deletedFolder"):
                changes[path.rstrip("/") + ("/" if key == "deletedFolder" else "")] = None
            else:
                raise Refusal(400, f"unknown operation {key}")
        if not header.get("summary"):
            raise Refusal(400, "a commit needs a summary")
        return header, changes

    def name_commit(self, kind: str, repo: str, what: str, revision: str) -> None:
        """Make or remove a tag (of a revision) or a branch (by its name)."""
        repository = self._repository(kind, repo, write=True)
        names = repository.tags if what == "tag" else repository.branches
        if self.command == "DELETE":
            if names.pop(revision, None) is None:
                raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        else:
            asked = self._json()
            name, start = (
                (asked["tag"], revision)
                if what == "tag"
                else (revision, asked.get("startingPoint", "main"))
            )
            if name.startswith("refs/") or COMMIT.fullmatch(name):
                raise Refusal(400, f"Invalid reference for a {what}: {name}")
            if name in names:
                raise Refusal(409, f"Reference already exists: {name}")
            names[name] = self._at(repository, start).id
        self.hub.store.save(repository)
        self.reply_json(200, {})

    def open_discussion(self, kind: str, repo: str) -> None:
        repository, asked = self._repository(kind, repo, write=True), self._json()
        if not asked.get("pullRequest"):
            raise Refusal(501, "only pull requests are kept here")
        number = repository.open_pull_request(asked["title"], repository.branches["main"])
        self.hub.store.save(repository)
        self.reply_json(200, {"num": int(number)})

    def discussion(self, kind: str, repo: str, number: str) -> None:
        repository = self._repository(kind, repo)
        if number not in repository.pull_requests:
            raise Refusal(404, "Discussion not found")
        head = repository.commits[repository.pull_requests[number]]
        answer = {
            "num": int(number),
            "title": repository.titles[number],
            "status": "draft",
            "isPullRequest": True,
            "events": [],
            "createdAt": head.date,
            "author": {"name": head.author},
            "repo": {"name": repository.id, "type": repository.kind[:-1]},
            "changes": {"base": "refs/heads/main"},
            "filesWithConflicts": False,
        }
        self.reply_json(200, answer)

    # --- for tests
    # ------------------------------------------------------------------------------------------------

    def admin_faults(self) -> None:
        try:
            if self.command == "POST":
                self.hub.faults.append(Fault.from_json(self._json()))
        except ValueError as error:
            raise Refusal(400, str(error)) from None
        if self.command == "DELETE":
            self.hub.faults.clear()
        self.reply_json(200, self.hub.faults.to_json())

    def admin_log(self) -> None:
        entries = self.hub.entries()
        if self.command == "DELETE":
            self.hub.log.clear()
        self.reply_json(200, entries)

    def admin_swap(self) -> None:
        asked = self._json()
        try:
            self.hub.swap(
                asked["repo"], asked["commit"], asked["path"], base64.b64decode(asked["content"])
            )
        except KeyError as error:
            raise Refusal(404, f"no such file: {error}") from None
        self.reply_json(200, {})
