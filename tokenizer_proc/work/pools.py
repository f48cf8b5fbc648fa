"""The queues of one front end: one for work that leaves the interpreter free, one for work that is done in Python."""

from __future__ import annotations

import os

from tokenizer_proc.work.queue import WorkQueue

MOST_TEXT_THREADS = 8
TEXT_NICENESS = 10
"""Long texts are encoded with the processor time that the other processes and the event loop leave."""
PYTHON_THREADS = 2
"""Threads of Python work run one at a time; a second one lets another tenant's work begin.

They are not niced: a niced thread that holds the interpreter would keep it while the machine is busy.
"""


class WorkPools:
    """The queue `texts` of tokenizers' work, and the queue `python` of templates and answers."""

    def __init__(self) -> None:
        cores = len(os.sched_getaffinity(0))
        self.texts = WorkQueue("a tokenizer", max(2, min(MOST_TEXT_THREADS, cores)), TEXT_NICENESS)
        self.python = WorkQueue("a thread", PYTHON_THREADS)

    def close(self) -> None:
        """Ends the threads of both queues once their current jobs have ended."""
        self.texts.close()
        self.python.close()
