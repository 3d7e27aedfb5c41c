"""Samples in a web page: what a modality exhibits, as the parts of one HTML template.

``gendiff report`` puts them into its file, ``gendiff demo`` into its page. Views in space are
Plotly's.
"""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from gendiff.errors import ConfigError
from gendiff.modality import Exhibit, Picture, Scene, Sound

SMALL = 64  # pixels: pictures up to this side are enlarged without blur


def plotly(extra: str) -> str:
    """The source of plotly.js, which the Python package brings along.

    Args:
        extra: The extra of gendiff that has all that is needed here.

    Raises:
        ConfigError: That extra is not installed.
    """
    try:
        import jinja2  # noqa: F401
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise missing(extra, error) from None
    source: str = get_plotlyjs()
    return source


def missing(extra: str, error: ImportError) -> ConfigError:
    """What is said where a package of an extra cannot be imported."""
    package = str(error.name).partition(".")[0]
    return ConfigError(f"{package} is not installed. pip install 'gendiff[{extra}]'")


def render(template: str, plotly: str, **values: Any) -> str:
    """A page of ``gendiff/templates`` with its style and scripts inside."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("gendiff"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    source = files("gendiff") / "templates"
    return environment.get_template(template).render(
        # Our own files and the package's, not to be escaped: a <script> is no HTML inside.
        style=Markup((source / "report.css").read_text(encoding="utf-8")),
        script=Markup((source / "report.js").read_text(encoding="utf-8")),
        plotly=Markup(plotly),
        **values,
    )


def gallery(exhibits: Sequence[Exhibit], plotly: str) -> str:
    """A page of samples alone, for a frame, whose height it sets."""
    scenes: list[Any] = []
    shown = [exhibit(one, scenes) for one in exhibits]
    return render(
        "gallery.html",
        plotly=plotly if scenes else "",  # it is megabytes
        exhibits=shown,
        data=finite({"scenes": scenes}),
    )


def exhibit(one: Exhibit, scenes: list[Any]) -> dict[str, Any]:
    """An exhibit's parts by their kinds."""
    pictures, sounds, scene = [], [], None
    for part in one.parts:
        if isinstance(part, Sound):
            sounds.append(uri("audio/wav", part.wav))
        elif isinstance(part, Scene):
            scene = len(scenes)
            scenes.append(_scene(part))
            pictures.append(picture(part.still))
        elif is_png(part.png):
            pictures.append(picture(part))
    return {
        "title": one.title,
        "notes": [note for note in one.notes if note],
        "pictures": pictures,
        "sounds": sounds,
        "scene": scene,
    }


def _scene(scene: Scene) -> dict[str, Any]:
    def rounded(*values: float) -> list[float]:
        return [round(value, 3) for value in values]

    return {
        "balls": [[*rounded(*b.centre, b.radius), b.colour] for b in scene.balls],
        "sticks": [[*rounded(*s.start, *s.end, s.radius), s.colour] for s in scene.sticks],
    }


def is_png(content: bytes) -> bool:
    """Whether a picture can be shown: a plugin may draw what is none."""
    return content.startswith(b"\x89PNG\r\n\x1a\n") and len(content) > 24


def picture(part: Picture) -> dict[str, Any]:
    """A picture as the templates want it."""
    width, height = struct.unpack(">II", part.png[16:24])
    kinds = {"pixels": max(width, height) <= SMALL, "drawing": part.drawing}
    return {
        "uri": uri("image/png", part.png),
        "width": width,
        "height": height,
        "kinds": " ".join(kind for kind, holds in kinds.items() if holds),
    }


def uri(kind: str, content: bytes) -> str:
    """A data URI."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def finite(value: Any) -> Any:
    """JSON knows neither infinity nor NaN: None stands for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return value
