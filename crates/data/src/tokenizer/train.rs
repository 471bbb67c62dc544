//! Byte-level BPE: any text has ids, no unknown token exists, and decoding gives the bytes back.

use std::path::{Path, PathBuf};
use std::sync::mpsc::sync_channel;

use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, SplitDelimiterBehavior,
    TokenizerImpl,
};

use super::TOKENIZER_FILE;
use super::words::GPT_4;
use crate::source::{BadRecords, ReadOptions, SourceSpec, discover, pieces, read_documents};
use crate::{DataError, durable};

/// The token that ends documents in tokenizers trained here.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// What a training run gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenizerTraining {
    /// The file that was written.
    pub path: PathBuf,
    /// Tokens in the vocabulary; fewer than asked for when the text has too few pairs to merge.
    pub vocab_size: usize,
    /// Documents read.
    pub documents: u64,
    /// Bytes of text read.
    pub text_bytes: u64,
}

type Bpe = TokenizerImpl<
    BPE,
    NormalizerWrapper,
    PreTokenizerWrapper,
    PostProcessorWrapper,
    DecoderWrapper,
>;

/// Trains a byte-level BPE of `vocab_size` tokens with `<|endoftext|>` on all text of `inputs` and writes it to `out`: a
/// `.json` file, or a folder that gets a `tokenizer.json`; a tokenizer_config.json goes beside it. The same text in any
/// order gives the same file. Memory grows with the number of different words, not with the text.
pub fn train_tokenizer(
    inputs: &[SourceSpec],
    vocab_size: usize,
    out: &Path,
) -> Result<TokenizerTraining, DataError> {
    if vocab_size < 257 {
        return Err(DataError::setting(
            "vocab_size",
            format!("{vocab_size} is below 257: 256 bytes and {END_OF_TEXT}"),
        ));
    }
    let (folder, path) = if out.extension().is_some_and(|extension| extension == "json") {
        (
            out.parent().unwrap_or(Path::new("")).to_path_buf(),
            out.to_path_buf(),
        )
    } else {
        (out.to_path_buf(), out.join(TOKENIZER_FILE))
    };
    let options = ReadOptions {
        bad_records: BadRecords::Refuse,
        ..ReadOptions::default()
    };
    let sources = inputs
        .iter()
        .map(|spec| discover(spec, crate::source::hub::offline_by_environment()))
        .collect::<Result<Vec<_>, _>>()?;

    let failed = |error: tokenizers::Error| DataError::Tokenizer(error.to_string());
    let mut bpe = untrained().map_err(failed)?;
    let mut trainer = BpeTrainerBuilder::new()
        .vocab_size(vocab_size)
        .min_frequency(2)
        .show_progress(false)
        .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();

    let (sender, texts) = sync_channel::<String>(256);
    let (read, trained) = std::thread::scope(|scope| {
        let reader = scope.spawn(move || {
            let (mut documents, mut text_bytes) = (0u64, 0u64);
            for source in &sources {
                read_documents(source, &options, 0, &mut |document| {
                    let Some(text) = document.text(&source.spec.text_key, options.bad_records)?
                    else {
                        return Ok(true);
                    };
                    documents += 1;
                    text_bytes += text.len() as u64;
                    Ok(pieces(&text).all(|piece| sender.send(piece.to_string()).is_ok()))
                })?;
            }
            Ok((documents, text_bytes))
        });
        let trained = bpe.train(&mut trainer, texts.into_iter()).map(|_| ());
        // A panic in the reader is a bug of this crate; it goes on as one.
        (
            reader
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            trained,
        )
    });
    let (documents, text_bytes) = read?;
    trained.map_err(failed)?;
    if text_bytes == 0 {
        let names: Vec<_> = inputs.iter().map(|spec| spec.name.as_str()).collect();
        return Err(DataError::EmptyDataset {
            sources: names.join(", "),
        });
    }

    let trained_size = bpe.get_vocab_size(true);
    if trained_size < vocab_size {
        tracing::warn!(
            trained_size,
            vocab_size,
            "the text gives fewer tokens than asked for"
        );
    }
    std::fs::create_dir_all(&folder).map_err(DataError::io(&folder, "create the folder"))?;
    let json = bpe.to_string(true).map_err(failed)?;
    durable::write_atomically(&path, |writer| writer.write_all(json.as_bytes()))?;
    let config = serde_json::json!({ "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT });
    let config_path = path.with_file_name("tokenizer_config.json");
    durable::write_atomically(&config_path, |writer| writeln!(writer, "{config:#}"))?;
    Ok(TokenizerTraining {
        path,
        vocab_size: trained_size,
        documents,
        text_bytes,
    })
}

fn untrained() -> Result<Bpe, tokenizers::Error> {
    // Contractions, letters with one leading mark, digits by threes, punctuation with its line ends, white space.
    let words = Split::new(
        SplitPattern::Regex(GPT_4.into()),
        SplitDelimiterBehavior::Isolated,
        false,
    )?;
    let bytes = ByteLevel::new(false, false, false);
    let mut bpe = Bpe::new(BPE::default());
    bpe.with_pre_tokenizer(Some(Sequence::new(vec![words.into(), bytes.into()])))
        .with_decoder(Some(ByteLevel::new(false, false, false)));
    Ok(bpe)
}
