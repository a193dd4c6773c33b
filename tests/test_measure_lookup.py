"""The measurement of prompt lookup: quoting takes fewer steps, and a figure for each line."""

import measure_lookup


def test_quoting_takes_fewer_steps(tiny_model, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(measure_lookup, "NUM_RUNS", 1)
    monkeypatch.setattr(measure_lookup, "QUERIES", ("讲个故事",))
    ((query, length, num_steps, *speeds),) = measure_lookup.measure_quoting(
        tiny_model, tiny_tokenizer, 10
    )
    assert query == "讲个故事" and num_steps < length / 5 and min(speeds) > 0


def test_the_cost_of_a_step_leaves_the_cache_as_it_was(tiny_model, monkeypatch):
    monkeypatch.setattr(measure_lookup, "NUM_STEPS", 3)
    lengths = []
    hook = tiny_model.transformer.register_forward_hook(
        lambda _, args, output: lengths.append(output.past_key_values.get_seq_length())
    )
    costs = measure_lookup.measure_cost(tiny_model, [2, 5])
    hook.remove()
    assert list(costs) == [2, 5] and min(costs.values()) > 0
    assert lengths == [128, *[129, 130, 133] * 3]


def test_figures(tiny_checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(measure_lookup, "NUM_STEPS", 1)
    measure_lookup.main(["--model", str(tiny_checkpoint), "--cost", "--prompt-lookup", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[3] for line in lines] == ["2", "4", "5"]
