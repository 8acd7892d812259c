"""Workers that are this process: tasks run in turn, after what other processes would send was sent."""

from __future__ import annotations

import pickle
from contextlib import contextmanager
from dataclasses import dataclass

from scconv_deploy.workers.tasks import attempt


@dataclass(frozen=True)
class Bytes:
    value: bytes

    def content(self):
        return self.value


class Here:
    """``elsewhere`` tells tasks to bring their files; ``order`` is the one in which they end."""

    within = None

    def __init__(self, jobs=3, elsewhere=False, order=reversed):
        self.jobs, self.elsewhere, self._order = jobs, elsewhere, order
        self.ran = []

    @contextmanager
    def sharing(self, content):
        yield Bytes(content)

    def run(self, tasks, tell):
        for task in self._order(list(tasks)):
            sent = pickle.loads(pickle.dumps(task))  # noqa: S301  (made in the same line)
            self.ran.append(sent.name)
            tell(sent.name, "starting")
            yield pickle.loads(pickle.dumps(attempt(sent, tell)))  # noqa: S301
