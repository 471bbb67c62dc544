//! How long operations take on a GPU, one by one.

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
    /// It ran beside the others, on a stream of its own: an exchange between ranks.
    pub beside: bool,
    /// Milliseconds between the end of the operation before it and its beginning: Burn's own kernels, or
    /// nothing. 0 for what runs beside.
    pub gap: f64,
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
    /// See [`Timed::beside`].
    pub beside: bool,
}

/// What was timed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Profile {
    /// Milliseconds from the beginning to the end, on the device.
    pub ms: f64,
    /// In the order in which they were issued.
    pub operations: Vec<Timed>,
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
                    beside: timed.beside,
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

/// Where two operations follow each other with something between them.
#[derive(Clone, Debug, PartialEq)]
pub struct Gap {
    /// The operation before; `None` at the beginning.
    pub after: Option<String>,
    /// The operation behind.
    pub before: String,
    /// How often.
    pub calls: usize,
    /// Milliseconds of all of them.
    pub ms: f64,
}

/// The gaps between `operations` by their neighbours, the longest first.
pub fn gaps(operations: &[Timed]) -> Vec<Gap> {
    let mut gaps: HashMap<(Option<&str>, &str), (usize, f64)> = HashMap::new();
    let mut after = None;
    for timed in operations.iter().filter(|timed| !timed.beside) {
        let (calls, ms) = gaps.entry((after, &timed.name)).or_default();
        *calls += 1;
        *ms += timed.gap;
        after = Some(&timed.name[..]);
    }
    let gap = |((after, before), (calls, ms)): ((Option<&str>, &str), (usize, f64))| Gap {
        after: after.map(String::from),
        before: before.into(),
        calls,
        ms,
    };
    let mut gaps: Vec<Gap> = gaps.into_iter().map(gap).collect();
    let names = |gap: &Gap| (gap.after.clone(), gap.before.clone());
    gaps.sort_by(|a, b| b.ms.total_cmp(&a.ms).then_with(|| names(a).cmp(&names(b))));
    gaps
}

/// Times the CUDA operations of this crate from [`begin`] to [`Recording::end`]. What Burn's own kernels and
/// the gaps take is not among them. One at a time.
#[derive(Debug)]
pub struct Recording {
    #[cfg(feature = "cuda")]
    events: crate::cuda::profile::Recording,
}

/// Begins on `device`. `None` where there is nothing to time: another device, a build without CUDA.
///
/// # Errors
/// If the driver refuses.
pub fn begin(device: &Device) -> Option<Result<Recording, String>> {
    #[cfg(feature = "cuda")]
    return crate::cuda::profile::Recording::begin(device)
        .map(|begun| begun.map(|events| Recording { events }));
    #[cfg(not(feature = "cuda"))]
    {
        let _ = device;
        None
    }
}

impl Recording {
    /// Waits for the device and tells what it did.
    ///
    /// # Errors
    /// If an operation failed.
    pub fn end(self) -> Result<Profile, String> {
        #[cfg(feature = "cuda")]
        return self.events.end();
        #[cfg(not(feature = "cuda"))]
        Err("nothing is recorded without CUDA".into())
    }
}

/// What `work` does on `device`. `None` where there is nothing to time.
///
/// # Errors
/// If an operation failed.
pub fn record<T>(
    device: &Device,
    work: impl FnOnce() -> T,
) -> Option<Result<(T, Profile), String>> {
    let begun = begin(device)?;
    Some(begun.and_then(|recording| {
        let done = work();
        Ok((done, recording.end()?))
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timed(name: &str, ms: f64, work: Option<Work>) -> Timed {
        Timed {
            name: name.into(),
            ms,
            work,
            beside: false,
            gap: ms / 10.0,
        }
    }

    #[test]
    fn gaps_are_told_by_their_neighbours_and_exchanges_have_none() {
        let beside = Timed {
            beside: true,
            ..timed("all_reduce", 9.0, None)
        };
        let (a, b) = (timed("a", 1.0, None), timed("b", 4.0, None));
        let found = gaps(&[a.clone(), b.clone(), beside, a, b]);
        let found: Vec<_> = found
            .iter()
            .map(|g| (g.after.as_deref(), &g.before[..], g.calls, g.ms))
            .collect();
        let expected = [
            (Some("a"), "b", 2, 0.8),
            (None, "a", 1, 0.1),
            (Some("b"), "a", 1, 0.1),
        ];
        assert_eq!(found, expected);
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
