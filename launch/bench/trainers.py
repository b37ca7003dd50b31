"""Who takes part in `bench model`: our trainer, and transformers in the loop that its users write.

Both begin with the same weights, which travel as a Hugging Face folder, take the same batches, clip the same
norm and move by AdamW of the same settings in torch's fused kernel. In bf16 ours keeps masters and gradients
in fp32 as in any of its runs; transformers gets the cheaper step, in which all is bf16.
"""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moe.config import RunConfig
from moe.data.loader import Batch
from moe.hf.inventory import model_tensors
from moe.hf.save import save
from moe.model.mtp import IGNORE
from moe.train.engine import Switchyard
from moe.train.optim import DTYPES, learning_rate
from moe.train.step import Trainer, make_trainer
from parallel.groups import single


class Contestant(Protocol):
    """Whoever trains."""

    name: str

    def step(self, index: int, batch: Batch) -> float:
        """A whole step (0-based) on the global batch; its mean loss before the step."""
        ...

    def kept(self) -> Iterable[Tensor]:
        """All that stays from step to step: weights, moments and what else there is."""
        ...


class Ours:
    """The trainer of any run, on one rank."""

    name = "ours"

    def __init__(self, config: RunConfig, num_domains: int, device: torch.device) -> None:
        self.trainer: Trainer = make_trainer(config, single(), num_domains, device)

    def step(self, index: int, batch: Batch) -> float:
        """As in training, counts of expert load included."""
        return self.trainer.step(index, [batch]).loss

    def kept(self) -> Iterator[Tensor]:
        """Weights, gradient buffers, moments, and masters where weights are bf16."""
        engine = self.trainer.engine
        assert isinstance(engine, Switchyard)
        for parameter in self.trainer.model.parameters():
            yield from (parameter, parameter.main_grad)  # type: ignore[attr-defined]
        yield from (piece.tensor for piece in engine.owned())


class Transformers:
    """`DeepseekV2ForCausalLM` with our weights, and torch's AdamW."""

    def __init__(self, model: nn.Module, implementation: str, config: RunConfig) -> None:
        self.name = f"transformers {implementation}"
        self._model, self._config, optim = model, config, config.optim
        kinds = [
            {"params": [p for p in model.parameters() if (p.dim() > 1) == decays], "weight_decay": decay}
            for decays, decay in ((False, 0.0), (True, optim.weight_decay))
        ]
        self._adam = torch.optim.AdamW(
            kinds, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True
        )

    def step(self, index: int, batch: Batch) -> float:
        """Forward with the library's own loss, backward, clipping, and the optimizer."""
        for group in self._adam.param_groups:
            group["lr"] = learning_rate(self._config.optim, index, self._config.train.steps)
        self._adam.zero_grad(set_to_none=True)
        labels = batch.labels.masked_fill(batch.labels == IGNORE, -100)
        output = self._model(input_ids=batch.tokens, labels=labels, shift_labels=labels, use_cache=False)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._config.optim.clip_norm)
        self._adam.step()
        return float(output.loss)

    def kept(self) -> Iterator[Tensor]:
        """Weights and moments."""
        yield from self._model.parameters()
        for state in self._adam.state.values():
            yield from state.values()


def transformers_of(ours: Ours, implementations: Iterable[str], device: torch.device) -> list[Transformers]:
    """The same model in transformers, once for each of its `experts_implementation`s."""
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()

    trainer = ours.trainer
    config, found = trainer.config, []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        save(folder, config.model, config.balance, model_tensors(trainer.model))
        for implementation in implementations:
            model: Any = DeepseekV2ForCausalLM.from_pretrained(
                folder, dtype=DTYPES[config.train.precision], experts_implementation=implementation
            )
            found.append(Transformers(model.to(device).train(), implementation, config))
    return found


def kept_bytes(contestant: Contestant) -> int:
    """Of all that stays from step to step, every storage once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in contestant.kept()}
    return sum(storages.values())
