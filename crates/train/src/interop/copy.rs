//! Weights from one folder into another, a slice at a time.

use std::collections::HashMap;
use std::path::Path;

use ttt_weights::{Dtype, TensorSpec, Writer, WrittenFile};

use super::init_from::InitFrom;
use crate::error::TrainError;

/// Elements in memory at a time.
const SLICE: usize = 1 << 20;

/// Writes all parameters of `plan` to `model.safetensors` (or shards) in `dir` as `dtype`.
pub(super) fn write_model(
    plan: &InitFrom<'_>,
    dir: &Path,
    dtype: Dtype,
    max_shard_bytes: u64,
) -> Result<Vec<WrittenFile>, TrainError> {
    plan.check_redundant_head()?;
    let specs = plan.specs().iter().map(|spec| TensorSpec {
        name: spec.name.clone(),
        shape: spec.shape.clone(),
        dtype,
    });
    let mut writer = Writer::create(
        dir,
        "model",
        specs.collect(),
        max_shard_bytes,
        HashMap::new(),
    )?;
    let mut slice = vec![0.0; SLICE];
    for spec in plan.specs() {
        if plan.weights().info(&spec.name).is_none() {
            writer.append_f32(&spec.name, &plan.values(&spec.name)?)?;
            continue;
        }
        for begin in (0..spec.len()).step_by(SLICE) {
            let end = spec.len().min(begin + SLICE);
            let slice = &mut slice[..end - begin];
            plan.weights()
                .read_f32_range(&spec.name, begin..end, slice)?;
            writer.append_f32(&spec.name, slice)?;
        }
    }
    Ok(writer.finish()?)
}
