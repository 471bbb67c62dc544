//! Exchanges of shards are begun before they are needed, and no more of them at a time than the plan
//! of memory counts.

mod common;

use std::sync::{Arc, Mutex};

use burn::tensor::{DType, Device};
use common::{Watched, layout, on_ranks};
use ttt_data::Row;
use ttt_kernels::ContextSettings;
use ttt_model::Unit;
use ttt_parallel::{Mesh, ProcessGroup};
use ttt_train::config::{Activations, Config};
use ttt_train::init::initial_values;
use ttt_train::step::{MicroBatch, Model, RopeCache};
use ttt_train::units::UnitState;

/// Three plain layers, so that every unit is one exchange.
fn config(tied: bool) -> Config {
    let text = format!(
        "run.dir = \"run\"\ndata.path = \"data\"\n\
         train = {{ steps = 1, sequence_length = 8, batch_tokens = 8 }}\n\
         optimizer.lr = 1e-3\n\
         [model]\nmodel_type = \"llama\"\nvocab_size = 17\nhidden_size = 8\n\
         intermediate_size = 8\nnum_hidden_layers = 3\nnum_attention_heads = 1\n\
         tie_word_embeddings = {tied}\n"
    );
    Config::parse(&text, "test".as_ref(), &[]).expect("a configuration")
}

/// What one pass does, in order: `G` a gather is begun, `g` waited for; `S` and `s` the same of a
/// gradient's way back, `R` and `r` of its sum over replicas; with the last waits, by the update, at the
/// end.
fn exchanges(shape: [usize; 3], tied: bool, activations: Activations) -> String {
    let config = config(tied);
    let logs = on_ranks(layout(shape), |mesh| {
        let log = Arc::new(Mutex::new(String::new()));
        let write = |letters: [char; 3]| {
            let log = log.clone();
            move |operation: &str| {
                log.lock().expect("no panic").push(match operation {
                    "all_gather" => letters[0],
                    "reduce_scatter" => letters[1],
                    _ => letters[2],
                });
            }
        };
        let watched = |inner: &Arc<dyn ProcessGroup>| {
            let begun = write(['G', 'S', 'R']);
            let watched: Arc<dyn ProcessGroup> = Arc::new(Watched {
                inner: inner.clone(),
                before: Box::new(move |operation, _| {
                    begun(operation);
                    Ok(())
                }),
                waited: Some(Arc::new(write(['g', 's', 'r']))),
            });
            watched
        };
        let mesh = Mesh {
            shard: watched(&mesh.shard),
            replicas: watched(&mesh.replicas),
            ..mesh
        };
        let device = Device::flex();
        let unit = |unit| {
            let values = |spec: &_| Ok::<_, std::convert::Infallible>(initial_values(spec, 1));
            UnitState::new(&config.model, unit, &mesh, &device, DType::F32, values)
                .expect("infallible")
        };
        let mut model = Model {
            config: config.model.clone(),
            units: Unit::all(&config.model).into_iter().map(unit).collect(),
            compute: DType::F32,
            device: device.clone(),
            rope: RopeCache::default(),
            context: ContextSettings::default(),
        };
        let row = Row {
            input_ids: (0..8).collect(),
            labels: (1..9).collect(),
            document_starts: vec![0],
        };
        let micro = MicroBatch::new(&[row], &mesh, &device).expect("a batch");
        let micro = micro.last(true);
        let pass = model.accumulate(&micro, 0.1, activations, &mesh);
        pass.expect("all ranks");
        for unit in &mut model.units {
            unit.take_gradient(&mesh).expect("all ranks");
        }
        let log = log.lock().expect("no panic");
        log.clone()
    });
    assert!(logs.iter().all(|log| *log == logs[0]));
    logs[0].clone()
}

#[test]
fn units_are_gathered_ahead_and_gradients_return_behind() {
    // The embedding; each block and the head while the unit before them runs.
    let forward = "Gg G gG gG gG";
    // The last block while the head runs; each block while the one behind it runs. A gradient is
    // waited for when the next one is ready.
    let recompute = "gG S gG sS gG sS g sS sS s";
    let keep = "g S sS sS sS sS s";
    let pass = |parts: [&str; 2]| parts.concat().replace(' ', "");
    let exchanges = |tied, activations| exchanges([1, 2, 1], tied, activations);
    let seen = exchanges(false, Activations::Recompute);
    assert_eq!(seen, pass([forward, recompute]));
    assert_eq!(exchanges(false, Activations::Keep), pass([forward, keep]));
    // A tied embedding is gathered once more, with the head, and has two gradients.
    let tied = "Gg G gG gG gGG g gG S sS gG sS gG sS g sS sS s";
    assert_eq!(exchanges(true, Activations::Recompute), pass([tied, ""]));

    let mut open = [0i32; 2];
    for letter in seen.chars() {
        match letter {
            'G' => open[0] += 1,
            'g' => open[0] -= 1,
            'S' => open[1] += 1,
            _ => open[1] -= 1,
        }
        assert!(open.iter().all(|&count| (0..=1).contains(&count)), "{seen}");
    }
    assert_eq!(open, [0, 0]);
}

/// A unit's sum over replicas begins as soon as its gradient is here, and is waited for when the next
/// unit's is; a tied embedding's when its second gradient is here.
#[test]
fn gradients_are_summed_over_replicas_while_others_are_computed() {
    let keep = |shape, tied| exchanges(shape, tied, Activations::Keep);
    // The embedding's is the last to begin, and the first unit that the update takes.
    let whole = "g R rR rR rR rR r";
    // To the shards, then between the replicas.
    let sharded = "g S sRS rsRS rsRS rsRS sRr r";
    for (shape, tied, end) in [
        ([2, 1, 1], false, whole),
        ([2, 1, 1], true, whole),
        ([2, 2, 1], false, sharded),
    ] {
        let (seen, end) = (keep(shape, tied), end.replace(' ', ""));
        assert!(seen.ends_with(&end), "{shape:?}, tied {tied}: {seen}");
    }
}
