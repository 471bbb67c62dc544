//! No logit depends on a later token; with TTT, some depend on tokens beyond attention's reach.

use burn::tensor::DType;
use ttt_kernels::Packing;
use ttt_model::ModelConfig;

use crate::support::{
    CHUNK, TARGETS, VOCAB, config, moved, random_model, sliding, text, without_ttt,
};
use crate::whole_model::token_ids;

/// For each token, the logits that move when it is replaced.
fn reactions(config: &ModelConfig, packing: &Packing) -> Vec<Vec<usize>> {
    let model = random_model(config, DType::F32);
    let ids = text(packing.length(), 1);
    let logits = |ids: &[u32]| model.logits(&token_ids(&[ids.to_vec()]), packing);
    let before = logits(&ids);
    let reaction = |t: usize| {
        let mut other = ids.clone();
        other[t] = (other[t] + 5) % VOCAB as u32;
        moved(&before, &logits(&other))
    };
    (0..ids.len()).map(reaction).collect()
}

#[test]
fn logits_do_not_depend_on_later_tokens() {
    for target in TARGETS {
        for starts in [vec![0], vec![0, 6, 7, 12]] {
            let packing = Packing::new(19, vec![starts]).unwrap();
            for (t, moved) in reactions(&config(target), &packing).into_iter().enumerate() {
                assert!(
                    moved.first() >= Some(&t),
                    "{target:?}: token {t} moved the logits of {moved:?}"
                );
                assert!(
                    moved.contains(&t),
                    "{target:?}: token {t} does not move its own logits"
                );
            }
        }
    }
}

/// Three layers that see three tokens reach six tokens back. The fast weights reach further, and
/// only they.
#[test]
fn fast_weights_reach_beyond_the_windows() {
    let packing = Packing::whole_rows(1, 24);
    let (window, reach) = (3, 6);
    for target in TARGETS {
        let config = sliding(&config(target), window, None);
        let with = &reactions(&config, &packing)[0];
        let without = &reactions(&without_ttt(&config), &packing)[0];
        assert_eq!(*without, (0..=reach).collect::<Vec<_>>());
        // Every chunk after the first reads the update that token 0 took part in.
        assert!(
            (CHUNK..24).all(|p| with.contains(&p)),
            "{target:?}: moved {with:?}"
        );
    }
}
