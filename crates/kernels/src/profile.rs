//! Where the time of a step goes, operation by operation.

use std::collections::HashMap;

use burn::tensor::Device;

use crate::work::Work;

/// One operation on the GPU.
#[derive(Clone, Debug, PartialEq)]
pub struct Timed {
    /// Kernel or product, with the sizes that matter.
    pub name: String,
    /// Milliseconds.
    pub ms: f64,
    /// What it does at least, where that is known.
    pub work: Option<Work>,
}

/// All operations of one name.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// See [`Timed::name`].
    pub name: String,
    /// How many.
    pub calls: usize,
    /// Milliseconds of all of them.
    pub ms: f64,
    /// Work of all of them; `None` if that of one is not known.
    pub work: Option<Work>,
}

/// `operations` by name, the longest first.
pub fn by_name(operations: &[Timed]) -> Vec<Entry> {
    let mut entries: HashMap<&str, Entry> = HashMap::new();
    for timed in operations {
        match entries.entry(&timed.name) {
            std::collections::hash_map::Entry::Vacant(free) => {
                free.insert(Entry {
                    name: timed.name.clone(),
                    calls: 1,
                    ms: timed.ms,
                    work: timed.work,
                });
            }
            std::collections::hash_map::Entry::Occupied(found) => {
                let entry = found.into_mut();
                entry.calls += 1;
                entry.ms += timed.ms;
                entry.work = match (entry.work, timed.work) {
                    (Some(a), Some(b)) => a.plus(b),
                    _ => None,
                };
            }
        }
    }
    let mut entries: Vec<Entry> = entries.into_values().collect();
    entries.sort_by(|a, b| b.ms.total_cmp(&a.ms).then_with(|| a.name.cmp(&b.name)));
    entries
}

/// Times every CUDA operation of this crate that `work` issues on `device`. What Burn's own kernels
/// and the gaps take is not among them. `None` where there is nothing to time: another device, a
/// build without CUDA.
///
/// # Errors
/// If an operation failed.
pub fn record<T>(
    device: &Device,
    work: impl FnOnce() -> T,
) -> Option<Result<(T, Vec<Timed>), String>> {
    #[cfg(feature = "cuda")]
    return crate::cuda::profile::record_operations(device, work);
    #[cfg(not(feature = "cuda"))]
    {
        let _ = (device, work);
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timed(name: &str, ms: f64, work: Option<Work>) -> Timed {
        Timed {
            name: name.into(),
            ms,
            work,
        }
    }

    #[test]
    fn equal_names_are_added_and_the_longest_come_first() {
        let flops = |x| Some(Work::Flops(x));
        let entries = by_name(&[
            timed("rope", 1.0, Some(Work::Bytes(3e6))),
            timed("gemm", 2.0, flops(4e9)),
            timed("gemm", 2.0, flops(4e9)),
            timed("scan", 0.5, None),
            timed("scan", 0.5, flops(1.0)),
        ]);
        let names: Vec<&str> = entries.iter().map(|e| e.name.as_str()).collect();
        assert_eq!(names, ["gemm", "rope", "scan"]);
        assert_eq!((entries[0].calls, entries[0].ms), (2, 4.0));
        assert_eq!(entries[0].work, flops(8e9));
        assert_eq!(Work::Flops(8e9).rate(4.0), (2.0, "TFLOP/s"));
        assert_eq!(entries[2].work, None, "one of two is not known");
    }
}
