"""Compares exported folders with what this program computes from them.

    TTT_HF_EXPORT=out cargo test --release --test hf_roundtrip -- --ignored
    venv/bin/python tests/hf/check_export.py out [checkout of the official In-Place-TTT release]

Every `out/NAME/` is opened by transformers' own class, which knows no TTT, and compared with
`logits_base` of `NAME.ours.safetensors`. With a checkout (and einops, opt_einsum and a transformers
that its files run on, such as 4.57.6) TTT models are also opened by the official modelling files and
compared with `logits`. Exits with 1 if any differs by more than 1e-5 or names do not match.
"""

import importlib
import json
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

LIMIT = 1e-5
OFFICIAL = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}


def official_class(checkout, model_type):
    # The packages' own __init__ asks for training kernels, which this check has no use for.
    package = "hf_models"
    for name in ["", f".hf_{model_type}"]:
        package += name
        module = types.ModuleType(package)
        module.__path__ = [str(Path(checkout) / package.replace(".", "/"))]
        sys.modules[package] = module
    modelling = importlib.import_module(f"{package}.modeling_{model_type}")
    return getattr(modelling, OFFICIAL[model_type])


def compare(label, model_class, folder, ids, expected, ignored):
    options = dict(dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    model, info = model_class.from_pretrained(folder, **options)
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits
    error = ((logits - expected).norm() / expected.norm()).item()
    unexpected = [k for k in info["unexpected_keys"] if not (ignored and ".mlp.ttt_" in k)]
    fits = not unexpected and not info["missing_keys"] and not info["mismatched_keys"]
    good = error <= LIMIT and fits
    print(f"{'ok ' if good else 'BAD'} {label}: relative error {error:.1e}, {type(model).__name__}")
    if not fits:
        print(f"    missing {info['missing_keys']}, unexpected {unexpected}")
    return good


def main():
    out = Path(sys.argv[1])
    checkout = sys.argv[2] if len(sys.argv) > 2 else None
    good = True
    for ours in sorted(out.glob("*.ours.safetensors")):
        name = ours.name.removesuffix(".ours.safetensors")
        tensors = load_file(ours)
        ids = tensors["input_ids"]
        config = json.loads((out / name / "config.json").read_text())
        good &= compare(
            name, AutoModelForCausalLM, out / name, ids, tensors["logits_base"], ignored=True
        )
        if checkout and config.get("ttt_mode"):
            assert (tensors["logits"] - tensors["logits_base"]).norm() > 1e-2, "TTT does nothing"
            model_class = official_class(checkout, config["model_type"])
            label = f"{name} (official)"
            good &= compare(label, model_class, out / name, ids, tensors["logits"], ignored=False)
    sys.exit(not good)


if __name__ == "__main__":
    main()
