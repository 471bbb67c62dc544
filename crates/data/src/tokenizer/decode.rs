//! Text while it is being generated: a piece is shown as soon as it cannot change any more.

use super::Tokenizer;
use crate::DataError;

/// Turns ids into text one by one.
///
/// A character may span several tokens, and some decoders look at the neighbours (leading spaces), so the last tokens
/// are decoded together and only what is new is returned.
#[derive(Debug)]
pub struct StreamDecoder<'t> {
    tokenizer: &'t Tokenizer,
    /// Tokens shown already that give context, then the pending ones.
    ids: Vec<u32>,
    /// How many of `ids` were shown.
    shown: usize,
}

/// A UTF-8 character has at most four bytes, so longer waiting means that the bytes are no UTF-8 at all.
const MAX_PENDING: usize = 4;

impl<'t> StreamDecoder<'t> {
    pub(super) fn new(tokenizer: &'t Tokenizer) -> Self {
        Self {
            tokenizer,
            ids: Vec::new(),
            shown: 0,
        }
    }

    /// Takes the next token; returns the text that is complete now, if any.
    pub fn push(&mut self, id: u32) -> Result<Option<String>, DataError> {
        self.ids.push(id);
        let incomplete = |text: &str| text.ends_with(char::REPLACEMENT_CHARACTER);
        let text = self.pending()?;
        if text.is_empty() || (incomplete(&text) && self.ids.len() - self.shown < MAX_PENDING) {
            return Ok(None);
        }
        self.ids.drain(..self.shown);
        self.shown = self.ids.len();
        Ok(Some(text))
    }

    /// The text of tokens still held back: to be shown when generation ends.
    pub fn finish(self) -> Result<String, DataError> {
        self.pending()
    }

    fn pending(&self) -> Result<String, DataError> {
        let before = self.tokenizer.decode(&self.ids[..self.shown])?;
        let text = self.tokenizer.decode(&self.ids)?;
        match text.strip_prefix(&before) {
            Some(new) => Ok(new.to_string()),
            // The shown part ended inside a broken character that reads otherwise now.
            None => self.tokenizer.decode(&self.ids[self.shown..]),
        }
    }
}
