"""What benchmark.py makes of its figures: medians, ratios, tables and a plot. GB are 10^9 bytes."""

import statistics
from pathlib import Path

CHARACTERS_PER_TOKEN = 1.45  # of C-Eval's questions, with the official tokenizer
PRECISIONS = {"bfloat16": "FP16 / BF16", "float16": "FP16 / BF16", "int8": "INT8", "int4": "INT4"}

# The plot: sizes in points, drawn SCALE times larger.
SCALE = 2
WIDTH, MARGIN, VALUE_WIDTH = 880, 24, 240
BAR, GAP, LINE = 20, 10, 24
FONT_SIZES = {"title": 16, "label": 14, "note": 12}
COLORS = {"own": "#2f6db5", "other": "#9aa5b1", "text": "#1f2328", "note": "#57606a"}


# Figures.


def to_gigabytes(size: float | None) -> float | None:
    return None if size is None else size / 1e9


def summarize_case(case: dict, rounds: list[dict], weight_bytes: int) -> dict:
    """Return the medians of an engine's rounds.

    The bytes that a new token needs: the weights, and the keys and values that are held on average.
    Their rate is compared with the read bandwidth that was measured just before.
    """
    steps = case["new_tokens"] - 1
    first_s = statistics.median(figures["first_token_s"] for figures in rounds)
    step_s = statistics.median(figures["decode_s"] / steps for figures in rounds)
    held = case["context"] + case["prompt_tokens"] + case["new_tokens"] / 2
    cache_bytes = held * rounds[0]["cache_bytes"]
    read_bytes = weight_bytes + cache_bytes
    written = [figures["characters"] for figures in rounds if "characters" in figures]
    per_token = statistics.mean(written) / case["new_tokens"] if written else CHARACTERS_PER_TOKEN
    return {
        **case,
        "first_token_s": first_s,
        "prompt_tokens_per_s": None if case["context"] else case["prompt_tokens"] / first_s,
        "tokens_per_s": 1 / step_s,
        "tokens_per_s_rounds": [steps / figures["decode_s"] for figures in rounds],
        "characters_per_s": per_token / step_s,
        "read_gb_per_token": read_bytes / 1e9,
        "read_gb_per_s": read_bytes / step_s / 1e9,
        "fraction_of_bandwidth": statistics.median(
            read_bytes * steps / figures["decode_s"] / figures["bandwidth"] for figures in rounds
        ),
    }


def compare(reference: list, cases: list) -> list[dict]:
    """Return how many times as fast the reference is: medians of the rounds' ratios, by case."""
    ratios = []
    for case, rounds in cases:
        (other,) = (x for reference_case, x in reference if reference_case == case)
        pairs = list(zip(other, rounds, strict=True))
        ratios.append(
            {
                "decode": statistics.median(b["decode_s"] / a["decode_s"] for a, b in pairs),
                "first_token": statistics.median(
                    b["first_token_s"] / a["first_token_s"] for a, b in pairs
                ),
            }
        )
    return ratios


def measure_cache_rate(cases: list[dict]) -> float | None:
    """Return the GB/s at which keys and values are read: what the longest context adds."""
    short, long = (f(cases, key=lambda case: case["read_gb_per_token"]) for f in (min, max))
    seconds = 1 / long["tokens_per_s"] - 1 / short["tokens_per_s"]
    if short is long or seconds <= 0:
        return None
    return (long["read_gb_per_token"] - short["read_gb_per_token"]) / seconds


def summarize(groups: list[dict]) -> dict:
    """Return the report of what `measure_group` found, of one group or more."""
    bandwidths = [rate for group in groups for rate in group["bandwidths"]]
    engines = {}
    for group in groups:
        reference = next(iter(group["engines"]))
        for name, found in group["engines"].items():
            if name not in engines:
                engines[name] = {
                    "load": found["load"],
                    "cases": [(c, []) for c, _ in found["cases"]],
                }
            engine = engines[name]
            for (_, rounds), (_, new) in zip(engine["cases"], found["cases"], strict=True):
                rounds += new
            if name != reference:
                engine["ratios"] = compare(group["engines"][reference]["cases"], found["cases"])
    return {
        "read_bandwidth_gb_per_s": statistics.median(bandwidths) / 1e9,
        "read_bandwidth_rounds": [rate / 1e9 for rate in bandwidths],
        "engines": [summarize_engine(name, engine) for name, engine in engines.items()],
    }


def summarize_engine(name: str, engine: dict) -> dict:
    load = engine["load"]
    cases = [summarize_case(*case, load["weight_bytes"]) for case in engine["cases"]]
    for case, ratios in zip(cases, engine.get("ratios", []), strict=False):
        case["reference_is_faster"] = ratios
    peaks = [figures["memory_bytes"] for _, rounds in engine["cases"] for figures in rounds]
    return {
        "name": name,
        "description": load["description"],
        "load_s": load["load_s"],
        "weights_gb_per_token": load["weight_bytes"] / 1e9,
        "memory_gb": None if None in peaks else max(peaks) / 1e9,
        "cache_read_gb_per_s": measure_cache_rate(cases),
        "cases": cases,
    }


# Tables.


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def format_table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table whose columns also stand below each other in a terminal."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    padded = [
        [
            x.ljust(w) if i == 0 else x.rjust(w)
            for i, (x, w) in enumerate(zip(line, widths, strict=True))
        ]
        for line in lines
    ]
    padded.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def list_lines(report: dict) -> list[tuple[dict, dict, list[str]]]:
    """Return engine, case and the first two columns of each line of the tables."""
    return [
        (engine, case, [engine["name"], str(case["context"] + case["prompt_tokens"])])
        for engine in report["engines"]
        for case in engine["cases"]
    ]


def format_speeds(report: dict) -> str:
    reference = report["engines"][0]["name"]
    header = ["engine", "context", "first token, s", "prompt tokens/s", "tokens/s", "characters/s"]
    header += ["memory, GB", f"{reference} is faster: first token", "tokens/s"]
    rows = []
    for engine, case, columns in list_lines(report):
        ratios = case.get("reference_is_faster", {})
        columns += [
            number(case["first_token_s"], 3),
            number(case["prompt_tokens_per_s"], 1),
            number(case["tokens_per_s"], 2),
            number(case["characters_per_s"], 1),
            number(engine["memory_gb"], 2),
            number(ratios.get("first_token"), 2),
            number(ratios.get("decode"), 2),
        ]
        rows.append(columns)
    return format_table(header, rows)


def format_reading(report: dict) -> str:
    """Return the table of what new tokens need to read."""
    header = ["engine", "context", "GB/token", "of it weights", "GB/s", "of the bandwidth"]
    header += ["added context, GB/s"]
    rows = []
    for engine, case, columns in list_lines(report):
        columns += [
            number(case["read_gb_per_token"], 3),
            number(engine["weights_gb_per_token"], 3),
            number(case["read_gb_per_s"], 1),
            f"{case['fraction_of_bandwidth']:.0%}",
            number(engine["cache_read_gb_per_s"] if case is engine["cases"][-1] else None, 1),
        ]
        rows.append(columns)
    return format_table(header, rows)


def describe_setting(report: dict) -> str:
    """Return what was measured, and where."""
    shape, machine = report["shape"], report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    device = "" if machine["device"] == "cpu" else f", {machine['device']}"
    return (
        f"{report['model']}, {shape['num_layers']} layers of {shape['hidden_size']}; "
        f"{machine['processor']}{device}, {machine['threads']} threads; {versions}"
    )


def format_measured(report: dict) -> list[str]:
    """Return the lines of the rounds."""
    rates = report["read_bandwidth_rounds"]
    first = report["engines"][0]["cases"][0]
    notes = [
        f"{engine['name']}: {engine['description']}; loaded in {engine['load_s']:.1f} s"
        for engine in report["engines"]
    ]
    notes += [f"left out: {name}: {why}" for name, why in report["left_out"].items()]
    if contexts := [case["context"] for _, case, _ in list_lines(report) if case["context"]]:
        notes.append(f"In the context of {contexts[0] + 1} all keys and values but one are random.")
    return [
        f"Medians of {report['rounds']} rounds, the engines in turn; answers of "
        f"{first['new_tokens']} tokens.",
        format_speeds(report),
        f"What a new token needs to read (read bandwidth, measured in turn with the engines: "
        f"{report['read_bandwidth_gb_per_s']:.1f} GB/s, {min(rates):.1f} to {max(rates):.1f}):",
        format_reading(report),
        "\n".join(notes),
    ]


def format_original_tables(tables: dict) -> list[str]:
    """Return the original's two tables."""
    speed_length, encoded, generated = tables["lengths"]
    done = {PRECISIONS[name]: row for name, row in tables["rows"].items() if "left_out" not in row}
    speed = [
        [name, number(row["characters_per_s"], 2), number(row["tokens_per_s"], 2)]
        for name, row in done.items()
    ]
    memory = [
        [name, *(f"{number(row[key], 1)} GB" for key in ("encode_memory_gb", "generate_memory_gb"))]
        for name, row in done.items()
    ]
    names = [f"encoding {encoded} tokens", f"generating {generated} tokens"]
    lines = [
        f"Speed up to {speed_length} tokens, batch size 1:",
        format_table(["Weights", "characters/s", "tokens/s"], speed),
        "Most memory that the process (on a GPU: its tensors) had:",
        format_table(["Weights", *names], memory),
    ]
    if tables["random_context"]:
        lines.append(
            f"In {names[1]} the first {tables['random_context']} keys and values are random."
        )
    return lines + [
        f"left out: {name}: {row['left_out']}"
        for name, row in tables["rows"].items()
        if "left_out" in row
    ]


def print_report(report: dict):
    lines = [describe_setting(report)]
    if "engines" in report:
        lines += format_measured(report)
    if load_time := report.get("load_time"):
        load_s, process_s = (
            statistics.median(x[key] for x in load_time["rounds"])
            for key in ("load_s", "process_s")
        )
        lines.append(
            f"A saved checkpoint ({load_time['checkpoint']}) is ready {load_s:.1f} s after loading "
            f"begins, {process_s:.1f} s after its process; files cached."
        )
    if tables := report.get("original_tables"):
        lines += format_original_tables(tables)
    if report["model"] == "random weights":
        lines.append(
            f"Characters: {CHARACTERS_PER_TOKEN} a token, as C-Eval's questions have with the "
            "official tokenizer; random weights write none."
        )
    print("\n\n".join(lines))


# The plot.


def list_bars(report: dict) -> list[tuple[str, list[tuple[str, float, str]]]]:
    """Return the panels: a title and, for each engine, its name, a number and a remark."""
    firsts = [(engine["name"], engine["cases"][0]) for engine in report["engines"]]
    decode = [
        (name, case["tokens_per_s"], f"{case['fraction_of_bandwidth']:.0%} of the read bandwidth")
        for name, case in firsts
    ]
    prompt = [
        (name, case["prompt_tokens_per_s"], f"first token after {case['first_token_s']:.1f} s")
        for name, case in firsts
    ]
    length = firsts[0][1]["prompt_tokens"]
    return [
        ("New tokens per second, one conversation", decode),
        (f"Prompt tokens per second, prompt of {length}", prompt),
    ]


def draw_plot(report: dict, file: Path):
    """Draw the first case of each engine as bars."""
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise SystemExit("--plot needs Pillow: pip install pillow") from error
    if "engines" not in report:
        raise SystemExit("--plot: the report has no rounds to draw: measure with --rounds 3.")
    panels = list_bars(report)
    notes = [
        describe_setting(report),
        f"Medians of {report['rounds']} rounds in turn; read bandwidth "
        f"{report['read_bandwidth_gb_per_s']:.1f} GB/s",
    ]
    num_bars = sum(len(bars) for _, bars in panels)
    height = 2 * MARGIN + num_bars * (BAR + GAP) + len(panels) * 2 * LINE + len(notes) * LINE
    image = Image.new("RGB", (SCALE * WIDTH, SCALE * height), "white")
    draw = ImageDraw.Draw(image)
    fonts = {name: ImageFont.load_default(SCALE * size) for name, size in FONT_SIZES.items()}

    def write(x, y, text, font, color="text", anchor="lm"):
        draw.text((SCALE * x, SCALE * y), text, COLORS[color], fonts[font], anchor)

    labels = max(fonts["label"].getlength(name) for name, *_ in panels[0][1]) / SCALE
    left, y = MARGIN + labels + GAP, MARGIN
    full = WIDTH - MARGIN - VALUE_WIDTH - left
    for title, bars in panels:
        write(MARGIN, y + LINE / 2, title, "title")
        y += 1.5 * LINE
        for name, value, remark in bars:
            right = left + full * value / max(value for _, value, _ in bars)
            box = [SCALE * x for x in (left, y, right, y + BAR)]
            draw.rectangle(box, COLORS["other" if name.startswith("llama") else "own"])
            write(left - GAP, y + BAR / 2, name, "label", anchor="rm")
            write(right + GAP, y + BAR / 2, f"{value:.1f}  ({remark})", "label")
            y += BAR + GAP
        y += LINE / 2
    for note in notes:
        write(MARGIN, y + LINE / 2, note, "note", "note")
        y += LINE
    image.save(file)
