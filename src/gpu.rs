//! `ttt doctor` and `ttt bench`.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, bail};
use burn::tensor::Device;
use serde_json::json;
use ttt_data::Row;
use ttt_kernels::{bench, doctor};
use ttt_model::Unit;
use ttt_model::flops::ForwardFlops;
use ttt_parallel::Mesh;
use ttt_train::config::{Activations, Config, DeviceKind};
use ttt_train::device;
use ttt_train::metrics::peak_flops;
use ttt_train::optimizer::{Updater, scalar};
use ttt_train::step::{MicroBatch, Model, RopeCache};
use ttt_train::units::UnitState;

use crate::args::BenchArgs;

/// Steps before the clock starts, and steps on it.
const WARMUP: u64 = 3;

pub fn doctor() -> anyhow::Result<()> {
    let mut fine = true;
    for finding in doctor::system() {
        println!("{:<14} {}", finding.what, finding.answer);
        fine &= finding.fine;
    }
    if !fine {
        bail!("something that training on a GPU needs is missing");
    }
    let device = device::open(DeviceKind::Cuda)?;
    if !doctor::check(&device, |comparison| println!("{comparison}")) {
        bail!("an operation on this GPU disagrees with its reference: do not train with it");
    }
    Ok(())
}

/// One line of the table: what the PyTorch baseline runs.
struct Run {
    preset: &'static str,
    config: &'static str,
    full_attention: bool,
    rows: usize,
    length: usize,
    ttt: bool,
}

const CONFIG_500M: &str = include_str!("../configs/500m.toml");
const CONFIG_1_5B: &str = include_str!("../configs/1.5b.toml");

fn runs() -> Vec<Run> {
    let run = |preset, full_attention, rows, length, ttt| Run {
        preset,
        config: if preset == "500m" {
            CONFIG_500M
        } else {
            CONFIG_1_5B
        },
        full_attention,
        rows,
        length,
        ttt,
    };
    vec![
        run("500m", false, 8, 4096, true),
        run("500m", false, 8, 4096, false),
        run("500m", false, 1, 32_768, true),
        run("500m", false, 1, 32_768, false),
        run("500m", true, 4, 8192, true),
        run("1.5b", false, 3, 8192, true),
        run("1.5b", false, 3, 8192, false),
    ]
}

pub fn bench(args: &BenchArgs) -> anyhow::Result<()> {
    let device = device::open(DeviceKind::Cuda)?;
    if !args.no_micro {
        bench::micro(&device, |row| {
            let (rate, unit) = row.rate();
            let rate = (rate * 10.0).round() / 10.0;
            println!(
                "{}",
                json!({ "run": format!("micro/{}", row.name), "ms": row.ms, "rate": rate, "unit": unit, "finite": row.finite })
            );
        });
    }
    for run in runs() {
        let name = run.name();
        if !args.only.iter().all(|part| name.contains(part.as_str())) {
            continue;
        }
        match run.measure(&device, args.steps, args.recompute) {
            Ok(line) => println!("{line}"),
            Err(error) => println!("{}", json!({ "run": name, "error": format!("{error:#}") })),
        }
        device.memory_cleanup();
    }
    Ok(())
}

impl Run {
    fn name(&self) -> String {
        let attention = if self.full_attention { "full" } else { "swa" };
        let ttt = if self.ttt { "on" } else { "off" };
        let Self {
            preset,
            rows,
            length,
            ..
        } = self;
        format!("train/{preset}/{attention}/b{rows}x{length}/ttt-{ttt}")
    }

    fn measure(
        &self,
        device: &Device,
        steps: u64,
        recompute: bool,
    ) -> anyhow::Result<serde_json::Value> {
        let mut config = Config::parse(self.config, Path::new(self.preset), &[])?;
        config.model.ttt.enabled = self.ttt;
        if self.full_attention {
            config.model.sliding_window = None;
        }
        let activations = match recompute {
            true => Activations::Recompute,
            false => Activations::Keep,
        };
        let mesh = Mesh::single();
        let mut model = Model {
            config: config.model.clone(),
            units: units(&config, &mesh, device)?,
            compute: device::compute_dtype(DeviceKind::Cuda, None),
            device: device.clone(),
            rope: RopeCache::default(),
        };
        let on_bad = config.train.on_bad_gradient;
        let mut updater = Updater::new(&config.optimizer, on_bad, None, model.compute, 0.0, device);

        // One fixed batch of random tokens: the loss must start near ln V and fall.
        let mut state = 1u64;
        let rows: Vec<Row> = (0..self.rows)
            .map(|_| self.row(config.model.vocab_size, &mut state))
            .collect();
        let micro = MicroBatch::new(&rows, device)?;
        let tokens = self.rows * self.length;
        let mut losses = vec![];
        let begun = Instant::now();
        let mut first_step = 0.0;
        let mut clock = Instant::now();
        for step in 0..WARMUP + steps {
            if step == WARMUP {
                device.sync().context("the device failed during warm-up")?;
                clock = Instant::now();
            }
            let pass = model.accumulate(&micro, 1.0 / tokens as f64, activations, &mesh)?;
            updater.update(&mut model.units, scalar(1.0, device), 3e-4, step, &mesh)?;
            losses.push(pass.loss);
            if step == 0 {
                device::read_scalar(&losses[0])?;
                first_step = begun.elapsed().as_secs_f64();
            }
        }
        device.sync().context("the device failed")?;
        let ms = clock.elapsed().as_secs_f64() * 1e3 / steps as f64;

        let losses = losses
            .iter()
            .map(device::read_scalar)
            .collect::<Result<Vec<_>, _>>()?;
        let flops = ForwardFlops::per_token(&config.model, self.length);
        let tokens_per_s = tokens as f64 / ms * 1e3;
        let mfu = |flops: f64| {
            peak_flops(DeviceKind::Cuda)
                .map(|peak| (tokens_per_s * flops / peak * 1e4).round() / 1e4)
        };
        let round = |x: f64| (x * 1e3).round() / 1e3;
        Ok(json!({
            "run": self.name(),
            "tokens_per_s": tokens_per_s.round(),
            "ms_per_step": round(ms),
            "mfu": mfu(flops.training()),
            "mfu_with_ttt": mfu(if self.ttt { flops.training_with_ttt() } else { flops.training() }),
            "peak_mem_gib": doctor::memory_in_use().map(|bytes| round(bytes as f64 / (1u64 << 30) as f64)),
            "loss_first": round(losses[0]),
            "loss_last": round(losses[losses.len() - 1]),
            "first_step_s": round(first_step),
        }))
    }

    fn row(&self, vocab: usize, state: &mut u64) -> Row {
        let mut draw = || {
            *state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            ((*state >> 33) % vocab as u64) as u32
        };
        let ids: Vec<u32> = (0..=self.length).map(|_| draw()).collect();
        Row {
            input_ids: ids[..self.length].to_vec(),
            labels: ids[1..].to_vec(),
            document_starts: vec![0],
        }
    }
}

/// Units with the initial values of a new run.
fn units(config: &Config, mesh: &Mesh, device: &Device) -> anyhow::Result<Vec<UnitState>> {
    let units = Unit::all(&config.model).into_iter().map(|unit| {
        UnitState::new(&config.model, unit, mesh, device, |spec| {
            anyhow::Ok(ttt_train::init::initial_values(spec, 1))
        })
    });
    units.collect()
}
