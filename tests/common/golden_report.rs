//! Comparing computed values with those of a golden file.

use std::collections::BTreeMap;

use ttt_kernels::testing::relative_error_of;

use super::golden_file::Stored;

/// ‖a − b‖ / ‖b‖ for f32: ten times what two orders of summation differ by.
pub const MLP_LIMIT: f64 = 5e-6;
pub const LOGITS_LIMIT: f64 = 1e-5;
pub const GRADIENT_LIMIT: f64 = 3e-5;
pub const LOSS_LIMIT: f64 = 5e-6; // absolute
/// Absolute, for logits of at most ten, which those of the official files stay below; in
/// proportion for larger ones.
pub const LOGITS_ABSOLUTE_LIMIT: f64 = 5e-5;

/// What a file's comparison found.
#[derive(Default)]
pub struct Report {
    /// Worst error over its limit, by kind of tensor.
    worst: BTreeMap<&'static str, (f64, f64)>,
    pub failures: Vec<String>,
}

impl Report {
    pub fn number(&mut self, kind: &'static str, tensor: &str, error: f64, limit: f64) {
        let worst = self.worst.entry(kind).or_insert((0.0, limit));
        worst.0 = worst.0.max(error);
        let within = error <= limit; // not so for NaN
        if !within {
            let problem = format!("{tensor}: {kind} error {error:.2e}, limit {limit:.0e}");
            self.failures.push(problem);
        }
    }

    pub fn relative(
        &mut self,
        kind: &'static str,
        tensor: &str,
        got: &[f64],
        expected: &Stored,
        limit: f64,
    ) {
        if got.len() != expected.values.len() {
            let (got, shape) = (got.len(), &expected.shape);
            let problem = format!("{tensor}: computed {got} values, the file has shape {shape:?}");
            return self.failures.push(problem);
        }
        let error = relative_error_of(got, &expected.values);
        self.number(kind, tensor, error, limit);
    }

    pub fn logits(&mut self, tensor: &str, got: &[f64], expected: &Stored) {
        self.relative("logits", tensor, got, expected, LOGITS_LIMIT);
        let pairs = got.iter().zip(&expected.values);
        let difference = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        let largest = expected
            .values
            .iter()
            .fold(10.0, |m: f64, v| m.max(v.abs()));
        let limit = LOGITS_ABSOLUTE_LIMIT * largest / 10.0;
        self.number("absolute logits", tensor, difference, limit);
    }

    pub fn holds(&mut self, statement: &str, holds: bool) {
        if !holds {
            self.failures.push(format!("does not hold: {statement}"));
        }
    }

    pub fn summary(&self) -> String {
        let kinds = self.worst.iter();
        let kinds =
            kinds.map(|(kind, (error, limit))| format!("{kind} {error:.1e} (≤ {limit:.0e})"));
        kinds.collect::<Vec<_>>().join(", ")
    }
}
