"""Exact search for offsets below a given height: static memory allocation by depth-first search with inference.

Buffers are placed from the bottom up, each at its least offset: zero or the top of one it overlaps in time. Only
layouts that nothing can sink in are looked for (*canonical*: they are reached in non-decreasing order of offset, and one
of them exists wherever any layout does). What is inferred on the way:

- *sections*: where time is cut at births and deaths, floor plus the sizes still to come must stay below the height;
  the floor is the lowest offset that any buffer still to come can have there
- *dominance*: nothing is placed so high that a buffer still to come would fit below it
- *passed over*: a buffer that was not placed at its least offset must rest on one placed later, so it is at least as
  high as the lowest top among those; where there is none, the branch is dead
- *parts*: sections that no buffer still to come spans part the problem in time; each part is solved once, and a failure
  in one goes back to the decision that parted them
- *nothing overhead*: a buffer with none above it is placed without alternative

Source: Moffitt 2023, "MiniMalloc", ASPLOS, doi:10.1145/3623278.3624752 (canonical layouts, sections, dominance, parts);
the inference on buffers passed over is our own. No clock and no randomness: the same input takes the same nodes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

NEVER = sys.maxsize  # the least offset of what is placed already
STOP_EVERY = 32  # nodes between two looks at `stop`
SUSPECTS = 8  # sections looked at first, at most

Intervals = tuple[tuple[int, int], ...]


class Verdict(Enum):
    FOUND = "found"
    IMPOSSIBLE = "impossible"
    UNDECIDED = "undecided"  # the limit of nodes, or `stop`, came first


class Outcome(NamedTuple):
    verdict: Verdict
    offsets: list[int]  # empty unless found
    nodes: int


@dataclass(frozen=True, slots=True)
class Problem:
    """Buffers by index, and the sections of time that are not contained in another one."""

    sizes: list[int]
    lengths: list[int]  # of the lives
    members: list[tuple[int, ...]]  # of each section
    sections: list[tuple[int, ...]]  # of each buffer
    neighbours: list[tuple[int, ...]]  # of each buffer: those alive together with it
    first: list[int]  # section of each buffer
    last: list[int]  # one behind the last section of each buffer

    @property
    def lower_bound(self) -> int:
        """The largest sum of live bytes."""
        return max((sum(self.sizes[i] for i in found) for found in self.members), default=0)


def make_problem(sizes: Sequence[int], lives: Sequence[Intervals]) -> Problem:
    """Sections, neighbours and spans of buffers with these sizes and lives."""
    members = [tuple(sorted(found)) for found in _maximal(_live_sets(lives))]
    sections: list[list[int]] = [[] for _ in sizes]
    neighbours: list[set[int]] = [set() for _ in sizes]
    for index, found in enumerate(members):
        for i in found:
            sections[i].append(index)
            neighbours[i].update(found)
    return Problem(
        list(sizes),
        [sum(death - birth for birth, death in life) for life in lives],
        members,
        [tuple(found) for found in sections],
        [tuple(sorted(found - {i})) for i, found in enumerate(neighbours)],
        [found[0] for found in sections],
        [found[-1] + 1 for found in sections],
    )


def _live_sets(lives: Sequence[Intervals]) -> Iterator[frozenset[int]]:
    """What is alive, each time after a birth that a death follows."""
    events = sorted(
        (time, born, i)
        for i, life in enumerate(lives)
        for birth, death in life
        for time, born in ((birth, True), (death, False))
    )
    alive: set[int] = set()
    grown = False
    for _, born, i in events:  # at one time deaths (False) come before births
        if born:
            alive.add(i)
        else:
            if grown:
                yield frozenset(alive)
            alive.discard(i)
        grown = born


def _maximal(found: Iterator[frozenset[int]]) -> list[frozenset[int]]:
    kept: list[frozenset[int]] = []
    for alive in found:
        if kept and alive <= kept[-1]:
            continue
        while kept and kept[-1] <= alive:
            kept.pop()
        kept.append(alive)
    return kept


class Preference(NamedTuple):
    """What is placed first among buffers with the same offset."""

    fullest_first: (
        bool  # those of the sections with the largest sum still to come, weighed anew in every part
    )
    key: Callable[[Problem, int], tuple[int, ...]]
    tightest_first: bool = (
        False  # first what must lie on the lowest floor of a section without a byte to spare
    )


# searches differ by orders of magnitude in how soon they happen on a layout: try each a little, then longer
PREFERENCES: Sequence[Preference] = (
    Preference(True, lambda p, i: (-p.lengths[i], -p.sizes[i])),
    Preference(True, lambda p, i: (p.first[i] - p.last[i], -p.sizes[i]), True),
    Preference(True, lambda p, i: (-p.lengths[i] * p.sizes[i],)),
    Preference(True, lambda p, i: (-p.sizes[i],)),
    Preference(False, lambda p, i: (p.first[i] - p.last[i],), True),
)


class _Part(NamedTuple):
    """Sections `[first, last)` still to be solved on their own; a failure goes back to the decision `level`."""

    first: int
    last: int
    level: int
    offset: int  # nothing is placed below it any more
    rest: _Part | None


class _Node:
    """One decision: the candidates left, and what to undo."""

    __slots__ = ("back", "buffer", "candidates", "final", "is_tight", "low_mark", "members", "part", "rest", "rests", "section_mark")  # fmt: skip

    def __init__(
        self,
        part: tuple[int, int],
        members: list[int],
        back: int,
        rest: _Part | None,
        candidates: list[tuple[int, int]],
    ) -> None:
        self.part = part
        self.members = members
        self.back = back
        self.rest = rest
        self.candidates = candidates  # (offset, index in members), the best one last
        self.rests: dict[int, list[tuple[int, int]]] = {}
        self.is_tight = False
        self.final = False
        self.buffer = -1
        self.low_mark = self.section_mark = 0


def fit(
    problem: Problem,
    height: int,
    preference: Preference,
    *,
    nodes: int,
    tries: int | None = None,
    turn: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Offsets of all buffers below `height`, or why there are none; at most `nodes` decisions are opened, and `tries` buffers placed.

    Buffers alike to the preference are taken in their order; in another one in each other `turn`.
    """
    if problem.lower_bound > height:
        return Outcome(Verdict.IMPOSSIBLE, [], 0)
    search = _Search(problem, height, preference, tries, turn)
    try:
        return search.run(nodes, stop)
    except _EnoughTries:
        return Outcome(Verdict.UNDECIDED, [], len(search.nodes))


def _scrambled(number: int, turn: int) -> int:
    """The number itself in turn 0; in others it is mixed with the turn: an order that the rows of a table have no part in."""
    if not turn:
        return number
    mixed = (number * 0x9E3779B1 + turn * 0x85EBCA6B) & 0xFFFFFFFF
    mixed = (mixed ^ mixed >> 15) * 0x2C1B3C6D & 0xFFFFFFFF
    return mixed ^ mixed >> 12


class _EnoughTries(Exception):
    """As many buffers were placed as were allowed."""


class _Search:
    def __init__(
        self, problem: Problem, height: int, preference: Preference, tries: int | None, turn: int
    ) -> None:
        self.tries_left = sys.maxsize if tries is None else tries
        count = len(problem.sizes)
        self.problem, self.height, self.preference = problem, height, preference
        self.low = [0] * count  # least offset that can still be had; NEVER where placed
        self.rest_on = [
            0
        ] * count  # top of the highest placed neighbour; of what is placed: its offset
        self.floor = [0] * len(problem.members)
        self.total = [sum(problem.sizes[i] for i in found) for found in problem.members]
        order = sorted(
            range(count), key=lambda i: (*preference.key(problem, i), _scrambled(i, turn))
        )
        if preference.fullest_first:
            order.sort(key=self._fullest)
        self.rank = {i: rank for rank, i in enumerate(order)}
        self.spanning = [0] * len(problem.members)  # buffers to come over the cut behind a section
        for i in range(count):
            for section in range(problem.first[i], problem.last[i] - 1):
                self.spanning[section] += 1
        self.suspects: list[int] = []  # sections that ended branches, the last one first
        self.beside = [frozenset(found) for found in problem.neighbours]
        self.spans = [sum(1 << section for section in found) for found in problem.sections]
        self.witness = [
            found[0] for found in problem.members
        ]  # as low as the floor, where still so
        self.low_trail: list[tuple[int, int, int]] = []
        self.floor_trail: list[tuple[int, int]] = []
        self.nodes: list[_Node] = []

    def run(self, limit: int, stop: Callable[[], bool]) -> Outcome:
        path = self.nodes
        rest = self._parts(0, len(self.floor), -1, 0, None)
        opened = 0
        part, members, back, least = (0, 0), list[int](), -1, (0, -1)
        while True:
            if not members:
                if rest is None:
                    return Outcome(Verdict.FOUND, self.rest_on, opened)
                part, back, least = (rest.first, rest.last), rest.level, (rest.offset, -1)
                members = self._members(rest)
                rest = rest.rest
                continue
            opened += 1
            if opened > limit or (opened % STOP_EVERY == 0 and stop()):
                return Outcome(Verdict.UNDECIDED, [], opened)
            tight = (
                self._tightest(part, members, least[0]) if self.preference.tightest_first else []
            )
            candidates = tight or self._candidates(part, members, least)
            path.append(_Node(part, members, back, rest, candidates))
            path[-1].is_tight = bool(tight)
            while not (placed := self._advance(path[-1])):
                target = path.pop().back
                if target < 0:
                    return Outcome(Verdict.IMPOSSIBLE, [], opened)
                while len(path) - 1 > target:
                    self._undo(path.pop())
                self._undo(path[-1])
            node = path[-1]
            part, rest, back = node.part, node.rest, len(path) - 1
            index, offset = placed[0], placed[1]
            members = node.members[:index] + node.members[index + 1 :]
            least = (offset, -1 if node.is_tight else index - 1)
            if members and self._is_cut(node.buffer):
                rest = self._parts(*part, back, offset, rest)
                members = []

    def _parts(self, first: int, last: int, level: int, offset: int, rest: _Part | None) -> _Part | None:  # fmt: skip
        """Sections `[first, last)` parted where nothing to come spans two of them, before `rest`."""
        end = last
        for section in range(last - 1, first - 1, -1):
            if section == first or not self.spanning[section - 1]:
                rest = _Part(section, end, level, offset, rest)
                end = section
        return rest

    def _is_cut(self, buffer: int) -> bool:
        """Whether nothing to come spans two sections that the buffer just placed does."""
        problem = self.problem
        return 0 in self.spanning[problem.first[buffer] : problem.last[buffer] - 1]

    def _members(self, part: _Part) -> list[int]:
        """What is still to be placed in a part, the preferred ones first."""
        problem, low = self.problem, self.low
        found = [
            i
            for i in range(len(low))
            if low[i] != NEVER and part.first <= problem.first[i] and problem.last[i] <= part.last
        ]
        found.sort(key=self.rank.__getitem__)
        if self.preference.fullest_first:
            found.sort(key=self._fullest)
        return found

    def _fullest(self, buffer: int) -> int:
        total = self.total
        return -max([total[section] for section in self.problem.sections[buffer]])

    def _tightest(
        self, part: tuple[int, int], members: list[int], least: int
    ) -> list[tuple[int, int]]:
        """Candidates of one section that has no byte to spare and the lowest floor: one of them must lie on it.

        Empty where no section is like that. They overlap one another, so nothing is passed over.
        """
        low, rest_on, floor, total = self.low, self.rest_on, self.floor, self.total
        open_floors = [floor[s] for s in range(*part) if total[s]]
        lowest = max(least, min(open_floors))
        fewest: list[int] = []
        for section in range(*part):
            if floor[section] <= lowest and total[section] == self.height - lowest:
                found = [
                    i
                    for i in self.problem.members[section]
                    if low[i] == lowest and rest_on[i] == lowest
                ]
                if not fewest or len(found) < len(fewest):
                    fewest = found
        if not fewest:
            return []
        return sorted([(lowest, members.index(i)) for i in fewest], reverse=True)

    def _candidates(
        self, part: tuple[int, int], members: list[int], least: tuple[int, int]
    ) -> list[tuple[int, int]]:
        """(offset, index in members) of what may come next, the best one last."""
        low, rest_on, sizes = self.low, self.rest_on, self.problem.sizes
        highest = min(
            self.height - max(self.total[part[0] : part[1]]),
            min([rest_on[i] + sizes[i] for i in members]) - 1,
        )
        # where the least offset is inferred, not that of a top, there is nothing to rest on yet
        found = [
            (low[i], index)
            for index, i in enumerate(members)
            if low[i] <= highest and low[i] == rest_on[i]
        ]
        return sorted([candidate for candidate in found if candidate > least], reverse=True)

    def _advance(self, node: _Node) -> tuple[int, int] | None:
        """Place the next candidate of a node that leads to no contradiction: (index in members, offset)."""
        sections, total, height = self.problem.sections, self.total, self.height
        while node.candidates and not node.final:
            offset, index = node.candidates.pop()
            buffer = node.members[index]
            if offset + max([total[section] for section in sections[buffer]]) > height:
                continue
            self.tries_left -= 1
            if self.tries_left < 0:
                raise _EnoughTries
            if self._chokes(buffer, offset):
                continue
            passed_over = [] if node.is_tight else self._passed_over(node, index, offset)
            if self._place(node, buffer, offset) and self._lift(passed_over, offset):
                return index, offset
            self._undo(node)
        return None

    def _chokes(self, buffer: int, offset: int) -> bool:
        """Whether a section that ended branches would get too high beside a buffer at this offset."""
        problem, low, total = self.problem, self.low, self.total
        top, beside, span = offset + problem.sizes[buffer], self.beside[buffer], self.spans[buffer]
        for section in self.suspects:
            highest = self.height - total[section]
            if top <= highest or not total[section] or span >> section & 1:
                continue
            for i in problem.members[section]:
                if low[i] <= highest and i not in beside:
                    break
            else:
                self._suspect(section)
                return True
        return False

    def _suspect(self, section: int) -> None:
        """From now on look at this section first."""
        suspects = self.suspects
        if section in suspects:
            suspects.remove(section)
        suspects.insert(0, section)
        del suspects[SUSPECTS:]

    def _passed_over(
        self, node: _Node, index: int, offset: int
    ) -> list[tuple[int, list[tuple[int, int]]]]:
        """What could have been placed before this candidate, and what it could rest on now."""
        low, rests = self.low, node.rests
        found = []
        for at, i in enumerate(node.members):
            least = low[i]
            if least > offset or (least == offset and at >= index):
                continue
            if i not in rests:
                rests[i] = self._rests(i, offset)
            found.append((i, rests[i]))
        return found

    def _rests(self, buffer: int, offset: int) -> list[tuple[int, int]]:
        """(top, buffer) of all that a buffer can rest on if nothing more is placed below `offset`, the lowest first."""
        low, sizes = self.low, self.problem.sizes
        return sorted(
            [
                ((low[i] if low[i] > offset else offset) + sizes[i], i)
                for i in self.problem.neighbours[buffer]
                if low[i] != NEVER
            ]
        )

    def _place(self, node: _Node, buffer: int, offset: int) -> bool:
        """Place a buffer, raise what overlaps it; False where something to come has no room any more."""
        problem, low, rest_on, floor = self.problem, self.low, self.rest_on, self.floor
        sizes, spanning = problem.sizes, self.spanning
        size = sizes[buffer]
        top = offset + size
        node.buffer = buffer
        node.low_mark, node.section_mark = len(self.low_trail), len(self.floor_trail)
        self.low_trail.append((buffer, low[buffer], rest_on[buffer]))
        low[buffer] = NEVER
        total, sections = self.total, problem.sections[buffer]
        self.floor_trail += [(section, floor[section]) for section in sections]
        for section in sections:
            floor[section] = top
            total[section] -= size
        spanned = slice(problem.first[buffer], problem.last[buffer] - 1)
        spanning[spanned] = [count - 1 for count in spanning[spanned]]
        raised: list[int] = []
        last_offset = self.height - top
        fits, final = True, True
        for i in problem.neighbours[buffer]:
            least = low[i]
            if least == NEVER:
                continue
            final = False
            if rest_on[i] < top:
                self.low_trail.append((i, least, rest_on[i]))
                rest_on[i] = top
                if least < top:
                    low[i] = top
                    raised.append(i)
                    if sizes[i] > last_offset:
                        fits = False
                        break
        node.final = final and fits
        return fits and self._raise_floors(raised)

    def _lift(self, passed_over: list[tuple[int, list[tuple[int, int]]]], offset: int) -> bool:
        """Raise what was not placed where it could have been; False where it has nothing to rest on."""
        low, sizes = self.low, self.problem.sizes
        raised: list[int] = []
        for i, rests in passed_over:
            if low[i] > offset:
                continue  # it rests on what was just placed
            top = NEVER
            for before, other in rests:
                if before >= top:
                    break  # tops only rise while more is placed
                least = low[other]
                if least != NEVER:
                    now = (least if least > offset else offset) + sizes[other]
                    if now < top:
                        top = now
            if top + sizes[i] > self.height:
                return False
            self.low_trail.append((i, low[i], self.rest_on[i]))
            low[i] = top
            raised.append(i)
        return self._raise_floors(raised)

    def _raise_floors(self, raised: list[int]) -> bool:
        """Floors of the sections of buffers whose least offset rose; False where a section gets too high."""
        if not raised:
            return True
        touched = 0
        for i in raised:
            touched |= self.spans[i]
        for section in self.suspects:
            if touched >> section & 1:
                if self._is_too_high(section):
                    self._suspect(section)
                    return False
                touched ^= 1 << section
        while touched:
            section = touched.bit_length() - 1
            if self._is_too_high(section):
                self._suspect(section)
                return False
            touched ^= 1 << section
        return True

    def _is_too_high(self, section: int) -> bool:
        """Whether a section, with its floor where it is now, passes the height."""
        low, floor = self.low, self.floor[section]
        if low[self.witness[section]] <= floor:
            return False
        members = self.problem.members[section]
        for i in members:
            if low[i] <= floor:
                self.witness[section] = i
                return False
        least = min([low[i] for i in members])
        if least == NEVER:
            return False
        self.floor_trail.append((section, floor))
        self.floor[section] = least
        return least + self.total[section] > self.height

    def _undo(self, node: _Node) -> None:
        """Take the placement of a node back."""
        problem, low, rest_on, floor = self.problem, self.low, self.rest_on, self.floor
        for section, before in reversed(self.floor_trail[node.section_mark :]):
            floor[section] = before
        for i, least, top in reversed(self.low_trail[node.low_mark :]):
            low[i], rest_on[i] = least, top
        del self.floor_trail[node.section_mark :], self.low_trail[node.low_mark :]
        buffer, total, spanning = node.buffer, self.total, self.spanning
        size = problem.sizes[buffer]
        for section in problem.sections[buffer]:
            total[section] += size
        spanned = slice(problem.first[buffer], problem.last[buffer] - 1)
        spanning[spanned] = [count + 1 for count in spanning[spanned]]
