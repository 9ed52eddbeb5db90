"""A report as one HTML file that needs no other, with its numbers as CSV and its figures apart."""

from __future__ import annotations

import base64
import csv
import io
import zipfile
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

from matplotlib.figure import Figure

from .._version import __version__
from ..errors import MissingExtra
from ..outputs import free_path
from .analysis import Analysis, norm_of
from .figures import figures, kind_of, labels

CAPTIONS = {
    "heat_map": "What changed, by layer and module",
    "spectra": "Spectra",
    "layers": "Which layers moved",
    "similarity": "How alike the adapters are",
    "embedding": "The cohort",
}
NOTES = {
    "heat_map": "Frobenius norm of BA with its scaling, and stable rank (Frobenius / spectral)².",
    "spectra": "Singular values of BA relative to the largest of the module.",
    "layers": "Frobenius norm over a layer's modules.",
    "similarity": "Ordered by likeness, each with itself left out; colours end at the 99 % point."
    " Overlap: mean squared cosine of the principal angles.",
    "embedding": "By cosine of the products. No label places a point; distances between islands"
    " mean nothing in UMAP.",
}


def write_report(
    analysis: Analysis, out: Path, figures_to: Path | None = None, *, force: bool = False
) -> list[Path]:
    """Write the page, and with `figures_to` its figures as PNG and PDF and its numbers as CSV.

    Raises:
        OutputError: something is there already, and `force` is False.
        MissingExtra: jinja2 is not installed.
    """
    for place in (out, figures_to):
        if place is not None:
            free_path(place, force, file=place is out)
    drawn = figures(analysis)
    tables = csv_tables(analysis)
    page = render(analysis, drawn, tables)
    out.write_text(page, encoding="utf-8")
    written = [out]
    if figures_to is not None:
        figures_to.mkdir(parents=True, exist_ok=True)
        for name, (figure, _) in drawn.items():
            for suffix in ("png", "pdf"):
                path = figures_to / f"{name}.{suffix}"
                figure.savefig(path, dpi=160)
                written.append(path)
        for name, text in tables.items():
            path = figures_to / f"{name}.csv"
            path.write_text(text, encoding="utf-8")
            written.append(path)
    return written


def render(
    analysis: Analysis, drawn: Mapping[str, tuple[Figure, str]], tables: Mapping[str, str]
) -> str:
    """The page's HTML; every text in it is escaped."""
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtra("jinja2", "figures", "loraprobe report") from error
    template = files("loraprobe.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    pictures = [
        {
            "title": CAPTIONS[name],
            "note": NOTES[name],
            "alt": alt,
            "png": _png(figure),
        }
        for name, (figure, alt) in drawn.items()
    ]
    foreground = analysis.names[: len(analysis.names) - analysis.behind]
    first = ("malicious", "inconclusive")  # of hundreds, what has to be looked at comes first
    shown = labels(analysis.names)
    rows = [{**_row(analysis, name), "name": shown[name]} for name in foreground]
    rows.sort(key=lambda row: [*first, row["kind"]].index(row["kind"]))
    return environment.from_string(template).render(
        version=__version__,
        rows=rows,
        pictures=pictures,
        tables=list(tables),
        archive=base64.b64encode(_zip(tables)).decode(),
        behind=analysis.behind,
        scored=bool(analysis.scores),
        outliers={shown[name]: why for name, why in analysis.outliers.items()},
    )


def csv_tables(analysis: Analysis) -> dict[str, str]:
    """Name -> CSV text: modules, similarity, coordinates."""
    modules = [
        (name, row.module, row.layer, row.leaf, row.norm, row.stable_rank, *row.values[:8])
        for name in analysis.names
        for row in analysis.modules[name]
    ]
    sigmas = [f"sigma_{index}" for index in range(1, 9)]
    tables = {
        "modules": _csv(
            ["adapter", "module", "layer", "leaf", "norm", "stable_rank", *sigmas], modules
        ),
        "adapters": _csv(
            ["adapter", "kind", "score", "outlier"],
            [
                (
                    name,
                    kind_of(analysis, name),
                    analysis.scores.get(name, ""),
                    analysis.outliers.get(name, ""),
                )
                for name in analysis.names
            ],
        ),
    }
    if len(analysis.names) > 1:
        tables["similarity"] = _csv(
            ["adapter", "other", "cosine", "overlap"],
            [
                (first, second, analysis.cosine[i, j], analysis.overlap[i, j])
                for i, first in enumerate(analysis.names)
                for j, second in enumerate(analysis.names[:i])
            ],
        )
    for method, points in analysis.coordinates.items():
        rows = [(name, *point) for name, point in zip(analysis.names, points, strict=True)]
        tables[method.lower()] = _csv(["adapter", "x", "y"], rows)
    return tables


def _row(analysis: Analysis, name: str) -> dict[str, object]:
    modules = analysis.modules[name]
    strongest = max(modules, key=lambda facts: facts.norm)
    mean_rank = sum(facts.stable_rank for facts in modules) / len(modules)
    return {
        "kind": kind_of(analysis, name),
        "score": analysis.scores.get(name),
        "modules": len(modules),
        "norm": norm_of(modules),
        "stable_rank": mean_rank,
        "strongest": strongest.module,
    }


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return base64.b64encode(buffer.getvalue()).decode()


def _zip(tables: Mapping[str, str]) -> bytes:
    """One archive: hundreds of adapters have tens of megabytes of numbers."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in tables.items():
            entry = zipfile.ZipInfo(f"{name}.csv")  # of a fixed date: the same page every time
            archive.writestr(entry, text, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _csv(header: list[str], rows: list[tuple[object, ...]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(
        [f"{cell:.5g}" if isinstance(cell, float) else cell for cell in row] for row in rows
    )
    return buffer.getvalue()
