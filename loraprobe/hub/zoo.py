"""The zoo's repository, which this package asks the Hub for by itself, and its probes' digests.

A name can be taken by somebody else, a digest cannot. tests/loraprobe/hub/test_trust.py compares
them with what the repository holds.
"""

from __future__ import annotations

from ..errors import TrustError, quoted

ZOO_REPO = "loraprobe/zoo"
ZOO_DIGESTS = {
    "linear": "754127503680fb0bc162a19451088f9dea52ef1e25d72c7f54561734f71e05f8",
    "mlp": "8e97277abfc773374f2a00b2aef29e941adc359ba78535706690289f78d405e5",
    "paper": "73646efdc759c0504ff85cdac6023caf2622cf5130e94a1003cca4f11668fd97",
    "spectral": "88a7f02617c8b0bf1f83890e859a9fc051674545fb28f04d94718035f001987d",
    "xgboost": "f9188dadcc08979b25b37afff6a0975fb4f784a64cef8e41b9f2049ffa76746b",
}
"""Folder in the zoo -> digest of its config.json; of this version of the package."""


def check_zoo(source: str, subfolder: str | None, digest: str | None) -> None:
    """Refuse a probe of the zoo's name that is not the one this version knows.

    Raises:
        TrustError: the repository is the zoo's, and the probe another one.
    """
    name = (subfolder or "").strip("/")
    if source == ZOO_REPO and ZOO_DIGESTS.get(name) != digest:
        raise TrustError(
            f"{ZOO_REPO}: {quoted(name)} has the digest {digest}; this version of loraprobe"
            f" expects {ZOO_DIGESTS.get(name, 'no such probe')}. Do not use it, or"
            " upgrade loraprobe if the zoo has a newer one"
        )
