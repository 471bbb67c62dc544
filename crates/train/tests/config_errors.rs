//! What a user reads after a mistake in the configuration.

use std::path::Path;

use ttt_train::config::{Config, ConfigError, Place};

const GOOD: &str = r#"[run]
dir = "runs/test"

[model]
vocab_size = 512
hidden_size = 64
intermediate_size = 128
num_hidden_layers = 2
num_attention_heads = 4

[model.ttt]
enabled = true
every = 2
chunk = 16

[data]
path = "data/test"

[[data.sources]]
name = "text"
inputs = ["a.txt"]

[train]
steps = 100
sequence_length = 64
batch_tokens = 512
micro_batch_rows = 2

[optimizer]
lr = 1e-3
"#;

fn parse(text: &str, sets: &[&str]) -> Result<Config, ConfigError> {
    let sets: Vec<String> = sets.iter().map(ToString::to_string).collect();
    Config::parse(text, Path::new("run.toml"), &sets)
}

/// The message for `GOOD` with `from` replaced by `to`.
fn after_edit(from: &str, to: &str) -> String {
    assert!(GOOD.contains(from), "{from}");
    parse(&GOOD.replacen(from, to, 1), &[])
        .unwrap_err()
        .to_string()
}

fn after_set(set: &str) -> String {
    parse(GOOD, &[set]).unwrap_err().to_string()
}

#[test]
fn the_base_of_these_tests_is_good() {
    let config = parse(GOOD, &[]).unwrap();
    assert_eq!(config.train.micro_batches(), 4);
    assert_eq!(config.train.batch_rows(), 8);
    assert_eq!(config.checkpoint.keep, 3);
    assert_eq!(config.optimizer.weight_decay, 0.1);
}

#[test]
fn an_unknown_key_is_named_with_line_and_nearest() {
    assert_eq!(
        after_edit("batch_tokens", "batch_token"),
        "run.toml:26: unknown key train.batch_token; did you mean batch_tokens?"
    );
    assert_eq!(
        after_edit("chunk = 16", "chunk_size = 16"),
        "run.toml:14: unknown key model.ttt.chunk_size; did you mean chunk?"
    );
    assert_eq!(
        after_edit("[optimizer]", "[optimiser]"),
        "run.toml:29: unknown key optimiser; did you mean optimizer?"
    );
    assert_eq!(
        after_edit("inputs =", "files = [\"x\"]\ninputs ="),
        "run.toml:21: unknown key data.sources[0].files; \
         [data.sources[0]] has name, inputs, weight, text_key, document"
    );
}

#[test]
fn an_override_is_held_to_the_same_rules() {
    assert_eq!(
        after_set("train.stesp=5"),
        "--set train.stesp=5: unknown key train.stesp; did you mean steps?"
    );
    assert_eq!(
        after_set("trian.steps=5"),
        "--set trian.steps=5: unknown key trian; did you mean train?"
    );
    assert_eq!(
        after_set("train.steps=many"),
        "--set train.steps=many: train.steps: expected a whole number, 0 or more, found string \"many\""
    );
    assert_eq!(
        after_set("train.batch_tokens=500"),
        "--set train.batch_tokens=500: train.batch_tokens: 500 is no multiple of the 128 tokens that \
         go through the model at once (micro_batch_rows 2 x sequence_length 64): the nearest are 384 and 512"
    );
}

#[test]
fn an_override_that_is_none_is_explained() {
    for (set, problem) in [
        ("train.steps", "expected section.key=value, found no \"=\""),
        (
            "steps=3",
            "expected section.key=value, found no section before \"steps\"",
        ),
        ("=3", "expected section.key=value, found the key \"\""),
        (
            "train..steps=3",
            "expected section.key=value, found the key \"train..steps\"",
        ),
        (
            "train.steps.x=3",
            "train.steps is no section but an integer",
        ),
        (
            "run.dir=",
            "expected section.key=value, found nothing after \"=\" (an empty text is '\"\"')",
        ),
    ] {
        assert_eq!(after_set(set), format!("--set {set}: {problem}"));
    }
}

#[test]
fn overrides_take_toml_values_and_bare_words_in_order() {
    let config = parse(
        GOOD,
        &[
            "train.steps=7",
            "train.steps = 9",
            "run.dir=runs/other one",
            "optimizer.schedule=wsd",
            "model.layer_types=[\"full_attention\", \"sliding_attention\"]",
            "model.sliding_window=8",
            "checkpoint.at_end=false",
            "eval.sample_prompt=\"1\"",
        ],
    )
    .unwrap();
    assert_eq!(config.train.steps, 9);
    assert_eq!(config.run.dir, Path::new("runs/other one"));
    assert_eq!(config.model.window(1), Some(8));
    assert!(!config.checkpoint.at_end);
    assert_eq!(config.eval.sample_prompt.as_deref(), Some("1"));
}

#[test]
fn a_wrong_type_is_told_in_plain_words() {
    for (from, to, message) in [
        (
            "steps = 100",
            "steps = \"100\"",
            "run.toml:24: train.steps: expected a whole number, 0 or more, found string \"100\"",
        ),
        (
            "steps = 100",
            "steps = -1",
            "run.toml:24: train.steps: expected a whole number, 0 or more, found integer -1",
        ),
        (
            "steps = 100",
            "steps = 1.5",
            "run.toml:24: train.steps: expected a whole number, 0 or more, found floating point 1.5",
        ),
        (
            "lr = 1e-3",
            "lr = true",
            "run.toml:30: optimizer.lr: expected a number, found boolean true",
        ),
        (
            "enabled = true",
            "enabled = 1",
            "run.toml:12: model.ttt.enabled: expected true or false, found integer 1",
        ),
        (
            "dir = \"runs/test\"",
            "dir = 3",
            "run.toml:2: run.dir: expected a text in quotes, found integer 3",
        ),
        (
            "inputs = [\"a.txt\"]",
            "inputs = \"a.txt\"",
            "run.toml:21: data.sources[0].inputs: expected a list in brackets, found string \"a.txt\"",
        ),
    ] {
        assert_eq!(after_edit(from, to), message);
    }
}

#[test]
fn a_word_that_is_no_choice_is_told_the_choices() {
    assert_eq!(
        after_edit("[optimizer]", "activations = \"recompte\"\n[optimizer]"),
        "run.toml:29: train.activations: expected \"keep\" or \"recompute\", found \"recompte\"; \
         did you mean \"recompute\"?"
    );
    assert_eq!(
        after_set("run.device=tpu"),
        "--set run.device=tpu: run.device: expected \"cpu\" or \"cuda\", found \"tpu\""
    );
}

#[test]
fn what_is_missing_is_named() {
    assert_eq!(
        after_edit("steps = 100\n", ""),
        "run.toml:23: train.steps is missing; add steps = ... to [train]"
    );
    assert_eq!(
        after_edit("[run]\ndir = \"runs/test\"\n", ""),
        "run.toml: the section [run] is missing"
    );
}

#[test]
fn text_that_is_no_toml_is_placed() {
    let error = parse(&GOOD.replacen("steps = 100", "steps = ", 1), &[]).unwrap_err();
    let ConfigError::Syntax { place, .. } = &error else {
        panic!("{error}");
    };
    let path = Path::new("run.toml").to_path_buf();
    assert_eq!(*place, Place::Line { path, line: 24 });
    assert!(
        after_edit("steps = 100", "steps = 100\nsteps = 2")
            .starts_with("run.toml:25: not valid TOML: ")
    );
}

#[test]
fn a_missing_file_is_named() {
    let error = Config::load(Path::new("/nowhere/run.toml"), &[]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "cannot read the configuration /nowhere/run.toml: No such file or directory (os error 2)"
    );
}

#[test]
fn impossible_combinations_are_refused_with_a_remedy() {
    for (set, key, part) in [
        (
            "train.batch_tokens=64",
            "train.batch_tokens",
            "the least is 128",
        ),
        (
            "train.micro_batch_rows=0",
            "train.micro_batch_rows",
            "at least 1",
        ),
        ("train.steps=0", "train.steps", "at least 1"),
        ("run.profile_step=3", "run.profile_step", "of a GPU"),
        ("train.spike_factor=1.0", "train.spike_factor", "above 1"),
        (
            "train.batch_tokens=9000000000000000000",
            "train.batch_tokens",
            "at most 2^48",
        ),
        (
            "optimizer.warmup_steps=101",
            "optimizer.warmup_steps",
            "more than all 100 steps",
        ),
        ("optimizer.lr=nan", "optimizer.lr", "a positive number"),
        ("optimizer.lr=0", "optimizer.lr", "a positive number"),
        (
            "optimizer.grad_clip=-1",
            "optimizer.grad_clip",
            "zero or a positive number",
        ),
        ("optimizer.beta2=1.0", "optimizer.beta2", "0 <= beta < 1"),
        (
            "optimizer.min_lr_ratio=2",
            "optimizer.min_lr_ratio",
            "between 0 and 1",
        ),
        (
            "optimizer.decay_fraction=0.5",
            "optimizer.decay_fraction",
            "only schedule = \"wsd\"",
        ),
        ("checkpoint.keep=0", "checkpoint.keep", "at least 1"),
        ("parallel.shard=0", "parallel.shard", "from 1 to 2^14"),
        (
            "parallel.context=8",
            "train.sequence_length",
            "the least is 128",
        ),
        (
            "parallel.replicate=3",
            "train.batch_tokens",
            "the nearest are 384 and 576",
        ),
        (
            "parallel.timeout_s=1",
            "parallel.timeout_s",
            "between 2 and",
        ),
        ("data.path=\"\"", "data.path", "an empty text"),
        (
            "data.validation_fraction=1.0",
            "data.validation_fraction",
            "0 <= fraction < 1",
        ),
        (
            "data.tokenizer_vocab_size=1024",
            "data.tokenizer_vocab_size",
            "do not fit model.vocab_size",
        ),
        (
            "data.tokenizer_vocab_size=100",
            "data.tokenizer_vocab_size",
            "at least 257",
        ),
        (
            "data.shard_tokens=64",
            "data.shard_tokens",
            "does not hold one row",
        ),
        (
            "data.sources=[{name=\"a\",inputs=[]}]",
            "data.sources[0].inputs",
            "lists no input",
        ),
        (
            "data.sources=[{name=\"a\",inputs=[\"x\"]},{name=\"a\",inputs=[\"y\"]}]",
            "data.sources[1].name",
            "two sources are called \"a\"",
        ),
        (
            "data.sources=[{name=\"a\",inputs=[\"x\"],weight=0}]",
            "data.sources[0].weight",
            "a positive number",
        ),
        (
            "model.max_position_embeddings=32",
            "train.sequence_length",
            "raise that to at least 64",
        ),
        (
            "model.rope_scaling={rope_type=\"yarn\",factor=2.0,original_max_position_embeddings=16}",
            "model.rope_scaling",
            "raise the factor",
        ),
        ("model.ttt.chunk=64", "model.ttt.chunk", "at most 63"),
        (
            "model.num_attention_heads=5",
            "model.head_dim",
            "give head_dim",
        ),
        ("model.ttt.layers=[0]", "model.ttt.layers", "not both"),
        ("eval.rows=0", "eval.rows", "at least 1"),
        (
            "eval.sample_prompt=\"\"",
            "eval.sample_prompt",
            "an empty one",
        ),
    ] {
        let message = after_set(set);
        assert!(
            message.contains(&format!(": {key}: ")) || message.starts_with(key),
            "{message}"
        );
        assert!(message.contains(part), "{message}");
    }
    let both = parse(GOOD, &["data.tokenizer=x", "data.tokenizer_vocab_size=300"]);
    assert!(
        both.unwrap_err()
            .to_string()
            .contains("give one of the two")
    );
    let wsd = [
        "optimizer.schedule=wsd",
        "optimizer.decay_fraction=0.6",
        "optimizer.warmup_steps=50",
    ];
    assert!(
        parse(GOOD, &wsd)
            .unwrap_err()
            .to_string()
            .contains("a fall over 60")
    );
    let constant = ["optimizer.schedule=constant", "optimizer.min_lr_ratio=0.5"];
    assert!(
        parse(GOOD, &constant)
            .unwrap_err()
            .to_string()
            .contains("does not fall")
    );
    let blind = ["eval.every=5", "data.validation_fraction=0.0"];
    assert!(
        parse(GOOD, &blind)
            .unwrap_err()
            .to_string()
            .contains("must be above 0 where eval.every")
    );
    let timed = |step: &str| parse(GOOD, &["run.device=cuda", step]);
    assert!(timed("run.profile_step=99").is_ok());
    let error = timed("run.profile_step=100").unwrap_err().to_string();
    assert!(error.contains("the last is 99"), "{error}");
}

/// A choice that would change nothing is a mistake; the same choice where it counts is none.
#[test]
fn settings_of_ranks_without_effect_are_refused() {
    let (two, window) = ("parallel.context=2", "model.sliding_window=16");
    let off = "model.ttt.enabled=false";
    for (set, refused, says) in [
        (
            "parallel.shard_over_context=true",
            vec![],
            "or set parallel.context",
        ),
        (
            "parallel.context_states=chain",
            vec![],
            "or set parallel.context",
        ),
        (
            "parallel.context_payload=bf16",
            vec![],
            "or set parallel.context",
        ),
        (
            "parallel.context_attention=keys",
            vec![],
            "or set parallel.context",
        ),
        (
            "parallel.context_states=chain",
            vec![two, off],
            "no TTT layer",
        ),
        (
            "parallel.context_payload=bf16",
            vec![two, off],
            "no TTT layer",
        ),
        (
            "parallel.context_attention=keys",
            vec![two, window],
            "every layer has a window",
        ),
    ] {
        let error = parse(GOOD, &[[set].as_slice(), &refused].concat());
        let error = error.expect_err(set).to_string();
        let (key, _) = set.split_once('=').expect("a value");
        assert!(error.contains(key) && error.contains(says), "{error}");
        parse(GOOD, &[set, two]).expect("it counts");
    }
}

#[test]
fn what_goes_together_is_placed_where_it_was_given() {
    // The line of the key at fault, though an override made it wrong.
    let text = GOOD.replace("lr = 1e-3", "lr = 1e-3\nwarmup_steps = 10");
    let error = parse(&text, &["train.steps=5"]).unwrap_err().to_string();
    assert_eq!(
        error,
        "run.toml:31: optimizer.warmup_steps: 10 is more than all 5 steps of the run (train.steps)"
    );
}
