"""The training of the bundled model: its rows, and continuing after an interruption."""

import pytest
import torch
import train
from data import LANGUAGES, Dialogues
from safetensors.torch import load_file
from train import ROW_LENGTH, VOCAB_SIZE, Rows, main


@pytest.fixture(scope="module")
def rows(tiny_tokenizer):
    return Rows(tiny_tokenizer, {name: Dialogues(name) for name in LANGUAGES}, seed=0, first_row=0)


def test_answers_are_the_targets_and_end_with_eos(rows, tiny_tokenizer):
    ids, positions, targets, weights = rows.row(0)
    assert len(ids) == len(positions) == len(targets) == len(weights) == ROW_LENGTH
    starts = (positions == 0).nonzero().flatten().tolist()
    assert starts[0] == 0 and ids[starts].tolist() == [VOCAB_SIZE - 4] * len(starts)
    is_end = targets == tiny_tokenizer.eos_token_id
    assert is_end.sum() >= len(starts) - 1
    unchanged = ~is_end[:-1] & (positions[1:] != 0)
    assert torch.equal(targets[:-1][unchanged], ids[1:][unchanged])
    assert tiny_tokenizer.eos_token_id not in ids.tolist()
    assert (weights[is_end] == 1).all()


def test_rows_are_repeatable_and_end_a_round_as_chat_reads_it(rows, tiny_tokenizer):
    assert all(map(torch.equal, rows.row(7), rows.row(7)))
    assert not torch.equal(rows.row(7)[0], rows.row(8)[0])
    history = [("你好", "你好👋！"), ("谢谢", "不客气。")]
    ids = rows.encode_round("你好", []) + rows.encode_answer("你好👋！")
    ids += rows.encode_round("谢谢", history[:1]) + rows.encode_answer("不客气。")
    ids += rows.encode_round("再见", history)
    assert ids == tiny_tokenizer.encode(tiny_tokenizer.build_prompt("再见", history))


@pytest.mark.slow
def test_training_resumed_is_training_unbroken(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SAVE_STEPS", 1)
    compute_loss = train.compute_loss

    def run(name, *more):
        arguments = ["--output", tmp_path / name, "--state", tmp_path / f"{name}.pt"]
        main([str(argument) for argument in [*arguments, "--steps", 3, "--batch-size", 1, *more]])
        return load_file(tmp_path / name / "model.safetensors")

    def interrupt(*args, calls=[]):  # noqa: B006
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compute_loss(*args)

    unbroken = run("unbroken")
    monkeypatch.setattr(train, "compute_loss", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run("resumed")
    with pytest.raises(SystemExit, match=r"resumed\.pt belongs to another training"):
        run("resumed", "--seed", 1)
    (tmp_path / "resumed" / "mine.py").touch()
    resumed = run("resumed")
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)
    assert [file.name for file in (tmp_path / "resumed").glob("*.py")] == ["mine.py"]
    assert not (tmp_path / "resumed.pt").exists()
