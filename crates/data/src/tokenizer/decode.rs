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

/// A UTF-8 character has at most four bytes: with fewer tokens waiting, the next one may complete it.
const WORTH_SPLITTING: usize = 4;
/// So many tokens that make no whole character are shown as they are.
const MAX_PENDING: usize = 16;

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
        let text = self.pending()?;
        let waiting = self.ids.len() - self.shown;
        if text.is_empty() {
            return Ok(None);
        }
        // The sign for broken bytes may be one, or the beginning of a character.
        if !text.ends_with(char::REPLACEMENT_CHARACTER) || waiting >= MAX_PENDING {
            return Ok(Some(self.show(waiting, text)));
        }
        if waiting >= WORTH_SPLITTING {
            return self.show_whole_characters(waiting, &text);
        }
        Ok(None)
    }

    /// The text of tokens still held back: to be shown when generation ends.
    pub fn finish(self) -> Result<String, DataError> {
        self.pending()
    }

    /// Shows as many waiting tokens as can be cut off between characters: both sides then read as they do together.
    fn show_whole_characters(
        &mut self,
        waiting: usize,
        text: &str,
    ) -> Result<Option<String>, DataError> {
        for count in (1..waiting).rev() {
            let (head, tail) = self.ids[self.shown..].split_at(count);
            let head = self.tokenizer.decode(head)?;
            if text.strip_prefix(&head) == Some(&self.tokenizer.decode(tail)?) {
                return Ok(Some(self.show(count, head)));
            }
        }
        Ok(None)
    }

    /// Counts the first `count` waiting tokens as shown; they are the context of the next.
    fn show(&mut self, count: usize, text: String) -> String {
        self.ids.drain(..self.shown);
        self.shown = count;
        text
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
