#!/usr/bin/env bash
# Runs a PyTorch baseline and `ttt bench` alternately on the same GPU, row by row, and prints their ratios.
#
# Usage: scripts/bench-side-by-side.sh [--only PART]... [--micro] [--prefill] [--steps N] [--out FILE] [BASELINE.py [TTT]]
#   BASELINE.py  the PyTorch program; default $TTT_BASELINE. It takes --mode, --preset, --attn, --seq, --batch, --ttt,
#                --steps and prints a JSON line per run with the keys that `ttt bench` has.
#   TTT          the binary; default target/release/ttt
#   --only PART  only rows whose name contains PART, such as 500m/swa/b1x32768; repeatable, all must
#   --micro      also the single operations
#   --prefill    the prefill rows in place of the training rows
#   --steps N    timed steps of each run; default 8
#   --out FILE   keep the JSON lines of both programs there
# What the two programs say on stderr goes to FILE.log, or to a temporary file that is shown if a run fails.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() {
    sed -n '2,/^set -euo/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" >&2
    exit 2
}

only=() positional=() micro=false mode=train steps=8 out=
while (($#)); do
    case $1 in
        --only) only+=("${2?--only needs a part of a name}"); shift 2 ;;
        --steps) steps=${2?--steps needs a number}; shift 2 ;;
        --out) out=${2?--out needs a file}; shift 2 ;;
        --micro) micro=true; shift ;;
        --prefill) mode=prefill; shift ;;
        --help | -h) usage ;;
        -*) echo "bench-side-by-side: unknown option $1" >&2; usage ;;
        *) positional+=("$1"); shift ;;
    esac
done
baseline=${positional[0]:-${TTT_BASELINE:-}}
ttt=${positional[1]:-$root/target/release/ttt}
[[ -n $baseline ]] || { echo "bench-side-by-side: name the PyTorch program, or set TTT_BASELINE" >&2; usage; }
[[ -r $baseline ]] || { echo "bench-side-by-side: cannot read $baseline" >&2; exit 2; }
[[ -x $ttt ]] || { echo "bench-side-by-side: $ttt is no program: cargo build --release --features cuda" >&2; exit 2; }
command -v python3 >/dev/null || { echo "bench-side-by-side: no python3 here" >&2; exit 2; }

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
lines=${out:-$scratch/lines}
log=$lines.log
: >"$lines"
: >"$log"

# Preset, attention, rows, tokens, TTT: the baseline's --suite quick, or its prefill table.
if [[ $mode == train ]]; then
    rows=(
        "500m swa 8 4096 on" "500m swa 8 4096 off"
        "500m swa 1 32768 on" "500m swa 1 32768 off"
        "500m full 4 8192 on"
        "1.5b swa 3 8192 on" "1.5b swa 3 8192 off"
    )
else
    rows=()
    for seq in 8192 32768 131072; do
        rows+=("4b swa 1 $seq on" "4b swa 1 $seq off")
    done
    for seq in 8192 32768; do
        rows+=("4b full 1 $seq on" "4b full 1 $seq off")
    done
fi

# measure PROGRAM COMMAND...: appends the JSON lines of the command to $lines with a key that names the program.
measure() {
    local program=$1
    shift
    echo "+ $*" >>"$log"
    # A run that fails is a line with an error, and the other runs go on.
    "$@" 2>>"$log" | grep '^{' | sed "s/^{/{\"program\": \"$program\", /" | tee -a "$lines" || {
        echo "bench-side-by-side: failed: $*" >&2
        tail -n 5 "$log" >&2
    }
}

wanted() {
    local part
    for part in ${only[@]+"${only[@]}"}; do
        [[ $1 == *"$part"* ]] || return 1
    done
}

if $micro; then
    measure torch python3 "$baseline" --mode micro
    measure ttt "$ttt" bench --mode micro
fi
for row in "${rows[@]}"; do
    read -r preset attn batch seq learns <<<"$row"
    wanted "$mode/$preset/$attn/b${batch}x$seq/ttt-$learns" || continue
    arguments=(--mode "$mode" --preset "$preset" --attn "$attn" --seq "$seq" --batch "$batch" --ttt "$learns" --steps "$steps")
    measure torch python3 "$baseline" "${arguments[@]}"
    measure ttt "$ttt" bench "${arguments[@]}"
done

python3 "$root/scripts/bench-table.py" "$lines"
