//! A run that was saved and goes on ends where one that was not does.

mod common;

use burn::tensor::{DType, Device};

use common::checkpoint::{config, gathered, progress, state};
use common::{joint, layout, on_ranks};
use ttt_data::Row;
use ttt_kernels::ContextSettings;
use ttt_kernels::ops::master::Master;
use ttt_kernels::testing::{relative_error_of, values};
use ttt_parallel::{Layout, Mesh};
use ttt_train::checkpoint::{self, Checkpoint};
use ttt_train::config::{Activations, Config};
use ttt_train::optimizer::{Updater, scalar};
use ttt_train::step::{MicroBatch, Model, RopeCache};
use ttt_train::units::UnitState;

/// Trains the steps `steps` from `units` on, four rows each; returns the updater's running norm.
fn train(
    model: &mut Model,
    steps: std::ops::Range<u64>,
    mean_norm: f32,
    mesh: &Mesh,
    config: &Config,
) -> f32 {
    let device = Device::flex();
    let policy = ttt_train::config::OnBadGradient::Skip;
    let mut updater = Updater::new(&config.optimizer, policy, None, mean_norm, &device);
    let rows: Vec<Row> = (0..4).map(row).collect();
    let share = rows.len() / mesh.data_size();
    let own = &rows[mesh.data_rank() * share..(mesh.data_rank() + 1) * share];
    for step in steps {
        for row in own {
            let micro = MicroBatch::new(std::slice::from_ref(row), mesh, &device).expect("a batch");
            let pass = model.accumulate(&micro, 0.01, Activations::Keep, mesh);
            pass.expect("all ranks");
        }
        let normalizer = scalar(1.0, &device);
        let updated = updater.update(&mut model.units, normalizer, 1e-2, step, mesh);
        updated.expect("all ranks");
    }
    values(&updater.mean_norm)[0] as f32
}

fn row(number: usize) -> Row {
    let token = |i: usize| ((i * 7 + i * i * 3 + number * 50) % 131) as u32;
    Row {
        input_ids: (0..24).map(token).collect(),
        labels: (1..25).map(token).collect(),
        document_starts: vec![0, 9 + number as u32],
    }
}

fn model(config: &Config, units: Vec<UnitState>, compute: DType) -> Model {
    Model {
        config: config.model.clone(),
        units,
        compute,
        device: Device::flex(),
        rope: RopeCache::default(),
        context: ContextSettings::default(),
    }
}

/// Three steps, a checkpoint, and three more on another layout end where six steps on one rank do;
/// on the same layout, with the same bits.
#[test]
fn a_run_goes_on_on_another_layout() {
    let whole_in = |compute: DType, shape: Layout, stop: Option<Layout>| {
        let dir = tempfile::tempdir().expect("a folder");
        let config = config(dir.path());
        let six = on_ranks(shape, |mesh| {
            let units = state(&config.model, &mesh, &Device::flex(), compute);
            let mut model = model(&config, units, compute);
            let norm = train(&mut model, 0..3, 0.0, &mesh, &config);
            if stop.is_some() {
                let mut at = progress(3);
                at.mean_grad_norm = norm;
                let saved = checkpoint::save(&config, &model.units, &at, &[], &mesh);
                saved.expect("all ranks");
            } else {
                train(&mut model, 3..6, norm, &mesh, &config);
            }
            gathered(&model.units, &mesh)
        });
        let Some(then) = stop else { return six };
        on_ranks(then, |mesh| {
            let found = Checkpoint::newest_together(&config.run.dir, &mesh, &Device::flex());
            let found = found.expect("all ranks").expect("a checkpoint");
            let units = found.load(&config.model, &mesh, &Device::flex(), compute);
            let mut model = model(&config, units.expect("all ranks"), compute);
            let norm = found.progress.mean_grad_norm;
            train(&mut model, 3..6, norm, &mesh, &config);
            gathered(&model.units, &mesh)
        })
    };
    let whole = |shape, stop| whole_in(DType::F32, shape, stop);
    let single = whole(layout([1, 1, 1]), None).remove(0);
    let apart = [
        ([1, 1, 1], [1, 4, 1]),
        ([1, 4, 1], [1, 1, 1]),
        ([1, 2, 1], [2, 1, 1]),
        ([2, 1, 1], [2, 2, 1]),
        ([2, 2, 1], [1, 2, 1]),
        ([1, 2, 2], [1, 2, 1]),
        ([1, 1, 1], [2, 1, 2]),
    ];
    let apart = apart.map(|(first, then)| (layout(first), layout(then)));
    let jointly = [
        (joint([1, 1, 2]), layout([1, 1, 1])),
        (layout([1, 2, 1]), joint([1, 2, 2])),
        (joint([2, 1, 2]), layout([1, 1, 2])),
    ];
    for (first, then) in apart.into_iter().chain(jointly) {
        for state in whole(first, Some(then)) {
            let error = relative_error_of(&state, &single);
            // Sums over rows in another order, and six updates of 1 % of a weight.
            assert!(error < 1e-6, "{first:?} then {then:?}: {error:e}");
        }
        assert!(whole(first, Some(first)) == whole(first, None), "{first:?}");
    }
    // In bf16 the file has the bits that the weights were rounded by, or six steps would end elsewhere.
    for shape in [layout([1, 1, 1]), layout([1, 2, 1]), joint([1, 1, 2])] {
        let six = whole_in(DType::BF16, shape, None);
        assert!(
            whole_in(DType::BF16, shape, Some(shape)) == six,
            "{shape:?}"
        );
        // Six updates of 1 % of a weight, from gradients in bf16 whose signs may differ where they are small.
        let error = relative_error_of(&six[0], &single);
        assert!((1e-3..0.1).contains(&error), "{shape:?}: {error:e}");
    }
}

/// Weights in halves take the course of weights in f32 of which each pass takes a rounded copy, to the bit. The
/// two roundings differ halfway between two bf16 alone, so no weight is left there before a step.
#[test]
fn halves_take_the_course_of_f32() {
    for shape in [layout([1, 1, 1]), layout([1, 2, 1]), joint([1, 1, 2])] {
        let course = |held: DType, moved: bool| {
            on_ranks(shape, |mesh| {
                let dir = tempfile::tempdir().expect("a folder");
                let config = config(dir.path());
                let units = state(&config.model, &mesh, &Device::flex(), held);
                let mut model = model(&config, units, DType::BF16);
                let mut norm = 0.0;
                for step in 0..6 {
                    for unit in &mut model.units {
                        move_off_ties(unit, moved && step == 0);
                    }
                    norm = train(&mut model, step..step + 1, norm, &mesh, &config);
                }
                gathered(&model.units, &mesh)
            })
        };
        let whole = course(DType::F32, false);
        assert!(whole == course(DType::BF16, false), "{shape:?}");
        // Control: a unit in the last place of one weight of each unit is seen.
        assert!(whole != course(DType::BF16, true), "{shape:?}");
    }
}

/// Moves weights that lie halfway between two bf16 by a unit in the last place, and with `first` the
/// first.
fn move_off_ties(unit: &mut UnitState, first: bool) {
    let mut values = unit.master.read(0..unit.master.len()).expect("weights");
    for (i, value) in values.iter_mut().enumerate() {
        let bits = value.to_bits();
        if bits & 0xffff == 0x8000 || (first && i == 0) {
            *value = f32::from_bits(bits + 1);
        }
    }
    let master = Master::new(values, unit.master.wide_len(), &Device::flex());
    unit.update(master, unit.moments.clone());
}
