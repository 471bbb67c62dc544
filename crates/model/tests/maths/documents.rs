//! Documents packed into one row, through the whole model.

use burn::tensor::DType;
use ttt_kernels::Packing;
use ttt_kernels::testing::relative_error;

use crate::support::{TARGETS, VOCAB, config, moved, random_model, sliding, text};
use crate::whole_model::token_ids;

#[test]
fn a_document_never_moves_the_logits_of_another() {
    let starts = [0, 5, 6, 14];
    let packing = Packing::new(20, vec![starts.to_vec()]).unwrap();
    for target in TARGETS {
        for config in [config(target), sliding(&config(target), 3, None)] {
            let model = random_model(&config, DType::F32);
            let ids = text(20, 1);
            let before = model.logits(&token_ids(std::slice::from_ref(&ids)), &packing);
            for (i, &begin) in starts.iter().enumerate() {
                let end = starts.get(i + 1).copied().unwrap_or(20);
                let mut other = ids.clone();
                for id in &mut other[begin..end] {
                    *id = (*id + 5) % VOCAB as u32;
                }
                let after = model.logits(&token_ids(&[other]), &packing);
                assert_eq!(moved(&before, &after), (begin..end).collect::<Vec<_>>());
            }
        }
    }
}

/// Documents that start on the chunk grid equal runs of their own. Rotary positions are counted
/// along the row; only their differences matter, up to the rounding of the f32 tables.
#[test]
fn aligned_documents_equal_runs_alone() {
    let (starts, length) = ([0, 4, 16], 23);
    let packing = Packing::new(length, vec![starts.to_vec()]).unwrap();
    for target in TARGETS {
        let model = random_model(&config(target), DType::F64);
        let ids = text(length, 1);
        let packed = model.logits(&token_ids(std::slice::from_ref(&ids)), &packing);
        for (i, &begin) in starts.iter().enumerate() {
            let end = starts.get(i + 1).copied().unwrap_or(length);
            let alone = Packing::whole_rows(1, end - begin);
            let alone = model.logits(&token_ids(&[ids[begin..end].to_vec()]), &alone);
            let part = packed.clone().slice([0..1, begin..end]);
            let error = relative_error(&part, &alone);
            assert!(error < 1e-6, "{target:?}, document {i}: {error:e}");
        }
    }
}

#[test]
fn rows_of_a_batch_are_independent() {
    let packing = Packing::new(13, vec![vec![0, 5], vec![0]]).unwrap();
    let model = random_model(&config(TARGETS[1]), DType::F32);
    let before = model.logits(&token_ids(&[text(13, 1), text(13, 2)]), &packing);
    let after = model.logits(&token_ids(&[text(13, 3), text(13, 2)]), &packing);
    // Tokens 13.. are those of the second row.
    let moved = moved(&before, &after);
    assert!(
        !moved.is_empty() && moved.iter().all(|&t| t < 13),
        "{moved:?}"
    );
}
