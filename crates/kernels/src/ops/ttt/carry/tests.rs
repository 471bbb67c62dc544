//! The scan on ranks that share rows against the scan of whole rows, in f64; and with mistakes that must
//! show.

use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor};
use proptest::prelude::*;
use ttt_parallel::ProcessGroup;
use ttt_parallel::threads::{ThreadRank, on_threads};

use crate::context::{Context, ContextSettings, Fault, Payload, StateExchange};
use crate::ops::seed::backward_from;
use crate::ops::ttt::{ScanSpec, fast_weight_scan};
use crate::packing::Packing;
use crate::testing::{normal, relative_error_of, values};

const WIDTH: usize = 3;
const INNER: usize = 5;
const EXCHANGES: [StateExchange; 3] = [
    StateExchange::AllToAll,
    StateExchange::Chain,
    StateExchange::AllGather,
];

/// Output, dz and dv of each token, and dw0 and the norm of the states.
struct Outcome {
    tokens: [Vec<f64>; 3],
    dw0: Vec<f64>,
    norm: f64,
}

fn spec(packing: Packing, chunk: usize, context: Option<Context>) -> ScanSpec {
    ScanSpec {
        lr: 0.3,
        chunk,
        clip: None,
        packing,
        context,
    }
}

/// The scan and its gradients over the tokens that `spec.packing` covers.
fn run(spec: ScanSpec) -> Outcome {
    let whole = spec.packing.whole().length();
    let (rows, here) = (spec.packing.rows().len(), spec.packing.positions());
    let device = Device::flex();
    let cut = |width: usize, seed: u64| -> Tensor<3> {
        let all = normal([rows, whole, width], 1.0, seed, &device, DType::F64);
        all.slice([0..rows, here.clone()])
    };
    let leaf = |t: Tensor<3>| t.autodiff().require_grad();
    let (z, v) = (leaf(cut(INNER, 1)), leaf(cut(WIDTH, 2)));
    let w0: Tensor<2> = normal([WIDTH, INNER], 1.0, 3, &device, DType::F64);
    let w0 = w0.autodiff().require_grad();
    let context = spec.context.clone();
    let scan = fast_weight_scan(z.clone(), v.clone(), w0.clone(), spec);
    let output = values(&scan.output);
    let gradients = backward_from(scan.output, cut(WIDTH, 4));
    if let Some(context) = context {
        context.check().expect("all ranks are there");
    }
    Outcome {
        tokens: [
            output,
            values(&z.grad(&gradients).expect("dz")),
            values(&v.grad(&gradients).expect("dv")),
        ],
        dw0: values(&w0.grad(&gradients).expect("dw0")),
        norm: values(&scan.state_norm)[0],
    }
}

/// Rank `rank`'s context; `fault` is what all ranks do wrong.
fn context(rank: ThreadRank, settings: ContextSettings, fault: Option<Fault>) -> Context {
    Context::new(Arc::new(rank), settings).with_fault(fault)
}

/// The largest error of anything that `ranks` ranks compute together of the rows `whole`.
fn worst_error(
    whole: &Packing,
    chunk: usize,
    ranks: usize,
    settings: ContextSettings,
    fault: Option<Fault>,
) -> f64 {
    let part = whole.length() / ranks;
    let outcomes = on_threads(ranks, |rank| {
        let context = context(rank, settings, fault);
        let here = context.rank() * part..(context.rank() + 1) * part;
        run(spec(whole.part(here), chunk, Some(context)))
    });
    let expected = run(spec(whole.clone(), chunk, None));
    let mut worst = 0f64;
    let rows = whole.rows().len();
    for (i, width) in [WIDTH, INNER, WIDTH].into_iter().enumerate() {
        let together: Vec<f64> = (0..rows)
            .flat_map(|row| {
                let size = part * width;
                let of_row = outcomes
                    .iter()
                    .map(move |o| &o.tokens[i][row * size..][..size]);
                of_row.flatten().copied().collect::<Vec<f64>>()
            })
            .collect();
        worst = worst.max(relative_error_of(&together, &expected.tokens[i]));
    }
    let sum = |k: usize| outcomes.iter().map(|o| o.dw0[k]).sum::<f64>();
    let dw0: Vec<f64> = (0..WIDTH * INNER).map(sum).collect();
    worst = worst.max(relative_error_of(&dw0, &expected.dw0));
    let norm = outcomes.iter().map(|o| o.norm).fold(0.0, f64::max);
    worst.max(relative_error_of(&[norm], &[expected.norm]))
}

fn states(states: StateExchange) -> ContextSettings {
    ContextSettings {
        states,
        ..ContextSettings::default()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Documents that begin anywhere: f64 leaves rounding alone.
    #[test]
    fn any_documents_equal_the_whole_row(
        ranks in prop_oneof![Just(2usize), Just(3), Just(4), Just(8)],
        chunk in 1usize..5,
        chunks in 1usize..4,
        starts in proptest::collection::vec(proptest::collection::btree_set(0usize..96, 0..5), 1..3),
        exchange in 0usize..3,
    ) {
        let length = ranks * chunks * chunk;
        let rows = starts.into_iter().map(|mut row| {
            row.insert(0);
            row.into_iter().filter(|&start| start < length).collect()
        });
        let packing = Packing::new(length, rows.collect()).unwrap();
        let error = worst_error(&packing, chunk, ranks, states(EXCHANGES[exchange]), None);
        prop_assert!(error < 1e-12, "{error:e}");
    }
}

/// Rows of 48 tokens over 4 ranks, 12 each in chunks of 4: a document over three ranks that ends inside
/// a chunk, one that begins at an edge between ranks, one inside a rank, and the whole row.
fn rows() -> Packing {
    let starts = vec![vec![0, 3, 42], vec![0, 24, 29, 31], vec![0]];
    Packing::new(48, starts).expect("ascending")
}

/// Positive control of the faults below.
#[test]
fn four_ranks_equal_one() {
    for exchange in EXCHANGES {
        let error = worst_error(&rows(), 4, 4, states(exchange), None);
        assert!(error < 1e-13, "{exchange:?}: {error:e}");
    }
}

#[test]
fn every_planted_fault_is_seen() {
    for fault in [
        Fault::NoReset,
        Fault::InclusiveScan,
        Fault::SuffixInWeightGradient,
    ] {
        for exchange in EXCHANGES {
            if (fault, exchange) == (Fault::InclusiveScan, StateExchange::Chain) {
                continue; // a chain has no sum to take for another
            }
            let error = worst_error(&rows(), 4, 4, states(exchange), Some(fault));
            assert!(error > 0.05, "{fault:?}, {exchange:?}: only {error:e}");
        }
    }
}

/// Half the bytes cost a rounding to 2⁻⁹ per hop, and no more.
#[test]
fn a_bf16_payload_rounds_and_nothing_else() {
    for exchange in EXCHANGES {
        let settings = ContextSettings {
            payload: Payload::Bf16,
            ..states(exchange)
        };
        let error = worst_error(&rows(), 4, 4, settings, None);
        assert!((1e-5..1e-2).contains(&error), "{exchange:?}: {error:e}");
    }
}

/// A bound on the updates, at inference, holds on every rank.
#[test]
fn clipped_updates_travel() {
    let whole = rows();
    let run = |packing: &Packing, context: Option<Context>| {
        let (rows, here) = (packing.rows().len(), packing.positions());
        let cut = |width: usize, seed: u64| -> Tensor<3> {
            let all = normal([rows, 48, width], 1.0, seed, &Device::flex(), DType::F64);
            all.slice([0..rows, here.clone()])
        };
        let spec = ScanSpec {
            clip: Some(2.0),
            ..spec(packing.clone(), 4, context)
        };
        let w0 = normal([WIDTH, INNER], 1.0, 3, &Device::flex(), DType::F64);
        values(&fast_weight_scan(cut(INNER, 1), cut(WIDTH, 2), w0, spec).output)
    };
    let expected = run(&whole, None);
    let outputs = on_threads(4, |rank| {
        let context = context(rank, ContextSettings::default(), None);
        let begin = 12 * context.rank();
        run(&whole.part(begin..begin + 12), Some(context))
    });
    let size = 12 * WIDTH;
    let together =
        (0..3).flat_map(|row| outputs.iter().flat_map(move |o| &o[row * size..][..size]));
    let together: Vec<f64> = together.copied().collect();
    assert!(relative_error_of(&together, &expected) < 1e-13);
}

/// A lost rank is an error to ask for, not a panic, and the others do not wait for it.
#[test]
fn a_lost_rank_is_told() {
    let errors = on_threads(3, |rank| {
        if ProcessGroup::rank(&rank) == 1 {
            rank.leave();
            return None;
        }
        let context = context(rank, ContextSettings::default(), None);
        let begin = 16 * context.rank();
        let spec = spec(rows().part(begin..begin + 16), 4, Some(context.clone()));
        let z = normal([3, 16, INNER], 1.0, 1, &Device::flex(), DType::F64);
        let v = normal([3, 16, WIDTH], 1.0, 2, &Device::flex(), DType::F64);
        let w0 = normal([WIDTH, INNER], 1.0, 3, &Device::flex(), DType::F64);
        let _ = fast_weight_scan(z, v, w0, spec);
        Some(context.check().expect_err("rank 1 left").to_string())
    });
    for error in errors.into_iter().flatten() {
        assert!(error.contains("rank 1 has left"), "{error}");
    }
}

/// Without the other ranks a part of a row is refused: it would begin with W0 and say nothing.
#[test]
#[should_panic(expected = "a part of rows learns nothing of the other parts")]
fn a_part_alone_is_refused() {
    run(spec(rows().part(12..24), 4, None));
}
