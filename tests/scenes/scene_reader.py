"""Reads a scenes caption back into claims and checks them on a scene; shares no table or rule with the generator."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable

from clipdistill.scenes.world import Scene, Thing

SHAPES = {
    **{"circle": "circle", "disc": "circle", "square": "square", "triangle": "triangle", "diamond": "diamond"},
    **{"rhombus": "diamond", "star": "star", "heart": "heart", "cross": "cross", "plus": "cross", "ring": "ring"},
    **{"hoop": "ring", "crescent": "crescent", "moon": "crescent", "arrow": "arrow", "hexagon": "hexagon"},
    **{"semicircle": "semicircle", "half circle": "semicircle"},
}
COLOURS = {
    **{"red": "red", "crimson": "red", "orange": "orange", "yellow": "yellow", "green": "green", "cyan": "turquoise"},
    **{"turquoise": "turquoise", "blue": "blue", "purple": "purple", "violet": "purple", "pink": "pink"},
    **{"brown": "brown", "white": "white", "gray": "gray", "grey": "gray", "black": "black"},
}
SIZES = {"small": "small", "little": "small", "tiny": "small", "large": "large", "big": "large", "huge": "large"}
TEXTURES = {
    **{"plain": "plain", "solid": "plain", "striped": "striped", "stripy": "striped", "dotted": "dotted"},
    **{"spotted": "dotted", "checked": "checked", "checkered": "checked", "banded": "banded", "ringed": "banded"},
    **{"shaded": "shaded", "fading": "shaded"},
}
AFTER = {
    **{"with stripes": "striped", "covered in stripes": "striped", "with dots": "dotted", "with spots": "dotted"},
    **{"covered in dots": "dotted", "with a checkerboard pattern": "checked", "with checks": "checked"},
    **{"with round bands": "banded", "with a target pattern": "banded", "with soft shading": "shaded"},
    **{"with a color gradient": "shaded"},
}
LEFT, RIGHT = (lambda t: t.x < 0.42), (lambda t: t.x > 0.58)
TOP, BOTTOM = (lambda t: t.y < 0.42), (lambda t: t.y > 0.58)
PLACES: dict[str, tuple[Callable[[Thing], bool], ...]] = {
    **dict.fromkeys(("in the top left corner", "at the upper left", "in the top left"), (TOP, LEFT)),
    **dict.fromkeys(("in the top right corner", "at the upper right", "in the top right"), (TOP, RIGHT)),
    **dict.fromkeys(("in the bottom left corner", "at the lower left", "in the bottom left"), (BOTTOM, LEFT)),
    **dict.fromkeys(("in the bottom right corner", "at the lower right", "in the bottom right"), (BOTTOM, RIGHT)),
    **dict.fromkeys(("at the top", "near the top", "in the upper part"), (TOP,)),
    **dict.fromkeys(("at the bottom", "near the bottom", "in the lower part"), (BOTTOM,)),
    **dict.fromkeys(("on the left side", "on the left", "at the left"), (LEFT,)),
    **dict.fromkeys(("on the right side", "on the right", "at the right"), (RIGHT,)),
    **dict.fromkeys(
        ("in the middle", "in the center", "at the center"),
        (lambda t: abs(t.x - 0.5) < 0.08, lambda t: abs(t.y - 0.5) < 0.08),
    ),
}


def _offset(right: int, down: int) -> Callable[[Scene, int, int], bool]:
    """The first thing lies clearly on that side of the second; where no side is named, not mainly beside it."""

    def holds(scene: Scene, a: int, b: int) -> bool:
        x, y = scene.things[a].x - scene.things[b].x, scene.things[a].y - scene.things[b].y
        if right and down:
            return x * right > 0.1 and y * down > 0.1
        return x * right > abs(y) if right else y * down > abs(x)

    return holds


def _apart(scene: Scene, a: int, b: int) -> float:
    first, second = scene.things[a], scene.things[b]
    return math.hypot(first.x - second.x, first.y - second.y)


def _inside(scene: Scene, a: int, b: int) -> bool:
    inner, outer = scene.things[a], scene.things[b]
    return a > b and inner.size == "small" and _apart(scene, a, b) + 0.6 * inner.radius < outer.radius


def _covers(scene: Scene, a: int, b: int) -> bool:
    """Drawn later, and touching, without lying inside."""
    return a > b and _apart(scene, a, b) < scene.things[a].radius + scene.things[b].radius


def _near(scene: Scene, a: int, b: int) -> bool:
    return 0 < _apart(scene, a, b) - scene.things[a].radius - scene.things[b].radius < 0.1


RELATIONS: dict[str, Callable[[Scene, int, int], bool]] = {
    **dict.fromkeys(("to the left of", "left of"), _offset(-1, 0)),
    **dict.fromkeys(("to the right of", "right of"), _offset(1, 0)),
    **dict.fromkeys(("above", "higher than"), _offset(0, -1)),
    **dict.fromkeys(("below", "under", "lower than"), _offset(0, 1)),
    **dict.fromkeys(("above and to the left of", "up and left of"), _offset(-1, -1)),
    **dict.fromkeys(("above and to the right of", "up and right of"), _offset(1, -1)),
    **dict.fromkeys(("below and to the left of", "down and left of"), _offset(-1, 1)),
    **dict.fromkeys(("below and to the right of", "down and right of"), _offset(1, 1)),
    **dict.fromkeys(("next to", "beside", "close to"), _near),
    **dict.fromkeys(("inside", "within"), _inside),
    **dict.fromkeys(("around", "surrounding"), lambda scene, a, b: _inside(scene, b, a)),
    **dict.fromkeys(("in front of", "overlapping", "partly covering"), _covers),
    **dict.fromkeys(("behind", "partly hidden by"), lambda scene, a, b: _covers(scene, b, a)),
}
_FLAT = r"(?:pale (?:yellow|blue|pink|green)|dark (?:blue|green|red)|white|black|gray)"
GROUNDS: tuple[tuple[str, str | None], ...] = (
    (rf"(?:(?:on|against) (?:a |plain )?)({_FLAT})(?: background)?(?=$|,| there)", None),
    (rf"(?:^|, )({_FLAT}) background$", None),
    (
        r"between (\w+) and (\w+)|gradient of (\w+) and (\w+)|(?:on|, ) ?(\w+) and (\w+)(?: gradient)?(?=$|,| there)",
        "ramp",
    ),
    (r"brick", "brick wall"),
    (r"wood", "wooden board"),
    (r"on sand|sandy ground|sandy desert|, (?:sand|desert)$", "sand"),
    (r"\bgrass|lawn", "grass"),
    (r"water|waves", "water"),
    (r"night", "night sky"),
    (r"cloud", "cloudy sky"),
    (r"\btile", "tiled floor"),
    (r"graph paper|blue grid", "graph paper"),
    (r"meadow", "meadow"),
    (r"beach|, sea and sand$", "beach"),
)


def _any(words: object) -> str:
    return "|".join(sorted(map(re.escape, words), key=len, reverse=True))  # type: ignore[call-overload]


THING = re.compile(
    rf"(?:\ban? )?(?:\b(?P<size>{_any(SIZES)}) )?(?:\b(?P<texture>{_any(TEXTURES)}) )?"
    rf"\b(?P<colour>{_any(COLOURS)}) (?P<shape>{_any(SHAPES)})\b(?: (?P<after>{_any(AFTER)}))?"
)
PLACE = re.compile(rf"\b(?:{_any(PLACES)})\b")
NUMBERS = {"two": 2, "three": 3, "four": 4, "one": 1, "a single": 1}


def background_of(caption: str) -> str | None:
    """The background a caption names, or None."""
    for pattern, name in GROUNDS:
        match = re.search(pattern, caption)
        if match is None:
            continue
        words = [group for group in match.groups() if group]
        if name != "ramp":
            return name or words[0]
        if len(words) == 2 and set(words) <= set(COLOURS):
            return " & ".join(sorted(words))
    return None


def falsehoods(caption: str, scene: Scene) -> list[str]:
    """Every claim of the caption that does not hold in the scene."""
    wrong: list[str] = []
    found: list[tuple[re.Match[str], int]] = []
    for match in THING.finditer(caption):
        shape, colour = SHAPES[match["shape"]], COLOURS[match["colour"]]
        texture = TEXTURES.get(match["texture"] or "") or AFTER.get(match["after"] or "")
        size = SIZES.get(match["size"] or "")
        index = next((k for k, t in enumerate(scene.things) if (t.shape, t.colour) == (shape, colour)), None)
        if index is None:
            wrong.append(f"no {match[0]}")
            continue
        thing = scene.things[index]
        if (texture and thing.texture != texture) or (size and thing.size != size):
            wrong.append(f"not {match[0]}")
        found.append((match, index))

    wrong += _wrong_places(caption, scene, found)
    for (first, a), (second, b) in itertools.pairwise(found):
        between = re.sub(r"^(that is|is)\b", "", caption[first.end() : second.start()].strip()).strip()
        if between in RELATIONS and not RELATIONS[between](scene, a, b):
            wrong.append(f"not {between}")

    ground = background_of(caption)
    actual = " & ".join(sorted(scene.background.split(" to "))) if " to " in scene.background else scene.background
    if ground is not None and ground != actual:
        wrong.append(f"not on {ground}")
    count = re.search(r"\b(two|three|four|one|a single) (?:shape|object|figure|thing)s?\b", caption)
    if count and NUMBERS[count[1]] != len(scene.things):
        wrong.append(f"not {count[0]}")
    more = re.search(r"\b(another thing|one more shape|two more shapes|two other things)\b", caption)
    if more and 2 + (2 if more[1].startswith("two") else 1) != len(scene.things):
        wrong.append(f"no {more[0]}")
    if re.search(r"\b(alone|only|just|itself|nothing but)\b", caption) and len(scene.things) != 1:
        wrong.append("not alone")
    return wrong


def _wrong_places(caption: str, scene: Scene, found: list[tuple[re.Match[str], int]]) -> list[str]:
    wrong = []
    for place in PLACE.finditer(caption):
        before = re.sub(r" (?:is|can be seen)$", "", caption[: place.start()].rstrip())
        index = next((k for match, k in found if match.end() == len(before)), None)
        if index is None:
            index = next((k for match, k in found if match.start() >= place.end()), None)
        if index is None:
            if found:
                wrong.append(f"nothing {place[0]}")
        elif not all(holds(scene.things[index]) for holds in PLACES[place[0]]):
            wrong.append(f"not {place[0]}")
    return wrong
