"""Whose sentence is next: fair shares between requests, and streams that would fall silent first.

The fair part is weighted fair queueing with one weight (Demers, Keshav and Shenker, 1989): a virtual clock advances by
the cost of what is admitted, shared by the requests that wait; each request carries the virtual time at
which its next sentence is due, and the earliest goes first. A newcomer is due at once, however long a book has been
read for; but the clock goes on, so however many newcomers there are, the book's turn comes.
"""

from __future__ import annotations

import heapq

from .job import Job

URGENT_S = 1.0  # a stream with less audio than this ahead goes first
URGENT_RUN = 4  # urgent sentences in a row before another's turn

_Entry = tuple[float, int, Job]


class FairQueue:
    """Jobs with waiting sentences, each of which stays until it has none."""

    def __init__(self) -> None:
        self._clock = 0.0
        self._fair: list[_Entry] = []
        self._queued: set[Job] = set()  # in `_fair`, and with sentences to come
        self._urgent: list[_Entry] = []
        self._urgent_at: dict[Job, float] = {}  # the entry of each job in `_urgent`; its others are old
        self._run = 0  # urgent ones in a row

    def __len__(self) -> int:
        """Jobs that wait."""
        return len(self._queued)

    def push(self, job: Job) -> None:
        """A job has something to wait for."""
        if job not in self._queued:
            job.tag = max(job.tag, self._clock)
            self._queued.add(job)
            heapq.heappush(self._fair, (job.tag, job.order, job))
        if job.wish.stream:
            self._push_urgent(job)

    def discard(self, job: Job) -> None:
        """A job waits no more."""
        self._queued.discard(job)
        self._urgent_at.pop(job, None)

    def choose(self, now: float, blocked: set[Job]) -> Job | None:
        """The job whose next sentence is due, of those not `blocked`; None where there is none."""
        job = self._hurried(now, blocked) if self._run < URGENT_RUN else None
        self._run = 0 if job is None else self._run + 1
        return job or self._earliest(blocked) or self._hurried(now, blocked)

    def ready(self, most: int, enough: int) -> int:
        """Sentences that wait, of jobs that may have `most` running each; counted until there are `enough`."""
        count = 0
        for job in self._queued:
            count += max(0, min(len(job.waiting), most - len(job.running)))
            if count >= enough:
                break
        return count

    def pressing(self, now: float) -> bool:
        """Whether a stream waits that is due."""
        return bool(self._urgent) and self._hurried(now, set()) is not None

    def charge(self, job: Job, cost: float) -> None:
        """A job's sentence of `cost` has been admitted."""
        self._clock += cost / (len(self._queued) + 1)  # as if one more waited: who comes next is ahead of who has had
        job.tag += cost
        if job not in self._queued:
            return
        if job.waiting and not job.over:
            heapq.heappush(self._fair, (job.tag, job.order, job))
        else:
            self.discard(job)

    def _earliest(self, blocked: set[Job]) -> Job | None:
        kept, found = [], None
        while self._fair:
            entry = self._fair[0]
            tag, _, job = entry
            if job not in self._queued or tag != job.tag:  # gone, or pushed anew since
                heapq.heappop(self._fair)
            elif job in blocked:
                kept.append(heapq.heappop(self._fair))
            else:
                found = job
                break
        for entry in kept:
            heapq.heappush(self._fair, entry)
        return found

    def _hurried(self, now: float, blocked: set[Job]) -> Job | None:
        kept, found = [], None
        while self._urgent:
            at, _, job = self._urgent[0]
            if self._urgent_at.get(job) != at:
                heapq.heappop(self._urgent)
            elif job.dry_at() > at:  # it has been given more audio since
                heapq.heappop(self._urgent)
                self._urgent_at.pop(job)
                self._push_urgent(job)
            elif at - now > URGENT_S:
                break
            elif job in blocked:
                kept.append(heapq.heappop(self._urgent))
            else:
                found = job
                break
        for entry in kept:
            heapq.heappush(self._urgent, entry)
        return found

    def _push_urgent(self, job: Job) -> None:
        at = job.dry_at()
        if at < self._urgent_at.get(job, float("inf")):
            self._urgent_at[job] = at
            heapq.heappush(self._urgent, (at, job.order, job))
