"""A thread pool whose threads start in advance."""

import threading
from concurrent.futures import ThreadPoolExecutor


def start_pool(threads: int, name: str) -> ThreadPoolExecutor:
    """Returns a pool whose threads are running.

    An ordinary pool starts a thread when work needs one. If memory or threads have run out by then, that raises an
    exception although other threads could do the work, or never returns, even on the event loop's thread.
    """
    pool = ThreadPoolExecutor(threads, name)
    all_running = threading.Barrier(threads + 1)
    for _ in range(threads):
        pool.submit(all_running.wait)
    all_running.wait()
    return pool
