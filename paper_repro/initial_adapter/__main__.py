"""Train the clients, measure every cell, write the page.

python -m paper_repro.initial_adapter                  # an hour of one core; goes on if cut off
python -m paper_repro.initial_adapter --page           # the page alone, from the results
"""

from __future__ import annotations

import torch

from zoo.program import documented

from .cells import all_cells
from .clients import STARTS, clients_of, train
from .measure import QUESTIONS, run
from .page import RESULTS, write_page
from .sources import load


def main() -> None:
    """Run what has not been run."""
    parser = documented(__doc__, "data")
    parser.add_argument("--page", action="store_true", help="write the page and nothing else")
    options = parser.parse_args()
    if not options.page:
        torch.set_num_threads(1)
        sources = load(options.data)
        for start in STARTS:
            train(start, sources)
        run(clients_of(STARTS), all_cells(STARTS), RESULTS, list(QUESTIONS))
    write_page()


if __name__ == "__main__":
    main()
