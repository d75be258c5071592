"""Who goes on next, decided by a policy: host threads and device queues under one baton, so that a run can be repeated.

Exactly one of the *actors* (the caller's thread, the reader's thread, the compute queue, the copy queue) does anything
at a time. Host threads give the baton up at every call of the device and of `threading` (`pause`); a queue's head runs
when the policy picks the queue. An actor that waits names a condition, and is picked only when that holds. So a policy
sees every order that the waits allow, and where nobody can go on, that is found at once.

A queue's head runs in whichever host thread has the baton. OpenMP's number of threads is each thread's own, and sums
are rounded by it; so it is made the same in all of them.
"""

from __future__ import annotations

import itertools
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

HOSTS = ("main", "reader")
QUEUES = ("compute", "copy")
LANDING = "landing"  # the copy queue, where a move is under way and its second half comes next

Policy = Callable[[Sequence[str]], str]
Ready = Callable[[], bool]


class Blocked(RuntimeError):
    """Nobody can go on."""


def _sort(name: str) -> str:
    """A second reader is called `reader 2` and ranks as the first."""
    return name.partition(" ")[0]


# --- policies -----------------------------------------------------------------------------------------------------


def by_rank(*ranked: str) -> Policy:
    """Always the first of `ranked` that can go on; the second half of a move ranks as the copy queue, unless named."""
    order = {name: rank for rank, name in enumerate(ranked)}
    order.setdefault(LANDING, order["copy"])
    return lambda choices: min(choices, key=lambda name: order[_sort(name)])


def alternating() -> Policy:
    """Everyone in turn."""
    turns = itertools.count()

    def pick(choices: Sequence[str]) -> str:
        order = [*HOSTS, *QUEUES, LANDING]
        first = next(turns) % len(order)
        return min(choices, key=lambda name: (order.index(_sort(name)) - first) % len(order))

    return pick


def stopping(moves: int) -> Policy:
    """Copies early and compute late, until so many moves have landed; then the next stops halfway for as long as it can."""
    early = by_rank("reader", "copy", LANDING, "main", "compute")
    late = by_rank("reader", "copy", "main", "compute", LANDING)
    landed = 0

    def pick(choices: Sequence[str]) -> str:
        nonlocal landed
        name = (late if landed == moves else early)(choices)
        landed += name == LANDING
        return name

    return pick


def at_random(seed: int) -> Policy:
    """Ranks drawn anew after a random number of picks; one seed in three picks each time anew."""
    draws = random.Random(seed)
    ranked = [*HOSTS, *QUEUES, LANDING]
    left = 0

    def pick(choices: Sequence[str]) -> str:
        nonlocal left
        if left <= 0:
            draws.shuffle(ranked)
            left = 1 if seed % 3 == 0 else draws.randint(1, 60)
        left -= 1
        return min(choices, key=lambda name: ranked.index(_sort(name)))

    return pick


# extreme orders by what they are worst for
EXTREMES: dict[str, tuple[str, ...]] = {
    "copies early, compute late": ("reader", "copy", "main", "compute"),
    "the host runs ahead, copies late": ("main", "reader", "compute", "copy"),
    "compute early, copies late": ("compute", "main", "reader", "copy"),
    "the ring refilled early, compute late": ("reader", "main", "copy", "compute"),
    "copies as late as can be": ("main", "compute", "reader", "copy"),
    "moves stop halfway": ("reader", "copy", "main", "compute", LANDING),
    "moves stop halfway, the host ahead": ("main", "copy", "compute", "reader", LANDING),
}


def policies(
    seeds: int, *, every_rank: bool = False, stops: Sequence[int] = ()
) -> Iterator[tuple[str, Policy]]:
    """The extremes, stops at these moves, turns, on demand every other ranking of the four, `seeds` random ones: a name and a fresh policy each."""
    for name, ranked in EXTREMES.items():
        yield name, by_rank(*ranked)
    for moves in stops:
        yield f"stop at move {moves}", stopping(moves)
    yield "in turn", alternating()
    for ranked in itertools.permutations((*HOSTS, *QUEUES)) if every_rank else ():
        if ranked not in EXTREMES.values():
            yield " > ".join(ranked), by_rank(*ranked)
    for seed in range(seeds):
        yield f"seed {seed}", at_random(seed)


# --- actors -------------------------------------------------------------------------------------------------------


class _Host:
    """A thread that has the baton or waits for it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.ready: Ready = _always
        self.timeout: Ready | None = None  # whether its wait may end by time
        self.timed_out = False
        self.expired = False  # its wait ended by time, and nobody else went on since
        self.failure: BaseException | None = None  # raised where it next has the baton
        self.baton = threading.Lock()  # released to give it
        self.baton.acquire()


class _Entry(NamedTuple):
    name: str
    ready: Ready
    call: Callable[[], None]


class Scheduler:
    """The baton and the queues. `picks` lists who went on, in order."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._threads = torch.get_num_threads()
        self._hosts: dict[int, _Host] = {threading.get_ident(): _Host("main")}
        self._queues: dict[str, deque[_Entry]] = {name: deque() for name in QUEUES}
        self._put = dict.fromkeys(QUEUES, 0)
        self.picks: list[str] = []

    def put(
        self, queue: str, call: Callable[[], None], ready: Ready | None = None, *, name: str = ""
    ) -> None:
        """Put a call at the queue's end; its head runs when picked, by `name` or the queue's, and only while it is ready."""
        self._queues[queue].append(_Entry(name or queue, ready or _always, call))
        self._put[queue] += 1

    def length(self, queue: str) -> int:
        """How many calls lie in a queue."""
        return len(self._queues[queue])

    def drain(self, queue: str) -> None:
        """Wait until all that lies in the queue now has run."""
        wanted = self._put[queue]
        self.pause(lambda: self._put[queue] - len(self._queues[queue]) >= wanted)

    def pause(self, ready: Ready | None = None, *, timeout: Ready | None = None) -> bool:
        """Let others go on until the policy picks this thread, `ready` holding; False if its time ran out instead.

        Time runs out only when nobody can go on and `timeout` holds. Raises Blocked in the main thread where nobody can.
        """
        me = self._hosts[threading.get_ident()]
        me.ready, me.timeout = ready or _always, timeout
        chosen = self._next()
        if chosen is not me:
            chosen.baton.release()
            me.baton.acquire()
        me.timeout = None
        if me.failure is not None:
            error, me.failure = me.failure, None
            raise error
        timed_out, me.timed_out = me.timed_out, False
        return not timed_out

    def _next(self, leaving: _Host | None = None) -> _Host:
        """The host that goes on next; queues run meanwhile, as the policy picks them."""
        while True:
            hosts = {h.name: h for h in self._hosts.values() if h is not leaving}
            choices = [name for name, host in hosts.items() if host.ready()]
            heads = {q[0].name: q for q in self._queues.values() if q and q[0].ready()}
            choices += heads
            if not choices:
                return self._out_of_time(hosts)
            name = self._policy(choices)
            self.picks.append(name)
            for host in hosts.values():
                host.expired = host.expired and host.name == name
            if name in hosts:
                return hosts[name]
            try:
                heads[name].popleft().call()
            except BaseException as error:  # as a card tells of it: at one of the host's next calls
                return self._failed(error)

    def _out_of_time(self, hosts: dict[str, _Host]) -> _Host:
        for host in hosts.values():
            if host.timeout is not None and not host.expired and host.timeout():
                host.expired = host.timed_out = True
                return host
        return self._failed(Blocked("nobody can go on"))

    def _failed(self, error: BaseException) -> _Host:
        main = next(host for host in self._hosts.values() if host.name == "main")
        main.failure = error
        return main

    # threads
    @contextmanager
    def threads(self) -> Iterator[None]:
        """`executor.weights` uses the scheduler's threads and locks meanwhile."""
        own = SimpleNamespace(
            Condition=lambda: Condition(self),
            Lock=lambda: Condition(self),
            Thread=lambda **given: Thread(self, **given),
        )
        with patch("executor.weights.threading", own):
            yield

    def started(self, name: str, run: Callable[[], None]) -> threading.Thread:
        """A thread that begins with `run` when it is first picked."""
        others = sum(_sort(host.name) == name for host in self._hosts.values())
        host = _Host(f"{name} {others + 1}" if others else name)

        def body() -> None:
            host.baton.acquire()
            torch.set_num_threads(self._threads)
            try:
                run()
            finally:
                del self._hosts[threading.get_ident()]
                self._next().baton.release()

        thread = threading.Thread(target=body, name=name, daemon=True)
        thread.start()
        assert thread.ident is not None
        self._hosts[thread.ident] = host
        self.pause()
        return thread


class Condition:
    """`threading.Condition` (and, as a context manager alone, a lock) under the scheduler."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._held = False
        self._waiting: list[list[bool]] = []

    def _free(self) -> bool:
        return not self._held

    def __enter__(self) -> Condition:
        self._scheduler.pause(self._free)
        self._held = True
        return self

    def __exit__(self, *_: object) -> None:
        self._held = False

    def wait(self, timeout: float | None = None) -> bool:
        told = [False]
        self._waiting.append(told)
        self._held = False
        try:
            return self._scheduler.pause(
                lambda: told[0] and not self._held,
                timeout=self._free if timeout is not None else None,
            )
        finally:
            self._held = True

    def notify_all(self) -> None:
        for told in self._waiting:
            told[0] = True
        self._waiting.clear()


class Thread:
    """`threading.Thread` under the scheduler, called `reader` there."""

    def __init__(self, scheduler: Scheduler, *, target: Callable[[], None], **_: Any) -> None:
        self._scheduler = scheduler
        self._target = target
        self._thread: threading.Thread | None = None
        self._done = False

    @property
    def ident(self) -> int | None:
        return self._thread.ident if self._thread else None

    def start(self) -> None:
        self._thread = self._scheduler.started("reader", self._run)

    def _run(self) -> None:
        try:
            self._target()
        finally:
            self._done = True

    def is_alive(self) -> bool:
        return self._thread is not None and not self._done

    def join(self) -> None:
        self._scheduler.pause(lambda: self._done)
        assert self._thread is not None
        self._thread.join()


def _always() -> bool:
    return True
