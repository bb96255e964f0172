import threading

from parse.engines.native.fair_lock import FairLock


def test_only_one_at_a_time_and_whoever_waited_longest_is_next():
    turns, entered, inside = FairLock(), [], threading.Event()

    def work(name: str) -> None:
        with turns:
            assert not inside.is_set()
            inside.set()
            entered.append(name)
            inside.clear()

    threads = []
    with turns:
        for count, name in enumerate("abcde"):
            threads.append(threading.Thread(target=work, args=(name,)))
            threads[-1].start()
            while turns.waiting <= count:
                threading.Event().wait(0.001)
        assert not entered
    for thread in threads:
        thread.join()
    assert entered == list("abcde")


def test_a_turn_that_fails_is_over():
    turns = FairLock()
    for _ in range(2):
        try:
            with turns:
                raise ValueError
        except ValueError:
            pass
    with turns:
        pass
