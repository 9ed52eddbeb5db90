"""The page of the scoring service in a real browser: a file is chosen, the verdict appears.

Errors are shown as text, and nothing else is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loraprobe.adapters.deltas import weight_delta
from loraprobe.adapters.load import save_adapter
from loraprobe.serve.slices import save_whole
from tests.helpers import chromium, make, probes, serving

pytestmark = [
    pytest.mark.enable_socket,  # on the loopback interface only: to a server that the test starts
    pytest.mark.skipif(
        chromium.executable() is None,
        reason="needs Chromium; the rest of the service is tested without",
    ),
]

TOKEN = "a-token-of-the-tests"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[serving.Service]:
    folder = tmp_path_factory.mktemp("served")
    with serving.running(
        folder / "log", *serving.written(folder).options("paper", "all_b"), "--max-mib", "1"
    ) as running:
        yield running


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Page]:
    with chromium.browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(tab: chromium.Page, service: serving.Service) -> Iterator[chromium.Page]:
    """The page, freshly loaded.

    At the end nothing went wrong in it and nothing was asked of anybody else.
    """
    tab.problems.clear()
    tab.requested.clear()
    tab.open(f"http://127.0.0.1:{service.port}/")
    tab.until("document.querySelector('#served').textContent.includes('2 probes')")
    yield tab
    assert tab.problems == []
    assert [
        url
        for url in tab.requested
        if not url.startswith((f"http://127.0.0.1:{service.port}/", "data:"))
    ] == []


def text(page: chromium.Page, selector: str) -> list[str]:
    """The text of every element that is found and visible."""
    elements = f"[...document.querySelectorAll({json.dumps(selector)})]"
    found: list[str] = page.run(
        f"{elements}.filter((one) => one.checkVisibility()).map((one) => one.innerText)"
    )
    return found


def sent(page: chromium.Page) -> None:
    """Press the button and wait for what comes."""
    page.click("#send")
    page.until(
        "!document.querySelector('#results').hidden || !document.querySelector('#error').hidden"
    )


def folder(path: Path, seed: int = 0, **config: Any) -> list[Path]:
    """The two files of an adapter that PEFT wrote."""
    save_adapter(serving.uploaded(seed), path)
    said = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**said, **config}))
    return [path / "adapter_model.safetensors", path / "adapter_config.json"]


def test_an_adapter_is_dropped_and_its_verdicts_scores_and_spectra_appear(
    page: chromium.Page, tmp_path: Path
) -> None:
    page.choose("#file", *folder(tmp_path / "a"))
    page.until(
        "document.querySelector('#alpha').value === '4' &&"
        " document.querySelector('#base_model').value === 'org/base'"
    )
    sent(page)
    expected = [serving.of_upload(name, serving.uploaded()) for name in ("paper", "all_b")]
    assert text(page, "#error") == []
    assert text(page, ".result h3") == ["paper", "all_b"]
    assert [shown.split()[1] for shown in text(page, ".verdict")] == [
        result.verdict for result in expected
    ]
    assert text(page, ".score") == [f"{result.score:.4f}" for result in expected]
    parts = "[...bar.children].map((one) => parseFloat(one.style.width || one.style.left))"
    shares = page.run(f"[...document.querySelectorAll('.bar')].map((bar) => {parts})")
    assert shares == [
        pytest.approx([100 * result.score, 100 * result.threshold], abs=0.01) for result in expected
    ]
    assert text(page, "figcaption") == [
        make.module(name, layer) for layer in (0, 1) for name in ("q_proj", "v_proj")
    ]
    change = weight_delta(serving.uploaded(), serving.start())
    assert page.run(
        "[...document.querySelectorAll('figure')].map((one) =>"
        " one.querySelectorAll('circle').length)"
    ) == [int((pair.svdvals() > 1e-6 * pair.svdvals()[0]).sum()) for pair in change.values()]
    assert "sha256" in text(page, ".facts")[0]


def test_an_error_is_shown_with_its_type_and_takes_the_place_of_the_verdict(
    page: chromium.Page, tmp_path: Path
) -> None:
    weights, config = folder(tmp_path / "a")
    page.choose("#file", weights, config)
    page.until("document.querySelector('#alpha').value")
    sent(page)
    assert text(page, "#results") != []
    page.type("#alpha", "0")
    sent(page)
    assert text(page, "#results") == text(page, "#spectra") == []
    assert text(page, "#error h2") == ["QueryError"]
    assert text(page, "#error dd") == ["0", "a finite number other than 0"]
    page.type("#alpha", "4")
    sent(page)
    assert text(page, "#error") == []
    assert text(page, ".result h3") == ["paper", "all_b"]


@pytest.mark.parametrize("place", ["base model", "file name", "config", "tensor name"])
def test_what_a_stranger_wrote_is_shown_as_text(
    page: chromium.Page, tmp_path: Path, place: str
) -> None:
    evil = "<img src=x onerror=alert(1)><b>bold</b>"
    weights, config = folder(
        tmp_path / "a", base_model_name_or_path=evil if place == "config" else probes.BASE
    )
    if place == "file name":
        weights = weights.rename(tmp_path / f"{evil.replace('/', '')}.safetensors")
    if place == "tensor name":
        odd = make.with_pairs(serving.uploaded(), {evil: make.pair(r=2)})
        weights.write_bytes(save_whole(odd))
    page.choose("#file", weights, *([] if place == "tensor name" else [config]))
    page.until("!document.querySelector('#send').disabled")
    if place == "base model":
        page.type("#base_model", evil)
    sent(page)
    assert page.run("document.querySelectorAll('main img, main b').length") == 0
    shown = text(page, "#chosen")[0] if place == "file name" else text(page, "#error p")[0]
    assert "<b>bold<" in shown


def test_files_that_are_no_adapter_are_refused_before_they_are_sent(
    page: chromium.Page, tmp_path: Path
) -> None:
    weights, config = folder(tmp_path / "a")
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"")
    page.choose("#file", weights, other)
    page.until("!document.querySelector('#error').hidden")
    assert text(page, "#error h2") == ["TooManyFiles"]
    config.write_text("{")
    page.choose("#file", weights, config)
    page.until("document.querySelector('#error h2')?.textContent === 'ConfigError'")
    config.write_text(json.dumps({"lora_alpha": 4, "alpha_pattern": {"q_proj": 8}}))
    page.choose("#file", weights, config)
    page.until("document.querySelector('#error p')?.textContent.includes('several scalings')")
    assert not any("/v1/score" in url for url in page.requested)


def test_every_field_has_a_name_and_the_button_can_be_reached_by_keyboard(
    page: chromium.Page, tmp_path: Path
) -> None:
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    named = {
        (node["role"]["value"], node["name"]["value"])
        for node in nodes
        if not node["ignored"] and node.get("name", {}).get("value")
    }
    assert {
        ("textbox", "Alpha (lora_alpha)"),
        ("textbox", "Base model"),
        ("combobox", "What the file holds"),
        ("button", "Score"),
    } <= named
    assert any(role == "heading" and name == "Score a LoRA adapter" for role, name in named)
    controls = [
        node
        for node in nodes
        if node.get("role", {}).get("value") in ("textbox", "button", "combobox")
    ]
    assert [node for node in controls if not node["name"]["value"]] == []
    page.choose("#file", *folder(tmp_path / "a"))
    page.until("document.querySelector('#alpha').value")
    page.run("document.querySelector('#file').focus()")
    order = []
    for _ in range(4):
        page.press("Tab")
        order.append(page.run("document.activeElement.id"))
    assert order == ["alpha", "base_model", "kind", "send"]
    page.press("Enter")
    page.until("!document.querySelector('#results').hidden")
    assert page.run("document.activeElement.id") == "results"


@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_narrow_screen_and_can_be_read_in_light_and_dark(
    page: chromium.Page, service: serving.Service, tmp_path: Path, dark: bool
) -> None:
    page.open(f"http://127.0.0.1:{service.port}/", width=400, dark=dark)
    page.choose("#file", *folder(tmp_path / "a"))
    page.until("document.querySelector('#alpha').value")
    sent(page)
    assert page.run("document.documentElement.scrollWidth") == 400
    assert page.run("getComputedStyle(document.body).backgroundColor") == (
        "rgb(17, 20, 27)" if dark else "rgb(245, 246, 249)"
    )
    assert page.run(CONTRAST) >= 4.5


# The least contrast between a text and what is behind it (WCAG 2.2, 1.4.3).
CONTRAST = """
(() => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => {
    const linear = (value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = numbers(colour).map((value) => linear(value / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    const colour = getComputedStyle(node).backgroundColor;
    return numbers(colour)[3] === 0 ? behind(node.parentElement) : colour;
  };
  const words = (child) => child.nodeType === 3 && child.data.trim();
  const texts = [...document.querySelectorAll("main *")].filter(
    (node) => node.checkVisibility() && [...node.childNodes].some(words));
  const contrasts = texts.map((node) => {
    const style = getComputedStyle(node);
    const colour = node instanceof SVGElement ? style.fill : style.color;
    const [a, b] = [light(colour), light(behind(node))];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  });
  return Math.min(...contrasts);
})()
"""


def test_a_service_with_a_token_asks_for_it(tab: chromium.Page, tmp_path: Path) -> None:
    paper = serving.written(tmp_path).probes["paper"]
    path = tmp_path / "delta.safetensors"
    path.write_bytes(save_whole(serving.delta()))
    with serving.running(
        tmp_path / "log", "--probe", str(paper), "--token-env", "THE_TOKEN", THE_TOKEN=TOKEN
    ) as service:
        tab.open(f"http://127.0.0.1:{service.port}/")
        tab.until("!document.querySelector('#token-field').hidden")
        tab.choose("#file", path)
        tab.until("!document.querySelector('#send').disabled")
        tab.run("document.querySelector('#kind').value = 'factor_delta'")
        sent(tab)
        assert text(tab, "#error h2") == ["Unauthorized"]
        tab.type("#token", TOKEN)
        sent(tab)
        assert text(tab, ".score") == [f"{serving.expected('paper', serving.delta()).score:.4f}"]
    tab.click("#send")
    tab.until("document.querySelector('#error h2')?.textContent === 'NoAnswer'")
