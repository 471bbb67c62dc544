//! Training on ranks that share rows against training on one: losses, every parameter's gradient on every
//! rank, weights after five steps, evaluation.

use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor};
use common::joint;
use common::model::{model, model_in};
use common::shared_rows::{LENGTH, config, micro_batches, rows};
use ttt_data::{Dataset, Split};
use ttt_kernels::context::{AttentionExchange, Payload, StateExchange};
use ttt_kernels::dtype::cast;
use ttt_kernels::ops::flat::joined;
use ttt_kernels::testing::{relative_error_of, values};
use ttt_kernels::{ContextSettings, Packing};
use ttt_model::rope::RopeTable;
use ttt_model::{Batch, Block, ModelConfig, Target, Unit};
use ttt_parallel::threads::{on_mesh, on_threads};
use ttt_parallel::{Layout, Mesh};
use ttt_train::config::{Activations, OnBadGradient, OptimizerConfig, ScheduleKind};
use ttt_train::evaluate::evaluate;
use ttt_train::optimizer::{Updater, scalar};
use ttt_train::step::MicroBatch;

mod common;
#[path = "../../data/tests/common/mod.rs"]
mod text;

#[derive(Debug, Clone, Copy)]
struct Case {
    target: Target,
    activations: Activations,
    settings: ContextSettings,
    compute: DType,
    /// Of the layers that have one.
    window: usize,
}

/// The summed loss, the count of labels, the largest state ratio of each TTT layer, and the gradient of
/// each parameter by name.
struct Pass {
    loss: f64,
    labelled: f64,
    ratios: Vec<(usize, f64)>,
    gradients: Vec<(String, Vec<f64>)>,
}

fn pass(case: Case, mesh: &Mesh) -> Pass {
    let config = ModelConfig {
        sliding_window: Some(case.window),
        ..config(case.target)
    };
    let mut model = model_in(case.compute, &config, case.settings, mesh);
    let (mut loss, mut labelled) = (scalar(0.0, &model.device), 0);
    let mut ratios: Vec<(usize, f64)> = vec![];
    for micro in micro_batches(mesh, &rows()) {
        let pass = model
            .accumulate(&micro, 0.01, case.activations, mesh)
            .expect("all ranks");
        loss = loss + cast(pass.loss, DType::F32);
        labelled += micro.labelled;
        for (layer, ratio) in pass.state_ratios {
            let ratio = values(&ratio)[0];
            match ratios.iter_mut().find(|(of, _)| *of == layer) {
                Some((_, seen)) => *seen = seen.max(ratio),
                None => ratios.push((layer, ratio)),
            }
        }
    }
    let sum = |t: Tensor<1>| values(&mesh.all_reduce_sum(t).expect("all ranks"))[0];
    let mut gradients = vec![];
    for unit in &mut model.units {
        let shard = joined(unit.take_gradient(mesh).expect("all ranks"));
        let flat = values(&mesh.shard.all_gather(shard).expect("all ranks"));
        let flat = unit.layout.whole(&flat);
        for (i, spec) in unit.layout.specs.iter().enumerate() {
            gradients.push((spec.name.clone(), flat[unit.layout.range(i)].to_vec()));
        }
    }
    Pass {
        loss: sum(loss),
        labelled: sum(scalar(labelled as f64, &model.device)),
        ratios,
        gradients,
    }
}

fn layout(replicate: usize, shard: usize, context: usize) -> Layout {
    Layout {
        replicate,
        shard,
        context,
        shard_over_context: false,
    }
}

/// Sums in another order: a gradient's last bits, more of them where large terms cancel. A lost or doubled
/// term shows as 1e-2 and more.
const LIMIT: f64 = 1e-5;

/// Where only the gradients are f32, not what they are computed from: the rounding of one sum.
const LIMIT_OF_F64: f64 = 5e-7;

fn assert_equals_one_rank(case: Case, layouts: &[Layout]) {
    let limit = match case.compute {
        DType::F64 => LIMIT_OF_F64,
        _ => LIMIT,
    };
    let expected = pass(case, &Mesh::single());
    assert!(expected.ratios.iter().all(|(_, ratio)| *ratio > 0.01));
    for &layout in layouts {
        let passes = on_mesh(layout, |mesh| (mesh.data_size(), pass(case, &mesh)));
        // Ranks that read different rows see different states; the largest is the largest of all.
        let mut largest = vec![0f64; expected.ratios.len()];
        let mut worst = 0f64;
        for (rank, (_, got)) in passes.iter().enumerate() {
            let here = format!("{layout:?}, rank {rank}, {case:?}");
            assert_eq!(got.labelled, expected.labelled, "{here}");
            let loss = (got.loss / expected.loss - 1.0).abs();
            assert!(loss < 1e-6, "{here}: loss {loss:e}");
            for ((name, got), (_, expected)) in got.gradients.iter().zip(&expected.gradients) {
                let error = relative_error_of(got, expected);
                assert!(error < limit, "{here}: {name}: {error:e}");
                worst = worst.max(error);
            }
            for (largest, (_, ratio)) in largest.iter_mut().zip(&got.ratios) {
                *largest = largest.max(*ratio);
            }
            if layout.replicate * layout.shard == 1 {
                let own: Vec<f64> = got.ratios.iter().map(|(_, ratio)| *ratio).collect();
                assert_eq!(own, largest, "{here}: every rank knows the largest");
            }
        }
        println!("{layout:?}: worst gradient {worst:.1e}, limit {limit:.0e}");
        let ratios: Vec<f64> = expected.ratios.iter().map(|(_, ratio)| *ratio).collect();
        assert!(relative_error_of(&largest, &ratios) < LIMIT);
    }
}

fn case(target: Target, activations: Activations) -> Case {
    Case {
        target,
        activations,
        settings: ContextSettings::default(),
        compute: DType::F32,
        window: 11,
    }
}

#[test]
fn context_ranks_compute_what_one_computes() {
    let layouts = [layout(1, 1, 2), layout(1, 1, 4), layout(1, 1, 8)];
    for target in [Target::Embedding, Target::Hidden, Target::NextToken] {
        for activations in [Activations::Keep, Activations::Recompute] {
            assert_equals_one_rank(case(target, activations), &layouts);
        }
        let in_f64 = Case {
            compute: DType::F64,
            ..case(target, Activations::Keep)
        };
        assert_equals_one_rank(in_f64, &layouts);
    }
}

/// Windows that leave every rank queries that see none but its own keys; those of the others see the part
/// before as a square, or not where a document begins there.
#[test]
fn windows_within_half_a_part_compute_what_one_computes() {
    let layouts = [
        layout(1, 1, 2),
        layout(1, 1, 4),
        layout(1, 1, 8),
        layout(2, 1, 4),
    ];
    for window in [2, 5] {
        for compute in [DType::F32, DType::F64] {
            let case = Case {
                window,
                compute,
                ..case(Target::Embedding, Activations::Recompute)
            };
            assert_equals_one_rank(case, &layouts);
        }
    }
}

#[test]
fn every_exchange_computes_the_same() {
    for (states, attention) in [
        (StateExchange::Chain, AttentionExchange::Keys),
        (StateExchange::AllGather, AttentionExchange::Heads),
    ] {
        let case = Case {
            settings: ContextSettings {
                states,
                attention,
                ..ContextSettings::default()
            },
            ..case(Target::Embedding, Activations::Keep)
        };
        assert_equals_one_rank(case, &[layout(1, 1, 2), layout(1, 1, 4)]);
    }
}

#[test]
fn mixed_meshes_compute_what_one_computes() {
    let layouts = [
        layout(2, 1, 2),
        layout(1, 2, 2),
        layout(1, 4, 2),
        layout(2, 2, 2),
        layout(1, 2, 4),
    ];
    assert_equals_one_rank(case(Target::Embedding, Activations::Recompute), &layouts);
    assert_equals_one_rank(case(Target::Hidden, Activations::Keep), &layouts[3..4]);
}

/// With the parameters spread over the ranks of a row, too.
#[test]
fn parameters_over_the_ranks_of_a_row_compute_what_one_computes() {
    let shapes = [
        [1, 1, 2],
        [1, 1, 4],
        [2, 1, 2],
        [1, 2, 2],
        [2, 2, 2],
        [1, 2, 4],
    ];
    let layouts = shapes.map(joint);
    for activations in [Activations::Keep, Activations::Recompute] {
        assert_equals_one_rank(case(Target::Embedding, activations), &layouts);
    }
    let in_f64 = Case {
        compute: DType::F64,
        ..case(Target::Hidden, Activations::Recompute)
    };
    assert_equals_one_rank(in_f64, &layouts[..4]);
    // A rank holds its part of the parameters and no more.
    let held = |layout: Layout| {
        on_mesh(layout, |mesh| {
            let model = model(
                &config(Target::Embedding),
                ContextSettings::default(),
                &mesh,
            );
            let units = model.units.iter();
            units.map(|unit| unit.master.len()).sum::<usize>()
        })
    };
    let whole = held(layout(1, 1, 2))[0];
    for (shape, parts) in [([1, 1, 2], 2), ([1, 2, 2], 4)] {
        for own in held(joint(shape)) {
            // Parts are multiples of 256 elements: two sections of five units at most.
            assert!(own < whole / parts + 10 * 256, "{own} of {whole}");
        }
    }
}

/// In bf16, as on a GPU: as far from one rank in f32 as one rank in bf16 is, and no further.
#[test]
fn ranks_in_bf16_err_no_more_than_one() {
    let of = |compute| Case {
        compute,
        settings: ContextSettings {
            payload: Payload::Bf16,
            ..ContextSettings::default()
        },
        ..case(Target::Embedding, Activations::Recompute)
    };
    let exact = pass(of(DType::F32), &Mesh::single());
    let error = |pass: &Pass| {
        let all = |pass: &Pass| -> Vec<f64> {
            let gradients = pass.gradients.iter();
            gradients.flat_map(|(_, values)| values.clone()).collect()
        };
        relative_error_of(&all(pass), &all(&exact))
    };
    let one = error(&pass(of(DType::BF16), &Mesh::single()));
    for layout in [layout(1, 1, 2), layout(1, 1, 8)] {
        for got in on_mesh(layout, |mesh| pass(of(DType::BF16), &mesh)) {
            // Both are sums of many roundings: equal in size, not in value.
            let ranks = error(&got);
            assert!(ranks < 1.5 * one, "{layout:?}: {ranks:e}, one rank {one:e}");
        }
    }
    assert!((1e-3..1e-1).contains(&one), "{one:e}");
}

/// Masters of all units, gathered, after five steps.
fn trained(mesh: &Mesh) -> Vec<Vec<f64>> {
    let hyper = OptimizerConfig {
        lr: 1e-2,
        min_lr_ratio: 1.0,
        warmup_steps: 0,
        schedule: ScheduleKind::Constant,
        decay_fraction: 0.2,
        beta1: 0.9,
        beta2: 0.95,
        // Large beside the smallest gradients, whose sign would otherwise be that of their rounding.
        eps: 1e-4,
        weight_decay: 0.1,
        grad_clip: 0.1,
        overrides: vec![],
    };
    let device = Device::flex();
    let mut updater = Updater::new(&hyper, OnBadGradient::Skip, None, 0.0, &device);
    let config = config(Target::Embedding);
    let mut model = model(&config, ContextSettings::default(), mesh);
    for step in 0..5 {
        let mut rows = rows();
        for row in &mut rows {
            // Other text each step, between the same document starts.
            row.input_ids.rotate_left(5 * step as usize);
        }
        let mut labelled = 0;
        for micro in micro_batches(mesh, &rows) {
            let pass = model.accumulate(&micro, 0.01, Activations::Keep, mesh);
            pass.expect("all ranks");
            labelled += micro.labelled;
        }
        let count = mesh.all_reduce_sum(scalar(labelled as f64 * 0.01, &device));
        let normalizer = count.expect("all ranks").recip();
        let update = updater.update(&mut model.units, normalizer, 1e-2, step, mesh);
        update.expect("all ranks");
    }
    let gathered = model.units.iter().map(|unit| {
        let full = mesh.shard.all_gather(unit.master.to_f32());
        unit.layout.whole(&values(&full.expect("all ranks")))
    });
    gathered.collect()
}

#[test]
fn five_steps_end_at_the_same_weights() {
    let expected = trained(&Mesh::single());
    for layout in [
        layout(1, 1, 2),
        layout(1, 1, 8),
        layout(2, 1, 2),
        layout(2, 2, 2),
        joint([1, 1, 2]),
        joint([2, 1, 4]),
        joint([2, 2, 2]),
    ] {
        for (rank, units) in on_mesh(layout, |mesh| trained(&mesh)).iter().enumerate() {
            for (unit, (got, expected)) in units.iter().zip(&expected).enumerate() {
                let error = relative_error_of(got, expected);
                assert!(
                    error < LIMIT,
                    "{layout:?}, rank {rank}, unit {unit}: {error:e}"
                );
            }
        }
    }
}

/// Validation loss, overall and by position, is that of one rank; `ttt.clip` holds there too.
#[test]
fn evaluation_covers_all_positions() {
    let folder = tempfile::tempdir().expect("a folder");
    let texts = text::text_files(&folder.path().join("text"), 3, 120);
    let shards = folder.path().join("shards");
    text::build_ok(&text::config(&shards, &[("prose", &texts, 1.0)]));
    let dataset = Arc::new(Dataset::open(&shards, Split::Validation).expect("shards"));
    // The first bucket of positions ends at 512.
    let length = 768;
    assert!(dataset.sequential(length).expect("a row").len() >= 1);
    for clip in [None, Some(0.05)] {
        let mut config = ModelConfig {
            vocab_size: 300,
            max_position_embeddings: length,
            ..config(Target::Embedding)
        };
        (config.ttt.chunk, config.ttt.clip) = (32, clip);
        let run = |mesh: &Mesh| {
            let mut model = model(&config, ContextSettings::default(), mesh);
            evaluate(&mut model, &dataset, length, 3, 2, mesh).expect("an evaluation")
        };
        let expected = run(&Mesh::single());
        assert_eq!(expected.by_position.len(), 2);
        for layout in [layout(1, 1, 2), layout(1, 2, 4), joint([1, 2, 2])] {
            for got in on_mesh(layout, |mesh| run(&mesh)) {
                assert_eq!(got.tokens, expected.tokens);
                assert!((got.loss / expected.loss - 1.0).abs() < 1e-6);
                for (got, expected) in got.by_position.iter().zip(&expected.by_position) {
                    assert_eq!((got.from, got.to), (expected.from, expected.to));
                    assert_eq!(got.tokens, expected.tokens);
                    assert!((got.loss / expected.loss - 1.0).abs() < 1e-6);
                }
            }
        }
    }
}

/// A block on two ranks equals the block on the row, and does not if the positions of the second begin at
/// zero again.
#[test]
fn positions_go_on_across_ranks() {
    let config = config(Target::Embedding);
    let device = Device::flex();
    let run = |mesh: &Mesh, forget: bool| {
        let whole = Packing::whole_rows(1, LENGTH);
        let part = LENGTH / mesh.context.size();
        let begin = mesh.context.rank() * part;
        let packing = match mesh.context.size() {
            1 => whole,
            _ => whole.part(begin..begin + part),
        };
        let x: Tensor<3> =
            ttt_kernels::testing::normal([1, LENGTH, 16], 1.0, 9, &device, DType::F32);
        let x = x.narrow(1, begin, part);
        let context = (mesh.context.size() > 1)
            .then(|| ttt_kernels::Context::new(mesh.context.clone(), ContextSettings::default()));
        let mut batch = Batch {
            context,
            ..Batch::training(&config, packing, &device)
        };
        if forget {
            batch.rope = RopeTable::new(&config, 0..part, &device);
        }
        let mut model = model(&config, ContextSettings::default(), mesh);
        // Full attention, where every distance across the edge counts.
        let params = model.params(Unit::Block(2), mesh).expect("all ranks");
        let block = Block::new(&config, 2, &params);
        values(&block.forward(x.clone(), x, &batch).output)
    };
    let expected = run(&Mesh::single(), false);
    for forget in [false, true] {
        let parts = on_mesh(layout(1, 1, 2), |mesh| run(&mesh, forget));
        let error = relative_error_of(&parts.concat(), &expected);
        assert_eq!(error > 1e-3, forget, "{error:e}");
    }
}

/// A rank that is lost in the middle of a pass is an error of the others' pass, not a wrong gradient.
#[test]
fn a_lost_rank_ends_the_pass() {
    let errors = on_threads(2, |rank| {
        let mesh = Mesh::new(Arc::new(rank.clone()), layout(1, 1, 2)).expect("two ranks");
        if mesh.context.rank() == 1 {
            rank.leave();
            return None;
        }
        let case = case(Target::Embedding, Activations::Keep);
        let mut model = model(&config(case.target), case.settings, &mesh);
        let micro = micro_batches(&mesh, &rows()).remove(0);
        let pass = model.accumulate(&micro, 0.01, case.activations, &mesh);
        Some(pass.expect_err("rank 1 left").to_string())
    });
    let error = errors[0].as_ref().expect("rank 0 tried");
    assert!(error.contains("rank 1 has left"), "{error}");
}

/// Rows that the ranks do not divide are refused in a sentence.
#[test]
fn rows_that_do_not_divide_are_refused() {
    let refused = on_mesh(layout(1, 1, 3), |mesh| {
        let micro = MicroBatch::new(&rows()[..1], &mesh, &Device::flex());
        micro.expect_err("64 tokens among 3 ranks").to_string()
    });
    assert!(refused[0].contains("a row of 64 tokens does not divide among 3 ranks"));
    let validate = |length, ranks, attention| {
        let settings = ContextSettings {
            attention,
            ..ContextSettings::default()
        };
        let config = config(Target::Embedding);
        ttt_train::context::validate(&config, length, ranks, &settings).map_err(|e| e.to_string())
    };
    for (length, ranks) in [(64, 1), (64, 8), (48, 4), (63, 1)] {
        assert_eq!(validate(length, ranks, AttentionExchange::Auto), Ok(()));
    }
    let error = validate(64, 32, AttentionExchange::Auto).expect_err("chunks of 4");
    assert!(
        error.contains("train.sequence_length") && error.contains("128"),
        "{error}"
    );
    let error = validate(72, 4, AttentionExchange::Auto).expect_err("chunks of 4");
    assert!(error.contains("64 and 80"), "{error}");
    assert_eq!(validate(64, 4, AttentionExchange::Heads), Ok(()));
    let error = validate(64, 8, AttentionExchange::Heads).expect_err("4 heads");
    assert!(error.contains("\"keys\" or \"auto\""), "{error}");
}
