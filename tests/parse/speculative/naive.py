"""A head written out once more, as plainly as can be: from a checkpoint's tensors, without a cache, head by head."""

import json
import math

import torch
from safetensors.torch import save_file

from parse.speculative.proposal import ProposalRequest


def sizes(**changes):
    """As in a config.json."""
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
    entering = 2 * hidden if first else hidden
    return {
        **({f"{prefix}.hidden_norm.weight": (hidden,)} if first else {}),
        f"{prefix}.input_layernorm.weight": (hidden,),
        f"{prefix}.post_attention_layernorm.weight": (hidden,),
        f"{prefix}.self_attn.q_proj.weight": (queries, entering),
        f"{prefix}.self_attn.k_proj.weight": (keys, entering),
        f"{prefix}.self_attn.v_proj.weight": (keys, entering),
        f"{prefix}.self_attn.o_proj.weight": (hidden, queries),
        f"{prefix}.mlp.gate_proj.weight": (mlp, hidden),
        f"{prefix}.mlp.up_proj.weight": (mlp, hidden),
        f"{prefix}.mlp.down_proj.weight": (hidden, mlp),
    }


def checkpoint(config, midlayer="midlayer", seed=0):
    """Random tensors in the authors' layout."""
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


def turned(vector, position, theta):
    half = len(vector) // 2
    out = vector.clone()
    for k in range(half):
        angle = position / theta ** (k / half)
        a, b = vector[k], vector[k + half]
        out[k] = a * math.cos(angle) - b * math.sin(angle)
        out[k + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def layer(tensors, config, prefix, embedded, hidden, positions):
    """Elements that each see those before them."""

    def weight(name):
        return tensors[f"{prefix}.{name}.weight"]

    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    width = config["hidden_size"] // heads
    if embedded is None:
        entering = norm(hidden, weight("input_layernorm"), config)
    else:
        entering = torch.cat(
            [norm(embedded, weight("input_layernorm"), config), norm(hidden, weight("hidden_norm"), config)], -1
        )
    query, key, value = (entering @ weight(f"self_attn.{name}_proj").T for name in "qkv")
    mixed = torch.zeros(len(hidden), heads * width)
    for head in range(heads):
        here, there = slice(head * width, (head + 1) * width), head * groups // heads
        there = slice(there * width, (there + 1) * width)
        for row in range(len(hidden)):
            asked = turned(query[row, here], positions[row], config["rope_theta"])
            scores = torch.stack(
                [asked @ turned(key[k, there], positions[k], config["rope_theta"]) for k in range(row + 1)]
            )
            mixed[row, here] = (scores / math.sqrt(width)).softmax(0) @ value[: row + 1, there]
    hidden = hidden + mixed @ weight("self_attn.o_proj").T
    normed = norm(hidden, weight("post_attention_layernorm"), config)
    gate, up = normed @ weight("mlp.gate_proj").T, normed @ weight("mlp.up_proj").T
    return hidden + (gate * torch.sigmoid(gate) * up) @ weight("mlp.down_proj").T


def run(tensors, config, embedded, hidden, positions):
    for number in range(config["num_hidden_layers"]):
        name = f"layers.{number}" if number or "midlayer.hidden_norm.weight" not in tensors else "midlayer"
        hidden = layer(tensors, config, name, None if number else embedded, hidden, positions)
    return hidden


def logits(tensors, config, hidden):
    return norm(hidden, tensors["norm.weight"], config) @ tensors["lm_head.weight"].T


class Chain:
    """Elements one after the other, run anew whenever one is added."""

    def __init__(self, tensors, config, embedding, tokens, features, positions):
        self.tensors, self.config, self.embedding = tensors, config, embedding
        self.embedded, self.positions = embedding[torch.tensor(tokens)], list(positions)
        self.hidden = features @ tensors["fc.weight"].T

    def last(self):
        return run(self.tensors, self.config, self.embedded, self.hidden, self.positions)[-1]

    def longer(self, token):
        """With a drafted token behind, which goes with the guess of the feature before it."""
        out = Chain.__new__(Chain)
        out.tensors, out.config, out.embedding = self.tensors, self.config, self.embedding
        out.embedded = torch.cat([self.embedded, self.embedding[token][None]])
        out.hidden = torch.cat([self.hidden, self.last()[None]])
        out.positions = [*self.positions, self.positions[-1] + 1]
        return out

    def logprobs(self):
        return logits(self.tensors, self.config, self.last()).log_softmax(-1)


def tree(chain, beam, depth, most):
    """(token, parent) of the nodes proposed, and how likely each is, by its path of tokens."""
    nodes = {}  # path -> log-probability
    level = []

    def children(path, here, score):
        likely, tokens = here.logprobs().topk(beam)
        for logprob, token in zip(likely.tolist(), tokens.tolist(), strict=True):
            longer = (*path, target_token(chain.tensors, token))
            nodes[longer] = score + logprob
            yield longer

    texts = {(): chain}
    level = list(children((), chain, 0.0))
    for step in range(depth):
        found = []
        for path in level:
            texts[path] = texts[path[:-1]].longer(path[-1])
            found += children(path, texts[path], nodes[path])
        level = sorted(found, key=nodes.__getitem__, reverse=True)[:beam]
        if step == depth - 1:
            break
    return dict(sorted(nodes.items(), key=lambda item: -item[1])[:most])


def paths(proposal):
    out: list[tuple[int, ...]] = []
    for token, parent in zip(proposal.tokens, proposal.parents, strict=True):
        out.append((*out[parent], token) if parent >= 0 else (token,))
    return set(out)


def proposed(method, proposer, most, floor=0.0, depth=1000):
    (proposal,) = method.propose([ProposalRequest(proposer, most, floor, depth)])
    return proposal


def drafted(method, proposer, most):
    """Without the chances, which rounding may change."""
    return bare(proposed(method, proposer, most))


def bare(proposal):
    return tuple(proposal.tokens), tuple(proposal.parents)


def chances(proposal):
    """By the path of tokens."""
    found: dict[tuple[int, ...], float] = {}
    out: list[tuple[int, ...]] = []
    for token, parent, likely in zip(proposal.tokens, proposal.parents, proposal.likely, strict=True):
        out.append((*out[parent], token) if parent >= 0 else (token,))
        found[out[-1]] = likely
    return found
