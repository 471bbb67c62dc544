//! Plans for several devices: what ranks really send, memory added up by hand, and proposals.

mod common;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use burn::tensor::Device;
use common::{Watched, joint, layout, on_ranks};
use ttt_data::Row;
use ttt_model::Unit;
use ttt_parallel::{Mesh, ProcessGroup};
use ttt_train::config::{Config, OnBadGradient};
use ttt_train::device::compute_dtype;
use ttt_train::init::initial_values;
use ttt_train::optimizer::{Updater, scalar};
use ttt_train::plan::{Among, Gpus, Plan, PlanError, Traffic, propose};
use ttt_train::sent::{self, Comparison};
use ttt_train::step::{MicroBatch, Model, RopeCache};
use ttt_train::units::UnitState;

const GIB: f64 = (1u64 << 30) as f64;

fn tiny(sets: &[&str]) -> Config {
    let text = "run.dir = \"run\"\ndata.path = \"data\"\n\
        train = { steps = 1, sequence_length = 48, batch_tokens = 384, micro_batch_rows = 2 }\n\
        optimizer.lr = 1e-3\n\
        [model]\nmodel_type = \"qwen3\"\nvocab_size = 67\nhidden_size = 16\n\
        intermediate_size = 24\nnum_hidden_layers = 3\nnum_attention_heads = 4\n\
        num_key_value_heads = 2\nhead_dim = 8\n\
        [model.ttt]\nenabled = true\nlayers = [0, 2]\nchunk = 4\n";
    // What ranks of a row exchange is refused without such ranks; here the layout comes later.
    let (parallel, sets): (Vec<&str>, Vec<&str>) =
        sets.iter().partition(|set| set.starts_with("parallel."));
    let sets: Vec<String> = sets.iter().map(ToString::to_string).collect();
    let mut config = Config::parse(text, "test".as_ref(), &sets).expect("a configuration");
    let of_parallel = parallel.iter().map(|set| {
        let (key, value) = set["parallel.".len()..].split_once('=').expect("a value");
        format!(
            "{key} = {}",
            if value.parse::<f64>().is_ok() {
                value.into()
            } else {
                format!("\"{value}\"")
            }
        )
    });
    let of_parallel: Vec<String> = of_parallel.collect();
    config.parallel = toml::from_str(&of_parallel.join("\n")).expect("settings of [parallel]");
    config
}

/// Bytes that groups of each kind were asked to send.
#[derive(Debug, Default)]
struct Counts([Arc<AtomicU64>; 4]);

const KINDS: [Among; 4] = [Among::Shard, Among::Replicas, Among::Context, Among::World];

impl Counts {
    fn watch(&self, kind: Among, inner: Arc<dyn ProcessGroup>) -> Arc<dyn ProcessGroup> {
        let at = KINDS.iter().position(|of| *of == kind).expect("a kind");
        let count = self.0[at].clone();
        Arc::new(Watched {
            inner,
            before: Box::new(move |_, bytes| {
                count.fetch_add(bytes, Ordering::Relaxed);
                Ok(())
            }),
            waited: None,
        })
    }

    fn of(&self) -> [u64; 4] {
        self.0.each_ref().map(|count| count.load(Ordering::Relaxed))
    }
}

/// One step of the program on one rank.
fn step(config: &Config, mesh: &Mesh) {
    let device = Device::flex();
    let compute = compute_dtype(config.run.device, config.train.compute);
    let unit = |unit| {
        let values = |spec: &_| Ok::<_, std::convert::Infallible>(initial_values(spec, 1));
        UnitState::new(&config.model, unit, mesh, &device, compute, values).expect("infallible")
    };
    let mut model = Model {
        config: config.model.clone(),
        units: Unit::all(&config.model).into_iter().map(unit).collect(),
        compute,
        device: device.clone(),
        rope: RopeCache::default(),
        context: config.parallel.context_settings(),
    };
    let skip = OnBadGradient::Skip;
    let mut updater = Updater::new(&config.optimizer, skip, None, 0.0, &device);
    let row = Row {
        input_ids: (0..48).map(|i| i % 67).collect(),
        labels: (1..49).map(|i| i % 67).collect(),
        document_starts: vec![0],
    };
    let rows = vec![row; config.train.batch_rows() / mesh.data_size()];
    let mut loss = scalar(0.0, &device);
    let micro_batches = rows.chunks(config.train.micro_batch_rows);
    let last = micro_batches.len() - 1;
    for (number, rows) in micro_batches.enumerate() {
        let micro = MicroBatch::new(rows, mesh, &device).expect("a batch");
        let micro = micro.last(number == last);
        let pass = model.accumulate(&micro, 0.01, config.train.activations, mesh);
        loss = loss + pass.expect("all ranks").loss;
    }
    let all = |value| sent::of(sent::LOSS, || mesh.all_reduce_sum(value));
    let labelled = all(scalar(1.0, &device)).expect("all ranks");
    all(loss).expect("all ranks");
    let updated = updater.update(&mut model.units, labelled, 1e-3, 0, mesh);
    updated.expect("all ranks");
}

/// Every line of the table has the same number twice, and the last is the total.
fn assert_printed_equal(table: &str, total: u64) {
    let lines = table.lines().skip(2); // the first is empty, the next the titles
    let numbers = lines.map(|line| {
        let (rest, planned) = line.trim_end().rsplit_once(' ').expect("two columns");
        let (_, counted) = rest.trim_end().rsplit_once(' ').expect("two columns");
        assert_eq!(counted, planned, "{table}");
        counted.replace(',', "").parse::<u64>().expect("a number")
    });
    assert_eq!(numbers.last(), Some(total), "{table}");
}

/// A run that sends something else than planned says so, of the units that do.
#[test]
fn what_was_not_planned_is_seen() {
    let layout = layout([1, 1, 2]);
    let [as_planned, halved] = ["f32", "bf16"].map(|payload| {
        let payload = format!("parallel.context_payload={payload}");
        tiny(&["model.sliding_window=20", &payload])
    });
    let tables = on_ranks(layout, |mesh| {
        let (watched, ledger) = sent::counted(mesh.clone());
        step(&as_planned, &watched);
        let sent = ledger.take();
        let rank = mesh.context.rank();
        [&as_planned, &halved].map(|config| Comparison::new(&sent, config, layout, rank))
    });
    for [equal, other] in &tables {
        assert!(equal.is_equal() && !other.is_equal(), "{equal}{other}");
    }
    let told = tables[0][1].to_string();
    let of_states = told
        .lines()
        .skip_while(|line| !line.contains("fast weights"));
    let line = of_states.into_iter().nth(1);
    // 16 x 24 in f32, once forward; the first rank sends nothing back.
    let words = line.expect("the layers that learn").split_whitespace();
    let numbers: Vec<&str> = words.skip(4).collect();
    assert_eq!(numbers, ["12,288", "6,144"], "{told}");
}

/// Every byte of the plan is sent, and no other.
#[test]
fn ranks_send_what_the_plan_says() {
    let window = "model.sliding_window=20";
    let recompute = "train.activations=recompute";
    let tied = "model.tie_word_embeddings=true";
    let payload = "parallel.context_payload=bf16";
    let [chain, gather] =
        ["chain", "all-gather"].map(|how| format!("parallel.context_states={how}"));
    let keys = "parallel.context_attention=keys";
    let cases: [&[&str]; 7] = [
        &[window],
        &[window, recompute, "train.micro_batch_rows=1", payload],
        &[tied, &chain, keys],
        &[tied, recompute, &gather],
        &["model.sliding_window=5"],
        &["model.ttt.enabled=false"],
        &[window, "train.compute=bf16"],
    ];
    for sets in cases {
        let config = tiny(sets);
        let shapes = [
            [1, 1, 1],
            [1, 2, 1],
            [1, 3, 1],
            [2, 1, 1],
            [1, 1, 2],
            [1, 1, 4],
            [2, 2, 1],
            [1, 2, 2],
            [2, 2, 2],
        ];
        let shared = shapes.into_iter().filter(|[_, _, context]| *context > 1);
        for (shape, layout) in shapes
            .into_iter()
            .map(|shape| (shape, layout(shape)))
            .chain(shared.map(|shape| (shape, joint(shape))))
        {
            if !config
                .train
                .batch_rows()
                .is_multiple_of(shape[0] * shape[1])
            {
                continue;
            }
            on_ranks(layout, |mesh| {
                let counts = Counts::default();
                let watched = Mesh {
                    world: counts.watch(Among::World, mesh.world.clone()),
                    replicate: counts.watch(Among::Replicas, mesh.replicate.clone()),
                    shard: counts.watch(Among::Shard, mesh.shard.clone()),
                    context: counts.watch(Among::Context, mesh.context.clone()),
                    replicas: counts.watch(Among::Replicas, mesh.replicas.clone()),
                    ..mesh.clone()
                };
                let (watched, ledger) = sent::counted(watched);
                step(&config, &watched);
                let told = ledger.take();
                let plan = Traffic::of(&config, layout, mesh.context.rank());
                let planned = KINDS.map(|kind| plan.bytes_among(kind));
                let rank = mesh.world.rank();
                assert_eq!(counts.of(), planned, "{sets:?} on {layout:?}, rank {rank}");
                // The same unit by unit, as a run prints it.
                let told = Comparison::new(&told, &config, layout, mesh.context.rank());
                assert!(
                    told.is_equal(),
                    "{sets:?} on {layout:?}, rank {rank}: {told}"
                );
                assert_eq!(told.counted(), plan.bytes());
                assert_printed_equal(&told.to_string(), plan.bytes());
            });
        }
    }
}

fn items(plan: &Plan) -> Vec<(&str, f64)> {
    let items = plan.memory.items.iter();
    items.map(|item| (item.name.as_str(), item.bytes)).collect()
}

/// Weights and traffic of a sharded model, added up by hand.
#[test]
fn sharded_weights_by_hand() {
    let config = tiny(&["train.activations=recompute", "model.sliding_window=5"]);
    // Embedding 67 · 16 = 1072; block: q 32 · 16, k and v 16 · 16, o 16 · 32, three of 24 · 16, norms 2 · 16 and
    // 2 · 8; of those that learn also W_t 16 · 16 and 5 taps of 16; head 1072 and 16.
    let plain = 2 * 512 + 2 * 256 + 3 * 384 + 48;
    let learning = plain + 256 + 80;
    let plan = Plan::on(&config, layout([1, 4, 1]));
    // Quarters, of W0 (24 · 16) apart, up to multiples of 256: 268, 684, 96, 672 and 272.
    let (embedding_part, plain_part, learning_part, head_part) = (512, 768, 256 + 768, 512);
    let blocks = plain_part + 2 * learning_part;
    let shard = f64::from(embedding_part + blocks + head_part);
    let items = items(&plan);
    assert_eq!(items[0], ("master weights, f32", 4.0 * shard));
    assert_eq!(items[1], ("AdamW moments, 2 x f32", 8.0 * shard));
    let pair = f64::from(plain + learning);
    assert_eq!(items[2].0, "gathered weights, f32");
    assert!(
        (items[2].1 / (4.0 * pair) - 1.0).abs() < 1e-12,
        "{:?}",
        items[2]
    );
    // One micro-batch: when it is at its fullest, only the head has a gradient.
    assert_eq!(items[3], ("gradients, f32", 4.0 * 1088.0 / 4.0));
    // 8 rows, 2 per rank, 2 at once: every shard goes to three others, those of blocks twice.
    let all = 3 * 4 * u64::from((embedding_part + 2 * blocks + head_part) as u32);
    let gather = &plan.traffic.items[0];
    assert_eq!((gather.name, gather.bytes), ("parameters, all-gather", all));
    assert_eq!(gather.per_layer, Some((3 * 4 * 1024, 3)));
}

/// Whole weights in bf16 are the upper halves of the master weights: nothing is held beside these.
#[test]
fn bf16_weights_take_no_memory_of_their_own() {
    let named = |shape, compute: &str| {
        let plan = Plan::on(&tiny(&[&format!("train.compute={compute}")]), layout(shape));
        let named = items(&plan).into_iter().take(3);
        named
            .map(|(name, bytes)| (name.to_string(), bytes))
            .collect::<Vec<_>>()
    };
    let [f32, bf16] = ["f32", "bf16"].map(|compute| named([1, 1, 1], compute));
    assert_eq!(bf16[0].0, "master weights, bf16 + 16 bits");
    assert_eq!(f32[0].0, "master weights, f32");
    assert_eq!((bf16[0].1, &bf16[1]), (f32[0].1, &f32[1]));
    assert!(f32[2].0.starts_with("gradients") && bf16[2].0.starts_with("gradients"));
    // What others hold is gathered, all but W0 (2 · 24 · 16) in half the bytes.
    let [f32, bf16] = ["f32", "bf16"].map(|compute| named([1, 2, 1], compute)[2].clone());
    assert_eq!(f32.0, "gathered weights, f32");
    assert_eq!(bf16.0, "gathered weights, bf16");
    assert_eq!(2.0 * bf16.1, f32.1 + 4.0 * f64::from(2 * 24 * 16));
}

/// Peaks of training runs on two H200 (docs/benchmarks.md), within the 5 % that a plan is to tell.
#[test]
fn predictions_are_near_the_measured_peaks() {
    let rows = |config: &str, tokens: usize, batch: usize, [shard, context]: [usize; 2]| {
        let sets = [
            format!("train.sequence_length={tokens}"),
            format!("train.micro_batch_rows={batch}"),
            format!("train.batch_tokens={}", tokens * batch * shard),
            format!("model.max_position_embeddings={tokens}"),
        ];
        let mut sets: Vec<&str> = sets.iter().map(String::as_str).collect();
        sets.push(match config {
            "14b" => "train.activations=recompute",
            _ => "train.activations=keep",
        });
        let plan = Plan::on(&shipped(config, &sets), layout([1, shard, context]));
        plan.memory.total_bytes() / GIB
    };
    for (config, tokens, batch, layout, peak) in [
        ("500m", 65_536, 1, [1, 1], 45.73),
        ("500m", 131_072, 1, [1, 2], 45.37),
        ("1.5b", 65_536, 1, [1, 1], 100.18),
        ("1.5b", 131_072, 1, [1, 2], 100.18),
        ("4b", 8192, 2, [2, 1], 85.59),
        ("4b", 8192, 3, [2, 1], 112.41),
        ("14b", 8192, 2, [2, 1], 127.05),
    ] {
        let planned = rows(config, tokens, batch, layout);
        let off = planned / peak - 1.0;
        assert!(
            off.abs() < 0.05,
            "{config} {layout:?}: {planned:.2}, not {peak}"
        );
    }
}

/// While the first micro-batch's activations are kept, there are no gradients but the head's; while the
/// second's are, there are all.
#[test]
fn gradients_of_the_first_pass_replace_activations() {
    let held = |batch_tokens: usize| {
        let sets = [
            "train.sequence_length=4096".to_string(),
            "train.micro_batch_rows=8".to_string(),
            "train.activations=keep".to_string(),
            format!("train.batch_tokens={batch_tokens}"),
        ];
        let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
        let plan = Plan::on(&shipped("500m", &sets), layout([1, 1, 1]));
        let items = items(&plan)
            .into_iter()
            .map(|(name, bytes)| (name.to_string(), bytes));
        let items: Vec<_> = items.collect();
        let found = items.iter().find(|(name, _)| name == "gradients, f32");
        (found.expect("an item").1, plan.memory.total_bytes() / GIB)
    };
    let (once, total) = held(8 * 4096);
    // lm_head and the last norm.
    assert_eq!(once, 4.0 * (32_000.0 * 1024.0 + 1024.0));
    // Measured on an H100 (docs/benchmarks.md).
    assert!((total / 25.20 - 1.0).abs() < 0.05, "{total}");
    let (twice, _) = held(2 * 8 * 4096);
    assert!(twice > 10.0 * once);
}

/// What one pass on one GPU leaves of products is bf16; where something is added to it, all is f32.
#[test]
fn gradients_of_products_are_narrow_until_they_are_added() {
    let held = |batch_tokens: usize, precision: &str, ranks| {
        let sets = [
            "train.sequence_length=2048".to_string(),
            format!("train.batch_tokens={batch_tokens}"),
            format!("train.compute={precision}"),
        ];
        let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
        let plan = Plan::on(&shipped("500m", &sets), layout(ranks));
        let items = plan.memory.items.into_iter();
        let mut found = items.filter(|item| item.name.starts_with("gradients"));
        let item = found.next().expect("an item");
        (item.name, item.bytes)
    };
    let square = 1024.0 * 1024.0;
    // q, k, v, o; gate, up and down of three squares each; W_t of four layers, whose down is W_0.
    let (w0, matrices) = (4.0 * 3.0 * square, 24.0 * 13.0 * square + 4.0 * square);
    // Gains, taps, embedding and head.
    let others = (49.0 + 4.0 * 5.0 + 2.0 * 32_000.0) * 1024.0;
    let narrow = 2.0 * (matrices - w0) + 4.0 * (w0 + others);
    let wide = 4.0 * (matrices + others);
    let (bf16, f32) = ("gradients, bf16".to_string(), "gradients, f32".to_string());
    assert_eq!(held(2048, "bf16", [1, 1, 1]), (bf16, narrow));
    assert_eq!(held(2048, "f32", [1, 1, 1]), (f32.clone(), wide));
    assert_eq!(held(4096, "bf16", [1, 1, 1]), (f32.clone(), wide));
    assert_eq!(held(4096, "bf16", [2, 1, 1]), (f32, wide));
}

fn shipped(name: &str, sets: &[&str]) -> Config {
    let sets: Vec<String> = sets.iter().map(ToString::to_string).collect();
    let configs = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../configs");
    Config::load(&configs.join(format!("{name}.toml")), &sets).expect("a configuration")
}

fn gpus(count: usize, gib: f64) -> Gpus {
    let memory_bytes = gib * GIB;
    Gpus {
        count,
        memory_bytes,
    }
}

#[test]
fn proposals() {
    let proposed = |config: &Config, gpus| propose(config, gpus, None).expect("a layout");
    // A small model is only replicated.
    let small = proposed(&shipped("500m", &[]), gpus(8, 80.0));
    assert_eq!(small.plan.layout, layout([8, 1, 1]), "{small}");
    // 16 bytes a parameter of 14.9 billion do not fit one GPU, nor two of 80 GiB.
    let large = shipped("14b", &[]);
    let two = proposed(&large, gpus(2, 139.0));
    assert_eq!(two.plan.layout.shard, 2, "{two}");
    let text = two.to_string();
    for part in [
        "shard = 2",
        "why:",
        "shard 1 would need",
        "all-gather",
        "total",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let refused = propose(&large, gpus(2, 80.0), None).expect_err("too large");
    assert!(matches!(refused, PlanError::Memory { .. }), "{refused}");
    let text = refused.to_string();
    assert!(
        text.contains("4 of these GPUs would do") && text.contains("GiB would do"),
        "{text}"
    );
    // One row of a step for eight GPUs: it must be shared.
    let one_row = ["train.batch_tokens=32768", "train.micro_batch_rows=1"];
    let shared = proposed(&shipped("500m", &one_row), gpus(8, 80.0));
    assert_eq!(shared.plan.layout.context, 8, "{shared}");
}

#[test]
fn given_layouts_are_taken_or_refused() {
    let config = shipped("500m", &[]);
    let given = |shape, count| propose(&config, gpus(count, 80.0), Some(layout(shape)));
    let taken = given([2, 2, 2], 8).expect("a layout");
    assert_eq!(taken.plan.layout, layout([2, 2, 2]));
    assert_eq!(taken.config.train, config.train);
    assert_eq!(taken.config.parallel.shard, 2);
    let refused = given([2, 2, 2], 4).expect_err("eight ranks").to_string();
    assert!(refused.contains("--gpus says 4"), "{refused}");
    let refused = given([7, 1, 1], 7)
        .expect_err("seven do not divide")
        .to_string();
    assert!(
        refused.contains("replicate 7") && refused.contains("train.batch_tokens"),
        "{refused}"
    );
    let refused = given([1, 1, 3], 3).expect_err("nor a row").to_string();
    assert!(refused.contains("parallel.context"), "{refused}");
    let cpu = shipped("quickstart", &[]);
    let refused = propose(&cpu, gpus(2, 80.0), None).expect_err("no GPU");
    assert!(refused.to_string().contains("run.device=cuda"), "{refused}");
}
