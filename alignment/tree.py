"""Token trees: every prefix that sequences of a group share is computed once.

The sequences of a group are merged into a trie whose nodes are numbered in depth-first order. Then
"j is i or an ancestor of i" is `j <= i < end[j]`, with end[j] one past the last node below j: one rule is the attention
mask of a group's tree, of a single sequence (a tree without branches), and of many of them packed side by side.

    prompt a b, completions c d x | c e x | f x      nodes  a b c d e f     (the last token of a sequence is
                                                     end    6 6 5 4 5 6      predicted, never read: no node)

Letters: N nodes, M edges (node -> next token, each predicted once), C loss-carrying tokens, R trees, S longest tree.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from more_itertools import constrained_batches

from rollout.types import Trajectory


@dataclass(frozen=True, slots=True)
class Branch:
    """One sequence of a tree, whose first `shared` nodes are those of the sequence before it.

    row: what its tokens are labelled with in `MicroBatch.rows`."""

    trajectory: Trajectory
    row: int
    shared: int

    @property
    def size(self) -> int:
        """Number of nodes that are its own."""
        return len(self.trajectory.token_ids) - 1 - self.shared


Tree = list[Branch]
"""Some sequences of one group, sorted, so that each shares more with its neighbours than with any other."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Trees packed for one forward pass. All arrays int64 unless said.

    token_ids, positions, ends: [N]; ends is one past the last node of the subtree.
    lengths: [R] nodes per tree, longest first.
    sources, targets: [M] each distinct edge once: `targets[m]` is predicted from node `sources[m]`.
    edges: [C] index into M of every loss-carrying token.
    rows: [C] the token's row; tokens of a row are in order. copies: [N] sequences through each node.
    routes: [N, L, K] int16 experts of each node as the sampler chose them, or None."""

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


def plant(
    trajectories: Sequence[Trajectory], rows: Sequence[int], max_nodes: int, *, by_routes: bool = False
) -> list[Tree]:
    """Merge the sequences of one group into trees of at most `max_nodes` nodes (a longer sequence stands alone). A
    token is shared where the sequences agree up to it: on tokens, and with `by_routes` on the experts that the sampler
    chose for them (otherwise a shared node has the experts of one of its sequences)."""
    # Sorted, depth-first order comes by itself.
    keys = [_read(trajectory, by_routes) for trajectory in trajectories]
    order = sorted(range(len(keys)), key=lambda i: (keys[i].tobytes(), int(trajectories[i].token_ids[-1])))
    trees: list[Tree] = []
    size, last = 0, keys[0][:0]
    for i in order:
        n = min(len(last), len(keys[i]))
        shared = int(np.cumprod((last[:n] == keys[i][:n]).all(axis=1)).sum())
        if not trees or size + len(keys[i]) - shared > max_nodes:
            trees.append([])
            size = shared = 0
        trees[-1].append(Branch(trajectories[i], rows[i], shared))
        size += len(keys[i]) - shared
        last = keys[i]
    return trees


def _read(trajectory: Trajectory, by_routes: bool) -> np.ndarray:
    """[T-1, 1 + L * K] big-endian, so that bytes sort like numbers: what the model reads, and by which experts."""
    tokens = trajectory.token_ids[:-1, None]
    if trajectory.routes is None or not by_routes:
        return tokens.astype(">i4")
    return np.concatenate([tokens, trajectory.routes.reshape(len(tokens), -1)], axis=1).astype(">i4")


def pack(trees: Sequence[Tree], max_nodes: int) -> list[MicroBatch]:
    """Pack trees, longest first, into micro-batches of at most `max_nodes` nodes (a longer tree goes alone)."""
    longest_first = sorted(trees, key=_size, reverse=True)
    return [_micro_batch(some) for some in constrained_batches(longest_first, max_nodes, get_len=_size, strict=False)]


def _size(tree: Tree) -> int:
    return sum(branch.size for branch in tree)


def silent_batch(sequences: Sequence[np.ndarray] = (np.zeros(1),)) -> MicroBatch:
    """Sequences [T] that carry no loss, side by side. The default, one node, is what a rank computes when the others
    have more micro-batches than it has."""
    token_ids, lengths = np.concatenate(sequences).astype(np.int64), np.array([len(one) for one in sequences], np.int64)
    ends, none = np.repeat(np.cumsum(lengths), lengths), np.empty(0, np.int64)
    positions = np.concatenate([np.arange(length) for length in lengths])
    return MicroBatch(token_ids, positions, ends, lengths, none, none, none, none, np.zeros_like(ends), None)


def _micro_batch(trees: Sequence[Tree]) -> MicroBatch:
    branches = [branch for tree in trees for branch in tree]
    lengths = np.array([_size(tree) for tree in trees], np.int64)
    ends = np.full(lengths.sum(), lengths.sum())
    start, path = 0, np.empty(0, np.int64)
    paths, sources, targets = [], [], []
    for branch in branches:
        ends[path[branch.shared :]] = start  # what the sequence before had to itself is over
        path = np.concatenate([path[: branch.shared], np.arange(start, start := start + branch.size)])
        said = branch.trajectory.loss_mask[1:]
        paths.append(path)
        sources.append(path[said])
        targets.append(branch.trajectory.token_ids[1:][said])
    said_C = np.concatenate(targets)
    base = int(said_C.max(initial=0)) + 1
    pairs, edges = np.unique(np.concatenate(sources) * base + said_C, return_inverse=True)
    read = [branch.trajectory.token_ids[branch.shared : -1] for branch in branches]
    routes = [branch.trajectory.routes[branch.shared :] for branch in branches if branch.trajectory.routes is not None]
    return MicroBatch(
        token_ids=np.concatenate(read).astype(np.int64),
        positions=np.concatenate([np.arange(branch.shared, branch.shared + branch.size) for branch in branches]),
        ends=ends,
        lengths=lengths,
        sources=pairs // base,
        targets=pairs % base,
        edges=edges,
        rows=np.repeat([branch.row for branch in branches], [len(nodes) for nodes in sources]),
        copies=np.bincount(np.concatenate(paths), minlength=len(ends)),
        routes=np.concatenate(routes) if routes else None,
    )
