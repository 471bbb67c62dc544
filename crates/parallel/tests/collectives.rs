//! Every exchange against values computed by hand, over many rounds.

use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use burn::tensor::{DType, Device, Tensor, TensorData};
use ttt_parallel::tcp::{Meeting, TcpGroup, connect};
use ttt_parallel::threads::{on_mesh, on_threads};
use ttt_parallel::{CommError, Layout, Pending, ProcessGroup, Receive, SingleRank};

const ROUNDS: usize = 20;

/// Element i of what rank `rank` gives in a round: small whole numbers, exact in bf16 up to their
/// sum over 8 ranks.
fn value(rank: usize, round: usize, i: usize) -> f32 {
    ((rank * 7 + round * 3 + i) % 31) as f32
}

fn tensor(values: Vec<f32>, dtype: DType) -> Tensor<1> {
    let len = values.len();
    Tensor::from_data(TensorData::new(values, [len]), (&Device::flex(), dtype))
}

fn values(tensor: Tensor<1>, dtype: DType) -> Vec<f32> {
    assert_eq!(tensor.dtype(), dtype);
    tensor
        .into_data()
        .convert::<f32>()
        .try_into_vec()
        .expect("f32")
}

/// Everything that `group` does, in one round, with `n` elements for each rank.
fn check_round(group: &dyn ProcessGroup, ranks: &[usize], round: usize, n: usize, dtype: DType) {
    let (me, size) = (group.rank(), group.size());
    let own = |len: usize| {
        let values = (0..len).map(|i| value(ranks[me], round, i)).collect();
        tensor(values, dtype)
    };
    let total = |i: usize| -> f32 { ranks.iter().map(|&r| value(r, round, i)).sum() };
    let of = |r: usize, i: usize| value(ranks[r], round, i);
    let check = |what: &str, got: Result<Tensor<1>, CommError>, expected: Vec<f32>| {
        let got = values(got.expect(what), dtype);
        assert_eq!(got, expected, "{what}, rank {me} of {size}, round {round}");
    };

    let sums: Vec<f32> = (0..n).map(total).collect();
    check(
        "all_reduce",
        group.start_all_reduce_sum(own(n)).and_then(Pending::wait),
        sums,
    );

    let gathered: Vec<f32> = (0..size)
        .flat_map(|r| (0..n).map(move |i| of(r, i)))
        .collect();
    check("all_gather", group.all_gather(own(n)), gathered.clone());
    let pending = group.start_all_gather(own(n));
    check(
        "start_all_gather",
        pending.and_then(|p| p.wait()),
        gathered.clone(),
    );

    let mine = me * n..(me + 1) * n;
    let scattered: Vec<f32> = mine.clone().map(total).collect();
    let whole = || own(size * n);
    let got = group.reduce_scatter_sum(whole());
    check("reduce_scatter", got, scattered.clone());
    let pending = group.start_reduce_scatter_sum(whole());
    let got = pending.and_then(|p| p.wait());
    check("start_reduce_scatter", got, scattered.clone());

    let turned: Vec<f32> = (0..size)
        .flat_map(|r| mine.clone().map(move |i| of(r, i)))
        .collect();
    check("all_to_all", group.all_to_all(whole()), turned.clone());
    let pending = group.start_all_to_all(whole());
    check(
        "start_all_to_all",
        pending.and_then(|p| p.wait()),
        turned.clone(),
    );

    // Several under way, waited for in another order than begun, with others in between.
    let gather = group.start_all_gather(own(n)).expect("begun");
    let scatter = group.start_reduce_scatter_sum(whole()).expect("begun");
    let turn = group.start_all_to_all(whole()).expect("begun");
    let again = group.start_all_gather(own(n + 1)).expect("begun");
    check(
        "all_reduce between",
        group.all_reduce_sum(own(n)),
        (0..n).map(total).collect(),
    );
    let longer = (0..size).flat_map(|r| (0..n + 1).map(move |i| of(r, i)));
    check("the second all_gather", again.wait(), longer.collect());
    check("all_to_all after", turn.wait(), turned);
    check("reduce_scatter after", scatter.wait(), scattered);
    check("the first all_gather", gather.wait(), gathered);

    let root = round % size;
    let sent = (0..n).map(|i| of(root, i)).collect();
    check("broadcast", group.broadcast(own(n), root), sent);

    // Around the ring in both directions, two tensors one way, in an order that would wait for ever
    // if a send waited for its receiver.
    let (right, left) = ((me + 1) % size, (me + size - 1) % size);
    let receive = |from, len| Receive {
        from,
        len,
        dtype,
        device: Device::flex(),
    };
    let sends = vec![(right, own(n)), (left, own(n + 1)), (right, own(n + 2))];
    let receives = match size {
        // Both ways lead to the same rank: in the order sent.
        1 | 2 => vec![receive(left, n), receive(left, n + 1), receive(left, n + 2)],
        _ => vec![
            receive(right, n + 1),
            receive(left, n),
            receive(left, n + 2),
        ],
    };
    let lens: Vec<_> = receives.iter().map(|due| (due.from, due.len)).collect();
    let got = group.exchange(sends, receives).expect("exchange");
    assert_eq!(got.len(), lens.len());
    for (got, (from, len)) in got.into_iter().zip(lens) {
        let expected = (0..len).map(|i| of(from, i)).collect();
        check("exchange", Ok(got), expected);
    }

    group.barrier().expect("barrier");
}

#[test]
fn one_rank() {
    for round in 0..ROUNDS {
        check_round(&SingleRank, &[0], round, 5, DType::F32);
    }
    let tensor = || tensor(vec![1.0], DType::F32);
    assert!(SingleRank.broadcast(tensor(), 1).is_err());
    assert!(SingleRank.exchange(vec![(0, tensor())], vec![]).is_err());
    assert!(SingleRank.split(&[vec![0, 1]]).is_err());
    assert_eq!(SingleRank.split(&[vec![0]]).expect("one rank").size(), 1);
}

#[test]
fn many_rounds() {
    for size in [1, 2, 3, 4, 8] {
        let ranks: Vec<usize> = (0..size).collect();
        for dtype in [DType::F32, DType::BF16] {
            on_threads(size, |group| {
                for round in 0..ROUNDS {
                    check_round(&group, &ranks, round, 1 + round % 4, dtype);
                }
                // Long enough to be summed in parts, and by a length that the ranks do not divide.
                check_round(&group, &ranks, 1, 1500 + 7, dtype);
            });
        }
    }
}

/// What `work` returns on each of `size` ranks that talk over TCP, here in threads.
fn on_tcp<T: Send>(size: usize, work: impl Fn(TcpGroup) -> T + Sync) -> Vec<T> {
    let free = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
    let port = free.expect("a free port").port();
    std::thread::scope(|scope| {
        let work = &work;
        let ranks: Vec<_> = (0..size)
            .map(|rank| {
                let meeting = Meeting {
                    rank,
                    size,
                    host: "127.0.0.1".into(),
                    port,
                    run: "test".into(),
                    fingerprint: 1,
                    patience: Duration::from_secs(20),
                    deadline: Duration::from_secs(20),
                };
                scope.spawn(move || work(connect(&meeting).expect("all ranks come")))
            })
            .collect();
        let join = |rank: std::thread::ScopedJoinHandle<T>| rank.join().expect("a rank");
        ranks.into_iter().map(join).collect()
    })
}

#[test]
fn many_rounds_over_tcp() {
    for size in [1, 2, 3, 4, 8] {
        let ranks: Vec<usize> = (0..size).collect();
        on_tcp(size, |group| {
            for dtype in [DType::F32, DType::BF16] {
                for round in 0..ROUNDS {
                    check_round(&group, &ranks, round, 1 + round % 4, dtype);
                }
                check_round(&group, &ranks, 1, 1500 + 7, dtype);
            }
        });
    }
}

/// Frames larger than what sockets hold, both ways at once.
#[test]
fn more_than_the_sockets_hold() {
    on_tcp(3, |group| {
        check_round(&group, &[0, 1, 2], 1, 1_000_003, DType::F32)
    });
}

#[test]
fn sub_groups_over_tcp() {
    on_tcp(8, |world| sub_groups(&world));
}

/// Sub-groups by halves and by stripes, used by different ranks in different orders.
fn sub_groups(world: &dyn ProcessGroup) {
    let me = world.rank();
    let halves = [vec![0, 1, 2, 3], vec![7, 6, 5, 4]];
    let stripes = [vec![0, 4], vec![1, 5], vec![2, 6], vec![3, 7]];
    let half = world.split(&halves).expect("halves");
    let stripe = world.split(&stripes).expect("stripes");
    let own_half = halves.iter().find(|half| half.contains(&me)).expect("all");
    let own_stripe = &stripes[me % 4];
    assert_eq!(own_half[half.rank()], me);
    // A group of a group: the numbers are those of the half.
    let pairs = [vec![0, 2], vec![1, 3]];
    let pair = half.split(&pairs).expect("pairs");
    let own_pair: Vec<usize> = pairs[half.rank() % 2]
        .iter()
        .map(|&r| own_half[r])
        .collect();
    for round in 0..ROUNDS {
        // The order differs between pairs, never within a group's own calls: stripes are used
        // before or after the pair's exchange, whichever rank comes first.
        let use_pair = || check_round(&*pair, &own_pair, round, 3, DType::F32);
        if half.rank() % 2 == 0 {
            use_pair();
        }
        check_round(&*stripe, own_stripe, round, 2, DType::BF16);
        if half.rank() % 2 == 1 {
            use_pair();
        }
        check_round(&*half, own_half, round, 4, DType::F32);
    }
    world.barrier().expect("barrier");
}

#[test]
fn sub_groups_at_the_same_time() {
    on_threads(8, |world| sub_groups(&world));
}

#[test]
fn what_cannot_be_is_refused() {
    on_threads(2, |group| {
        let tensor = |len| tensor(vec![1.0; len], DType::F32);
        let says = |result: Result<_, CommError>, part: &str| {
            let error = result.map(|_: Tensor<1>| ()).expect_err(part).to_string();
            assert!(error.contains(part), "{error}");
        };
        says(group.reduce_scatter_sum(tensor(3)), "no multiple of 2");
        says(group.all_to_all(tensor(3)), "no multiple of 2");
        says(group.broadcast(tensor(3), 2), "no rank 2 among 2");
        let sent = group.exchange(vec![(5, tensor(1))], vec![]);
        says(sent.map(|_| tensor(1)), "no rank 5 among 2");
        for (parts, part) in [
            (vec![vec![0, 1], vec![1]], "named twice"),
            (vec![vec![0, 3]], "no rank 3"),
            (vec![vec![]], "no list holds"),
        ] {
            says(group.split(&parts).map(|_| tensor(1)), part);
        }
    });
}

/// Each direction's sums see exactly the ranks along it.
#[test]
fn a_mesh_of_every_direction() {
    for (replicate, shard, context) in [(2, 2, 2), (1, 2, 3), (2, 1, 2), (3, 1, 1), (1, 1, 4)] {
        let layout = Layout {
            replicate,
            shard,
            context,
            shard_over_context: false,
        };
        on_mesh(layout, |mesh| {
            let (r, s, c) = (
                mesh.replicate.rank(),
                mesh.shard.rank(),
                mesh.context.rank(),
            );
            assert_eq!(mesh.layout, layout);
            assert_eq!(mesh.world.rank(), (r * shard + s) * context + c);
            assert_eq!(mesh.data_rank(), r * shard + s);
            assert_eq!(mesh.data_size(), replicate * shard);
            // 100 r + 10 s + c, summed along each direction.
            let own = || tensor(vec![(100 * r + 10 * s + c) as f32], DType::F32);
            let sum = |group: &Arc<dyn ProcessGroup>| {
                values(group.all_reduce_sum(own()).expect("all ranks"), DType::F32)[0] as usize
            };
            let along = |n: usize| n * (n - 1) / 2;
            let replicas = 100 * along(replicate) * context
                + 10 * s * replicate * context
                + along(context) * replicate;
            for _ in 0..ROUNDS {
                assert_eq!(
                    sum(&mesh.replicate),
                    100 * along(replicate) + (10 * s + c) * replicate
                );
                assert_eq!(sum(&mesh.shard), 10 * along(shard) + (100 * r + c) * shard);
                assert_eq!(
                    sum(&mesh.context),
                    along(context) + (100 * r + 10 * s) * context
                );
                assert_eq!(sum(&mesh.replicas), replicas);
            }
            let all = mesh.all_reduce_sum(own()).expect("all ranks");
            let expected = 100 * along(replicate) * shard * context
                + 10 * along(shard) * replicate * context
                + along(context) * replicate * shard;
            assert_eq!(values(all, DType::F32)[0] as usize, expected);
        });
    }
}

/// Parameters spread over the ranks of a row, too: the groups of parameters, rows read as before.
#[test]
fn a_mesh_that_shards_over_rows() {
    for (replicate, shard, context) in [(2, 2, 2), (1, 2, 3), (2, 1, 2), (1, 1, 4), (2, 2, 1)] {
        let layout = Layout {
            replicate,
            shard,
            context,
            shard_over_context: true,
        };
        on_mesh(layout, |mesh| {
            let me = mesh.world.rank();
            let (r, s, c) = (me / context / shard, me / context % shard, me % context);
            assert_eq!(mesh.layout, layout);
            assert_eq!(
                (mesh.data_rank(), mesh.data_size()),
                (r * shard + s, replicate * shard)
            );
            assert_eq!((mesh.context.rank(), mesh.context.size()), (c, context));
            assert_eq!(
                (mesh.shard.rank(), mesh.shard.size()),
                (s * context + c, shard * context)
            );
            assert_eq!((mesh.replicas.rank(), mesh.replicas.size()), (r, replicate));
            let numbers = |group: &Arc<dyn ProcessGroup>| {
                let own = tensor(vec![me as f32], DType::F32);
                values(group.all_gather(own).expect("all ranks"), DType::F32)
            };
            let shards = (0..shard * context).map(|i| (r * shard * context + i) as f32);
            assert!(numbers(&mesh.shard).into_iter().eq(shards));
            let copies =
                (0..replicate).map(|i| (me % (shard * context) + i * shard * context) as f32);
            assert!(numbers(&mesh.replicas).into_iter().eq(copies));
        });
    }
}

#[test]
fn a_mesh_of_other_ranks_than_there_are() {
    on_threads(2, |rank| {
        let layout = Layout {
            replicate: 2,
            shard: 2,
            context: 1,
            shard_over_context: false,
        };
        let refused = ttt_parallel::Mesh::new(Arc::new(rank), layout);
        let error = refused.expect_err("two ranks").to_string();
        assert!(
            error.contains("lower one of them") || error.contains("multiply"),
            "{error}"
        );
    });
}
