//! Continuing a model that transformers saved: step 0 is that model, and what comes of it goes back.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Output;

use serde_json::{Value, json};
use support::{Run, stderr};
use ttt_train::interop::{HfFolder, import};
use ttt_train::open::Opened;

const REPOSITORY: &str = env!("CARGO_MANIFEST_DIR");

const CONFIG: &str = r#"
[run]
dir = "run"
seed = 3

[init]
from = "base"

[model.ttt]
enabled = true
layers = [1]
chunk = 16
lr = 0.3
target = "hidden"

[data]
path = "shards"
validation_fraction = 0.0

[[data.sources]]
name = "text"
inputs = ["text.txt"]

[train]
steps = 20
sequence_length = 64
batch_tokens = 256
micro_batch_rows = 2

[optimizer]
lr = 3e-3
"#;

/// One token per printable ASCII character and line feed, and the special tokens of ChatML: 99 ids,
/// `more` beyond them. Texts begin with <|im_end|>, which stands for LLaMA's <|begin_of_text|>.
fn tokenizer(more: usize) -> String {
    let characters = (' '..='~').chain(['\n']).map(String::from);
    let extra = (0..more).map(|i| format!("extra{i}"));
    let vocab: BTreeMap<String, usize> = characters.zip(0..).collect();
    let special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"].map(String::from);
    let added = special.into_iter().chain(extra).zip(vocab.len()..);
    let added: Vec<Value> = added
        .map(|(content, id)| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true})
        })
        .collect();
    let begin = json!({"SpecialToken": {"id": "<|im_end|>", "type_id": 0}});
    let text = |id: &str| json!({"Sequence": {"id": id, "type_id": 0}});
    let begins = json!({"type": "TemplateProcessing", "single": [begin, text("A")],
        "pair": [begin, text("A"), text("B")], "special_tokens": {"<|im_end|>":
            {"id": "<|im_end|>", "ids": [98], "tokens": ["<|im_end|>"]}}});
    json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": null, "pre_tokenizer": null, "post_processor": begins,
        "decoder": {"type": "Fuse"},
        "model": {"type": "BPE", "dropout": null, "unk_token": null,
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
            "byte_fallback": false, "vocab": vocab, "merges": []}})
    .to_string()
}

const TEMPLATE: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n\
                        {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// A folder with the tiny Qwen3 of the parity test as `base`, a text, and the configuration above.
fn run() -> Run {
    let run = Run::new(1);
    fs::write(run.path("config.toml"), CONFIG).unwrap();
    let base = run.path("base");
    fs::create_dir(&base).unwrap();
    copy(&Path::new(REPOSITORY).join("tests/hf/qwen3"), &base);
    fs::write(base.join("tokenizer.json"), tokenizer(0)).unwrap();
    let settings = json!({"eos_token": "<|endoftext|>", "chat_template": TEMPLATE});
    fs::write(base.join("tokenizer_config.json"), settings.to_string()).unwrap();
    let line = "It is a truth universally acknowledged, that a single man is in want of a wife.\n";
    fs::write(run.path("text.txt"), line.repeat(400)).unwrap();
    run
}

fn copy(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
}

fn well(output: Output) -> String {
    assert!(output.status.success(), "{}", stderr(&output));
    String::from_utf8(output.stdout).unwrap()
}

fn ttt(run: &Run, args: &[&str]) -> String {
    well(run.ttt(args).output().unwrap())
}

/// Step 0 computes the base model's loss bit for bit; twenty steps later TTT matters; the exported
/// folder, read back, has the checkpoint's logits bit for bit.
#[test]
fn a_model_is_continued_and_handed_back() {
    let with = run();
    with.train_well(&[]);
    let without = run();
    without.train_well(&["--set", "model.ttt.enabled=false"]);
    let (on, off) = (with.steps(), without.steps());
    assert_eq!((on.len(), off.len()), (20, 20));
    assert_eq!(on[0]["loss"], off[0]["loss"]);
    assert_ne!(on[19]["loss"], off[19]["loss"], "TTT never did anything");
    let loss = |line: &Value| line["loss"].as_f64().unwrap();
    assert!(
        loss(&on[19]) < loss(&on[0]) - 0.5,
        "{} to {}",
        on[0],
        on[19]
    );

    // A checkpoint needs the folder no more.
    fs::remove_dir_all(with.path("base")).unwrap();
    let newest = with.newest();
    let saved = fs::read_to_string(newest.join("config.toml")).unwrap();
    for part in ["[init]", "hidden_size = 32", "rope_theta = 1000000.0"] {
        assert!(saved.contains(part), "no {part} in {saved}");
    }
    ttt(&with, &["export", "run", "--out", "hf", "--dtype", "f32"]);
    let exported = HfFolder::open(&with.path("hf")).unwrap();
    assert_eq!(exported.config.ttt_layers(), [1]);
    assert!(with.path("hf/tokenizer_config.json").is_file());
    import(&with.path("hf"), &with.path("again")).unwrap();
    let ids: Vec<u32> = (0..50).map(|i| i * 7 % 96).collect();
    let logits = |path: &Path| {
        let decoder = Opened::new(path, None).unwrap().decoder().unwrap();
        let logits = decoder.extend(&mut decoder.session(), &ids);
        logits.into_data().try_into_vec::<f32>().unwrap()
    };
    let trained = logits(&newest);
    assert!(trained == logits(&with.path("again")));

    // Control: the comparison sees the model without TTT.
    ttt(
        &without,
        &["export", "run", "--out", "hf", "--dtype", "f32"],
    );
    import(&without.path("hf"), &without.path("again")).unwrap();
    assert!(trained != logits(&without.path("again")));

    // And the folder begins another run, whose TTT layers are not new.
    with.train_well(&[
        "--set",
        "init.from=hf",
        "--set",
        "run.dir=next",
        "--set",
        "train.steps=1",
    ]);
    let next = fs::read_to_string(with.path("next/metrics.jsonl")).unwrap();
    let first: Value = serde_json::from_str(next.lines().next().unwrap()).unwrap();
    assert!(loss(&first) < loss(&on[0]) - 0.5, "{first}");
}

/// A checkpoint goes before the folder; the context can be extended; the hub's commit is recorded.
#[test]
fn a_run_says_where_it_came_from() {
    let run = run();
    let yarn =
        "model.rope_scaling={rope_type='yarn',factor=2.0,original_max_position_embeddings=32768}";
    run.train_well(&["--set", "train.steps=2", "--set", yarn]);
    run.train_well(&["--set", "train.steps=3", "--set", yarn]);
    assert_eq!(run.steps().len(), 3, "the run began anew");
    let saved = fs::read_to_string(run.newest().join("config.toml")).unwrap();
    assert!(saved.contains("yarn"), "{saved}");

    // Another tokenizer than the model's is taken where it is named, and not in silence.
    let told = |args: &[&str]| {
        let output = run.train(args);
        let text = stderr(&output) + &well(output);
        text.contains("another tokenizer")
    };
    fs::write(run.path("other.json"), tokenizer(0) + "\n").unwrap();
    let other = [
        "data.path=other",
        "data.tokenizer=other.json",
        "run.dir=other-run",
        "train.steps=1",
    ];
    let other: Vec<&str> = other.iter().flat_map(|set| ["--set", set]).collect();
    assert!(told(&other));
    assert!(!told(&[
        "--set",
        "run.dir=own-run",
        "--set",
        "train.steps=1"
    ]));

    let commit = "0123456789abcdef0123456789abcdef01234567";
    let repository = run.path("cache/models--owner--tiny");
    let snapshot = repository.join("snapshots").join(commit);
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir_all(repository.join("refs")).unwrap();
    fs::write(repository.join("refs/main"), commit).unwrap();
    copy(&run.path("base"), &snapshot);
    let hub = |revision: &str| {
        let sets = [
            "init.from=hub:owner/tiny",
            "run.dir=hub",
            "train.steps=1",
            revision,
        ];
        let sets = sets.iter().flat_map(|set| ["--set", set]);
        let args: Vec<&str> = ["train", "config.toml"].into_iter().chain(sets).collect();
        run.ttt(&args)
            .env("HF_HUB_CACHE", run.path("cache"))
            .env("HF_HUB_OFFLINE", "1")
            .output()
            .unwrap()
    };
    let missing = hub("init.revision=v2");
    assert_eq!(missing.status.code(), Some(2), "{}", stderr(&missing));
    well(hub("init.revision=main"));
    let saved = run.path("hub/checkpoints/step-00000001/config.toml");
    let saved = fs::read_to_string(saved).unwrap();
    assert!(
        saved.contains(&format!("revision = \"{commit}\"")),
        "{saved}"
    );
}

#[test]
fn folders_that_do_not_fit_are_refused_first() {
    let run = run();
    let refused = |sets: &[&str], words: &[&str]| {
        let sets = sets.iter().flat_map(|set| ["--set", set]);
        let args: Vec<&str> = ["train", "config.toml"].into_iter().chain(sets).collect();
        let output = run.ttt(&args).output().unwrap();
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {text}");
        for word in words {
            assert!(text.contains(word), "{args:?}: no {word:?} in: {text}");
        }
        assert!(!run.path("shards").exists(), "{args:?}: shards were built");
    };
    refused(
        &["init.from=nowhere"],
        &["init.from", "nowhere", "hub:nowhere"],
    );
    refused(&["init.revision=main"], &["init.revision", "hub"]);
    refused(&["init.form=base"], &["init.form", "from"]);
    refused(
        &["model.hidden_size=64"],
        &["model.hidden_size", "64", "32"],
    );
    refused(&["model.rope_theta=1e4"], &["model.rope_theta"]);
    refused(&["model.ttt.layers=[2]"], &["layer 2", "2 layers"]);
    fs::write(run.path("base/tokenizer.json"), tokenizer(3)).unwrap();
    refused(&[], &["102 ids", "101"]);
    fs::remove_file(run.path("base/config.json")).unwrap();
    refused(&[], &["config.json"]);
}

/// Chats are written by the model's template; stop strings end a text wherever tokens are cut;
/// prompts of different lengths do not know of each other.
#[test]
fn a_continued_model_answers() {
    let run = run();
    run.train_well(&[]);
    let said = |args: &[&str]| {
        let head = ["generate", "run", "--greedy", "--max-tokens", "24"];
        ttt(&run, &head.iter().chain(args).copied().collect::<Vec<_>>())
    };
    let (short, long) = ("It is", "that a single man is in want");
    let (one, two) = (said(&["--prompt", short]), said(&["--prompt", long]));
    assert_eq!(
        said(&["--prompt", short, "--prompt", long]),
        format!("{one}\n{two}")
    );

    let answer = one.strip_prefix(short).unwrap().trim_end_matches('\n');
    assert!(answer.len() > 6, "{answer:?}");
    let stop = &answer[3..6]; // three tokens
    let before = &answer[..answer.find(stop).unwrap()];
    let stopped = said(&["--prompt", short, "--stop", "@@", "--stop", stop]);
    assert_eq!(stopped, format!("{short}{before}\n"));

    // A prompt begins as its tokenizer says; text to train on does not.
    let mut opened = Opened::new(&run.path("run"), None).unwrap();
    let begin = opened.tokenizer.token_to_id("<|im_end|>").unwrap();
    let plain = opened.tokenizer.encode(short).unwrap();
    assert_eq!(plain.len(), short.len());
    let prompt: Vec<u32> = [begin].into_iter().chain(plain).collect();
    assert_eq!(opened.tokenizer.encode_prompt(short).unwrap(), prompt);
    assert_eq!(one, format!("{short}{}\n", greedy(&mut opened, prompt)));

    // A chat is the prompt that its template writes, special tokens as such.
    let chat = said(&["--chat", "--system", "Be brief.", "--prompt", "Why?"]);
    let text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n\
                <|im_start|>assistant\n";
    let ids = opened.tokenizer.encode_special(text).unwrap();
    assert_eq!(
        ids[0],
        opened.tokenizer.token_to_id("<|im_start|>").unwrap()
    );
    assert_eq!(chat, format!("{}\n", greedy(&mut opened, ids)));
}

/// The most likely 24 tokens after `ids`.
fn greedy(opened: &mut Opened, mut ids: Vec<u32>) -> String {
    let decoder = opened.decoder().unwrap();
    let mut session = decoder.session();
    let mut reply = vec![];
    while reply.len() < 24 {
        let logits = decoder.extend_last(&mut session, &ids);
        let logits = logits.into_data().try_into_vec::<f32>().unwrap();
        let ascending = |&a: &usize, &b: &usize| logits[a].total_cmp(&logits[b]);
        let best = (0..logits.len()).rev().max_by(ascending).unwrap() as u32;
        if best == opened.tokenizer.eos_id() {
            break;
        }
        reply.push(best);
        ids = vec![best];
    }
    opened.tokenizer.decode(&reply).unwrap()
}
