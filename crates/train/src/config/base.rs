//! The model section of a run that continues another model: what it leaves out, the other's
//! `config.json` says.

use std::path::PathBuf;

use toml::Spanned;
use toml::de::{DeTable, DeValue};
use ttt_data::ModelFiles;

use super::InitConfig;
use super::read::moved;
use crate::interop::base_config;
use crate::start::locate;

/// Keys without which a model section describes no model. A section that has them all is taken as
/// it stands, so that plans and checkpoints need no other file.
const SIZES: [&str; 5] = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
];

/// The `[init]` whose `config.json` completes the model section; `None` where nothing is missing
/// or nothing is named.
pub(super) fn wanted(tree: &DeTable<'_>) -> Option<InitConfig> {
    let init = tree.get("init")?.get_ref().as_table()?;
    let text = |key: &str| Some(init.get(key)?.get_ref().as_str()?.to_string());
    let whole = tree
        .get("model")
        .and_then(|model| model.get_ref().as_table())
        .is_some_and(|model| SIZES.iter().all(|size| model.contains_key(*size)));
    match whole {
        true => None,
        false => Some(InitConfig {
            from: text("from")?,
            revision: text("revision"),
        }),
    }
}

/// The file, and what it says as the text of a model section.
pub(super) fn read(init: &InitConfig) -> Result<(PathBuf, String), String> {
    let place = locate(init, ModelFiles::Small).map_err(|error| error.to_string())?;
    let config = base_config(&place.dir).map_err(|error| error.to_string())?;
    let text = toml::to_string(&config).map_err(|error| error.to_string())?;
    Ok((place.dir.join("config.json"), text))
}

/// Adds to the model section of `tree` what it leaves out and `base` says. Spans of what is added
/// begin at `end`.
pub(super) fn complete<'a>(tree: &mut DeTable<'a>, base: &'a str, end: usize) {
    let parsed = DeTable::parse(base).expect("the text was just written");
    let base = Spanned::new(parsed.span(), DeValue::Table(parsed.into_inner()));
    let section = Spanned::new(end..end, "model".into());
    let model = tree
        .entry(section)
        .or_insert_with(|| Spanned::new(end..end, DeValue::Table(DeTable::new())));
    // A model that is no table is refused with all other types.
    if let (DeValue::Table(model), DeValue::Table(mut base)) =
        (model.get_mut(), moved(base, end).into_inner())
    {
        // A window that is new to a model without any is meant for all layers.
        let kinds = base.get("layer_types").map(|kinds| kinds.get_ref());
        let slides = matches!(kinds, Some(DeValue::Array(kinds))
            if kinds.iter().any(|kind| kind.get_ref().as_str() == Some("sliding_attention")));
        if model.contains_key("sliding_window") && !slides {
            base.remove("layer_types");
        }
        fill(model, base);
    }
}

/// Adds to `table` what it leaves out.
fn fill<'a>(table: &mut DeTable<'a>, base: DeTable<'a>) {
    for (key, value) in base {
        // Its keys depend on its type, so it is one value.
        let whole = key.get_ref() == "rope_scaling";
        if !table.contains_key(key.get_ref().as_ref()) {
            table.insert(key, value);
        } else if let (Some(DeValue::Table(inner)), DeValue::Table(base), false) = (
            table.get_mut(key.get_ref().as_ref()).map(Spanned::get_mut),
            value.into_inner(),
            whole,
        ) {
            fill(inner, base);
        }
    }
}
