"""Threads that are there before they are needed."""

import threading
from concurrent.futures import ThreadPoolExecutor


def start_pool(threads: int, name: str) -> ThreadPoolExecutor:
    """Returns a pool whose threads are running.

    By itself a pool starts a thread when work needs one. If memory or threads have run out by then, that raises an
    exception although other threads would do, or never returns, on the event loop's thread too.
    """
    pool = ThreadPoolExecutor(threads, name)
    all_running = threading.Barrier(threads + 1)
    for _ in range(threads):
        pool.submit(all_running.wait)
    all_running.wait()
    return pool
