"""A Hub on 127.0.0.1 that the real huggingface_hub pushes to and pulls from.

For tests, and for trying things out.

    python -m tests.helpers.loopback_hub --folder DIR --port 8899

prints the lines to export and serves until Ctrl-C; what was pushed is still in DIR after a restart.
In a test, `with Hub(folder, users) as hub` serves from threads; `hub.faults` makes things go wrong,
`hub.log` holds every request, and the routes /__faults__, /__log__ and /__swap__ do the same from
another process.

As on the real Hub, large files come from another origin, with a signed URL and without the token.
"""

from __future__ import annotations

import argparse
import hmac
import secrets
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.loopback_http import Served, Server
from tests.helpers.loopback_routes import HubHandler, StorageHandler
from tests.helpers.loopback_store import Store


@dataclass(frozen=True)
class User:
    """Whom a token stands for.

    May read and, with the role "write", write what is in these namespaces; "*" for all.
    """

    name: str
    role: str = "write"
    namespaces: tuple[str, ...] = ()

    def owns(self, namespace: str) -> bool:
        return bool({namespace, "*"} & {self.name, *self.namespaces})


class Hub(Served):
    """The two origins, serving from threads until `close`.

    Args:
        folder: where it keeps everything.
        users: token -> user.
        port: of the Hub, 0 for any free one. The storage takes any free one.
        all_regular: answer `regular` for every file, as some self-hosted Hubs do: nothing goes to
            the storage.
        page_size: how many entries of a tree are in one answer.
    """

    def __init__(
        self,
        folder: str | Path,
        users: Mapping[str, User],
        port: int = 0,
        *,
        all_regular: bool = False,
        page_size: int = 1000,
    ) -> None:
        super().__init__()
        self.store, self.users = Store(Path(folder)), dict(users)
        self.all_regular, self.page_size = all_regular, page_size
        self._secret = secrets.token_bytes(16)
        self._servers = (Server(port, HubHandler, self), Server(0, StorageHandler, self))
        self.url, self.storage_url = (server.url for server in self._servers)
        for server in self._servers:
            server.start()

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self.closing.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def signature(self, method: str, digest: str) -> str:
        """What a URL of the storage has to carry."""
        return hmac.new(self._secret, f"{method} {digest}".encode(), "sha256").hexdigest()

    def swap(self, repo_id: str, commit: str, path: str, data: bytes) -> None:
        """Exchange a model's file in a commit that has been made: what no honest server does.

        Raises:
            KeyError: there is no such file.
        """
        repository = self.store.get("models", repo_id)
        if (
            repository is None
            or commit not in repository.commits
            or path not in repository.commits[commit].files
        ):
            raise KeyError(f"{path} in {repo_id} at {commit}")
        self.store.swap(repository, commit, path, data)


def main() -> None:
    parser = argparse.ArgumentParser(description="A Hub on 127.0.0.1 for trying out push and pull.")
    parser.add_argument(
        "--folder",
        type=Path,
        required=True,
        help="where it keeps everything; made if it is not there",
    )
    parser.add_argument("--port", type=int, default=8899)
    parser.add_argument(
        "--token", default="hf_loopback", help="the token that may write everywhere"
    )
    parser.add_argument(
        "--all-regular",
        action="store_true",
        help="no large files: works without HF_HUB_DISABLE_XET",
    )
    asked = parser.parse_args()
    for stop in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # a shell may have told a background process to ignore the first
        signal.signal(stop, signal.default_int_handler)
    with Hub(
        asked.folder,
        {asked.token: User("me", namespaces=("*",))},
        asked.port,
        all_regular=asked.all_regular,
    ) as hub:
        print(
            f"export HF_ENDPOINT={hub.url}\nexport HF_TOKEN={asked.token}\nexport"
            " HF_HUB_DISABLE_XET=1",
            flush=True,
        )
        try:
            hub.closing.wait()
        except KeyboardInterrupt:
            print("stopped", flush=True)


if __name__ == "__main__":
    main()
