//! The parts of a gradient where products have left them, as kernels read them: `Parts` in
//! `source/optimizer.cu`.

use burn::tensor::DType;

use super::stream::{Arg, Buffer};
use crate::ops::flat::Part;

/// A gradient as the kernels read it: parts, f32 or bf16, that begin at multiples of four elements.
pub struct Gradient {
    /// Elements, and the memory unless they are zeros.
    parts: Vec<(usize, Option<Buffer>)>,
}

impl Gradient {
    /// `None` on another backend, and of parts that do not fit.
    pub fn of(grad: &[Part]) -> Option<Self> {
        let mut begin = 0;
        let mut parts = vec![];
        for part in grad {
            let buffer = match part {
                Part::Values(values) => {
                    let read = |b: &Buffer| matches!(b.dtype(), DType::F32 | DType::BF16);
                    Some(Buffer::of(values).filter(read)?)
                }
                Part::Zeros(_) => None,
            };
            if begin % 4 != 0 {
                return None;
            }
            begin += part.len();
            parts.push((part.len(), buffer));
        }
        Some(Self { parts })
    }

    /// Parts.
    pub fn len(&self) -> usize {
        self.parts.len()
    }

    /// Those that are in memory.
    pub fn buffers(&self) -> impl Iterator<Item = &Buffer> {
        self.parts.iter().filter_map(|(_, buffer)| buffer.as_ref())
    }

    /// What each launch reads; `addresses` are those of [`Gradient::buffers`].
    pub fn tables(&self, addresses: &[u64]) -> Result<Vec<Table>, String> {
        let mut addresses = addresses.iter();
        let mut parts = Vec::with_capacity(self.parts.len());
        for (count, buffer) in &self.parts {
            parts.push(match buffer {
                Some(buffer) => {
                    let at = *addresses.next().ok_or("a gradient without an address")?;
                    (*count, at, buffer.dtype())
                }
                None => (*count, 0, DType::F32),
            });
        }
        let all = stretches(&parts);
        Ok(all.chunks(PARTS).map(|few| Table(few.to_vec())).collect())
    }
}

/// Most stretches of a launch; as in the source.
pub const PARTS: usize = 12;

/// Stretches that one launch reads: at least one.
#[derive(Clone, Debug)]
pub struct Table(Vec<Stretch>);

impl Table {
    fn end(&self) -> usize {
        self.0.last().map_or(0, |last| last.begin + last.count)
    }

    /// Elements.
    pub fn count(&self) -> usize {
        self.end() - self.0.first().map_or(0, |first| first.begin)
    }

    /// Bytes of them in memory.
    pub fn bytes(&self) -> f64 {
        let there = self.0.iter().filter(|stretch| stretch.at != 0);
        there.map(|s| (s.count * s.dtype.size()) as f64).sum()
    }

    /// Whether each stretch lies where vectors of four elements may be read.
    pub fn is_aligned(&self) -> bool {
        let vector = |s: &Stretch| s.at.is_multiple_of(4 * s.dtype.size() as u64);
        self.0.iter().all(vector)
    }

    /// `Parts` in the source.
    pub fn arg(&self) -> Arg {
        let mut words = [0u64; 2 * PARTS + 2];
        let mut narrow = 0u64;
        for (i, stretch) in self.0.iter().enumerate() {
            words[i] = stretch.begin as u64;
            words[PARTS + 1 + i] = stretch.at;
            narrow |= u64::from(stretch.dtype == DType::BF16) << i;
        }
        words[self.0.len()] = self.end() as u64;
        words[2 * PARTS + 1] = narrow | (self.0.len() as u64) << 32;
        Arg::Parts(words)
    }
}

/// Elements of a gradient that lie together.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Stretch {
    /// Its first element among all.
    begin: usize,
    /// Elements.
    count: usize,
    /// Address, 0 for zeros.
    at: u64,
    dtype: DType,
}

impl Stretch {
    /// The address behind its last element.
    fn end(&self) -> u64 {
        self.at + (self.count * self.dtype.size()) as u64
    }
}

/// Elements, addresses and precisions of parts as stretches. Parts of one precision that follow each
/// other in memory are one: a product often makes the gradients of several parameters.
fn stretches(parts: &[(usize, u64, DType)]) -> Vec<Stretch> {
    let mut all: Vec<Stretch> = vec![];
    let mut begin = 0;
    for &(count, at, dtype) in parts {
        match all.last_mut() {
            Some(last) if last.at != 0 && last.dtype == dtype && last.end() == at => {
                last.count += count;
            }
            _ => all.push(Stretch {
                begin,
                count,
                at,
                dtype,
            }),
        }
        begin += count;
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stretch(begin: usize, count: usize, at: u64, dtype: DType) -> Stretch {
        Stretch {
            begin,
            count,
            at,
            dtype,
        }
    }

    #[test]
    fn only_parts_of_one_precision_are_read_together() {
        use DType::{BF16, F32};
        // Two of bf16 side by side; an f32 part just behind them; zeros; f32 twice, with a gap.
        let parts = [
            (8, 1024, BF16),
            (16, 1040, BF16),
            (4, 1072, F32),
            (4, 0, F32),
            (12, 4096, F32),
            (4, 4160, F32),
        ];
        let expected = [
            stretch(0, 24, 1024, BF16),
            stretch(24, 4, 1072, F32),
            stretch(28, 4, 0, F32),
            stretch(32, 12, 4096, F32),
            stretch(44, 4, 4160, F32),
        ];
        assert_eq!(stretches(&parts), expected);
    }

    #[test]
    fn a_launch_reads_its_parts_and_the_end_of_the_last() {
        let table = Table(vec![
            stretch(8, 4, 256, DType::F32),
            stretch(12, 5, 512, DType::BF16),
        ]);
        let Arg::Parts(words) = table.arg() else {
            panic!("a table")
        };
        assert_eq!(words[..4], [8, 12, 17, 0]);
        assert_eq!(words[PARTS + 1..PARTS + 4], [256, 512, 0]);
        assert_eq!(words[2 * PARTS + 1], 2 | 2 << 32);
        assert_eq!((table.count(), table.bytes()), (9, 26.0));
    }
}
