"""Load the model and make trainable what the arguments choose, if the memory is enough."""

import warnings
from argparse import Namespace
from pathlib import Path

import torch
from arguments import DataArguments, ModelArguments, TrainingArguments
from transformers import set_seed

from chatglm2.adapters import check_tensors, import_peft, read_adapter, register_quantized_layers
from chatglm2.checkpoint import locate_descriptions, read_tensors
from chatglm2.configuration_chatglm import ChatGLMConfig
from chatglm2.hardware import get_free_memory, gigabytes
from chatglm2.json_files import read_config
from chatglm2.loading import DTYPES, choose_device_and_dtype, load_model, name_of
from chatglm2.modeling_chatglm import PrefixEncoder
from chatglm2.placement import count_weight_bytes, create_empty_model
from chatglm2.quantization import ChatGLMQuantizationConfig, get_quantization
from chatglm2.recognition import PREFIX_KEYS
from chatglm2.weights_chatglm import find_weight_files

LORA_LAYERS = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
TRAINING_BYTES = 12  # of a trained weight: float32 gradient and the two states of Adam


def choose_dtype(
    model_args: ModelArguments, training_args: TrainingArguments, config: ChatGLMConfig
) -> str:
    """Return the dtype of the weights: float32 if all are trained, else as for inference."""
    if not (model_args.pre_seq_len or model_args.lora_rank) and training_args.do_train:
        return "float32"
    return name_of(choose_device_and_dtype(training_args.device.type, "auto", config.dtype)[1])


def check_arguments(model_args: ModelArguments, data_args, training_args, config: ChatGLMConfig):
    """Check the arguments against the model.

    Raises:
        SystemExit: They do not fit.
    """
    if data_args.max_length > config.seq_length:
        raise SystemExit(
            f"--max_source_length {data_args.max_source_length} and --max_target_length "
            f"{data_args.max_target_length} need {data_args.max_length} tokens, and the model's "
            f"context has {config.seq_length}: a response would have no room; choose less."
        )
    if config.pre_seq_len is not None:
        raise SystemExit(
            f"{model_args.model_name_or_path} has a prefix already: give the model without it, and "
            "the prefix as --ptuning_checkpoint."
        )
    is_quantized = model_args.quantization_bit or config.quantization_bit
    trains_adapter = model_args.pre_seq_len or model_args.lora_rank
    folder = model_args.ptuning_checkpoint
    if training_args.do_train and is_quantized and not trains_adapter:
        raise SystemExit(
            "Quantized weights cannot be trained: add --pre_seq_len or --lora_rank, or give a "
            "model that is not quantized, without --quantization_bit."
        )
    if training_args.do_train and folder and not model_args.pre_seq_len:
        raise SystemExit("--ptuning_checkpoint needs --pre_seq_len, the length of its prefix.")
    if not training_args.do_train and trains_adapter and not folder:
        raise SystemExit("Give --ptuning_checkpoint, the folder with the trained adapter.")


def count_activation_bytes(data_args, training_args, config: ChatGLMConfig, size: int) -> int:
    """Return about how many bytes the layers and the logits of a micro batch need.

    Args:
        size: Bytes of a number in the hidden states.
    """
    layer = size * (8 * config.hidden_size + 5 * config.ffn_hidden_size)  # of a token
    kept = size * config.hidden_size if training_args.gradient_checkpointing else layer
    logits = config.padded_vocab_size * (2 * size + 8)  # with gradient; the loss is float32
    tokens = training_args.per_device_train_batch_size * data_args.max_length
    return tokens * (config.num_layers * kept + layer + logits)


def check_memory(model_args, data_args, training_args, config, quantization, dtype: torch.dtype):
    """Check that the training fits into the free memory, if that can be read.

    Raises:
        SystemExit: It does not fit.
    """
    empty = add_trained(create_empty_model(config, quantization), model_args)
    trained = sum(x.numel() for x in empty.parameters() if x.requires_grad)
    needed = count_weight_bytes(config, dtype, quantization) + TRAINING_BYTES * trained
    needed += count_activation_bytes(data_args, training_args, config, dtype.itemsize)
    if quantization is not None:  # one weight at a time is restored
        needed += 2 * config.ffn_hidden_size * config.hidden_size * dtype.itemsize
    free = get_free_memory(training_args.device)
    if free is None or needed <= free or training_args.deepspeed:
        return
    cures = {
        "--pre_seq_len 128 or --lora_rank 8 instead of all weights": trained > needed / 40,
        "--quantization_bit 4": quantization is None,
        "--per_device_train_batch_size 1": training_args.per_device_train_batch_size > 1,
        "--gradient_checkpointing True": not training_args.gradient_checkpointing,
        "shorter --max_source_length and --max_target_length": True,
    }
    steps = ", ".join(cure for cure, helps in cures.items() if helps)
    raise SystemExit(
        f"{model_args.model_name_or_path}: training {trained:,} weights needs about "
        f"{gigabytes(needed)} on {training_args.device}, {gigabytes(free)} free: use {steps}, or a "
        "machine with more memory."
    )


def add_trained(model, model_args: ModelArguments):
    """Return the model with only the weights trainable that the arguments choose.

    A prefix is drawn as the original draws it, and float32 in every model.
    """
    if model_args.pre_seq_len:
        config = model.config
        config.pre_seq_len = model_args.pre_seq_len
        config.prefix_projection = model_args.prefix_projection
        with torch.device("meta" if model.device.type == "meta" else "cpu"):
            encoder = PrefixEncoder(config)
        model.transformer.prefix_encoder = encoder.to(model.device)
        model.transformer.freeze_for_prefix()
    elif model_args.lora_rank:
        peft, rank = import_peft(), model_args.lora_rank
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            lora_dropout=0.05,
            target_modules=LORA_LAYERS,
            task_type="CAUSAL_LM",
        )
        if get_quantization(model.config) is not None:
            register_quantized_layers(config)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*QuantizedLinear.*", UserWarning)
            model = peft.get_peft_model(model, config)
    return model


def load_prefix(model, folder: str):
    """Load a prefix to train it further.

    Raises:
        SystemExit: The folder holds another kind of adapter.
        ValueError: The prefix has another size or is damaged.
    """
    encoder = model.transformer.prefix_encoder
    files = find_weight_files(Path(folder))
    tensors = {k.removeprefix(PREFIX_KEYS): v for k, v in read_tensors(*files).items()}
    check_tensors(Path(folder), tensors, encoder.state_dict())
    encoder.load_state_dict(tensors)


def prepare_model(
    model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments
):
    """Return tokenizer and model, with what is to be trained or with the given adapter.

    Raises:
        SystemExit: The arguments or the memory do not fit the model.
    """
    folder, _ = locate_descriptions(model_args.model_name_or_path, model_args.model_revision)
    config, do_train = read_config(folder), training_args.do_train
    check_arguments(model_args, data_args, training_args, config)
    dtype = choose_dtype(model_args, training_args, config)
    quantization = get_quantization(config)
    if quantization is None and model_args.quantization_bit:
        quantization = ChatGLMQuantizationConfig(bits=model_args.quantization_bit)
    if do_train:
        if folder := model_args.ptuning_checkpoint:
            read_adapter(folder, config, quantization is not None)  # before the weights are read
        needs = (model_args, data_args, training_args, config, quantization, DTYPES[dtype])
        check_memory(*needs)
    device = training_args.device
    name = str(device) if device.type == "cuda" else device.type  # torchrun numbers CPUs too
    options = {"device": name, "dtype": dtype, "kv_cache_dtype": "auto"}
    options |= {"num_gpus": 1, "offload_folder": None, "threads": None}
    tokenizer, model = load_model(
        Namespace(
            model=model_args.model_name_or_path,
            revision=model_args.model_revision,
            quantize=model_args.quantization_bit,
            quantize_output=False,
            adapter=None if do_train else model_args.ptuning_checkpoint,
            **options,
        )
    )
    if do_train:
        set_seed(training_args.seed)
        model = add_trained(model, model_args)
        if model_args.ptuning_checkpoint:
            load_prefix(model, model_args.ptuning_checkpoint)
        model.enable_input_require_grads()  # for the recomputation of layers
    elif model_args.pre_seq_len not in (None, model.config.pre_seq_len):
        raise SystemExit(
            f"--pre_seq_len {model_args.pre_seq_len}: the prefix in "
            f"{model_args.ptuning_checkpoint} has {model.config.pre_seq_len} tokens: leave it out."
        )
    return tokenizer, model
