//! Encoding at speed: the ids of frequent words are remembered.
//!
//! The pre-tokenizers of the GPT-2, GPT-4 / Llama 3 and Qwen families always cut text in these places:
//!
//! * before a space that is followed by a visible ASCII character (of several spaces, before the last),
//! * after a line feed that has a visible ASCII character on either side,
//! * after an ASCII letter or digit, before ASCII punctuation; and between an ASCII letter and a digit.
//!
//! No alternative of their patterns reaches across such a seam and none looks behind. Only `\s+(?!\S)` looks ahead: it
//! leaves the last space of a run to what follows, which is where the seam lies, and takes all of a run at the end of a
//! text. So the ids of a text are those of the words between its seams, one after the other, and a word seen before need
//! not be encoded again. Words that are new go through the tokenizers crate, as do all texts of tokenizers for which this
//! does not hold.

use std::collections::HashMap;

use tokenizers::{AddedToken, ModelWrapper};

use super::Tokenizer;
use crate::DataError;

/// Words remembered by an encoder, and the length up to which they are: some 30 MB.
const MAX_WORDS: usize = 1 << 18;
const MAX_WORD_BYTES: usize = 48;

/// Llama 3 and GPT-4.
pub(super) const GPT_4: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Qwen 2 to 3: digits one by one.
const QWEN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// A tokenizer with a memory for words; one for each thread.
pub(crate) struct Encoder {
    tokenizer: Tokenizer,
    /// `None`: the tokenizer is of another family.
    seams: Option<Seams>,
    /// Word to its place in `ids`.
    words: HashMap<Box<str>, (u32, u32)>,
    ids: Vec<u32>,
}

impl Encoder {
    pub fn new(tokenizer: Tokenizer) -> Self {
        let seams = Seams::of(&tokenizer.inner);
        Self {
            tokenizer,
            seams,
            words: HashMap::new(),
            ids: Vec::new(),
        }
    }

    /// Ids of `text`, the same as [`Tokenizer::encode`] gives.
    pub fn encode(&mut self, text: &str) -> Result<Vec<u32>, DataError> {
        let Some(seams) = &self.seams else {
            return self.tokenizer.encode(text);
        };
        let mut out = Vec::with_capacity(text.len() / 3);
        for word in seams.words(text) {
            if let Some(&(from, to)) = self.words.get(word) {
                out.extend_from_slice(&self.ids[from as usize..to as usize]);
                continue;
            }
            let ids = self.tokenizer.encode(word)?;
            out.extend_from_slice(&ids);
            if word.len() <= MAX_WORD_BYTES && self.words.len() < MAX_WORDS {
                let from = self.ids.len() as u32; // at most MAX_WORDS * MAX_WORD_BYTES in all
                self.ids.extend_from_slice(&ids);
                self.words
                    .insert(word.into(), (from, self.ids.len() as u32));
            }
        }
        Ok(out)
    }
}

/// The places where a tokenizer is sure to cut.
///
/// Added tokens are cut out of a text before all else, so no seam may lie inside one, nor in the white space before one:
/// that run then ends where the token begins, and looks ahead to nothing.
#[derive(Clone, Debug)]
struct Seams {
    /// Bit b: an added token begins with byte b.
    added_first: u128,
    /// At byte a, bit b: an added token has byte b after byte a.
    added_pairs: Box<[u128; 128]>,
}

impl Default for Seams {
    fn default() -> Self {
        Self {
            added_first: 0,
            added_pairs: Box::new([0; 128]),
        }
    }
}

impl Seams {
    /// The seams of `tokenizer`, if it is one of those that the head of this file speaks of.
    fn of(tokenizer: &tokenizers::Tokenizer) -> Option<Self> {
        let json = |part: Result<serde_json::Value, serde_json::Error>| part.unwrap_or_default();
        let normalizer = json(serde_json::to_value(tokenizer.get_normalizer()));
        // Unicode composition joins a mark to the character before it; no mark stands at a seam.
        let neutral = normalizer.is_null() || normalizer["type"] == "NFC";
        let pre_tokenizer = json(serde_json::to_value(tokenizer.get_pre_tokenizer()));
        let repeatable =
            matches!(tokenizer.get_model(), ModelWrapper::BPE(bpe) if bpe.dropout.is_none());
        // Special tokens are not cut out of the text: they are encoded as the characters they are.
        let added: Vec<_> = tokenizer
            .get_added_tokens_decoder()
            .into_values()
            .filter(|token| !token.special)
            .collect();
        // One with white space in it or around it could lie across a seam.
        let narrow = |token: &AddedToken| {
            !(token.lstrip
                || token.rstrip
                || token.single_word
                || token.content.contains(char::is_whitespace))
        };
        if !(neutral && is_known(&pre_tokenizer) && repeatable && added.iter().all(narrow)) {
            return None;
        }
        let mut seams = Self::default();
        for token in added {
            let bytes = token.content.as_bytes();
            if let Some(&first) = bytes.first() {
                seams.added_first |= bit(first);
            }
            for pair in bytes.windows(2).filter(|pair| pair[0].is_ascii()) {
                seams.added_pairs[usize::from(pair[0])] |= bit(pair[1]);
            }
        }
        Some(seams)
    }

    /// Cuts `text` at its seams.
    fn words<'t>(&self, text: &'t str) -> impl Iterator<Item = &'t str> {
        let mut rest = text;
        std::iter::from_fn(move || {
            if rest.is_empty() {
                return None;
            }
            let bytes = rest.as_bytes();
            let end = (1..bytes.len())
                .find(|&at| self.is_seam(bytes, at))
                .unwrap_or(bytes.len());
            let (word, after) = rest.split_at(end);
            rest = after;
            Some(word)
        })
    }

    /// Whether a seam lies before byte `at` (not the first), which is then a character boundary.
    fn is_seam(&self, bytes: &[u8], at: usize) -> bool {
        let visible = |at: usize| bytes.get(at).is_some_and(u8::is_ascii_graphic);
        let (before, after) = (bytes[at - 1], bytes[at]);
        match (before, after) {
            (_, b' ') => visible(at + 1) && self.added_first & bit(bytes[at + 1]) == 0,
            (b'\n', _) => {
                at >= 2 && visible(at - 2) && visible(at) && self.added_first & bit(after) == 0
            }
            _ => {
                let cut = match (before.is_ascii_alphabetic(), before.is_ascii_digit()) {
                    (true, _) => after.is_ascii_punctuation() || after.is_ascii_digit(),
                    (_, true) => after.is_ascii_punctuation() || after.is_ascii_alphabetic(),
                    _ => false,
                };
                cut && self.added_pairs[usize::from(before)] & bit(after) == 0
            }
        }
    }
}

/// The bit of an ASCII byte; none for others.
fn bit(byte: u8) -> u128 {
    if byte.is_ascii() { 1 << byte } else { 0 }
}

fn is_known(pre_tokenizer: &serde_json::Value) -> bool {
    let bytes = |part: &serde_json::Value, use_regex: bool| {
        part["type"] == "ByteLevel"
            && part["add_prefix_space"] == false
            && part["use_regex"] == use_regex
    };
    match pre_tokenizer["pretokenizers"].as_array().map(Vec::as_slice) {
        Some([split, last]) => {
            split["type"] == "Split"
                && split["behavior"] == "Isolated"
                && split["invert"] == false
                && split["pattern"]["Regex"]
                    .as_str()
                    .is_some_and(|regex| [GPT_4, QWEN].contains(&regex))
                && bytes(last, false)
        }
        Some(_) => false,
        None => bytes(pre_tokenizer, true),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokenizers::models::bpe::BPE;
    use tokenizers::pre_tokenizers::PreTokenizerWrapper;
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;
    use tokenizers::pre_tokenizers::sequence::Sequence;
    use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
    use tokenizers::{
        OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, SplitDelimiterBehavior,
    };

    use super::*;

    fn family(name: &str) -> PreTokenizerWrapper {
        let split = |regex: &str| {
            let pattern = SplitPattern::Regex(regex.into());
            let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false).unwrap();
            Sequence::new(vec![
                split.into(),
                ByteLevel::new(false, false, false).into(),
            ])
            .into()
        };
        match name {
            "GPT-2" => ByteLevel::new(false, false, true).into(),
            "GPT-4" => split(GPT_4),
            _ => split(QWEN),
        }
    }

    fn cuts(pre_tokenizer: &PreTokenizerWrapper, text: &str) -> Vec<String> {
        let mut text = PreTokenizedString::from(text);
        pre_tokenizer.pre_tokenize(&mut text).unwrap();
        let splits = text.get_splits(OffsetReferential::Original, OffsetType::Byte);
        splits
            .into_iter()
            .map(|(split, _, _)| split.to_string())
            .collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn pre_tokenizers_cut_at_every_seam(
            text in "([ \n\r\ta-cA1-3é日\u{a0}\u{300}\u{200d}\u{2028}.,'’\"(_-]|'s|'LL| \\(|\r\n|[!-~] [!-~]|[!-~]\n[!-~]){0,60}",
        ) {
            for name in ["GPT-2", "GPT-4", "Qwen"] {
                let pre_tokenizer = family(name);
                let whole = cuts(&pre_tokenizer, &text);
                let by_words: Vec<_> = Seams::default().words(&text).flat_map(|word| cuts(&pre_tokenizer, word)).collect();
                prop_assert_eq!(whole, by_words, "{}", name);
            }
        }
    }

    #[test]
    fn only_known_tokenizers_are_split() {
        let of = |pre_tokenizer: Option<PreTokenizerWrapper>| {
            let mut tokenizer = tokenizers::Tokenizer::new(BPE::default());
            tokenizer.with_pre_tokenizer(pre_tokenizer);
            Seams::of(&tokenizer).is_some()
        };
        for name in ["GPT-2", "GPT-4", "Qwen"] {
            assert!(of(Some(family(name))), "{name}");
        }
        assert!(!of(None));
        assert!(!of(Some(ByteLevel::new(true, false, true).into())));
        assert!(!of(Some(
            tokenizers::pre_tokenizers::whitespace::Whitespace.into()
        )));
    }

    /// A tokenizer with the bytes, some merges and an added token.
    fn small_tokenizer() -> Tokenizer {
        let dir = tempfile::tempdir().unwrap();
        let text = dir.path().join("x.txt");
        std::fs::write(
            &text,
            "the cat  sat\n    on (the) mat, <b1>1234</b1>\n\n".repeat(9),
        )
        .unwrap();
        let source = crate::SourceSpec::new("x", [text.to_string_lossy()]);
        crate::train_tokenizer(&[source], 290, dir.path()).unwrap();
        let mut tokenizer = Tokenizer::load(dir.path()).unwrap();
        tokenizer
            .inner
            .add_tokens([AddedToken::from("<b1>", false)])
            .unwrap();
        tokenizer
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn an_encoder_gives_the_tokenizer_s_ids(
            texts in prop::collection::vec("([ \n\tthecas1-3é(,]|  |<b1>|<|\n    |the|cat| mat){0,30}", 1..6),
        ) {
            thread_local! {
                static TOKENIZER: Tokenizer = small_tokenizer();
            }
            TOKENIZER.with(|tokenizer| {
                let mut encoder = Encoder::new(tokenizer.clone());
                prop_assert!(encoder.seams.is_some());
                for text in &texts {
                    prop_assert_eq!(encoder.encode(text).unwrap(), tokenizer.encode(text).unwrap());
                }
                Ok(())
            })?;
        }
    }

    #[test]
    fn an_added_token_with_white_space_forbids_seams() {
        let mut tokenizer = small_tokenizer();
        tokenizer
            .inner
            .add_tokens([AddedToken::from("cat mat", false)])
            .unwrap();
        assert!(Encoder::new(tokenizer).seams.is_none());
    }
}
