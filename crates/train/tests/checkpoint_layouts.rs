//! A checkpoint written on one layout of ranks is the same on any other, and a lost rank leaves
//! the one before.

mod common;

use std::path::Path;

use burn::tensor::{DType, Device};

use common::{joint, layout, layouts, on_ranks};
use ttt_data::Row;
use ttt_kernels::ContextSettings;
use ttt_kernels::testing::{relative_error_of, values as elements};
use ttt_model::{ModelConfig, Unit};
use ttt_parallel::{Layout, Mesh};
use ttt_train::agree::gather_bytes;
use ttt_train::checkpoint::{self, Checkpoint, Progress};
use ttt_train::config::{Activations, Config};
use ttt_train::init::initial_values;
use ttt_train::optimizer::{Updater, scalar};
use ttt_train::start::BaseModel;
use ttt_train::step::{MicroBatch, Model, RopeCache};
use ttt_train::units::UnitState;

/// A model whose units do not divide evenly among the shards.
fn config(dir: &Path) -> Config {
    let text = format!(
        "run.dir = {:?}\ndata.path = \"data\"\n\
         train = {{ steps = 6, sequence_length = 24, batch_tokens = 96 }}\n\
         optimizer.lr = 1e-2\ncheckpoint.keep = 2\n\
         [model]\nmodel_type = \"qwen3\"\nvocab_size = 131\nhidden_size = 24\n\
         intermediate_size = 56\nnum_hidden_layers = 2\nnum_attention_heads = 2\n\
         num_key_value_heads = 1\nhead_dim = 8\ntie_word_embeddings = false\n\
         [model.ttt]\nenabled = true\nlayers = [1]\nchunk = 4\n",
        dir.join("run")
    );
    Config::parse(&text, "test".as_ref(), &[]).expect("a configuration")
}

fn progress(step: u64) -> Progress {
    Progress {
        step,
        tokens: 96 * step,
        mean_grad_norm: 0.25,
        data_fingerprint: "the same".into(),
    }
}

/// This rank's part of a state, of a model that computes in `compute`, in which every weight and moment has
/// a value of its own.
fn state(config: &ModelConfig, mesh: &Mesh, device: &Device, compute: DType) -> Vec<UnitState> {
    let unit = |unit| {
        let of = |seed| {
            let spread = |spec: &ttt_model::ParamSpec| {
                let init = ttt_model::Init::Normal(0.2);
                let spec = ttt_model::ParamSpec {
                    init,
                    ..spec.clone()
                };
                Ok::<_, std::convert::Infallible>(initial_values(&spec, seed))
            };
            UnitState::new(config, unit, mesh, device, compute, spread).expect("infallible")
        };
        let mut state = of(1);
        state.moments.first = of(2).master.to_f32();
        state.moments.second = of(3).master.to_f32().square();
        state
    };
    Unit::all(config).into_iter().map(unit).collect()
}

/// The bits of all of this rank's buffers.
fn bits(units: &[UnitState]) -> Vec<u64> {
    let buffers = |unit: &UnitState| {
        let moments = &unit.moments;
        [
            unit.master.to_f32(),
            moments.first.clone(),
            moments.second.clone(),
        ]
    };
    let values = units.iter().flat_map(buffers).flat_map(|b| elements(&b));
    values.map(f64::to_bits).collect()
}

/// The files of the newest checkpoint that hold tensors, by name.
fn weights(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let newest = checkpoint::list(&dir.join("run")).expect("a folder");
    let newest = newest.last().expect("a checkpoint");
    let entries = std::fs::read_dir(newest).expect("a folder");
    let mut files: Vec<_> = entries
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
        .map(|path| {
            (
                path.display().to_string(),
                std::fs::read(&path).expect("a file"),
            )
        })
        .map(|(path, bytes)| {
            (
                path.rsplit('/').next().unwrap_or_default().to_string(),
                bytes,
            )
        })
        .collect();
    files.sort();
    files
}

fn save(config: &Config, step: u64, mesh: &Mesh) -> Result<(), String> {
    save_in(DType::F32, config, step, mesh)
}

fn save_in(compute: DType, config: &Config, step: u64, mesh: &Mesh) -> Result<(), String> {
    let units = state(&config.model, mesh, &Device::flex(), compute);
    let small = [("tokenizer.json".to_string(), b"{}".to_vec())];
    let saved = checkpoint::save(config, &units, &progress(step), &small, mesh);
    saved.map(drop).map_err(|error| error.to_string())
}

#[test]
fn any_layout_reads_what_any_other_wrote() {
    let layouts = layouts();
    let dirs: Vec<_> = layouts
        .iter()
        .map(|_| tempfile::tempdir().expect("a folder"))
        .collect();
    // Whether the ranks hold weights in f32 or in halves does not show.
    let precision = |number: usize| [DType::F32, DType::BF16][number % 2];
    for (number, (dir, &shape)) in dirs.iter().zip(&layouts).enumerate() {
        let (config, compute) = (config(dir.path()), precision(number));
        on_ranks(shape, |mesh| {
            save_in(compute, &config, 3, &mesh).expect("all ranks")
        });
    }
    let expected = weights(dirs[0].path());
    assert_eq!(expected.len(), 2);
    for (dir, &shape) in dirs.iter().zip(&layouts) {
        assert!(
            weights(dir.path()) == expected,
            "{shape:?} wrote other bytes"
        );
        for (number, &on) in layouts.iter().enumerate() {
            on_ranks(on, |mesh| {
                let compute = precision(number / 2);
                let device = Device::flex();
                let config = config(dir.path());
                let found = Checkpoint::newest_together(&config.run.dir, &mesh, &device);
                let found = found.expect("all ranks").expect("a checkpoint");
                assert_eq!(found.progress, progress(3));
                let units = found
                    .load(&config.model, &mesh, &device, compute)
                    .expect("all ranks");
                let expected = state(&config.model, &mesh, &device, DType::F32);
                assert!(bits(&units) == bits(&expected), "{shape:?} read on {on:?}");
            });
        }
    }
}

/// The pieces that ranks write are all of every file, so that any damage is seen, and by all ranks.
#[test]
fn damage_is_seen_by_all_ranks() {
    let dir = tempfile::tempdir().expect("a folder");
    let config = config(dir.path());
    on_ranks(layout([2, 2, 1]), |mesh| {
        save(&config, 1, &mesh).expect("all ranks")
    });
    let path = checkpoint::path_of(&config.run.dir, 1);
    for (name, bytes) in weights(dir.path()) {
        for at in [0, bytes.len() / 3, bytes.len() / 2, bytes.len() - 1] {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            std::fs::write(path.join(&name), &damaged).expect("write");
            let errors = on_ranks(layout([1, 2, 1]), |mesh| {
                let opened = Checkpoint::open_together(&path, &mesh, &Device::flex());
                opened.map(drop).expect_err("damaged").to_string()
            });
            for error in errors {
                assert!(
                    error.contains(&name) && error.contains("damaged"),
                    "{error}"
                );
            }
        }
        std::fs::write(path.join(&name), &bytes).expect("write");
    }
    Checkpoint::open(&path).expect("whole again");
}

/// A rank that is lost at any exchange of a save, or cannot write, leaves the checkpoint before and
/// nothing that looks like one.
#[test]
fn a_lost_rank_leaves_the_checkpoint_before() {
    let dir = tempfile::tempdir().expect("a folder");
    let config = config(dir.path());
    on_ranks(layout([1, 3, 1]), |mesh| {
        save(&config, 1, &mesh).expect("all ranks")
    });
    let before = weights(dir.path());
    for lost in 0..3 {
        for exchanges in 0..6 {
            let results = common::on_ranks_losing(layout([1, 3, 1]), lost, exchanges, |mesh| {
                save(&config, 2, &mesh)
            });
            let all = checkpoint::list(&config.run.dir).expect("a folder");
            if all.len() == 2 {
                // Lost after the last thing that had to be agreed on: the folder is complete.
                Checkpoint::open(&all[1]).expect("complete");
                std::fs::remove_dir_all(&all[1]).expect("remove");
                continue;
            }
            for (rank, result) in results.iter().enumerate().filter(|(rank, _)| *rank != lost) {
                let error = result.as_ref().expect_err("a rank was lost");
                assert!(
                    error.contains(&format!("rank {lost}")),
                    "rank {rank}: {error}"
                );
            }
            assert!(weights(dir.path()) == before);
            Checkpoint::open(&all[0]).expect("the one before");
        }
    }
    // The next save removes what was left.
    on_ranks(layout([1, 3, 1]), |mesh| {
        save(&config, 2, &mesh).expect("all ranks")
    });
    let folder = std::fs::read_dir(checkpoint::folder(&config.run.dir)).expect("a folder");
    assert_eq!(folder.count(), 2);
}

/// What one rank cannot do is told by all, with its number.
#[test]
fn a_rank_that_cannot_write_is_named() {
    let dir = tempfile::tempdir().expect("a folder");
    let config = config(dir.path());
    let errors = on_ranks(layout([1, 2, 1]), |mesh| {
        let mut config = config.clone();
        if mesh.shard.rank() == 1 {
            // As on a machine that does not share the file system.
            config.run.dir = dir.path().join("elsewhere");
        }
        save(&config, 1, &mesh).expect_err("rank 1 finds no files")
    });
    assert!(errors[0].starts_with("rank 1: "), "{}", errors[0]);
    for error in errors {
        assert!(
            error.contains("elsewhere") && error.contains("all ranks share"),
            "{error}"
        );
    }
    assert!(
        checkpoint::list(&config.run.dir)
            .expect("a folder")
            .is_empty()
    );

    let errors = on_ranks(layout([2, 1, 1]), |mesh| {
        let mut config = config.clone();
        if mesh.replicate.rank() == 1 {
            config.run.dir = dir.path().join("elsewhere");
        } else {
            save(&config, 1, &Mesh::single()).expect("one rank");
        }
        let found = Checkpoint::newest_together(&config.run.dir, &mesh, &Device::flex());
        found
            .map(drop)
            .expect_err("they see different folders")
            .to_string()
    });
    for error in errors {
        assert!(error.contains("all ranks share"), "{error}");
    }
}

/// Trains the steps `steps` from `units` on, four rows each; returns the updater's running norm.
fn train(
    model: &mut Model,
    steps: std::ops::Range<u64>,
    mean_norm: f32,
    mesh: &Mesh,
    config: &Config,
) -> f32 {
    let device = Device::flex();
    let policy = ttt_train::config::OnBadGradient::Skip;
    let mut updater = Updater::new(&config.optimizer, policy, None, mean_norm, &device);
    let rows: Vec<Row> = (0..4).map(row).collect();
    let share = rows.len() / mesh.data_size();
    let own = &rows[mesh.data_rank() * share..(mesh.data_rank() + 1) * share];
    for step in steps {
        for row in own {
            let micro = MicroBatch::new(std::slice::from_ref(row), mesh, &device).expect("a batch");
            let pass = model.accumulate(&micro, 0.01, Activations::Keep, mesh);
            pass.expect("all ranks");
        }
        let normalizer = scalar(1.0, &device);
        let updated = updater.update(&mut model.units, normalizer, 1e-2, step, mesh);
        updated.expect("all ranks");
    }
    elements(&updater.mean_norm)[0] as f32
}

fn row(number: usize) -> Row {
    let token = |i: usize| ((i * 7 + i * i * 3 + number * 50) % 131) as u32;
    Row {
        input_ids: (0..24).map(token).collect(),
        labels: (1..25).map(token).collect(),
        document_starts: vec![0, 9 + number as u32],
    }
}

fn model(config: &Config, units: Vec<UnitState>, compute: DType) -> Model {
    Model {
        config: config.model.clone(),
        units,
        compute,
        device: Device::flex(),
        rope: RopeCache::default(),
        context: ContextSettings::default(),
    }
}

/// Three steps, a checkpoint, and three more on another layout end where six steps on one rank do;
/// on the same layout, with the same bits.
#[test]
fn a_run_goes_on_on_another_layout() {
    let whole_in = |compute: DType, shape: Layout, stop: Option<Layout>| {
        let dir = tempfile::tempdir().expect("a folder");
        let config = config(dir.path());
        let six = on_ranks(shape, |mesh| {
            let units = state(&config.model, &mesh, &Device::flex(), compute);
            let mut model = model(&config, units, compute);
            let norm = train(&mut model, 0..3, 0.0, &mesh, &config);
            if stop.is_some() {
                let mut at = progress(3);
                at.mean_grad_norm = norm;
                let saved = checkpoint::save(&config, &model.units, &at, &[], &mesh);
                saved.expect("all ranks");
            } else {
                train(&mut model, 3..6, norm, &mesh, &config);
            }
            gathered(&model.units, &mesh)
        });
        let Some(then) = stop else { return six };
        on_ranks(then, |mesh| {
            let found = Checkpoint::newest_together(&config.run.dir, &mesh, &Device::flex());
            let found = found.expect("all ranks").expect("a checkpoint");
            let units = found.load(&config.model, &mesh, &Device::flex(), compute);
            let mut model = model(&config, units.expect("all ranks"), compute);
            let norm = found.progress.mean_grad_norm;
            train(&mut model, 3..6, norm, &mesh, &config);
            gathered(&model.units, &mesh)
        })
    };
    let whole = |shape, stop| whole_in(DType::F32, shape, stop);
    let single = whole(layout([1, 1, 1]), None).remove(0);
    let apart = [
        ([1, 1, 1], [1, 4, 1]),
        ([1, 4, 1], [1, 1, 1]),
        ([1, 2, 1], [2, 1, 1]),
        ([2, 1, 1], [2, 2, 1]),
        ([2, 2, 1], [1, 2, 1]),
        ([1, 2, 2], [1, 2, 1]),
        ([1, 1, 1], [2, 1, 2]),
    ];
    let apart = apart.map(|(first, then)| (layout(first), layout(then)));
    let jointly = [
        (joint([1, 1, 2]), layout([1, 1, 1])),
        (layout([1, 2, 1]), joint([1, 2, 2])),
        (joint([2, 1, 2]), layout([1, 1, 2])),
    ];
    for (first, then) in apart.into_iter().chain(jointly) {
        for state in whole(first, Some(then)) {
            let error = relative_error_of(&state, &single);
            // Sums over rows in another order, and six updates of 1 % of a weight.
            assert!(error < 1e-6, "{first:?} then {then:?}: {error:e}");
        }
        assert!(whole(first, Some(first)) == whole(first, None), "{first:?}");
    }
    // In bf16 the file has the bits that the weights were rounded by, or six steps would end elsewhere.
    for shape in [layout([1, 1, 1]), layout([1, 2, 1]), joint([1, 1, 2])] {
        let six = whole_in(DType::BF16, shape, None);
        assert!(
            whole_in(DType::BF16, shape, Some(shape)) == six,
            "{shape:?}"
        );
        // Six updates of 1 % of a weight, from gradients in bf16 whose signs may differ where they are small.
        let error = relative_error_of(&six[0], &single);
        assert!((1e-3..0.1).contains(&error), "{shape:?}: {error:e}");
        // Weights in f32, of which each pass takes a rounded copy, end at the same values, but where one lay
        // halfway between two bf16 and was rounded the other way: one in 65,536.
        let whole = on_ranks(shape, |mesh| {
            let dir = tempfile::tempdir().expect("a folder");
            let config = config(dir.path());
            let units = state(&config.model, &mesh, &Device::flex(), DType::F32);
            let mut model = model(&config, units, DType::BF16);
            train(&mut model, 0..6, 0.0, &mesh, &config);
            gathered(&model.units, &mesh)
        });
        let error = relative_error_of(&whole[0], &six[0]);
        assert!(error < 1e-4, "{shape:?}: {error:e}");
    }
}

/// Weights and moments of all units, whole.
fn gathered(units: &[UnitState], mesh: &Mesh) -> Vec<f64> {
    let mut values = vec![];
    for unit in units {
        let (first, second) = (unit.moments.first.clone(), unit.moments.second.clone());
        for shard in [unit.master.to_f32(), first, second] {
            let full = mesh.shard.all_gather(shard).expect("all ranks");
            values.extend(unit.layout.whole(&elements(&full)));
        }
    }
    values
}

/// A model that a run continues is read in slices, too, new TTT layers among them.
#[test]
fn any_layout_continues_the_same_model() {
    let base = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/hf/qwen3");
    let text = format!(
        "run.dir = \"run\"\ndata.path = \"data\"\ninit.from = \"{base}\"\n\
         train = {{ steps = 1, sequence_length = 40, batch_tokens = 40 }}\n\
         optimizer.lr = 1.0\n\
         model.ttt = {{ enabled = true, layers = [1], chunk = 16, target = \"hidden\" }}"
    );
    let begun = |layout: Layout| {
        on_ranks(layout, |mesh| {
            let mut config = Config::parse(&text, "test".as_ref(), &[]).expect("a configuration");
            let base = BaseModel::open(&mut config).expect("the folder");
            let base = base.expect("it is named");
            let units = base
                .units(&config, &mesh, &Device::flex())
                .expect("weights");
            gathered(&units, &mesh)
        })
    };
    let expected = begun(layout([1, 1, 1])).remove(0);
    assert!(expected.iter().any(|value| *value != 0.0));
    let shapes = [[1, 2, 1], [1, 3, 1], [2, 2, 1]].map(layout);
    for shape in shapes.into_iter().chain([joint([1, 1, 2])]) {
        for got in begun(shape) {
            assert!(got == expected, "{shape:?}");
        }
    }
}

/// Format 1, with one hash per file, is read; one of the future is refused.
#[test]
fn formats() {
    let dir = tempfile::tempdir().expect("a folder");
    let config = config(dir.path());
    save(&config, 1, &Mesh::single()).expect("one rank");
    let path = checkpoint::path_of(&config.run.dir, 1);
    let manifest = path.join("manifest.json");
    let json = std::fs::read_to_string(&manifest).expect("a manifest");
    let mut json: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!(json["format"], 2);
    json["format"] = 1.into();
    for file in json["files"].as_array_mut().expect("files") {
        let name = file["name"].as_str().expect("a name");
        let content = std::fs::read(path.join(name)).expect("a file");
        let hash = blake3::hash(&content).to_hex().to_string();
        let entry = file.as_object_mut().expect("an entry");
        entry.remove("pieces");
        entry.insert("blake3".into(), hash.into());
    }
    let write = |json: &serde_json::Value| std::fs::write(&manifest, json.to_string());
    write(&json).expect("write");
    let old = Checkpoint::open(&path).expect("format 1");
    let (mesh, device) = (Mesh::single(), Device::flex());
    let compute = DType::F32;
    let units = old.load(&config.model, &mesh, &device, compute);
    let expected = state(&config.model, &mesh, &device, compute);
    assert!(bits(&units.expect("one rank")) == bits(&expected));

    json["files"][0]["blake3"] = "0".repeat(64).into();
    write(&json).expect("write");
    let error = Checkpoint::open(&path).map(drop).expect_err("another hash");
    assert!(error.to_string().contains("damaged"), "{error}");
    json["format"] = 3.into();
    write(&json).expect("write");
    let error = Checkpoint::open(&path).map(drop).expect_err("the future");
    assert!(error.to_string().contains("format 3"), "{error}");
}

#[test]
fn messages_arrive_whole() {
    let all = on_ranks(layout([2, 2, 1]), |mesh| {
        let own: Vec<u8> = (0..mesh.world.rank() * 70_000)
            .map(|i| (i % 251) as u8)
            .collect();
        let all = gather_bytes(&mesh, &Device::flex(), &own).expect("all ranks");
        assert!(all[mesh.world.rank()] == own);
        all
    });
    assert!(all.windows(2).all(|pair| pair[0] == pair[1]));
    assert_eq!(
        all[0].iter().map(Vec::len).collect::<Vec<_>>(),
        [0, 70_000, 140_000, 210_000]
    );
}
