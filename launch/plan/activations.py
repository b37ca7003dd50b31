"""What a microbatch keeps on a stage between its forward and its backward, phase by phase. No torch.

The phases are those that the tape records (parallel/pipeline/tape.py), the bytes those of the tensors that
autograd saves inside a phase and of a phase's outputs, which the tape holds. Recomputation keeps the
outputs alone and makes the rest again, one phase at a time. Weight gradients that are put off, as they are
where rows travel, keep the rows that a product took and the gradient of what it made, until they are made.

Counted is what CUDA and CPU both keep: flash attention (queries, keys, values, output, log-sum-exp), a norm
as its fp32 input and its rounded result. Where CUDA has one kernel for a norm in fp32 it keeps a little less.
What comes and goes is CUDA's: a layer's rows are taken, multiplied and summed whole, and an activation is
made by one kernel. The CPU takes some hundred rows of experts at a time, and activates in fp32 tiles of at
most half a megabyte, which are not counted.
Legend: t tokens of this rank, n tokens between gather and scatter of tensor parallelism, D hidden size,
H heads of this rank, E experts, K chosen experts, N rows of this rank's experts, V vocabulary, b bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from moe.config import RunConfig
from moe.model.stages import Part
from parallel.layout import Layout

BLOCK = 512  # queries whose scores exist at one time: that of moe/model/attention.py, which needs torch
CHUNK = 8192  # rows of the head whose logits exist at one time: that of parallel/head.py
_FP32, _INT = 4, 8  # bytes: scores, softmax and losses are fp32, indices int64


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Bytes of one phase of one microbatch.

    `outputs` and, without recomputation, `inside` stay until the backward; of these, `rows` stay with
    `grads` until weight gradients are made. `forward` and `backward` come and go beside them, and
    `weights` while weight gradients are made. `begins_unit`: those of the unit before are made by then;
    `wire`: what travels behind its backward, which waits there and makes weight gradients meanwhile.
    """

    name: str
    outputs: int = 0
    inside: int = 0
    rows: int = 0
    grads: int = 0
    forward: int = 0
    backward: int = 0
    wire: int = 0
    weights: int = 0
    begins_unit: bool = False

    @property
    def is_exchange(self) -> bool:
        """Whether its outputs are rows that are sent or have come."""
        return self.name in ("dispatch", "combine")


@dataclass(frozen=True)
class Microbatch:
    """What one rank has of a microbatch, under a layout and an imbalance of the experts' load."""

    config: RunConfig
    layout: Layout
    imbalance: float  # rows that this rank's experts receive, over the mean

    @property
    def b(self) -> int:
        """Bytes of a number in hidden states."""
        return 2 if self.config.train.dtype == "bf16" else 4

    @property
    def sequences(self) -> int:
        """Sequences side by side."""
        return self.config.train.batch_size // (self.layout.dp * self.config.layout.microbatches)

    @property
    def n(self) -> int:
        """Tokens of this context-parallel rank."""
        return self.sequences * self.config.data.sequence_length // self.layout.cp

    @property
    def t(self) -> int:
        """Tokens of this rank."""
        return self.n // self.layout.tp

    @property
    def sent(self) -> int:
        """Rows that this rank sends."""
        return self.t * self.config.model.top_k

    @property
    def received(self) -> int:
        """Rows that come to this rank; the most that can come is every token to all of its experts."""
        model, ep = self.config.model, self.layout.ep
        most = self.t * ep * min(model.top_k, model.num_experts // ep)
        factor = min(self.imbalance, model.capacity_factor or self.imbalance)
        return self.sent if ep == 1 else min(most, round(factor * self.sent))

    @property
    def boundaries(self) -> int:
        """Hidden states and their gradients between pipeline stages, as they are sent and as they come."""
        return 4 * self.b * self.t * self.config.model.hidden_size if self.layout.pp > 1 else 0

    def norm(self, width: int) -> int:
        """Per token: what a norm keeps beside its input and its output."""
        return _FP32 + width * (_FP32 + (self.b if self.b < _FP32 else 0))


def phases(micro: Microbatch, part: Part) -> list[Phase]:
    """The phases of a stage in forward order."""
    model = micro.config.model
    hidden = micro.b * micro.t * model.hidden_size
    rotation = _FP32 * model.rotated_dims * (micro.n // micro.sequences)
    found = [_embedding(micro)] if part.first else [Phase(name="boundary", outputs=hidden)]
    found[0] = replace(found[0], outputs=found[0].outputs + rotation + _mask(micro))
    for layer in part.layers:
        first, *others = _layer(micro, is_moe=model.is_moe(layer))
        found += [replace(first, begins_unit=True), *others]
    if part.last:
        found += [_final_norm(micro), _head(micro)]
        for _ in range(model.num_mtp_layers):
            again = replace(_embedding(micro), begins_unit=True)
            found += [again, _join(micro), *_layer(micro, is_moe=True), _head(micro, normed=True)]
    return found


def _mask(micro: Microbatch) -> int:
    length = micro.config.data.sequence_length
    masked = micro.config.data.separate_documents and micro.layout.cp == 1
    return micro.sequences * length**2 if masked else 0


def _embedding(micro: Microbatch) -> Phase:
    model, tp = micro.config.model, micro.layout.tp
    table = micro.b * model.vocab_size // tp * model.hidden_size
    inside = micro.n * (_INT + 1) if tp > 1 else 0  # rows of this rank's part, and which are elsewhere
    hidden = micro.b * micro.t * model.hidden_size
    return Phase(name="embedding", outputs=hidden, inside=inside, backward=table + hidden * tp)


def _layer(micro: Microbatch, *, is_moe: bool) -> Iterator[Phase]:
    yield _attention(micro)
    if not is_moe:
        yield _mlp(micro, "dense", micro.config.model.intermediate_size)
        return
    yield _router(micro)
    yield from _routed_here(micro) if micro.layout.ep * micro.layout.etp == 1 else _routed_away(micro)


def _attention(micro: Microbatch) -> Phase:
    """Both norms, the products between them, and attention itself (moe/model/attention_layer.py)."""
    model, b, t, n, hidden = micro.config.model, micro.b, micro.t, micro.n, micro.config.model.hidden_size
    products = _grouped(micro) if model.attention == "gqa" else _latent(micro)
    core = _ring(micro) if micro.layout.cp > 1 else _flash(micro)
    mixed = b * n * model.num_heads // micro.layout.tp * model.value_head_dim
    return Phase(
        name="attention",
        outputs=2 * b * t * hidden + core.outputs,
        inside=2 * t * micro.norm(hidden) + products.inside + core.inside,
        rows=products.rows + mixed + b * t * hidden,  # what is normed for the MLP is its products' rows
        grads=products.grads + b * n * hidden,
        forward=core.forward,
        backward=2 * b * t * hidden + max(core.backward, t * hidden * (2 * b + 5 * _FP32)),  # or a norm's
        wire=b * n * _passing(micro) if micro.layout.cp > 1 else 0,
    )


def _latent(micro: Microbatch) -> Phase:
    """The products with latents between (moe/model/mla.py)."""
    model, tp, b, t, n = micro.config.model, micro.layout.tp, micro.b, micro.t, micro.n
    D, H, latent, rank = model.hidden_size, model.num_heads // tp, model.kv_lora_rank, model.q_lora_rank
    passing = _passing(micro)
    of_query = b * n * rank if rank is not None else (b * n * D if tp > 1 else 0)  # rows of its last product
    inside = t * micro.norm(latent) + b * t * D + of_query
    inside += t * micro.norm(rank) if rank is not None else 0
    inside += b * t * (passing + (rank or 0)) if b == _FP32 else 0  # the inputs of the latents' norms
    up = n * H * (model.qk_nope_head_dim + model.v_head_dim) * micro.layout.cp
    return Phase(
        name="attention",
        inside=inside,
        rows=b * t * D + of_query + b * n * passing * micro.layout.cp,
        grads=b * (t * (passing + (rank or 0)) + up + n * H * model.qk_head_dim),
    )


def _grouped(micro: Microbatch) -> Phase:
    """The products to queries, keys and values, and the norms behind them (moe/model/gqa.py)."""
    model, tp, b, n = micro.config.model, micro.layout.tp, micro.b, micro.n
    H, G, W = model.num_heads // tp, model.kv_heads // tp, model.qk_head_dim
    whole = b * n * model.hidden_size
    norms = {
        "none": 0,
        "head": (H + G) * micro.norm(W),
        "full": micro.norm(H * W) + micro.norm(G * W),
    }[model.qk_norm]
    if norms and b == _FP32:
        norms += b * (H + G) * W  # their inputs
    return Phase(name="attention", inside=whole + n * norms, rows=whole, grads=b * (n * (H + G) + n * G) * W)


def _passing(micro: Microbatch) -> int:
    """Numbers per token from which keys and values are made, and which pass round the ring."""
    model = micro.config.model
    if model.attention == "gqa":
        return 2 * model.kv_heads // micro.layout.tp * model.qk_head_dim
    return model.kv_lora_rank + model.qk_rope_head_dim


def _flash(micro: Microbatch) -> Phase:
    """Queries, keys, values, output; values narrower than queries are padded (moe/model/attention.py)."""
    model, n, b = micro.config.model, micro.n, micro.b
    H, query, value = model.num_heads // micro.layout.tp, model.qk_head_dim, model.value_head_dim
    padded = value < query
    if model.attention == "gqa":
        kept = n * H * 4 * query
    else:
        per_head = 4 * query + value if padded else 2 * query + model.qk_nope_head_dim + 2 * value
        kept = n * (H * per_head + _passing(micro))
    return Phase(
        name="attention",
        inside=b * (kept + _mask(micro)) + _FP32 * n * H,
        backward=b * n * H * (3 * query + value + (query if padded else 0)),
    )


def _ring(micro: Microbatch) -> Phase:
    """Partial attentions, of our queries to every rank's keys, and their merging.

    Of the ranks that share sequences the first has most: the other ranks' keys, whole, to half its queries.
    """
    model, n, b, cp = micro.config.model, micro.n, micro.b, micro.layout.cp
    H, query, value = model.num_heads // micro.layout.tp, model.qk_head_dim, model.value_head_dim
    passing, queries = _passing(micro), n * (cp + 1) // 2
    scores = _FP32 * H * min(BLOCK, n // micro.sequences) * n
    partial = queries * H * (b * value + _FP32)  # output and log-sum-exp
    if model.attention == "mla":
        expanded = b * n * H * (query + model.qk_nope_head_dim + value)
    else:  # a head without others in its group needs no copy
        expanded = b * n * H * 2 * query if model.kv_heads < model.num_heads else 0
    return Phase(
        name="attention",
        outputs=b * micro.t * model.hidden_size * 2 + b * n * (H * query + cp * passing) + partial,
        inside=cp * expanded + b * n * H * value + _FP32 * n * H * cp,
        forward=2 * scores + b * n * H * (2 * query + value),
        backward=3 * scores + b * n * H * (4 * query + 2 * value) + _FP32 * n * H * (query + value),
    )


def _shared(micro: Microbatch) -> Iterator[Phase]:
    """All shared experts as one MLP, if there are any."""
    model = micro.config.model
    if model.num_shared_experts:
        yield _mlp(micro, "shared", model.num_shared_experts * model.moe_intermediate_size)


def _mlp(micro: Microbatch, name: str, width: int) -> Phase:
    """A dense MLP with the residual added, or all shared experts (moe/model/mlp.py)."""
    tp, b, D = micro.layout.tp, micro.b, micro.config.model.hidden_size
    F, gathered = width // tp, b * micro.n * D if tp > 1 else 0
    return Phase(
        name=name,
        outputs=b * micro.t * D,
        inside=gathered + b * micro.n * 3 * F,
        rows=gathered + b * micro.n * F,
        grads=b * micro.n * (D + 2 * F),
        backward=b * (micro.t * D + micro.n * 3 * F),
        weights=b * 2 * F * D if b < _FP32 else 0,
    )


def _router(micro: Microbatch) -> Phase:
    model, t = micro.config.model, micro.t
    E, K, D = model.num_experts, model.top_k, model.hidden_size
    widened = _FP32 * D * (t + E) if micro.b < _FP32 else 0  # hidden states and the router's weight
    inside = widened + t * (_FP32 * (E + K + 1) + _INT * K)
    if any((micro.config.balance.sequence_aux, micro.config.balance.microbatch_aux)):
        inside += t * _FP32
    # Beside the weights the indices of the plan: whom, in which order, from which row.
    outputs = t * K * (_FP32 + 3 * _INT)
    return Phase(
        name="router", outputs=outputs, inside=inside, backward=2 * _FP32 * t * E + widened + _FP32 * E * D
    )


def _routed_here(micro: Microbatch) -> Iterator[Phase]:
    """Shared experts, then the sum of all experts and of the residual (moe/model/layer.py)."""
    model, N = micro.config.model, micro.received
    hidden = micro.b * micro.t * model.hidden_size
    yield from _shared(micro)
    made = _experts(micro, N, model.moe_intermediate_size, source=micro.t)
    tokens = _INT * N  # of each row
    yield replace(made, outputs=2 * hidden, inside=made.inside + tokens, grads=made.grads + hidden)


def _routed_away(micro: Microbatch) -> Iterator[Phase]:
    """Dispatch of rows and weights, shared experts meanwhile, experts, and the way back (layer.py)."""
    model, layout, b = micro.config.model, micro.layout, micro.b
    D, F, wired = model.hidden_size, model.moe_intermediate_size // layout.etp, layout.ep > 1
    row, hidden, N = b * D, b * micro.t * D, micro.received * layout.etp
    sent, came = row * micro.sent, row * micro.received if wired else 0
    weights = _FP32 * (micro.sent + (micro.received if wired else 0))
    yield Phase(name="dispatch", outputs=sent + came + weights, backward=sent + hidden + 2 * came)
    yield from _shared(micro)
    if layout.etp > 1:
        yield Phase(name="dispatch", outputs=2 * (row + _FP32) * N, backward=row * N)
    ordered = model.num_experts > layout.ep  # else the order in which rows arrive is that of experts
    made = _experts(micro, N, F, source=N if ordered else 0)
    returned = row * N + (row * N if layout.etp > 1 else sent)  # gradients of the exchange just before
    yield replace(
        made,
        outputs=row * N + (2 * _INT * N if ordered else 0),
        rows=made.rows + row * N,
        grads=made.grads + row * N,
        backward=made.backward + returned,
        wire=sent + row * micro.received,
    )
    if layout.etp > 1:
        yield Phase(name="combine", outputs=row * N + row * micro.received, backward=row * N)
    yield Phase(
        name="combine",
        outputs=(sent if wired else 0) + 2 * hidden,  # the last is the sum with the residual
        inside=_INT * micro.sent,
        backward=sent,
        wire=sent + came,
    )


def _experts(micro: Microbatch, N: int, F: int, *, source: int) -> Phase:
    """Both products, from so many rows; 0: these are in expert order (parallel/grouped.py)."""
    tune, b, row = micro.config.tune, micro.b, micro.b * micro.config.model.hidden_size
    taken, narrow = row * N if source else 0, b * N * F
    if tune.method == "lora" and "experts" in tune.lora_targets:  # each step for itself
        return Phase(
            name="experts",
            inside=taken + 3 * narrow + _FP32 * N + b * N * 2 * tune.lora_rank,
            rows=taken + narrow,
            grads=row * N + 2 * narrow,
            forward=max(3 * row * N, 4 * narrow),
            backward=3 * row * N + 3 * narrow,
        )
    return Phase(
        name="experts",
        inside=2 * narrow + _FP32 * N,
        grads=3 * narrow,
        forward=narrow + taken,
        backward=3 * narrow + row * (N + source),
    )


def _final_norm(micro: Microbatch) -> Phase:
    D = micro.config.model.hidden_size
    hidden = micro.b * micro.t * D
    return Phase(
        name="head",
        outputs=hidden,
        inside=micro.t * micro.norm(D),
        rows=hidden,
        backward=3 * hidden,
        begins_unit=True,
    )


def _head(micro: Microbatch, *, normed: bool = False) -> Phase:
    """Logits in fp32 and their softmax, whole or by the chunk; an MTP module's has a norm of its own."""
    model, tune, tp, b, n = micro.config.model, micro.config.tune, micro.layout.tp, micro.b, micro.n
    D, V = model.hidden_size, model.vocab_size // tp
    logits, hidden = _FP32 * n * V, b * n * D
    gathered = hidden if tp > 1 else 0
    inside = gathered + n * (_INT + _FP32)
    inside += micro.t * micro.norm(D) + b * micro.t * D if normed else 0
    adapted = tune.method == "lora" and "head" in tune.lora_targets
    if V > CHUNK and not adapted:
        chunk = n * CHUNK * (_FP32 + (b if b < _FP32 else 0))
        inside += n * (1 + _FP32)  # whose label is ignored, and the greatest logit
        backward = chunk + _FP32 * n * D
        return Phase(name="head", inside=inside, forward=chunk, backward=backward)
    return Phase(
        name="head",
        inside=inside + logits,
        rows=gathered or (b * micro.t * D if normed else 0),
        grads=b * n * V,
        forward=logits,
        backward=(2 * logits if tp == 1 else logits + (b * n * V if b < _FP32 else 0)),
        weights=b * V * D if b < _FP32 else 0,
    )


def _join(micro: Microbatch) -> Phase:
    """Embedding and hidden state side by side, and the projection to the width of one."""
    D, t, b = micro.config.model.hidden_size, micro.t, micro.b
    return Phase(
        name="embedding",
        outputs=b * t * D,
        inside=2 * t * micro.norm(D) + 2 * b * t * D,
        rows=2 * b * t * D,
        grads=b * t * D,
        backward=4 * b * t * D,
    )
