"""Tree search (PUCT) over sets of tokens, evaluated by the model itself.

  select  argmax  (q - min q) / (max q - min q) + c p sqrt(N of the parent) / (1 + n)
  expand  the leaf by sets of tokens, with priors p
  backup  n += 1,  q += (v - q) / n    and a share of v to siblings of similar text

Python on the host: the tree holds texts (tuples of ids), and `World` has the functions
that evaluate them. Decisions are by visits, which depend on priors as well as values.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Text = tuple[int, ...]


class World(NamedTuple):
    """The functions of the tree; a text is a response from its first token on."""

    propose: Callable[
        [Text, int], list[tuple[Text, float]]
    ]  # (text, depth): sets, masses
    another: Callable[
        [Text, int, list[Text]], tuple[Text, float] | None
    ]  # one that is not in the list
    evaluate: Callable[[Text], tuple[float, Text]]  # v in [-1, 1], and the text judged
    embed: Callable[[Text, list[int]], np.ndarray]  # of the text from each index on
    over: Callable[[Text], bool]  # whether the response is complete


class Rules(NamedTuple):
    """The constants; their defaults are those of the authors' code."""

    exploration: float = 2.0  # c
    simulations: int = 50  # per decision, with those of the kept subtree
    extra: int = 15  # fewest new simulations per decision
    settled_visits: int = 6  # with more than these, and
    settled_value: float = 0.8  # more than this, the decision is made early
    uniform: float = 0.25  # share of the root's priors
    alike: float = 0.95  # least cosine at which a sibling is updated with v
    share: float = 0.2  # of a visit, for such a sibling
    most: int = 20  # children of a node
    spread: float = (
        0.03  # per token: a child is added below this, if all values are below 0
    )


@dataclasses.dataclass
class Node:
    """A set of tokens that follows those of its parents."""

    tokens: Text
    mass: float
    depth: int
    prior: float = 0.0
    n: float = 0.0  # visits, and shares of visits of siblings
    visits: int = 0
    q: float = 0.0
    embedding: np.ndarray | None = None
    children: list["Node"] = dataclasses.field(default_factory=list)


def respond(world: World, rules: Rules) -> tuple[Text, int]:
    """A response, chosen set by set, and the number of simulations."""
    root, simulations = Node((), 1.0, 0), 0
    text: Text = ()
    bounds = [-1.0, 1.0]
    while not world.over(text):
        for _ in range(max(rules.simulations - root.visits, rules.extra)):
            simulate(root, text, bounds, world, rules)
            simulations += 1
            if root.children:
                best = decision(root)
                if best.visits > rules.settled_visits and best.q > rules.settled_value:
                    break
        root = decision(root)
        text = (*text, *root.tokens)
        _mix(root, rules)
    return text, simulations


def decision(root: Node) -> Node:
    """The child with the most visits; of equals, the one with the best value."""
    return max(root.children, key=lambda child: (child.n, child.q))


def simulate(
    root: Node, text: Text, bounds: list[float], world: World, rules: Rules
) -> None:
    """Selects a leaf, evaluates and expands it, and updates the nodes of its path."""
    path, begins = [root], [len(text)]
    while path[-1].children:
        node = path[-1]
        _add(node, node is root, text, world, rules)
        child = _select(node, bounds, rules)
        path.append(child)
        begins.append(len(text))
        text = (*text, *child.tokens)
    value, whole = world.evaluate(text)
    leaf = path[-1]
    if not world.over(text):
        sets = world.propose(text, leaf.depth)
        total = sum(mass for _, mass in sets)
        leaf.children = [
            Node(tokens, mass, leaf.depth + 1, mass / total) for tokens, mass in sets
        ]
        if leaf is root:
            _mix(root, rules)
    _backup(path, value, world.embed(whole, begins[1:]), bounds, rules)


def _select(node: Node, bounds: list[float], rules: Rules) -> Node:
    low, high = bounds

    def puct(child):
        value = (child.q - low) / (high - low + 1e-5) if child.n else 0.0
        return value + rules.exploration * child.prior * node.n**0.5 / (1 + child.n)

    return max(node.children, key=puct)


def _backup(path, value, embeddings, bounds, rules):
    path[0].n += 1
    path[0].visits += 1
    for parent, node, seen in zip(path, path[1:], embeddings, strict=False):
        node.n += 1
        node.visits += 1
        old = 0.0 if node.embedding is None else node.embedding
        node.embedding = old + (seen - old) / node.visits
        for sibling in parent.children if rules.alike <= 1 else ():
            if sibling is node or sibling.embedding is None:
                continue
            cosine = _cosine(node.embedding, sibling.embedding)
            if cosine >= rules.alike:
                share = rules.share * cosine
                sibling.q = (sibling.q * sibling.n + share * value) / (
                    sibling.n + share
                )
                sibling.n += share
        node.q += (value - node.q) / node.n
        bounds[:] = min(bounds[0], node.q), max(bounds[1], node.q)


def _cosine(a, b):
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b) + 1e-12))


def _mix(root: Node, rules: Rules) -> None:
    """Mixes the priors of a root with the uniform distribution."""
    for child in root.children:
        even = 1 / len(root.children)
        child.prior = (1 - rules.uniform) * child.prior + rules.uniform * even


def _add(node: Node, is_root: bool, text: Text, world: World, rules: Rules) -> None:
    """Adds a child where all are similar and none has a positive value."""
    seen = [c.embedding for c in node.children if c.embedding is not None]
    if not 2 <= len(node.children) < rules.most or len(seen) < len(node.children):
        return
    spread = float(np.linalg.norm(np.var(np.stack(seen), axis=0, ddof=1)))
    close = spread < rules.spread * len(node.children[0].tokens)
    if not close or max(c.q for c in node.children) >= 0:
        return
    found = world.another(text, node.depth, [c.tokens for c in node.children])
    if found is None:
        return
    tokens, mass = found
    prior = mass / (mass + sum(c.mass for c in node.children))
    if is_root:
        even = 1 / (len(node.children) + 1)
        prior = (1 - rules.uniform) * prior + rules.uniform * even
    node.children.append(Node(tokens, mass, node.depth + 1, prior))
