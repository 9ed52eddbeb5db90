"""Every page of this folder from the results: the tables between markers, and what figures read.

python -m paper_repro.tables            # write
python -m paper_repro.tables --check    # fail if they are not what the results say
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from zoo.program import documented, write_pages

from .attackers import behaviour, newcomers, products
from .attackers import page as attackers
from .federation import page as federation
from .grid import page as grid
from .initial_adapter import page as initial_adapter
from .mixed import page as mixed
from .separability import page as separability

PAGES: dict[Path, Callable[[], str]] = {
    **{path: partial(grid.rendered, path) for path in grid.PAGES},
    mixed.PAGE: mixed.rendered,
    separability.PAGE: separability.rendered,
    attackers.SUMMARY: attackers.summary_text,
    attackers.PAGE: attackers.rendered,
    behaviour.PAGE: behaviour.rendered,
    newcomers.PAGE: newcomers.rendered,
    products.PAGE: products.rendered,
    initial_adapter.PAGE: initial_adapter.rendered,
    federation.PAGE: federation.rendered,
}


def main() -> None:
    """Write or check every generated part."""
    options = documented(__doc__, "check").parse_args()
    texts = {path: rendered() for path, rendered in PAGES.items()}
    write_pages(texts, "python -m paper_repro.tables", check=options.check)


if __name__ == "__main__":
    main()
