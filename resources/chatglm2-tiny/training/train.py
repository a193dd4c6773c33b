"""Train the tokenizer and the model `resources/chatglm2-tiny` from scratch, on a CPU.

    python resources/chatglm2-tiny/training/train.py    # under an hour on two cores
    python resources/chatglm2-tiny/training/check.py    # the figures of its README

After Ctrl-C the same command continues from the last state, which it saves in the file `--state`.
The same seed gives the same data in the same order.
"""

import argparse
import hashlib
import math
import random
import sys
from functools import partial
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import utils  # noqa: F401  # first: it explains which library is missing

# isort: split
import sentencepiece
import torch
import torch.nn.functional as F
from data import DEMONSTRATION, DIALOGUES, LANGUAGES, Dialogues
from tqdm import tqdm

from chatglm2 import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMTokenizer
from chatglm2.refresh import CODE_FILES
from chatglm2.tokenization_chatglm import ANSWER, QUESTION

ROOT = Path(__file__).resolve().parents[3]
VOCAB_SIZE = 4096
ROW_LENGTH = 384  # tokens; conversations are packed into rows
NUM_ROUNDS = [1, 1, 1, 2, 2, 3, 4, 5, 7]  # a conversation's length is drawn from these
OTHERS_IN_TOKENIZER = 6000  # other questions per language that the tokenizer is trained on
ENGLISH_SHARE = 0.55  # more than half of the conversations: English takes more tokens
QUESTION_WEIGHT = 0.1  # weight of question tokens in the loss; answer tokens have 1
SAVE_STEPS = 200


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description="Train resources/chatglm2-tiny from scratch.")
    parser.add_argument("--output", type=Path, default=ROOT / "resources" / "chatglm2-tiny")
    parser.add_argument("--state", type=Path, default="train_tiny.pt", help="file to resume from")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=16, help="rows of a step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="faster with AVX512-BF16 or AMX")
    return parser.parse_args(argv)


def train_tokenizer(dialogues: dict[str, Dialogues], folder: Path, seed: int) -> ChatGLMTokenizer:
    """Train a SentencePiece model with the layout of the official one; save it as a tokenizer."""
    rng = random.Random(seed)
    lines = [QUESTION.format(n=i) for i in range(1, 10)] + [ANSWER] * 10
    for language, data in dialogues.items():
        stack = list(data.intents)
        for intent in stack:
            stack.extend(intent.follow_ups)
            lines += [*intent.questions, *[intent.answer] * 3]
        lines += [data.other_question(rng) for _ in range(OTHERS_IN_TOKENIZER)]
        lines += [DEMONSTRATION[language]] * 100
    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in lines for line in text.split("\n") if line),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=VOCAB_SIZE - 5,  # the tokenizer adds [MASK], [gMASK], [sMASK], sop, eop
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.997,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=2,
        minloglevel=1,
    )
    (folder / "tokenizer.vocab").unlink()
    tokenizer = ChatGLMTokenizer(folder / "tokenizer.model")
    tokenizer.save_pretrained(folder)
    return tokenizer


def create_model() -> ChatGLMForConditionalGeneration:
    config = ChatGLMConfig(
        num_layers=4,
        padded_vocab_size=VOCAB_SIZE,
        hidden_size=256,
        ffn_hidden_size=512,
        kv_channels=32,
        num_attention_heads=8,
        seq_length=2048,
        add_qkv_bias=True,
        multi_query_attention=True,
        multi_query_group_num=2,
        hidden_dropout=0.1,
    )
    return ChatGLMForConditionalGeneration(config, empty_init=False)


class Rows(torch.utils.data.IterableDataset):
    """Endless training rows: conversations packed to `ROW_LENGTH` tokens.

    A row is (input_ids, position_ids, targets, weights). Positions start at 0 in each
    conversation, which is how the model separates them. The target of an answer's last token is
    </s>, although the next token belongs to the next round: prompts contain no </s>.
    """

    def __init__(self, tokenizer, dialogues: dict[str, Dialogues], seed: int, first_row: int):
        self.tokenizer, self.dialogues = tokenizer, dialogues
        self.seed, self.first_row = seed, first_row

    def encode_answer(self, answer: str) -> list[int]:
        # Within a conversation SentencePiece adds no space in front of an answer. The line feed
        # receives this space here, and both are cut off.
        return self.tokenizer.encode("\n" + answer, add_special_tokens=False)[2:]

    def encode_round(self, query: str, history: list) -> list[int]:
        if history:
            return self.tokenizer.build_round(query, history)
        return self.tokenizer.encode(self.tokenizer.build_prompt(query))

    def encode_question(self, query: str, history: list, rng: random.Random) -> list[int]:
        """Encode a round, half of the time with random merges (BPE-dropout, arXiv 1910.13267)."""
        if rng.random() < 0.5:
            return self.encode_round(query, history)
        end = self.tokenizer.encode(ANSWER, add_special_tokens=False)[1:]
        begin = self.encode_round("", history)[: -len(end)]
        pieces = self.tokenizer.sp_model.encode("\n" + query, enable_sampling=True, alpha=0.1)[2:]
        return begin + pieces + end

    def encode_conversation(self, rng: random.Random) -> tuple:
        """Return the four columns of a row."""
        language = "en" if rng.random() < ENGLISH_SHARE else "zh"
        history = self.dialogues[language].conversation(rng.choice(NUM_ROUNDS), rng)
        ids, weights, targets = [], [], []
        for i, (query, answer) in enumerate(history):
            question_ids = self.encode_question(query, history[:i], rng)
            answer_ids = self.encode_answer(answer)
            targets += [*question_ids[1:], *answer_ids, self.tokenizer.eos_token_id]
            weights += [QUESTION_WEIGHT] * (len(question_ids) - 1) + [1.0] * (len(answer_ids) + 1)
            ids += question_ids + answer_ids
        return ids, range(len(ids)), targets, weights

    def row(self, index: int) -> tuple[torch.Tensor, ...]:
        rng = random.Random(f"{self.seed} {index}")
        sentencepiece.set_random_generator_seed(rng.randrange(2**31))
        columns = [[], [], [], []]
        while len(columns[0]) < ROW_LENGTH:
            for column, values in zip(columns, self.encode_conversation(rng), strict=True):
                column.extend(values)
        return tuple(torch.tensor(column[:ROW_LENGTH]) for column in columns)

    def __iter__(self):
        return map(self.row, count(self.first_row))


def learning_rate_factor(step: int, steps: int) -> float:
    """Return the factor of a linear warm-up over 100 steps, then of a cosine down to 0.01."""
    return min(step / 100, 0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2)


def describe_run(args) -> dict:
    """Return the settings that a training must share with the state that it continues."""
    files = sorted(DIALOGUES.glob("*.yaml"))
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
    names = ("steps", "batch_size", "learning_rate", "seed")
    return {name: getattr(args, name) for name in names} | {"dialogues": digest}


def compute_loss(model, batch, is_bf16: bool) -> torch.Tensor:
    input_ids, position_ids, targets, weights = batch
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_bf16):
        logits = model(input_ids, position_ids=position_ids, use_cache=False).logits.float()
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


def create_optimizer(model, args):
    """Return AdamW, which decays matrices only, and the schedule of its learning rate."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.learning_rate,
        betas=(0.9, 0.95),
    )
    factor = partial(learning_rate_factor, steps=args.steps)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def save_state(file: Path, step: int, run: dict, **parts):
    """Save the state after a number of steps, so that an interruption leaves a whole file."""
    state = {name: part.state_dict() for name, part in parts.items()}
    state |= {"step": step, "run": run, "rng": torch.get_rng_state()}
    torch.save(state, file.with_suffix(".new"))
    file.with_suffix(".new").replace(file)


def load_state(file: Path, run: dict, **parts) -> dict:
    state = torch.load(file, weights_only=True)
    if state["run"] != run:
        raise SystemExit(
            f"{file} belongs to another training ({state['run']}, not {run}): delete it, or name "
            "another file with --state."
        )
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state


def main(argv=None):
    args = parse_arguments(argv)
    torch.manual_seed(args.seed)
    dialogues = {language: Dialogues(language) for language in LANGUAGES}
    model = create_model()
    optimizer, scheduler = create_optimizer(model, args)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    run, state = describe_run(args), {"step": 0}
    if args.state.exists():
        state = load_state(args.state, run, **parts)
        tokenizer = ChatGLMTokenizer(args.output / "tokenizer.model")
    else:
        tokenizer = train_tokenizer(dialogues, args.output, args.seed)
    first_step = state["step"]
    rows = Rows(tokenizer, dialogues, args.seed, first_step * args.batch_size)
    batches = iter(torch.utils.data.DataLoader(rows, batch_size=args.batch_size))
    if first_step:
        torch.set_rng_state(state["rng"])
    progress = tqdm(range(first_step, args.steps), initial=first_step, total=args.steps)
    for step in progress:
        loss = compute_loss(model.train(), next(batches), args.bf16)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % SAVE_STEPS == 0 or step + 1 == args.steps:
            save_state(args.state, step + 1, run, **parts)
    model.config.hidden_dropout = 0.0
    model.half().save_pretrained(args.output)
    for file in CODE_FILES:  # the folder holds data only
        (args.output / file.name).unlink(missing_ok=True)
    args.state.unlink()
    print(f"Saved {args.output}. Next: python resources/chatglm2-tiny/training/check.py")


if __name__ == "__main__":
    main()
