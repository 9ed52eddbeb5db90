"""One running service that the tests of what it answers share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers import serving


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> serving.Files:
    return serving.written(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def service(
    files: serving.Files, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[serving.Service]:
    """All the probes, a start, and bodies of at most 1 MiB."""
    log = tmp_path_factory.mktemp("log") / "log"
    with serving.running(log, *files.options(), "--max-mib", "1") as running:
        yield running
