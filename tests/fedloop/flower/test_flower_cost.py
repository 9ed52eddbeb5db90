"""The benchmark of what a round on Flower costs.

Its wire counts, its ways play whole rounds, and its page shows its results.
"""

from __future__ import annotations

from benchmarks.flower import apps as apps
from benchmarks.flower import cost as flower_cost


def test_the_page_shows_the_results_if_there_are_any() -> None:
    text = flower_cost.PAGE.read_text()
    shown = text.partition("by python -m benchmarks.flower.cost -->\n")[2].partition(
        "<!-- end of flower cost -->"
    )[0]
    assert shown == (flower_cost.table() + "\n" if flower_cost.RESULTS.exists() else "")


def test_the_adapter_has_448_tensors_of_the_size_that_the_table_says() -> None:
    tensors = apps.adapter(8).state_dict().values()
    assert len(tensors) == apps.TENSORS == 448
    assert 4 * sum(tensor.numel() for tensor in tensors) == 14_336_000
