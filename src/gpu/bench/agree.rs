//! The course of a small model's loss with a device's forms of all operations, beside that of the plain
//! reference forms on the processor in f32 and that from another seed.
//!
//! Rounding makes two courses drift apart, as another seed does. What the device's forms change must be
//! less than what a seed changes, or they do not train the same model.

use anyhow::ensure;
use burn::tensor::Device;
use serde_json::json;
use ttt_data::Row;
use ttt_parallel::Mesh;
use ttt_train::config::DeviceKind;
use ttt_train::device;
use ttt_train::step::MicroBatch;

use super::run::{Run, round};
use super::training::Trainer;
use crate::gpu::args::{Attn, Preset};

const ROWS: usize = 8;
const TOKENS: usize = 512;
/// So small that a row has several, some of them cut by documents.
const CHUNK: usize = 64;
/// Tokens that may follow a token: the loss falls from ln V towards ln 4.
const FOLLOWERS: u64 = 4;

/// Trains the small model three times for `steps` steps and compares the courses.
///
/// # Errors
/// If the device's forms change more than a seed does.
pub fn agree(run: &Run, steps: u64, device: &Device) -> anyhow::Result<()> {
    let run = Run {
        preset: Preset::Tiny,
        attn: Attn::Swa,
        batch: ROWS,
        seq: TOKENS,
        ..run.clone()
    };
    let course = |forms: &str, seed: u64, kind: DeviceKind, device: &Device| {
        let losses = train(&run, seed, steps, kind, device)?;
        for (step, loss) in losses.iter().enumerate() {
            let line = json!({
                "run": "agree", "forms": forms, "seed": seed, "step": step, "loss": round(*loss, 5),
            });
            println!("{line}");
        }
        anyhow::Ok(losses)
    };
    let fast = course("device", 1, run.device, device)?;
    let other = course("device", 2, run.device, device)?;
    // Burn's own kernels on a GPU would be tuned for minutes first, and round to bf16 besides.
    let plain = course("reference", 1, DeviceKind::Cpu, &Device::flex())?;
    let (forms, seeds) = (Spread::of(&fast, &plain), Spread::of(&fast, &other));
    let line = json!({
        "run": "agree",
        "steps": steps,
        "loss_first": round(fast[0], 4),
        "loss_last": round(fast[fast.len() - 1], 4),
        "forms_largest": forms.largest,
        "forms_at_step": forms.at,
        "forms_mean": forms.mean,
        "seeds_largest": seeds.largest,
        "seeds_mean": seeds.mean,
    });
    println!("{line}");
    judge(&forms, &seeds)
}

fn train(
    run: &Run,
    seed: u64,
    steps: u64,
    kind: DeviceKind,
    device: &Device,
) -> anyhow::Result<Vec<f64>> {
    let mut config = run.config()?;
    config.model.ttt.chunk = CHUNK;
    config.model.ttt.every = Some(3);
    let vocab = config.model.vocab_size;
    let mut trainer = Trainer::with_config(config, kind, seed, device)?;
    trainer.lr = 1e-3;
    let mut losses = vec![];
    for step in 0..steps {
        let micro = MicroBatch::new(&rows(vocab, step), &Mesh::single(), device)?;
        losses.push(trainer.step(&micro)?);
    }
    let read = losses.iter().map(device::read_scalar);
    Ok(read.collect::<Result<_, _>>()?)
}

/// Text of a chain in which each token has a few followers, the same for every seed. Every other
/// step's rows hold two documents.
fn rows(vocab: usize, step: u64) -> Vec<Row> {
    let mix = |mut x: u64| {
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    };
    (0..ROWS as u64)
        .map(|row| {
            let mut token = mix(step * ROWS as u64 + row + 1) % vocab as u64;
            let ids: Vec<u32> = (0..=TOKENS as u64)
                .map(|i| {
                    let now = token;
                    let choice = mix(mix(step + 1) ^ (row << 32) ^ i) % FOLLOWERS;
                    token = mix(token * FOLLOWERS + choice + 1_000_003) % vocab as u64;
                    now as u32
                })
                .collect();
            Row {
                input_ids: ids[..TOKENS].to_vec(),
                labels: ids[1..].to_vec(),
                document_starts: match step % 2 {
                    0 => vec![0],
                    _ => vec![0, 100 + 17 * row as u32],
                },
            }
        })
        .collect()
}

/// How far two courses are apart.
#[derive(Debug)]
struct Spread {
    largest: f64,
    at: usize,
    mean: f64,
}

impl Spread {
    fn of(a: &[f64], b: &[f64]) -> Self {
        let apart = a.iter().zip(b).map(|(a, b)| (a - b).abs());
        let apart: Vec<f64> = apart.collect();
        let largest = apart.iter().copied().enumerate();
        // NaN is the largest of all.
        let largest = largest.max_by(|(_, a), (_, b)| a.total_cmp(b));
        let (at, largest) = largest.unwrap_or((0, 0.0));
        Self {
            largest,
            at,
            mean: apart.iter().sum::<f64>() / apart.len().max(1) as f64,
        }
    }
}

fn judge(forms: &Spread, seeds: &Spread) -> anyhow::Result<()> {
    ensure!(
        forms.largest <= seeds.largest && forms.mean <= seeds.mean,
        "the courses of the two forms differ by up to {:.2e} (mean {:.2e}), those of two seeds by \
         {:.2e} (mean {:.2e}): the operations of this device do not train the same model",
        forms.largest,
        forms.mean,
        seeds.largest,
        seeds.mean,
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn courses_must_differ_less_than_seeds_do() {
        let a = [6.0, 5.0, 4.0];
        let near = Spread::of(&a, &[6.0, 5.01, 4.0]);
        assert_eq!((near.at, near.largest > 0.009), (1, true));
        let seeds = Spread::of(&a, &[6.1, 5.1, 3.9]);
        assert!(judge(&near, &seeds).is_ok());
        assert!(judge(&seeds, &near).is_err());
        let broken = Spread::of(&a, &[6.0, f64::NAN, 4.0]);
        assert!(judge(&broken, &seeds).is_err(), "{broken:?}");
    }

    #[test]
    fn text_is_the_same_each_time_and_learnable() {
        let (one, again) = (rows(512, 3), rows(512, 3));
        assert_eq!(one[0].input_ids, again[0].input_ids);
        assert_ne!(one[0].input_ids, one[1].input_ids);
        let mut followers = std::collections::HashMap::new();
        for row in (0..40).flat_map(|step| rows(512, step)) {
            for (a, b) in row.input_ids.iter().zip(&row.labels) {
                let seen: &mut std::collections::HashSet<u32> = followers.entry(*a).or_default();
                seen.insert(*b);
            }
        }
        assert!(followers.len() > 100, "{} tokens occur", followers.len());
        assert!(followers.values().all(|f| f.len() <= FOLLOWERS as usize));
    }
}
