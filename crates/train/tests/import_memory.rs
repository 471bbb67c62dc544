//! Host memory that reading an 8B model takes: one tensor, not a model. Slow and measured by hand:
//! `cargo test --release -p ttt-train --test import_memory -- --ignored --nocapture`.
#![cfg(target_os = "linux")]

use std::fs::File;
use std::io::Write;
use std::path::Path;

use serde_json::{Map, Value, json};
use ttt_model::hf::{config_from_json, config_to_json};
use ttt_model::params::all_params;
use ttt_model::{ModelConfig, TttConfig};
use ttt_train::interop::{HfFolder, InitFrom, import};

fn qwen3(
    hidden: usize,
    intermediate: usize,
    layers: usize,
    heads: usize,
    tied: bool,
) -> ModelConfig {
    let json = json!({
        "model_type": "qwen3", "vocab_size": 151_936, "hidden_size": hidden,
        "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128,
        "tie_word_embeddings": tied,
    });
    config_from_json(&json).expect("a published shape")
}

/// A folder of this shape in bf16 whose weights are a hole in a file: zeros that take no disk.
fn sparse(config: &ModelConfig, dir: &Path) -> u64 {
    let mut header = Map::new();
    let mut end = 0;
    for spec in all_params(config) {
        let begin = end;
        end += 2 * spec.len() as u64;
        header.insert(
            spec.name,
            json!({"dtype": "BF16", "shape": spec.shape, "data_offsets": [begin, end]}),
        );
    }
    let json = Value::Object(header).to_string();
    let mut file = File::create(dir.join("model.safetensors")).expect("a file");
    file.write_all(&(json.len() as u64).to_le_bytes())
        .expect("space");
    file.write_all(json.as_bytes()).expect("space");
    file.set_len(8 + json.len() as u64 + end)
        .expect("a sparse file");
    let config = config_to_json(config, "bfloat16").expect("a class of transformers");
    std::fs::write(dir.join("config.json"), config.to_string()).expect("space");
    end
}

/// Peak resident memory since the last call, in bytes, mapped pages of files included.
fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status
        .lines()
        .find(|line| line.starts_with("VmHWM:"))
        .expect("VmHWM");
    let kilobytes: u64 = line
        .split_whitespace()
        .nth(1)
        .expect("a value")
        .parse()
        .expect("kB");
    std::fs::write("/proc/self/clear_refs", "5").expect("the peak can be reset");
    kilobytes * 1024
}

#[test]
#[ignore = "reads 16 GB of zeros"]
fn eight_billion_parameters_are_read_a_tensor_at_a_time() {
    let dir = tempfile::tempdir().expect("a folder");
    let config = qwen3(4096, 12_288, 36, 32, false);
    let bytes = sparse(&config, dir.path());
    let mut with_ttt = config;
    with_ttt.ttt = TttConfig {
        enabled: true,
        ..TttConfig::default()
    };
    let folder = HfFolder::open(dir.path()).expect("the folder");
    let plan = InitFrom::plan(&with_ttt, &folder.weights, 0).expect("a plan");
    let largest = plan
        .specs()
        .iter()
        .map(|spec| 4 * spec.len() as u64)
        .max()
        .unwrap_or(0);
    peak_bytes();
    let mut parameters = 0;
    for value in plan.iter() {
        parameters += value.expect("values").1.len();
    }
    let peak = peak_bytes();
    println!(
        "{parameters} parameters, {bytes} bytes on disk, largest tensor {largest} bytes in f32, peak {peak}"
    );
    // The largest tensor in f32, and this process.
    assert!(peak < largest + (64 << 20), "{peak}");
}

#[test]
#[ignore = "writes 2.4 GB"]
fn importing_holds_slices() {
    let dir = tempfile::tempdir().expect("a folder");
    let config = qwen3(1024, 3072, 28, 16, true);
    let bytes = sparse(&config, dir.path());
    peak_bytes();
    import(dir.path(), &dir.path().join("checkpoint")).expect("an import");
    let peak = peak_bytes();
    println!("import of {bytes} bytes: peak {peak}");
    assert!(peak < 128 << 20, "{peak}");
}
