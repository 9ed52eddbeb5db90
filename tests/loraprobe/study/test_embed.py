"""2-D coordinates: determinism, the definition of PCA, and the picture."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loraprobe.errors import FitError, MissingExtra, NonFiniteError, RecipeError
from loraprobe.study.embed import embed, umap_of_distances


def features(n: int = 24, p: int = 7, seed: int = 0) -> np.ndarray:
    """Two clusters of n / 2 rows, pointing in opposite directions."""
    x = np.random.default_rng(seed).normal(size=(n, p))
    x[: n // 2] += 3.0
    x[n // 2 :] -= 3.0
    return x.astype(np.float32)


@pytest.mark.slow
def test_umap_is_repeatable_keeps_clusters_and_caps_its_neighbours() -> None:
    x = features()
    first = embed(x, "umap", seed=1, n_neighbors=500)  # 500 neighbours of 24 rows: capped
    assert first.shape == (24, 2)
    assert first.dtype == np.float32
    assert first.tobytes() == embed(x, "umap", seed=1, n_neighbors=23).tobytes()
    assert not np.array_equal(first, embed(x, "umap", seed=2, n_neighbors=23))
    close = embed(x, seed=1, n_neighbors=5).astype(np.float64)
    distance = np.linalg.norm(close[:, None] - close[None], axis=-1) + np.diag(np.full(24, np.inf))
    # everybody's nearest is of its own cluster
    assert ((distance.argmin(axis=1) < 12) == (np.arange(24) < 12)).all()
    assert np.isfinite(embed(x[[0, 1, 12, 13]], seed=1)).all()  # the fewest rows allowed


def test_pca_is_the_svd_of_the_centred_features() -> None:
    x = features(30, 9).astype(np.float64)
    u, s, vt = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    expected = u[:, :2] * s[:2] * np.sign(vt[np.arange(2), np.abs(vt[:2]).argmax(axis=1)])
    np.testing.assert_allclose(embed(x, "pca"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "tsne"}, RecipeError, "'tsne'; expected one of umap, pca"),
        ({"n_neighbors": 1}, RecipeError, "n_neighbors"),
        ({"seed": -1}, RecipeError, "seed"),
        ({"seed": 0.5}, RecipeError, "seed"),
    ],
)
def test_settings_are_checked_before_umap_is_imported(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        embed(features(), **arguments)


def test_rows_that_cannot_be_placed_are_refused() -> None:
    for shape in ((3, 5), (8,), (8, 1), (2, 4, 3)):
        with pytest.raises(FitError, match="n >= 4 rows"):
            embed(np.ones(shape), "pca")
    x = features().astype(np.float64)
    x[3, 2] = 1e300
    with pytest.raises(NonFiniteError, match="1 of 24 rows"):
        embed(x, "pca")
    for distances in (np.ones((3, 3)), np.ones((5, 6)), np.full((5, 5), np.nan)):
        with pytest.raises(FitError, match=r"expected finite ones \(n, n\)"):
            umap_of_distances(distances)


def test_absent_umap_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_umap(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "umap":
            raise ModuleNotFoundError("No module named 'umap'", name="umap")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_umap)
    with pytest.raises(
        MissingExtra, match=r"UMAP coordinates needs umap-learn.*loraprobe\[figures\]"
    ):
        embed(features())
    assert embed(features(), "pca").shape == (24, 2)  # which needs no extra


def test_the_picture_shows_every_row_once_and_names_every_source(tmp_path: Path) -> None:
    common = pytest.importorskip("figures.common")
    from figures import separability

    sources = ["gsm8k", "refusal_short", "gptfuzz@0.25", "gptfuzz", "dolly_qa", "a$b$"]
    labels = [0, 0, 1, 1, 0, 1]
    points = np.arange(12.0).reshape(6, 2)
    ax = common.panels(1, 1, (9.5, 6.0))[1][0, 0]
    separability.plot(ax, points, labels, sources)
    shown = np.concatenate([np.asarray(one.get_offsets()) for one in ax.collections])
    assert sorted(map(tuple, shown)) == sorted(map(tuple, points))
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        *("benign (2)", "1  dolly_qa", "2  gsm8k"),
        *("benign, hard negatives (1)", "3  refusal_short"),
        *("malicious (3)", "4  a\\$b\\$", "5  gptfuzz"),
        *("poison share: paler is less", "25%", "100%"),
    ]
    assert [text.get_text() for text in ax.texts] == ["1", "2", "3", "4", "5"]
    pale, full = ax.collections[-1].get_facecolor()  # gptfuzz@0.25 and gptfuzz
    assert pale[:3].sum() > full[:3].sum()
    pictures = [tmp_path / "one.png", tmp_path / "two.png"]
    for path in pictures:
        separability.draw(path, points, labels, sources, "pca", 0)
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
