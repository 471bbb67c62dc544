//! Where the time of one step goes.

use anyhow::{Context, anyhow, bail};
use burn::tensor::Device;
use ttt_kernels::clock::{Clock, median};
use ttt_kernels::profile::record;
use ttt_parallel::Mesh;
use ttt_train::profile::{Limits, table};
use ttt_train::step::MicroBatch;

use super::run::Run;
use super::training::{Trainer, random_rows};
use crate::gpu::args::Mode;

/// Prints the operations of one training step of `run`, the longest first.
pub fn of_training(run: &Run, device: &Device) -> anyhow::Result<()> {
    let mut trainer = Trainer::new(run, 1, device)?;
    let rows = random_rows(run, trainer.config.model.vocab_size, 1);
    let micro = MicroBatch::new(&rows, &Mesh::single(), device)?;
    let loss = profile(run, Mode::Train, device, || trainer.step(&micro))?;
    let loss = ttt_train::device::read_scalar(&loss).context("the profiled step")?;
    anyhow::ensure!(loss.is_finite(), "the loss of the profiled step is {loss}");
    Ok(())
}

/// Prints the operations of one `pass` of `run`, and returns that pass's result.
pub fn profile<T>(
    run: &Run,
    mode: Mode,
    device: &Device,
    mut pass: impl FnMut() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    for _ in 0..run.warmup {
        pass()?;
    }
    // The undisturbed pass, to which everything is compared.
    let failed = |error: String| anyhow!("the device failed: {error}");
    let mut clock = Clock::new(device);
    clock.mark().map_err(failed)?;
    for _ in 0..run.steps {
        pass()?;
        clock.mark().map_err(failed)?;
    }
    let whole = median(&clock.read().map_err(failed)?);

    let Some(recorded) = record(device, pass) else {
        bail!("a profile needs a GPU: it is made of CUDA events");
    };
    let (done, profile) = recorded.map_err(failed)?;
    let done = done?;
    println!("{}: {whole:.3} ms per step", run.name(mode));
    print!(
        "{}",
        table(&profile.operations, whole, &Limits::of(run.device))
    );
    Ok(done)
}
