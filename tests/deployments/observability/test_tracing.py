from deployments.observability.tracing import span_attributes
from parse.events import Usage
from parse.types import SpeculationStats


def test_the_span_of_an_answer_has_its_counts():
    usage = Usage("rounds", draft_tokens=9, accepted_tokens=4, target_tokens=10, rounds=1, cached_tokens=3)
    counts = {"drafted": 9, "accepted": 4, "written": 10, "rounds": 1, "cached": 3}
    expected = {f"parse.{name}": count for name, count in counts.items()} | {"parse.mode": "rounds"}
    assert span_attributes(usage) == expected | {"parse.speculation": "none"}
    writing = Usage("off", target_tokens=10, speculation=SpeculationStats("eagle3", 4, (4,), (3,)))
    assert (span_attributes(writing)["parse.speculation"], span_attributes(writing)["parse.passes"]) == ("eagle3", 4)
