"""Token trees: every prefix that sequences of a group share is computed once.

The sequences of a group are merged into a trie whose nodes are numbered in depth-first order. Then
"j is i or an ancestor of i" is `j <= i < end[j]`, with end[j] one past the last node below j: one rule is the attention
mask of a group's tree, of a single sequence (a tree without branches), and of many of them packed side by side.

    prompt a b, completions c d x | c e x | f x      nodes  a b c d e f     (the last token of a sequence is
                                                     end    6 6 5 4 5 6      predicted, never read: no node)

Letters: N nodes, M edges (node -> next token, each predicted once), C loss-carrying tokens, R trees, S longest tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rollout.types import Trajectory


@dataclass(frozen=True, slots=True)
class Tree:
    """Some sequences of one group, merged.

    token_ids, positions, ends: [N] int64; ends is one past the last node of the subtree.
    sources, targets: [C] int64, token c is `targets[c]`, predicted from node `sources[c]`.
    rows: [C] int64, index of the token's sequence among those given to `plant`.
    copies: [N] int64, how many of the sequences run through each node.
    routes: [N, L, K] int16 experts of each node as the sampler chose them, or None.
    """

    token_ids: np.ndarray
    positions: np.ndarray
    ends: np.ndarray
    sources: np.ndarray
    targets: np.ndarray
    rows: np.ndarray
    copies: np.ndarray
    routes: np.ndarray | None

    @property
    def size(self) -> int:
        """Number of nodes."""
        return len(self.token_ids)


def plant(
    trajectories: Sequence[Trajectory], rows: Sequence[int], max_nodes: int, *, by_routes: bool = False
) -> list[Tree]:
    """Merge the sequences of one group into trees of at most `max_nodes` nodes (a longer sequence stands alone).

    A token is shared where the sequences agree up to it: on tokens, and with `by_routes` on the experts that the
    sampler chose for them (otherwise a shared node has the experts of one of its sequences).
    rows: what each trajectory's tokens are labelled with in `Tree.rows`. Within a row, tokens keep their order.
    """
    # Sorted, a sequence shares more with its neighbour than with any other, and depth-first order comes by itself.
    keys = [_read(trajectory, by_routes) for trajectory in trajectories]
    order = sorted(range(len(keys)), key=lambda i: (keys[i].tobytes(), int(trajectories[i].token_ids[-1])))
    trees, branch = [], _Branch()
    for i in order:
        if branch.size and branch.size_with(keys[i]) > max_nodes:
            trees.append(branch.tree())
            branch = _Branch()
        branch.add(trajectories[i], keys[i], rows[i])
    trees.append(branch.tree())
    return trees


def _read(trajectory: Trajectory, by_routes: bool) -> np.ndarray:
    """[T-1, 1 + L * K] big-endian, so that bytes sort like numbers: what the model reads, and by which experts."""
    tokens = trajectory.token_ids[:-1, None]
    if trajectory.routes is None or not by_routes:
        return tokens.astype(">i4")
    return np.concatenate([tokens, trajectory.routes.reshape(len(tokens), -1)], axis=1).astype(">i4")


class _Branch:
    """A tree under construction; sequences come in sorted order."""

    def __init__(self) -> None:
        self.size = 0
        self._tokens: list[np.ndarray] = []
        self._routes: list[np.ndarray] = []
        self._positions: list[np.ndarray] = []
        self._ends: list[np.ndarray] = []
        self._sources: list[np.ndarray] = []
        self._targets: list[np.ndarray] = []
        self._rows: list[np.ndarray] = []
        self._last: np.ndarray | None = None  # what the newest sequence read
        self._path = np.empty(0, np.int64)  # and its nodes
        self._paths: list[np.ndarray] = []
        self._closed: list[tuple[np.ndarray, int]] = []

    def _shared(self, read: np.ndarray) -> int:
        if self._last is None:
            return 0
        n = min(len(read), len(self._last))
        differ = np.flatnonzero((read[:n] != self._last[:n]).any(1))
        return int(differ[0]) if len(differ) else n

    def size_with(self, read: np.ndarray) -> int:
        return self.size + len(read) - self._shared(read)

    def add(self, trajectory: Trajectory, read: np.ndarray, row: int) -> None:
        shared = self._shared(read)
        self._closed.append((self._path[shared:], self.size))
        new = np.arange(self.size, self.size + len(read) - shared)
        self._tokens.append(read[shared:, 0].astype(np.int64))
        if trajectory.routes is not None:
            self._routes.append(trajectory.routes[shared:])
        self._positions.append(np.arange(shared, len(read)))
        self._path = np.concatenate([self._path[:shared], new])
        self._paths.append(self._path)
        self._last = read
        self.size += len(new)
        spoken = np.flatnonzero(trajectory.loss_mask[1:])
        self._sources.append(self._path[spoken])
        self._targets.append(trajectory.token_ids[1:][spoken].astype(np.int64))
        self._rows.append(np.full(len(spoken), row, np.int64))

    def tree(self) -> Tree:
        ends = np.full(self.size, self.size, np.int64)
        for nodes, end in self._closed:
            ends[nodes] = end
        return Tree(
            token_ids=np.concatenate(self._tokens),
            positions=np.concatenate(self._positions),
            ends=ends,
            sources=np.concatenate(self._sources),
            targets=np.concatenate(self._targets),
            rows=np.concatenate(self._rows),
            copies=np.bincount(np.concatenate(self._paths), minlength=self.size),
            routes=np.concatenate(self._routes) if self._routes else None,
        )


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Trees packed for one forward pass. All arrays int64 unless said.

    token_ids, positions, ends: [N]. lengths: [R] nodes per tree, longest first.
    sources, targets: [M] each distinct edge once. edges: [C] index into M of every loss-carrying token.
    rows: [C] the token's row; tokens of a row are in order. copies: [N] sequences through each node.
    routes: [N, L, K] int16 experts that the sampler chose, or None.
    """

    token_ids: np.ndarray
    positions: np.ndarray
    ends: np.ndarray
    lengths: np.ndarray
    sources: np.ndarray
    targets: np.ndarray
    edges: np.ndarray
    rows: np.ndarray
    copies: np.ndarray
    routes: np.ndarray | None


def pack(trees: Sequence[Tree], max_nodes: int) -> list[MicroBatch]:
    """Pack trees, longest first, into micro-batches of at most `max_nodes` nodes (a longer tree goes alone)."""
    batches: list[list[Tree]] = []
    size = max_nodes + 1
    for tree in sorted(trees, key=lambda tree: -tree.size):
        if size + tree.size > max_nodes:
            batches.append([])
            size = 0
        batches[-1].append(tree)
        size += tree.size
    return [_join(batch) for batch in batches]


def empty_micro_batch(token_id: int = 0) -> MicroBatch:
    """One node that predicts nothing: what a rank computes when the others have more micro-batches than it has."""
    none, one = np.empty(0, np.int64), np.ones(1, np.int64)
    return MicroBatch(one * token_id, one * 0, one, one, none, none, none, none, one * 0, None)


def _join(trees: Sequence[Tree]) -> MicroBatch:
    lengths = np.array([tree.size for tree in trees], np.int64)
    offsets = np.cumsum(lengths) - lengths
    sources = np.concatenate([tree.sources + offset for tree, offset in zip(trees, offsets, strict=True)])
    targets = np.concatenate([tree.targets for tree in trees])
    base = int(targets.max(initial=0)) + 1
    pairs, edges = np.unique(sources * base + targets, return_inverse=True)
    return MicroBatch(
        token_ids=np.concatenate([tree.token_ids for tree in trees]),
        positions=np.concatenate([tree.positions for tree in trees]),
        ends=np.concatenate([tree.ends + offset for tree, offset in zip(trees, offsets, strict=True)]),
        lengths=lengths,
        sources=pairs // base,
        targets=pairs % base,
        edges=edges.reshape(-1),
        rows=np.concatenate([tree.rows for tree in trees]),
        copies=np.concatenate([tree.copies for tree in trees]),
        routes=None if trees[0].routes is None else np.concatenate([tree.routes for tree in trees]),
    )
