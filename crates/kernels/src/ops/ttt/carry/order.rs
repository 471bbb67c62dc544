//! When exchanges of sums are begun and waited for: a rank that waits early has nothing to do meanwhile.

use std::sync::{Arc, Mutex};

use burn::tensor::{DType, Device, Tensor};
use ttt_parallel::threads::{ThreadRank, on_threads};
use ttt_parallel::{CommError, Pending, ProcessGroup, Receive};

use super::{Carry, From};
use crate::context::{Context, ContextSettings, StateExchange};
use crate::packing::Packing;

/// A rank that writes a capital when an exchange is begun and a small letter when it is waited for.
#[derive(Debug)]
struct Told {
    inner: ThreadRank,
    log: Arc<Mutex<String>>,
}

impl Told {
    fn begun<T: Send + 'static>(&self, letter: char, pending: Pending<T>) -> Pending<T> {
        let log = self.log.clone();
        let write = move |letter| log.lock().expect("no panic").push(letter);
        write(letter.to_ascii_uppercase());
        Pending::new(move || {
            write(letter);
            pending.wait()
        })
    }
}

impl ProcessGroup for Told {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn size(&self) -> usize {
        self.inner.size()
    }

    fn all_reduce_sum(&self, tensor: Tensor<1>) -> Result<Tensor<1>, CommError> {
        self.inner.all_reduce_sum(tensor)
    }

    fn all_gather(&self, shard: Tensor<1>) -> Result<Tensor<1>, CommError> {
        self.start_all_gather(shard)?.wait()
    }

    fn reduce_scatter_sum(&self, tensor: Tensor<1>) -> Result<Tensor<1>, CommError> {
        self.inner.reduce_scatter_sum(tensor)
    }

    fn all_to_all(&self, tensor: Tensor<1>) -> Result<Tensor<1>, CommError> {
        self.start_all_to_all(tensor)?.wait()
    }

    fn broadcast(&self, tensor: Tensor<1>, root: usize) -> Result<Tensor<1>, CommError> {
        self.inner.broadcast(tensor, root)
    }

    fn exchange(
        &self,
        sends: Vec<(usize, Tensor<1>)>,
        receives: Vec<Receive>,
    ) -> Result<Vec<Tensor<1>>, CommError> {
        self.start_exchange(sends, receives)?.wait()
    }

    fn barrier(&self) -> Result<(), CommError> {
        self.inner.barrier()
    }

    fn split(&self, parts: &[Vec<usize>]) -> Result<Arc<dyn ProcessGroup>, CommError> {
        self.inner.split(parts)
    }

    fn start_all_gather(&self, shard: Tensor<1>) -> Result<Pending, CommError> {
        Ok(self.begun('g', self.inner.start_all_gather(shard)?))
    }

    fn start_all_to_all(&self, tensor: Tensor<1>) -> Result<Pending, CommError> {
        Ok(self.begun('a', self.inner.start_all_to_all(tensor)?))
    }

    fn start_exchange(
        &self,
        sends: Vec<(usize, Tensor<1>)>,
        receives: Vec<Receive>,
    ) -> Result<Pending<Vec<Tensor<1>>>, CommError> {
        Ok(self.begun('e', self.inner.start_exchange(sends, receives)?))
    }
}

/// The logs of three ranks once an exchange is begun, once it is passed on, and at its end.
fn logs(states: StateExchange, from: From) -> Vec<[String; 3]> {
    on_threads(3, |rank| {
        let log = Arc::new(Mutex::new(String::new()));
        let told = Told {
            inner: rank,
            log: log.clone(),
        };
        let settings = ContextSettings {
            states,
            ..ContextSettings::default()
        };
        let context = Context::new(Arc::new(told), settings);
        let part = 4 * context.rank()..4 * (context.rank() + 1);
        let packing = Packing::whole_rows(1, 12).part(part);
        let like = Tensor::<3>::zeros([1, 1, 1], (&Device::flex(), DType::F32));
        let own: Tensor<2> = Tensor::ones([2, 3], (&Device::flex(), DType::F32));
        let carry = Carry::new(&context, &packing, from, [2, 3], &like);
        let read = || log.lock().expect("no panic").clone();
        let mut exchange = carry.start(|_| own.clone());
        let begun = read();
        exchange.pass_on();
        let passed_on = read();
        exchange.pass_on(); // nothing more
        assert_eq!(read(), passed_on);
        exchange.finish();
        context.check().expect("all ranks are there");
        [begun, passed_on, read()]
    })
}

#[test]
fn nothing_is_waited_for_before_it_must_be() {
    let all = |logs: [&str; 3]| vec![logs.map(String::from); 3];
    for from in [From::Before, From::Behind] {
        let two_legs = logs(StateExchange::AllToAll, from);
        assert_eq!(two_legs, all(["A", "AaA", "AaAa"]), "{from:?}");
        let one_leg = logs(StateExchange::AllGather, from);
        assert_eq!(one_leg, all(["G", "G", "Gg"]), "{from:?}");
        let mut chain = logs(StateExchange::Chain, from);
        if from == From::Behind {
            chain.reverse();
        }
        // The first sends, the last receives, the one in the middle hands on.
        let ends = ["E", "E", "Ee"].map(String::from);
        let middle = ["E", "EeE", "EeEe"].map(String::from);
        assert_eq!(chain, [ends.clone(), middle, ends], "{from:?}");
    }
}
