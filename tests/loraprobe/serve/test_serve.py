"""The scoring service as its users meet it: what it answers, and what it refuses to score."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import safetensors.torch

from loraprobe.adapters.adapter import Adapter
from loraprobe.adapters.deltas import weight_delta
from loraprobe.adapters.pair import LoRAPair
from loraprobe.errors import LoraprobeError
from loraprobe.serve.slices import save_slice, save_whole
from loraprobe.serve.upload import content_digest
from tests.helpers import make, probes, serving

pytestmark = pytest.mark.enable_socket  # on the loopback interface only


def test_a_trained_adapter_gets_the_verdict_of_every_probe_that_the_library_gives(
    service: serving.Service,
) -> None:
    scores = set()
    for seed, malicious in ((0, True), (1, False), (2, True)):
        adapter = serving.uploaded(seed, malicious)
        body = safetensors.torch.save(make.tensors(adapter), {"format": "pt"})  # as PEFT writes it
        answer = service.score(body, f"alpha={serving.ALPHA}&base_model={probes.BASE}")
        assert answer.status == 200, answer
        assert set(answer.body) == {"results", "sha256", "seconds", "spectra"}
        assert answer.body["results"] == [
            serving.shown(serving.of_upload(name, adapter)) for name in serving.served_probes()
        ]
        assert answer.body["sha256"] == hashlib.sha256(body).hexdigest()
        assert 0 < answer.body["seconds"] < 30
        scores |= {result["score"] for result in answer.body["results"]}
    assert len(scores) == 12  # the verdicts are about the adapter and the probe


@pytest.mark.parametrize("name", ["paper", "all_b"])
def test_a_slice_gets_the_verdict_of_the_whole_delta(service: serving.Service, name: str) -> None:
    delta = serving.delta(3)
    body = save_slice(serving.served_probes()[name].featurizer, delta)
    answer = service.score(body, f"probe={name}&kind=factor_delta")
    wanted = serving.expected(name, delta, "config", "other_modules", "start")
    assert answer.body["results"] == [serving.shown(wanted)]
    # the request says weights, which is the default
    assert service.score(body, f"probe={name}").error == "KindMismatch"
    assert service.score(body, "probe=spectral&kind=factor_delta").error == "RecipeError"
    # not the slice of all of them
    assert service.score(body, "kind=factor_delta").error in ("LayoutMismatch", "RecipeError")


def test_one_probe_that_cannot_score_fails_the_request_and_is_named(
    service: serving.Service,
) -> None:
    answer = service.score(save_whole(serving.delta()), "kind=factor_delta")
    assert (answer.status, answer.error) == (422, "KindMismatch")
    assert "probe 'of_weights': " in answer.body["error"]["message"]


def test_a_blank_adapter_is_inconclusive_with_a_reason(service: serving.Service) -> None:
    [result] = service.score(save_whole(serving.start()), "probe=paper").body["results"]
    assert (result["verdict"], result["reason"]) == (
        "inconclusive",
        "nothing that the probe reads has changed",
    )


def test_spectra_are_those_of_the_change_since_the_start(service: serving.Service) -> None:
    adapter = serving.uploaded()
    shown = service.score(save_whole(adapter), "probe=paper&spectra=true").body["spectra"]
    assert (shown["of"], shown["modules"]) == ("weight_delta", 4)
    change = weight_delta(adapter, serving.start())
    assert [row["module"] for row in shown["rows"]] == list(change)
    for row in shown["rows"]:
        assert row["matrix"] == "BA"
        assert row["values"] == pytest.approx(change[row["module"]].svdvals().tolist(), rel=1e-5)
    weights = service.score(save_whole(adapter), "probe=of_weights&spectra=true").body["spectra"]
    assert weights["of"] == "weights"  # no delta was asked for
    assert weights["rows"][0]["values"] == pytest.approx(
        adapter[weights["rows"][0]["module"]].svdvals().tolist(), rel=1e-5
    )


def test_the_probes_are_described_with_the_slices_they_read(service: serving.Service) -> None:
    described = {probe["name"]: probe for probe in service.ask("GET", "/v1/probes").body["probes"]}
    assert list(described) == list(serving.served_probes())
    paper = described["paper"]
    assert (paper["kind"], paper["base_model"], paper["threshold"], paper["head"]) == (
        "factor_delta",
        probes.BASE,
        0.8,
        "linear",
    )
    assert paper["slice"] == [
        [make.module(name), "B", f"base_model.model.{make.module(name)}.lora_B.weight"]
        for name in ("q_proj", "v_proj")
    ]
    assert described["spectral"]["slice"] is None
    assert described["of_weights"]["kind"] == "weights"


def test_the_documentation_names_every_parameter_answer_and_error(service: serving.Service) -> None:
    document = service.ask("GET", "/openapi.json").body
    assert set(document["paths"]) == {"/v1/score", "/v1/probes", "/healthz", "/metrics"}
    route = document["paths"]["/v1/score"]["post"]
    names = ["probe", "kind", "alpha", "base_model", "spectra", "Content-Digest"]
    assert [parameter["name"] for parameter in route["parameters"]] == names
    refused = {400, 401, 403, 408, 413, 415, 421, 422, 429, 431, 500, 503}
    assert set(route["responses"]) == {"200", *map(str, refused)}
    schemas = document["components"]["schemas"]
    answer = service.score(save_whole(serving.uploaded()), "spectra=true").body
    assert set(schemas["Answer"]["properties"]) == set(answer)
    assert set(schemas["Result"]["properties"]) == set(answer["results"][0])
    assert set(schemas["Spectra"]["properties"]) == set(answer["spectra"])
    assert list(route["requestBody"]["content"]) == ["application/octet-stream"]


QUERIES = {
    "probe=nope": "UnknownProbe",
    "probe=": "UnknownProbe",
    "probes=paper": "QueryError",
    "probe=paper&probe=paper": "QueryError",
    "probe": "UnknownProbe",
    "kind=delta": "QueryError",
    "kind=factor_delta": "KindMismatch",  # the file says weights
    "kind=weight_delta": "KindMismatch",
    "alpha=4": "AdapterFormatError",  # the file holds its scalings
    "alpha=0": "QueryError",
    "alpha=nan": "QueryError",
    "alpha=x": "QueryError",
    "spectra=perhaps": "QueryError",
    "base_model=": "QueryError",
    "base_model=org%2Fother": "BaseModelMismatch",
    "base_model=%0A": "QueryError",
    "&".join(f"p{number}=1" for number in range(30)): "QueryError",
}


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_that_is_not_understood_is_refused(service: serving.Service, query: str) -> None:
    answer = service.score(save_whole(serving.uploaded()), query)
    assert (answer.status, answer.error) == (422, QUERIES[query])


def nan(adapter: Adapter) -> Adapter:
    """The adapter with a B that is no number."""
    return make.with_pairs(
        adapter,
        {
            name: LoRAPair(pair.A, float("nan") * pair.B, pair.scaling)
            for name, pair in adapter.items()
        },
    )


BODIES: dict[str, tuple[Any, str]] = {
    "NaN": (lambda: nan(serving.uploaded()), "NonFiniteError"),
    "another rank": (lambda: make.adapter(r=3, base_model=probes.BASE), "LayoutMismatch"),
    "another model": (
        lambda: make.adapter(
            r=2, dims={"q_proj": (20, 24), "v_proj": (6, 24)}, base_model=probes.BASE
        ),
        "LayoutMismatch",
    ),
    "another base": (lambda: make.adapter(r=2, base_model="org/other"), "BaseModelMismatch"),
    "a layer more": (lambda: make.adapter(r=2, layers=3, base_model=probes.BASE), "LayoutMismatch"),
    "a layer less": (lambda: make.adapter(r=2, layers=1, base_model=probes.BASE), "LayoutMismatch"),
    "another scaling": (
        lambda: make.adapter(r=2, scaling=1.0, base_model=probes.BASE),
        "LayoutMismatch",
    ),
}


@pytest.mark.parametrize("name", BODIES)
def test_an_adapter_that_cannot_be_scored_is_an_error_of_the_librarys_type(
    service: serving.Service, name: str
) -> None:
    make_adapter, error = BODIES[name]
    answer = service.score(save_whole(make_adapter()))
    assert (answer.status, answer.error) == (422, error)
    with pytest.raises(LoraprobeError) as caught:
        service.client().score(make_adapter())
    assert type(caught.value).__name__ == error
    assert str(caught.value) == answer.body["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status", "error"),
    [
        ("GET", "/v1/scores", 404, "NotFound"),
        ("GET", "/v1/score/", 404, "NotFound"),
        ("POST", "//v1/score", 404, "NotFound"),
        ("GET", "/docs", 404, "NotFound"),
        ("GET", "/v1/score", 405, "MethodNotAllowed"),
        ("DELETE", "/healthz", 405, "MethodNotAllowed"),
        ("POST", "/metrics", 405, "MethodNotAllowed"),
    ],
)
def test_a_path_or_method_that_is_not_there_is_a_typed_error(
    service: serving.Service, method: str, path: str, status: int, error: str
) -> None:
    answer = service.ask(method, path)
    assert (answer.status, answer.error) == (status, error)
    assert ("allow" in answer.headers) == (status == 405)


def test_a_digest_must_be_that_of_the_body(service: serving.Service) -> None:
    body = save_whole(serving.uploaded())
    right = content_digest(body)
    assert service.score(body, content_digest=right).status == 200
    assert service.score(body, content_digest=f"sha-512=:AAAA:, {right}").status == 200
    wrong = service.score(body, content_digest=content_digest(body + b"x"))
    assert (wrong.status, wrong.error) == (422, "DigestMismatch")
    assert wrong.body["error"]["got"] == hashlib.sha256(body).hexdigest()
    for bad in (
        "",
        "sha-256=:AAAA:",
        "sha-256=abc",
        "md5=:AAAA:",
        right[:-1],
        f"{right}, {right}",
        right.replace("=:", "=:*", 1),
        f"{right};",
    ):
        answer = service.score(body, content_digest=bad)
        assert (answer.status, answer.error) == (400, "BadDigest"), bad
