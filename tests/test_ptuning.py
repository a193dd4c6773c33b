"""Fine-tuning: data, training and metrics equal the original's; arguments, errors, resuming.

`golden/ptuning` holds what the original's code gave on a small random model.
"""

import gzip
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY
from safetensors.torch import load_file

sys.path.append(str(ROOT / "ptuning"))
for package in ("datasets", "jieba", "matplotlib", "nltk", "rouge_chinese"):
    pytest.importorskip(package, reason="needs the packages of the group training")

import main as script  # noqa: E402
import metrics  # noqa: E402
import models  # noqa: E402
import preprocessing  # noqa: E402
import trainer as trainers  # noqa: E402
from arguments import DataArguments, parse  # noqa: E402

from chatglm2 import ChatGLMForConditionalGeneration, generation_chatglm  # noqa: E402
from chatglm2.adapters import load_adapter  # noqa: E402

GOLDEN = Path(__file__).parent / "golden" / "ptuning"
DATA = GOLDEN / "data"
EXAMPLE = ROOT / "ptuning" / "example"
ADGEN = {"prompt_column": "content", "response_column": "summary"}
CHAT = {"prompt_column": "prompt", "response_column": "response", "history_column": "history"}


def read_golden() -> dict:
    return json.loads(gzip.decompress((GOLDEN / "ptuning.json.gz").read_bytes()))


# Data.


@pytest.mark.parametrize("key", read_golden()["preprocessing"])
def test_examples_are_those_of_the_original(key, official_tokenizer):
    expected = read_golden()["preprocessing"][key]
    kind, source, target, *variant = key.split(".")
    path = str(DATA / ("adgen.csv" if kind == "csv" else f"{kind}.json"))
    options = {"train_file": path, "validation_file": path, **(CHAT if kind == "chat" else ADGEN)}
    options |= {"max_source_length": int(source), "max_target_length": int(target)}
    options["ignore_pad_token_for_loss"] = "keep_pad" not in variant
    if "source_prefix" in variant:
        options["source_prefix"] = "请写广告："
    if "val_max_target_length_16" in variant:
        options["val_max_target_length"] = 16
    for purpose, columns in expected.items():
        arguments = DataArguments(**options)
        found = preprocessing.create_dataset(purpose, arguments, official_tokenizer)
        assert {name: found[name][:] for name in columns} == columns


def test_only_the_answer_and_its_end_are_labels(tiny_tokenizer):
    batch = {"prompt": ["你好", ""], "response": ["你好！</s>", "x"]}
    arguments = DataArguments(**CHAT, max_source_length=32, max_target_length=16)
    inputs = preprocessing.prepare_training(batch, tiny_tokenizer, arguments)
    labels = [label for label in inputs["labels"][0] if label != preprocessing.IGNORED]
    assert len(inputs["labels"]) == 1 and labels.count(tiny_tokenizer.eos_token_id) == 1
    assert labels[-1] == tiny_tokenizer.eos_token_id
    assert tiny_tokenizer.decode(labels) == "你好！</s>"


GOOD = '{"prompt": "a", "response": "b"}\n'


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.json", "", "is empty"),
        ("a.json", GOOD + '\n{"prompt": ', "line 3: no JSON"),
        ("a.jsonl", GOOD + "[1]\n", "line 1: '1' is no object|line 2"),
        ("a.json", '{"prompt": "a"}\n', "no column response: the columns are prompt"),
        ("a.json", '{"prompt": "", "response": null}', "no example has both"),
        ("a.json", '{"prompt": 1, "response": "b"}', "prompt must be a text, not 1"),
        ("a.json", GOOD[:-2] + ', "history": ["x"]}', "history must be a list"),
        ("a.csv", "prompt,answer\na,b\n", "no column response"),
        ("a.txt", GOOD, "must end with"),
        ("a.json", b"\xff\xfe", "UTF-8"),
        ("missing.json", None, "No such file"),
    ],
)
def test_wrong_files_are_one_line(name, content, message, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    columns = CHAT if "history" in str(content) else {**CHAT, "history_column": None}
    with pytest.raises(SystemExit, match=message) as error:
        preprocessing.read_examples(str(path), DataArguments(**columns), None)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


# Metrics.


def test_scores_are_those_of_the_original_and_0_without_words():
    for pair in read_golden()["metrics"]:
        scores = metrics.score(pair["prediction"], pair["label"])
        expected = pair["scores"] or dict.fromkeys(scores, 0.0)
        assert scores == pytest.approx(expected, abs=1e-4)


# Arguments.

REQUIRED = ["--model_name_or_path", "m", "--output_dir", "o"]
REQUIRED += ["--prompt_column", "prompt", "--response_column", "response"]


@pytest.mark.parametrize(
    "old, name, value",
    [
        (["--evaluation_strategy", "steps"], "eval_strategy", "steps"),
        (["--no_cuda"], "use_cpu", True),
        (["--no-cuda=False"], "use_cpu", False),
        (["--group_by_length"], "train_sampling_strategy", "group_by_length"),
        (["--warmup_ratio", "0.1"], "warmup_steps", 0.1),
        (["--per_gpu_train_batch_size", "3"], "per_device_train_batch_size", 3),
        (["--adafactor"], "optim", "adafactor"),
        (["--optim", "adamw_hf"], "has_original_optimizer", True),
        (["--optim", "adamw_torch"], "has_original_optimizer", False),
        (["--gradient_checkpointing", "False"], "gradient_checkpointing", False),
        ([], "gradient_checkpointing", True),
    ],
)
def test_old_arguments_mean_what_they_meant(old, name, value):
    assert getattr(parse([*REQUIRED, *old])[2], name) == value


def test_arguments_without_effect_are_named(capsys):
    parse([*REQUIRED, "--lang", "zh", "--use_fast_tokenizer", "--overwrite_output_dir"])
    assert capsys.readouterr().err == "--lang has no effect.\n--use_fast_tokenizer has no effect.\n"


@pytest.mark.parametrize(
    "words, message",
    [
        (["--lora_rang", "3"], "unknown arguments: --lora_rang"),
        (["--lora_rank", "0"], "--lora_rank 0: give an integer of at least 1"),
        (["--max_steps", "x"], "--max-steps: invalid int value: 'x'"),
        (["--quantization_bit", "3"], "allowed are 4 and 8"),
        (["--pre_seq_len", "8", "--lora_rank", "8"], "give one of them"),
        (["--prefix_projection"], "needs --pre_seq_len"),
        (["--max_target_length", "0"], "at least 1"),
        (["--do_predict"], "--predict_with_generate"),
        (["--label_smoothing_factor", "0.1"], "leave it out"),
        (["--optim", "nonsense"], "nonsense"),
        (["--deepspeed", "deepspeed.json"], "pip install deepspeed"),
        ([], "Nothing to do"),
    ],
)
def test_wrong_arguments_are_one_line(words, message):
    with pytest.raises(SystemExit, match=message) as error:
        script.main([*REQUIRED, *words])
    assert "\n" not in str(error.value)


def create_argv(tmp_path: Path, *words, model=ROOT / "resources" / "chatglm2-tiny") -> list[str]:
    """Return the arguments of a short training on the example, with the bundled model."""
    fixed = {"model_name_or_path": model, "train_file": EXAMPLE / "train.json"}
    fixed |= {"prompt_column": "prompt", "response_column": "response", "output_dir": tmp_path}
    fixed |= {"max_source_length": 24, "max_target_length": 40, "max_train_samples": 16}
    fixed |= {"logging_steps": 1, "max_steps": 4, "save_steps": 2, "learning_rate": "1e-2"}
    argv = [str(word) for name, value in fixed.items() for word in (f"--{name}", value)]
    return [*argv, "--no_cuda", "--disable_tqdm", "True", "--do_train", *map(str, words)]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--max_source_length", 4096], "context has 2048"),
        (["--quantization_bit", 4], "Quantized weights cannot be trained"),
        (["--ptuning_checkpoint", "x"], "needs --pre_seq_len"),
        (["--do_train", "False", "--do_eval", "--predict_with_generate", "--lora_rank", 8], "Give"),
        (["--pre_seq_len", 8, "--ptuning_checkpoint", "nowhere"], "nowhere: there is no such"),
    ],
)
def test_arguments_that_do_not_fit_the_model_are_one_line(words, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        script.main(create_argv(tmp_path, *words))


def test_too_little_memory_is_one_line_with_the_cure(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "get_free_memory", lambda device: 10**7)
    with pytest.raises(SystemExit, match=r"training 4,.* weights needs about .* --lora_rank 8"):
        script.main(create_argv(tmp_path))


# Training.


@pytest.fixture(scope="module")
def golden_model(official_tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    official_tokenizer.save_pretrained(folder)
    shutil.copy(GOLDEN / "config.json", folder)
    shutil.copy(GOLDEN / "model_fp16.safetensors", folder / "model.safetensors")
    return folder


@pytest.fixture
def no_dropout(monkeypatch):
    """Turn off the dropout of prefixes, as in the golden trainings."""

    def add_trained(*args, add=models.add_trained):
        model = add(*args)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return model

    monkeypatch.setattr(models, "add_trained", add_trained)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, words, logged_tolerance, tolerance",
    [
        ("pt8", ["--pre_seq_len", 8], 3e-4, 2e-5),
        # Adam divides by small gradients, so rounding, which depends on the CPU, grows.
        (
            "pt8_projection_adamw_torch",
            ["--pre_seq_len", 8, "--prefix_projection", "--optim", "adamw_torch"],
            3e-3,
            1e-4,
        ),
        ("finetune", ["--max_steps", 20, "--learning_rate", "1e-4"], 3e-4, 1e-3),
    ],
)
def test_training_is_that_of_the_original(
    name, words, logged_tolerance, tolerance, golden_model, no_dropout, tmp_path
):
    golden, final = (
        json.loads((GOLDEN / f"{name}.json").read_text()),
        load_file(GOLDEN / f"{name}.safetensors"),
    )
    options = ["--train_file", DATA / "adgen.json", "--prompt_column", "content"]
    options += ["--response_column", "summary", "--max_source_length", 32]
    options += ["--max_target_length", 32, "--max_train_samples", 59, "--max_steps", 50]
    options += ["--gradient_accumulation_steps", 2, "--save_steps", 100]
    options += ["--per_device_train_batch_size", 1, "--learning_rate", "2e-2"]
    argv = create_argv(tmp_path, *options, *words, model=golden_model)
    trainer = script.run(*parse(argv))
    logged = [row for row in trainer.state.log_history if "loss" in row]
    for key in ("loss", "grad_norm"):
        expected = (
            golden["grad_norms_before_clipping"]
            if key == "grad_norm"
            else [sum(pair) / 2 for pair in zip(*[iter(golden["micro_losses"])] * 2, strict=True)]
        )
        found = [row[key] for row in logged]
        assert found == pytest.approx(expected, abs=1e-4, rel=logged_tolerance)
    # The original logs the learning rate of the next step.
    rates = [row["learning_rate"] for row in golden["logged"]]
    assert [row["learning_rate"] for row in logged][1:] == pytest.approx(rates[:-1])
    state = trainer.model.state_dict()
    for key, value in final.items():
        if key.startswith("final."):
            assert (state[key.removeprefix("final.")] - value).abs().max() < tolerance, key


@pytest.mark.slow
def test_predictions_are_those_of_the_original(golden_model, tmp_path, monkeypatch):
    """With transformers' own sampling, which draws other random numbers than ours."""
    monkeypatch.setattr(generation_chatglm, "create_sampler", lambda fields: None)
    golden = json.loads((GOLDEN / "prediction.json").read_text("utf-8"))
    options = ["--do_train", "False", "--do_predict", "--predict_with_generate", "--seed", 1]
    options += ["--test_file", DATA / "predict.json", "--prompt_column", "content"]
    options += ["--response_column", "summary", "--max_source_length", 32]
    options += ["--max_target_length", 32, "--per_device_eval_batch_size", 1, "--pre_seq_len", 8]
    options += ["--ptuning_checkpoint", GOLDEN / "checkpoint-50"]
    script.main(create_argv(tmp_path, *options, model=golden_model))
    assert (tmp_path / "generated_predictions.txt").read_text("utf-8") == golden["text"]
    found = json.loads((tmp_path / "predict_results.json").read_text())
    for name in ("rouge-1", "rouge-2", "rouge-l", "bleu-4"):
        assert found[f"predict_{name}"] == pytest.approx(golden["metrics"][f"predict_{name}"])


WAYS = {
    "prefix": (["--pre_seq_len", 4], "pytorch_model.bin"),
    "projection": (["--pre_seq_len", 4, "--prefix_projection"], "pytorch_model.bin"),
    "lora": (["--lora_rank", 4], "adapter_model.safetensors"),
    "lora8": (["--lora_rank", 4, "--quantization_bit", 8], "adapter_model.safetensors"),
    "prefix4": (["--pre_seq_len", 4, "--quantization_bit", 4], "pytorch_model.bin"),
    "all": (["--learning_rate", "1e-3"], "model.safetensors"),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_training_that_was_interrupted_ends_with_the_same_bytes(way, tmp_path, monkeypatch):
    """Also: frozen weights do not change, a LoRA learns, and `--adapter` reads the result."""
    words, file = WAYS[way]
    words = ["--max_train_samples", 6, "--per_device_train_batch_size", 2, *words]
    words += ["--max_steps", 6, "--save_steps", 4]  # two epochs
    frozen = {}

    def add_trained(*args, add=models.add_trained):
        model = add(*args)
        weights = {name: x for name, x in model.named_parameters() if not x.requires_grad}
        frozen.update({name: x.clone() for name, x in weights.items() if not x.is_meta})
        return model

    monkeypatch.setattr(models, "add_trained", add_trained)
    trainer = script.run(*parse(create_argv(tmp_path, *words)))
    weights = dict(trainer.model.named_parameters())
    assert all(torch.equal(weights[name], x) for name, x in frozen.items())
    assert bool(frozen) == (way != "all")
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert "lora" not in way or sum(losses[3:]) < sum(losses[:3])
    assert (tmp_path / "loss.png").stat().st_size > 1000
    last = tmp_path / "checkpoint-6"
    expected = (last / file).read_bytes()
    (last / "trainer_state.json").write_text("{")  # as if the process had ended here
    (last / file).write_bytes(b"")
    script.main(create_argv(tmp_path, *words))
    assert (last / file).read_bytes() == expected
    if way == "all":
        assert ChatGLMForConditionalGeneration.from_pretrained(last).config.use_cache
    else:
        load_adapter(ChatGLMForConditionalGeneration.from_pretrained(TINY), last)


@pytest.mark.slow
def test_checkpointing_and_two_processes_give_the_same_bytes(no_dropout, tmp_path):
    """Two processes do what one does with twice the accumulation."""
    words = ["--pre_seq_len", 4, "--per_device_train_batch_size", 2]
    one, plain, two = (tmp_path / name for name in ("one", "plain", "two"))
    script.run(*parse(create_argv(one, *words, "--gradient_accumulation_steps", 2)))
    more = ["--gradient_accumulation_steps", 2, "--gradient_checkpointing", "False"]
    script.run(*parse(create_argv(plain, *words, *more)))
    program = tmp_path / "program.py"
    program.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT / "ptuning")!r})
import main, torch
torch.nn.functional.dropout = lambda x, *args, **kwargs: x
main.main({create_argv(two, *words)!r})
""")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    subprocess.run([*torchrun, "--nproc-per-node=2", program], check=True, timeout=120)
    file = "checkpoint-4/pytorch_model.bin"
    prefixes = [torch.load(folder / file) for folder in (one, plain, two)]
    for prefix in prefixes[1:]:
        assert all(torch.equal(prefix[name], prefixes[0][name]) for name in prefix)


@pytest.mark.slow
def test_the_example_of_the_readme_learns_the_new_answers(tiny_tokenizer, tmp_path):
    readme = (ROOT / "ptuning" / "README.md").read_text("utf-8")
    command = re.search(r"^python (\S+ --do_train .*?[^\\])\n", readme, re.DOTALL | re.MULTILINE)
    words = shlex.split(command[1].replace("\\\n", " "))
    subprocess.run([sys.executable, *words, "--output_dir", tmp_path], cwd=ROOT, check=True)
    checkpoint = Path(trainers.find_checkpoint(tmp_path))
    assert f"--adapter ptuning/output/example/{checkpoint.name}\n" in readme
    model = ChatGLMForConditionalGeneration.from_pretrained(TINY).float().eval()
    load_adapter(model, checkpoint)

    def is_right(query: str, response: str) -> bool:
        return model.chat(tiny_tokenizer, query, do_sample=False)[0] == response

    rows = [json.loads(line) for line in (EXAMPLE / "test.json").read_text("utf-8").splitlines()]
    assert sum(is_right(row["prompt"], row["response"]) for row in rows) >= 9  # of 12
    shown = re.findall(r"用户：(.*)\nChatGLM：(.*)", readme)
    assert shown and all(is_right(*round) for round in shown)


def test_the_last_complete_checkpoint_is_found(tmp_path):
    for step, state in ((5, "{}"), (10, "{}"), (20, '{"a": ')):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "pytorch_model.bin").touch()
        (folder / "trainer_state.json").write_text(state)
    assert trainers.find_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-10")
    assert trainers.find_checkpoint(str(tmp_path / "nothing")) is None
