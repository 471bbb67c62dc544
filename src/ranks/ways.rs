//! `ttt doctor --ranks --context CONFIG`: the ways in which ranks that share rows can exchange what they
//! need of each other, timed at the sizes of a configuration.

use std::sync::Arc;
use std::time::Instant;

use anyhow::Context as _;
use burn::tensor::{DType, Device, Tensor};
use ttt_kernels::context::{ATTENTION, AttentionExchange, Payload, STATES, StateExchange};
use ttt_kernels::doctor::Mirror;
use ttt_kernels::ttt::carry::{Carry, From};
use ttt_kernels::ttt::{ScanSpec, fast_weight_scan};
use ttt_kernels::{AttentionSpec, Context, ContextSettings, Packing, attention, backward_from};
use ttt_parallel::{Layout, ProcessGroup};
use ttt_train::config::{Config, ParallelConfig};
use ttt_train::context;
use ttt_train::device::{compute_dtype, read_scalar};
use ttt_train::plan::Traffic;

/// Batches on the clock, and how long each is to take where a single exchange takes less.
const BATCHES: u32 = 3;
const BATCH_MS: f64 = 50.0;

/// Ranks that share every row, and what they compute.
pub struct Ways {
    /// All ranks, over the host.
    pub host: Arc<dyn ProcessGroup>,
    /// The same, between devices.
    pub group: Arc<dyn ProcessGroup>,
    /// What this rank computes on.
    pub device: Device,
    /// What they would train.
    pub config: Config,
}

impl Ways {
    /// Times all of them; rank 0 says how long each took.
    pub fn all(mut self) -> anyhow::Result<()> {
        let ranks = self.group.size();
        self.config.parallel = ParallelConfig {
            context: ranks,
            ..ParallelConfig::default()
        };
        let (model, train) = (&self.config.model, &self.config.train);
        let settings = ContextSettings::default();
        context::validate(model, train.sequence_length, ranks, &settings)?;
        self.say(&format!(
            "{ranks} ranks on {:?}, {} rows of {} tokens at once; bytes are those of the rank that sends \
             most, once forward and back",
            self.device, train.micro_batch_rows, train.sequence_length
        ));
        match model.ttt_layers().is_empty() {
            true => self.say("no layer learns, so that no fast weights travel"),
            false => self.states()?,
        }
        match (0..model.num_hidden_layers).all(|layer| model.window(layer).is_some()) {
            true => self.say("every layer has a window: its length of keys travels"),
            false => self.attention()?,
        }
        self.host.barrier()?;
        Ok(())
    }

    /// The fast weights of one layer: the exchange alone, and the operation that it is part of, which is
    /// also done with sums of this rank in place of the others'.
    fn states(&self) -> anyhow::Result<()> {
        let model = &self.config.model;
        let (d, f) = (model.hidden_size, model.intermediate_size);
        self.say(&format!("\nfast weights of one layer, {d} x {f}"));
        let titles = ["MB sent", "there ms", "back ms", "operation ms"];
        self.row("", titles.map(String::from).as_slice());
        let mirror = Mirror {
            rank: self.group.rank(),
            size: self.group.size(),
        };
        let gather = ContextSettings {
            states: StateExchange::AllGather,
            ..ContextSettings::default()
        };
        let computed = self.operation(&Context::new(Arc::new(mirror), gather))?;
        for states in [
            StateExchange::AllToAll,
            StateExchange::Chain,
            StateExchange::AllGather,
        ] {
            for payload in [Payload::F32, Payload::Bf16] {
                let settings = ContextSettings {
                    states,
                    payload,
                    ..ContextSettings::default()
                };
                let there = self.exchange(settings, From::Before)?;
                let back = self.exchange(settings, From::Behind)?;
                let operation = self.operation(&self.context(settings))?;
                let sent = format!("{:.2}", self.megabytes(settings, STATES));
                let times = [there, back, operation].map(|ms| format!("{ms:.2}"));
                let payload = format!("{payload:?}").to_lowercase();
                let name = format!("{} {payload}", name(states));
                self.row(&name, &[&[sent][..], &times].concat());
            }
        }
        let none = || "-".to_string();
        self.row(
            "nothing sent",
            &[none(), none(), none(), format!("{computed:.2}")],
        );
        let auto = StateExchange::Auto.among(self.group.size());
        self.say(&format!("  \"auto\" is {} here", name(auto)));
        Ok(())
    }

    /// Milliseconds of one exchange of sums.
    fn exchange(&self, settings: ContextSettings, from: From) -> anyhow::Result<f64> {
        let model = &self.config.model;
        let shape = [model.hidden_size, model.intermediate_size];
        let own: Tensor<2> = Tensor::ones(shape, (&self.device, DType::F32));
        let like: Tensor<3> = Tensor::zeros([1, 1, 1], (&self.device, self.compute()));
        let (context, packing) = (self.context(settings), self.part());
        self.milliseconds(|| {
            let carry = Carry::new(&context, &packing, from, shape, &like);
            drop(carry.start(|_| own.clone()).finish());
            Ok(context.check()?)
        })
    }

    /// Milliseconds of the scan of this rank's tokens, forward and backward.
    fn operation(&self, context: &Context) -> anyhow::Result<f64> {
        let (model, packing) = (&self.config.model, self.part());
        let rows = |width: usize| self.values([self.rows(), self.tokens(), width], self.compute());
        let (z, v) = (rows(model.intermediate_size), rows(model.hidden_size));
        let w0 = self.values([model.hidden_size, model.intermediate_size], DType::F32);
        let dy = rows(model.hidden_size);
        let leaf = |t: &Tensor<3>| t.clone().autodiff().require_grad();
        self.milliseconds(|| {
            let spec = ScanSpec {
                lr: model.ttt.lr,
                chunk: model.ttt.chunk,
                clip: None,
                packing: packing.clone(),
                context: Some(context.clone()),
            };
            let w0 = w0.clone().autodiff().require_grad();
            let scan = fast_weight_scan(leaf(&z), leaf(&v), w0, spec);
            drop(backward_from(scan.output, dy.clone()));
            Ok(context.check()?)
        })
    }

    /// Attention without a window, of one layer.
    fn attention(&self) -> anyhow::Result<()> {
        let model = &self.config.model;
        let (heads, groups, size) = (
            model.num_attention_heads,
            model.kv_heads(),
            model.head_size(),
        );
        self.say(&format!(
            "\nattention of one layer without a window, {heads}/{groups} heads of {size}"
        ));
        self.row("", &["MB sent", "operation ms"].map(String::from));
        let values = |heads| self.values([self.rows(), self.tokens(), heads, size], self.compute());
        let inputs = [values(heads), values(groups), values(groups)];
        let dy = values(heads);
        for ways in [AttentionExchange::Keys, AttentionExchange::Heads] {
            let divide = ttt_kernels::ops::attention::heads_divide(groups, self.group.size());
            if ways == AttentionExchange::Heads && !divide {
                self.say("  heads do not divide among the ranks");
                continue;
            }
            let settings = ContextSettings {
                attention: ways,
                ..ContextSettings::default()
            };
            let context = self.context(settings);
            let operation = self.milliseconds(|| {
                let [q, k, v] = inputs
                    .each_ref()
                    .map(|t| t.clone().autodiff().require_grad());
                let spec = AttentionSpec {
                    window: None,
                    scale: (size as f64).powf(-0.5),
                    query_offset: 0,
                    packing: Some(self.part()),
                    context: Some(context.clone()),
                };
                drop(backward_from(attention(q, k, v, spec), dy.clone()));
                Ok(context.check()?)
            })?;
            let sent = format!("{:.2}", self.megabytes(settings, ATTENTION));
            let name = format!("{ways:?}").to_lowercase();
            self.row(&name, &[sent, format!("{operation:.2}")]);
        }
        Ok(())
    }

    fn rows(&self) -> usize {
        self.config.train.micro_batch_rows
    }

    /// Of this rank's part of a row.
    fn tokens(&self) -> usize {
        self.config.train.sequence_length / self.group.size()
    }

    fn compute(&self) -> DType {
        compute_dtype(self.config.run.device, self.config.train.compute)
    }

    fn part(&self) -> Packing {
        let (tokens, rank) = (self.tokens(), self.group.rank());
        let whole = Packing::whole_rows(self.rows(), self.config.train.sequence_length);
        whole.part(rank * tokens..(rank + 1) * tokens)
    }

    fn context(&self, settings: ContextSettings) -> Context {
        Context::new(self.group.clone(), settings)
    }

    /// Small enough for any number of sums.
    fn values<const N: usize>(&self, shape: [usize; N], dtype: DType) -> Tensor<N> {
        Tensor::full(shape, 1e-3, (&self.device, dtype))
    }

    /// What the plan says that the busiest rank sends for one layer.
    fn megabytes(&self, settings: ContextSettings, what: &str) -> f64 {
        let mut config = self.config.clone();
        config.parallel.context_states = settings.states;
        config.parallel.context_payload = settings.payload;
        config.parallel.context_attention = settings.attention;
        let layout = Layout {
            context: self.group.size(),
            ..Layout::SINGLE
        };
        let traffic = Traffic::busiest(&config, layout);
        let item = traffic.items.iter().find(|item| item.name == what);
        let bytes = item
            .and_then(|item| item.per_layer)
            .map_or(0, |(bytes, _)| bytes);
        bytes as f64 / 1e6
    }

    /// What `run` takes, until all ranks have done it: the least of some batches, which others on the
    /// same machine disturb least.
    fn milliseconds(&self, run: impl Fn() -> anyhow::Result<()>) -> anyhow::Result<f64> {
        run()?;
        let first = self.batch(&run, 1)?;
        // All ranks make as many exchanges.
        let count = (BATCH_MS / first).clamp(1.0, 50.0).floor();
        let count: Tensor<1> = Tensor::full([1], count, (&Device::flex(), DType::F32));
        let count = read_scalar(&self.host.broadcast(count, 0)?)? as u32;
        let mut least = f64::INFINITY;
        for _ in 0..BATCHES {
            least = least.min(self.batch(&run, count)?);
        }
        Ok(least)
    }

    /// Milliseconds of one of `count`.
    fn batch(&self, run: &impl Fn() -> anyhow::Result<()>, count: u32) -> anyhow::Result<f64> {
        self.device.sync().context("the device failed")?;
        self.host.barrier()?;
        let begun = Instant::now();
        for _ in 0..count {
            run()?;
        }
        self.device.sync().context("the device failed")?;
        // Who only sends is done when the others have received.
        self.host.barrier()?;
        Ok(begun.elapsed().as_secs_f64() * 1e3 / f64::from(count))
    }

    fn row(&self, name: &str, cells: &[String]) {
        let cells: String = cells.iter().map(|cell| format!("{cell:>14}")).collect();
        self.say(&format!("  {name:<20}{cells}"));
    }

    fn say(&self, line: &str) {
        if self.host.rank() == 0 {
            println!("{line}");
        }
    }
}

/// As parallel.context_states has it.
fn name(states: StateExchange) -> &'static str {
    match states {
        StateExchange::Auto => "auto",
        StateExchange::AllToAll => "all-to-all",
        StateExchange::Chain => "chain",
        StateExchange::AllGather => "all-gather",
    }
}
