"""Which of a data set's splits are meant."""

from __future__ import annotations

from collections.abc import Mapping

from clipdistill.errors import InputError, nearest


def choose_splits(
    asked: str | None, default: str | None, counts: Mapping[str, int], where: str
) -> tuple[set[str] | None, str]:
    """The chosen splits (None: everything) and a label for the source's name ('/train', '').

    asked: 'train', 'train+restval' or 'all'. Nothing asked: the only split, else `default` if the data has it, else an
    InputError that lists what there is. Asking for a split of data without splits is an error too.
    """
    known = ", ".join(f"{name} ({n})" for name, n in counts.items())
    if asked is None:
        if len(counts) <= 1:
            return None, "".join(f"/{name}" for name in counts)
        if default is None or default not in counts:
            raise InputError(
                f"{where} holds several splits: {known}; name one, for example split='{next(iter(counts))}'"
            )
        return {default}, f"/{default}"
    if asked == "all":
        return None, ""
    if not counts:
        raise InputError(f"{where} has no splits, so split='{asked}' cannot be chosen: leave the split out")
    chosen = {part.strip() for part in asked.split("+")}
    for name in sorted(chosen):
        if name not in counts:
            hint = nearest(name, counts)
            hint = hint if "did you mean" in hint else ""
            raise InputError(f"{where} has no split '{name}'{hint}; it holds {known}")
    return chosen, f"/{asked}"
