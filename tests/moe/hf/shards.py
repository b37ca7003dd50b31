"""A tiny model in DeepSeek-V2-Lite's released layout: four shards, an index, tokenizer files, checksums."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from moe.config import BalanceConfig, ModelConfig, RopeConfig
from moe.data.tokenizer import train_tokenizer
from moe.hf.inventory import model_tensors
from moe.hf.save import save
from moe.model.transformer import Transformer

TINY_LITE = ModelConfig(
    vocab_size=320,
    hidden_size=32,
    num_layers=3,
    intermediate_size=64,
    moe_intermediate_size=16,
    num_experts=8,
    num_shared_experts=2,
    top_k=2,
    num_heads=2,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    score_function="softmax",
    group_score="max",
    normalize_top_k=False,
    rope=RopeConfig(kind="yarn", factor=40.0, mscale=0.707, mscale_all_dim=0.707),
)
NUM_SHARDS = 4


def lite_folder(folder: Path, config: ModelConfig = TINY_LITE, seed: int = 3) -> Path:
    """Weights in bf16, cut into shards in the order of the files' names, as the release is."""
    balance = BalanceConfig(bias="update" if config.score_function == "sigmoid" else "none")
    model = Transformer(config, balance, dtype=torch.bfloat16, seed=seed)
    for _, router in model.routers():
        if balance.bias != "none":
            router.bias.uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(seed))
    save(folder, config, balance, model_tensors(model), eos_token_id=1)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, weight_map = list(tensors), {}
    for number in range(NUM_SHARDS):
        file = f"model-{number + 1:05d}-of-{NUM_SHARDS:06d}.safetensors"
        held = names[number * len(names) // NUM_SHARDS : (number + 1) * len(names) // NUM_SHARDS]
        save_file({name: tensors[name] for name in held}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(held, file))
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    tokenizer: Tokenizer = train_tokenizer(["a few words", "and some more"], config.vocab_size)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    (folder / "generation_config.json").write_text("{}")
    write_sums(folder)
    return folder


def write_sums(folder: Path) -> None:
    """SHA256SUMS of all files, as `sha256sum *` prints them."""
    (folder / "SHA256SUMS").unlink(missing_ok=True)
    paths = sorted(path for path in folder.iterdir())
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in paths]
    (folder / "SHA256SUMS").write_text("".join(lines))


def shard(folder: Path, number: int) -> Path:
    """The released file of a number, counted from 1."""
    return folder / f"model-{number:05d}-of-{NUM_SHARDS:06d}.safetensors"


def damage(path: Path) -> None:
    """Change the last byte of a file: neither length nor header tell."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
