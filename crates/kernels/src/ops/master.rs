//! Master weights: f32, held whole or in two halves of 16 bits.
//!
//! A model that computes in bf16 needs the weights in bf16 and the update needs them in f32. Where the
//! upper half is kept as that very bf16, rounded, and the lower half is what the rounding left, both are
//! there in the 4 bytes of the f32, and none of them is copied.
//!
//! n: elements.

use std::ops::Range;

use burn::tensor::{DType, Device, Int, Tensor, TensorData, bf16};
use rayon::prelude::*;

use crate::dtype::cast;

/// `value` rounded to bf16, and the 16 bits with which [`join`] has it back: of every number, of ±0 and
/// of ±∞ the same bits. A NaN stays one in both, its payload is not kept.
///
/// The rounding is to nearest, exact ties away from zero: ties to even would leave a difference of
/// 2¹⁵, which 16 bits cannot tell from −2¹⁵. Otherwise it is the usual one, and like it turns what is
/// too large into ±∞.
pub fn split(value: f32) -> (bf16, i16) {
    let bits = value.to_bits();
    let high = match value.is_nan() {
        // Rounded, one with few bits would be ∞, and one with all of them a zero. With a bit in the
        // middle, nothing that is added or taken away below makes it a number.
        true => bits >> 16 | 0x40,
        false => (bits + 0x8000) >> 16,
    };
    // high · 2¹⁶ has no such bits, so the difference to it has those of the value.
    (bf16::from_bits(high as u16), bits as i16)
}

/// The f32 of which `high` and `low` are the halves.
pub fn join(high: bf16, low: i16) -> f32 {
    let high = u32::from(high.to_bits()) << 16;
    f32::from_bits(high.wrapping_add_signed(low.into()))
}

/// f32 weights `[n]`: the first, which the model needs in f32, as they are, and the others in halves, if
/// it computes with them in bf16.
#[derive(Clone, Debug, Default)]
pub struct Master {
    /// The first elements, f32.
    pub(crate) wide: Option<Tensor<1>>,
    /// The others.
    pub(crate) halves: Option<Halves>,
}

/// Elements that are worth a core's turn.
const SHARE: usize = 1 << 16;

/// See [`split`].
#[derive(Clone, Debug)]
pub(crate) struct Halves {
    /// bf16.
    pub high: Tensor<1>,
    /// 16 bits.
    pub low: Tensor<1, Int>,
}

impl Halves {
    fn new(values: &[f32], device: &Device) -> Self {
        let (mut high, mut low) = (vec![], vec![]);
        let all = values.par_iter().with_min_len(SHARE);
        all.map(|value| split(*value))
            .unzip_into_vecs(&mut high, &mut low);
        let len = [values.len()];
        Self {
            high: Tensor::from_data(TensorData::new(high, len), (device, DType::BF16)),
            low: Tensor::from_data(TensorData::new(low, len), (device, DType::I16)),
        }
    }

    fn slice(&self, range: Range<usize>) -> Self {
        Self {
            high: self.high.clone().slice([range.clone()]),
            low: self.low.clone().slice([range]),
        }
    }

    /// The values; waits for the device.
    fn read(&self) -> Result<Vec<f32>, String> {
        let high: Vec<bf16> = host(self.high.try_to_data())?;
        let low: Vec<i16> = host(self.low.try_to_data())?;
        let pairs = high.into_par_iter().zip(low).with_min_len(SHARE);
        Ok(pairs.map(|(high, low)| join(high, low)).collect())
    }

    fn to_f32(&self) -> Tensor<1> {
        let values = self.read().expect("weights on the host");
        let data = TensorData::new(values, self.high.dims());
        Tensor::from_data(data, (&self.high.device(), DType::F32))
    }
}

impl Master {
    /// `values`, of which those from `wide` on are held in halves.
    pub fn new(mut values: Vec<f32>, wide: usize, device: &Device) -> Self {
        let others = values.get(wide..).unwrap_or_default();
        let halves = (!others.is_empty()).then(|| Halves::new(others, device));
        if halves.is_some() {
            // Mostly next to nothing is left.
            values.truncate(wide);
            values.shrink_to_fit();
        }
        let len = [values.len()];
        let first = || Tensor::from_data(TensorData::new(values, len), (device, DType::F32));
        Self {
            wide: (len != [0]).then(first),
            halves,
        }
    }

    /// Elements.
    pub fn len(&self) -> usize {
        let halves = self.halves.as_ref();
        self.wide_len() + halves.map_or(0, |halves| halves.high.dims()[0])
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Elements that are not in halves.
    pub fn wide_len(&self) -> usize {
        self.wide.as_ref().map_or(0, |wide| wide.dims()[0])
    }

    /// Elements `range`: views of these, where the device's slices are.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn slice(&self, range: Range<usize>) -> Self {
        if range == (0..self.len()) {
            return self.clone();
        }
        let (wide, halves) = self.ranges(&range);
        let first = self.wide.as_ref().filter(|_| !wide.is_empty());
        let others = self.halves.as_ref().filter(|_| !halves.is_empty());
        Self {
            wide: first.map(|first| first.clone().slice([wide])),
            halves: others.map(|others| others.slice(halves)),
        }
    }

    /// Parts end to end, none of them in f32 behind one in halves.
    pub fn cat(parts: Vec<Self>) -> Self {
        let (mut wide, mut high, mut low) = (vec![], vec![], vec![]);
        for part in parts {
            assert!(
                part.wide.is_none() || high.is_empty(),
                "what is in f32 comes first"
            );
            wide.extend(part.wide);
            if let Some(halves) = part.halves {
                high.push(halves.high);
                low.push(halves.low);
            }
        }
        Self {
            wide: (!wide.is_empty()).then(|| Tensor::cat(wide, 0)),
            halves: (!high.is_empty()).then(|| Halves {
                high: Tensor::cat(high, 0),
                low: Tensor::cat(low, 0),
            }),
        }
    }

    /// Elements `range` as the model computes with them in `dtype`: without a copy, where they are held
    /// like that.
    ///
    /// # Panics
    /// If there are none, or elements of both kinds among them.
    pub fn computed(&self, range: Range<usize>, dtype: DType) -> Tensor<1> {
        let part = self.slice(range);
        match (part.wide, part.halves) {
            (Some(wide), None) => cast(wide, dtype),
            (None, Some(halves)) if dtype == DType::BF16 => halves.high,
            (None, Some(halves)) => cast(halves.to_f32(), dtype),
            _ => panic!("weights of one kind"),
        }
    }

    /// The values of elements `range`, exactly; waits for the device.
    ///
    /// # Errors
    /// If what computes them failed.
    pub fn read(&self, range: Range<usize>) -> Result<Vec<f32>, String> {
        let part = self.slice(range);
        let mut values = match part.wide {
            Some(wide) => host(wide.try_to_data())?,
            None => vec![],
        };
        if let Some(halves) = part.halves {
            values.extend(halves.read()?);
        }
        Ok(values)
    }

    /// All values in one f32 buffer. Halves are joined on the host, which waits for them.
    ///
    /// # Panics
    /// If there are none, or what computes them failed.
    pub fn to_f32(&self) -> Tensor<1> {
        let halves = self.halves.as_ref().map(Halves::to_f32);
        let parts: Vec<_> = self.wide.iter().cloned().chain(halves).collect();
        match &parts[..] {
            [whole] => whole.clone(),
            _ => Tensor::cat(parts, 0),
        }
    }

    /// `values` `[n]` f32 held as these are.
    pub(crate) fn like(&self, values: Tensor<1>) -> Self {
        if self.halves.is_none() {
            return Self {
                wide: Some(values),
                halves: None,
            };
        }
        let device = values.device();
        let values: Vec<f32> = host(values.try_to_data()).expect("weights on the host");
        Self::new(values, self.wide_len(), &device)
    }

    /// What of `range` is f32, and what is in halves, counted from the first of these.
    fn ranges(&self, range: &Range<usize>) -> (Range<usize>, Range<usize>) {
        let wide = self.wide_len();
        (
            range.start.min(wide)..range.end.min(wide),
            range.start.max(wide) - wide..range.end.max(wide) - wide,
        )
    }
}

/// Elements as they are.
fn host<T: burn::tensor::Element, E: std::fmt::Display>(
    data: Result<TensorData, E>,
) -> Result<Vec<T>, String> {
    let data = data.map_err(|error| error.to_string())?;
    data.try_into_vec().map_err(|error| format!("{error:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn high_of(bits: u32) -> u16 {
        split(f32::from_bits(bits)).0.to_bits()
    }

    fn joined(bits: u32) -> u32 {
        let (high, low) = split(f32::from_bits(bits));
        join(high, low).to_bits()
    }

    /// What is asked of [`split`] and [`join`], for one pattern.
    fn check(bits: u32) {
        let value = f32::from_bits(bits);
        let (high, low) = split(value);
        if value.is_nan() {
            assert!(high.is_nan() && join(high, low).is_nan(), "{bits:#x}");
            return;
        }
        assert_eq!(joined(bits), bits, "{bits:#x}");
        // To nearest: beside a tie, that of the library.
        if bits & 0xffff != 0x8000 {
            assert_eq!(high.to_bits(), bf16::from_f32(value).to_bits(), "{bits:#x}");
        }
    }

    /// All upper halves, with the lower ones at which something changes.
    #[test]
    fn every_number_has_its_bits_back() {
        for high in 0..=u32::from(u16::MAX) {
            for low in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                check(high << 16 | low);
            }
        }
    }

    proptest! {
        #[test]
        fn any_pattern_has_its_bits_back(bits: u32) {
            check(bits);
        }
    }

    #[test]
    fn ties_and_the_ends_of_the_range() {
        // Away from zero, where ties to even go to 0x3f80 and to 0x3f82.
        assert_eq!(
            (high_of(0x3f80_8000), high_of(0xbf80_8000)),
            (0x3f81, 0xbf81)
        );
        assert_eq!(
            (high_of(0x3f81_8000), high_of(0x3f81_7fff)),
            (0x3f82, 0x3f81)
        );
        // The largest number is ∞ in bf16, and itself again.
        let largest = f32::MAX.to_bits();
        assert_eq!((high_of(largest), joined(largest)), (0x7f80, largest));
        // NaN with the fewest and with all bits.
        for bits in [0x7f80_0001, 0xff80_0001, 0x7fff_ffff, 0xffff_ffff] {
            check(bits);
            assert_eq!(high_of(bits) >> 15, (bits >> 31) as u16, "its sign");
        }
    }

    fn values(len: usize) -> Vec<f32> {
        let values = (0..len as u32).map(|i| f32::from_bits(0x3f80_0000 + 0x1_2345 * i));
        values.collect()
    }

    /// Any range is the range of the values, whatever of it is in halves, and parts are the whole again.
    #[test]
    fn ranges_of_both_kinds() {
        let device = Device::flex();
        for wide in [0, 5, 23] {
            let all = values(23);
            let master = Master::new(all.clone(), wide, &device);
            assert_eq!((master.len(), master.wide_len()), (23, wide));
            for (start, end) in [(0, 23), (0, 3), (2, 7), (5, 23), (9, 9), (11, 20)] {
                let range = start..end;
                assert_eq!(master.read(range.clone()).unwrap(), all[range.clone()]);
                let part = master.slice(range.clone());
                assert_eq!(part.read(0..range.len()).unwrap(), all[range]);
            }
            let again = Master::cat([0..4, 4..9, 9..23].map(|r| master.slice(r)).to_vec());
            assert_eq!((again.len(), again.wide_len()), (23, wide));
            assert_eq!(again.read(0..23).unwrap(), all);
            let same = master.like(master.to_f32());
            assert_eq!(same.wide_len(), wide);
            assert_eq!(same.read(0..23).unwrap(), all);
        }
    }

    /// In bf16 they are the upper halves; in any other precision the values.
    #[test]
    fn what_the_model_computes_with() {
        let device = Device::flex();
        let all = values(9);
        let master = Master::new(all.clone(), 4, &device);
        let first = master.computed(0..4, DType::F32);
        assert_eq!(host::<f32, _>(first.try_to_data()).unwrap(), all[..4]);
        let expected: Vec<bf16> = all[5..8].iter().map(|value| split(*value).0).collect();
        let others = master.computed(5..8, DType::BF16);
        assert_eq!(host::<bf16, _>(others.try_to_data()).unwrap(), expected);
        let others = master.computed(5..8, DType::F32);
        assert_eq!(host::<f32, _>(others.try_to_data()).unwrap(), all[5..8]);
    }
}
