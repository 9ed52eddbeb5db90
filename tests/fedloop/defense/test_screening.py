"""What is refused of an update before anything trusts it.

Every kind of malformed input has a reason and harms nobody else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedloop.defense.screening import LONGEST_REASON, STEP_TOLERANCE, Screening, check_updates
from fedloop.defense.types import ClientUpdate
from fedloop.errors import EvidenceError
from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.deltas import add_delta
from loraprobe.adapters.layout import Layout, pack
from loraprobe.adapters.load import load_adapter
from loraprobe.adapters.pair import LazyTensor, LoRAPair
from tests.helpers import federated, make, probes

START = make.adapter(r=2, base_model=probes.BASE, seed=77)
LAYOUT = Layout.of(probes.labelled_adapter(0))
FIRST = make.module()
Change = Callable[[ClientUpdate], ClientUpdate]


def check(
    *updates: ClientUpdate,
    start: Adapter | None = START,
    layout: Layout | None = None,
    recipe: str = "all_b",
    **options: Any,
) -> Any:
    """`check_updates` with the probe's featurizer, on trajectories."""
    probe = probes.tiny_probe("linear", recipe)
    arguments = {"trajectory": True, "max_steps": 8, "base_model": probe.base_model, **options}
    return check_updates(updates, Screening(start, layout, probe.featurizer, **arguments))


def good(client: str = "good", seed: int = 1) -> ClientUpdate:
    return federated.update(client, seed, federated.LEVELS["step"])


def replaced(of: Adapter, pair: Any = None, module: str = FIRST, **fields: Any) -> Adapter:
    """The adapter with one pair replaced (None: removed), or with another kind or base model."""
    pairs = (
        {**of, module: pair}
        if pair is not None or fields
        else {name: of[name] for name in of if name != module}
    )
    if fields:
        pairs = dict(of)
    return Adapter(pairs, **{"kind": of.kind, "base_model": of.base_model, **fields})


def poked(of: Adapter, value: float, factor: str = "B") -> Adapter:
    """The adapter with one number of its first module replaced."""
    pair = of[FIRST]
    factors = {"A": pair.A.copy(), "B": pair.B.copy()}
    factors[factor][0, 0] = value
    return replaced(of, LoRAPair(factors["A"], factors["B"], pair.scaling))


def gone() -> torch.Tensor:
    raise OSError("the file is gone")


def adapted(change: Callable[[Adapter], Any]) -> Change:
    """The change to the update's adapter; its steps end in what it sends as far as that can be."""
    return lambda update: replace(update, adapter=change(update.adapter))


def first_step(change: Callable[[Adapter], Any]) -> Change:
    return lambda update: replace(update, steps=(change(update.steps[0]), *update.steps[1:]))


def counted(n: Any) -> Change:
    return lambda update: replace(update, num_examples=n)


# What is wrong with an adapter, as the update itself and as a step of its evidence.
WRONG: dict[str, tuple[Callable[[Adapter], Any], str]] = {
    "NaN": (lambda of: poked(of, math.nan), "NonFiniteError"),
    "infinity": (lambda of: poked(of, -math.inf), "NonFiniteError"),
    "another width": (
        lambda of: replaced(of, LoRAPair(of[FIRST].A, torch.ones(11, 2), 2.0)),
        "LayoutMismatch",
    ),
    "another rank": (lambda of: replaced(of, make.pair(r=3)), "LayoutMismatch"),
    "another scaling": (
        lambda of: replaced(of, LoRAPair(of[FIRST].A, of[FIRST].B, 4.0)),
        "scaling 4",
    ),
    "a module too many": (lambda of: replaced(of, make.pair(r=2), "lm_head"), "first 'lm_head'"),
    "a module too few": (replaced, "lacks 1"),
    "another base model": (
        lambda of: replaced(of, base_model="org/other"),
        "base model 'org/other'",
    ),
    "text": (lambda of: "adapter", "of type str"),
}
COUNTS = (
    (0, "num_examples 0; expected a whole number from 1"),
    (-1, "num_examples -1"),
    (True, "num_examples of type bool"),
    (2.0, "num_examples of type float"),
    ("3", "num_examples of type str"),
    (None, "num_examples of type NoneType"),
    (2**53 + 1, "beyond 2"),
    (-(10**5000), "beyond 2"),
)
MALFORMED: dict[str, tuple[Change, str]] = {
    **{name: (adapted(change), why) for name, (change, why) in WRONG.items()},
    **{f"a step: {name}": (first_step(change), why) for name, (change, why) in WRONG.items()},
    **{f"count {number}": (counted(n), why) for number, (n, why) in enumerate(COUNTS)},
    "infinity in A": (adapted(lambda of: poked(of, math.inf, "A")), "NonFiniteError"),
    "infinite in float32": (
        adapted(lambda of: federated.mapped(of, lambda tensor: tensor.double() * 1e300)),
        "NonFiniteError",
    ),
    "another kind": (adapted(lambda of: replaced(of, kind="weight_delta")), "kind 'weight_delta'"),
    "a step of weights": (first_step(lambda step: replaced(step, kind="weights")), "KindMismatch"),
    "names that are no text": (
        adapted(lambda of: Adapter({1: make.pair(r=2)}, kind=of.kind)),
        "1 modules that are not",
    ),
    "a tensor that cannot be read": (
        adapted(lambda of: replaced(of, LoRAPair(LazyTensor((2, 12), gone), of[FIRST].B, 2.0))),
        "OSError: the file is gone",
    ),
    "no steps but None": (lambda update: replace(update, steps=None), "steps of type NoneType"),
    "too many steps": (
        lambda update: replace(update, steps=update.steps * 3),
        "got 9 steps of evidence; expected at most 8",
    ),
    "another end": (
        lambda update: replace(update, steps=update.steps[:-1]),
        "the last step is not the submitted update",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
@pytest.mark.parametrize("with_start", [True, False])
def test_malformed_updates_are_refused_with_a_reason_and_the_others_are_not(
    case: str, with_start: bool
) -> None:
    change, expected = MALFORMED[case]
    others = [good("a", 2), good("z", 3), good("zz", 4)]
    start = START if with_start else None
    checked, refused = check(*others, change(good("bad", 1)), start=start)
    assert checked.keys() == {"a", "z", "zz"}
    assert list(refused) == ["bad"]
    pattern = "(?s)(" + expected + ")"
    assert re.search(pattern, refused["bad"]), refused["bad"]
    assert len(refused["bad"]) <= LONGEST_REASON
    # negative control: as it was, it passes
    checked, refused = check(*others, good("bad", 1), start=start)
    assert checked.keys() == {"a", "z", "zz", "bad"}
    assert not refused


def test_a_checked_update_is_its_delta_whatever_was_sent() -> None:
    sent = good()
    [one] = check(sent)[0].values()
    assert one.num_examples == 40
    assert [list(step.values()) for step in one.steps] == [
        list(step.values()) for step in sent.steps
    ]
    assert torch.equal(pack(one.delta)[0], pack(sent.adapter)[0])
    as_weights = replace(sent, adapter=add_delta(START, sent.adapter), steps=())
    [other] = check(as_weights)[0].values()
    assert other.delta.kind == "factor_delta"
    assert torch.allclose(pack(other.delta)[0], pack(one.delta)[0], atol=1e-6)


def test_the_last_step_may_be_rounded_and_not_more() -> None:
    sent = good()
    for halved in (torch.bfloat16, torch.float16):
        end = federated.mapped(sent.adapter, lambda tensor, dtype=halved: tensor.to(dtype).float())
        assert check(replace(sent, steps=(*sent.steps[:-1], end)))[0]
    for share, refused in ((0.5, False), (2.0, True)):
        norm = float(
            np.linalg.norm(np.concatenate([pair.B.flatten() for pair in sent.adapter.values()]))
        )
        end = poked(
            sent.adapter, float(sent.adapter[FIRST].B[0, 0]) + share * STEP_TOLERANCE * norm
        )
        assert bool(check(replace(sent, steps=(*sent.steps[:-1], end)))[1]) is refused
    # the probe reads B: what the step says of A is not looked at
    only_a = poked(sent.adapter, 99.0, "A")
    assert not check(replace(sent, steps=(*sent.steps[:-1], only_a)))[1]
    assert check(replace(sent, steps=(*sent.steps[:-1], only_a)), recipe="all_a")[1]


def test_steps_may_hold_only_what_the_probe_reads_but_all_of_that() -> None:
    sent = good()
    fewer = tuple(replaced(step, None, make.module("q_proj", 1)) for step in sent.steps)
    # the paper's recipe reads the first layer
    assert not check(replace(sent, steps=fewer), recipe="paper")[1]
    assert "lacks 1" in check(replace(sent, steps=fewer))[1]["good"]
    assert (
        "3 of the update's 4 modules"
        in check(replace(sent, steps=fewer), recipe="spectral")[1]["good"]
    )
    assert not check(sent, recipe="spectral")[1]


def test_copies_of_an_update_or_of_evidence_are_refused_for_all_who_have_them() -> None:
    one, other, third = good("a", 1), good("b", 2), good("c", 3)
    copy = replace(other, adapter=one.adapter, steps=one.steps)
    checked, refused = check(one, copy, third)
    assert list(checked) == ["c"]
    assert refused["a"] == "copy: the same numbers as the update or evidence of b"
    assert refused["b"] == "copy: the same numbers as the update or evidence of a"
    shadows = replace(other, steps=one.steps)
    assert set(check(one, shadows, third, trajectory=False)[1]) == {"a", "b"}
    nearly = federated.mapped(one.adapter, lambda tensor: tensor * (1 + 1e-6))
    # negative control: a bit is enough to be another's
    assert not check(one, replace(other, adapter=nearly, steps=()), third)[1]


def test_a_refused_update_is_nobodys_original() -> None:
    one = good("a", 1)
    checked, refused = check(one, replace(one, client_id="b", num_examples=0), good("c", 2))
    assert set(checked) == {"a", "c"}
    assert list(refused) == ["b"]


@pytest.mark.parametrize("order", [1, -1])
def test_without_a_start_the_layout_of_most_is_expected_whoever_comes_first(order: int) -> None:
    for case in ("another scaling", "another width", "another kind"):
        updates = [MALFORMED[case][0](good("a", 1)), good("b", 2), good("c", 3)][::order]
        checked, refused = check(*updates, start=None)
        assert set(checked) == {"b", "c"}, case
        assert list(refused) == ["a"]


def test_weights_without_a_start_are_the_callers_mistake_unless_the_others_know_better() -> None:
    as_weights = replace(good("a"), adapter=add_delta(START, good().adapter), steps=())
    with pytest.raises(EvidenceError, match="start="):
        check(as_weights, start=None)
    # one client cannot stop a round of deltas
    assert list(check(as_weights, good("b", 2), start=None)[1]) == ["a"]
    assert list(check(as_weights, start=None, layout=LAYOUT)[1]) == ["a"]
    with pytest.raises(EvidenceError, match="kind 'factor_delta'; expected the round's global"):
        check(good(), start=good().adapter)


def test_an_adapter_read_from_a_folder_is_checked_like_any_other(tmp_path: Path) -> None:
    folders = {}
    for seed, name in enumerate(("whole", "broken")):
        weights = make.tensors(add_delta(START, good(name, seed).adapter))
        if name == "broken":
            weights[next(iter(weights))][0, 0] = math.nan
        folders[name] = make.folder(
            tmp_path / name, weights, r=2, lora_alpha=4, base_model_name_or_path=probes.BASE
        )
    sent = [ClientUpdate(name, 3, load_adapter(folder)) for name, folder in folders.items()]
    checked, refused = check(*sent)
    assert list(checked) == ["whole"]
    assert "NonFiniteError" in refused["broken"]


def test_reasons_are_cut_however_long_a_name_is() -> None:
    long = adapted(lambda of: replaced(of, make.pair(r=2), "m" * 100_000))(good("bad", 1))
    assert len(check(good("a", 2), long)[1]["bad"]) == LONGEST_REASON


def test_without_a_probe_evidence_is_not_read() -> None:
    sent = replace(good(), steps=(poked(good().adapter, math.nan),))
    checked, refused = check_updates([sent], Screening(START))
    assert not refused
    assert checked["good"].steps == ()
