//! The head with its loss: formula, gradients, tokens without a label, and slices of tokens.

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use ttt_kernels::ops::cross_entropy::labels;
use ttt_kernels::testing::{normal, relative_error, relative_error_of, values};
use ttt_kernels::{linear_cross_entropy, token_losses};

use crate::support::{check_gradients, flat, random, tape_gradients};

fn some_labels() -> Vec<Option<u32>> {
    vec![Some(2), None, Some(6), Some(0), Some(2), None]
}

fn on_device(of: &[Option<u32>]) -> Tensor<1, Int> {
    labels(of, &Device::flex())
}

/// −log softmax on the host, 0 without a label.
fn expected(h: &Tensor<2>, w: &Tensor<2>, labels: &[Option<u32>]) -> Vec<f64> {
    let [_, width] = h.dims();
    let (h, w) = (values(h), values(w));
    let loss = |(token, label): (usize, &Option<u32>)| {
        let Some(label) = label else { return 0.0 };
        let h = &h[token * width..][..width];
        let logits: Vec<f64> = w
            .chunks(width)
            .map(|w| w.iter().zip(h).map(|(a, b)| a * b).sum())
            .collect();
        let total: f64 = logits.iter().map(|l| l.exp()).sum();
        total.ln() - logits[*label as usize]
    };
    labels.iter().enumerate().map(loss).collect()
}

#[test]
fn losses_follow_the_formula() {
    let (h, w) = (random([6, 3], 1), random([7, 3], 2));
    let expected = expected(&h, &w, &some_labels());
    let each = token_losses(h.clone(), w.clone(), on_device(&some_labels()));
    assert!(relative_error_of(&values(&each), &expected) < 1e-13);
    assert_eq!(values(&each)[1], 0.0);
    let sum = linear_cross_entropy(h, w, on_device(&some_labels()), 0.25);
    let total = 0.25 * expected.iter().sum::<f64>();
    assert!((values(&sum)[0] - total).abs() < 1e-13);
}

#[test]
fn linear_cross_entropy_differentiates() {
    let inputs = [flat(random([6, 3], 1)), flat(random([7, 3], 2))];
    check_gradients("linear_cross_entropy", &inputs, |x: &[Tensor<1>]| {
        linear_cross_entropy(
            x[0].clone().reshape([6, 3]),
            x[1].clone().reshape([7, 3]),
            on_device(&some_labels()),
            0.25,
        )
    });
}

/// A token without a label takes no part: no loss, no gradient, no trace in the weight's gradient.
#[test]
fn tokens_without_a_label_take_no_part() {
    let h = random([6, 3], 1);
    let run = |h: Tensor<2>| {
        tape_gradients(&[flat(h), flat(random([7, 3], 2))], |x: &[Tensor<1>]| {
            linear_cross_entropy(
                x[0].clone().reshape([6, 3]),
                x[1].clone().reshape([7, 3]),
                on_device(&some_labels()),
                1.0,
            )
        })
    };
    let before = run(h.clone());
    assert_eq!(before[0][3..6], [0.0; 3]);
    let after = run(h.slice_assign([1..2, 0..3], random([1, 3], 99)));
    assert_eq!(before, after);
}

/// With 12 million logits a token, two tokens fill a slice; slices must join up to the same losses
/// and gradients as each of them alone.
#[test]
fn slices_of_tokens_join_up() {
    let (tokens, vocab) = (5, 12 << 20);
    let device = Device::flex();
    let h = normal([tokens, 1], 1.0, 1, &device, DType::F32);
    let w = normal([vocab, 1], 1.0, 2, &device, DType::F32);
    let targets: Vec<Option<u32>> = (0..tokens as u32)
        .map(|t| (t != 2).then_some(t * 3_000_017))
        .collect();
    let run = |range: std::ops::Range<usize>| {
        let h = h.clone().slice([range.clone()]).autodiff().require_grad();
        let w = w.clone().autodiff().require_grad();
        let loss = linear_cross_entropy(h.clone(), w.clone(), on_device(&targets[range]), 1.0);
        let mut gradients = loss.backward();
        let mut take = |t: &Tensor<2>| t.grad_remove(&mut gradients).unwrap();
        (values(&loss)[0], take(&h), take(&w))
    };
    let (loss, dh, dw) = run(0..tokens);
    let parts: Vec<_> = [0..2, 2..4, 4..5].into_iter().map(run).collect();
    let sum: f64 = parts.iter().map(|part| part.0).sum();
    assert!((loss - sum).abs() < 1e-5 * sum, "loss {loss} against {sum}");
    let joined = Tensor::cat(parts.iter().map(|part| part.1.clone()).collect(), 0);
    assert_eq!(values(&dh), values(&joined));
    let added = parts.into_iter().map(|part| part.2).reduce(|a, b| a + b);
    assert!(relative_error(&dw, &added.unwrap()) < 1e-6);
    let each = token_losses(h.clone(), w.clone(), on_device(&targets));
    let total: f64 = values(&each).iter().sum();
    assert!(
        (loss - total).abs() < 1e-5 * total,
        "loss {loss} against {total}"
    );
}

/// Logits in the hundreds overflow a softmax that does not subtract the largest.
#[test]
fn large_logits_stay_finite() {
    let data = TensorData::new(vec![400.0f32, -400.0], [2, 1]);
    let w = Tensor::<2>::from_data(data, &Device::flex());
    let h = Tensor::<2>::ones([1, 1], &Device::flex());
    let loss = token_losses(h, w, on_device(&[Some(1)]));
    assert_eq!(values(&loss), vec![800.0]);
}
