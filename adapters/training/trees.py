"""Tensors in nested mappings and sequences, as pipelines hand them to a denoiser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from cmlora.errors import CmloraError

Tree = Any
"""Tensors in nested mappings and sequences; whatever else is in them stays as it is."""

Path = tuple[Any, ...]
"""Keys and numbers that lead to a tensor."""


def layout(one: Tree, two: Tree) -> dict[Path, bool]:
    """Which tensors have a row per picture, from calls with one picture and with two."""
    second = dict(leaves(two))
    found = {}
    for path, leaf in leaves(one):
        a, b = tuple(leaf.shape), tuple(second[path].shape)
        if a == b:
            found[path] = False
        elif a[1:] == b[1:] and b[0] == 2 * a[0] == 2:
            found[path] = True
        else:
            raise CmloraError(f"the denoiser's {'.'.join(map(str, path))} is {a}, then {b}")
    return found


def leaves(tree: Tree, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """The tensors in a tree, and where they are."""
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, (*path, key))
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from leaves(value, (*path, index))


def mapped(tree: Tree, change: Callable[[Path, Any], Any], path: Path = ()) -> Tree:
    """The tree with other tensors, which a function of place and tensor gives."""
    if isinstance(tree, Tensor):
        return change(path, tree)
    if isinstance(tree, dict):
        return {key: mapped(value, change, (*path, key)) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(mapped(v, change, (*path, i)) for i, v in enumerate(tree))
    return tree
