"""Five true captions for a scene: different words, different detail.

A small grammar of phrase tables. Caption 0 is the fullest (first-caption protocols use it alone); 1 lists the things
and the background; 2 tells how two things lie to each other; 3 tells where things are; 4 is a terse list.
Only what is beyond dispute is said: "left of" needs a clear offset, "on the left" a place well left of the middle,
and a "medium" size is never mentioned.
"""

from __future__ import annotations

import functools
import re

from clipdistill.scenes.world import BACKGROUNDS, COLOURS, SHAPES, TEXTURES, Dice, Scene, Thing

CAPTIONS_PER_SCENE = 5
MAX_WORDS = 38
"""Words and commas in the longest caption: with start and end it fits a context of 40."""

SHAPE_WORDS: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "circle", "disc"),
    "square": ("square",),
    "triangle": ("triangle",),
    "diamond": ("diamond", "diamond", "rhombus"),
    "star": ("star",),
    "heart": ("heart",),
    "cross": ("cross", "cross", "plus"),
    "ring": ("ring", "ring", "hoop"),
    "crescent": ("crescent", "crescent", "moon"),
    "arrow": ("arrow",),
    "hexagon": ("hexagon",),
    "semicircle": ("semicircle", "semicircle", "half circle"),
}
COLOUR_WORDS: dict[str, tuple[str, ...]] = {
    "red": ("red", "red", "red", "crimson"),
    "turquoise": ("turquoise", "turquoise", "cyan"),
    "purple": ("purple", "purple", "violet"),
    "gray": ("gray", "gray", "grey"),
} | {name: (name,) for name in COLOURS if name not in ("red", "turquoise", "purple", "gray")}
SIZE_WORDS: dict[str, tuple[str, ...]] = {
    "small": ("small", "small", "little", "tiny"),
    "large": ("large", "big", "huge"),
}
TEXTURE_WORDS: dict[str, tuple[str, ...]] = {
    "plain": ("plain", "solid"),
    "striped": ("striped", "striped", "stripy"),
    "dotted": ("dotted", "dotted", "spotted"),
    "checked": ("checked", "checkered"),
    "banded": ("banded", "banded", "ringed"),
    "shaded": ("shaded", "shaded", "fading"),
}
TEXTURE_PHRASES: dict[str, tuple[str, ...]] = {
    "striped": ("with stripes", "covered in stripes"),
    "dotted": ("with dots", "covered in dots", "with spots"),
    "checked": ("with a checkerboard pattern", "with checks"),
    "banded": ("with round bands", "with a target pattern"),
    "shaded": ("with soft shading", "with a color gradient"),
}
PLACE_WORDS: dict[str, tuple[str, ...]] = {
    "top left": ("in the top left corner", "at the upper left", "in the top left"),
    "top": ("at the top", "near the top", "in the upper part"),
    "top right": ("in the top right corner", "at the upper right", "in the top right"),
    "left": ("on the left", "on the left side", "at the left"),
    "middle": ("in the middle", "in the center", "at the center"),
    "right": ("on the right", "on the right side", "at the right"),
    "bottom left": ("in the bottom left corner", "at the lower left", "in the bottom left"),
    "bottom": ("at the bottom", "near the bottom", "in the lower part"),
    "bottom right": ("in the bottom right corner", "at the lower right", "in the bottom right"),
}
RELATION_WORDS: dict[str, tuple[str, ...]] = {
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
    "above": ("above", "higher than"),
    "below": ("below", "under", "lower than"),
    "above left of": ("above and to the left of", "up and left of"),
    "above right of": ("above and to the right of", "up and right of"),
    "below left of": ("below and to the left of", "down and left of"),
    "below right of": ("below and to the right of", "down and right of"),
    "next to": ("next to", "beside", "close to"),
    "inside": ("inside", "within"),
    "around": ("around", "surrounding"),
    "in front of": ("in front of", "overlapping", "partly covering"),
    "behind": ("behind", "partly hidden by"),
}
_FLAT = tuple(name for name in list(BACKGROUNDS)[:10])
GROUND_PHRASES: dict[str, tuple[str, ...]] = {
    **{name: (f"on a {name} background", f"against {name}", f"on plain {name}") for name in _FLAT},
    **{
        name: (f"on a background fading between {a} and {b}", f"over a gradient of {a} and {b}", f"on {b} and {a}")
        for name in BACKGROUNDS
        if " to " in name
        for a, _, b in [name.partition(" to ")]
    },
    "brick wall": ("in front of a brick wall", "on a brick wall", "against bricks"),
    "wooden board": ("on a wooden board", "on a wooden table", "on wood"),
    "sand": ("on sand", "on the sandy ground", "on a sandy desert"),
    "grass": ("on green grass", "on a lawn", "on grass"),
    "water": ("on blue water", "on waves", "floating on water"),
    "night sky": ("in a starry night sky", "in the night sky", "under tiny stars at night"),
    "cloudy sky": ("in a cloudy sky", "among white clouds", "in the sky with clouds"),
    "tiled floor": ("on a tiled floor", "on tiles", "on a floor of tiles"),
    "graph paper": ("on graph paper", "on paper with a blue grid", "on a sheet of graph paper"),
    "meadow": ("on a meadow under a blue sky", "in a meadow with sky above", "in an open meadow"),
    "beach": ("on a beach by the sea", "at the beach", "on a sandy beach with sea and sky"),
}
GROUND_NAMES: dict[str, tuple[str, ...]] = {
    **{name: (f"{name} background",) for name in _FLAT},
    **{
        name: (f"{a} and {b} gradient",)
        for name in BACKGROUNDS
        if " to " in name
        for a, _, b in [name.partition(" to ")]
    },
    "brick wall": ("brick wall", "bricks"),
    "wooden board": ("wooden board", "wood"),
    "sand": ("sand", "desert"),
    "grass": ("grass", "lawn"),
    "water": ("water", "waves"),
    "night sky": ("night sky", "night"),
    "cloudy sky": ("cloudy sky", "clouds"),
    "tiled floor": ("tiled floor", "tiles"),
    "graph paper": ("graph paper", "blue grid"),
    "meadow": ("meadow", "meadow and sky"),
    "beach": ("beach", "sea and sand"),
}
NUMBER_WORDS = {1: ("one", "a single"), 2: ("two",), 3: ("three",), 4: ("four",)}
MORE_WORDS = {1: ("another thing", "one more shape"), 2: ("two more shapes", "two other things")}
NOUNS = {1: ("shape", "object", "figure", "thing"), 2: ("shapes", "objects", "figures", "things")}

FULL_ONE = (
    "{thing} {place} {ground}",
    "there is {thing} {place} {ground}",
    "{ground} there is {thing} {place}",
    "{thing} can be seen {place} {ground}",
    "we see {thing} {place} {ground}",
)
FULL_TWO = (
    "{first} {relation} {second} {ground}",
    "{ground} there is {first} {relation} {second}",
    "there is {first} {relation} {second} {ground}",
    "{first} is {relation} {second} {ground}",
)
FULL_MORE = (
    "{first} {relation} {second}, with {rest}, {ground}",
    "{first} is {relation} {second}, and there is {rest} {ground}",
    "{ground} there is {first} {relation} {second}, and also {rest}",
)
LIST = (
    "a picture of {things} {ground}",
    "{things} {ground}",
    "an image of {things} {ground}",
    "{number} {noun} {ground}, {things}",
    "a drawing with {number} {noun} {ground}, {things}",
    "{ground} there are {number} {noun}, {things}",
)
LIST_ONE = (
    "a picture of {things} {ground}",
    "only {things} {ground}",
    "{number} {noun} {ground}, {things}",
    "an image of nothing but {things} {ground}",
)
RELATION_ONE = (
    "{thing} alone {ground}",
    "just {thing} {ground}",
    "{thing} by itself {ground}",
)
RELATION_TWO = (
    "{first} is {relation} {second}",
    "{first} that is {relation} {second}",
    "{first} {relation} {second}",
    "you can see {first} {relation} {second}",
)
RELATION_MORE = (
    "{first} is {relation} {second}, and {more}",
    "{first} {relation} {second}, with {more}",
    "{more} and {first} {relation} {second}",
)
PLACES = (
    "{place} there is {thing}",
    "{thing} is {place}",
    "{thing} {place}",
    "{place} you can find {thing}",
)
PLACES_TWO = (
    "{place} there is {thing} and {place_b} {thing_b}",
    "{thing} {place} and {thing_b} {place_b}",
    "{thing} is {place} while {thing_b} is {place_b}",
)
PROMPTS: dict[str, tuple[str, ...]] = {
    "thing": ("{}", "a picture of {}", "an image of {}", "there is {}", "only {}"),
    "ground": ("a shape {}", "a picture of a thing {}", "{} there is an object", "objects {}"),
    "count": ("{}", "a picture of {}", "an image of {}", "there are {}"),
}
"""Templates for zero-shot classification: of things ("a red star"), backgrounds and counts."""
NO_PLACE = ("the picture shows {thing}", "this is a picture of {thing}", "a drawing of {thing}")
_GLUE = ("a", "an", "and", ",")


def captions_of(scene: Scene, dice: Dice) -> tuple[str, ...]:
    """Five captions of the scene, the fullest first; lower case, at most MAX_WORDS words and commas."""
    return (
        _full(scene, dice),
        _list(scene, dice),
        _relation(scene, dice),
        _places(scene, dice),
        _terse(scene, dice),
    )


def place_of(thing: Thing) -> str | None:
    """Where the thing's centre lies, when it lies there clearly: 'top left', 'top', 'middle', ... or None.

    'top' alone says nothing of left and right.
    """
    column = "left" if thing.x < 0.37 else "right" if thing.x > 0.63 else "middle" if 0.43 < thing.x < 0.57 else ""
    row = "top" if thing.y < 0.37 else "bottom" if thing.y > 0.63 else "middle" if 0.43 < thing.y < 0.57 else ""
    if column == "middle" and row == "middle":
        return "middle"
    words = [word for word in (row, column) if word and word != "middle"]
    return " ".join(words) or None


def relations_of(scene: Scene, first: int, second: int) -> list[str]:
    """Every relation (a key of RELATION_WORDS) in which thing `first` clearly stands to thing `second`."""
    for pairs, forwards, backwards in ((scene.inside, "inside", "around"), (scene.in_front, "in front of", "behind")):
        if (first, second) in pairs:
            return [forwards]
        if (second, first) in pairs:
            return [backwards]
    a, b = scene.things[first], scene.things[second]
    right, down = b.x - a.x, b.y - a.y
    found = []
    if abs(right) > 0.2 and abs(right) > 1.4 * abs(down):
        found.append("left of" if right > 0 else "right of")
    if abs(down) > 0.2 and abs(down) > 1.4 * abs(right):
        found.append("above" if down > 0 else "below")
    if abs(right) > 0.14 and abs(down) > 0.14:
        found.append(f"{'above' if down > 0 else 'below'} {'left' if right > 0 else 'right'} of")
    if right**2 + down**2 < (a.radius + b.radius + 0.07) ** 2:
        found.append("next to")
    return found


def with_article(phrase: str) -> str:
    """'a red star', 'an orange star'."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _looks(thing: Thing, dice: Dice, *, size: bool, texture: bool, article: bool = True, phrase: bool = True) -> str:
    """A noun phrase: article, size, texture, colour and shape as asked; the texture before or after the shape."""
    words = [dice.pick(COLOUR_WORDS[thing.colour]), dice.pick(SHAPE_WORDS[thing.shape])]
    after = ""
    if texture:
        if thing.texture == "plain":
            if dice.chance(0.4):
                words.insert(0, dice.pick(TEXTURE_WORDS["plain"]))
        elif phrase and dice.chance(0.3):
            after = f" {dice.pick(TEXTURE_PHRASES[thing.texture])}"
        else:
            words.insert(0, dice.pick(TEXTURE_WORDS[thing.texture]))
    if size and thing.size in SIZE_WORDS:
        words.insert(0, dice.pick(SIZE_WORDS[thing.size]))
    text = " ".join(words)
    return (with_article(text) if article else text) + after


def _join(parts: list[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _fill(template: str, **slots: str) -> str:
    """The template with its slots filled; an empty slot leaves no gap."""
    return " ".join(template.format(**slots).split()).replace(" ,", ",")


def _place_phrase(thing: Thing, dice: Dice) -> str:
    place = place_of(thing)
    return dice.pick(PLACE_WORDS[place]) if place else ""


def _ground(scene: Scene, dice: Dice) -> str:
    return dice.pick(GROUND_PHRASES[scene.background])


def _related_pair(scene: Scene, dice: Dice) -> tuple[int, int, str]:
    """Two things and how they lie to each other; nesting and overlap are told before anything else."""
    special = [*scene.inside, *scene.in_front]
    if special and dice.chance(0.8):
        pairs = [special[0], special[0][::-1]]
    else:
        indices = range(len(scene.things))
        pairs = [(a, b) for a in indices for b in indices if a != b]
    for first, second in dice.shuffled(pairs):
        found = relations_of(scene, first, second)
        if found:
            return first, second, dice.pick(RELATION_WORDS[dice.pick(found)])
    # things that do not overlap are at least 0.22 apart, and any such offset meets one of the conditions
    raise AssertionError("two things always stand in some relation")


def _full(scene: Scene, dice: Dice) -> str:
    if len(scene.things) == 1:
        thing = scene.things[0]
        looks = _looks(thing, dice, size=True, texture=True)
        place = _place_phrase(thing, dice)
        return _fill(dice.pick(FULL_ONE), thing=looks, place=place, ground=_ground(scene, dice))
    first, second, relation = _related_pair(scene, dice)
    crowded = len(scene.things) > 2
    slots = {
        "first": _looks(scene.things[first], dice, size=True, texture=True, phrase=not crowded),
        "second": _looks(scene.things[second], dice, size=True, texture=True, phrase=not crowded),
        "relation": relation,
        "ground": _ground(scene, dice),
    }
    if not crowded:
        return _fill(dice.pick(FULL_TWO), **slots)
    others = [thing for k, thing in enumerate(scene.things) if k not in (first, second)]
    rest = [_looks(thing, dice, size=True, texture=True, phrase=False) for thing in others]
    if len(rest) == 1:
        rest[0] += " " + _place_phrase(others[0], dice)
    template = dice.pick(FULL_MORE)
    text = _fill(template, rest=_join(rest), **slots)
    if len(text.replace(",", " ,").split()) > MAX_WORDS:
        slots["ground"] = min(GROUND_PHRASES[scene.background], key=lambda phrase: len(phrase.split()))
        text = _fill(template, rest=_join(rest), **slots)
    return text


def _list(scene: Scene, dice: Dice) -> str:
    count = len(scene.things)
    texture = count < 4 and dice.chance(0.6)
    things = [_looks(t, dice, size=count == 1, texture=texture or count == 1) for t in dice.shuffled(scene.things)]
    return _fill(
        dice.pick(LIST_ONE if count == 1 else LIST),
        things=_join(things),
        ground=_ground(scene, dice),
        number=dice.pick(NUMBER_WORDS[count]),
        noun=dice.pick(NOUNS[min(count, 2)]),
    )


def _relation(scene: Scene, dice: Dice) -> str:
    count = len(scene.things)
    if count == 1:
        looks = _looks(scene.things[0], dice, size=True, texture=True)
        return _fill(dice.pick(RELATION_ONE), thing=looks, ground=_ground(scene, dice))
    first, second, relation = _related_pair(scene, dice)
    detail = dice.chance(0.5)
    text = _fill(
        dice.pick(RELATION_TWO if count == 2 else RELATION_MORE),
        first=_looks(scene.things[first], dice, size=detail, texture=dice.chance(0.6)),
        second=_looks(scene.things[second], dice, size=not detail, texture=dice.chance(0.6)),
        relation=relation,
        more=dice.pick(MORE_WORDS[count - 2]) if count > 2 else "",
    )
    return f"{text} {_ground(scene, dice)}" if dice.chance(0.4) else text


def _places(scene: Scene, dice: Dice) -> str:
    placed = [thing for thing in dice.shuffled(scene.things) if place_of(thing)][:2]
    looks = [_looks(thing, dice, size=dice.chance(0.5), texture=dice.chance(0.6)) for thing in placed]
    if not placed:
        thing = _looks(scene.things[0], dice, size=True, texture=True)
        return _fill(dice.pick(NO_PLACE) + " {ground}", thing=thing, ground=_ground(scene, dice))
    places = [_place_phrase(thing, dice) for thing in placed]
    if len(placed) == 1:
        text = _fill(dice.pick(PLACES), thing=looks[0], place=places[0])
        return f"{text} {_ground(scene, dice)}"
    text = _fill(dice.pick(PLACES_TWO), thing=looks[0], place=places[0], thing_b=looks[1], place_b=places[1])
    return f"{text} {_ground(scene, dice)}" if dice.chance(0.5) else text


def _terse(scene: Scene, dice: Dice) -> str:
    size, texture = dice.chance(0.5), dice.chance(0.7)
    things = [
        _looks(thing, dice, size=size, texture=texture, article=False, phrase=False)
        for thing in dice.shuffled(scene.things)
    ]
    return ", ".join([*things, dice.pick(GROUND_NAMES[scene.background])])


@functools.cache
def scenes_vocabulary() -> tuple[str, ...]:
    """Every word (and the comma) that captions, class names and prompts of `scenes` can hold, alphabetically."""
    tables: list[dict[str, tuple[str, ...]]] = [
        *(SHAPE_WORDS, COLOUR_WORDS, SIZE_WORDS, TEXTURE_WORDS, TEXTURE_PHRASES, PLACE_WORDS, RELATION_WORDS),
        *(GROUND_PHRASES, GROUND_NAMES),
    ]
    phrases = [phrase for table in tables for group in table.values() for phrase in group]
    phrases += [phrase for table in (NUMBER_WORDS, MORE_WORDS, NOUNS) for group in table.values() for phrase in group]
    for templates in (
        *(FULL_ONE, FULL_TWO, FULL_MORE, LIST, LIST_ONE, RELATION_ONE, RELATION_TWO, RELATION_MORE),
        *(PLACES, PLACES_TWO, NO_PLACE, *PROMPTS.values()),
    ):
        phrases += [re.sub(r"{\w*}", " ", template) for template in templates]
    phrases += [*SHAPES, *COLOURS, *TEXTURES, *_GLUE]
    return tuple(sorted({word for phrase in phrases for word in phrase.replace(",", " , ").split()}))
