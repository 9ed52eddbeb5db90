"""An experiment's file.

Every wrong field is named with what it got and what is valid, before anything runs.
"""

from __future__ import annotations

import copy
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from fedloop.config import Config
from fedloop.defense.levels import LEVELS
from fedloop.errors import ConfigError
from fedloop.example import example_config
from fedloop.run.identity import plain_config

VALID: dict[str, Any] = {
    "name": "one",
    "rounds": 3,
    "model": {"base": "org/base"},
    "lora": {},
    "training": {},
    "clients": {"benign": ["builtin:benign"], "malicious_source": "builtin:malicious"},
    "defense": {"level": "cumulative", "probe": "org/probe"},
    "aggregation": {},
    "evaluation": {},
    "output": {},
}


def changed(field: str, value: Any) -> dict[str, Any]:
    """The valid configuration with one field, "table.field", set."""
    values = copy.deepcopy(VALID)
    table, _, name = field.rpartition(".")
    (values[table] if table else values)[name] = value
    return values


def message(values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        Config.of(values)
    return str(caught.value)


INF, NAN = float("inf"), float("nan")
HARD_NEGATIVES = {"hard_negative_source": "builtin:refusals"}
INTEGER = "valid integer|greater than or equal to"
NUMBER = "valid number|greater than|less than|finite number"
# Field, wrong values, what the message says is valid.
WRONG: list[tuple[str, list[Any], str]] = [
    ("name", [3, None, ["x"]], "valid string"),
    ("seed", [-1, True, "1", 1.5, None], INTEGER),
    ("rounds", [0, -3, True, "3", 2.0, None], INTEGER),
    ("model", [None, "org/base", []], "valid dictionary"),
    ("model.base", [None, 3, ["x"]], "valid string"),
    ("model.name", [3], "valid string"),
    ("model.revision", [1.0], "valid string"),
    ("model.dtype", ["float64", "fp16", None, 16], "'float32', 'float16' or 'bfloat16'"),
    ("model.quantization", ["2bit", None, True], "'none', '8bit' or '4bit'"),
    ("model.template", ["llama", None], "'alpaca', 'chat' or 'auto'"),
    ("lora.r", [0, "8", True, 2.5], INTEGER),
    ("lora.alpha", [0, -1, INF, NAN, "16", True], NUMBER),
    ("lora.dropout", [1, 1.5, -0.1, NAN, "0.1"], NUMBER),
    ("lora.target_modules", [[], "q_proj", [3]], "at least 1|valid tuple|valid string"),
    ("lora.seed", [-1, True], INTEGER),
    ("training.lr", [0, -1e-3, INF, NAN, "5e-5", True, None], NUMBER),
    ("training.min_lr", [-1e-9, INF], NUMBER),
    ("training.schedule", ["linear", None], "'cosine' or 'constant'"),
    ("training.steps", [0, True, 1.0], INTEGER),
    ("training.batch_size", [0, "16"], INTEGER),
    ("training.max_length", [3, True], INTEGER),
    ("training.max_grad_norm", [0, INF], NUMBER),
    ("training.shadow_lr", [0, "x"], NUMBER),
    ("training.shadow_examples", [0], NUMBER),
    ("training.proximal", [-1, NAN], NUMBER),
    ("clients.count", [0, "10"], INTEGER),
    ("clients.sampled", [0, True], INTEGER),
    ("clients.examples", [0], NUMBER),
    ("clients.benign", [[], "builtin:benign", [3]], "at least 1|valid tuple|valid string"),
    (
        "clients.benign",
        [["builtin:unknown"], ["/no/such/file.jsonl"], ["hub:unknown"]],
        "expected one of builtin:",
    ),
    (
        "clients.partition",
        ["random", None],
        "'iid', 'dirichlet', 'mixtures', 'by_source' or 'by_column'",
    ),
    ("clients.column", [3], "valid string"),
    ("clients.alpha", [0, INF], NUMBER),
    ("clients.malicious", [-1, True], INTEGER),
    ("clients.malicious_source", ["builtin:unknown", "nowhere"], "expected one of builtin:"),
    ("clients.poison_share", [0, 1.01, -1, NAN, True], NUMBER),
    ("clients.hard_negatives", [-1], NUMBER),
    ("clients.hard_negative_source", ["builtin:unknown"], "expected one of builtin:"),
    ("clients.trigger", ["", 3], "at least 1 character|valid string"),
    ("clients.evade_probe", [NAN, INF, "4"], NUMBER),
    ("clients.attack_from", [0, 1.5, True], INTEGER),
    ("clients.update_attack", ["bend", 3], "sign_flip, scaling, gaussian|valid string"),
    ("clients.update_attack_options", [3, ["x"]], "valid dictionary"),
    (
        "defense.level",
        ["steps", "", None, 3],
        "none, step, client, shadow, evidence, cumulative|valid string",
    ),
    ("defense.probe", [3], "valid string"),
    ("defense.probe_revision", [3], "valid string"),
    (
        "defense.threshold",
        [0, 1, 1.5, -0.1, NAN, True, "own", [0.5]],
        r"a number in \(0, 1\), or 'probe'",
    ),
    ("defense.options", [None, "x"], "valid dictionary"),
    ("defense.min_mean_factor", [-0.1, 1.1, NAN, "0.2"], NUMBER),
    ("defense.max_count_ratio", [0.5, INF, True], NUMBER),
    ("defense.max_norm_ratio", [0.5, INF, True], NUMBER),
    ("defense.forget_after", [0, True], INTEGER),
    ("defense.probation", [-1, True], INTEGER),
    ("defense.newcomer_share", [-0.1, 1.0, True], NUMBER),
    ("defense.score_aggregate", [1, "yes"], "valid boolean"),
    ("defense.behaviour", [3], "valid string"),
    ("defense.behaviour_cut", [INF, NAN, True], NUMBER),
    ("aggregation.rule", ["average", None], "mean, median, trimmed_mean|valid string"),
    ("aggregation.options", [None, 3], "valid dictionary"),
    (
        "aggregation.server",
        ["adam", None],
        "fedavg, fedprox, scaffold, fedavgm, fedadagrad, fedyogi, fedadam|valid string",
    ),
    ("aggregation.server_options", [3], "valid dictionary"),
    ("aggregation.rejected", ["kept", None], "'left_out' or 'no_change'"),
    ("aggregation.lora", ["product", None], "factors, exact, frozen_a|valid string"),
    ("evaluation.harmful", ["builtin:unknown", 3], "expected one of builtin:|valid string"),
    ("evaluation.safe", ["nowhere"], "expected one of builtin:"),
    ("evaluation.utility", ["nowhere"], "expected one of builtin:"),
    ("evaluation.judge", [3, ["x"]], "valid string"),
    ("evaluation.reward_model", [True], "valid string"),
    ("evaluation.every", [-1, True], INTEGER),
    ("evaluation.limit", [0], NUMBER),
    ("evaluation.max_new_tokens", [0], NUMBER),
    ("evaluation.temperature", [-0.1, "warm"], NUMBER),
    ("evaluation.batch_size", [0], NUMBER),
    ("evaluation.best", [3], "valid string"),
    ("evaluation.patience", [0, True], INTEGER),
    ("output.folder", [3], "valid string"),
    ("output.keep", [0, True, None], INTEGER),
    ("output.mlflow", [3], "valid string"),
    ("output.wandb", [True], "valid string"),
    ("output.tensorboard", ["perhaps", None], "valid boolean"),
]


@pytest.mark.parametrize(
    ("field", "values", "valid"), WRONG, ids=[f"{row[0]} {row[1][0]}" for row in WRONG]
)
def test_every_wrong_value_is_named_with_what_was_got_and_what_is_valid(
    field: str, values: list[Any], valid: str
) -> None:
    for value in values:
        lines = message(changed(field, value)).splitlines()
        assert lines[0] == "the configuration is not valid:"
        for line in lines[1:]:
            assert line.startswith((f"  {field}:", f"  {field}.")), line
            assert re.search(valid, line), line
            assert "got " in line, line


@pytest.mark.parametrize(
    "table",
    ["", "model", "lora", "training", "clients", "defense", "aggregation", "evaluation", "output"],
)
def test_an_unknown_field_is_answered_with_the_valid_ones_of_its_table(table: str) -> None:
    field = f"{table}.learning_rate" if table else "learning_rate"
    line = message(changed(field, 1)).splitlines()[1]
    valid = (
        list(Config.model_fields[table].annotation.model_fields)
        if table
        else list(Config.model_fields)
    )
    assert line == f"  {field}: unknown field; expected one of {', '.join(valid)}"


def test_all_wrong_fields_are_named_at_once() -> None:
    values = changed("rounds", 0) | {"training": {"lr": -1, "speed": 3}, "model": {}}
    assert [
        line.split(":")[0].strip() for line in message(values).splitlines()[1:]
    ] == "rounds model.base training.lr training.speed".split()
    for got in ([], "x", None, 3):
        assert re.search("the file: .*valid dictionary", message(got))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"clients": {"malicious": 3, "malicious_source": None}}, "malicious_source is missing"),
        ({"clients": {"hard_negatives": 1}}, "hard_negative_source is missing"),
        ({"clients": {"trigger": "|x|"}}, "got trigger without malicious clients"),
        ({"clients": {"attack_from": 2}}, "got attack_from without malicious clients"),
        ({"clients": {"malicious": 11}}, "got 11 malicious and 0 hard-negative of 10 clients"),
        (
            {"clients": {"malicious": 6, "hard_negatives": 5, **HARD_NEGATIVES}},
            "got 6 malicious and 5 hard-negative",
        ),
        ({"clients": {"sampled": 11}}, "got sampled 11 of 10"),
        ({"clients": {"partition": "by_column"}}, "column is missing"),
        ({"clients": {"update_attack_options": {"z": 1}}}, "without an update_attack"),
        ({"defense": {"probe": None}}, "probe is missing; level 'cumulative' needs"),
        *(
            (
                {"defense": {"level": "none", "probe": None, name: value}},
                f"got {name} {value!r} for level 'none'; expected no {name}",
            )
            for name, value in (
                ("probe", "org/probe"),
                ("options", {"decay": 1}),
                ("threshold", 0.5),
                ("score_aggregate", True),
            )
        ),
        *(
            ({"clients": {"update_attack": attack, **clients}}, expected)
            for attack, clients, expected in (
                ("ipm", {}, "got update_attack without malicious clients"),
                ("ipm", {"malicious": 10}, "no round of attackers and honest clients"),
                ("ipm", {"malicious": 5, "sampled": 1}, "no round of attackers and"),
                ("collusion", {"malicious": 1}, "1 attacker; expected at least 2"),
                ("collusion", {"malicious": 5, "sampled": 3}, "updates that are all equal"),
                ("alie", {"malicious": 6}, "6 attackers among 10 clients"),
            )
        ),
        (
            {"defense": {"options": {"cut": 1}}},
            "no option 'cut'; expected any of threshold, shrink",
        ),
        ({"defense": {"options": {"shrink": -1}}}, "CumulativeLevel.shrink: got -1; expected"),
        ({"defense": {"options": {"threshold": 1.0}}}, "CumulativeLevel.threshold: got 1.0"),
        (
            {"aggregation": {"lora": "exact", "rule": "median"}},
            "weighted mean of products; got rule 'median'",
        ),
        ({"aggregation": {"lora": "exact", "rejected": "no_change"}}, "got lora 'exact' with"),
        ({"aggregation": {"lora": "exact", "server": "fedadam"}}, "server 'fedadam'"),
        ({"aggregation": {"lora": "exact", "server_options": {"lr": 0.5}}}, "without options"),
        (
            {"aggregation": {"lora": "exact"}, "model": {"quantization": "8bit"}},
            "got model.quantization '8bit', expected 'none'",
        ),
    ],
)
def test_fields_that_do_not_fit_together_are_refused(
    changes: dict[str, Any], expected: str
) -> None:
    values = copy.deepcopy(VALID)
    for table, fields in changes.items():
        values[table] |= fields
    assert re.search(expected, message(values))


@pytest.mark.parametrize("attack", ["collusion", "alie", "mimic", "probe_evasion"])
def test_an_attack_that_some_round_can_have_is_taken(attack: str) -> None:
    clients = {"malicious": 6, "sampled": 5, "update_attack": attack}
    assert Config.of(VALID | {"clients": VALID["clients"] | clients}).clients.make_attack()


def test_what_is_valid_is_taken_as_it_is() -> None:
    config = Config.of(VALID)
    assert (config.rounds, config.training.steps, config.lora.dropout) == (3, 10, 0.05)
    taken = {
        "training.lr": 1,
        "lora.alpha": 16,
        "clients.sampled": 10,
        "defense.max_count_ratio": None,
        "defense.threshold": "probe",
        "clients.poison_share": 0.1,
        "evaluation.harmful": "builtin:harmful_prompts",
        "aggregation.options": {"f": 0},
        "clients.benign": ["builtin:benign/facts", "builtin:refusals"],
    }
    for field, value in taken.items():
        table, _, name = field.partition(".")
        got = getattr(getattr(Config.of(changed(field, value)), table), name)
        assert (list(got) if isinstance(got, tuple) else got) == value


def test_the_threshold_is_the_levels_the_probes_or_a_number() -> None:
    def fields(**values: Any) -> Any:
        return Config.of(
            {**VALID, "defense": {"level": "cumulative", "probe": "p", **values}}
        ).defense.level_fields(0.37)

    assert fields() == {}
    assert fields(threshold="probe") == {"threshold": 0.37}
    assert fields(threshold=0.6, options={"shrink": 0}) == {"threshold": 0.6, "shrink": 0}


def test_what_decides_a_run_is_everything_but_name_and_output(tmp_path: Path) -> None:
    same = plain_config(Config.of(VALID))
    assert plain_config(Config.of(changed("name", "two"))) == same
    assert plain_config(Config.of(changed("output.folder", str(tmp_path)))) == same
    assert plain_config(Config.of(changed("output.tensorboard", True))) == same
    others: dict[str, Any] = {"seed": 1, "rounds": 4, "model.base": "b", "lora.seed": 1}
    others |= {"model.dtype": "float16", "training.lr": 1e-3, "clients.count": 9}
    others |= {"defense.threshold": 0.5, "defense.options": {"shrink": 0}, "evaluation.every": 1}
    found = [plain_config(Config.of(changed(field, value))) for field, value in others.items()]
    assert all(one != same for one in found)
    # As it is read back from a run's folder.
    assert plain_config(Config.of(Config.of(VALID).model_dump(mode="json"))) == same


def test_the_example_is_valid_and_uses_what_its_comments_name() -> None:
    text = example_config()
    config = Config.of(tomllib.loads(text))
    assert Path(config.model.base, "config.json").is_file()
    assert Path(str(config.defense.probe), "config.json").is_file()
    assert config.defense.level in LEVELS
    listed = re.search(r'level = "\w+" +# (.*)', text)
    assert listed is not None
    assert listed[1].split(", ") == ["none", *LEVELS]


def test_every_field_has_wrong_values_in_the_table_above() -> None:
    sections = {name: field.annotation for name, field in Config.model_fields.items()}
    expected = {
        f"{name}.{field}" if field else name
        for name, kind in sections.items()
        for field in getattr(kind, "model_fields", [""])
    }
    assert {field for field, _, _ in WRONG} - {"model"} == expected


@pytest.mark.parametrize(
    ("defense", "level"),
    [
        ({}, "none"),
        ({"probe": "org/probe"}, "cumulative"),
        ({"probe": "p", "level": "step"}, "step"),
    ],
)
def test_a_probe_is_used_unless_another_level_is_named(defense: dict[str, Any], level: str) -> None:
    assert Config.of({**VALID, "defense": defense}).defense.level == level
