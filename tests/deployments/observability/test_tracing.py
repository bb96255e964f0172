from deployments.observability.tracing import spanned
from parse.protocol import Usage
from parse.types import Speculated


def test_a_span_of_an_answer_says_what_it_took():
    usage = Usage("rounds", drafted=9, accepted=4, written=10, rounds=1, cached=3)
    counts = {"drafted": 9, "accepted": 4, "written": 10, "rounds": 1, "cached": 3}
    wanted = {f"parse.{name}": count for name, count in counts.items()} | {"parse.mode": "rounds"}
    assert spanned(usage) == wanted | {"parse.speculation": "none"}
    writing = Usage("off", written=10, speculated=Speculated("eagle3", 4, (4,), (3,)))
    assert (spanned(writing)["parse.speculation"], spanned(writing)["parse.passes"]) == ("eagle3", 4)
