//! Every configuration that the repository ships can be planned, and the plan is that of its model.

use std::path::PathBuf;

use ttt_train::config::Config;
use ttt_train::plan::Plan;

fn configs() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../configs")
}

fn plan(name: &str, sets: &[&str]) -> Plan {
    let sets: Vec<String> = sets.iter().map(ToString::to_string).collect();
    let path = configs().join(format!("{name}.toml"));
    Plan::new(&Config::load(&path, &sets).unwrap())
}

#[test]
fn every_shipped_configuration_is_planned() {
    let mut count = 0;
    for entry in std::fs::read_dir(configs()).unwrap() {
        let path = entry.unwrap().path();
        let config = Config::load(&path, &[]).unwrap();
        let text = Plan::new(&config).to_string();
        for part in [
            "parameters",
            "arithmetic per token",
            "tokens per step",
            "memory",
        ] {
            assert!(text.contains(part), "{}: {text}", path.display());
        }
        count += 1;
    }
    assert!(count >= 7, "{count} configurations");
}

/// In-Place TTT reference, section 2: parameters of the plain models (in billions, three decimals)
/// and what the TTT layers add (in millions, one decimal).
#[test]
fn parameter_counts_are_the_published_ones() {
    for (name, plain, added) in [
        ("500m", 0.393, 4.2),
        ("1.5b", 1.440, 16.8),
        ("1.7b", 1.720, 21.0),
        ("4b", 4.022, 39.4),
        ("8b", 8.190, 100.8),
        ("14b", 14.768, 183.7),
    ] {
        let without = plan(name, &["model.ttt.enabled=false"]).parameter_count() as f64;
        let with = plan(name, &[]).parameter_count() as f64;
        // The published 8.190 and 8.191 differ by the rounding of the last digit.
        assert!((without / 1e9 - plain).abs() < 0.0011, "{name}: {without}");
        assert!(
            ((with - without) / 1e6 - added).abs() < 0.051,
            "{name}: {}",
            with - without
        );
    }
}

#[test]
fn the_recipes_train_on_the_tokens_they_name() {
    for (name, tokens) in [
        ("500m", 20e9),
        ("1.5b", 60e9),
        ("1.7b", 120e9),
        ("4b", 120e9),
    ] {
        let total = plan(name, &[]).total_tokens() as f64;
        assert!((total / tokens - 1.0).abs() < 1e-4, "{name}: {total}");
    }
}

#[test]
fn training_arithmetic_is_six_per_matrix_parameter() {
    let plan = plan("8b", &["model.ttt.enabled=false"]);
    // Without attention scores, all but the norms and the embedding (0.622 B) are multiplied once.
    let matrices = plan.parameter_count() as f64 - 151_936.0 * 4096.0;
    assert!((3.0 * plan.flops.matmul / (6.0 * matrices) - 1.0).abs() < 1e-3);
}

#[test]
fn memory_follows_the_settings() {
    let total = |sets: &[&str]| plan("500m", sets).memory.total_bytes();
    let recompute = total(&[]);
    assert!(total(&["train.activations=keep"]) > 2.0 * recompute);
    assert!(total(&["train.micro_batch_rows=2"]) > recompute);
    assert!(total(&["train.compute=f32"]) > recompute);
    assert!(total(&["model.ttt.enabled=false"]) < recompute);
    // Weights, moments and gradients: 16 bytes a parameter. What the model computes with is among them.
    let plan = plan("500m", &[]);
    let lasting: f64 = plan.memory.items[..3].iter().map(|item| item.bytes).sum();
    let per_parameter = lasting / plan.parameter_count() as f64;
    assert!((16.0..16.01).contains(&per_parameter), "{per_parameter}");
}
