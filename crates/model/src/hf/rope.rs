//! RoPE's keys: `rope_theta` beside `rope_scaling` up to transformers 4, all in `rope_parameters`
//! from 5 on.

use crate::config::RopeScaling;

use super::keys::Keys;
use super::{HfConfigError, refuse};

/// Keys that are understood; another one may change the frequencies.
const KNOWN: [&str; 15] = [
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "partial_rotary_factor",
    "finetuned",
];

/// RoPE's base and scaling.
pub(super) fn read(
    top: &Keys,
    max_position_embeddings: usize,
) -> Result<(f64, Option<RopeScaling>), HfConfigError> {
    refuse_partial(top)?;
    let (name, prefix) = match (top.has("rope_parameters"), top.has("rope_scaling")) {
        (true, true) => {
            return refuse("both rope_parameters and rope_scaling are given: keep one of them");
        }
        (true, false) => ("rope_parameters", "rope_parameters."),
        (false, _) => ("rope_scaling", "rope_scaling."),
    };
    let base = top.real("rope_theta")?;
    let Some(nested) = top.get(name) else {
        return Ok((above_one(base)?, None));
    };
    let keys = Keys::new(nested, prefix)?;
    refuse_partial(&keys)?;
    // Among the unknown ones are the names of layer types, where each has its own.
    if let Some(key) = keys.names().find(|key| !KNOWN.contains(&key.as_str())) {
        return refuse(format!("{prefix}{key} is not supported"));
    }
    let theta = above_one(keys.real("rope_theta")?.or(base))?;
    let kind = match keys.text("rope_type")? {
        Some(kind) => Some(kind),
        None => keys.text("type")?,
    };
    let need = |key| match keys.positive(key)? {
        Some(value) => Ok(value),
        None => refuse(format!("{prefix}{key} is missing")),
    };
    let original = keys.number("original_max_position_embeddings")?;
    let original_max_position_embeddings = original.unwrap_or(max_position_embeddings);
    let scaling = match kind {
        None | Some("default") => return Ok((theta, None)),
        Some("llama3") => RopeScaling::Llama3 {
            factor: need("factor")?,
            low_freq_factor: need("low_freq_factor")?,
            high_freq_factor: need("high_freq_factor")?,
            original_max_position_embeddings,
        },
        Some("yarn") => {
            if keys.flag("truncate")? == Some(false) {
                return refuse(format!("{prefix}truncate = false is not supported"));
            }
            let factor = need("factor")?;
            RopeScaling::Yarn {
                factor,
                original_max_position_embeddings,
                beta_fast: keys.positive("beta_fast")?.unwrap_or(32.0),
                beta_slow: keys.positive("beta_slow")?.unwrap_or(1.0),
                attention_factor: attention_factor(&keys, factor)?,
            }
        }
        Some(other) => {
            return refuse(format!(
                "rope scaling {other:?} is not supported: llama3 and yarn are"
            ));
        }
    };
    Ok((theta, Some(scaling)))
}

/// What YaRN multiplies cos and sin by, where it is not the usual function of the factor.
fn attention_factor(keys: &Keys, factor: f64) -> Result<Option<f64>, HfConfigError> {
    if let Some(given) = keys.positive("attention_factor")? {
        return Ok(Some(given));
    }
    let scale = |m: f64| 1.0 + 0.1 * m * factor.max(1.0).ln();
    let both = (keys.real("mscale")?, keys.real("mscale_all_dim")?);
    Ok(match both {
        // As in transformers, where a zero counts as absent.
        (Some(a), Some(b)) if a != 0.0 && b != 0.0 => Some(scale(a) / scale(b)),
        _ => None,
    })
}

fn above_one(theta: Option<f64>) -> Result<f64, HfConfigError> {
    match theta {
        None => Ok(10_000.0),
        Some(theta) if theta > 1.0 => Ok(theta),
        Some(theta) => refuse(format!("rope_theta must be above 1, got {theta}")),
    }
}

fn refuse_partial(keys: &Keys) -> Result<(), HfConfigError> {
    match keys.real("partial_rotary_factor")? {
        Some(part) if part != 1.0 => refuse("partial_rotary_factor is not supported"),
        _ => Ok(()),
    }
}
