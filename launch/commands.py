"""Every command: what is called, and what `--help` says of it. No torch."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Command:
    """A row of the table. `target` is `module:function`, from the arguments to the exit code."""

    target: str
    usage: str
    does: str
    details: str
    example: str

    def call(self, arguments: Sequence[str]) -> int:
        """Import the command's module and run it."""
        module, function = self.target.split(":")
        return int(getattr(importlib.import_module(module), function)(list(arguments)))


COMMANDS = {
    "train": Command(
        target="launch.train:main",
        usage="train [recipe=NAME] [run=NAME] [KEY=VALUE ...] [--dry-run]",
        does="train a model, or resume a run",
        details=(
            "recipe=NAME  a file of recipes/, or a path to a YAML file (default: tiny)\n"
            "run=NAME     the folder under runs/; an existing run is resumed from its saved settings\n"
            "KEY=VALUE    overrides any setting, as in Hydra: optim.lr=3e-4, data.paths=[a,b]\n"
            "--dry-run    prints the settings and the launch, and starts nothing\n\n"
            "Starts one process per rank of the layout, unless torchrun or srun already did. Ctrl-C saves,\n"
            "and `run=NAME` goes on from there; a second Ctrl-C stops at once."
        ),
        example="switchyard train recipe=tiny run=first layout.ep=2 train.steps=200",
    ),
    "convert from-hf": Command(
        target="launch.convert:from_hf",
        usage="convert from-hf DIR OUT [--processes N]",
        does="turn a Hugging Face folder into one that training reads",
        details=(
            "DIR            holds config.json and safetensors files, which are compared with SHA256SUMS if\n"
            "               there is one; `train.init=DIR` reads it too, without conversion\n"
            "OUT            a new folder; what was written when a command was killed or the disk was full\n"
            "               is kept beside it, and the same command goes on from there\n"
            "--processes N  share the files (default: 1); memory of each holds one tensor"
        ),
        example="switchyard convert from-hf DeepSeek-V2-Lite models/v2-lite --processes 4",
    ),
    "convert to-hf": Command(
        target="launch.convert:to_hf",
        usage="convert to-hf RUN DIR [--shard-gb 5] [--dtype bf16|fp32] [--processes N]",
        does="write a run as a Hugging Face folder",
        details=(
            "RUN            a run's folder (its newest good checkpoint), a checkpoint, or a folder that\n"
            "               `convert from-hf` wrote\n"
            "DIR            a new folder, with tokenizer and SHA256SUMS; a killed command is continued\n"
            "--shard-gb G   of a file at most, in 10^9 bytes (default: 5)\n"
            "--dtype D      of the weights (default: as trained)\n"
            "--processes N  share the files (default: 1); memory of each holds one tensor"
        ),
        example="switchyard convert to-hf runs/v2-lite-sft/checkpoints/step-400 exported --dtype bf16",
    ),
    "test": Command(
        target="launch.checks:main",
        usage="test [PYTEST ARGUMENTS]",
        does="check lint, format and types, and run the tests",
        details="With arguments, only pytest runs, and gets them.",
        example="switchyard test tests/launch -k resume",
    ),
    "verify": Command(
        target="launch.verify:main",
        usage="verify [recipe=NAME] [KEY=VALUE ...] [--sweep --ranks N [--full]] [--shrink] [--steps K]",
        does="prove that a layout, or every layout, trains like one rank",
        details=(
            "Takes the same global batches through one rank and through the recipe's layout, and compares\n"
            "losses, every gradient, expert counts and biases. Exit code 1: they differ beyond rounding.\n\n"
            "recipe=NAME  a file of recipes/, or a path to a YAML file (default: tiny)\n"
            "KEY=VALUE    overrides any setting, as in Hydra: layout.tp=2\n"
            "--sweep      every layout that takes exactly N ranks, under every schedule\n"
            "--ranks N    started here, unless torchrun or srun already did\n"
            "--full       each of these with and without recomputation; otherwise the two alternate\n"
            "--shrink     first makes model and batch small, with their structure kept\n"
            "--steps K    compared are steps 1 and K (default: 3)\n"
            "--json FILE  writes the rows for machines"
        ),
        example="switchyard verify recipe=tiny --sweep --ranks 4 --shrink",
    ),
    "select-experts": Command(
        target="launch.select:main",
        usage="select-experts MODEL [KEY=VALUE ...] --out FILE [--score token|gate] [--recorded]",
        does="choose the experts that a fine-tuning trains (ESFT)",
        details=(
            "Runs a model over a sample of data and scores its experts; in each layer those of greatest\n"
            "score are chosen, as few as reach the threshold. `tune.method=esft tune.selection=FILE` trains\n"
            "them. With `--recorded` nothing runs: scored are the tokens that a run was trained on.\n\n"
            "MODEL          a run, a checkpoint, a converted or a Hugging Face folder\n"
            "KEY=VALUE      overrides any setting, as in Hydra: data.paths=[law.jsonl] layout.ep=2\n"
            "--out FILE     the selection; its scores go to FILE with .scores before its ending\n"
            "--score        token: how often an expert is chosen; gate: its mean weight (default: token)\n"
            "--threshold P  of the sum of scores (default: 0.2 by token, 0.1 by gate)\n"
            "--sequences N  of the sample (default: 32)\n"
            "--recorded     MODEL is a run, and what it recorded of its experts' load is taken instead\n"
            "--domain NAME  of the recorded tokens only this domain's, as far as counted"
        ),
        example="switchyard select-experts runs/base data.paths=[law.jsonl] --out law.json",
    ),
    "place-experts": Command(
        target="launch.place:main",
        usage="place-experts RUN [--ep N] [--gpus-per-node G] [--steps N] --out FILE",
        does="assign experts to ranks by their measured load",
        details=(
            "Evens out, layer by layer, the rows of the busiest rank, for which a step waits. Where routing\n"
            "is limited to groups of experts, these stay together on a node. Half of the steps decide, and\n"
            "the other half says what it is worth. `switchyard train run=NAME layout.placement=FILE` moves\n"
            "the experts of a run at its last checkpoint, `layout.placement=null` moves them back.\n\n"
            "RUN                a run's folder\n"
            "--ep N             expert-parallel ranks (default: those of the run)\n"
            "--gpus-per-node G  (default: `cluster.gpus_per_node` of the run)\n"
            "--steps N          the last so many, of those recorded one by one (default: 200)\n"
            "--out FILE         the placement"
        ),
        example="switchyard place-experts runs/base --ep 8 --out placement.json",
    ),
    "convert to-esft": Command(
        target="launch.adapter:to_esft",
        usage="convert to-esft RUN DIR",
        does="write the experts that a run changed, and nothing else",
        details=(
            "DIR becomes what DeepSeek's ESFT calls an adapter: the trained tensors of a checkpoint under\n"
            "their released names, and the selection.\n\n"
            "RUN  a run with `tune.method=esft`, of which the newest checkpoint is taken, or a checkpoint\n"
            "DIR  a new folder"
        ),
        example="switchyard convert to-esft runs/law law-experts",
    ),
    "convert merge-esft": Command(
        target="launch.convert:merge_esft",
        usage="convert merge-esft BASE ADAPTER DIR [--shard-gb G] [--dtype bf16|fp32] [--processes N]",
        does="put changed experts back into the whole model, as a Hugging Face folder",
        details=(
            "Every tensor that the adapter does not hold is the base's, bit for bit; fp8 becomes bf16.\n\n"
            "BASE           a Hugging Face folder, a converted folder, a run or a checkpoint\n"
            "ADAPTER        what `convert to-esft` wrote, or an adapter that DeepSeek released\n"
            "DIR            a new folder\n"
            "--shard-gb G   of a file at most, in 10^9 bytes (default: 5)\n"
            "--dtype D      of the weights (default: the base's)\n"
            "--processes N  share the files (default: 1); memory of each holds one tensor"
        ),
        example="switchyard convert merge-esft DeepSeek-V2-Lite law-experts law-model",
    ),
    "evaluate": Command(
        target="launch.use:evaluate",
        usage="evaluate MODEL [KEY=VALUE ...] [--choices FILE] [--all] [--json FILE]",
        does="measure a model's loss by domain, or its answers to multiple-choice questions",
        details=(
            "MODEL           a run, a checkpoint, a converted or a Hugging Face folder\n"
            "KEY=VALUE       overrides any setting: data.paths=[texts] data.format=chat layout.ep=8\n"
            '--choices FILE  JSONL of {"context", "choices": [...], "answer": 0}, "domain" if wanted; each\n'
            "                choice is scored by its log-likelihood, and by that per byte\n"
            "--all           every document of the data, not only those held out for validation\n"
            "--json FILE     writes the numbers for machines"
        ),
        example="switchyard evaluate runs/tiny data.paths=[notes] --all",
    ),
    "generate": Command(
        target="launch.use:generate",
        usage="generate MODEL PROMPT [KEY=VALUE ...] [--chat] [--tokens N] [--temperature T]",
        does="continue a prompt, or answer it",
        details=(
            "MODEL            a run, a checkpoint, a converted or a Hugging Face folder\n"
            "--chat           the prompt is a user's message in the model's chat template\n"
            "--tokens N       at most so many (default: 100)\n"
            "--temperature T  0 takes the likeliest token (default: 0.7)\n\n"
            "Meant to look at a model: every token is computed from the whole text before it. To serve one,\n"
            "export it with `switchyard convert to-hf`."
        ),
        example='switchyard generate runs/tiny "def main(" --tokens 40',
    ),
    "schedule": Command(
        target="launch.schedule:main",
        usage="schedule NAME --ranks P --microbatches M [--cost f=1,b=2,w=1,a2a=0] [--compare]",
        does="print, price and draw a pipeline schedule, or compare them all",
        details=(
            "NAME                 gpipe, 1f1b, 1f1b-overlap, interleaved, zb-h1, dualpipe, dualpipev\n"
            "--ranks P            of the pipeline\n"
            "--microbatches M     of a step\n"
            "--stages-per-rank V  of interleaved (default: 2)\n"
            "--cost               of a microbatch on a stage: forward f, backward b, of that the weight\n"
            "                     gradients w, all-to-all a2a of either, p2p from stage to stage\n"
            "--compare            all that can run with P and M, side by side; then NAME may be left out,\n"
            "                     and costs are those of 1/P of the model, however many stages that is\n"
            "--json [FILE]        numbers and orders for machines; without FILE, nothing else is printed\n"
            "--out FOLDER         of pictures and a trace for ui.perfetto.dev (default: schedules; none if\n"
            "                     JSON is printed)"
        ),
        example="switchyard schedule dualpipe --ranks 8 --microbatches 20 --cost f=1,b=2,w=1,a2a=0.6",
    ),
    "convert to-peft": Command(
        target="launch.adapter:to_peft",
        usage="convert to-peft RUN DIR [--base NAME]",
        does="write the adapters of a LoRA run as a PEFT folder",
        details=(
            "DIR gets adapter_config.json and adapter_model.safetensors under the released names.\n\n"
            "RUN          a run, of which the newest checkpoint is taken, or a checkpoint\n"
            "DIR          a new folder\n"
            "--base NAME  the model that the adapters belong to: a folder, or a name on the hub"
        ),
        example="switchyard convert to-peft runs/lora adapter --base deepseek-ai/DeepSeek-V2-Lite",
    ),
    "dashboard": Command(
        target="launch.dashboard.command:main",
        usage="dashboard RUN [RUN ...] [--export FILE.html] [--text] [--port N] [--host H]",
        does="show the expert load of runs, live in a browser, as one file or as text",
        details=(
            "Serves a page that follows runs while they train, and compares them; Ctrl-C ends it. /metrics\n"
            "of the same server gives Prometheus each expert's load and bias.\n\n"
            "RUN            a run's folder, or a name under runs/\n"
            "--export FILE  writes the page as one file that opens offline, and serves nothing\n"
            "--text         prints the newest heatmap, layers by experts, and serves nothing\n"
            "--layer L      with --text: one layer, step by step\n"
            "--step N       with --text: as it was at a step\n"
            "--port N       0 takes any free one (default: 8765)\n"
            "--host H       the address to listen on (default: 127.0.0.1, this machine alone)"
        ),
        example="switchyard dashboard runs/tiny",
    ),
    "plan": Command(
        target="launch.plan.command:main",
        usage="plan [recipe=NAME] [cluster=NAME] [KEY=VALUE ...] [--imbalance X] [--compare] [--json [FILE]]",
        does="reckon whether a run fits into its machines' memory",
        details=(
            "Weights, gradients and optimizer state to the byte; activations by phase, for as many\n"
            "microbatches as the schedule has in flight. Exit code 1: it does not fit.\n\n"
            "recipe=NAME    a file of recipes/, or a path to a YAML file (default: tiny)\n"
            "cluster=NAME   a file of recipes/cluster/: local, a800x8, h800x8\n"
            "KEY=VALUE      overrides any setting, as in Hydra: layout.ep=8\n"
            "--imbalance X  rows that a rank's experts receive, over the mean (default: 1.5); or a run's\n"
            "               folder: what 99 % of its steps and layers would have had at most\n"
            "--compare      also every layout.ep on as many ranks, with and without recomputation\n"
            "--json [FILE]  numbers for machines; without FILE, nothing else is printed"
        ),
        example="switchyard plan recipe=tiny cluster=h800x8 layout.dp=8 --compare",
    ),
    "bench layer": Command(
        target="launch.bench.layer:main",
        usage="bench layer [--dtype bf16|fp32|both] [--routing both|balanced|zipf] [--json FILE]",
        does="measure one MoE layer beside its own matrix products and its peers",
        details=(
            "Times forward and backward of ours, a plain loop, and what is installed of transformers,\n"
            "Megatron-Core and torchtitan, in turn, and says of which kinds of operations they are made.\n"
            "Routing is forced to be even and skewed, and always left to a fresh router too.\n\n"
            "--dtype D        bf16, fp32 or both (default: bf16)\n"
            "--routing R      forced: balanced, zipf or both (default: both)\n"
            "--tokens N, --hidden N, --experts N, --width N, --top-k N, --shared N\n"
            "                 sizes (default: 4096, 1024, 64, 512, 6, 2)\n"
            "--compiled C     whether ours takes part again with `train.compile`: yes or no (default: yes)\n"
            "--rounds N       of which medians are shown (default: 5)\n"
            "--threads N      of every contestant (default: torch's)\n"
            "--json FILE      writes the rows for machines"
        ),
        example="switchyard bench layer --dtype both --threads 2 --json layer.json",
    ),
    "bench model": Command(
        target="launch.bench.model:main",
        usage="bench model [--dtype bf16|fp32] [--rounds N] [--threads N] [--json FILE]",
        does="measure whole steps beside transformers, and what slows them",
        details=(
            "Trains recipe tiny_wide and the same model in transformers, from the same weights on the same\n"
            "batches by the same optimizer, in turn; then ours with telemetry, with checkpoints and with\n"
            "forced routing. Takes some minutes and 10 GB. Exit code 1: losses differ.\n\n"
            "--dtype D    bf16 or fp32 (default: bf16)\n"
            "--rounds N   steps of each kind, of which medians are shown (default: 5)\n"
            "--threads N  of every contestant (default: torch's)\n"
            "--json FILE  writes the rows for machines"
        ),
        example="switchyard bench model --dtype fp32 --json model.json",
    ),
    "bench balance": Command(
        target="launch.bench.balance:main",
        usage="bench balance [--steps N] [--json FILE]",
        does="measure how the balancing methods keep experts evenly loaded",
        details=(
            "Trains twice from one skewed start, with the selection bias and without it.\n\n"
            "--steps N    of each run (default: 200)\n"
            "--json FILE  writes the rows for machines"
        ),
        example="switchyard bench balance --json balance.json",
    ),
    "bench gpu": Command(
        target="launch.bench.gpu.command:main",
        usage="bench gpu [--minutes M] [--json FILE] [--out FOLDER] [--show FILE]",
        does="check every path on this machine's GPU against fp64, and measure how fast it is",
        details=(
            "One process, no network, no data. In order: versions; the largest products and copies;\n"
            "correctness; the layer of experts; training steps; all-to-all hidden behind compute, with\n"
            "emulated peers; FP8. What the machine lacks is named. Exit code 1: a check fails.\n\n"
            "--minutes M   at most about so long (default: 8)\n"
            "--json FILE   writes the rows for machines\n"
            "--out FOLDER  writes CARD-DATE.md and the same as JSON\n"
            "--show FILE   prints the tables of a JSON that was written, and measures nothing"
        ),
        example="switchyard bench gpu --out docs/results",
    ),
    "bench overlap": Command(
        target="launch.bench.overlap:main",
        usage="bench overlap [--rounds N] [--microbatches M] [--rates N] [--delay MS] [--json FILE]",
        does="measure how much of the all-to-all is hidden, over a real slow link",
        details=(
            "Makes two hosts of network namespaces, joined by a link of limited rate, and trains across\n"
            "them in the serial and in the overlapped order, without a pipeline and with DualPipe.\n"
            "Needs Linux and root, and takes some minutes.\n\n"
            "--rounds N        measurements of each kind, of which medians are shown (default: 5)\n"
            "--microbatches M  of a step; DualPipe needs 4 (default: 8)\n"
            "--rates N         1: the link takes as long as compute; 2: half as long too; 3: twice too\n"
            "--delay MS        of the link, one way (default: 0)\n"
            "--json FILE       writes the rows for machines"
        ),
        example="switchyard bench overlap --json overlap.json",
    ),
    "bench schedule": Command(
        target="launch.bench.schedule:main",
        usage="bench schedule [--ranks P] [--microbatches M] [--rounds N] [--json FILE]",
        does="measure whether schedules take as long as the simulator says",
        details=(
            "Walks every schedule on real ranks whose stages sleep instead of computing, beside the\n"
            "simulator fed with what one rank alone takes, and draws both into schedules/.\n\n"
            "--ranks P         of the pipeline (default: 8)\n"
            "--microbatches M  of a step (default: 16)\n"
            "--rounds N        walks of each, of which the median counts (default: 5)\n"
            "--json FILE       writes the rows for machines"
        ),
        example="switchyard bench schedule --ranks 4 --microbatches 8",
    ),
    "bench telemetry": Command(
        target="launch.bench.telemetry:main",
        usage="bench telemetry [--steps N] [--json FILE]",
        does="measure what watching expert load costs a step",
        details=(
            "Trains a model of DeepSeek-V2-Lite's 27 layers and 64 experts, an eighth as wide, and times\n"
            "what only watches. Takes some minutes and 6 GB.\n\n"
            "--steps N    with samples, and as many without (default: 8)\n"
            "--json FILE  writes the rows for machines"
        ),
        example="switchyard bench telemetry --json telemetry.json",
    ),
    "bench fp8": Command(
        target="launch.bench.fp8:main",
        usage="bench fp8 [--steps N] [--seeds N] [--json FILE]",
        does="measure what FP8 does to the loss",
        details=(
            "Trains recipe tiny on one rank from the same weights on the same data: in bf16, in bf16 with\n"
            "smaller microbatches, and in fp8, which is emulated where there are no FP8 units. Takes some\n"
            "minutes for each seed. Exit code 1: the mean losses of bf16 and fp8 over the last quarter of\n"
            "the steps are more than 0.25 % apart, as a mean over the seeds.\n\n"
            "--steps N    of each run (default: 200)\n"
            "--seeds N    so many runs of each kind (default: 3)\n"
            "--json FILE  writes the losses for machines"
        ),
        example="switchyard bench fp8 --json fp8.json",
    ),
    "bench checkpoint": Command(
        target="launch.bench.checkpoint:main",
        usage="bench checkpoint [--every N] [--rounds N] [--json FILE]",
        does="measure what saving a checkpoint costs a run",
        details=(
            "Trains recipe tiny on one rank, in turn without saving, saving in the background, and waiting\n"
            "for each save.\n\n"
            "--every N    steps from one save to the next (default: 20)\n"
            "--rounds N   saves of each kind (default: 3)\n"
            "--json FILE  writes the rows for machines"
        ),
        example="switchyard bench checkpoint --every 10",
    ),
}
