"""Train the clients, measure every cell, write the page.

python -m paper_repro.initial_adapter                  # an hour of one core; goes on if cut off
python -m paper_repro.initial_adapter --page           # the page alone, from the results
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .cells import all_cells
from .clients import STARTS, clients_of, train
from .measure import QUESTIONS, run
from .page import RESULTS, write_page
from .sources import load


def main() -> None:
    """Run what has not been run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--starts", type=int, default=len(STARTS), help="how many of them")
    parser.add_argument("--page", action="store_true", help="write the page and nothing else")
    options = parser.parse_args()
    starts = STARTS[: options.starts]
    if not options.page:
        torch.set_num_threads(1)
        sources = load(options.data)
        for start in starts:
            train(start, sources)
        run(clients_of(starts), all_cells(starts), RESULTS, list(QUESTIONS))
    write_page()


if __name__ == "__main__":
    main()
