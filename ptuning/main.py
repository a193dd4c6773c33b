"""Fine-tune ChatGLM2 with P-Tuning v2, with a LoRA or with all weights, and measure its answers.

    python main.py --do_train --model_name_or_path THUDM/chatglm2-6b --pre_seq_len 128 \
        --train_file train.json --prompt_column content --response_column summary \
        --output_dir output

See README.md; `python main.py --help` lists all arguments.
"""

import json
import logging
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils  # before the libraries: it names those that are missing

# isort: split
from arguments import TrainingArguments, parse
from metrics import compute_metrics, decode
from models import prepare_model
from preprocessing import create_dataset
from trainer import Trainer, find_checkpoint, ignore_missing_weights, plot_losses
from transformers import DataCollatorForSeq2Seq

from chatglm2.errors import exit_on_error

SAMPLING = {"do_sample": True, "top_p": 0.7, "temperature": 0.95}  # the original's


def choose_checkpoint(training_args: TrainingArguments) -> str | None:
    """Return the folder from which an interrupted training goes on.

    Raises:
        SystemExit: There is none, and one was requested.
    """
    given = training_args.resume_from_checkpoint
    is_switch = str(given).lower() in ("true", "false")
    if given and not is_switch:
        if not Path(given).is_dir():
            raise SystemExit(f"--resume_from_checkpoint {given}: there is no such folder.")
        return given
    if str(given).lower() == "false" or (not given and training_args.overwrite_output_dir):
        return None
    found = find_checkpoint(training_args.output_dir)
    if given and found is None:
        raise SystemExit(
            f"--resume_from_checkpoint {given}: no complete checkpoint in "
            f"{training_args.output_dir}: leave it out."
        )
    if found and training_args.process_index == 0:
        print(f"Continuing from {found}; --overwrite_output_dir starts anew.", file=sys.stderr)
    return found


def train(trainer: Trainer, training_args: TrainingArguments):
    result = trainer.train(resume_from_checkpoint=choose_checkpoint(training_args))
    metrics = result.metrics | {"train_samples": len(trainer.train_dataset)}
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    if trainer.is_world_process_zero():
        plot_losses(trainer.state.log_history, Path(training_args.output_dir, "loss.png"))


def predict(trainer: Trainer, dataset, tokenizer):
    """Write generated_predictions.txt and the metrics of the predictions."""
    result = trainer.predict(dataset, metric_key_prefix="predict")
    metrics = result.metrics | {"predict_samples": len(dataset)}
    trainer.log_metrics("predict", metrics)
    trainer.save_metrics("predict", metrics)
    if not trainer.is_world_process_zero():
        return
    texts = (decode(tokenizer, rows) for rows in (result.label_ids, result.predictions))
    with open(
        Path(trainer.args.output_dir, "generated_predictions.txt"), "w", encoding="utf-8"
    ) as file:
        for label, answer in zip(*texts, strict=True):
            row = {"labels": label.strip(), "predict": answer.strip()}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def run(model_args, data_args, training_args, generation: dict = SAMPLING) -> Trainer:
    """Train, evaluate and predict as the arguments say; return the trainer."""
    tokenizer, model = prepare_model(model_args, data_args, training_args)
    datasets = {
        purpose: create_dataset(purpose, data_args, tokenizer)
        for purpose in ("train", "eval", "predict")
        if getattr(training_args, f"do_{purpose}")
    }
    lengths = {"max_length": data_args.max_length, "num_beams": data_args.num_beams}
    trainer = Trainer(
        model,
        training_args,
        generation={**generation, **lengths},
        train_dataset=datasets.get("train"),
        eval_dataset=datasets.get("eval"),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        compute_metrics=partial(compute_metrics, tokenizer=tokenizer),
    )
    if training_args.do_train:
        train(trainer, training_args)
    if training_args.do_eval:
        metrics = trainer.evaluate() | {"eval_samples": len(datasets["eval"])}
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if training_args.do_predict:
        predict(trainer, datasets["predict"], tokenizer)
    return trainer


def main(argv=None):
    with exit_on_error(""):
        arguments = parse(argv)
        if not any(getattr(arguments[-1], f"do_{x}") for x in ("train", "eval", "predict")):
            raise SystemExit("Nothing to do: give --do_train, --do_eval or --do_predict.")
        logging.getLogger("transformers.trainer").addFilter(ignore_missing_weights)
        run(*arguments)


if __name__ == "__main__":
    utils.run_script(main)
