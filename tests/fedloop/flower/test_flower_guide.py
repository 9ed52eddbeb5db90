"""docs/flower.md: its certificates and keys are taken, its commands are commands, its settings are
the settings.
"""

from __future__ import annotations

import re
import shlex
import shutil
import ssl
import subprocess
from pathlib import Path
from typing import Any

import pytest

import fedloop.cli.flower  # noqa: F401  # it joins the app
from fedloop.flower.settings import EngineSettings
from tests.helpers.flowered import (
    handshake,  # also says which task the messages of this process come from
)

ROOT = Path(__file__).resolve().parents[3]
GUIDE = (ROOT / "docs" / "flower.md").read_text(encoding="utf-8")


def block(name: str) -> str:
    """The lines of the guide below a mark."""
    [found] = re.findall(rf"<!-- {name} -->\n```\n(.*?)```", GUIDE, re.DOTALL)
    return str(found)


@pytest.mark.skipif(
    not (shutil.which("openssl") and shutil.which("ssh-keygen")),
    reason="needs openssl and ssh-keygen, as the guide's reader does",
)
def test_the_guides_certificates_and_keys_are_taken(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.serialization import (
        load_ssh_private_key,
        load_ssh_public_key,
    )
    from flwr.supercore.primitives.asymmetric import uses_nist_ec_curve

    subprocess.run(
        ["bash", "-euc", block("certificates") + block("node key")],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(
        tmp_path / "certificates" / "server.pem", tmp_path / "certificates" / "server.key"
    )
    client = ssl.create_default_context(cafile=tmp_path / "certificates" / "ca.crt")
    for name, known in (
        ("server.example.org", True),
        ("127.0.0.1", True),
        ("localhost", True),
        ("other.example.org", False),
    ):
        assert handshake(server, client, name) is known, name
    for secret in ("certificates/ca.key", "certificates/server.key", "site-a"):
        assert (tmp_path / secret).stat().st_mode & 0o077 == 0, secret
    load_ssh_private_key((tmp_path / "site-a").read_bytes(), None)
    # it is one of them
    assert uses_nist_ec_curve(load_ssh_public_key((tmp_path / "site-a.pub").read_bytes()))


def test_every_command_of_the_guide_is_one() -> None:
    from typer.main import get_command

    from fedloop.cli.run import app

    lines = [
        *re.findall(r"^(fedloop .*)$", GUIDE, re.MULTILINE),
        *re.findall(r"`(fedloop [^`]*)`", GUIDE),
    ]
    checked = set()
    for line in lines:
        command: Any = get_command(app)
        words = shlex.split(line.partition(">")[0])[1:]
        path = []
        while hasattr(command, "commands") and words:
            path.append(words[0])
            command, words = command.commands[words[0]], words[1:]
        if words:  # a bare name in running text has no arguments to check
            command.make_context("guide", words)
        checked.add(" ".join(path))
    assert {
        *"run resume report example".split(),
        *(
            f"flower {name}"
            for name in ("init", "superlink", "register", "unregister", "node", "start")
        ),
    } <= checked


def test_the_guide_names_every_setting_with_its_default() -> None:
    for name, value in EngineSettings().run_config().items():
        shown = (
            f"{value:g}"
            if isinstance(value, float)
            else f"`{value}`"
            if isinstance(value, str)
            else str(value)
        )
        assert f"| `{name}` | {shown} |" in GUIDE
        assert (
            f"{name} = "
            in (ROOT / "fedloop" / "flower" / "template" / "pyproject.toml").read_text()
        )
