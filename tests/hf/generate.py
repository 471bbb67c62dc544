"""Makes the parity cases that `cargo test --release --test hf_parity` checks.

    python3 -m venv venv && venv/bin/pip install -r tests/hf/requirements.txt
    venv/bin/python tests/hf/generate.py            # or with another folder as its argument

For each case NAME: `NAME/` as transformers saves it, beside `NAME.expected.safetensors` with
`input_ids` [B,N] i64, `logits` [B,N,V] f32, `loss` [1] (transformers' own shift),
`grad.<parameter>` f32, and `greedy` [1,44]: 20 tokens of row 0 and their 24 greedy continuations.
All arithmetic is f32 on the CPU, whatever type the weights are saved in.
"""

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

ROWS, TOKENS, PROMPT, GREEDY = 2, 37, 20, 24

SMALL = dict(
    vocab_size=101,
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)


def rope(theta, **scaling):
    """RoPE keys as this release of transformers takes them."""
    import transformers

    if int(transformers.__version__.split(".")[0]) >= 5:
        return {"rope_parameters": {"rope_theta": theta, "rope_type": "default", **scaling}}
    return {"rope_theta": theta, "rope_scaling": scaling or None}


# Original contexts are short, so that kept, blended and stretched frequencies all occur among the
# few that such small heads have, and within the few positions of the cases.
LLAMA3 = rope(
    500000.0,
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
YARN = rope(
    1000000.0, rope_type="yarn", factor=4.0, original_max_position_embeddings=256, beta_fast=8.0
)

# name: configuration, type the weights are saved in, largest shard
CASES = {
    "llama3_untied": (
        LlamaConfig(**SMALL, **LLAMA3, head_dim=16, rms_norm_eps=1e-5),
        torch.float32,
        "1GB",
    ),
    "llama3_tied_bf16": (
        LlamaConfig(**SMALL, **LLAMA3, tie_word_embeddings=True, max_position_embeddings=512),
        torch.bfloat16,
        "1GB",
    ),
    "mistral_window_f16": (
        MistralConfig(**SMALL, **rope(10000.0), sliding_window=6),
        torch.float16,
        "1GB",
    ),
    "qwen2_bias_sharded": (
        Qwen2Config(**SMALL, **rope(1000000.0), tie_word_embeddings=True),
        torch.float32,
        "40KB",
    ),
    "qwen3": (Qwen3Config(**SMALL, **rope(1000000.0), head_dim=16), torch.float32, "1GB"),
    "qwen3_yarn_tied": (
        Qwen3Config(
            **SMALL, **YARN, head_dim=16, tie_word_embeddings=True, max_position_embeddings=1024
        ),
        torch.float32,
        "1GB",
    ),
    "qwen3_window": (
        Qwen3Config(
            **{**SMALL, "num_hidden_layers": 3},
            **rope(1000000.0),
            head_dim=12,
            use_sliding_window=True,
            sliding_window=7,
            max_window_layers=1,
        ),
        torch.float32,
        "1GB",
    ),
}


def randomise(model, generator):
    """Values under which every path matters: gains off 1, biases off 0, attention not flat."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1.0 + 0.3 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(0.25 * noise)


def make(name, config, dtype, max_shard_size, folder, seed):
    shutil.rmtree(folder / name, ignore_errors=True)
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).float()
    randomise(model, generator)
    model.to(dtype).save_pretrained(folder / name, max_shard_size=max_shard_size)
    # Read back, not converted back: a conversion would round RoPE's frequencies too.
    model = AutoModelForCausalLM.from_pretrained(
        folder / name, dtype=torch.float32, attn_implementation="eager"
    ).eval()

    input_ids = torch.randint(config.vocab_size, (ROWS, TOKENS), generator=generator)
    output = model(input_ids=input_ids, labels=input_ids)
    output.loss.backward()
    expected = {
        "input_ids": input_ids,
        "logits": output.logits.detach(),
        "loss": output.loss.detach().reshape(1),
    }
    for parameter_name, parameter in model.named_parameters():
        expected[f"grad.{parameter_name}"] = parameter.grad

    prompt = input_ids[:1, :PROMPT]
    generated = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=GREEDY,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=None,
    )
    assert generated.shape == (1, PROMPT + GREEDY), generated.shape
    expected["greedy"] = generated
    with torch.no_grad():
        steps = model(input_ids=generated).logits[0, PROMPT - 1 : -1]
    best = steps.topk(2).values
    # A greedy choice that rounding could turn would test nothing but luck.
    if (best[:, 0] - best[:, 1]).min() < 1e-3:
        return False
    expected = {key: value.contiguous() for key, value in expected.items()}
    save_file(expected, folder / f"{name}.expected.safetensors", metadata={"seed": str(seed)})
    return True


def main():
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    torch.set_num_threads(1)  # one order of summation
    for name, case in CASES.items():
        seed = next(s for s in range(100) if make(name, *case, folder, s))
        kilobytes = sum(f.stat().st_size for f in (folder / name).iterdir()) // 1000
        print(f"{name}: seed {seed}, {kilobytes} kB")


if __name__ == "__main__":
    main()
