"""What names of parameters say: of which layer and kind they are, and in what order blocks are listed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from jaxhess.errors import InputError
from jaxhess.operators.restriction import STACKED, matches

KINDS = {
    "embedding": ("embed", "positions"),
    "query": ("query", "query_down"),
    "key": ("key", "rotated_key"),
    "value": ("value",),
    "key and value": ("kv_down",),
    "attention out": ("out",),
    "attention sinks": ("sinks",),
    "router": ("router", "selection_bias", "shared_gate"),
    "gate": ("gate",),
    "up": ("up",),
    "down": ("down",),
    "head": ("head",),
}
"""Of every kind of parameters the components of their names."""

BEFORE = ("embed", "positions", *(kind for kind in KINDS if kind != "head"), "experts")
AFTER = ("norms", "final_norm", "head")
"""Blocks that are listed before all others, and after them, by the first component of their names."""

HEAD_AXES = {
    "attention/query/kernel": -2,
    "attention/key/kernel": -2,
    "attention/value/kernel": -2,
    "attention/query/bias": -2,
    "attention/key/bias": -2,
    "attention/value/bias": -2,
    "attention/out/kernel": -3,
    "attention/sinks": -1,
}
"""The axis over attention heads of the decoder's parameters."""


def in_model_order(names: Iterable[str]) -> list[str]:
    """The names, each once: embedding, others as they come, layers by number, final norm, head.

    Examples:
        >>> in_model_order(["head", "layers/10", "layers/2", "embed"])
        ['embed', 'layers/2', 'layers/10', 'head']
    """

    def place(name: str) -> tuple[int, int]:
        first = re.split(r"[/\[]", name)[0]
        if first in BEFORE:
            return BEFORE.index(first) - len(BEFORE), 0
        number = layer_number_in(name)
        return (1 + AFTER.index(first) if first in AFTER else 0), (-1 if number is None else number)

    return sorted(dict.fromkeys(names), key=place)


def layer_number_in(name: str) -> int | None:
    """The number of the layer that a block is in or is; None: in none.

    Examples:
        >>> layer_number_in("model/layers/3/mlp/up/kernel[7]"), layer_number_in("head")
        (3, None)
    """
    found = re.search(rf"(?:^|/){STACKED}/(\d+)(?=$|[/\[])", name)
    return int(found[1]) if found else None


def layer_of(name: str) -> str:
    """The block by layers that a block by matrices, heads or rows is in.

    Examples:
        >>> layer_of("layers/3/mlp/up/kernel[7]"), layer_of("positions/kernel"), layer_of("head[2]")
        ('layers/3', 'embed', 'head')
    """
    whole = re.sub(r"\[.*", "", name)
    found = re.match(rf"(.*/)?{STACKED}/\d+(?=$|/)", whole)
    first = whole.split("/")[0]
    return found[0] if found else "embed" if first == "positions" else first


def kind_of(name: str) -> str:
    """The block by kinds that a block by matrices, heads or rows is in.

    Examples:
        >>> kind_of("layers/3/attention/query/kernel"), kind_of("layers/0/mlp_norm/scale"), kind_of("conv/kernel")
        ('query', 'norms', 'conv')
    """
    parts = [part for part in re.sub(r"\[.*", "", name).split("/") if not part.isdigit()]
    if any("norm" in part for part in parts):
        return "norms"
    kind = next((kind for kind, words in KINDS.items() if set(words) & set(parts)), None)
    if "experts" in parts and "shared" not in parts and kind != "router":
        return "experts"
    named = [part for part in parts if part not in ("kernel", "bias", "scale", STACKED)]
    return kind or "/".join(named or parts) or name


def by_patterns(leaves: Mapping[str, str], patterns: Iterable[str]) -> Callable[[str], str]:
    """The pattern that each block matches.

    Args:
        leaves: Of each block by matrices the leaf it is in. A pattern may match either name.
        patterns: As in `jaxhess.operators.restriction`.

    Raises:
        InputError: A pattern matches nothing, patterns overlap, or leave something out; the message names the first.
    """
    patterns = tuple(dict.fromkeys(patterns))
    found = {name: [p for p in patterns if matches(name, p) or matches(leaf, p)] for name, leaf in leaves.items()}
    idle = next((p for p in patterns if not any(p in ps for ps in found.values())), None)
    if idle is not None:
        raise InputError(f"No parameter matches {idle!r}; there are {', '.join(dict.fromkeys(leaves.values()))}.")
    twice = next((name for name in found if len(found[name]) > 1), None)
    if twice is not None:
        first, second, *_ = found[twice]
        raise InputError(f"{twice} is in two blocks, {first!r} and {second!r}: they must not overlap.")
    out = [name for name in found if not found[name]]
    if out:
        more = f" and {len(out) - 1} more" if len(out) > 1 else ""
        raise InputError(f"{out[0]}{more} is in no block: add a pattern for what is left, or restrict the operator.")
    return lambda name: found[name][0]
