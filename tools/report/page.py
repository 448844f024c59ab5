"""Fills the HTML templates. Each page is one file that opens offline."""

import base64
import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from pipeline.errors import safe_lines
from pipeline.images import load_rgb
from tools.report.parts import PICTURES, RESULTS
from train.run.provenance import write_bytes

PICTURE_WIDTH = 1800
"""Pixels; wider pictures are scaled down."""


class Table(NamedTuple):
    """A table. The first cell of each row is its heading."""

    head: Sequence[str]
    rows: Sequence[Sequence[Any]]


def render(template: str, **values: Any) -> str:
    """A page. Every value is escaped, except where the template marks it as `safe`."""
    return _TEMPLATES.get_template(template).render(values)


def write_page(path: Path, text: str) -> None:
    """Write a page and report its size."""
    content = text.encode(errors="replace")  # half a surrogate pair in a name
    write_bytes(path, content)
    print(f"wrote {path} ({len(content) / 1e3:,.0f} kB)")


def picture(path: Path) -> tuple[int, int, str]:
    """A picture as WebP: (width, height, content in base64). Raises UserError."""
    image = Image.fromarray(load_rgb(path))
    image.thumbnail((PICTURE_WIDTH, 10 * PICTURE_WIDTH), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=82)
    return image.width, image.height, base64.b64encode(stream.getvalue()).decode()


def share(values: Sequence[float]) -> str:
    """The mean in percent, ± the standard deviation over the seeds: 40.0% ± 1.2"""
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1%}{deviation}"


def width(values: Sequence[float]) -> str:
    """The mean in percent, as the width of a bar."""
    return f"{statistics.mean(values):.1%}"


_TEMPLATES = Environment(
    loader=PackageLoader(__package__),
    autoescape=True,
    finalize=lambda value: safe_lines(value) if type(value) is str else value,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters |= {"share": share, "width": width}
_TEMPLATES.globals["titles"] = {part.name: part.title for part in (*RESULTS, *PICTURES)}
