//! The vectors of the official In-Place TTT model: outputs, every gradient, decoding.
//!
//! Checks every `*.safetensors` in the folder `TTT_GOLDEN_DIR`, by default `tests/golden`. A file
//! describes its model in `__metadata__["config"]`; `tests/golden/README.md` says what it holds.

#[path = "common/golden_file.rs"]
mod golden_file;
#[path = "common/golden_report.rs"]
mod golden_report;
#[path = "common/made_golden_file.rs"]
mod made_file;
#[path = "../crates/model/tests/maths/whole_model.rs"]
mod whole_model;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::tensor::Device;
use golden_file::Golden;
use golden_report::{GRADIENT_LIMIT, LOGITS_LIMIT, LOSS_LIMIT, MLP_LIMIT, Report};
use ttt_kernels::Packing;
use ttt_kernels::testing::{relative_error_of, values};
use ttt_model::mlp::Mlp;
use ttt_model::{Batch, Target};
use whole_model::{WholeModel, token_ids};

#[test]
fn official_vectors_match() {
    let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let folder = std::env::var_os("TTT_GOLDEN_DIR").map_or(default, PathBuf::from);
    let entries = std::fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("cannot list {}: {error}", folder.display()));
    let mut files: Vec<PathBuf> = entries
        .map(|entry| entry.expect("a readable folder").path())
        .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
        .collect();
    files.sort();
    assert!(
        !files.is_empty(),
        "{} holds no *.safetensors file: nothing would be checked",
        folder.display()
    );
    let mut failures = vec![];
    for path in &files {
        let report = report_on(path);
        println!("{}: {}", name(path), report.summary());
        let named = report.failures.iter();
        failures.extend(named.map(|failure| format!("{}: {failure}", name(path))));
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

fn name(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into()
}

fn report_on(path: &Path) -> Report {
    println!("{}", name(path)); // so that a panic has a file to its name
    let mut report = Report::default();
    match Golden::read(path) {
        Ok(golden) => check(&golden, &mut report),
        Err(problem) => report.failures.push(problem),
    }
    report
}

/// Files of models unlike the official ones, made by this program itself: what is checked is that
/// they are read and that no part of them is passed over.
#[test]
fn other_models_are_read_and_every_tensor_counts() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for (i, config) in made_file::configs().into_iter().enumerate() {
        let path = folder.path().join(format!("model{i}.safetensors"));
        let tensors = made_file::tensors(&config);
        made_file::write(&path, &config, &tensors);
        let report = report_on(&path);
        assert!(
            report.failures.is_empty(),
            "{config}: {:?}",
            report.failures
        );

        for name in tensors.keys().filter(|name| *name != "input_ids") {
            let mut wrong = tensors.clone();
            let largest = wrong[name].1.iter().fold(0.0f32, |m, v| m.max(v.abs()));
            wrong.get_mut(name).unwrap().1[0] += 0.01 + 0.1 * largest;
            made_file::write(&path, &config, &wrong);
            let failures = report_on(&path).failures;
            let expected = match name.starts_with("param.") {
                true => "logits", // a wrong parameter shows in what is computed with it
                false => name,
            };
            let named = failures.iter().any(|failure| failure.contains(expected));
            assert!(named, "{config}: a wrong {name} gave {failures:?}");
        }

        let mut missing = tensors.clone();
        missing.remove("param.model.norm.weight");
        made_file::write(&path, &config, &missing);
        let failures = report_on(&path).failures;
        assert!(
            failures[0].contains("param.model.norm.weight"),
            "{failures:?}"
        );
        let mut surplus = tensors.clone();
        surplus.insert(
            "param.model.layers.0.self_attn.q_bias".into(),
            (vec![1], vec![0.0]),
        );
        made_file::write(&path, &config, &surplus);
        let failures = report_on(&path).failures;
        assert!(failures[0].contains("q_bias"), "{failures:?}");
    }
}

fn check(golden: &Golden, report: &mut Report) {
    let model = match golden.model() {
        Ok(model) => model,
        Err(problem) => return report.failures.push(problem),
    };
    if let Err(problem) = check_mlps(golden, &model, report) {
        report.failures.push(problem);
    }
    check_outputs(golden, &model, report);
    check_gradients(golden, &model, report);
    check_decoding(golden, &model, report);
    check_exact_statements(golden, &model, report);
}

fn check_mlps(golden: &Golden, model: &WholeModel, report: &mut Report) -> Result<(), String> {
    for layer in 0..golden.config.num_hidden_layers {
        let tensor = |of: &str| {
            let name = format!("mlp{layer}.{of}");
            golden
                .tensors
                .get(&name)
                .map(|stored| stored.tensor::<3>(&name))
                .transpose()
        };
        let Some(expected) = golden.tensors.get(&format!("mlp{layer}.y")) else {
            continue;
        };
        let x = tensor("x")?.ok_or_else(|| format!("mlp{layer}.x is missing"))?;
        let t = tensor("t")?.unwrap_or_else(|| x.clone());
        let source = match golden.config.ttt.target {
            Target::Hidden => x.clone(),
            Target::Embedding | Target::NextToken => t.clone(),
        };
        if golden.config.is_ttt_layer(layer) {
            let same = values(&source) == values(&t);
            report.holds(&format!("mlp{layer}.t is the target source"), same);
        }
        let mlp = Mlp::new(&golden.config, layer, model.block(layer));
        let batch = Batch::training(&golden.config, golden.packing(), &Device::flex());
        let y = mlp.forward(x, source, &batch).output;
        report.relative(
            "mlp",
            &format!("mlp{layer}.y"),
            &values(&y),
            expected,
            MLP_LIMIT,
        );
    }
    Ok(())
}

fn check_outputs(golden: &Golden, model: &WholeModel, report: &mut Report) {
    let (ids, packing) = (token_ids(&golden.ids), golden.packing());
    match golden.tensors.get("logits") {
        Some(expected) => report.logits("logits", &values(&model.logits(&ids, &packing)), expected),
        None => report.failures.push("logits is missing".into()),
    }
    if let Some(expected) = golden.tensors.get("logits_conv_zero") {
        let logits = values(&golden.base_model().logits(&ids, &packing));
        report.logits("logits_conv_zero", &logits, expected);
    }
    match golden.tensors.get("loss") {
        Some(expected) => {
            let error = (model.loss(&ids, &packing) - expected.values[0]).abs();
            report.number("loss", "loss", error, LOSS_LIMIT);
        }
        None => report.failures.push("loss is missing".into()),
    }
}

fn check_gradients(golden: &Golden, model: &WholeModel, report: &mut Report) {
    let gradients = model.gradients(&token_ids(&golden.ids), &golden.packing());
    for (name, got) in &gradients {
        let name = format!("grad.{name}");
        match golden.tensors.get(&name) {
            Some(expected) => {
                report.relative("gradient", &name, got, expected, GRADIENT_LIMIT);
            }
            None => report.failures.push(format!("{name} is missing")),
        }
    }
}

fn check_decoding(golden: &Golden, model: &WholeModel, report: &mut Report) {
    let Some(expected) = golden.tensors.get("decode_logits") else {
        return;
    };
    let decoder = model.decoder();
    let rows = expected.shape[0].min(golden.ids.len());
    let mut decoded = vec![];
    for row in &golden.ids[..rows] {
        let mut session = decoder.session();
        let mut rest = row.as_slice();
        for &count in &golden.decode_split {
            let (now, later) = rest.split_at(count);
            decoded.extend(values(&decoder.extend(&mut session, now)));
            rest = later;
        }
    }
    report.logits("decode_logits", &decoded, expected);
    let logits = model.logits(
        &token_ids(&golden.ids[..rows]),
        &Packing::whole_rows(rows, golden.ids[0].len()),
    );
    let error = relative_error_of(&decoded, &values(&logits));
    report.number(
        "prefill against decode",
        "decode_logits",
        error,
        LOGITS_LIMIT,
    );
}

/// What must hold bit for bit in our own arithmetic.
fn check_exact_statements(golden: &Golden, model: &WholeModel, report: &mut Report) {
    let (ids, packing) = (token_ids(&golden.ids), golden.packing());
    let (rows, tokens, vocab) = (
        golden.ids.len(),
        golden.ids[0].len(),
        golden.config.vocab_size,
    );
    let chunk = golden.config.ttt.chunk;
    let logits = values(&model.logits(&ids, &packing));

    if rows > 1 {
        let mut other = golden.ids.clone();
        for id in &mut other[0] {
            *id = (*id + 1) % vocab as u32;
        }
        let after = values(&model.logits(&token_ids(&other), &packing));
        let row = tokens * vocab..;
        report.holds(
            "rows do not depend on row 0",
            logits[row.clone()] == after[row],
        );
    }
    if golden.config.ttt_layers().is_empty() || golden.config.ttt.conv_taps().is_none() {
        return;
    }
    let base = golden.base_model();
    let off = values(&base.logits(&ids, &packing));
    for row in 0..rows {
        let first = row * tokens * vocab..(row * tokens + chunk.min(tokens)) * vocab;
        let same = logits[first.clone()] == off[first];
        report.holds(
            &format!("row {row}: the first chunk is the base model's"),
            same,
        );
    }
    let zero = |gradients: &BTreeMap<String, Vec<f64>>, part: &str| {
        let mut of_part = gradients.iter().filter(|(name, _)| name.contains(part));
        of_part.all(|(_, gradient)| gradient.iter().all(|&g| g == 0.0))
    };
    let at_zero = base.gradients(&ids, &packing);
    report.holds(
        "without a convolution the projection has no gradient",
        zero(&at_zero, "ttt_proj"),
    );
    if tokens > chunk {
        let learns = |part: &str| golden.config.ttt.lr > 0.0 && !golden.is_zero(part);
        if learns("ttt_conv") && learns("ttt_proj") {
            report.holds("TTT changes the logits beyond one chunk", logits != off);
        }
        if learns("ttt_proj") {
            let some = !zero(&at_zero, "ttt_conv");
            report.holds("a zero convolution has a gradient", some);
        }
    } else {
        report.holds("one chunk is the base model", logits == off);
        let gradients = model.gradients(&ids, &packing);
        report.holds(
            "one chunk gives TTT no gradient",
            zero(&gradients, "mlp.ttt_"),
        );
    }
}
