"""All labels as one tree of tokens: labels that begin alike share their beginning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = -1


@dataclass(frozen=True)
class LabelTree:
    """``tokens``, ``parents`` (-1 is the prompt) and ``depths`` (from 0) of the nodes; parents come before children.

    ``ends`` [labels] is the node at which a label ends. Nodes with children come first, in ``inner`` of them: only
    they have to go through the model, because a leaf's probability is known at its parent.
    """

    tokens: NDArray[np.int64]
    parents: NDArray[np.int64]
    depths: NDArray[np.int64]
    ends: NDArray[np.int64]
    inner: int
    lengths: NDArray[np.int64] = field(repr=False)

    @classmethod
    def of(cls, labels: Sequence[Sequence[int]]) -> LabelTree:
        """The tree of labels, each its token ids with the stop token that ends it. Raises ValueError for an empty label,
        two equal ones, and one that is the beginning of another (stop tokens prevent that).
        """
        nodes: list[tuple[int, int, int]] = []
        known: dict[tuple[int, int], int] = {}
        ends = []
        for label in labels:
            at = ROOT
            for depth, token in enumerate(label):
                if (at, token) not in known:
                    known[at, token] = len(nodes)
                    nodes.append((token, at, depth))
                at = known[at, token]
            ends.append(at)
        if ROOT in ends:
            raise ValueError("a label has no tokens")
        if len(set(ends)) < len(ends):
            raise ValueError("two labels have the same tokens")
        parents = {parent for _, parent, _ in nodes}
        if parents & set(ends):
            raise ValueError("a label is the beginning of another")
        order = sorted(range(len(nodes)), key=lambda n: (n not in parents, n))
        place = {old: new for new, old in enumerate(order)} | {ROOT: ROOT}
        return cls(
            tokens=np.array([nodes[n][0] for n in order]),
            parents=np.array([place[nodes[n][1]] for n in order]),
            depths=np.array([nodes[n][2] for n in order]),
            ends=np.array([place[n] for n in ends]),
            inner=len(parents - {ROOT}),
            lengths=np.array([len(label) for label in labels]),
        )

    @cached_property
    def paths(self) -> NDArray[np.bool_]:
        """[nodes, nodes]: whether the second is the first or one of its ancestors."""
        made = np.eye(len(self.tokens), dtype=bool)
        for node in np.argsort(self.depths, kind="stable"):
            if self.parents[node] != ROOT:
                made[node] |= made[self.parents[node]]
        return made

    def sums(self, logprobs: NDArray[Any]) -> NDArray[np.float64]:
        """Log-probability of each whole label [rows, labels] from those of the nodes [rows, nodes]."""
        made: NDArray[np.float64] = np.asarray(logprobs, dtype=np.float64) @ self.paths[self.ends].T.astype(np.float64)
        return made

    def walked(self, logprobs: NDArray[Any], temperature: float = 1.0) -> NDArray[np.float64]:
        """Log-probability of each label [rows, labels] where the model, token by token, may only choose among the tree's.

        At every node the children's probabilities, by ``temperature`` (not 0), are made to sum to 1: what drawing with a
        constraint does.
        """
        logs = np.asarray(logprobs, dtype=np.float64) / temperature
        made = np.empty_like(logs)
        for parent in range(ROOT, self.inner):
            children = np.flatnonzero(self.parents == parent)
            part = logs[:, children]
            top = part.max(1, keepdims=True)
            made[:, children] = part - top - np.log(np.exp(part - top).sum(1, keepdims=True))
        return self.sums(made)

    def greedy(self, logprobs: NDArray[Any]) -> NDArray[np.int64]:
        """The label [rows] that taking the likeliest allowed token at every step ends with."""
        label_of = {int(node): label for label, node in enumerate(self.ends)}
        children = {parent: np.flatnonzero(self.parents == parent) for parent in range(ROOT, self.inner)}
        found = []
        for row in np.asarray(logprobs):
            at = ROOT
            while at < self.inner:  # the root and all nodes with children
                at = int(children[at][row[children[at]].argmax()])
            found.append(label_of[at])
        return np.array(found, dtype=np.int64)
