"""The command line of main.py: the original's arguments, in their old and new spellings."""

import os
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec

from transformers import HfArgumentParser, Seq2SeqTrainingArguments

RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "warmup_ratio": "warmup_steps",  # a number below 1 is a fraction
}
WITHOUT_EFFECT = {  # already in the original, or since transformers 5
    *("cache_dir", "config_name", "dataset_config_name", "dataset_name", "forced_bos_token"),
    *("fp16_backend", "fp16_opt_level", "fsdp_min_num_params", "half_precision_backend"),
    *("include_inputs_for_metrics", "jit_mode_eval", "lang", "mp_parameters", "pad_to_max_length"),
    *("past_index", "push_to_hub_model_id", "push_to_hub_organization", "push_to_hub_token"),
    *("ray_scope", "resize_position_embeddings", "save_safetensors", "sharded_ddp"),
    *("tokenizer_name", "torchdynamo", "tpu_metrics_debug", "tpu_num_cores", "use_auth_token"),
    *("use_fast_tokenizer", "use_ipex", "use_legacy_prediction_loop", "use_mps_device"),
    "xpu_backend",
}


def option(text: str, default=None):
    return field(default=default, metadata={"help": text})


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "checkpoint folder or hub name"})
    model_revision: str | None = option("branch, tag or commit of a model on the hub")
    ptuning_checkpoint: str | None = option(
        "folder with a trained prefix, or for prediction a LoRA"
    )
    quantization_bit: int | None = option("4 or 8: quantize the model's own weights")
    pre_seq_len: int | None = option("P-Tuning v2: length of the prefix")
    prefix_projection: bool = option("P-Tuning v2: compute the prefix with a small network", False)
    lora_rank: int | None = option("LoRA: rank of the matrices")

    def __post_init__(self):
        for name in ("pre_seq_len", "lora_rank"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise SystemExit(f"--{name} {value}: give an integer of at least 1.")
        if self.quantization_bit not in (None, 4, 8):
            raise SystemExit(f"--quantization_bit {self.quantization_bit}: allowed are 4 and 8.")
        if self.pre_seq_len and self.lora_rank:
            raise SystemExit(
                "--pre_seq_len (P-Tuning v2) and --lora_rank (LoRA): give one of them."
            )
        if self.prefix_projection and not self.pre_seq_len:
            raise SystemExit("--prefix_projection needs --pre_seq_len.")


@dataclass
class DataArguments:
    train_file: str | None = option("examples to train on: JSON lines (.json, .jsonl) or .csv")
    validation_file: str | None = option("examples for --do_eval")
    test_file: str | None = option("examples for --do_predict")
    prompt_column: str | None = option("name of the questions' column")
    response_column: str | None = option("name of the answers' column")
    history_column: str | None = option(
        "name of the column of earlier rounds, [[query, answer], …]"
    )
    max_source_length: int = option("tokens of a prompt; longer ones lose their end", 1024)
    max_target_length: int = option("tokens of an answer; longer ones lose their end", 128)
    val_max_target_length: int | None = option("the same for --do_eval (max_target_length)")
    max_train_samples: int | None = option("use only the first lines of --train_file")
    max_eval_samples: int | None = option("use only the first lines of --validation_file")
    max_predict_samples: int | None = option("use only the first lines of --test_file")
    num_beams: int = option("beams of --do_eval and --do_predict", 1)
    ignore_pad_token_for_loss: bool = option("no loss on padding", True)
    source_prefix: str = option("a text in front of each prompt", "")
    preprocessing_num_workers: int | None = option("processes that preprocess")
    overwrite_cache: bool = option("preprocess again, even if the data are in the cache", False)

    def __post_init__(self):
        if self.val_max_target_length is None:
            self.val_max_target_length = self.max_target_length
        for name in (
            "max_source_length",
            "max_target_length",
            "val_max_target_length",
            "num_beams",
        ):
            if (value := getattr(self, name)) < 1:
                raise SystemExit(f"--{name} {value}: give an integer of at least 1.")
        for name in ("prompt_column", "response_column"):
            if not getattr(self, name):
                raise SystemExit(f"--{name} is missing: give the name of the column.")

    @property
    def max_length(self) -> int:
        """The length of all training examples: prompt, answer and its end."""
        return self.max_source_length + self.max_target_length + 1


@dataclass
class TrainingArguments(Seq2SeqTrainingArguments):
    output_dir: str = field(metadata={"help": "folder for checkpoints and results"})
    optim: str = option("adamw_hf (as the original) or an optimizer of transformers", "adamw_hf")
    overwrite_output_dir: bool = option("start anew, even if output_dir has checkpoints", False)
    group_by_length: bool = option("as --train_sampling_strategy group_by_length", False)
    adafactor: bool = option("as --optim adafactor", False)
    logging_dir: str | None = option("folder for TensorBoard's log")

    def __post_init__(self):
        if self.label_smoothing_factor:
            raise SystemExit("--label_smoothing_factor does not fit this model: leave it out.")
        if (self.do_eval or self.do_predict) and not self.predict_with_generate:
            raise SystemExit("--do_eval and --do_predict need --predict_with_generate.")
        if self.deepspeed and find_spec("deepspeed") is None:
            raise SystemExit("--deepspeed needs its package: pip install deepspeed")
        if self.adafactor:
            self.optim = "adafactor"
        if self.group_by_length:
            self.train_sampling_strategy = "group_by_length"
        if self.logging_dir:
            os.environ["TENSORBOARD_LOGGING_DIR"] = self.logging_dir
        self.has_original_optimizer = self.optim == "adamw_hf"
        if self.has_original_optimizer:
            self.optim = "adamw_torch"
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every trained weight is used
        if self.gradient_checkpointing is None:
            self.gradient_checkpointing = True  # as the original
        if hasattr(self, "activation_checkpointing"):  # the name since transformers 5.24
            if self.activation_checkpointing is None:
                self.activation_checkpointing = self.gradient_checkpointing
            self.gradient_checkpointing = None
        super().__post_init__()


class Parser(HfArgumentParser):
    def error(self, message: str):
        raise SystemExit(f"main.py: {message}")


def rename(word: str) -> str:
    """Return a flag in its new spelling, with the value that it may carry."""
    if not word.startswith("--"):
        return word
    name, *value = word.removeprefix("--").split("=", 1)
    name = name.replace("-", "_")
    return "=".join(["--" + RENAMED.get(name, name), *value])


def parse(argv: list[str] | None) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Return the arguments; print a line for each that has no effect any more.

    Raises:
        SystemExit: An argument is unknown or has a value that is not allowed.
    """
    words = map(rename, sys.argv[1:] if argv is None else argv)
    parser = Parser([ModelArguments, DataArguments, TrainingArguments], allow_abbrev=False)
    *parsed, rest = parser.parse_args_into_dataclasses(
        [*words], return_remaining_strings=True, look_for_args_file=False
    )
    flags = [word.partition("=")[0] for word in rest if word.startswith("--")]
    if unknown := [flag for flag in flags if flag[2:] not in WITHOUT_EFFECT] or rest * (not flags):
        raise SystemExit(f"main.py: unknown arguments: {' '.join(unknown)}; see --help.")
    for flag in flags:
        print(f"{flag} has no effect.", file=sys.stderr)
    return tuple(parsed)
