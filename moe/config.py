"""Every setting of a run and its default. No torch.

Defaults live here and nowhere else: recipes hold only differences. `moe/rules.py` builds these
dataclasses from plain mappings and checks the rules between fields.
"""

from dataclasses import dataclass, field
from typing import Literal

ScheduleName = Literal["gpipe", "1f1b", "interleaved", "zb-h1", "dualpipe", "dualpipev"]
PackingName = Literal["stream", "whole", "bucket"]
SinkName = Literal["tensorboard", "wandb", "mlflow", "prometheus"]
Component = Literal["embedding", "attention", "router", "experts", "shared", "dense", "norm", "head", "mtp"]


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary embedding (DeepSeek-V2/V3 `rope_scaling`). `factor` 1 with any kind is plain RoPE."""

    kind: Literal["plain", "ntk", "yarn"] = "plain"
    theta: float = 10000.0
    factor: float = 1.0
    original_context: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    pairs: Literal["interleaved", "halves"] = "interleaved"  # (2i, 2i + 1), or (i, i + R/2) as in Llama


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a model; names follow DeepSeek's released `config.json` where they can."""

    vocab_size: int = 4096
    hidden_size: int = 256
    num_layers: int = 4
    num_dense_layers: int = 1  # the first layers have a dense MLP instead of experts
    num_mtp_layers: int = 0  # multi-token-prediction modules after the last layer
    intermediate_size: int = 768  # width of a dense MLP
    moe_intermediate_size: int = 128  # width of one expert
    num_experts: int = 16
    num_shared_experts: int = 1
    top_k: int = 4
    num_groups: int = 1
    top_groups: int = 1
    score_function: Literal["softmax", "sigmoid"] = "sigmoid"
    group_score: Literal["max", "top2_sum"] = "top2_sum"
    normalize_top_k: bool = True
    routed_scaling_factor: float = 1.0
    capacity_factor: float | None = None  # None: dropless
    attention: Literal["mla", "gqa"] = "mla"  # over one latent, or over heads that groups of queries share
    num_heads: int = 4
    num_kv_heads: int | None = None  # gqa only; None: as many as heads
    head_dim: int | None = None  # gqa only; None: `hidden_size` / `num_heads`
    qk_norm: Literal["none", "head", "full"] = "none"  # gqa only: of each head, or of all heads together
    q_lora_rank: int | None = None  # this and the next four: mla only
    kv_lora_rank: int = 128
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 16
    v_head_dim: int = 32
    rope: RopeConfig = field(default_factory=RopeConfig)
    max_context: int = 163840
    rms_norm_eps: float = 1e-6
    tie_embeddings: bool = False
    init_std: float = 0.02

    @property
    def qk_head_dim(self) -> int:
        """Width of one head's query and key."""
        if self.attention == "gqa":
            return self.head_dim or self.hidden_size // self.num_heads
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def rotated_dims(self) -> int:
        """How many of a head's dimensions RoPE turns."""
        return self.qk_head_dim if self.attention == "gqa" else self.qk_rope_head_dim

    @property
    def value_head_dim(self) -> int:
        """Width of one head's value."""
        return self.qk_head_dim if self.attention == "gqa" else self.v_head_dim

    @property
    def kv_heads(self) -> int:
        """Heads that have keys and values of their own."""
        return self.num_kv_heads or self.num_heads

    def is_moe(self, layer: int) -> bool:
        """Whether a layer (0-based) holds experts; the MTP layers after the last one all do."""
        return layer >= self.num_dense_layers


@dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """How expert load is kept even: selection bias (2408.15664) and auxiliary losses."""

    bias: Literal["update", "frozen", "none"] = "update"
    bias_rate: float = 1e-3
    bias_schedule: Literal["constant", "linear", "cosine"] = "constant"  # over `train.steps`, to 0
    bias_freeze_step: int | None = None  # no update from this step on
    bias_center: bool = False  # subtract the mean after each update
    bias_clamp: float | None = None  # keep |bias| at or below this
    sequence_aux: float = 0.0  # coefficients of the three auxiliary losses
    microbatch_aux: float = 0.0
    global_aux: float = 0.0


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read: texts, or chats (`.jsonl` rows of messages, instructions or ShareGPT conversations).

    `python-stdlib` stands for the source text of the running Python installation, `python-stdlib-docstrings`
    for chats drawn from it. Of a chat the assistant's turns are learnt, each with its end.

    Packing: `stream` lays documents end to end and cuts. `whole` lays whole conversations together and keeps
    attention inside each; `bucket` gives each its own row among rows of similar length, and trims.
    """

    paths: tuple[str, ...] = ("python-stdlib",)
    tokenizer: str | None = None  # a tokenizer.json or its folder; None trains a byte-level BPE on the text
    cache: str = ".cache/data"
    sequence_length: int = 256
    validation_fraction: float = 0.04  # share of documents held out, chosen by a hash of their names
    mask_documents: bool = False  # keep attention inside a document; `packing=whole` always does
    text_key: str = "text"  # of JSONL rows
    domain_key: str = "domain"
    format: Literal["text", "chat"] = "text"
    packing: PackingName = "stream"  # stream for text; whole or bucket for chat
    template: str | None = None  # a chat_template.jinja or tokenizer_config.json; None: the tokenizer's
    max_bad: float = 0.05  # share of a chat corpus's lines that may be bad, and are left out and reported

    @property
    def separate_documents(self) -> bool:
        """Whether attention and labels stay inside a document."""
        return self.mask_documents or self.packing == "whole"


@dataclass(frozen=True, kw_only=True)
class LayoutConfig:
    """How ranks share the work. `dp` None means as many as the ranks that were started allow."""

    tp: int = 1  # cuts heads, dense widths and vocabulary, and the sequence between them
    cp: int = 1  # cuts long sequences for attention
    pp: int = 1  # cuts the layers into stages
    dp: int | None = None
    ep: int = 1  # spreads experts over the ranks of a stage, whatever these are to attention
    etp: int = 1  # cuts each expert
    placement: str | None = None  # a file of `switchyard place-experts`: which experts live on which rank
    dispatch: Literal["direct", "two_hop"] = "direct"  # two_hop: to each node once, then inside
    microbatches: int = 1  # per data-parallel rank and step
    schedule: ScheduleName = "1f1b"
    stages_per_rank: int = 2  # of an interleaved schedule
    overlap: bool = True  # hide one microbatch's all-to-all behind another's compute


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its learning-rate schedule."""

    lr: float = 1e-3
    min_lr_ratio: float = 0.1
    schedule: Literal["cosine", "wsd", "multistep"] = "cosine"
    warmup_steps: int = 20
    decay_fraction: float = 0.2  # of the schedule's steps, the tail of WSD
    decay: Literal["linear", "cosine"] = "linear"  # the shape of that tail
    begin_step: int = 0  # where the schedule begins: a finished run's last step, to go on under another
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    clip: Literal["model", "component"] = "model"  # of what that is the greatest norm
    grad_reduce: Literal["fp32", "bf16"] = "fp32"  # what gradients travel as; added up in fp32 before
    moments: Literal["fp32", "bf16"] = "fp32"  # how they are kept; computed in fp32
    fused: Literal["torch", "apex", "te"] = "torch"  # whose kernel; te is Transformer Engine
    engine: Literal["switchyard", "deepspeed"] = "switchyard"  # who holds weights and sums gradients
    zero_stage: Literal[1, 2, 3] = 1  # shared out: moments; and gradients; and weights
    offload: bool = False  # keep masters and moments in host memory, and move them there


@dataclass(frozen=True, kw_only=True)
class Fp8Config:
    """Of `train.precision=fp8`: weights and what else is kept are those of bf16, products are FP8's."""

    guard_every: int = 100  # steps between comparisons of every FP8 product with bf16's (0: never)
    dispatch: bool = False  # rows travel to their experts in FP8, and back in bf16


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop: length, batch, precision, and how often it saves and evaluates (0: never)."""

    steps: int = 100
    batch_size: int = 16  # sequences per step, over all ranks
    seed: int = 1234
    init: str | None = None  # a Hugging Face or converted folder, a run or a checkpoint to begin from
    precision: Literal["fp32", "bf16", "fp8"] = "fp32"
    fp8: Fp8Config = field(default_factory=Fp8Config)
    compile: bool = False  # on a CPU, activations as one loop: 5 % of a step, for some seconds at its start
    deterministic: bool = False  # only kernels that give the same bits again, where torch has several
    recompute: Literal["none", "full"] = "none"
    mtp_weight: float = 0.3
    save_every: int = 50
    keep_checkpoints: int = 2  # the last so many
    keep_every: int = 0  # and, for good, those of every so many steps
    eval_every: int = 50
    eval_sequences: int = 64
    sample_prompt: str = ""
    sample_tokens: int = 0

    @property
    def dtype(self) -> Literal["fp32", "bf16"]:
        """Of weights and hidden states: FP8 is a precision of products alone."""
        return "fp32" if self.precision == "fp32" else "bf16"


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """What of a model is trained: all of it, low-rank adapters (2106.09685), or some experts (2407.01906)."""

    method: Literal["full", "lora", "esft"] = "full"
    frozen: tuple[Component, ...] = ()  # of a full training: components that stay as they are
    lora_rank: int = 16
    lora_alpha: float = 32.0  # an adapter's output counts alpha / rank
    lora_targets: tuple[Component, ...] = ("attention", "dense", "shared", "experts")
    adapter: str | None = None  # LoRA: a folder in PEFT's format whose adapters training begins with
    selection: str | None = None  # ESFT: the file that names the chosen experts of each layer

    @property
    def is_partial(self) -> bool:
        """Whether some of the model stays as it was."""
        return self.method != "full" or bool(self.frozen)

    @property
    def lora_scale(self) -> float:
        """What an adapter's output is multiplied by."""
        return self.lora_alpha / self.lora_rank


@dataclass(frozen=True, kw_only=True)
class AlarmConfig:
    """From where on a run is said to go wrong; null switches that alarm off. NaN always raises one."""

    dead_steps: int | None = 100  # in a row in which an expert received no token
    max_vio: float | None = 2.0  # of a layer over `telemetry.window`; at most num_experts / top_k - 1
    bias: float | None = 1.0  # distance of an expert's selection bias from its layer's mean
    rank_share: float | None = 1.5  # rows that a rank's experts received over the window, over the mean
    domain: float | None = 0.1  # share of a domain in the last 10 samples, over its share before
    loss_spike: float | None = 6.0  # above the recent median, in median deviations
    fp8_error: float | None = 0.1  # of a layer's FP8 products, relative to bf16's on the same inputs


@dataclass(frozen=True, kw_only=True)
class TelemetryConfig:
    """What is recorded of expert load, for how long in full, and who hears of it."""

    window: int = 50  # steps of the windowed MaxVio
    domains_every: int = 10  # steps between per-domain slices (0: never)
    pairs_every: int = 100  # steps between counts of which experts are chosen together (0: never)
    times_every: int = 10  # steps between measured times of experts and schedule slots (0: never)
    routing_every: int = 0  # steps between saves of every token's chosen experts, to recount (0: never)
    full_steps: int = 1000  # the last so many steps keep a row each; older ones are summed
    thin_steps: int = 10  # steps of a sum
    log_every: int = 10  # steps between plain progress lines when there is no terminal
    sinks: tuple[SinkName, ...] = ()  # besides the files of the run
    project: str = "switchyard"  # under which W&B and MLflow file a run
    host: str = "127.0.0.1"  # where the Prometheus endpoint listens
    port: int = 9464
    alarms: AlarmConfig = field(default_factory=AlarmConfig)


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """The machines; `cluster=NAME` on a command line takes them from `recipes/cluster/NAME.yaml`."""

    name: str = "local"
    gpus_per_node: int = 8  # joined by fast links
    memory_gb: float = 80.0  # of a GPU, in 10^9 bytes
    peak_tflops: float | None = None  # of a GPU, bf16 and dense; None: not known, and no MFU


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """Where runs are written and how local processes are started."""

    runs: str = "runs"
    threads: int | None = None  # per rank; None shares the cores out evenly


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
