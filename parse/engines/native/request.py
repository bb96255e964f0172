"""A request in the engine.

It consists of a program and the progress of the tree that the program waits for.
"""

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from parse.engines.native.generation import Program, TreeInput
from parse.engines.native.prefix_cache import SequenceState


class RequestListener(Protocol):
    """Is notified in the engine's thread when a request ends."""

    def on_finished(self, error: BaseException | None) -> None: ...


@dataclass(eq=False)
class Request:
    """A program together with the state of the tree that it waits for.

    The tokens of a request's sequence and the nodes of its tree form one row of entries. The scheduler computes the row
    in chunks, from left to right.
    """

    token_ids: list[int]  # the context; a preempted request continues with all tokens that it has committed
    program: Program
    max_new_tokens: int  # how many tokens it may add to its context
    listener: RequestListener
    sequence: SequenceState | None = None  # None while the request waits
    started: bool = False
    num_cached_tokens: int = 0  # how many tokens of the context were already computed at its start
    tree_input: TreeInput = field(default_factory=lambda: TreeInput((), ()))
    num_computed: int = 0  # entries of the row
    logits: list[Tensor] = field(default_factory=list)  # of the chunks so far, at the nodes that the program reads
    sampled_token_ids: list[int] = field(default_factory=list)  # a token for each row of these logits
    cancelled: bool = False

    @property
    def num_entries(self) -> int:
        assert self.sequence is not None
        return len(self.sequence.token_ids) + len(self.tree_input.nodes)

    @property
    def num_uncomputed(self) -> int:
        return self.num_entries - self.num_computed
