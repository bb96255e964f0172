"""A second, plain implementation of heads: without a cache, and one attention head at a time."""

import json
import math

import torch
from safetensors.torch import save_file

from parse.speculative.proposal import ProposalRequest


def sizes(**changes):
    """The content of a config.json."""
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 1,
        "rms_norm_eps": 1e-5,
        "vocab_size": 40,
        "draft_vocab_size": 25,
        "rope_theta": 500.0,
    } | changes


def layer_shapes(config, prefix, first):
    hidden, mlp = config["hidden_size"], config["intermediate_size"]
    width = hidden // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * width, config["num_key_value_heads"] * width
    attention_input = 2 * hidden if first else hidden
    return {
        **({f"{prefix}.hidden_norm.weight": (hidden,)} if first else {}),
        f"{prefix}.input_layernorm.weight": (hidden,),
        f"{prefix}.post_attention_layernorm.weight": (hidden,),
        f"{prefix}.self_attn.q_proj.weight": (queries, attention_input),
        f"{prefix}.self_attn.k_proj.weight": (keys, attention_input),
        f"{prefix}.self_attn.v_proj.weight": (keys, attention_input),
        f"{prefix}.self_attn.o_proj.weight": (hidden, queries),
        f"{prefix}.mlp.gate_proj.weight": (mlp, hidden),
        f"{prefix}.mlp.up_proj.weight": (mlp, hidden),
        f"{prefix}.mlp.down_proj.weight": (hidden, mlp),
    }


def checkpoint(config, midlayer="midlayer", seed=0):
    """Random tensors in the layout of EAGLE-3's authors."""
    hidden, vocabulary, draft = config["hidden_size"], config["vocab_size"], config["draft_vocab_size"]
    shapes = {"fc.weight": (hidden, 3 * hidden), "norm.weight": (hidden,), "lm_head.weight": (draft, hidden)}
    for number in range(config["num_hidden_layers"]):
        shapes |= layer_shapes(config, f"layers.{number}" if number else midlayer, not number)
    if "parallel_tokens" in config:
        shapes |= {"mask_embedding": (hidden,), "mask_hidden": (hidden,)}
    draw = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=draw) / (math.sqrt(shape[-1]) if len(shape) > 1 else 3) + (len(shape) == 1)
        for name, shape in shapes.items()
    }
    if draft < vocabulary:
        chosen = torch.randperm(vocabulary, generator=draw)[:draft].sort().values
        tensors["d2t"] = chosen - torch.arange(draft)
        tensors["t2d"] = torch.isin(torch.arange(vocabulary), chosen)
    return tensors


def write(folder, config, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def target_token(tensors, draft):
    return draft + int(tensors["d2t"][draft]) if "d2t" in tensors else draft


def norm(x, weight, config):
    return weight * (x / torch.sqrt((x * x).mean(-1, keepdim=True) + config["rms_norm_eps"]))


def rotate(vector, position, theta):
    half = len(vector) // 2
    out = vector.clone()
    for k in range(half):
        angle = position / theta ** (k / half)
        a, b = vector[k], vector[k + half]
        out[k] = a * math.cos(angle) - b * math.sin(angle)
        out[k + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def layer(tensors, config, prefix, embedded, hidden, positions):
    """Runs a layer on elements that each see themselves and those before them."""

    def weight(name):
        return tensors[f"{prefix}.{name}.weight"]

    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    width = config["hidden_size"] // heads
    if embedded is None:
        attention_input = norm(hidden, weight("input_layernorm"), config)
    else:
        attention_input = torch.cat(
            [norm(embedded, weight("input_layernorm"), config), norm(hidden, weight("hidden_norm"), config)], -1
        )
    query, key, value = (attention_input @ weight(f"self_attn.{name}_proj").T for name in "qkv")
    mixed = torch.zeros(len(hidden), heads * width)
    for head in range(heads):
        key_head = head * groups // heads
        query_columns = slice(head * width, (head + 1) * width)
        key_columns = slice(key_head * width, (key_head + 1) * width)
        for row in range(len(hidden)):
            rotated_query = rotate(query[row, query_columns], positions[row], config["rope_theta"])
            scores = torch.stack(
                [
                    rotated_query @ rotate(key[k, key_columns], positions[k], config["rope_theta"])
                    for k in range(row + 1)
                ]
            )
            mixed[row, query_columns] = (scores / math.sqrt(width)).softmax(0) @ value[: row + 1, key_columns]
    hidden = hidden + mixed @ weight("self_attn.o_proj").T
    normed = norm(hidden, weight("post_attention_layernorm"), config)
    gate_proj, up_proj = normed @ weight("mlp.gate_proj").T, normed @ weight("mlp.up_proj").T
    return hidden + (gate_proj * torch.sigmoid(gate_proj) * up_proj) @ weight("mlp.down_proj").T


def run(tensors, config, embedded, hidden, positions):
    for number in range(config["num_hidden_layers"]):
        name = f"layers.{number}" if number or "midlayer.hidden_norm.weight" not in tensors else "midlayer"
        hidden = layer(tensors, config, name, None if number else embedded, hidden, positions)
    return hidden


def logits(tensors, config, hidden):
    return norm(hidden, tensors["norm.weight"], config) @ tensors["lm_head.weight"].T


class Chain:
    """A chain of elements, all of which are computed again whenever one is added."""

    def __init__(self, tensors, config, embedding, tokens, hidden_states, positions):
        self.tensors, self.config, self.embedding = tensors, config, embedding
        self.embedded, self.positions = embedding[torch.tensor(tokens)], list(positions)
        self.hidden = hidden_states @ tensors["fc.weight"].T

    def last(self):
        return run(self.tensors, self.config, self.embedded, self.hidden, self.positions)[-1]

    def extended(self, token):
        """The chain with a drafted token appended, whose hidden vector is the output at the last element."""
        out = Chain.__new__(Chain)
        out.tensors, out.config, out.embedding = self.tensors, self.config, self.embedding
        out.embedded = torch.cat([self.embedded, self.embedding[token][None]])
        out.hidden = torch.cat([self.hidden, self.last()[None]])
        out.positions = [*self.positions, self.positions[-1] + 1]
        return out

    def logprobs(self):
        return logits(self.tensors, self.config, self.last()).log_softmax(-1)


def tree(chain, topk, depth, max_tokens):
    """The log-probability of each proposed node, by its path of tokens."""
    nodes = {}  # path -> log-probability

    def children(path, chain_to_path, score):
        logprobs, tokens = chain_to_path.logprobs().topk(topk)
        for logprob, token in zip(logprobs.tolist(), tokens.tolist(), strict=True):
            child_path = (*path, target_token(chain.tensors, token))
            nodes[child_path] = score + logprob
            yield child_path

    chains = {(): chain}
    beam = list(children((), chain, 0.0))
    for _ in range(depth):
        next_level = []
        for path in beam:
            chains[path] = chains[path[:-1]].extended(path[-1])
            next_level += children(path, chains[path], nodes[path])
        beam = sorted(next_level, key=nodes.__getitem__, reverse=True)[:topk]
    return dict(sorted(nodes.items(), key=lambda item: -item[1])[:max_tokens])


def paths(proposal):
    out: list[tuple[int, ...]] = []
    for token, parent in zip(proposal.token_ids, proposal.parents, strict=True):
        out.append((*out[parent], token) if parent >= 0 else (token,))
    return set(out)


def propose(proposer, state, max_tokens, min_probability=0.0, max_depth=1000):
    (proposal,) = proposer.propose([ProposalRequest(state, max_tokens, min_probability, max_depth)])
    return proposal


def propose_tree(proposer, state, max_tokens):
    """Tokens and parents of a proposal, without the probabilities, which rounding may change."""
    return tree_of(propose(proposer, state, max_tokens))


def tree_of(proposal):
    return tuple(proposal.token_ids), tuple(proposal.parents)


def path_probabilities(proposal):
    """The probability of each node, by its path of tokens."""
    probabilities: dict[tuple[int, ...], float] = {}
    out: list[tuple[int, ...]] = []
    for token, parent, probability in zip(proposal.token_ids, proposal.parents, proposal.probabilities, strict=True):
        out.append((*out[parent], token) if parent >= 0 else (token,))
        probabilities[out[-1]] = probability
    return probabilities
