//! What the ranks decide together without waiting for each other: to end, because one of them was
//! asked to.

use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor, TensorData};

use crate::group::{CommError, ProcessGroup, Receive};

/// A vote that is held again and again, always decided by what was cast the time before: by then the
/// others' votes have arrived, so that nobody waits. All ranks decide the same the same time.
///
/// One small message to every other rank each time, over the host: nothing waits for a GPU.
#[derive(Debug)]
pub struct Votes {
    group: Arc<dyn ProcessGroup>,
    /// What this rank cast the time before.
    cast: Option<u8>,
}

impl Votes {
    /// Votes of `group`, whose tensors must travel over the host. Nothing else may
    /// [`exchange`](ProcessGroup::exchange) in it.
    pub fn new(group: Arc<dyn ProcessGroup>) -> Self {
        Self { group, cast: None }
    }

    /// Casts `own` for the next time, and returns the highest of all ranks' votes of the time before;
    /// at first 0. On one rank, `own` itself.
    ///
    /// # Errors
    /// If a rank is lost.
    pub fn highest(&mut self, own: u8) -> Result<u8, CommError> {
        let (me, size) = (self.group.rank(), self.group.size());
        if size == 1 {
            return Ok(own);
        }
        let others = || (0..size).filter(|&rank| rank != me);
        let ballot = || {
            let data = TensorData::new(vec![f32::from(own)], [1]);
            Tensor::from_data(data, (&Device::flex(), DType::F32))
        };
        let sends = others().map(|rank| (rank, ballot())).collect();
        self.group.exchange(sends, vec![])?;
        let Some(mine) = self.cast.replace(own) else {
            return Ok(0);
        };
        let due = |from| Receive {
            from,
            len: 1,
            dtype: DType::F32,
            device: Device::flex(),
        };
        let theirs = self.group.exchange(vec![], others().map(due).collect())?;
        let mut highest = mine;
        for theirs in theirs {
            let values: Vec<f32> = theirs
                .into_data()
                .try_into_vec()
                .map_err(|error| CommError::invalid("vote", format!("{error:?}")))?;
            highest = highest.max(values[0] as u8);
        }
        Ok(highest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SingleRank;
    use crate::threads::on_threads;

    #[test]
    fn one_voice_is_heard_by_all_at_the_same_time() {
        let decided = on_threads(3, |group| {
            let me = group.rank();
            let mut votes = Votes::new(Arc::new(group));
            let cast = |round| match (me, round) {
                (2, 4) => 15,
                (0, 4) => 2,
                _ => 0,
            };
            let vote = |round| votes.highest(cast(round)).expect("all ranks");
            (0..8).map(vote).collect::<Vec<_>>()
        });
        for decided in decided {
            assert_eq!(decided, [0, 0, 0, 0, 0, 15, 0, 0]);
        }
        let mut alone = Votes::new(Arc::new(SingleRank));
        assert_eq!(alone.highest(3).expect("one rank"), 3);
    }
}
