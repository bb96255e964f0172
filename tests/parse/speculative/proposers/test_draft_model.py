"""What a small random model would write by itself is asked of the library, one text at a time and without a cache."""

import gc
import math
import random
import threading
from copy import deepcopy

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from parse.engines.native.model import Model
from parse.speculative.guard import GuardedProposer
from parse.speculative.proposal import NO_PROPOSAL, NOT_READY, ProposalRequest
from parse.speculative.proposers import draft_model
from parse.speculative.proposers.draft_model import DraftModelProposer
from parse.speculative.proposers.eagle_head import ProposerLoadError
from tests.parse.engines.native.tiny import VOCABULARY, build, plain
from tests.parse.speculative.naive import bare, proposed

MOST = 5
CAPACITY = 160
REFERENCE = build("llama", seed=4)


def text(rng, size):
    return [rng.randrange(VOCABULARY) for _ in range(size)]


def written(ids, size, reference=REFERENCE):
    """What the model writes behind a text, and how likely it is up to each token."""
    given = torch.tensor([ids])
    out = reference.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=size, do_sample=False, use_cache=False
    )[0].tolist()
    chances = plain(reference, out[:-1]).double().softmax(-1)[len(ids) - 1 :]
    likely = [float(row[token]) for row, token in zip(chances, out[len(ids) :], strict=True)]
    return out[len(ids) :], [math.prod(likely[: place + 1]) for place in range(size)]


def is_what_it_writes(proposal, ids, size=MOST, reference=REFERENCE):
    tokens, likely = written(ids, size, reference)
    assert bare(proposal) == (tuple(tokens), tuple(range(-1, size - 1)))
    assert list(proposal.likely) == pytest.approx(likely, rel=1e-3)
    return True


class Counting:
    """The sizes of all passes of a model."""

    def __init__(self, model):
        self.sizes: list[int] = []
        self._forward, model.forward = model.forward, self

    def __call__(self, tokens, *rest):
        self.sizes.append(len(tokens))
        return self._forward(tokens, *rest)

    def since(self):
        sizes, self.sizes = self.sizes, []
        return sizes


def small(tokenizer, reference=REFERENCE, contexts=4, capacity=CAPACITY):
    method = DraftModelProposer(Model(deepcopy(reference), tokenizer))
    method.reserve(contexts, capacity)
    return method, Counting(method.model)


def taken(method, ids):
    proposer = method.new_state()
    proposer.extend(ids, None, None)
    return proposer


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "gpt2", "mixtral"])
def test_a_chain_is_what_the_small_model_would_write(kind, tokenizer):
    reference = build(kind, seed=2)
    method, _ = small(tokenizer, reference, contexts=6)
    rng = random.Random(0)
    for size in (1, 2, 15, 16, 17, 90):
        ids = text(rng, size)
        assert is_what_it_writes(proposed(method, taken(method, ids), MOST), ids, reference=reference)


def test_what_was_drafted_and_accepted_is_not_read_again_and_what_was_rejected_leaves_no_trace(tokenizer):
    method, read = small(tokenizer, capacity=256)
    rng = random.Random(1)
    ids = text(rng, 20)
    proposer, expected = taken(method, ids), [len(ids) - 1, 1]
    for most in (4, 1, 6, 3, 5, 5, 2, 7, 4, 4, 6, 1, 3):
        proposal = proposed(method, proposer, most)
        assert is_what_it_writes(proposal, ids, most)
        assert read.since() == expected + [1] * (most - 1)
        accepted = rng.randint(0, most)
        own = (
            written([*ids, *proposal.token_ids[:accepted]], 1)[0][0] + 1 + rng.randrange(VOCABULARY - 1)
        ) % VOCABULARY
        new = [*proposal.token_ids[:accepted], own]
        # The last token it drafted it has not read itself.
        expected = [len(new) - min(accepted, most - 1)]
        ids += new
        proposer.extend(new, None, None)


def test_a_text_that_went_on_without_proposals_is_caught_up_with(tokenizer):
    method, read = small(tokenizer)
    rng = random.Random(2)
    ids = text(rng, 9)
    proposer = taken(method, ids)
    first = proposed(method, proposer, MOST)
    new = [*first.token_ids, *text(rng, 30)]
    for token in new:
        proposer.extend([token], None, None)
    read.since()
    assert is_what_it_writes(proposed(method, proposer, MOST), [*ids, *new])
    assert sum(read.since()) == len(new) - (MOST - 1) + MOST - 1


def test_who_asks_again_of_the_same_text_gets_nothing_and_loses_nothing(tokenizer):
    method, _ = small(tokenizer)
    ids = text(random.Random(3), 9)
    proposer = taken(method, ids)
    first = proposed(method, proposer, MOST)
    assert proposed(method, proposer, MOST) == NO_PROPOSAL
    proposer.extend(first.token_ids[:3], None, None)
    assert is_what_it_writes(proposed(method, proposer, MOST), [*ids, *first.token_ids[:3]])


def test_who_has_taken_nothing_has_nothing_to_propose(tokenizer):
    method, read = small(tokenizer)
    assert not proposed(method, method.new_state(), MOST).token_ids and not read.since()


def test_a_long_text_is_read_in_pieces_while_it_is_written_on(tokenizer, monkeypatch):
    monkeypatch.setattr(draft_model, "READ", 16)
    method, read = small(tokenizer)
    rng = random.Random(4)
    ids = text(rng, 100)
    proposer = taken(method, ids)
    for _ in range(6):
        assert proposed(method, proposer, MOST) == NOT_READY
        assert read.since() == [16]
        new = text(rng, 2)
        ids += new
        proposer.extend(new, None, None)
    assert is_what_it_writes(proposed(method, proposer, MOST), ids)
    assert read.since() == [3, 13] + [1] * (MOST - 1)


def test_while_long_texts_are_read_the_others_keep_their_proposals_and_no_pass_is_large(tokenizer, monkeypatch):
    monkeypatch.setattr(draft_model, "READ", 16)
    method, read = small(tokenizer)
    rng = random.Random(5)
    short, *long = text(rng, 10), text(rng, 40), text(rng, 30)
    proposer = taken(method, short)
    proposed(method, proposer, MOST)
    wishes = [ProposalRequest(one, MOST) for one in (*(taken(method, ids) for ids in long), proposer)]
    for turn in range(5):
        read.since()
        short.append(rng.randrange(VOCABULARY))
        proposer.extend(short[-1:], None, None)
        *others, chain = method.propose(wishes)
        assert is_what_it_writes(chain, short)
        assert sum(read.since()) <= 16 + 3 * (MOST + 1)
        if turn < 2:
            assert others == [NOT_READY, NOT_READY]
        if turn == 2:
            assert is_what_it_writes(others[0], long[0]) and others[1] == NOT_READY
        if turn == 4:
            assert is_what_it_writes(others[1], long[1])


def test_texts_together_have_the_proposals_of_each_alone(tokenizer):
    """They are of different lengths, come and go, and keep different shares of what was proposed."""
    method, read = small(tokenizer, contexts=12)
    rng = random.Random(6)
    going: list = []
    for turn in range(12):
        for _ in range(2 if turn < 4 else 0):
            ids = text(rng, rng.choice((1, 5, 18, 40)))
            going.append((taken(method, ids), ids))
        asking = rng.sample(going, rng.randint(1, len(going)))
        wishes = [ProposalRequest(proposer, rng.randint(1, MOST)) for proposer, _ in asking]
        read.since()
        found = method.propose(wishes)
        assert len(read.since()) <= len(asking) + max(wish.max_tokens for wish in wishes)
        for (proposer, ids), wish, proposal in zip(asking, wishes, found, strict=True):
            assert is_what_it_writes(proposal, ids, wish.max_tokens)
            new = [*proposal.token_ids[: rng.randint(0, wish.max_tokens)], rng.randrange(VOCABULARY)]
            ids += new
            proposer.extend(new, None, None)
        if turn > 6:
            going.pop(0)


def test_below_the_floor_nothing_is_proposed_and_nobody_drafts_on(tokenizer):
    method, read = small(tokenizer)
    rng = random.Random(7)
    for size in (3, 12, 30, 31):
        ids = text(rng, size)
        _, likely = written(ids, MOST)
        for kept in range(MOST):
            below, above = ([1.0, *likely][kept], likely[kept])
            proposer = taken(method, ids)
            proposal = proposed(method, proposer, MOST, math.sqrt(below * above))
            assert list(proposal.token_ids) == written(ids, MOST)[0][:kept]
            passes = [size for size in read.since() if size == 1]
            assert len(passes) <= kept + 1
            # And the text goes on from there as if nothing had been proposed.
            proposer.extend([8], None, None)
            assert is_what_it_writes(proposed(method, proposer, MOST), [*ids, 8])
            read.since()


def test_each_text_has_its_own_floor_and_reach(tokenizer):
    method, _ = small(tokenizer, contexts=5)
    rng = random.Random(8)
    texts = [text(rng, 12) for _ in range(4)]
    floors = [0.0, 1.0, math.sqrt(math.prod(written(texts[2], 3)[1][1:])), 0.0]
    depths = [2, 9, 9, 9]
    wishes = [
        ProposalRequest(taken(method, ids), MOST, floor, depth)
        for ids, floor, depth in zip(texts, floors, depths, strict=True)
    ]
    found = [len(proposal.token_ids) for proposal in method.propose(wishes)]
    assert found == [2, 0, 2, MOST]


def test_without_memory_nothing_is_proposed_until_there_is_some(tokenizer):
    method, _ = small(tokenizer, contexts=2)
    rng = random.Random(9)
    texts = [text(rng, 40) for _ in range(3)]
    proposers = [taken(method, ids) for ids in texts]
    first, second, third = method.propose([ProposalRequest(proposer, MOST) for proposer in proposers])
    assert is_what_it_writes(first, texts[0]) and is_what_it_writes(second, texts[1]) and third == NOT_READY
    for ids, proposer in zip(texts, proposers, strict=True):
        ids.append(7)
        proposer.extend([7], None, None)
    del proposer, proposers[0]
    second, third = method.propose([ProposalRequest(proposer, MOST) for proposer in proposers])
    assert is_what_it_writes(second, texts[1]) and is_what_it_writes(third, texts[2])


def let_go(texts):
    texts.clear()


def let_go_elsewhere(texts):
    thread = threading.Thread(target=texts.clear)
    thread.start()
    thread.join()


def let_go_in_a_circle(texts):
    for one in texts:
        one.itself = one
    one = None
    texts.clear()
    gc.collect()


@pytest.mark.parametrize("letting_go", [let_go, let_go_elsewhere, let_go_in_a_circle])
def test_texts_let_go_give_their_memory_back(letting_go, tokenizer):
    method, _ = small(tokenizer, contexts=3)
    rng = random.Random(10)
    for _ in range(5):
        texts = [text(rng, 30) for _ in range(3)]
        proposers = [taken(method, ids) for ids in texts]
        found = method.propose([ProposalRequest(proposer, MOST) for proposer in proposers])
        assert all(is_what_it_writes(proposal, ids) for proposal, ids in zip(found, texts, strict=True))
        letting_go(proposers)


@pytest.mark.parametrize("there", [True, False], ids=["while it is written", "when it is done"])
def test_a_beginning_that_was_read_once_is_not_read_again(there, tokenizer):
    method, read = small(tokenizer)
    rng = random.Random(11)
    beginning = text(rng, 64)
    one, other = [*beginning, *text(rng, 10)], [*beginning, *text(rng, 5)]
    first = taken(method, one)
    proposed(method, first, MOST)
    if not there:
        del first
    read.since()
    assert is_what_it_writes(proposed(method, taken(method, other), MOST), other)
    assert sum(read.since()) == len(other) - len(beginning) + MOST - 1
    if there:  # and the other one has not suffered
        first.extend([3], None, None)
        assert is_what_it_writes(proposed(method, first, MOST), [*one, 3])


def test_a_text_longer_than_its_memory_is_let_alone(tokenizer):
    method, read = small(tokenizer, contexts=3, capacity=48)
    rng = random.Random(12)
    neighbours = [text(rng, 20) for _ in range(2)]
    others = [taken(method, ids) for ids in neighbours]
    method.propose([ProposalRequest(proposer, MOST) for proposer in others])
    ids = text(rng, 42)
    grown, huge = taken(method, ids), taken(method, text(rng, 70))
    for _ in range(8):
        read.since()
        grown_chain, nothing = method.propose([ProposalRequest(grown, MOST), ProposalRequest(huge, MOST)])
        # The last token drafted needs no memory.
        reach = max(0, min(MOST, 48 - len(ids) + 1))
        if reach:
            assert is_what_it_writes(grown_chain, ids, reach)
        assert len(grown_chain.token_ids) == reach and nothing == NO_PROPOSAL
        ids.append(9)
        grown.extend([9], None, None)
    for proposer, known in zip(others, neighbours, strict=True):
        proposer.extend([5], None, None)
        assert is_what_it_writes(proposed(method, proposer, MOST), [*known, 5])


def test_a_small_model_that_knows_fewer_positions_than_the_target_keeps_within_them(tokenizer, caplog):
    reference = build("gpt2", seed=3, n_positions=32, max_position_embeddings=32)
    method, _ = small(tokenizer, reference, capacity=300)
    guard = GuardedProposer(method, VOCABULARY)
    rng = random.Random(13)
    for size, reach in ((20, MOST), (30, 3), (32, 1), (33, 0), (200, 0)):
        ids = text(rng, size)
        proposer = guard.new_state()
        proposer.extend(ids, None, None)
        (proposal,) = guard.propose([ProposalRequest(proposer, MOST)])
        assert list(proposal.token_ids) == (written(ids, reach, reference)[0] if reach else [])
    assert not caplog.records


def test_a_token_that_only_the_target_knows_ends_the_proposals_for_its_text(tokenizer, caplog):
    """Embeddings of one family are padded to different sizes."""
    method, _ = small(tokenizer)
    guard = GuardedProposer(method, VOCABULARY + 8)
    ids = text(random.Random(14), 12)
    strange, plain_one, late = (guard.new_state() for _ in range(3))
    strange.extend([*ids, VOCABULARY, 4], None, None)
    plain_one.extend(ids, None, None)
    late.extend(ids, None, None)
    found = guard.propose([ProposalRequest(proposer, MOST) for proposer in (strange, plain_one, late)])
    assert found[0] == NO_PROPOSAL and is_what_it_writes(found[1], ids) and is_what_it_writes(found[2], ids)
    for proposer in (strange, plain_one):
        proposer.extend([4], None, None)
    late.extend([VOCABULARY + 7], None, None)
    found = guard.propose([ProposalRequest(proposer, MOST) for proposer in (strange, plain_one, late)])
    assert found[0] == found[2] == NO_PROPOSAL and is_what_it_writes(found[1], [*ids, 4])
    assert not caplog.records


def test_a_token_that_only_the_small_model_knows_is_never_proposed(tokenizer):
    known = 40
    method = DraftModelProposer(Model(deepcopy(REFERENCE), tokenizer), known)
    method.reserve(8, CAPACITY)
    rng = random.Random(16)
    for size in range(1, 9):
        ids = [rng.randrange(known) for _ in range(size)]
        proposal = proposed(method, taken(method, ids), MOST)
        logits = plain(REFERENCE, [*ids, *proposal.token_ids])[size - 1 : -1, :known]
        assert list(proposal.token_ids) == logits.argmax(-1).tolist()


def test_a_model_with_another_tokenizer_is_refused(tokenizer, tmp_path):
    REFERENCE.save_pretrained(tmp_path)
    words = {f"word{number}": number for number in range(len(tokenizer))}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "word0"))).save_pretrained(tmp_path)
    target = Model(build("llama"), tokenizer)
    with pytest.raises(
        ProposerLoadError, match=f"{tmp_path} does not speak the target's tokens: its tokenizer is another one"
    ):
        DraftModelProposer.load(tmp_path, target, device="cpu", dtype="float32")


def test_a_model_on_disk_is_served_as_it_is(tokenizer, tmp_path):
    reference = build("llama", vocab_size=len(tokenizer), seed=4)
    reference.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    target = Model(build("llama", vocab_size=len(tokenizer)), tokenizer)
    method = DraftModelProposer.load(tmp_path, target, device="cpu", dtype="float32")
    method.reserve(1, CAPACITY)
    ids = text(random.Random(15), 25)
    assert is_what_it_writes(proposed(method, taken(method, ids), MOST), ids, reference=reference)
    keys_and_values = 2 * 2 * 2 * 8  # of two layers with two key heads of width 8
    assert method.bytes_per_token == keys_and_values * 4
