//! Attention on ranks that share rows against attention over whole rows, in f64; and with mistakes that
//! must show.

use std::sync::Arc;

use proptest::prelude::*;

use burn::tensor::{DType, Device, Tensor};
use ttt_parallel::threads::on_threads;

use super::SharedAttention;
use crate::context::{AttentionExchange, Context, ContextSettings, Fault};
use crate::ops::attention::{AttentionSpec, attention};
use crate::ops::seed::backward_from;
use crate::packing::Packing;
use crate::testing::{normal, relative_error_of, values};

const HEADS: usize = 8;
const SIZE: usize = 3;

#[derive(Clone, Debug)]
struct Case {
    packing: Packing,
    groups: usize,
    window: Option<usize>,
    attention: AttentionExchange,
    fault: Option<Fault>,
}

/// Output, dq, dk, dv of the tokens `here`, token by token within rows.
fn run(case: &Case, packing: Packing, context: Option<Context>) -> [Vec<f64>; 4] {
    let (rows, here) = (packing.rows().len(), packing.positions());
    let whole = case.packing.length();
    let cut = |heads: usize, seed: u64| -> Tensor<4> {
        let all = normal(
            [rows, whole, heads, SIZE],
            1.0,
            seed,
            &Device::flex(),
            DType::F64,
        );
        all.slice([0..rows, here.clone()])
    };
    let leaf = |t: Tensor<4>| t.autodiff().require_grad();
    let (q, k, v) = (
        leaf(cut(HEADS, 1)),
        leaf(cut(case.groups, 2)),
        leaf(cut(case.groups, 3)),
    );
    let spec = AttentionSpec {
        window: case.window,
        scale: 0.7,
        query_offset: 0,
        packing: Some(packing),
        context: context.clone(),
    };
    let output = attention(q.clone(), k.clone(), v.clone(), spec);
    let y = values(&output);
    let gradients = backward_from(output, cut(HEADS, 4));
    if let Some(context) = context {
        context.check().expect("all ranks are there");
    }
    let gradient = |t: &Tensor<4>| values(&t.grad(&gradients).expect("a gradient"));
    [y, gradient(&q), gradient(&k), gradient(&v)]
}

/// The largest error of output and gradients on `ranks` ranks.
fn worst_error(case: &Case, ranks: usize) -> f64 {
    let part = case.packing.length() / ranks;
    let of_ranks = on_threads(ranks, |rank| {
        let settings = ContextSettings {
            attention: case.attention,
            ..ContextSettings::default()
        };
        let context = Context::new(Arc::new(rank), settings).with_fault(case.fault);
        let begin = context.rank() * part;
        run(case, case.packing.part(begin..begin + part), Some(context))
    });
    let expected = run(case, case.packing.clone(), None);
    let mut worst = 0f64;
    for (i, expected) in expected.iter().enumerate() {
        let rows = case.packing.rows().len();
        let size = expected.len() / rows / ranks;
        let together = (0..rows).flat_map(|row| {
            of_ranks
                .iter()
                .flat_map(move |o| &o[i][row * size..][..size])
        });
        let together: Vec<f64> = together.copied().collect();
        worst = worst.max(relative_error_of(&together, expected));
    }
    worst
}

/// 48 tokens: whole, and documents that begin inside ranks and at their edges.
fn layouts() -> [Packing; 2] {
    let starts = vec![vec![0, 3, 42], vec![0, 24, 29, 31]];
    [
        Packing::whole_rows(2, 48),
        Packing::new(48, starts).expect("ascending"),
    ]
}

fn case(packing: Packing, groups: usize, window: Option<usize>) -> Case {
    Case {
        packing,
        groups,
        window,
        attention: AttentionExchange::Auto,
        fault: None,
    }
}

/// Windows of one token, inside a part, as long as one, over several, and beyond the row.
#[test]
fn windows_reach_over_the_edges_of_ranks() {
    for packing in layouts() {
        for ranks in [2, 4, 8] {
            for window in [1, 2, 5, 7, 13, 20, 47, 60] {
                let case = case(packing.clone(), 2, Some(window));
                let error = worst_error(&case, ranks);
                assert!(error < 1e-13, "{ranks} ranks: {case:?}: {error:e}");
            }
        }
    }
}

/// Of each rank, how many of its first queries of each row see the strip, where these are one square.
fn squares(packing: &Packing, window: usize, ranks: usize) -> Vec<Option<Vec<usize>>> {
    let part = packing.length() / ranks;
    on_threads(ranks, |rank| {
        let context = Context::new(Arc::new(rank), ContextSettings::default());
        let begin = context.rank() * part;
        let spec = AttentionSpec {
            window: Some(window),
            scale: 1.0,
            query_offset: 0,
            packing: Some(packing.part(begin..begin + part)),
            context: Some(context),
        };
        SharedAttention::new(&spec).expect("a part").square()
    })
}

/// The first queries are one square with the strip, unless a document begins inside the strip or the window
/// is longer than half of a part; documents that end among the queries, or at the edge, do not hinder.
#[test]
fn first_queries_are_a_square_where_they_can_be() {
    let whole = Packing::whole_rows(2, 48);
    assert_eq!(
        squares(&whole, 7, 4),
        [None, Some(vec![6; 2]), Some(vec![6; 2]), Some(vec![6; 2])]
    );
    assert_eq!(squares(&whole, 8, 4), [None, None, None, None]);
    assert_eq!(squares(&whole, 1, 4), [None, None, None, None]);
    // Edges at 12, 24, 36; strips from 6, 18, 30 on.
    let starts = vec![vec![0, 14, 31], vec![0, 6, 24, 37]];
    let documents = Packing::new(48, starts).expect("ascending");
    assert_eq!(
        squares(&documents, 7, 4),
        [None, Some(vec![2, 6]), Some(vec![6, 0]), None]
    );
    let case = case(documents, 2, Some(7));
    let error = worst_error(&case, 4);
    assert!(error < 1e-13, "{error:e}");
}

/// Begins of documents, a window and a number of ranks that divides 48 tokens.
fn layout() -> impl Strategy<Value = (Vec<Vec<usize>>, usize, usize)> {
    let starts = || {
        proptest::collection::btree_set(1usize..48, 0..5)
            .prop_map(|starts| [0].into_iter().chain(starts).collect::<Vec<_>>())
    };
    let ranks = prop_oneof![Just(2), Just(3), Just(4)];
    (proptest::collection::vec(starts(), 2), 2usize..14, ranks)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Wherever documents begin.
    #[test]
    fn windows_reach_over_the_edges_within_documents((starts, window, ranks) in layout()) {
        let packing = Packing::new(48, starts).expect("ascending");
        let case = case(packing, 2, Some(window));
        let error = worst_error(&case, ranks);
        prop_assert!(error < 1e-13, "{ranks} ranks: {case:?}: {error:e}");
    }
}

#[test]
fn full_attention_equals_that_of_the_row_whatever_travels() {
    for packing in layouts() {
        for (ranks, groups) in [(2, 2), (2, 8), (4, 4), (8, 8), (4, 2), (8, 1)] {
            for attention in [
                AttentionExchange::Auto,
                AttentionExchange::Keys,
                AttentionExchange::Heads,
            ] {
                if attention == AttentionExchange::Heads && groups % ranks != 0 {
                    continue;
                }
                let case = Case {
                    attention,
                    ..case(packing.clone(), groups, None)
                };
                let error = worst_error(&case, ranks);
                assert!(error < 1e-13, "{ranks} ranks: {case:?}: {error:e}");
            }
        }
    }
}

#[test]
fn every_planted_fault_is_seen() {
    let [_, documents] = layouts();
    for fault in [Fault::KeyGradientDropped, Fault::KeysWithoutDocuments] {
        for window in [Some(7), Some(20), None] {
            let case = Case {
                attention: AttentionExchange::Keys,
                fault: Some(fault),
                ..case(documents.clone(), 2, window)
            };
            let error = worst_error(&case, 4);
            assert!(error > 0.05, "{case:?}: only {error:e}");
        }
    }
}

/// Sums of exponentials that leave the strip out give wrong gradients.
#[test]
fn sums_that_are_not_merged_are_seen() {
    for packing in layouts() {
        let case = Case {
            fault: Some(Fault::SumsOfOwnKeys),
            ..case(packing, 2, Some(7))
        };
        let error = worst_error(&case, 4);
        assert!(error > 0.05, "{case:?}: only {error:e}");
    }
}

/// Without the other ranks a part of a row is refused: its queries would not see across the edge.
#[test]
#[should_panic(expected = "see nothing of the other parts")]
fn a_part_alone_is_refused() {
    let case = case(Packing::whole_rows(1, 8), 2, None);
    run(&case, case.packing.part(4..8), None);
}
