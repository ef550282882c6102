"""Five true captions for a scene: different words, different detail.

A small grammar of phrase tables. Caption 0 is the fullest (first-caption protocols use it alone); 1 lists the things
and the background; 2 tells how two things lie to each other; 3 tells where things are; 4 is a terse list.
Only what is beyond dispute is said: "left of" needs a clear offset, "on the left" a place well left of the middle,
and a "medium" size is never mentioned.
"""

from __future__ import annotations

import functools
import json
import re
from importlib import resources

from clipdistill.scenes.world import COLOURS, SHAPES, TEXTURES, Dice, Scene, Thing

MAX_WORDS = 38
"""Words and commas in the longest caption: with start and end it fits a context of 40."""

_TABLES = json.loads(resources.files("clipdistill.scenes").joinpath("captions.json").read_text("utf-8"))
WORDS: dict[str, dict[str, list[str]]] = _TABLES["words"]
"""Phrases by what they tell of ("shape", "place", ...), then by what it is; one that stands twice is drawn as often."""
TEMPLATES: dict[str, dict[str, list[str]]] = _TABLES["templates"]
"""Sentences with slots, by caption and number of things; "prompt": for zero-shot classification of things
("a red star"), backgrounds and counts."""
_GLUE = ("a", "an", "and", ",")


def captions_of(scene: Scene, dice: Dice) -> tuple[str, ...]:
    """Five captions of the scene, the fullest first; lower case, at most MAX_WORDS words and commas."""
    return tuple(write(scene, dice) for write in (_full, _list, _relation, _places, _terse))


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
    """Every relation (a key of WORDS["relation"]) in which thing `first` clearly stands to thing `second`."""
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
    words = [dice.pick(WORDS["colour"][thing.colour]), dice.pick(WORDS["shape"][thing.shape])]
    after = ""
    if texture:
        if thing.texture == "plain":
            if dice.chance(0.4):
                words.insert(0, dice.pick(WORDS["texture"]["plain"]))
        elif phrase and dice.chance(0.3):
            after = f" {dice.pick(WORDS['texture_phrase'][thing.texture])}"
        else:
            words.insert(0, dice.pick(WORDS["texture"][thing.texture]))
    if size and thing.size in WORDS["size"]:
        words.insert(0, dice.pick(WORDS["size"][thing.size]))
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
    return dice.pick(WORDS["place"][place]) if place else ""


def _ground(scene: Scene, dice: Dice) -> str:
    return dice.pick(WORDS["ground"][scene.background])


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
            return first, second, dice.pick(WORDS["relation"][dice.pick(found)])
    # things that do not overlap are at least 0.22 apart, and any such offset meets one of the conditions
    raise AssertionError("two things always stand in some relation")


def _full(scene: Scene, dice: Dice) -> str:
    if len(scene.things) == 1:
        thing = scene.things[0]
        looks = _looks(thing, dice, size=True, texture=True)
        place = _place_phrase(thing, dice)
        return _fill(dice.pick(TEMPLATES["full"]["one"]), thing=looks, place=place, ground=_ground(scene, dice))
    first, second, relation = _related_pair(scene, dice)
    crowded = len(scene.things) > 2
    slots = {
        "first": _looks(scene.things[first], dice, size=True, texture=True, phrase=not crowded),
        "second": _looks(scene.things[second], dice, size=True, texture=True, phrase=not crowded),
        "relation": relation,
        "ground": _ground(scene, dice),
    }
    if not crowded:
        return _fill(dice.pick(TEMPLATES["full"]["two"]), **slots)
    others = [thing for k, thing in enumerate(scene.things) if k not in (first, second)]
    rest = [_looks(thing, dice, size=True, texture=True, phrase=False) for thing in others]
    if len(rest) == 1:
        rest[0] += " " + _place_phrase(others[0], dice)
    template = dice.pick(TEMPLATES["full"]["more"])
    text = _fill(template, rest=_join(rest), **slots)
    if len(text.replace(",", " ,").split()) > MAX_WORDS:
        slots["ground"] = min(WORDS["ground"][scene.background], key=lambda phrase: len(phrase.split()))
        text = _fill(template, rest=_join(rest), **slots)
    return text


def _list(scene: Scene, dice: Dice) -> str:
    count = len(scene.things)
    texture = count < 4 and dice.chance(0.6)
    things = [_looks(t, dice, size=count == 1, texture=texture or count == 1) for t in dice.shuffled(scene.things)]
    return _fill(
        dice.pick(TEMPLATES["list"]["one" if count == 1 else "more"]),
        things=_join(things),
        ground=_ground(scene, dice),
        number=dice.pick(WORDS["number"][str(count)]),
        noun=dice.pick(WORDS["noun"][str(min(count, 2))]),
    )


def _relation(scene: Scene, dice: Dice) -> str:
    count = len(scene.things)
    if count == 1:
        looks = _looks(scene.things[0], dice, size=True, texture=True)
        return _fill(dice.pick(TEMPLATES["relation"]["one"]), thing=looks, ground=_ground(scene, dice))
    first, second, relation = _related_pair(scene, dice)
    detail = dice.chance(0.5)
    text = _fill(
        dice.pick(TEMPLATES["relation"]["two" if count == 2 else "more"]),
        first=_looks(scene.things[first], dice, size=detail, texture=dice.chance(0.6)),
        second=_looks(scene.things[second], dice, size=not detail, texture=dice.chance(0.6)),
        relation=relation,
        more=dice.pick(WORDS["more"][str(count - 2)]) if count > 2 else "",
    )
    return f"{text} {_ground(scene, dice)}" if dice.chance(0.4) else text


def _places(scene: Scene, dice: Dice) -> str:
    placed = [thing for thing in dice.shuffled(scene.things) if place_of(thing)][:2]
    looks = [_looks(thing, dice, size=dice.chance(0.5), texture=dice.chance(0.6)) for thing in placed]
    if not placed:
        thing = _looks(scene.things[0], dice, size=True, texture=True)
        return _fill(dice.pick(TEMPLATES["places"]["none"]) + " {ground}", thing=thing, ground=_ground(scene, dice))
    places = [_place_phrase(thing, dice) for thing in placed]
    if len(placed) == 1:
        text = _fill(dice.pick(TEMPLATES["places"]["one"]), thing=looks[0], place=places[0])
        return f"{text} {_ground(scene, dice)}"
    text = _fill(
        dice.pick(TEMPLATES["places"]["two"]), thing=looks[0], place=places[0], thing_b=looks[1], place_b=places[1]
    )
    return f"{text} {_ground(scene, dice)}" if dice.chance(0.5) else text


def _terse(scene: Scene, dice: Dice) -> str:
    size, texture = dice.chance(0.5), dice.chance(0.7)
    things = [
        _looks(thing, dice, size=size, texture=texture, article=False, phrase=False)
        for thing in dice.shuffled(scene.things)
    ]
    return ", ".join([*things, dice.pick(WORDS["ground_name"][scene.background])])


@functools.cache
def scenes_vocabulary() -> tuple[str, ...]:
    """Every word (and the comma) that captions, class names and prompts of `scenes` can hold, alphabetically."""
    phrases = [phrase for table in WORDS.values() for group in table.values() for phrase in group]
    sentences = [text for table in TEMPLATES.values() for group in table.values() for text in group]
    phrases += [re.sub(r"{\w*}", " ", text) for text in sentences]
    phrases += [*SHAPES, *COLOURS, *TEXTURES, *_GLUE]
    return tuple(sorted({word for phrase in phrases for word in phrase.replace(",", " , ").split()}))
