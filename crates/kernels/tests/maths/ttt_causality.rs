//! No token sees its own future, above all not its own label through the target convolution.

use burn::tensor::{DType, Device, Tensor};
use ttt_kernels::testing::normal;
use ttt_kernels::ttt::{chunk_conv, fast_weight_scan, shift_targets};
use ttt_kernels::{Packing, linear};

use crate::support::{moved, perturb, spec};

const LENGTH: usize = 29;
const CHUNK: usize = 8;
const WIDTH: usize = 6;
const INNER: usize = 10;

fn single<const R: usize>(shape: [usize; R], seed: u64) -> Tensor<R> {
    normal(shape, 1.0, seed, &Device::flex(), DType::F32)
}

/// V from X: convolution cut into chunks of `conv_chunk`, then W_t.
fn targets(x: Tensor<3>, packing: &Packing, conv_chunk: usize) -> Tensor<3> {
    let mixed = chunk_conv(x, single([WIDTH, 1, 5], 3), packing, conv_chunk);
    linear(mixed, single([WIDTH, WIDTH], 4))
}

fn operation(z: Tensor<3>, x: Tensor<3>, packing: &Packing, conv_chunk: usize) -> Tensor<3> {
    let v = targets(x, packing, conv_chunk);
    let spec = spec(packing.clone(), CHUNK, 0.3);
    fast_weight_scan(z, v, single([WIDTH, INNER], 5), spec).output
}

/// The scan with an inclusive prefix, as the paper's algorithm 1 writes it: a chunk reads the
/// update that it makes itself.
fn inclusive(z: Tensor<3>, x: Tensor<3>, packing: &Packing) -> Tensor<3> {
    let v = targets(x, packing, CHUNK);
    let mut weight: Tensor<3> = single([WIDTH, INNER], 5).unsqueeze();
    let mut outputs = vec![];
    for begin in (0..LENGTH).step_by(CHUNK) {
        let range = [0..1, begin..(begin + CHUNK).min(LENGTH)];
        let (z, v) = (z.clone().slice(range.clone()), v.clone().slice(range));
        weight = weight + v.swap_dims(1, 2).matmul(z.clone()).mul_scalar(0.3);
        outputs.push(z.matmul(weight.clone().swap_dims(1, 2)));
    }
    Tensor::cat(outputs, 1)
}

/// For each perturbed token, the outputs that moved.
fn reactions(run: impl Fn(Tensor<3>, Tensor<3>) -> Tensor<3>) -> Vec<Vec<usize>> {
    let (z, x) = (single([1, LENGTH, INNER], 1), single([1, LENGTH, WIDTH], 2));
    let before = run(z.clone(), x.clone());
    let reaction = |t| {
        let after = run(perturb(&z, t, 77), perturb(&x, t, 78));
        moved(&before, &after, WIDTH)
    };
    (0..LENGTH).map(reaction).collect()
}

/// {t} ∪ {p : chunk(p) > chunk(t), same document}.
fn expected(t: usize, packing: &Packing) -> Vec<usize> {
    let document = packing.document_start(0);
    let later = |p: usize| p / CHUNK > t / CHUNK && document[p] == document[t];
    (0..LENGTH).filter(|&p| p == t || later(p)).collect()
}

#[test]
fn a_token_moves_itself_and_later_chunks_of_its_document_only() {
    for starts in [
        vec![0],
        vec![0, 3, 16],
        vec![0, 7, 8, 9, 20],
        vec![0, 24, 28],
    ] {
        let packing = Packing::new(LENGTH, vec![starts]).unwrap();
        let all = reactions(|z, x| operation(z, x, &packing, CHUNK));
        for (t, moved) in all.into_iter().enumerate() {
            assert_eq!(moved, expected(t, &packing), "token {t}");
        }
    }
}

#[test]
fn next_token_targets_are_causal_too() {
    let packing = Packing::new(LENGTH, vec![vec![0, 11]]).unwrap();
    let all = reactions(|z, x| {
        let v = shift_targets(x, &packing, CHUNK);
        let spec = spec(packing.clone(), CHUNK, 0.3);
        fast_weight_scan(z, v, single([WIDTH, INNER], 5), spec).output
    });
    for (t, moved) in all.into_iter().enumerate() {
        assert_eq!(moved, expected(t, &packing), "token {t}");
    }
}

/// Negative control. A convolution over the whole sequence lets the first token of a chunk see
/// itself as the label of the chunk before: the check above must notice.
#[test]
fn a_convolution_across_chunks_leaks() {
    let packing = Packing::whole_rows(1, LENGTH);
    let all = reactions(|z, x| operation(z, x, &packing, LENGTH));
    // Tokens 1 and 2 of a chunk reach back over its edge and move every token of their own chunk,
    // those before them included.
    let leaks: Vec<(usize, usize)> = (0..LENGTH)
        .flat_map(|t| all[t].iter().filter(move |&&p| p < t).map(move |&p| (t, p)))
        .collect();
    assert_eq!(leaks, [(9, 8), (17, 16), (25, 24)]);
    let wrong = (0..LENGTH).filter(|&t| all[t] != expected(t, &packing));
    assert_eq!(wrong.collect::<Vec<_>>(), [8, 9, 16, 17, 24, 25]);
}

/// Negative control. An inclusive prefix shows a token its own label: the check above must notice.
#[test]
fn an_inclusive_prefix_leaks() {
    let packing = Packing::whole_rows(1, LENGTH);
    let all = reactions(|z, x| inclusive(z, x, &packing));
    let back = (0..LENGTH)
        .filter(|&t| all[t].iter().any(|&p| p < t))
        .count();
    assert_eq!(back, LENGTH - LENGTH.div_ceil(CHUNK));
}
