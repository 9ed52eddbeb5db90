"""Whose probes are loaded: lists, signatures, names of our own, and heads that say nothing."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from loraprobe import Probe
from loraprobe.errors import LoraprobeError, OutputError, PolicyError, ProbeFormatError, TrustError
from loraprobe.heads import LinearHead, MLPHead
from loraprobe.hub import zoo
from loraprobe.scan.policy import Policy
from loraprobe.scan.scan import Scanner
from loraprobe.trust import CONFIG_VARIABLE, check_trusted, users_list
from tests.helpers.hub import REPO, Hub
from tests.helpers.hub_probes import SHA, filled
from tests.helpers.probes import tiny_probe, training_data

ROOT = Path(__file__).resolve().parents[3]
DIGEST = "a" * 64


@pytest.fixture
def hub(hub: Hub) -> Hub:
    return filled(hub)


def with_list(monkeypatch: pytest.MonkeyPatch, path: Path, text: str) -> None:
    path.write_text(text)
    monkeypatch.setenv(CONFIG_VARIABLE, str(path))


@pytest.mark.parametrize(
    ("entry", "source", "commit", "trusted"),
    [
        ("org", "org/name", SHA, True),
        ("org/name", "org/name", SHA, True),
        (f"org/name@{SHA}", "org/name", SHA, True),
        (f"org/name@{SHA}", "org/name", "b" * 40, False),
        ("org", "organ/name", SHA, False),
        ("org/na", "org/name", SHA, False),
        ("org", "org/name", None, False),  # a folder of that name is not of that publisher
        (f"sha256:{DIGEST}", "anywhere", None, True),
        (f"sha256:{'b' * 64}", "anywhere", None, False),
        ("/srv/probes", "/srv/probes/mine", None, True),
        ("/srv/probes", "/srv/probes/../theirs", None, False),
        ("/srv/probes", "/srv/probes/mine", SHA, False),
    ],
)
def test_an_entry_stands_for_one_publisher_repository_commit_digest_or_folder(
    entry: str, source: str, commit: str | None, trusted: bool
) -> None:
    if trusted:
        check_trusted([entry], source, commit, DIGEST)
    else:
        with pytest.raises(TrustError, match="trusted"):
            check_trusted([entry], source, commit, DIGEST)


@pytest.mark.parametrize(
    "text",
    [
        'trusted = "org"',
        'trusted = ["*"]',
        'trusted = ["org/name@main"]',
        'trusted = ["sha256:12"]',
        'trust = ["org"]',
        "trusted = [",
    ],
)
def test_a_list_that_cannot_be_understood_lets_nothing_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    folder = tiny_probe().save_pretrained(tmp_path / "probe")
    with_list(monkeypatch, tmp_path / "config.toml", text)
    with pytest.raises(TrustError):
        Probe.from_pretrained(folder)
    monkeypatch.setenv(CONFIG_VARIABLE, str(tmp_path / "none.toml"))
    with pytest.raises(TrustError, match=r"none\.toml"):
        users_list()


def test_without_a_list_everything_is_loaded_and_with_one_only_what_is_on_it(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(CONFIG_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    digest = Probe.from_pretrained(REPO, revision=SHA).digest
    config = tmp_path / "config/loraprobe/config.toml"
    config.parent.mkdir(parents=True)
    config.write_text('trusted = ["somebody-else"]')
    with pytest.raises(TrustError, match=f"sha256:{digest}"):
        Probe.from_pretrained(REPO, revision=SHA)
    config.write_text(f'trusted = ["sha256:{digest}"]')
    assert Probe.from_pretrained(REPO, revision=SHA).commit == SHA


def test_a_policy_has_such_a_list_too(tmp_path: Path) -> None:
    folder = tiny_probe().save_pretrained(tmp_path / "probe")
    digest = Probe.from_pretrained(folder).digest
    Scanner(Policy(probes=(str(folder),), trusted=(f"sha256:{digest}",)))
    with pytest.raises(TrustError, match="trusted"):
        Scanner(Policy(probes=(str(folder),), trusted=("org",)))
    with pytest.raises((TrustError, PolicyError), match="trusted"):
        Policy(trusted=("*",))


def test_a_digest_names_a_probe_and_no_other(tmp_path: Path) -> None:
    probe = Probe.from_pretrained(tiny_probe().save_pretrained(tmp_path / "one"))
    again = Probe.from_pretrained(tiny_probe().save_pretrained(tmp_path / "two"))
    other = replace(probe, threshold=0.7).save_pretrained(tmp_path / "three")
    assert probe.digest == again.digest != Probe.from_pretrained(other).digest
    assert replace(probe, threshold=0.7).digest is probe.with_facts(a=1).digest is None


def test_names_of_our_own_are_pinned_to_what_the_repository_holds() -> None:
    digests = {
        path.parent.name: Probe.from_pretrained(path.parent).digest
        for path in (ROOT / "zoo/probes").glob("*/config.json")
    }
    assert digests == zoo.ZOO_DIGESTS
    zoo.check_zoo(zoo.ZOO_REPO, "linear", digests["linear"])
    zoo.check_zoo("org/zoo", "linear", DIGEST)
    for name in ("linear", "new", None):
        with pytest.raises(TrustError, match="loraprobe/zoo"):
            zoo.check_zoo(zoo.ZOO_REPO, name, DIGEST)


@pytest.mark.parametrize("how", ["zero", "far", "mlp", "trees"])
def test_a_head_that_says_the_same_of_everything_is_refused_when_made_and_when_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    kind = {"mlp": "mlp", "trees": "xgboost"}.get(how, "linear")
    probe = tiny_probe(kind)
    head = probe.head
    if isinstance(head, LinearHead):
        constant = LinearHead(head.coef * 0, 0.0) if how == "zero" else LinearHead(head.coef, -1e9)
    elif isinstance(head, MLPHead):
        constant = replace(head, weights=(*head.weights[:-1], head.weights[-1] * 0))
    else:
        constant = replace(head, value=np.where(head.left == -1, np.float32(0), head.value))
    with pytest.raises(ProbeFormatError, match="of every adapter"):
        replace(probe, head=constant)
    with monkeypatch.context() as patch:
        patch.setattr("loraprobe.probe.check_varies", lambda head: None)
        folder = replace(probe, head=constant).save_pretrained(tmp_path / "probe")
    with pytest.raises(ProbeFormatError, match="of every adapter"):
        Probe.from_pretrained(folder)


def test_nobody_elses_files_are_replaced_or_removed(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(OutputError, match=r"README\.md"):
        tiny_probe().save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    folder = tiny_probe().save_pretrained(tmp_path / "probe")
    assert tiny_probe("mlp").save_pretrained(folder) == folder  # a probe over a probe


# --- signatures


def a_key(folder: Path, name: str) -> tuple[Path, Path]:
    """A private and its public key, made here."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP384R1())
    private, public = folder / name, folder / f"{name}.pub"
    pem = serialization.Encoding.PEM
    plain = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    private.write_bytes(key.private_bytes(pem, *plain))
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(pem, form))
    return private, public


def test_a_signature_is_of_one_key_and_of_every_file_that_is_scored_with(tmp_path: Path) -> None:
    pytest.importorskip("model_signing")
    from loraprobe.hub.signing import check_signature, sign_folder

    private, public = a_key(tmp_path, "mine")
    _, stranger = a_key(tmp_path, "theirs")
    folder = tiny_probe().save_pretrained(tmp_path / "probe")
    with pytest.raises(TrustError, match=r"no model\.sig"):
        check_signature(folder, public)
    sign_folder(folder, private)
    check_signature(folder, public)
    (folder / "README.md").write_text("another card")  # is for reading only
    moved = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    check_signature(moved, public)
    with pytest.raises(TrustError, match=r"not|mismatch"):
        check_signature(moved, stranger)
    for name in ("head.safetensors", "config.json"):
        bent = Path(shutil.copytree(folder, tmp_path / f"bent-{name}"))
        with (bent / name).open("ab") as file:
            file.write(b" ")
        with pytest.raises(TrustError, match="mismatch"):
            check_signature(bent, public)
    for text in ("", "{}", "no JSON"):
        (moved / "model.sig").write_text(text)
        with pytest.raises(TrustError):
            check_signature(moved, public)
    tiny_probe("mlp").save_pretrained(folder)
    with pytest.raises(TrustError, match=r"no model\.sig"):  # it was of another probe
        check_signature(folder, public)
    with pytest.raises(TrustError):
        sign_folder(folder, public)


def test_a_signed_probe_is_pulled_by_key(hub: Hub, tmp_path: Path) -> None:
    pytest.importorskip("model_signing")
    from loraprobe.hub.hub import pull_probe
    from loraprobe.hub.signing import sign_folder

    private, public = a_key(tmp_path, "mine")
    with pytest.raises(LoraprobeError, match=r"model\.sig"):
        pull_probe(REPO, tmp_path / "out", revision=SHA, key=public)
    assert not (tmp_path / "out").exists()
    sign_folder(hub.at(SHA), private)
    assert pull_probe(REPO, tmp_path / "out", revision=SHA, key=public) == SHA
    assert (tmp_path / "out/model.sig").is_file()


def test_what_a_probe_was_fitted_on_is_known_again(tmp_path: Path) -> None:
    from loraprobe import evaluate
    from tests.helpers.probes import new_data

    probe = Probe.from_pretrained(tiny_probe().save_pretrained(tmp_path))
    seen, new = training_data(), new_data()
    report = evaluate(probe, seen.adapters, seen.labels, seen.groups)
    assert report.n_fitted == report.n
    assert "WARNING: the probe was fitted on 32 of these 32" in report.table()
    other = evaluate(probe, new.adapters, new.labels, new.groups)
    assert other.n_fitted == 0
    assert "fitted" not in other.table()
    silent = replace(probe, facts={})
    assert evaluate(silent, new.adapters, new.labels).n_fitted is None
