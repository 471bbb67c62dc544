//! Decoding equals the training forward, however the tokens are split into calls.

use burn::tensor::DType;
use proptest::prelude::*;
use ttt_kernels::Packing;
use ttt_kernels::testing::{relative_error_of, values};
use ttt_model::decode::{Decoder, Session};
use ttt_model::{LayerType, ModelConfig, ModelType, Target};

use crate::support::{CHUNK, TARGETS, config, random_model, sliding, text, without_ttt};
use crate::whole_model::{WholeModel, token_ids};

const LIMIT: f64 = 1e-5;

fn prefill(model: &WholeModel, ids: &[u32]) -> Vec<f64> {
    let ids = token_ids(&[ids.to_vec()]);
    values(&model.logits(&ids, &Packing::whole_rows(1, ids.dims()[1])))
}

fn decode(decoder: &Decoder, ids: &[u32], splits: &[usize]) -> Vec<f64> {
    let mut session = decoder.session();
    let mut logits = vec![];
    let mut rest = ids;
    for &count in splits {
        let (now, later) = rest.split_at(count.min(rest.len()));
        if !now.is_empty() {
            logits.extend(values(&decoder.extend(&mut session, now)));
        }
        rest = later;
    }
    if !rest.is_empty() {
        logits.extend(values(&decoder.extend(&mut session, rest)));
    }
    assert_eq!(session.tokens(), ids.len());
    logits
}

fn check(config: &ModelConfig, length: usize, splits: &[usize]) -> Result<(), TestCaseError> {
    let model = random_model(config, DType::F32);
    let ids = text(length, 1);
    let error = relative_error_of(
        &decode(&model.decoder(), &ids, splits),
        &prefill(&model, &ids),
    );
    println!("decode: worst {error:.1e}, limit {LIMIT:.0e}");
    prop_assert!(error < LIMIT, "{length} tokens as {splits:?}: {error:e}");
    Ok(())
}

/// One call, then single tokens, from every point around the chunk edges.
#[test]
fn single_tokens_after_any_prompt() {
    for target in TARGETS {
        for first in [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 13] {
            let mut splits = vec![first];
            splits.extend([1; 20]);
            check(&config(target), 21, &splits).unwrap();
        }
    }
}

fn configs() -> impl Strategy<Value = ModelConfig> {
    let window = prop_oneof![Just(None), (1usize..40).prop_map(Some)];
    let mixed = [
        LayerType::SlidingAttention,
        LayerType::FullAttention,
        LayerType::SlidingAttention,
    ];
    (
        0usize..3,
        1usize..9,
        window,
        any::<bool>(),
        any::<bool>(),
        any::<bool>(),
    )
        .prop_map(move |(target, chunk, window, mix, llama, tied)| {
            let mut config = config(TARGETS[target]);
            config.ttt.chunk = chunk;
            config.tie_word_embeddings = tied;
            if llama {
                config.model_type = ModelType::Llama;
            }
            match window {
                Some(window) => sliding(&config, window, mix.then_some(mixed)),
                None => config,
            }
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    #[test]
    fn any_split_equals_prefill(
        config in configs(),
        length in 1usize..34,
        splits in proptest::collection::vec(1usize..12, 0..12),
    ) {
        check(&config, length, &splits)?;
    }
}

#[test]
fn windows_of_one_and_beyond_the_text() {
    for window in [1, 2, 20, 21, 22, 1000] {
        let config = sliding(&config(Target::Embedding), window, None);
        check(&config, 21, &[5, 1, 1, 3, 1, 1, 1]).unwrap();
        check(&without_ttt(&config), 21, &[1; 21]).unwrap();
    }
}

/// A bound on the updates holds in decoding as in prefill, and changes both.
#[test]
fn clipped_updates_decode_like_prefill() {
    for target in TARGETS {
        let free = config(target);
        let mut clipped = free.clone();
        clipped.ttt.clip = Some(0.5);
        check(&clipped, 21, &[6, 1, 1, 5, 1]).unwrap();
        let logits = |config| prefill(&random_model(config, DType::F32), &text(21, 1));
        let effect = relative_error_of(&logits(&clipped), &logits(&free));
        assert!(
            effect > 1e-3,
            "{target:?}: the clip moves the logits by {effect:e}"
        );
    }
}

/// The comparison must notice a state that is lost.
#[test]
fn a_forgotten_state_is_noticed() {
    let model = random_model(&config(Target::Hidden), DType::F32);
    let ids = text(21, 1);
    let base = random_model(&without_ttt(&config(Target::Hidden)), DType::F32);
    let error = relative_error_of(
        &decode(&base.decoder(), &ids, &[21]),
        &prefill(&model, &ids),
    );
    assert!(error > 0.05, "{error:e}");
}

/// Sessions of different lengths, read in turns, equal each its own prefill bit for bit as if alone.
#[test]
fn sessions_are_independent() {
    let model = random_model(&config(Target::Embedding), DType::F32);
    let decoder = model.decoder();
    let texts: Vec<Vec<u32>> = [(5, 1), (17, 2), (11, 3)].map(|(n, s)| text(n, s)).into();
    let mut sessions: Vec<Session> = texts.iter().map(|_| decoder.session()).collect();
    let mut together = vec![vec![]; texts.len()];
    for step in 0..17 {
        for (i, ids) in texts.iter().enumerate() {
            if let Some(&id) = ids.get(step) {
                together[i].extend(values(&decoder.extend(&mut sessions[i], &[id])));
            }
        }
    }
    for (ids, together) in texts.iter().zip(&together) {
        assert_eq!(decode(&decoder, ids, &vec![1; ids.len()]), *together);
    }
}

/// A cloned session goes its own way; the original does not notice.
#[test]
fn a_fork_leaves_the_original_alone() {
    let model = random_model(&sliding(&config(Target::Hidden), 5, None), DType::F32);
    let decoder = model.decoder();
    for at in [3, 4, 6, 8, 11] {
        let (start, one, other) = (text(at, 1), text(9, 2), text(9, 3));
        let mut session = decoder.session();
        decoder.extend(&mut session, &start);
        let mut fork = session.clone();
        // In turns, so that shared buffers would show.
        let (mut got, mut got_fork) = (vec![], vec![]);
        for (&a, &b) in one.iter().zip(&other) {
            got_fork.extend(values(&decoder.extend(&mut fork, &[b])));
            got.extend(values(&decoder.extend(&mut session, &[a])));
        }
        let alone = |rest: &[u32]| {
            let mut session = decoder.session();
            decoder.extend(&mut session, &start);
            let each = rest
                .iter()
                .map(|&id| values(&decoder.extend(&mut session, &[id])));
            each.flatten().collect::<Vec<f64>>()
        };
        assert_eq!(got, alone(&one));
        assert_eq!(got_fork, alone(&other));
    }
}

#[test]
fn the_last_logits_are_those_of_the_last_token() {
    let decoder = random_model(&config(Target::Embedding), DType::F32).decoder();
    let ids = text(11, 1);
    let (mut a, mut b) = (decoder.session(), decoder.session());
    let all = values(&decoder.extend(&mut a, &ids));
    let last = values(&decoder.extend_last(&mut b, &ids));
    assert!(relative_error_of(&last, &all[all.len() - last.len()..]) < 1e-6);
    assert_eq!(a.tokens(), b.tokens());
}
