//! `ttt bench`: what the PyTorch baseline measures, under the same names.

mod agree;
mod prefill;
mod profile;
mod run;
mod soak;
mod training;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use anyhow::bail;
use burn::tensor::Device;
use serde_json::{Value, json};
use ttt_kernels::bench::{self, Row};
use ttt_kernels::work::Work;
use ttt_kernels::{deterministic, doctor, memory};
use ttt_train::config::DeviceKind;
use ttt_train::device;

use super::args::{Attn, BenchArgs, Mode, Preset, TttArg};
use run::{Run, gib, join, round};

pub fn bench(args: &BenchArgs) -> anyhow::Result<()> {
    let kind = DeviceKind::from(args.device);
    let device = device::open(kind, 0)?;
    deterministic::set(args.deterministic);
    // One model in place of a table; `length` if none is asked for.
    let one = |length| Run {
        preset: args.preset.unwrap_or(Preset::M500),
        seq: args.seq.first().map_or(length, |&n| n as usize),
        ttt: args.ttt != Some(TttArg::Off),
        ..defaults(args)
    };
    if args.profile {
        return match args.mode {
            Mode::Micro => {
                bail!(
                    "--profile is of a training step or, with --mode prefill, of a forward pass, not of single \
                     operations: leave --mode micro or --profile out"
                )
            }
            Mode::Prefill => prefill::profile(&one(8192), &device),
            Mode::Train => profile::of_training(&one(32_768), &device),
        };
    }
    if let Some(steps) = args.soak {
        return soak::soak(&one(4096), steps, &device);
    }
    if let Some(steps) = args.agree {
        return agree::agree(&one(4096), steps, &device);
    }
    let fine = match (args.mode, args.preset) {
        (Mode::Micro, _) => micro(args, &device),
        (Mode::Train, None) => suite(args, &device),
        (mode, preset) => single(args, mode, preset, &device),
    };
    match fine {
        true => Ok(()),
        false => bail!("not every run could be measured: see the lines that have an \"error\""),
    }
}

/// Single operations, one line each. Returns whether all could be measured.
fn micro(args: &BenchArgs, device: &Device) -> bool {
    let mut fine = true;
    let wanted = |name: &str| is_wanted(args, &format!("micro/{name}"));
    bench::micro(device, wanted, |(name, measured)| {
        let mut line = json!({ "run": format!("micro/{name}") });
        match measured {
            Ok(row) => join(&mut line, micro_keys(&row)),
            Err(error) => {
                fine = false;
                join(&mut line, json!({ "error": error }));
            }
        }
        println!("{line}");
    });
    device.memory_cleanup();
    fine
}

fn micro_keys(row: &Row) -> Value {
    let unit = match row.work {
        Work::Flops(_) => "tflops",
        Work::Bytes(_) => "gb_s",
    };
    let mut keys = json!({});
    let timed = [
        ("fwd", row.forward_ms, row.work),
        ("fwd_bwd", row.both_ms, row.both_work()),
    ];
    for (pass, ms, work) in timed {
        if let Some(ms) = ms {
            let rate = round(work.rate(ms).0, 1);
            let measured =
                json!({ format!("{pass}_ms"): round(ms, 3), format!("{pass}_{unit}"): rate });
            join(&mut keys, measured);
        }
    }
    keys
}

/// The fixed table. Returns whether every run that was begun could be measured.
fn suite(args: &BenchArgs, device: &Device) -> bool {
    let begun = Instant::now();
    let mut fine = args.no_micro || micro(args, device);
    use {Attn::*, Preset::*, TttArg::*};
    // Preset, attention, rows to try (the next number after one that the memory is too small for),
    // tokens, TTT.
    let table: [(Preset, Attn, &[usize], usize, TttArg); 4] = [
        (M500, Swa, &[8], 4096, Both),
        (M500, Swa, &[1], 32_768, Both),
        (M500, Full, &[4], 8192, On),
        (B1_5, Swa, &[3, 2, 1], 8192, Both),
    ];
    for (preset, attn, batches, seq, ttts) in table {
        for &ttt in ttts.all() {
            for &batch in batches {
                let run = Run {
                    preset,
                    attn,
                    batch,
                    seq,
                    ttt,
                    steps: args.steps.unwrap_or(8),
                    ..defaults(args)
                };
                let name = run.name(Mode::Train);
                if !is_wanted(args, &name) {
                    break;
                }
                if begun.elapsed().as_secs_f64() > args.budget {
                    println!(
                        "{}",
                        json!({ "run": "skipped: over --budget", "skipped": name })
                    );
                    break;
                }
                let line = guarded(&run, Mode::Train, device);
                fine &= line.get("error").is_none();
                if line.get("error") != Some(&"OOM".into()) {
                    break;
                }
            }
        }
    }
    fine
}

/// The runs that the options describe. Returns whether all could be measured.
fn single(args: &BenchArgs, mode: Mode, preset: Option<Preset>, device: &Device) -> bool {
    let prefill = mode == Mode::Prefill;
    let lengths: Vec<usize> = match (args.seq.as_slice(), prefill) {
        ([], true) => vec![8192, 32_768, 131_072],
        ([], false) => vec![4096],
        (given, _) => given.iter().map(|&n| n as usize).collect(),
    };
    let both = if prefill { TttArg::Both } else { TttArg::On };
    let mut fine = true;
    for seq in lengths {
        for &ttt in args.ttt.unwrap_or(both).all() {
            let run = Run {
                preset: preset.unwrap_or(Preset::B4),
                seq,
                ttt,
                ..defaults(args)
            };
            let line = guarded(&run, mode, device);
            fine &= line.get("error").is_none();
        }
    }
    fine
}

fn is_wanted(args: &BenchArgs, name: &str) -> bool {
    args.only.iter().all(|part| name.contains(part.as_str()))
}

fn defaults(args: &BenchArgs) -> Run {
    Run {
        preset: Preset::Tiny,
        attn: args.attn,
        batch: args.batch.unwrap_or(1) as usize,
        seq: 4096,
        ttt: true,
        steps: args.steps.unwrap_or(10),
        warmup: args.warmup,
        recompute: args.recompute,
        device: args.device.into(),
    }
}

/// Measures `run` and prints its line; a failure becomes one too.
fn guarded(run: &Run, mode: Mode, device: &Device) -> Value {
    let begun = Instant::now();
    let measured = catch_unwind(AssertUnwindSafe(|| match mode {
        Mode::Prefill => prefill::measure(run, device),
        _ => training::measure(run, device),
    }));
    let mut line = match measured {
        Ok(Ok(line)) => line,
        Ok(Err(error)) => failure(run, mode, &format!("{error:#}")),
        // Burn panics where an allocation of its own fails.
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or(panic.downcast_ref::<&str>().copied());
            failure(run, mode, text.unwrap_or("a panic without a message"))
        }
    };
    let driver = memory::driver_in_use(0);
    let pools = memory::usage(device).map(|usage| usage.pools);
    let about = json!({
        // Whoever else uses the GPU is part of the driver's figure.
        "driver_mem_gib": driver.map(gib),
        "pools_mem_gib": pools.map(gib),
        "deterministic": deterministic::is_on(),
        "gpu": doctor::gpu_name(),
        "ttt_version": env!("CARGO_PKG_VERSION"),
        "wall_s": round(begun.elapsed().as_secs_f64(), 1),
    });
    join(&mut line, about);
    println!("{line}");
    device.memory_cleanup();
    line
}

fn failure(run: &Run, mode: Mode, detail: &str) -> Value {
    // The driver's words, and CubeCL's.
    let words = [
        "out of memory",
        "out_of_memory",
        "out of device memory",
        "can't allocate buffer",
    ];
    let lower = detail.to_lowercase();
    let error = match words.iter().any(|part| lower.contains(part)) {
        true => "OOM",
        false => "failed",
    };
    // What follows is a backtrace.
    let detail: String = detail.chars().take(400).collect();
    json!({ "run": run.name(mode), "error": error, "detail": detail })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_little_memory_is_told_from_other_failures() {
        let run = Run {
            preset: Preset::Tiny,
            attn: Attn::Swa,
            batch: 1,
            seq: 8,
            ttt: true,
            steps: 1,
            warmup: 1,
            recompute: false,
            device: DeviceKind::Cpu,
        };
        for (detail, error) in [
            (
                "DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")",
                "OOM",
            ),
            ("out of device memory allocating 8 bytes", "OOM"),
            ("the loss of step 3 is NaN", "failed"),
        ] {
            assert_eq!(failure(&run, Mode::Train, detail)["error"], error);
        }
    }
}
