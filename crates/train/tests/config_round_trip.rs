//! A configuration survives being written and read; nothing in a file or an override panics.

use std::path::Path;

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use ttt_model::{LayerType, ModelConfig, ModelType, RopeScaling, Target, TttConfig};
use ttt_train::config::{
    Activations, CheckpointConfig, Config, DataConfig, DeviceKind, EvalConfig, InitConfig,
    LrOverride, OnBadGradient, OptimizerConfig, ParallelConfig, Precision, RunConfig, ScheduleKind,
    SourceConfig, TrainConfig,
};

const QUICKSTART: &str = include_str!("../../../configs/quickstart.toml");

fn model() -> impl Strategy<Value = ModelConfig> {
    let types = prop_oneof![
        Just(ModelType::Llama),
        Just(ModelType::Qwen2),
        Just(ModelType::Qwen3)
    ];
    let target = prop_oneof![
        Just(Target::Embedding),
        Just(Target::Hidden),
        Just(Target::NextToken)
    ];
    let scaling = prop_oneof![
        Just(None),
        (1.0..64.0f64).prop_map(|factor| Some(RopeScaling::Llama3 {
            factor,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        })),
        (1.0..64.0f64, option::of(0.5..2.0f64)).prop_map(|(factor, attention_factor)| {
            Some(RopeScaling::Yarn {
                factor,
                original_max_position_embeddings: 4096,
                beta_fast: 32.0,
                beta_slow: 1.0,
                attention_factor,
            })
        }),
    ];
    let ttt = (
        any::<bool>(),
        1..32usize,
        0.0..10.0f64,
        target,
        any::<bool>(),
        option::of(1e-9..1.0f64),
    );
    (
        types,
        257..200_000usize,
        1..64usize,
        1..9usize,
        scaling,
        any::<[bool; 4]>(),
        1.0..1e7f64,
        ttt,
    )
        .prop_map(
            |(model_type, vocab_size, width, heads, rope_scaling, flags, rope_theta, ttt)| {
                ModelConfig {
                    model_type,
                    vocab_size,
                    hidden_size: 8 * width,
                    intermediate_size: 16 * width,
                    num_hidden_layers: 3,
                    num_attention_heads: heads,
                    num_key_value_heads: flags[0].then_some(1),
                    head_dim: Some(8),
                    rms_norm_eps: 1e-6,
                    rope_theta,
                    rope_scaling,
                    max_position_embeddings: 4096,
                    tie_word_embeddings: flags[1],
                    sliding_window: flags[2].then_some(64),
                    layer_types: (flags[2] && flags[3]).then(|| {
                        vec![
                            LayerType::FullAttention,
                            LayerType::SlidingAttention,
                            LayerType::FullAttention,
                        ]
                    }),
                    initializer_range: 0.02,
                    ttt: TttConfig {
                        enabled: ttt.0,
                        layers: flags[3].then(|| vec![0, 2]),
                        every: (!flags[3]).then_some(2),
                        chunk: ttt.1,
                        lr: ttt.2,
                        target: ttt.3,
                        projection: ttt.4,
                        conv_kernel: 5,
                        clip: ttt.5,
                    },
                }
            },
        )
}

fn data() -> impl Strategy<Value = DataConfig> {
    let source = (vec("[^\\x00]{1,8}", 1..3), 1e-6..1e6f64, "\\PC{0,4}").prop_map(
        |(inputs, weight, key)| {
            let mut source = SourceConfig::new("", inputs);
            source.weight = weight;
            source.text_key = key;
            source
        },
    );
    (
        "\\PC{1,12}",
        option::of("\\PC{1,12}"),
        1e-6..0.5f64,
        100..1_000_000usize,
        vec(source, 0..3),
    )
        .prop_map(
            |(path, tokenizer, validation_fraction, shard_tokens, mut sources)| {
                for (i, source) in sources.iter_mut().enumerate() {
                    source.name = format!("source-{i}");
                }
                DataConfig {
                    path: path.into(),
                    tokenizer_vocab_size: tokenizer.is_none().then_some(257),
                    tokenizer,
                    validation_fraction,
                    shard_tokens,
                    sources,
                }
            },
        )
}

fn train() -> impl Strategy<Value = TrainConfig> {
    (
        1..1_000_000u64,
        33..99usize,
        1..5usize,
        1..5usize,
        any::<[bool; 3]>(),
        option::of(1.01..1e3f64),
    )
        .prop_map(
            |(steps, sequence_length, rows, micro, flags, spike_factor)| TrainConfig {
                steps,
                sequence_length,
                batch_tokens: sequence_length * rows * micro,
                micro_batch_rows: rows,
                activations: if flags[0] {
                    Activations::Keep
                } else {
                    Activations::Recompute
                },
                compute: flags[1].then_some(if flags[0] {
                    Precision::F32
                } else {
                    Precision::Bf16
                }),
                deterministic: flags[0] && flags[2],
                on_bad_gradient: if flags[2] {
                    OnBadGradient::Skip
                } else {
                    OnBadGradient::Abort
                },
                spike_factor,
                log_every: 1 + steps / 3,
            },
        )
}

fn optimizer() -> impl Strategy<Value = OptimizerConfig> {
    let schedule = prop_oneof![
        Just(ScheduleKind::Cosine),
        Just(ScheduleKind::Wsd),
        Just(ScheduleKind::Constant)
    ];
    (
        1e-9..10.0f64,
        schedule,
        any::<[bool; 2]>(),
        0.0..1.0f64,
        0.0..1.0f64,
    )
        .prop_map(
            |(lr, schedule, flags, beta1, min_lr_ratio)| OptimizerConfig {
                lr,
                min_lr_ratio: if schedule == ScheduleKind::Constant {
                    0.1
                } else {
                    min_lr_ratio
                },
                warmup_steps: 0,
                schedule,
                decay_fraction: if schedule == ScheduleKind::Wsd {
                    0.7
                } else {
                    0.2
                },
                beta1,
                beta2: 0.95,
                eps: 1e-8 * lr,
                weight_decay: if flags[0] { 0.0 } else { lr },
                grad_clip: if flags[1] { 0.0 } else { 1.0 / lr },
                overrides: vec![
                    LrOverride {
                        pattern: "model.layers.*".into(),
                        lr_scale: beta1
                    };
                    flags[0].into()
                ],
            },
        )
}

fn parallel() -> impl Strategy<Value = ParallelConfig> {
    use ttt_kernels::context::{AttentionExchange, Payload, StateExchange};
    let settings = (
        0..4usize,
        any::<bool>(),
        0..3usize,
        2..100u64,
        any::<bool>(),
    );
    settings.prop_map(|(states, half, attention, timeout_s, one)| ParallelConfig {
        // Every step has one row at least; more ranks would have to divide it.
        replicate: one.then_some(1),
        context_states: [
            StateExchange::Auto,
            StateExchange::AllToAll,
            StateExchange::Chain,
            StateExchange::AllGather,
        ][states],
        context_payload: if half { Payload::Bf16 } else { Payload::F32 },
        context_attention: [
            AttentionExchange::Auto,
            AttentionExchange::Keys,
            AttentionExchange::Heads,
        ][attention],
        timeout_s,
        shard_over_context: half != one,
        ..ParallelConfig::default()
    })
}

/// The same with two ranks to a row where these divide it, and without what would change nothing.
fn with_effect(
    mut parallel: ParallelConfig,
    model: &ModelConfig,
    train: &TrainConfig,
) -> ParallelConfig {
    use ttt_kernels::context::AttentionExchange;
    let default = ParallelConfig::default();
    let learns = !model.ttt_layers().is_empty();
    let chunk = if learns { model.ttt.chunk } else { 1 };
    if train.sequence_length.is_multiple_of(2 * chunk) {
        parallel.context = 2;
    }
    parallel.shard_over_context &= parallel.context > 1;
    if parallel.context == 1 || !learns {
        parallel.context_states = default.context_states;
        parallel.context_payload = default.context_payload;
    }
    let full = (0..model.num_hidden_layers).any(|layer| model.window(layer).is_none());
    let divide = model.kv_heads().is_multiple_of(2);
    let heads = parallel.context_attention == AttentionExchange::Heads;
    if parallel.context == 1 || !full || (heads && !divide) {
        parallel.context_attention = default.context_attention;
    }
    parallel
}

prop_compose! {
    fn config()(
        model in model(), data in data(), train in train(), optimizer in optimizer(),
        dir in "\\PC{1,12}", seed in 0..=i64::MAX as u64, cuda: bool,
        checkpoint in (any::<u32>(), 1..9usize, any::<bool>()),
        eval in (any::<u32>(), 1..99usize, option::of("(?s).{1,20}"), 1..99usize),
        init in option::of(("\\PC{1,12}", option::of("\\PC{1,12}"))),
        parallel in parallel(),
    ) -> Config {
        let parallel = with_effect(parallel, &model, &train);
        Config {
            run: RunConfig {
                dir: dir.into(), device: if cuda { DeviceKind::Cuda } else { DeviceKind::Cpu }, seed,
                profile_step: cuda.then(|| seed % train.steps),
            },
            init: init.map(|(from, revision)| InitConfig { from, revision }),
            model, data, train, optimizer, parallel,
            checkpoint: CheckpointConfig { every: checkpoint.0.into(), keep: checkpoint.1, at_end: checkpoint.2 },
            eval: EvalConfig { every: eval.0.into(), rows: eval.1, sample_prompt: eval.2, sample_tokens: eval.3 },
        }
    }
}

proptest! {
    #[test]
    fn written_and_read_it_is_the_same(config in config()) {
        config.validate().unwrap();
        let text = config.to_toml().unwrap();
        let read = Config::parse(&text, Path::new("copy.toml"), &[]).unwrap();
        prop_assert_eq!(read, config);
    }

    #[test]
    fn no_text_panics(text in "(?s).{0,200}", set in "(?s).{0,40}") {
        let _ = Config::parse(&text, Path::new("x"), &[set]);
    }

    /// Damage to a good file reaches further in than noise.
    #[test]
    fn no_damage_panics(
        cuts in vec((any::<prop::sample::Index>(), 0..30usize, "(\\PC|\n){0,6}"), 1..4),
        set in "[a-z.]{1,20}=[\\[\\]{}\"'0-9a-z.,= ]{0,20}",
    ) {
        let mut text: Vec<char> = QUICKSTART.chars().collect();
        for (at, len, instead) in cuts {
            let begin = at.index(text.len().max(1));
            let end = (begin + len).min(text.len());
            text.splice(begin.min(end)..end, instead.chars());
        }
        let text: String = text.into_iter().collect();
        if let Err(error) = Config::parse(&text, Path::new("x"), &[set]) {
            prop_assert!(!error.to_string().is_empty());
        }
    }

    /// A known key with any kind of value.
    #[test]
    fn no_value_panics(
        key in prop::sample::select(vec![
            "run", "run.seed", "run.profile_step", "model.rope_scaling", "model.layer_types", "model.ttt.layers",
            "train.steps", "train.batch_tokens", "train.sequence_length", "optimizer.decay_fraction", "data.sources",
            "data.shard_tokens", "eval", "model.ttt", "optimizer.lr", "parallel", "parallel.replicate",
            "parallel.shard", "parallel.context", "parallel.context_states", "parallel.timeout_s",
        ]),
        value in prop::sample::select(vec![
            "1", "-1", "0", "9223372036854775807", "18446744073709551615", "1e400", "nan", "inf", "\"\"", "[]", "{}",
            "[1, 2]", "[{}]", "{rope_type = \"yarn\"}", "{rope_type = \"no\"}", "2026-01-01", "true", "''",
            "{a = {b = [1]}}", "0x10",
        ]),
    ) {
        let _ = Config::parse(QUICKSTART, Path::new("x"), &[format!("{key}={value}")]);
    }
}
