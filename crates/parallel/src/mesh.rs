//! The ranks of a run as a grid.

use std::sync::Arc;

use burn::tensor::Tensor;

use crate::activity::Activity;
use crate::group::{CommError, ProcessGroup};
use crate::single::SingleRank;

/// How many ranks lie along each direction of the grid.
///
/// The rank at `(r, s, c)` is number `(r · shard + s) · context + c` of the run: the ranks that
/// exchange most lie next to each other, on one host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Copies of the parameters that read different rows.
    pub replicate: usize,
    /// Ranks over which one copy of the parameters is spread; they read different rows.
    pub shard: usize,
    /// Ranks over which each row is spread.
    pub context: usize,
    /// Whether one copy of the parameters is spread over the ranks of a row as well.
    pub shard_over_context: bool,
}

impl Layout {
    /// One rank.
    pub const SINGLE: Self = Self {
        replicate: 1,
        shard: 1,
        context: 1,
        shard_over_context: false,
    };

    /// How many ranks the grid has.
    pub fn ranks(&self) -> usize {
        self.replicate * self.shard * self.context
    }

    /// Ranks over which one copy of the parameters is spread.
    pub fn parameter_shards(&self) -> usize {
        match self.shard_over_context {
            true => self.shard * self.context,
            false => self.shard,
        }
    }

    /// Copies of the parameters.
    pub fn parameter_copies(&self) -> usize {
        self.ranks() / self.parameter_shards()
    }

    /// The layout of `ranks` ranks; `replicate` follows from the others where it is not given.
    ///
    /// # Errors
    /// If the numbers do not multiply to the ranks there are.
    pub fn of(
        ranks: usize,
        replicate: Option<usize>,
        shard: usize,
        context: usize,
    ) -> Result<Self, CommError> {
        for (key, value) in [
            ("replicate", replicate.unwrap_or(1)),
            ("shard", shard),
            ("context", context),
        ] {
            if value == 0 {
                let problem = format!("parallel.{key} is 0: it counts ranks, from 1");
                return Err(CommError::Layout(problem));
            }
        }
        let Some(inner) = shard.checked_mul(context).filter(|&inner| inner <= ranks) else {
            return Err(CommError::Layout(format!(
                "parallel.shard {shard} times parallel.context {context} is more than the ranks \
                 there are, {ranks}: lower one of them, or start more ranks"
            )));
        };
        let fitting = ranks / inner;
        if inner * fitting != ranks {
            return Err(CommError::Layout(format!(
                "parallel.shard {shard} times parallel.context {context} is {inner}, which does \
                 not divide the ranks there are, {ranks}: change one of them, or start {} or {} \
                 ranks",
                inner * fitting,
                inner * (fitting + 1),
            )));
        }
        match replicate {
            Some(given) if given != fitting => Err(CommError::Layout(format!(
                "parallel.replicate {given}, shard {shard} and context {context} multiply to {}, \
                 but there are {ranks} ranks: set parallel.replicate = {fitting} or leave it out, \
                 or start {} ranks",
                given.saturating_mul(inner),
                given.saturating_mul(inner),
            ))),
            _ => Ok(Self {
                replicate: fitting,
                shard,
                context,
                shard_over_context: false,
            }),
        }
    }

    /// The run's number of the rank at a place in the grid.
    fn rank(&self, [replicate, shard, context]: [usize; 3]) -> usize {
        (replicate * self.shard + shard) * self.context + context
    }

    /// The lists of ranks that differ only along the directions that `along` names.
    fn lists(&self, along: [bool; 3]) -> Vec<Vec<usize>> {
        let extent = [self.replicate, self.shard, self.context];
        let steps = |chosen: bool| {
            let mut places = vec![[0; 3]];
            for direction in 0..3 {
                let count = match along[direction] == chosen {
                    true => extent[direction],
                    false => 1,
                };
                places = places
                    .into_iter()
                    .flat_map(|place| {
                        (0..count).map(move |i| {
                            let mut place = place;
                            place[direction] = i;
                            place
                        })
                    })
                    .collect();
            }
            places
        };
        let members = steps(true);
        steps(false)
            .into_iter()
            .map(|fixed| {
                let place = |moving: &[usize; 3]| std::array::from_fn(|d| fixed[d] + moving[d]);
                members.iter().map(|m| self.rank(place(m))).collect()
            })
            .collect()
    }
}

/// A grid of `replicate` × `shard` × `context` ranks; each rank is a member of one group per
/// direction.
#[derive(Clone, Debug)]
pub struct Mesh {
    /// All ranks.
    pub world: Arc<dyn ProcessGroup>,
    /// Ranks that hold the same shard of the parameters and the same part of different rows.
    pub replicate: Arc<dyn ProcessGroup>,
    /// Ranks that hold the shards of one copy of the parameters: along `shard`, or `shard` × `context`.
    pub shard: Arc<dyn ProcessGroup>,
    /// Ranks that hold the parts of the same rows, in order.
    pub context: Arc<dyn ProcessGroup>,
    /// All that hold the same shard of the parameters: replicate × context, or `replicate` alone. A
    /// gradient is summed over these.
    pub replicas: Arc<dyn ProcessGroup>,
    /// What this rank's main thread says of itself.
    pub activity: Activity,
    /// How many ranks lie along each direction.
    pub layout: Layout,
}

impl Mesh {
    /// The mesh of one rank.
    pub fn single() -> Self {
        let single: Arc<dyn ProcessGroup> = Arc::new(SingleRank);
        Self {
            world: single.clone(),
            replicate: single.clone(),
            shard: single.clone(),
            context: single.clone(),
            replicas: single,
            activity: Activity::default(),
            layout: Layout::SINGLE,
        }
    }

    /// The ranks of `world` laid out as a grid. Every rank calls it.
    ///
    /// # Errors
    /// If the layout is not one of so many ranks, or a rank is lost.
    pub fn new(world: Arc<dyn ProcessGroup>, layout: Layout) -> Result<Self, CommError> {
        let Layout {
            replicate,
            shard,
            context,
            shard_over_context: joint,
        } = layout;
        Layout::of(world.size(), Some(replicate), shard, context)?;
        let along = |directions: [bool; 3]| -> Result<Arc<dyn ProcessGroup>, CommError> {
            let lists = layout.lists(directions);
            match lists[0].len() {
                1 => Ok(Arc::new(SingleRank)),
                all if all == world.size() => Ok(world.clone()),
                _ => world.split(&lists),
            }
        };
        let (replicate, context) = (along([true, false, false])?, along([false, false, true])?);
        // Groups of the same ranks are one group, since each costs connections and buffers; but not those of
        // which one carries what blocks wait for and the other what is begun early and large: what is
        // exchanged in a block would stand in line behind all gradients of the block before.
        let replicas = match joint || context.size() == 1 {
            true => replicate.clone(),
            false => world.split(&layout.lists([true, false, true]))?,
        };
        let shard = match joint && context.size() > 1 {
            true => world.split(&layout.lists([false, true, true]))?,
            false => along([false, true, false])?,
        };
        Ok(Self {
            shard,
            layout,
            replicate,
            context,
            replicas,
            world,
            activity: Activity::default(),
        })
    }

    /// This rank's place among those that read different rows.
    pub fn data_rank(&self) -> usize {
        // The parts of a row are next to each other.
        self.world.rank() / self.layout.context
    }

    /// How many ranks read different rows.
    pub fn data_size(&self) -> usize {
        self.layout.replicate * self.layout.shard
    }

    /// The sum over all ranks: `[n]` → `[n]`.
    ///
    /// # Errors
    /// If a rank is lost.
    pub fn all_reduce_sum(&self, tensor: Tensor<1>) -> Result<Tensor<1>, CommError> {
        self.world.all_reduce_sum(tensor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::threads::on_threads;

    fn same(a: &Arc<dyn ProcessGroup>, b: &Arc<dyn ProcessGroup>) -> bool {
        std::ptr::addr_eq(Arc::as_ptr(a), Arc::as_ptr(b))
    }

    #[test]
    fn numbers_must_multiply_to_the_ranks() {
        let of = |ranks, replicate, shard, context| {
            let layout = Layout::of(ranks, replicate, shard, context);
            layout.map_err(|error| error.to_string())
        };
        let layout = |replicate, shard, context| {
            Ok(Layout {
                replicate,
                shard,
                context,
                shard_over_context: false,
            })
        };
        assert_eq!(of(1, None, 1, 1), layout(1, 1, 1));
        assert_eq!(of(8, None, 2, 2), layout(2, 2, 2));
        assert_eq!(of(8, Some(4), 1, 2), layout(4, 1, 2));
        for (refused, says) in [
            (of(8, None, 0, 1), "parallel.shard is 0"),
            (of(8, Some(0), 1, 1), "parallel.replicate is 0"),
            (of(2, None, 2, 2), "more than the ranks there are, 2"),
            (of(8, None, 3, 1), "start 6 or 9"),
            (of(8, Some(3), 2, 1), "multiply to 6, but there are 8 ranks"),
            (of(8, Some(3), 2, 1), "parallel.replicate = 4"),
            (of(8, None, usize::MAX, 2), "more than the ranks"),
        ] {
            let refused = refused.expect_err(says);
            assert!(refused.contains(says), "{refused}");
        }
    }

    #[test]
    fn context_ranks_are_neighbours_and_replicas_apart() {
        let layout = Layout {
            replicate: 2,
            shard: 2,
            context: 2,
            shard_over_context: false,
        };
        let lists = |along| layout.lists(along);
        assert_eq!(
            lists([false, false, true]),
            [[0, 1], [2, 3], [4, 5], [6, 7]]
        );
        assert_eq!(
            lists([false, true, false]),
            [[0, 2], [1, 3], [4, 6], [5, 7]]
        );
        assert_eq!(
            lists([true, false, false]),
            [[0, 4], [1, 5], [2, 6], [3, 7]]
        );
        assert_eq!(lists([true, false, true]), [[0, 1, 4, 5], [2, 3, 6, 7]]);
    }

    /// What a block waits for never shares a line with what is begun early.
    #[test]
    fn exchanges_within_rows_have_a_group_of_their_own() {
        for (replicate, shard, joint) in [(1, 1, false), (2, 1, false), (1, 1, true), (1, 2, true)]
        {
            let layout = Layout {
                replicate,
                shard,
                context: 2,
                shard_over_context: joint,
            };
            let alone = on_threads(layout.ranks(), |world| {
                let mesh = Mesh::new(Arc::new(world), layout).expect("as many ranks");
                [&mesh.replicas, &mesh.shard].map(|other| !same(other, &mesh.context))
            });
            assert!(alone.iter().all(|alone| *alone == [true; 2]), "{layout:?}");
        }
        // Without such exchanges one group serves both.
        let layout = Layout {
            replicate: 2,
            ..Layout::SINGLE
        };
        let shared = on_threads(2, |world| {
            let mesh = Mesh::new(Arc::new(world), layout).expect("as many ranks");
            same(&mesh.replicas, &mesh.replicate)
        });
        assert_eq!(shared, [true; 2]);
    }
}
