//! The block-by-block step against one graph over the whole model.

mod common;

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use ttt_data::{IGNORE, Row};
use ttt_kernels::ops::flat::joined;
use ttt_kernels::testing::{relative_error, relative_error_of};
use ttt_kernels::{ContextSettings, Packing};
use ttt_model::{
    Batch, Block, Embedding, Head, ModelConfig, ModelType, Params, Target, TttConfig, Unit,
};
use ttt_parallel::threads::on_mesh;
use ttt_parallel::{Layout, Mesh};
use ttt_train::config::Activations;
use ttt_train::step::{MicroBatch, Model};

use common::model::{model, model_in};

const LENGTH: usize = 24;

fn config(tied: bool, target: Target) -> ModelConfig {
    ModelConfig {
        model_type: ModelType::Qwen3,
        vocab_size: 31,
        hidden_size: 16,
        intermediate_size: 24,
        num_hidden_layers: 3,
        num_attention_heads: 2,
        num_key_value_heads: Some(1),
        head_dim: Some(8),
        rms_norm_eps: 1e-6,
        rope_theta: 1e4,
        rope_scaling: None,
        max_position_embeddings: 64,
        tie_word_embeddings: tied,
        sliding_window: Some(7),
        layer_types: None,
        initializer_range: 0.2,
        ttt: TttConfig {
            enabled: true,
            layers: Some(vec![0, 2]),
            chunk: 4,
            lr: 0.5,
            target,
            ..TttConfig::default()
        },
    }
}

/// Rows with a document start inside a chunk and some tokens without a label.
fn rows() -> Vec<Row> {
    let token = |i: usize| ((i * 7 + i * i * 3) % 31) as u32;
    (0..2)
        .map(|row| Row {
            input_ids: (0..LENGTH).map(|i| token(i + 50 * row)).collect(),
            labels: (0..LENGTH)
                .map(|i| match i % 9 {
                    8 => IGNORE,
                    _ => token(i + 1 + 50 * row),
                })
                .collect(),
            document_starts: vec![0, 9 + 2 * row as u32],
        })
        .collect()
}

fn alone(config: &ModelConfig) -> Model {
    model(config, ContextSettings::default(), &Mesh::single())
}

/// Loss and flat gradients per unit, from one graph.
fn whole_graph(model: &mut Model, rows: &[Row], scale: f64) -> (Tensor<1>, Vec<Tensor<1>>) {
    let config = model.config.clone();
    let device = model.device.clone();
    let units: Vec<Params> = Unit::all(&config)
        .into_iter()
        .map(|unit| {
            model
                .params(unit, &Mesh::single())
                .expect("one rank")
                .tracked()
        })
        .collect();
    let ids: Vec<i32> = rows
        .iter()
        .flat_map(|r| &r.input_ids)
        .map(|&id| id as i32)
        .collect();
    let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [rows.len(), LENGTH]), &device);
    let labels: Vec<Option<u32>> = rows
        .iter()
        .flat_map(|r| &r.labels)
        .map(|&l| (l != IGNORE).then_some(l))
        .collect();
    let labels = ttt_kernels::ops::cross_entropy::labels(&labels, &device);
    let starts = rows
        .iter()
        .map(|r| r.document_starts.iter().map(|&s| s as usize).collect());
    let packing = Packing::new(LENGTH, starts.collect()).expect("a layout");
    let batch = Batch::training(&config, packing, &device);

    let embedding = Embedding::new(&units[0]);
    let embeddings = embedding.forward(ids, DType::F32);
    let mut x = embeddings.clone();
    for layer in 0..config.num_hidden_layers {
        let block = Block::new(&config, layer, &units[layer + 1]);
        x = block.forward(x, embeddings.clone(), &batch).output;
    }
    let tied = config.tie_word_embeddings.then_some(embedding.weight);
    let head = Head::new(&config, &units[units.len() - 1], tied);
    let loss = head.loss(x, labels, scale);
    let mut gradients = loss.backward();
    let flat = units.iter().map(|unit| {
        let parts = unit.gradients(&mut gradients).into_iter();
        Tensor::cat(parts.map(|g| g.expect("a gradient")).collect(), 0)
    });
    (loss.inner(), flat.collect())
}

#[test]
fn block_by_block_equals_one_graph() {
    let device = Device::flex();
    let mesh = Mesh::single();
    for (tied, target) in [
        (false, Target::Embedding),
        (true, Target::Embedding),
        (true, Target::Hidden),
        (false, Target::NextToken),
    ] {
        let config = config(tied, target);
        let rows = rows();
        let scale = 0.03;
        let (loss, expected) = whole_graph(&mut alone(&config), &rows, scale);
        for activations in [Activations::Keep, Activations::Recompute] {
            let mut model = alone(&config);
            // Row by row: accumulated, the gradient is that of both.
            let mut sum = loss.zeros_like();
            for row in &rows {
                let micro =
                    MicroBatch::new(std::slice::from_ref(row), &mesh, &device).expect("a batch");
                let pass = model.accumulate(&micro, scale, activations, &mesh);
                sum = sum + pass.expect("one rank").loss;
            }
            assert!(relative_error(&sum, &loss) < 1e-6);
            for (unit, expected) in model.units.iter_mut().zip(&expected) {
                let got = joined(unit.take_gradient(&mesh).expect("one rank"));
                let error = relative_error(&got, expected);
                // f32 sums in another order; a lost or doubled term shows as 1e-2 and more.
                assert!(
                    error < 2e-5,
                    "{:?} {target:?} tied {tied}: {error:e}",
                    unit.unit
                );
            }
        }
    }
}

/// Three steps on a mesh of threads equal one rank's: weights, and what is told of every step. The
/// second has a gradient that is not finite, on one rank, and is passed over by all.
#[test]
fn sharded_and_replicated_ranks_train_like_one() {
    for (tied, target) in [(true, Target::Embedding), (false, Target::Hidden)] {
        let config = config(tied, target);
        let (told, single) = train_on(&config, Activations::Keep, &Mesh::single());
        assert_eq!(told.each_ref().map(|step| step[2]), [1.0, 0.0, 1.0]);
        for (replicate, shard) in [(1, 2), (2, 1), (2, 2), (1, 3), (1, 4), (3, 2), (2, 3)] {
            let layout = Layout {
                replicate,
                shard,
                context: 1,
                shard_over_context: false,
            };
            for activations in [Activations::Keep, Activations::Recompute] {
                let here = format!("{replicate}x{shard} {activations:?} tied {tied}");
                let ranks = on_mesh(layout, |mesh| train_on(&config, activations, &mesh));
                for (rank, (also_told, state)) in ranks.iter().enumerate() {
                    for (got, expected) in also_told.iter().zip(&told) {
                        // Sums over rows in another order: loss and norm.
                        for (got, expected) in got.iter().zip(expected) {
                            let same = (got - expected).abs() <= 1e-5 * expected.abs();
                            let same = same || (!got.is_finite() && !expected.is_finite());
                            assert!(same, "{here} rank {rank}: {got} instead of {expected}");
                        }
                    }
                    for (got, expected) in state.iter().zip(&single) {
                        let error = relative_error_of(got, expected);
                        // AdamW turns a gradient's last bits into at most a few parts in 1e5 of a
                        // weight.
                        assert!(error < 1e-5, "{here} rank {rank}: {error:e}");
                    }
                }
            }
        }
    }
}

/// An updater that clips hard, so that the global norm matters.
fn updater(overrides: Vec<ttt_train::config::LrOverride>) -> ttt_train::optimizer::Updater {
    use ttt_train::config::{OnBadGradient, OptimizerConfig, ScheduleKind};
    let hyper = OptimizerConfig {
        lr: 1e-2,
        min_lr_ratio: 1.0,
        warmup_steps: 0,
        schedule: ScheduleKind::Constant,
        decay_fraction: 0.2,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-4,
        weight_decay: 0.1,
        grad_clip: 0.1,
        overrides,
    };
    let device = Device::flex();
    ttt_train::optimizer::Updater::new(&hyper, OnBadGradient::Skip, None, 0.0, &device)
}

/// Loss, norm of the gradient, and whether it was used.
type Told = [f64; 3];

/// What is told of three steps over twelve rows shared out among the ranks, and the whole masters of all
/// units after them.
fn train_on(
    config: &ModelConfig,
    activations: Activations,
    mesh: &Mesh,
) -> ([Told; 3], Vec<Vec<f64>>) {
    use ttt_kernels::testing::values as elements;
    use ttt_train::optimizer::scalar;
    let device = Device::flex();
    let mut model = model(config, ContextSettings::default(), mesh);
    let mut updater = updater(vec![]);
    let all: Vec<Row> = (0..12)
        .map(|i| rows()[i % 2].clone())
        .map(shifted)
        .collect();
    let share = all.len() / mesh.data_size();
    let own = mesh.data_rank() * share..(mesh.data_rank() + 1) * share;
    let told = std::array::from_fn(|step| {
        let mut labelled = 0;
        let mut loss = scalar(0.0, &device);
        for number in own.clone() {
            let row = std::slice::from_ref(&all[number]);
            let micro = MicroBatch::new(row, mesh, &device).expect("a batch");
            // The last step's sums over replicas wait for the update.
            let micro = micro.last(step < 2 && number + 1 == own.end);
            let scale = match (step, number) {
                (1, 5) => f64::INFINITY,
                _ => 0.01,
            };
            let pass = model.accumulate(&micro, scale, activations, mesh);
            loss = loss + pass.expect("all ranks").loss;
            labelled += micro.labelled;
        }
        let count = mesh.all_reduce_sum(scalar(labelled as f64 * 0.01, &device));
        let normalizer = count.expect("all ranks").recip();
        let loss = mesh.all_reduce_sum(loss).expect("all ranks") * normalizer.clone();
        let update = updater
            .update(&mut model.units, normalizer, 1e-2, step as u64, mesh)
            .expect("all ranks");
        [loss, update.grad_norm, update.applied].map(|told| elements(&told)[0])
    });
    let whole = model.units.iter().map(|unit| {
        let shards = mesh.shard.all_gather(unit.master.to_f32());
        unit.layout.whole(&elements(&shards.expect("all ranks")))
    });
    (told, whole.collect())
}

/// The row with every label one token later, so that rows differ.
fn shifted(mut row: Row) -> Row {
    row.labels.rotate_left(1);
    row
}

/// A frozen parameter keeps every bit, its neighbours in the same buffer learn, and one with a
/// smaller rate moves less.
#[test]
fn learning_rates_by_name() {
    for compute in [DType::F32, DType::BF16] {
        learning_rates_in(compute);
    }
}

fn learning_rates_in(compute: DType) {
    use ttt_kernels::testing::values as elements;
    use ttt_train::config::LrOverride;
    let config = config(false, Target::Embedding);
    let moved = |overrides: Vec<LrOverride>| {
        let mesh = Mesh::single();
        let mut model = model_in(compute, &config, ContextSettings::default(), &mesh);
        let before = model.units[1].master.to_f32();
        let mut updater = updater(overrides);
        let micro = MicroBatch::new(&rows(), &mesh, &model.device).expect("a batch");
        model
            .accumulate(&micro, 0.01, Activations::Keep, &mesh)
            .expect("one rank");
        let one = ttt_train::optimizer::scalar(1.0, &model.device);
        updater
            .update(&mut model.units, one, 1e-2, 0, &mesh)
            .expect("one rank");
        let layout = &model.units[1].layout;
        let change = elements(&(model.units[1].master.to_f32() - before));
        let of = |name: &str| {
            let at = layout
                .specs
                .iter()
                .position(|spec| spec.name.ends_with(name));
            let part = &change[layout.range(at.expect("a parameter"))];
            part.iter().map(|v| v * v).sum::<f64>().sqrt()
        };
        [
            of("q_proj.weight"),
            of("up_proj.weight"),
            of("ttt_conv.weight"),
        ]
    };
    let scale = |pattern: &str, lr_scale| LrOverride {
        pattern: pattern.into(),
        lr_scale,
    };
    let plain = moved(vec![]);
    assert!(plain.iter().all(|&norm| norm > 0.0));
    let halved = moved(vec![scale("*", 0.5)]);
    for (half, whole) in halved.iter().zip(&plain) {
        // The change is a difference of f32 weights: good to 1e-7 of a weight, 1e-5 of a change.
        assert!((half / whole - 0.5).abs() < 1e-4, "{}", half / whole);
    }
    let frozen = moved(vec![scale("*", 0.5), scale("*.up_proj.*", 0.0)]);
    assert_eq!(frozen[1], 0.0);
    assert!(frozen[0] > 0.0 && frozen[2] > 0.0);
}
