//! A checkpoint written on one layout of ranks is the same on any other, and a lost rank leaves
//! the one before.

mod common;

use std::path::Path;

use burn::tensor::{DType, Device};

use common::checkpoint::{config, gathered, progress, state};
use common::{joint, layout, layouts, on_ranks};
use ttt_kernels::testing::values as elements;
use ttt_parallel::{Layout, Mesh};
use ttt_train::agree::gather_bytes;
use ttt_train::checkpoint::{self, Checkpoint};
use ttt_train::config::Config;
use ttt_train::start::BaseModel;
use ttt_train::units::UnitState;

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
