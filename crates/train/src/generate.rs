//! Sampling text from a model.

pub mod chat;
pub mod stop;

use burn::tensor::Tensor;
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use ttt_data::Tokenizer;
use ttt_model::decode::{Decoder, Session};

use crate::error::TrainError;

/// How the next token is drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 takes the most likely token.
    pub temperature: f64,
    /// Only the most likely so many tokens.
    pub top_k: Option<usize>,
    /// Only the fewest most likely tokens whose probabilities reach this sum.
    pub top_p: Option<f64>,
    /// Seed of the draws.
    pub seed: u64,
}

/// A sequence being continued.
pub struct Generation<'a> {
    decoder: &'a Decoder,
    session: Session,
    sampling: Sampling,
    rng: ChaCha8Rng,
    /// Logits of the token to come: `[V]`.
    logits: Tensor<1>,
    /// Tokens that end the text.
    ends: Vec<u32>,
}

impl<'a> Generation<'a> {
    /// Reads the prompt. An empty prompt is read as the end of an earlier document.
    ///
    /// # Errors
    /// If the prompt cannot be tokenized, or has tokens that the model does not know.
    pub fn start(
        decoder: &'a Decoder,
        tokenizer: &Tokenizer,
        prompt: &str,
        sampling: Sampling,
        stream: u64,
    ) -> Result<Self, TrainError> {
        let mut ids = tokenizer.encode_prompt(prompt)?;
        if ids.is_empty() {
            ids.push(tokenizer.eos_id());
        }
        let end = tokenizer.eos_id();
        Self::start_ids(decoder, &ids, &[end], sampling, stream)
    }

    /// Reads a prompt that is tokens already; the text ends at any of `ends`.
    ///
    /// # Errors
    /// If there are no tokens, or some that the model does not know.
    pub fn start_ids(
        decoder: &'a Decoder,
        ids: &[u32],
        ends: &[u32],
        sampling: Sampling,
        stream: u64,
    ) -> Result<Self, TrainError> {
        let vocab = decoder.config().vocab_size;
        if ids.is_empty() {
            return Err(TrainError::Prompt("has no tokens".into()));
        }
        if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
            return Err(TrainError::Prompt(format!(
                "has the token {id}, the model knows {vocab}"
            )));
        }
        let mut session = decoder.session();
        let logits = decoder.extend_last(&mut session, ids);
        let mut rng = ChaCha8Rng::seed_from_u64(sampling.seed);
        rng.set_stream(stream);
        Ok(Self {
            decoder,
            session,
            sampling,
            rng,
            logits,
            ends: ends.to_vec(),
        })
    }

    /// Draws the next token; `None` at the end of the text.
    ///
    /// # Errors
    /// If the device fails.
    pub fn next_token(&mut self) -> Result<Option<u32>, TrainError> {
        let logits = crate::device::read(&self.logits)?;
        let id = draw(&logits, &self.sampling, &mut self.rng) as u32;
        if self.ends.contains(&id) {
            return Ok(None);
        }
        self.logits = self.decoder.extend_last(&mut self.session, &[id]);
        Ok(Some(id))
    }
}

/// Draws an index from logits.
fn draw(logits: &[f64], sampling: &Sampling, rng: &mut impl Rng) -> usize {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    // Ties go to the lower index, as in an argmax.
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    if sampling.temperature == 0.0 {
        return order[0];
    }
    order.truncate(sampling.top_k.unwrap_or(usize::MAX).max(1));
    let max = logits[order[0]];
    let weight = |&i: &usize| ((logits[i] - max) / sampling.temperature).exp();
    if let Some(top_p) = sampling.top_p {
        let total: f64 = order.iter().map(weight).sum();
        let mut sum = 0.0;
        let enough = order.iter().position(|i| {
            sum += weight(i);
            sum >= top_p * total
        });
        order.truncate(enough.map_or(order.len(), |last| last + 1));
    }
    let total: f64 = order.iter().map(weight).sum();
    let mut left = rng.random::<f64>() * total;
    for i in &order {
        left -= weight(i);
        if left <= 0.0 {
            return *i;
        }
    }
    order[order.len() - 1]
}

/// The text that follows `prompt`, at most `tokens` tokens.
///
/// # Errors
/// As [`Generation::start`] and [`Generation::next_token`].
pub fn continue_text(
    decoder: &Decoder,
    tokenizer: &Tokenizer,
    prompt: &str,
    tokens: usize,
    sampling: Sampling,
    each: impl Fn(usize),
) -> Result<String, TrainError> {
    let mut generation = Generation::start(decoder, tokenizer, prompt, sampling, 0)?;
    let mut ids = vec![];
    while ids.len() < tokens {
        each(ids.len());
        match generation.next_token()? {
            Some(id) => ids.push(id),
            None => break,
        }
    }
    Ok(tokenizer.decode(&ids)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampling(temperature: f64, top_k: Option<usize>, top_p: Option<f64>) -> Sampling {
        Sampling {
            temperature,
            top_k,
            top_p,
            seed: 0,
        }
    }

    /// Frequencies of 20,000 draws.
    fn frequencies(logits: &[f64], sampling: &Sampling) -> Vec<f64> {
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        let mut counts = vec![0.0; logits.len()];
        for _ in 0..20_000 {
            counts[draw(logits, sampling, &mut rng)] += 1.0 / 20_000.0;
        }
        counts
    }

    #[test]
    fn draws_follow_the_softmax_and_its_cuts() {
        let logits = [0.0, 2f64.ln(), 4f64.ln(), 1f64.ln()]; // weights 1 2 4 1
        for (sampling, expected) in [
            (sampling(0.0, None, None), [0.0, 0.0, 1.0, 0.0]),
            (sampling(1.0, None, None), [0.125, 0.25, 0.5, 0.125]),
            (
                sampling(1.0, Some(2), None),
                [0.0, 1.0 / 3.0, 2.0 / 3.0, 0.0],
            ),
            (sampling(1.0, None, Some(0.5)), [0.0, 0.0, 1.0, 0.0]),
            (
                sampling(0.5, None, None),
                [1.0 / 22.0, 4.0 / 22.0, 16.0 / 22.0, 1.0 / 22.0],
            ),
        ] {
            for (got, expected) in frequencies(&logits, &sampling).iter().zip(expected) {
                // 20,000 draws: the standard error is at most 0.0036; 4 of them.
                assert!((got - expected).abs() < 0.0145, "{sampling:?}: {got}");
            }
        }
    }
}
