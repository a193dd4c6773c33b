"""`Trainer` of transformers with the original's optimizer, order of examples and checkpoints."""

import json
import logging
import math
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Sampler
from transformers import Seq2SeqTrainer

from chatglm2.recognition import PREFIX_KEYS

WEIGHTS = ("pytorch_model.bin", "adapter_model.safetensors", "model.safetensors")


class OriginalAdamW(torch.optim.AdamW):
    """AdamW as in transformers 4.30, which adds epsilon before the correction of the bias.

    p -= lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps), which is PyTorch's update with
    eps / sqrt(1 - b2^t).
    """

    def __init__(self, params, lr: float, betas, eps: float):
        super().__init__(params, lr=lr, betas=betas, eps=eps)
        self.original_eps = eps

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            states = (self.state[x] for x in group["params"] if x in self.state)
            step = max((float(state["step"]) for state in states), default=0) + 1
            group["eps"] = self.original_eps / math.sqrt(1 - group["betas"][1] ** step)
        return super().step(closure)


class OriginalOrder(Sampler):
    """The order of PyTorch's random sampler with one generator for all epochs.

    It is a function of the epoch, so that a training that was interrupted goes on in it.
    """

    def __init__(self, num_examples: int, seed: int, trainer: Seq2SeqTrainer):
        self.num_examples, self.seed, self.trainer = num_examples, seed, trainer

    def __len__(self):
        return self.num_examples

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(2 * int(self.trainer.state.epoch or 0)):  # the sampler draws two an epoch
            torch.randperm(self.num_examples, generator=generator)
        yield from torch.randperm(self.num_examples, generator=generator).tolist()


class Trainer(Seq2SeqTrainer):
    """Trains and saves what `main.prepare_model` has made trainable.

    Args:
        generation: Arguments of `generate` for predictions; `max_length` is also the length to
            which predictions and labels are padded with 0.
    """

    def __init__(self, model, args, generation: dict, **kwargs):
        super().__init__(model, args, **kwargs)
        self.generation = generation
        if args.has_original_optimizer:
            settings = {"lr": args.learning_rate, "eps": args.adam_epsilon}
            settings["betas"] = (args.adam_beta1, args.adam_beta2)
            self.optimizer_cls_and_kwargs = (OriginalAdamW, settings)
        # As the original: the mean over the micro batches of an accumulation, not over its tokens.
        self.model_accepts_loss_kwargs = False
        has_prefix = not hasattr(model, "peft_config") and model.config.pre_seq_len
        self.saves_prefix = bool(has_prefix)

    def _get_train_sampler(self, train_dataset=None):
        if self.args.train_sampling_strategy != "random":
            return super()._get_train_sampler(train_dataset)
        if (seed := self.args.data_seed) is None:
            seed = int(torch.empty((), dtype=torch.int64).random_())
        return OriginalOrder(len(train_dataset or self.train_dataset), seed, self)

    def save_model(self, output_dir=None, _internal_call=False):
        """Save the prefix alone, in the original's file; otherwise what transformers saves."""
        config = self.model.config
        config.use_cache, during_training = True, config.use_cache
        if not self.saves_prefix:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            state = self.model.state_dict()
            prefix = {k: v.float().cpu() for k, v in state.items() if k.startswith(PREFIX_KEYS)}
            torch.save(prefix, folder / WEIGHTS[0])
            config.to_json_file(folder / "config.json")
        config.use_cache = during_training

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None, **kwargs):
        """Return the ids of the generated answers and of the labels, without a loss."""
        inputs = {name: value.to(self.args.device) for name, value in inputs.items()}
        labels, prompt_length = inputs.pop("labels"), inputs["input_ids"].shape[1]
        generated = self.model.generate(**inputs, **self.generation)
        return None, self.pad(generated[:, prompt_length:]), self.pad(labels)

    def pad(self, ids: torch.Tensor) -> torch.Tensor:
        ids = ids.masked_fill(ids < 0, 0)
        return nn.functional.pad(ids, (0, self.generation["max_length"] - ids.shape[1]))


def ignore_missing_weights(record: logging.LogRecord) -> bool:
    """Hide a warning with the names of all weights that a prefix's checkpoint does not have."""
    return not record.getMessage().startswith("There were missing keys in the checkpoint")


def find_checkpoint(output_dir: str) -> str | None:
    """Return the last complete checkpoint; the Trainer writes trainer_state.json at the end."""

    def is_complete(folder: Path) -> bool:
        try:
            json.loads((folder / "trainer_state.json").read_text("utf-8"))
        except (OSError, ValueError):
            return False
        return any((folder / name).exists() for name in WEIGHTS) or any(folder.glob("*.index.json"))

    folders = {}
    for folder in Path(output_dir).glob("checkpoint-*"):
        if (step := folder.name.removeprefix("checkpoint-")).isdecimal() and is_complete(folder):
            folders[int(step)] = str(folder)
    return folders[max(folders)] if folders else None


def plot_losses(history: list[dict], path: Path):
    """Draw the logged losses of a training."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    points = [(row["step"], row["loss"]) for row in history if "loss" in row]
    if not points:
        return
    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(*zip(*points, strict=True))
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
