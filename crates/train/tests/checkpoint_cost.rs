//! What saving a checkpoint costs: seconds, and host memory beside the state itself. Slow and
//! measured by hand:
//! `cargo test --release --workspace --test checkpoint_cost -- --ignored --nocapture`.
#![cfg(target_os = "linux")]

mod common;

use std::time::Instant;

use burn::tensor::{DType, Device};
use common::{layout, on_ranks};
use ttt_model::{Unit, params::all_params};
use ttt_train::checkpoint::{self, Checkpoint, Progress};
use ttt_train::config::Config;
use ttt_train::units::{FlatLayout, UnitState};

const MIB: f64 = (1u64 << 20) as f64;

/// Peak resident memory since the last call, in bytes.
fn peak_bytes() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1));
    std::fs::write("/proc/self/clear_refs", "5").expect("reset the peak");
    1024.0 * kib.expect("a peak").parse::<f64>().expect("a number")
}

#[test]
#[ignore = "writes gigabytes; a measurement"]
fn saving() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../../configs/quickstart.toml");
    // Quickstart, and the same with 24 times as many parameters.
    let large = [
        "model.hidden_size=1024",
        "model.intermediate_size=3072",
        "model.num_hidden_layers=6",
        "model.head_dim=256",
    ];
    for sets in [&[][..], &large[..]] {
        let sets: Vec<String> = sets.iter().map(ToString::to_string).collect();
        for shape in [[1, 1, 1], [1, 4, 1], [2, 2, 1]] {
            let dir = tempfile::tempdir().expect("a folder");
            let mut config = Config::load(file.as_ref(), &sets).expect("a configuration");
            config.run.dir = dir.path().to_path_buf();
            let parameters: usize = all_params(&config.model)
                .iter()
                .map(|spec| spec.len())
                .sum();
            let state = 12.0 * parameters as f64;
            on_ranks(layout(shape), |mesh| {
                let device = Device::flex();
                let unit = |unit| {
                    let layout = FlatLayout::new(&config.model, unit, mesh.shard.size());
                    let read = |_: &_, _, values: &mut [f32]| {
                        values.fill(0.5);
                        Ok::<_, std::convert::Infallible>(())
                    };
                    let master = layout.read_shard(mesh.shard.rank(), read);
                    UnitState::from_shard(
                        unit,
                        layout,
                        master.expect("infallible"),
                        &device,
                        DType::F32,
                    )
                };
                let units: Vec<_> = Unit::all(&config.model).into_iter().map(unit).collect();
                mesh.world.barrier().expect("all ranks");
                let first = mesh.world.rank() == 0;
                let mut before = 0.0;
                if first {
                    peak_bytes();
                    before = peak_bytes();
                }
                mesh.world.barrier().expect("all ranks");
                let mut times = vec![];
                for step in 0..3 {
                    let at = Progress {
                        step,
                        tokens: 0,
                        mean_grad_norm: 0.0,
                        data_fingerprint: String::new(),
                    };
                    let begun = Instant::now();
                    checkpoint::save(&config, &units, &at, &[], &mesh).expect("all ranks");
                    times.push(begun.elapsed().as_secs_f64());
                }
                if first {
                    let more = peak_bytes() - before;
                    println!(
                        "{shape:?}, {parameters} parameters, {:.0} MiB: saved in {times:.3?} s, {:.0} MiB more at the peak",
                        state / MIB,
                        more / MIB
                    );
                    // Slices of 16 MiB of each rank: as cut, as read, and as written.
                    assert!(more < 4.0 * 64.0 * MIB, "{more}");
                }
                drop(units);
                mesh.world.barrier().expect("all ranks");
                let begun = Instant::now();
                let found = Checkpoint::newest_together(&config.run.dir, &mesh, &device);
                let found = found.expect("all ranks").expect("a checkpoint");
                let verified = begun.elapsed().as_secs_f64();
                found
                    .load(&config.model, &mesh, &device, DType::F32)
                    .expect("all ranks");
                if first {
                    let loaded = begun.elapsed().as_secs_f64() - verified;
                    println!("    verified in {verified:.3} s, loaded in {loaded:.3} s");
                }
            });
        }
    }
}
