//! What a writer is given comes back bit for bit, and a folder exists only when it is complete.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use proptest::prelude::*;
use tempfile::TempDir;
use ttt_weights::{
    Dtype, Folder, PARTIAL_SUFFIX, Plan, SharedWriter, TensorSpec, WeightsError, Writer,
    WrittenFile, atomic_folder, hash_piece,
};

fn spec(name: &str, shape: &[usize], dtype: Dtype) -> TensorSpec {
    TensorSpec {
        name: name.into(),
        shape: shape.into(),
        dtype,
    }
}

fn write(dir: &Path, tensors: &[(TensorSpec, Vec<f32>)], max_shard_bytes: u64) -> Vec<WrittenFile> {
    let specs = tensors.iter().map(|(spec, _)| spec.clone()).collect();
    let metadata = HashMap::from([("step".to_string(), "7".to_string())]);
    let mut writer = Writer::create(dir, "model", specs, max_shard_bytes, metadata).unwrap();
    for (spec, values) in tensors {
        writer.append_f32(&spec.name, values).unwrap();
    }
    writer.finish().unwrap()
}

fn read(folder: &Folder, name: &str) -> Vec<f32> {
    let shape = folder.info(name).unwrap().shape;
    let mut out = vec![0.0; shape.iter().product()];
    folder.read_f32(name, &mut out).unwrap();
    out
}

#[test]
fn one_file_or_shards_with_an_index() {
    let tensors = [
        (spec("b", &[2, 3], Dtype::F32), vec![1.5; 6]),
        (spec("empty", &[0, 3], Dtype::F32), vec![]),
        (spec("a", &[5], Dtype::BF16), vec![-2.0; 5]),
        (spec("scalar", &[], Dtype::F16), vec![0.25]),
    ];
    for (max_shard_bytes, files) in [
        (u64::MAX, vec!["model.safetensors"]),
        (
            // "empty" fits beside "b"; "a" and "scalar" take 12 bytes together.
            24,
            vec![
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                "model.safetensors.index.json",
            ],
        ),
    ] {
        let dir = TempDir::new().unwrap();
        let written = write(dir.path(), &tensors, max_shard_bytes);
        let names: Vec<&str> = written.iter().map(|w| w.file.as_str()).collect();
        assert_eq!(names, files);
        for file in &written {
            let content = fs::read(dir.path().join(&file.file)).unwrap();
            assert_eq!(content.len() as u64, file.bytes);
            assert_eq!(blake3::hash(&content).to_hex().as_str(), file.blake3);
        }
        let folder = Folder::open(dir.path()).unwrap();
        assert_eq!(folder.metadata()["step"], "7");
        assert_eq!(folder.metadata()["format"], "pt");
        for (spec, values) in &tensors {
            let info = folder.info(&spec.name).unwrap();
            assert_eq!((&info.shape, info.dtype), (&spec.shape, spec.dtype));
            assert_eq!(&read(&folder, &spec.name), values);
        }
    }
}

#[test]
fn bf16_rounds_to_nearest_even() {
    let ulp = 2f32.powi(-7); // of bf16 just above 1
    let dir = TempDir::new().unwrap();
    let values = vec![1.0 + ulp / 2.0, 1.0 + 1.5 * ulp, 1.0 + 0.51 * ulp, f32::MAX];
    write(dir.path(), &[(spec("x", &[4], Dtype::BF16), values)], 0);
    let read = read(&Folder::open(dir.path()).unwrap(), "x");
    assert_eq!(read, [1.0, 1.0 + 2.0 * ulp, 1.0 + ulp, f32::INFINITY]);
}

#[test]
fn data_that_differs_from_the_plan_is_refused() {
    let dir = TempDir::new().unwrap();
    let plan = || {
        let specs = vec![spec("a", &[2], Dtype::F32), spec("n", &[1], Dtype::I64)];
        let part = TempDir::new_in(dir.path()).unwrap().keep();
        Writer::create(&part, "model", specs, 100, HashMap::new()).unwrap()
    };
    let says = |error: WeightsError, what: &str| {
        let error = error.to_string();
        assert!(error.contains(what), "{error}");
    };
    says(
        plan().append_f32("n", &[1.0]).unwrap_err(),
        "tensor a comes now",
    );
    says(
        plan().append_f32("a", &[1.0; 3]).unwrap_err(),
        "8 more bytes, got 12",
    );
    let mut writer = plan();
    writer.append_f32("a", &[1.0]).unwrap();
    writer.append_f32("a", &[1.0]).unwrap();
    says(
        writer.append_f32("n", &[1.0]).unwrap_err(),
        "n is stored as I64",
    );
    says(writer.finish().unwrap_err(), "tensor n is missing");

    let twice = vec![spec("a", &[1], Dtype::F32), spec("a", &[1], Dtype::F32)];
    let error = Writer::create(dir.path(), "model", twice, 0, HashMap::new());
    says(error.unwrap_err(), "planned twice");
    fs::write(dir.path().join("model.safetensors"), "in use").unwrap();
    let specs = vec![spec("a", &[1], Dtype::F32)];
    let mut writer = Writer::create(dir.path(), "model", specs, 9, HashMap::new()).unwrap();
    says(
        writer.append_f32("a", &[1.0]).unwrap_err(),
        "model.safetensors: cannot make the file",
    );
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(500) })]

    /// Any bits, NaNs with payloads among them, in any pieces, across any shards.
    #[test]
    fn f32_round_trips_bit_for_bit(
        tensors in prop::collection::vec(prop::collection::vec(any::<u32>(), 0..40), 1..6),
        max_shard_bytes in 0..200u64,
        piece in 1..20usize,
    ) {
        let dir = TempDir::new().unwrap();
        let specs = (tensors.iter().enumerate())
            .map(|(i, bits)| spec(&format!("t{i}"), &[bits.len()], Dtype::F32))
            .collect();
        let metadata = HashMap::new();
        let mut writer = Writer::create(dir.path(), "model", specs, max_shard_bytes, metadata).unwrap();
        for (i, bits) in tensors.iter().enumerate() {
            let values: Vec<f32> = bits.iter().map(|&bits| f32::from_bits(bits)).collect();
            for part in values.chunks(piece) {
                writer.append_f32(&format!("t{i}"), part).unwrap();
            }
        }
        writer.finish().unwrap();
        let folder = Folder::open(dir.path()).unwrap();
        for (i, bits) in tensors.iter().enumerate() {
            let read: Vec<u32> = read(&folder, &format!("t{i}")).iter().map(|x| x.to_bits()).collect();
            prop_assert_eq!(&read, bits);
            if bits.len() > 2 {
                let mut part = vec![0.0; bits.len() - 2];
                folder.read_f32_range(&format!("t{i}"), 1..bits.len() - 1, &mut part).unwrap();
                let part: Vec<u32> = part.iter().map(|x| x.to_bits()).collect();
                prop_assert_eq!(&part, &bits[1..bits.len() - 1]);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) })]

    /// Writers that share out the elements write the files that one writer would, and their pieces are
    /// all of them.
    #[test]
    fn several_writers_write_what_one_does(
        tensors in prop::collection::vec(prop::collection::vec(any::<u32>(), 0..40), 1..6),
        max_file_bytes in 0..200u64,
        cuts in prop::collection::vec(0usize..240, 0..4),
        at_once in 1usize..20,
    ) {
        let parent = TempDir::new().unwrap();
        let (alone, together) = (parent.path().join("alone"), parent.path().join("together"));
        let specs: Vec<_> = (tensors.iter().enumerate())
            .map(|(i, bits)| spec(&format!("t{i}"), &[bits.len()], Dtype::F32))
            .collect();
        let values: Vec<Vec<f32>> = (tensors.iter())
            .map(|bits| bits.iter().map(|&bits| f32::from_bits(bits)).collect())
            .collect();
        let one: Vec<_> = specs.iter().cloned().zip(values.clone()).collect();
        let metadata = HashMap::new();
        let mut writer =
            Writer::create(&alone, "model", specs.clone(), max_file_bytes, metadata.clone()).unwrap();
        for (spec, values) in &one {
            writer.append_f32(&spec.name, values).unwrap();
        }
        let expected = writer.finish().unwrap();

        fs::create_dir(&together).unwrap();
        let plan = Plan::new(&together, "model", specs, max_file_bytes, metadata).unwrap();
        let mut pieces = plan.make_files(&together).unwrap();
        let all: usize = values.iter().map(Vec::len).sum();
        let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(all)).chain([0, all]).collect();
        cuts.sort();
        // Last first: nobody waits for anybody.
        for share in cuts.windows(2).rev() {
            let mut writer = SharedWriter::new(&together, &plan);
            let mut begin = 0;
            for (spec, values) in &one {
                let here = share[0].clamp(begin, begin + values.len())..share[1].clamp(begin, begin + values.len());
                for from in here.clone().step_by(at_once) {
                    let to = here.end.min(from + at_once);
                    let part = &values[from - begin..to - begin];
                    writer.write_f32(&spec.name, from - begin, part).unwrap();
                }
                begin += values.len();
            }
            pieces.extend(writer.finish(|_| ()).unwrap());
        }
        pieces.sort_by_key(|piece| (piece.file.clone(), piece.range.start));
        for file in &expected {
            let (a, b) = (fs::read(alone.join(&file.file)), fs::read(together.join(&file.file)));
            prop_assert_eq!(a.unwrap(), b.unwrap());
            let mut end = 0;
            for piece in pieces.iter().filter(|piece| piece.file == file.file) {
                prop_assert_eq!(piece.range.start, end);
                end = piece.range.end;
                let hash = hash_piece(&together.join(&file.file), piece.range.clone());
                prop_assert_eq!(&hash.unwrap(), &piece.blake3);
            }
            prop_assert_eq!(end, file.bytes);
        }
        prop_assert_eq!(names(&alone), names(&together));
    }
}

#[test]
fn a_shared_writer_stays_in_its_tensors() {
    let dir = TempDir::new().unwrap();
    let specs = vec![spec("a", &[2], Dtype::F32), spec("n", &[1], Dtype::I64)];
    let plan = Plan::new(dir.path(), "model", specs, 100, HashMap::new()).unwrap();
    let says = |error: WeightsError, what: &str| {
        let error = error.to_string();
        assert!(error.contains(what), "{error}");
    };
    let mut writer = SharedWriter::new(dir.path(), &plan);
    // Nobody has made the files.
    says(
        writer.write_f32("a", 0, &[1.0]).unwrap_err(),
        "cannot open the file",
    );
    plan.make_files(dir.path()).unwrap();
    says(
        writer.write_f32("b", 0, &[1.0]).unwrap_err(),
        "b is not planned",
    );
    says(
        writer.write_f32("a", 1, &[1.0; 2]).unwrap_err(),
        "no place for 2 elements from 1 on",
    );
    says(
        writer.write_f32("a", usize::MAX, &[1.0]).unwrap_err(),
        "no place",
    );
    says(
        writer.write_f32("n", 0, &[1.0]).unwrap_err(),
        "n is stored as I64",
    );
    says(
        plan.make_files(dir.path()).unwrap_err(),
        "cannot make the file",
    );
    says(
        hash_piece(&dir.path().join("model.safetensors"), 0..9999).unwrap_err(),
        "cannot read",
    );
}

/// Names in a folder, hidden ones too.
fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn put(path: &Path) -> Result<(), WeightsError> {
    atomic_folder(path, |partial| {
        fs::write(partial.join("x"), "content").unwrap();
        Ok(())
    })
}

#[test]
fn a_folder_appears_whole_or_not_at_all() {
    let parent = TempDir::new().unwrap();
    let path = parent.path().join("runs/step-1");
    let failed: Result<(), WeightsError> = atomic_folder(&path, |partial| {
        fs::write(partial.join("x"), "half").unwrap();
        assert!(!path.exists());
        let path = path.clone();
        Err(WeightsError::Changed { path })
    });
    assert!(failed.is_err());
    assert!(names(&parent.path().join("runs")).is_empty());

    put(&path).unwrap();
    assert_eq!(fs::read_to_string(path.join("x")).unwrap(), "content");
    let again = put(&path).unwrap_err().to_string();
    assert!(again.contains("already exists"), "{again}");
    assert_eq!(names(&parent.path().join("runs")), ["step-1"]);
}

#[test]
fn leftovers_of_a_killed_writer_are_removed_and_live_ones_are_not() {
    let parent = TempDir::new().unwrap();
    let leftover = parent.path().join(format!(".step-1{PARTIAL_SUFFIX}"));
    fs::create_dir(&leftover).unwrap();
    fs::write(leftover.join("half"), "").unwrap();
    let nested: Result<(), WeightsError> = atomic_folder(&parent.path().join("step-2"), |_| {
        assert!(!leftover.exists(), "left by nobody who lives");
        // While step-2 is being written, step-3 leaves it alone, and nobody else may write it.
        put(&parent.path().join("step-3"))?;
        let busy = put(&parent.path().join("step-2")).unwrap_err();
        assert!(matches!(busy, WeightsError::Busy { .. }), "{busy}");
        Ok(())
    });
    nested.unwrap();
    assert_eq!(names(parent.path()), ["step-2", "step-3"]);
}
