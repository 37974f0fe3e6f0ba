"""The browser example: built, opened in a headless browser, and drawn on with mouse and finger."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fxopt.backends.tvm import Tvm
from fxopt.errors import MissingDependency
from tests.browser import Browser, Server, browser

pytestmark = pytest.mark.slow
Points = list[tuple[float, float]]


def arc(x: float, y: float, width: float, height: float, begin: float, end: float) -> Points:
    """Part of an ellipse, by angles in degrees that grow clockwise from the right."""
    angles = [math.radians(begin + (end - begin) * step / 24) for step in range(25)]
    return [(x + width * math.cos(angle), y + height * math.sin(angle)) for angle in angles]


DIGITS: dict[int, list[Points]] = {
    0: [arc(128, 128, 55, 95, -90, 270)],
    2: [[*arc(128, 80, 55, 50, -170, 40), (75, 220), (190, 220)]],
    3: [[*arc(120, 78, 52, 48, -150, 90), *arc(120, 178, 58, 52, -90, 150)]],
    4: [[(150, 30), (60, 160), (200, 160)], [(155, 100), (155, 230)]],
    5: [[(180, 35), (85, 35), (80, 120), *arc(120, 165, 58, 55, -120, 150)]],
    6: [[*arc(150, 120, 80, 95, -90, -180), *arc(125, 170, 52, 52, 180, 540)]],
    9: [[*arc(128, 85, 48, 50, 0, -360), (176, 90), (165, 225)]],
}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """The page, loaded."""
    try:
        Tvm.require()
    except MissingDependency as error:
        pytest.skip(str(error))
    from examples.browser.build import main

    folder = tmp_path_factory.mktemp("page")
    with browser(seconds=120) as shown:
        main(["--out", str(folder)])
        with Server(folder) as server:
            shown.open(server.url)
            wait(shown, "time")
            yield shown


def wait(shown: Browser, state: str) -> None:
    while shown.evaluate("document.body.dataset.ready") != state:
        time.sleep(0.05)


def text(shown: Browser, name: str) -> str:
    found: str = shown.evaluate(f"document.getElementById({json.dumps(name)}).textContent")
    return found


def canvas(shown: Browser) -> tuple[float, float]:
    box = json.loads(shown.evaluate("JSON.stringify(document.getElementById('canvas').getBoundingClientRect())"))
    return box["x"], box["y"]


def with_mouse(shown: Browser, points: Points) -> None:
    left, top = canvas(shown)
    kinds = ["mousePressed", *["mouseMoved"] * (len(points) - 1), "mouseReleased"]
    for kind, (x, y) in zip(kinds, [*points, points[-1]], strict=True):
        where: dict[str, Any] = {"x": left + x, "y": top + y, "button": "left", "clickCount": 1}
        shown.send("Input.dispatchMouseEvent", type=kind, buttons=int(kind != "mouseReleased"), **where)


def with_finger(shown: Browser, points: Points) -> None:
    left, top = canvas(shown)
    for kind, (x, y) in zip(["touchStart", *["touchMove"] * (len(points) - 1)], points, strict=True):
        shown.send("Input.dispatchTouchEvent", type=kind, touchPoints=[{"x": left + x, "y": top + y}])
    shown.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])


@pytest.mark.parametrize("digit", DIGITS)
@pytest.mark.parametrize("draw", [with_mouse, with_finger])
def test_a_drawn_digit_is_recognised(page: Browser, digit: int, draw: Callable[[Browser, Points], None]) -> None:
    page.send("Emulation.setTouchEmulationEnabled", enabled=draw is with_finger)
    page.evaluate("document.getElementById('clear').click()")
    assert text(page, "prediction") == "?"
    for stroke in DIGITS[digit]:
        draw(page, stroke)
    assert text(page, "prediction") == str(digit)


def test_times_are_shown(page: Browser) -> None:
    build = page.evaluate("import('./model/index.js').then((module) => module.builds()[0])")
    assert f"microseconds (build {build}, one thread)" in text(page, "time")
    assert text(page, "comparison") == "onnxruntime-web is not here; build.py --onnxruntime-web adds it."
