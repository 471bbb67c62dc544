//! Which rank this process is, from what its starter put into the environment.
//!
//! | starter | variables |
//! |---|---|
//! | `ttt launch`, torchrun | `RANK` `WORLD_SIZE` `LOCAL_RANK` `MASTER_ADDR` `MASTER_PORT` |
//! | Slurm's srun | `SLURM_PROCID` `SLURM_NTASKS` `SLURM_LOCALID` in a step (`SLURM_STEP_ID`) |
//! | Open MPI's mpirun | `OMPI_COMM_WORLD_RANK` `…_SIZE` `…_LOCAL_RANK` `…_LOCAL_SIZE` |
//! | MPICH's, Intel's mpiexec | `PMI_RANK` `PMI_SIZE` `MPI_LOCALRANKID` `MPI_LOCALNRANKS` |
//!
//! The first that is there counts; a starter's variables that are set in part or contradict each
//! other are refused, since a rank that guesses its number ruins a run.

use crate::group::CommError;

/// This process's place among the ranks of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its number.
    pub rank: usize,
    /// Ranks of the run.
    pub size: usize,
    /// Its number among the ranks of its host: the GPU it takes.
    pub local_rank: usize,
    /// Where rank 0 listens.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// The run's name, equal on all ranks.
    pub run: String,
}

impl Place {
    /// The place of a process that nobody started as one of several.
    pub fn single() -> Self {
        Self {
            rank: 0,
            size: 1,
            local_rank: 0,
            host: LOOPBACK.into(),
            port: 0,
            run: String::new(),
        }
    }

    /// The place that the process's environment says.
    ///
    /// # Errors
    /// If it says only half, or contradicts itself.
    pub fn of_process() -> Result<Self, CommError> {
        Self::from(|name| std::env::var(name).ok())
    }

    /// The place that the variables `look_up` finds say.
    ///
    /// # Errors
    /// If they say only half, or contradict each other.
    pub fn from(look_up: impl Fn(&str) -> Option<String>) -> Result<Self, CommError> {
        // An empty variable is how shells unset one for a command.
        let variables = Variables(&|name: &str| look_up(name).filter(|value| !value.is_empty()));
        let found = if variables.any(&["RANK", "WORLD_SIZE"]) {
            torchrun(&variables)
        } else if variables.any(&["SLURM_STEP_ID", "SLURM_STEPID"]) {
            slurm(&variables)
        } else if variables.any(&["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"]) {
            let names = [
                "OMPI_COMM_WORLD_RANK",
                "OMPI_COMM_WORLD_SIZE",
                "OMPI_COMM_WORLD_LOCAL_RANK",
                "OMPI_COMM_WORLD_LOCAL_SIZE",
            ];
            mpi(&variables, names, "PMIX_NAMESPACE")
        } else if variables.any(&["PMI_RANK", "PMI_SIZE"]) {
            let names = ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"];
            mpi(&variables, names, "PMI_JOBID")
        } else {
            Ok(Self::single())
        };
        found.map_err(CommError::Start)
    }

    /// Refuses numbers that cannot be.
    fn checked(self, names: [&str; 3]) -> Result<Self, String> {
        let [rank_name, size_name, local_name] = names;
        let Self {
            rank,
            size,
            local_rank,
            ..
        } = self;
        if rank >= size {
            return Err(format!(
                "{rank_name} is {rank} and {size_name} is {size}: ranks count from 0, so there is \
                 no such rank"
            ));
        }
        if local_rank > rank {
            return Err(format!(
                "{local_name} is {local_rank} and {rank_name} is {rank}: a host's ranks cannot be \
                 more than all ranks before it"
            ));
        }
        Ok(self)
    }
}

const LOOPBACK: &str = "127.0.0.1";
/// The port where none is given, as torchrun has it.
const PORT: u16 = 29_500;

struct Variables<'a>(&'a dyn Fn(&str) -> Option<String>);

impl Variables<'_> {
    fn get(&self, name: &str) -> Option<String> {
        (self.0)(name)
    }

    fn any(&self, names: &[&str]) -> bool {
        names.iter().any(|name| self.get(name).is_some())
    }

    /// A number that may be left out.
    fn number<N: std::str::FromStr>(&self, name: &str) -> Result<Option<N>, String> {
        let Some(text) = self.get(name) else {
            return Ok(None);
        };
        match text.trim().parse() {
            Ok(number) => Ok(Some(number)),
            Err(_) => Err(format!(
                "{name} is \"{text}\", which is no number of this kind"
            )),
        }
    }

    /// A number that must be there, since `because` is.
    fn needed<N: std::str::FromStr>(&self, name: &str, because: &str) -> Result<N, String> {
        let absent = || {
            format!(
                "{because} is set and {name} is not: a rank needs both. Start ranks with \
                 `ttt launch`, torchrun, srun or mpirun, or unset {because}"
            )
        };
        self.number(name)?.ok_or_else(absent)
    }
}

fn torchrun(variables: &Variables) -> Result<Place, String> {
    let because = match variables.get("RANK") {
        Some(_) => "RANK",
        None => "WORLD_SIZE",
    };
    let rank = variables.needed("RANK", because)?;
    let size = variables.needed("WORLD_SIZE", because)?;
    let alone = size == 1;
    let local_rank = match alone {
        true => variables.number("LOCAL_RANK")?.unwrap_or(0),
        false => variables.needed("LOCAL_RANK", because)?,
    };
    let host = variables.get("MASTER_ADDR");
    if host.is_none() && !alone {
        return Err(format!(
            "{because} is set and MASTER_ADDR is not: it names the host of rank 0, where the ranks \
             meet"
        ));
    }
    let mut port = match alone {
        true => variables.number("MASTER_PORT")?.unwrap_or(PORT),
        false => variables.needed("MASTER_PORT", because)?,
    };
    // torchrun's agent listens at the port itself.
    let agent = variables.get("TORCHELASTIC_USE_AGENT_STORE");
    if agent.is_some_and(|value| value.eq_ignore_ascii_case("true")) {
        port = port.checked_add(1).unwrap_or(port - 1);
    }
    let run = variables.get("TTT_RUN_ID");
    let run = run.or_else(|| variables.get("TORCHELASTIC_RUN_ID"));
    Place {
        rank,
        size,
        local_rank,
        host: host.unwrap_or_else(|| LOOPBACK.into()),
        port,
        run: run.unwrap_or_default(),
    }
    .checked(["RANK", "WORLD_SIZE", "LOCAL_RANK"])
}

/// A step of Slurm. A batch script's own shell has no step: a program there is alone.
fn slurm(variables: &Variables) -> Result<Place, String> {
    let because = "SLURM_STEP_ID";
    let rank = variables.needed("SLURM_PROCID", because)?;
    let size = match variables.number("SLURM_STEP_NUM_TASKS")? {
        Some(size) => size,
        None => variables.needed("SLURM_NTASKS", because)?,
    };
    let local_rank = variables.needed("SLURM_LOCALID", because)?;
    let job: u64 = variables.needed("SLURM_JOB_ID", because)?;
    let step = variables.get("SLURM_STEP_ID");
    let step = step
        .or_else(|| variables.get("SLURM_STEPID"))
        .unwrap_or_default();
    let nodes = variables.number::<usize>("SLURM_STEP_NUM_NODES")?;
    let nodes = nodes.or(variables.number("SLURM_NNODES")?);
    let host = variables
        .get("MASTER_ADDR")
        .or_else(|| (nodes == Some(1) || size == 1).then(|| LOOPBACK.into()))
        .or_else(|| {
            // Rank 0 runs on a step's first node.
            let lists = [
                "SLURM_STEP_NODELIST",
                "SLURM_JOB_NODELIST",
                "SLURM_NODELIST",
            ];
            lists
                .iter()
                .find_map(|list| first_node(&variables.get(list)?))
        })
        .or_else(|| variables.get("SLURM_LAUNCH_NODE_IPADDR"))
        .ok_or("this Slurm step names no nodes: set MASTER_ADDR to the host of rank 0")?;
    // Jobs, and steps of a job, that share a host must not meet at one port. Below the ports that
    // systems give out by themselves.
    let numbered = step.parse().unwrap_or(0u64);
    let derived = 20_000 + job.wrapping_mul(31).wrapping_add(numbered) % 10_000;
    let port = variables.number("MASTER_PORT")?;
    Place {
        rank,
        size,
        local_rank,
        host,
        port: port.unwrap_or(derived as u16),
        run: format!("slurm {job}.{step}"),
    }
    .checked(["SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"])
}

/// The first host of a list such as `gpu[003-010,12],login1`.
fn first_node(list: &str) -> Option<String> {
    let end = list.find([',', '[']).unwrap_or(list.len());
    let (name, rest) = list.split_at(end);
    let Some(inside) = rest.strip_prefix('[') else {
        return Some(name.to_string()).filter(|name| !name.is_empty());
    };
    let (inside, after) = inside.split_once(']')?;
    let first = inside.split([',', '-']).next()?;
    // Names may go on behind the bracket, up to the next host.
    let after = after.split(',').next().unwrap_or_default();
    (!first.is_empty() && !after.contains('[')).then(|| format!("{name}{first}{after}"))
}

fn mpi(variables: &Variables, names: [&str; 4], job: &str) -> Result<Place, String> {
    let [rank_name, size_name, local_name, local_size_name] = names;
    let because = match variables.get(rank_name) {
        Some(_) => rank_name,
        None => size_name,
    };
    let rank = variables.needed(rank_name, because)?;
    let size = variables.needed(size_name, because)?;
    let local_rank = match size {
        1 => variables.number(local_name)?.unwrap_or(0),
        _ => variables.needed(local_name, because)?,
    };
    let one_host = size == 1 || variables.number(local_size_name)? == Some(size);
    let host = variables.get("MASTER_ADDR");
    let host = host.or_else(|| one_host.then(|| LOOPBACK.into()));
    let run = variables.get(job).unwrap_or_default();
    Place {
        rank,
        size,
        local_rank,
        host: host.ok_or_else(|| {
            format!(
                "{rank_name} is set, the ranks are on several hosts, and MASTER_ADDR is not set: it \
                 names the host of rank 0, where the ranks meet (mpirun -x MASTER_ADDR=HOST)"
            )
        })?,
        port: variables.number("MASTER_PORT")?.unwrap_or(PORT),
        run: format!("mpi {run}"),
    }
    .checked([rank_name, size_name, local_name])
}

#[cfg(test)]
mod tests;
