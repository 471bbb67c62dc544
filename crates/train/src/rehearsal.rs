//! What ranks do when one of them hangs, rehearsed: for tests of the launcher and of clusters.
//!
//! [`VARIABLE`] makes the main thread of one rank stop moving before one step, the same on every rank's
//! environment: `hang:RANK:STEP` for ever, `task:RANK:STEP` in a declared long task, for ever as well;
//! `task:RANK:STEP:SECONDS` computes in one for so long; `gpu:RANK:STEP` makes its GPU stand still instead.

use std::time::{Duration, Instant};

use burn::tensor::Device;
use ttt_parallel::{Activity, CommError};

/// The environment variable.
pub const VARIABLE: &str = "TTT_REHEARSE";

/// What is rehearsed; nothing, as a rule.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rehearsal(Option<Scene>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Scene {
    rank: usize,
    step: u64,
    what: What,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum What {
    Hang,
    Gpu,
    /// A declared task: of so many seconds in which it computes, or for ever in which it does nothing.
    Task(Option<u64>),
}

impl Rehearsal {
    /// What the process's environment asks for.
    ///
    /// # Errors
    /// If it cannot be understood.
    pub fn from_environment() -> Result<Self, CommError> {
        let text = std::env::var(VARIABLE).unwrap_or_default();
        Self::parse(&text)
    }

    fn parse(text: &str) -> Result<Self, CommError> {
        if text.is_empty() {
            return Ok(Self(None));
        }
        let scene = || {
            let mut parts = text.split(':');
            let kind = parts.next()?;
            let rank = parts.next()?.parse().ok()?;
            let step = parts.next()?.parse().ok()?;
            let seconds = parts.next().map(str::parse).transpose().ok()?;
            let what = match (kind, seconds) {
                ("hang", None) => What::Hang,
                ("gpu", None) => What::Gpu,
                ("task", seconds) => What::Task(seconds),
                _ => return None,
            };
            parts.next().is_none().then_some(Scene { rank, step, what })
        };
        match scene() {
            Some(scene) => Ok(Self(Some(scene))),
            None => Err(CommError::Start(format!(
                "{VARIABLE} is \"{text}\": expected hang:RANK:STEP, gpu:RANK:STEP or task:RANK:STEP[:SECONDS], or unset it"
            ))),
        }
    }

    /// Plays the scene if this is its rank and step.
    ///
    /// # Errors
    /// If it needs a GPU, and there is none.
    pub fn perform(
        &self,
        rank: usize,
        step: u64,
        activity: &Activity,
        device: &Device,
    ) -> Result<(), CommError> {
        let Some(scene) = &self.0 else { return Ok(()) };
        if (scene.rank, scene.step) != (rank, step) {
            return Ok(());
        }
        match scene.what {
            What::Task(seconds) => {
                let _task = activity.long("a rehearsed task");
                match seconds {
                    Some(seconds) => compute_for(Duration::from_secs(seconds)),
                    None => for_ever(),
                }
                Ok(())
            }
            What::Gpu => stall(device).map_err(CommError::Start),
            What::Hang => for_ever(),
        }
    }
}

fn compute_for(time: Duration) {
    let begun = Instant::now();
    while begun.elapsed() < time {
        std::hint::spin_loop();
    }
}

fn for_ever() -> ! {
    loop {
        std::thread::park();
    }
}

#[cfg(feature = "cuda")]
fn stall(device: &Device) -> Result<(), String> {
    ttt_kernels::cuda::event::stall(device)
}

#[cfg(not(feature = "cuda"))]
fn stall(_device: &Device) -> Result<(), String> {
    Err("only a GPU can be made to stand still".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scenes() {
        let parse = |text| Rehearsal::parse(text);
        assert_eq!(parse("").expect("nothing"), Rehearsal(None));
        let scene = |what| {
            Rehearsal(Some(Scene {
                rank: 1,
                step: 7,
                what,
            }))
        };
        assert_eq!(parse("hang:1:7").expect("a scene"), scene(What::Hang));
        assert_eq!(parse("gpu:1:7").expect("a scene"), scene(What::Gpu));
        assert_eq!(
            parse("task:1:7:12").expect("a scene"),
            scene(What::Task(Some(12)))
        );
        assert_eq!(parse("task:1:7").expect("a scene"), scene(What::Task(None)));
        for wrong in [
            "hang",
            "hang:1",
            "hang:1:7:2",
            "task:1:7:",
            "task:1:7:2:3",
            "stop:1:7",
            "hang:-1:7",
        ] {
            let error = parse(wrong).expect_err(wrong).to_string();
            assert!(error.contains("expected hang:RANK:STEP"), "{error}");
        }
    }
}
