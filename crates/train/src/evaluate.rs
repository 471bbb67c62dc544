//! Validation loss, overall and by position in the row.

use ttt_data::Dataset;
use ttt_parallel::Mesh;

use std::sync::Arc;

use crate::context;
use crate::device::read;
use crate::error::TrainError;
use crate::step::{MicroBatch, Model};

/// Losses over validation rows, nats per token.
#[derive(Clone, Debug)]
pub struct Evaluation {
    /// Mean over all labelled tokens.
    pub loss: f64,
    /// Labelled tokens.
    pub tokens: u64,
    /// Mean by position: ranges that double, `[0, first)`, `[first, 2 first)`, ...
    pub by_position: Vec<PositionLoss>,
}

/// The mean loss of the tokens at some positions.
#[derive(Clone, Debug)]
pub struct PositionLoss {
    /// First position.
    pub from: usize,
    /// Position after the last.
    pub to: usize,
    /// Nats per token; NaN if none is labelled.
    pub loss: f64,
    /// Labelled tokens.
    pub tokens: u64,
}

/// Where the first bucket of positions ends.
const FIRST_BUCKET: usize = 512;

/// Evaluates the first `rows` validation rows (all, if there are fewer) of `length` tokens.
///
/// Rows are read in stored order, so that two runs see the same; ranks that read different rows share
/// them.
///
/// # Errors
/// If the split holds no row, a row cannot be read, or the device fails.
pub fn evaluate(
    model: &mut Model,
    dataset: &Arc<Dataset>,
    length: usize,
    rows: usize,
    rows_at_once: usize,
    mesh: &Mesh,
) -> Result<Evaluation, TrainError> {
    let all = dataset.sequential(length)?;
    let rows = (rows as u64).min(all.len());
    let part = context::part(length, mesh)?;
    let mut sums = vec![(0.0, 0u64); length];
    let (rank, at_once) = (mesh.data_rank() as u64, rows_at_once as u64);
    let mut done = 0;
    while done < rows {
        let begin = rows.min(done + rank * at_once);
        let own = begin..rows.min(begin + at_once);
        done += mesh.data_size() as u64 * at_once;
        // A rank that has none left goes through the model all the same: others wait for its part of
        // the parameters. Nothing of that row counts.
        let counts = !own.is_empty();
        let read_now = if counts { own } else { 0..1 };
        let files = mesh.activity.long("reading rows to evaluate");
        let batch = read_now.map(|i| all.row(i));
        let batch = batch.collect::<Result<Vec<_>, _>>()?;
        drop(files);
        let micro = MicroBatch::new(&batch, mesh, &model.device)?;
        let losses = read(&model.token_losses(&micro, mesh)?)?;
        if !counts {
            continue;
        }
        for (row, losses) in batch.iter().zip(losses.chunks(part.len())) {
            let here = sums[part.clone()].iter_mut().zip(&row.labels[part.clone()]);
            for ((sum, label), loss) in here.zip(losses) {
                if *label != ttt_data::IGNORE {
                    *sum = (sum.0 + loss, sum.1 + 1);
                }
            }
        }
    }
    // What other ranks have read is zero here: rows, and the positions of the context group's others.
    let (losses, counts): (Vec<f64>, Vec<f64>) = sums
        .into_iter()
        .map(|(sum, count)| (sum, count as f64))
        .unzip();
    let losses = context::sum(&losses, mesh, &model.device)?;
    let counts = context::sum(&counts, mesh, &model.device)?;
    let counts = counts.into_iter().map(|count| count as u64);
    let sums: Vec<(f64, u64)> = losses.into_iter().zip(counts).collect();
    let total = |range: &[(f64, u64)]| {
        range
            .iter()
            .fold((0.0, 0), |(a, n), (loss, count)| (a + loss, n + count))
    };
    let (sum, tokens) = total(&sums);
    let mut by_position = vec![];
    let (mut from, mut to) = (0, FIRST_BUCKET.min(length));
    while from < length {
        let (sum, tokens) = total(&sums[from..to]);
        by_position.push(PositionLoss {
            from,
            to,
            loss: sum / tokens as f64,
            tokens,
        });
        (from, to) = (to, (2 * to).min(length));
    }
    Ok(Evaluation {
        loss: sum / tokens as f64,
        tokens,
        by_position,
    })
}
