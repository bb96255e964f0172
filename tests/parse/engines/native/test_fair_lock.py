import threading

from parse.engines.native.fair_lock import FairLock


def test_one_thread_holds_the_lock_and_the_one_that_waited_longest_is_next():
    lock, entered, inside = FairLock(), [], threading.Event()

    def work(name: str) -> None:
        with lock:
            assert not inside.is_set()
            inside.set()
            entered.append(name)
            inside.clear()

    threads = []
    with lock:
        for count, name in enumerate("abcde"):
            threads.append(threading.Thread(target=work, args=(name,)))
            threads[-1].start()
            while lock.waiting <= count:
                threading.Event().wait(0.001)
        assert not entered
    for thread in threads:
        thread.join()
    assert entered == list("abcde")


def test_an_error_releases_the_lock():
    lock = FairLock()
    for _ in range(2):
        try:
            with lock:
                raise ValueError
        except ValueError:
            pass
    with lock:
        pass
