"""The measurement of rounds: a figure for each round, and a kept cache that is really kept."""

from measure_rounds import main, run


def test_figures(capsys, tiny_checkpoint):
    main(["--model", str(tiny_checkpoint), "--rounds", "2"])
    kept, none = capsys.readouterr().out.splitlines()
    assert kept.startswith("kept cache") and none.startswith("no cache")
    assert all(float(figure) > 0 for line in (kept, none) for figure in line.split()[2:])
    assert len(kept.split()) == 4


def test_only_a_kept_cache_saves_work(tiny_model, tiny_tokenizer):
    lengths = {}
    for keeps_cache in (True, False):
        lengths[keeps_cache] = []
        hook = tiny_model.transformer.register_forward_pre_hook(
            lambda _, args, fed=lengths[keeps_cache]: fed.append(args[0].shape[1])
        )
        run(tiny_model, tiny_tokenizer, 3, keeps_cache)
        hook.remove()
    assert sum(lengths[True]) < sum(lengths[False])
