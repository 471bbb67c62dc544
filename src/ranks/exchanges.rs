//! `ttt doctor --ranks`: every exchange between ranks against values computed on the host, and how
//! fast it is.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use burn::tensor::{DType, Device, Tensor, TensorData};
use ttt_kernels::dtype::cast;
use ttt_parallel::{CommError, Place, ProcessGroup, Receive};
use ttt_train::config::{Config, DeviceKind};
use ttt_train::device::read_f32;
use ttt_train::ranks::{join_on_devices, meet_on_host};

use super::args::DoctorArgs;
use super::launch::end_with_launcher;
use super::ways::Ways;

/// How long a rank may be silent.
const DEADLINE: Duration = Duration::from_secs(20);

/// Repetitions on the clock.
const TIMED: usize = 5;

/// Elements of a small exchange, of which every value is checked: more than one cache line, no
/// multiple of anything.
const SMALL: usize = 1027;

pub fn check(args: &DoctorArgs) -> anyhow::Result<()> {
    let place = Place::of_process()?;
    end_with_launcher()?;
    if place.size == 1 {
        bail!("one rank exchanges nothing: ttt launch --nproc 2 -- doctor --ranks");
    }
    let kind = DeviceKind::from(args.device);
    let load = |path| Config::load(path, &args.sets);
    let config = args.context.as_deref().map(load).transpose()?;
    let (host, tcp) = meet_on_host(&place, &format!("{args:?}"), DEADLINE)?;
    let checked = (|| {
        let (device, world) = join_on_devices(kind, &place, &host)?;
        if let Some(mut config) = config {
            config.run.device = kind;
            let ways = Ways {
                host,
                group: world,
                device,
                config,
            };
            return ways.all();
        }
        Check {
            host,
            device,
            elements: args.size << 18,
            failed: 0,
        }
        .all(&world)
    })();
    if let Err(error) = &checked {
        tcp.fail(&error.to_string());
    }
    checked
}

/// Element i of what rank `rank` gives: whole numbers whose sums over 64 ranks bf16 holds exactly.
fn value(rank: usize, i: usize) -> f32 {
    ((rank * 3 + i) % 4) as f32
}

struct Check {
    /// All ranks, over the host: for what they tell each other.
    host: Arc<dyn ProcessGroup>,
    device: Device,
    /// Of the large exchanges, f32.
    elements: usize,
    failed: usize,
}

/// Makes an exchange of `[n]` elements per rank, where it needs more `[size · n]`.
type Exchange = fn(&dyn ProcessGroup, Given) -> Result<Tensor<1>, CommError>;

/// What a rank gives: one part, or one for each rank.
struct Given {
    part: Tensor<1>,
    whole: Tensor<1>,
}

/// What the exchange must give rank `me` of ranks numbered `ranks` in the run: element i of `n`.
type Expected = fn(ranks: &[usize], me: usize, n: usize, i: usize) -> f32;

fn sum(ranks: &[usize], i: usize) -> f32 {
    ranks.iter().map(|&rank| value(rank, i)).sum()
}

/// An exchange, what it must give, and how many parts a rank sends in the best algorithm.
struct Case {
    name: &'static str,
    exchange: Exchange,
    expected: Expected,
    sent: fn(f64) -> f64,
}

const CASES: [Case; 6] = [
    Case {
        name: "all_reduce",
        exchange: |group, given| group.start_all_reduce_sum(given.part)?.wait(),
        expected: |ranks, _, _, i| sum(ranks, i),
        sent: |size| 2.0 * (size - 1.0) / size,
    },
    Case {
        name: "all_gather",
        exchange: |group, given| group.start_all_gather(given.part)?.wait(),
        expected: |ranks, _, n, i| value(ranks[i / n], i % n),
        sent: |size| size - 1.0,
    },
    Case {
        name: "reduce_scatter",
        exchange: |group, given| group.start_reduce_scatter_sum(given.whole)?.wait(),
        expected: |ranks, me, n, i| sum(ranks, me * n + i),
        sent: |size| size - 1.0,
    },
    Case {
        name: "all_to_all",
        exchange: |group, given| group.start_all_to_all(given.whole)?.wait(),
        expected: |ranks, me, n, i| value(ranks[i / n], me * n + i % n),
        sent: |size| size - 1.0,
    },
    Case {
        name: "broadcast",
        exchange: |group, given| group.broadcast(given.part, group.size() - 1),
        expected: |ranks, _, _, i| value(ranks[ranks.len() - 1], i),
        sent: |_| 1.0,
    },
    Case {
        // Around the ring, and back: two sends and two receives at once.
        name: "exchange",
        exchange: |group, given| {
            let (me, size) = (group.rank(), group.size());
            let (right, left) = ((me + 1) % size, (me + size - 1) % size);
            let receive = |from| Receive {
                from,
                len: given.part.dims()[0],
                dtype: given.part.dtype(),
                device: given.part.device(),
            };
            let sends = vec![(right, given.part.clone()), (left, given.part.clone())];
            let both = group.exchange(sends, vec![receive(right), receive(left)])?;
            Ok(Tensor::cat(both, 0))
        },
        expected: |ranks, me, n, i| {
            let size = ranks.len();
            let from = [(me + 1) % size, (me + size - 1) % size][i / n];
            value(ranks[from], i % n)
        },
        sent: |_| 2.0,
    },
];

impl Check {
    fn all(mut self, world: &Arc<dyn ProcessGroup>) -> anyhow::Result<()> {
        let size = world.size();
        self.say(&format!("{size} ranks on {:?}", self.device));
        for dtype in [DType::F32, DType::BF16] {
            let ranks: Vec<usize> = (0..size).collect();
            self.group("all", world, &ranks, dtype)?;
            // Neighbours and far ranks at once, each rank in two groups.
            let pairs: Vec<Vec<usize>> = ranks.chunks(2).map(<[usize]>::to_vec).collect();
            let stripes: Vec<Vec<usize>> = (0..2)
                .map(|first| (first..size).step_by(2).collect())
                .collect();
            for (name, parts) in [("pairs", pairs), ("stripes", stripes)] {
                // What is one rank, or all of them, is no other group.
                if parts[0].len() == 1 || parts[0].len() == size {
                    continue;
                }
                let group = world.split(&parts)?;
                let own = parts.iter().find(|part| part.contains(&world.rank()));
                let own = own.context("every rank is in one part")?;
                self.group(name, &group, own, dtype)?;
            }
        }
        world.barrier()?;
        match self.failed {
            0 => Ok(()),
            failed => bail!("{failed} exchanges gave wrong values: do not train on these ranks"),
        }
    }

    /// Every exchange of one group, small and large.
    fn group(
        &mut self,
        name: &str,
        group: &Arc<dyn ProcessGroup>,
        ranks: &[usize],
        dtype: DType,
    ) -> anyhow::Result<()> {
        for case in CASES {
            let make = |given: Given| (case.exchange)(&**group, given);
            let (me, size) = (group.rank(), group.size());
            let mut right = true;
            for n in [1, SMALL, self.elements / size] {
                let got = make(self.given(ranks[me], size, n, dtype))?;
                let got = read_f32(&cast(got, DType::F32))?;
                let expected = (0..got.len()).map(|i| (case.expected)(ranks, me, n, i));
                right &= got.iter().copied().eq(expected);
            }
            let seconds = self.seconds(&make, ranks[me], size, dtype)?;
            let bytes = (self.elements / size * dtype.size()) as f64 * (case.sent)(size as f64);
            self.tell(name, case.name, dtype, right, bytes / seconds)?;
        }
        Ok(())
    }

    fn given(&self, rank: usize, size: usize, n: usize, dtype: DType) -> Given {
        let tensor = |len: usize| {
            let values: Vec<f32> = (0..len).map(|i| value(rank, i)).collect();
            Tensor::from_data(TensorData::new(values, [len]), (&self.device, dtype))
        };
        Given {
            part: tensor(n),
            whole: tensor(size * n),
        }
    }

    /// Seconds of one large exchange.
    fn seconds(
        &self,
        make: &impl Fn(Given) -> Result<Tensor<1>, CommError>,
        rank: usize,
        size: usize,
        dtype: DType,
    ) -> anyhow::Result<f64> {
        let given = self.given(rank, size, self.elements / size, dtype);
        self.device.sync().context("the device failed")?;
        self.host.barrier()?;
        let begun = Instant::now();
        for _ in 0..TIMED {
            let (part, whole) = (given.part.clone(), given.whole.clone());
            make(Given { part, whole })?;
        }
        self.device.sync().context("the device failed")?;
        // Who only sends is done when the others have received.
        self.host.barrier()?;
        Ok(begun.elapsed().as_secs_f64() / TIMED as f64)
    }

    /// Rank 0 says how an exchange went, if it went well on all ranks.
    fn tell(
        &mut self,
        group: &str,
        exchange: &str,
        dtype: DType,
        right: bool,
        bytes_per_s: f64,
    ) -> anyhow::Result<()> {
        let wrong = TensorData::new(vec![f32::from(u8::from(!right))], [1]);
        let wrong = Tensor::from_data(wrong, (&Device::flex(), DType::F32));
        let wrong = read_f32(&self.host.all_reduce_sum(wrong)?)?[0];
        let verdict = match wrong {
            0.0 => "pass".into(),
            wrong => format!("FAIL on {wrong} ranks"),
        };
        self.failed += usize::from(wrong > 0.0);
        self.say(&format!(
            "{verdict:<5} {exchange:<15} {:<5} {group:<8} {:>8.2} GB/s sent per rank",
            format!("{dtype:?}").to_lowercase(),
            bytes_per_s / 1e9
        ));
        Ok(())
    }

    fn say(&self, line: &str) {
        if self.host.rank() == 0 {
            println!("{line}");
        }
    }
}
