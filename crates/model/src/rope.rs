//! RoPE tables: frequencies, their scalings, and cos and sin by position.

use std::f64::consts::TAU;
use std::ops::Range;

use burn::tensor::{Device, Tensor, TensorData};

use crate::config::{ModelConfig, RopeScaling};

/// cos and sin of every position and frequency: `[N, E/2]` f32.
#[derive(Clone, Debug)]
pub struct RopeTable {
    /// cos(position · frequency), times YaRN's attention factor.
    pub cos: Tensor<2>,
    /// sin of the same.
    pub sin: Tensor<2>,
}

impl RopeTable {
    /// The tables for `positions`; angles are taken in f64, since in f32 they lose 1e-3 at 32k.
    pub fn new(config: &ModelConfig, positions: Range<usize>, device: &Device) -> Self {
        let (frequencies, factor) = frequencies(config);
        let shape = [positions.len(), frequencies.len()];
        let table = |of: fn(f64) -> f64| {
            let data: Vec<f32> = positions
                .clone()
                .flat_map(|p| frequencies.iter().map(move |f| p as f64 * f))
                .map(|angle| (of(angle) * factor) as f32)
                .collect();
            Tensor::from_data(TensorData::new(data, shape), device)
        };
        Self {
            cos: table(f64::cos),
            sin: table(f64::sin),
        }
    }
}

/// Radians per position of each channel pair, and the factor on cos and sin.
pub fn frequencies(config: &ModelConfig) -> (Vec<f64>, f64) {
    let size = config.head_size() as f64;
    let theta = config.rope_theta;
    let plain: Vec<f64> = (0..config.head_size() / 2)
        .map(|j| theta.powf(-2.0 * j as f64 / size))
        .collect();
    match &config.rope_scaling {
        None => (plain, 1.0),
        Some(RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        }) => {
            let context = *original_max_position_embeddings as f64;
            let scaled = plain.into_iter().map(|frequency| {
                let turns = context * frequency / TAU;
                let kept = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                let kept = kept.clamp(0.0, 1.0);
                frequency * (kept + (1.0 - kept) / factor)
            });
            (scaled.collect(), 1.0)
        }
        Some(RopeScaling::Yarn {
            factor,
            original_max_position_embeddings,
            beta_fast,
            beta_slow,
            attention_factor,
        }) => {
            // Channel pair that makes `turns` turns over the original context.
            let context = *original_max_position_embeddings as f64;
            let pair = |turns: f64| size * (context / (turns * TAU)).ln() / (2.0 * theta.ln());
            let low = pair(*beta_fast).floor().max(0.0);
            let mut high = pair(*beta_slow).ceil().min(size - 1.0);
            if low == high {
                high += 0.001; // the reference implementation's way round a division by zero
            }
            let scaled = plain.into_iter().enumerate().map(|(j, frequency)| {
                let stretched = ((j as f64 - low) / (high - low)).clamp(0.0, 1.0);
                frequency * (stretched / factor + 1.0 - stretched)
            });
            let attention = attention_factor.unwrap_or(0.1 * factor.ln() + 1.0);
            (scaled.collect(), attention)
        }
    }
}
