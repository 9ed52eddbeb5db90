"""2-D coordinates: determinism, the definition of PCA, the file format under tampering, and the
picture.
"""

from __future__ import annotations

import builtins
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loraprobe.errors import DataError, FitError, MissingExtra, NonFiniteError, RecipeError
from loraprobe.study.embed import (
    Coordinates,
    embed,
    load_coordinates,
    save_coordinates,
    umap_of_distances,
)
from loraprobe.study.picture import draw_embedding, plot_embedding

ROOT = Path(__file__).resolve().parents[3]


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
        ({"metric": "hamming"}, RecipeError, "'hamming'; expected one of cosine"),
        ({"n_neighbors": 1}, RecipeError, "n_neighbors"),
        ({"min_dist": 2.0}, RecipeError, "min_dist"),
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


SOURCES = ["gsm8k", "refusal_short", "gptfuzz@0.25", "gptfuzz", "dolly_qa", "a$b$"]
LABELS = [0, 0, 1, 1, 0, 1]


def saved(path: Path) -> Path:
    save_coordinates(path, np.arange(12.0).reshape(6, 2), LABELS, SOURCES, "pca", 7)
    return path


def test_coordinates_roundtrip(tmp_path: Path) -> None:
    path = saved(tmp_path / "coords.data")  # no .npz is appended
    got = load_coordinates(path)
    assert got.coordinates.tolist() == np.arange(12.0).reshape(6, 2).tolist()
    assert got.coordinates.dtype == np.float32
    assert (got.labels.tolist(), got.sources.tolist(), got.method, got.seed) == (
        LABELS,
        SOURCES,
        "pca",
        7,
    )
    assert path.read_bytes() == saved(tmp_path / "again").read_bytes()


def test_a_flipped_or_missing_byte_is_refused_or_harmless(tmp_path: Path) -> None:
    raw, path, refused = saved(tmp_path / "c.npz").read_bytes(), tmp_path / "bad.npz", 0
    for position in range(0, len(raw), 5):
        path.write_bytes(raw[:position] + bytes([raw[position] ^ 0xFF]) + raw[position + 1 :])
        try:
            got = load_coordinates(path)
        except DataError:
            refused += 1
        else:  # bytes of the zip container that say nothing, such as time stamps
            assert (got.labels.tolist(), got.sources.tolist(), got.method, got.seed) == (
                LABELS,
                SOURCES,
                "pca",
                7,
            )
    assert refused > len(raw) / 10
    for length in range(0, len(raw), 40):
        path.write_bytes(raw[:length])
        with pytest.raises(DataError):
            load_coordinates(path)


class Bomb:
    """Unpickling it would leave a file behind."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def test_pickles_are_refused_and_not_run(tmp_path: Path) -> None:
    bomb, fired = Bomb(tmp_path / "fired"), tmp_path / "fired"
    arrays = dict(np.load(saved(tmp_path / "c.npz")))
    np.savez(tmp_path / "objects.npz", **{**arrays, "sources": np.array([bomb] * 6, dtype=object)})
    np.save(tmp_path / "object.npy", np.array([bomb], dtype=object))
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(bomb))
    for name in ("objects.npz", "object.npy", "plain.pkl"):
        with pytest.raises(DataError, match="cannot read"):
            load_coordinates(tmp_path / name)
    assert not fired.exists()
    pickle.loads((tmp_path / "plain.pkl").read_bytes())
    assert fired.exists()  # negative control: it would have gone off


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coordinates": np.zeros((6, 3), np.float32)}, r"float32 \(6, 3\)"),
        ({"coordinates": np.zeros((6, 2))}, "float64"),
        ({"coordinates": np.zeros((), np.float32)}, r"float32 \(\)"),
        ({"coordinates": np.full((6, 2), np.nan, np.float32)}, "NaN"),
        ({"labels": np.array([0, 1, 2, 0, 1, 0])}, "0 .benign. or 1"),
        ({"labels": np.array([0, 1])}, r"\(2,\)"),
        ({"sources": np.arange(6)}, "expected 6 strings"),
        ({"sources": np.array(["a"])}, r"\(1,\)"),
        ({"method": np.array("tsne")}, "'tsne'"),
        ({"method": np.array(["pca", "umap"])}, "method is not one string"),
        ({"seed": np.array(-3)}, "seed -3"),
        ({"seed": np.array(0.5)}, "seed is not one integer"),
        ({"extra": np.zeros(1)}, "exactly the arrays"),
    ],
)
def test_wrong_contents_are_refused(
    tmp_path: Path, change: dict[str, np.ndarray], message: str
) -> None:
    with np.load(saved(tmp_path / "c.npz")) as file:
        np.savez(tmp_path / "bad.npz", **{**file, **change})
    with pytest.raises(DataError, match=message):
        load_coordinates(tmp_path / "bad.npz")


def test_a_header_that_claims_terabytes_is_refused(tmp_path: Path) -> None:
    with (
        zipfile.ZipFile(saved(tmp_path / "c.npz")) as source,
        zipfile.ZipFile(tmp_path / "bad.npz", "w") as target,
    ):
        for name in source.namelist():
            target.writestr(
                name,
                source.read(name).replace(b"(6, 2), } ", b"(6, 1" + b"0" * 14 + b"), } ")[: 2**20],
            )
    with pytest.raises(DataError):
        load_coordinates(tmp_path / "bad.npz")


def test_missing_file_and_unequal_lengths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        load_coordinates(tmp_path / "nowhere.npz")
    with pytest.raises(FitError, match="6 labels"):
        save_coordinates(tmp_path / "x.npz", np.zeros((6, 2)), [0, 1], SOURCES, "pca", 0)
    assert not (tmp_path / "x.npz").exists()


def drawn(coordinates: Coordinates, **arguments: Any) -> tuple[Any, list[str]]:
    figure = pytest.importorskip("matplotlib.figure").Figure(layout="constrained")
    ax = figure.subplots()
    plot_embedding(ax, coordinates, **arguments)
    return ax, [text.get_text() for text in ax.get_legend().get_texts()]


def test_plot_shows_every_row_once_and_names_every_source(tmp_path: Path) -> None:
    coordinates = load_coordinates(saved(tmp_path / "c.npz"))
    ax, legend = drawn(coordinates)
    points = np.concatenate([np.asarray(collection.get_offsets()) for collection in ax.collections])
    assert sorted(map(tuple, points)) == sorted(map(tuple, coordinates.coordinates))
    assert legend[:6] == [
        "benign (2)",
        "1  dolly_qa",
        "2  gsm8k",
        "benign, hard negatives (1)",
        "3  refusal_short",
        "malicious (3)",
    ]
    assert legend[6:] == ["4  a\\$b\\$", "5  gptfuzz", "poison share: paler is less", "25%", "100%"]
    assert [text.get_text() for text in ax.texts] == ["1", "2", "3", "4", "5"]
    assert all(word in ax.get_title(loc="left") for word in ("PCA", "n = 6", "seed 7"))
    assert "2  gsm8k" not in drawn(coordinates, hard_negatives={"gsm8k"})[1]


def test_poison_share_pales_the_colour_and_must_be_a_share(tmp_path: Path) -> None:
    ax, _ = drawn(load_coordinates(saved(tmp_path / "c.npz")))
    pale, full = ax.collections[-1].get_facecolor()  # gptfuzz@0.25 and gptfuzz
    assert pale[:3].sum() > full[:3].sum()
    assert not np.array_equal(pale, full)
    for share in ("0", "1.5", "nan", "half"):
        save_coordinates(tmp_path / "s.npz", np.zeros((1, 2)), [1], [f"gptfuzz@{share}"], "pca", 0)
        with pytest.raises(FitError, match="poison share"):
            drawn(load_coordinates(tmp_path / "s.npz"))


def test_draw_embedding_writes_the_kind_that_the_name_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    coordinates = load_coordinates(saved(tmp_path / "c.npz"))
    for ending, start in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        draw_embedding(tmp_path / f"out{ending}", coordinates)
        assert (tmp_path / f"out{ending}").read_bytes().startswith(start)
    with pytest.raises(RecipeError, match=r"ends in \.png, \.pdf or \.svg"):
        draw_embedding(tmp_path / "out.jpeg", coordinates)
    for module in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=r"plotting needs matplotlib.*loraprobe\[figures\]"):
        draw_embedding(tmp_path / "out.png", coordinates)


def test_separability_figure_is_written_and_repeatable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(ROOT))
    from figures import separability

    out = tmp_path / "out.png"
    pictures = []
    for _ in range(2):
        separability.main([str(saved(tmp_path / "c.npz")), str(out)])
        pictures.append(out.read_bytes())
    assert pictures[0] == pictures[1]
    assert pictures[0].startswith(b"\x89PNG")
    with pytest.raises(DataError, match=r"ends in \.png"):
        separability.main([str(tmp_path / "c.npz"), str(tmp_path / "out.jpeg")])
