#!/usr/bin/env python3
"""Joins the JSON lines of scripts/bench-side-by-side.sh by run and prints the ratios as Markdown.

Usage: bench-table.py LINES.json

A line has the keys of `ttt bench` and one more, program: "torch" or "ttt". The last line of a run counts.
"""
import json
import sys

# Where the baseline has several implementations of an operation, the fastest is the one to beat.
FASTEST_OF = {
    "micro/attn_full": ["micro/attn_cudnn", "micro/attn_flash"],
    "micro/attn_swa": ["micro/attn_flex", "micro/attn_varlen"],
}
GOALS = "goals: tokens/s at least 1.25 times, memory at most 0.7 times, TTT on at least 0.965 of TTT off"


def read(path):
    """{program: {run: line}}"""
    found = {"torch": {}, "ttt": {}}
    with open(path) as file:
        for number, text in enumerate(file, 1):
            try:
                line = json.loads(text)
                found[line["program"]][line["run"]] = line
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                sys.exit(f"{path}:{number}: not a line of a benchmark ({error!r}): {text.strip()[:200]}")
    torch = found["torch"]
    for name, candidates in FASTEST_OF.items():
        timed = [torch[c] for c in candidates if "fwd_bwd_ms" in torch.get(c, {})]
        if timed:
            torch[name] = min(timed, key=lambda line: line["fwd_bwd_ms"])
    return found


def number(line, key, digits):
    value = (line or {}).get(key)
    return f"{value:,.{digits}f}" if isinstance(value, (int, float)) else (line or {}).get("error", "-")


def ratio(a, b):
    both = all(isinstance(x, (int, float)) and x > 0 for x in (a, b))
    return f"{a / b:.3f}" if both else "-"


def table(head, rows):
    if rows:
        print("| " + " | ".join(head) + " |")
        print("|" + "---|" * len(head))
        for row in rows:
            print("| " + " | ".join(row) + " |")
        print()


def steps(found):
    torch, ttt = found["torch"], found["ttt"]
    rows = []
    for name in dict.fromkeys([*torch, *ttt]):
        a, b = ttt.get(name), torch.get(name)
        if name.startswith("micro/") or not (a or b):
            continue
        pair = lambda key: ((a or {}).get(key), (b or {}).get(key))
        rows.append([name, number(a, "tokens_per_s", 0), number(b, "tokens_per_s", 0), ratio(*pair("tokens_per_s")),
                     number(a, "mfu_with_ttt", 3), number(a, "peak_mem_gib", 1), number(b, "peak_mem_gib", 1),
                     ratio(*pair("peak_mem_gib")), number(a, "first_step_s", 1)])
    table(["run", "ttt tokens/s", "PyTorch", "ratio", "ttt MFU with TTT", "ttt peak GiB", "PyTorch", "ratio",
           "ttt first step, s"], rows)


def overhead(found):
    rows = []
    for name in found["ttt"]:
        if not name.endswith("/ttt-on"):
            continue
        off = name.removesuffix("on") + "off"
        share = [ratio(lines.get(name, {}).get("tokens_per_s"), lines.get(off, {}).get("tokens_per_s"))
                 for lines in (found["ttt"], found["torch"])]
        if share[0] != "-":
            rows.append([name.removesuffix("/ttt-on"), *share])
    table(["TTT on relative to off", "ttt", "PyTorch"], rows)


def micro(found):
    rows = []
    for name, a in found["ttt"].items():
        if not name.startswith("micro/"):
            continue
        b = found["torch"].get(name)
        row = [name.removeprefix("micro/")]
        for key in ("fwd_ms", "fwd_bwd_ms"):
            row += [number(a, key, 3), number(b, key, 3), ratio((b or {}).get(key), a.get(key))]
        row.append(number(a, "fwd_bwd_tflops" if "fwd_bwd_tflops" in a else "fwd_tflops", 0))
        rows.append(row)
    table(["operation", "ttt fwd ms", "PyTorch", "speed", "ttt fwd+bwd ms", "PyTorch", "speed", "ttt TFLOP/s"], rows)


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    found = read(sys.argv[1])
    steps(found)
    overhead(found)
    micro(found)
    gpus = {line["gpu"] for line in found["torch"].values() if "gpu" in line}
    versions = {line["torch"] for line in found["torch"].values() if "torch" in line}
    print(f"GPU: {', '.join(sorted(gpus)) or 'not told'}; torch {', '.join(sorted(versions)) or 'not told'}; {GOALS}")


if __name__ == "__main__":
    main()
