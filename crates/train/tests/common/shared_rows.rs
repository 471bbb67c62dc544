//! A model with every kind of layer, and rows whose documents cross the edges of ranks in every way.

use burn::tensor::Device;
use ttt_data::{IGNORE, Row};
use ttt_model::{LayerType, ModelConfig, ModelType, Target, TttConfig};
use ttt_parallel::Mesh;
use ttt_train::step::MicroBatch;

/// Tokens of a row: eight ranks have two chunks of four each.
pub const LENGTH: usize = 64;
pub const VOCAB: usize = 31;

/// Three layers, 0 and 2 of which learn; a window of 11 tokens in the first two, all tokens in the last.
pub fn config(target: Target) -> ModelConfig {
    ModelConfig {
        model_type: ModelType::Qwen3,
        vocab_size: VOCAB,
        hidden_size: 16,
        intermediate_size: 24,
        num_hidden_layers: 3,
        num_attention_heads: 8,
        num_key_value_heads: Some(4),
        head_dim: Some(4),
        rms_norm_eps: 1e-6,
        rope_theta: 1e4,
        rope_scaling: None,
        max_position_embeddings: LENGTH,
        tie_word_embeddings: true,
        sliding_window: Some(11),
        layer_types: Some(vec![
            LayerType::SlidingAttention,
            LayerType::SlidingAttention,
            LayerType::FullAttention,
        ]),
        initializer_range: 0.2,
        ttt: TttConfig {
            enabled: true,
            layers: Some(vec![0, 2]),
            chunk: 4,
            lr: 0.2,
            target,
            ..TttConfig::default()
        },
    }
}

/// Eight rows: one document; starts inside a rank and a chunk, and at the edges of 2, 4 and 8 ranks;
/// documents over more than two ranks; padding without labels at the end.
pub fn rows() -> Vec<Row> {
    let starts: [&[u32]; 8] = [
        &[0],
        &[0, 21, 32, 35],
        &[0, 8, 51],
        &[0, 63],
        &[0, 16, 48],
        &[0, 1, 2, 3, 30],
        &[0, 40],
        &[0, 24, 25, 56],
    ];
    let row = |(n, starts): (usize, &&[u32])| {
        let token = |i: usize| ((i * 7 + i * i * 3 + n * 11) % VOCAB) as u32;
        let padded = [2, 6].contains(&n);
        let text = if padded {
            *starts.last().unwrap() as usize
        } else {
            LENGTH
        };
        Row {
            input_ids: (0..LENGTH).map(token).collect(),
            labels: (0..LENGTH)
                .map(|i| match i >= text || i % 9 == 8 {
                    true => IGNORE,
                    false => token(i + 1),
                })
                .collect(),
            document_starts: starts.to_vec(),
        }
    };
    starts.iter().enumerate().map(row).collect()
}

/// This rank's rows, two at a time.
pub fn micro_batches(mesh: &Mesh, rows: &[Row]) -> Vec<MicroBatch> {
    let share = rows.len() / mesh.data_size();
    let own = &rows[mesh.data_rank() * share..][..share];
    let batches = own.chunks(2.min(share));
    let count = batches.len();
    let micro = |(n, rows): (usize, &[Row])| {
        let micro = MicroBatch::new(rows, mesh, &Device::flex()).expect("a batch");
        micro.last(n + 1 == count)
    };
    batches.enumerate().map(micro).collect()
}
