//! What every starter says, and what is refused.

use super::*;

/// The place that `NAME=value` words say.
fn place(words: &str) -> Result<Place, String> {
    let look_up = |name: &str| {
        let mut pairs = words
            .split_whitespace()
            .filter_map(|word| word.split_once('='));
        pairs.find_map(|(key, value)| (key == name).then(|| value.to_string()))
    };
    Place::from(look_up).map_err(|error| error.to_string())
}

#[test]
fn what_each_starter_says() {
    let table = [
        ("", 0, 1, 0, "127.0.0.1", 0, ""),
        (
            "RANK=5 WORLD_SIZE=8 LOCAL_RANK=1 LOCAL_WORLD_SIZE=4 MASTER_ADDR=a MASTER_PORT=7 \
             TTT_RUN_ID=r SLURM_STEP_ID=0 SLURM_PROCID=1",
            5,
            8,
            1,
            "a",
            7,
            "r",
        ),
        (
            "RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 MASTER_ADDR=localhost MASTER_PORT=29500 \
             TORCHELASTIC_RUN_ID=none TORCHELASTIC_USE_AGENT_STORE=True",
            1,
            2,
            1,
            "localhost",
            29_501,
            "none",
        ),
        ("RANK=0 WORLD_SIZE=1", 0, 1, 0, "127.0.0.1", 29_500, ""),
        (
            "SLURM_STEP_ID=2 SLURM_JOB_ID=100 SLURM_PROCID=9 SLURM_NTASKS=16 SLURM_LOCALID=1 \
             SLURM_NNODES=2 SLURM_STEP_NODELIST=gpu[003-004] SLURM_LAUNCH_NODE_IPADDR=10.0.0.9",
            9,
            16,
            1,
            "gpu003",
            23_102,
            "slurm 100.2",
        ),
        (
            "SLURM_STEP_ID=0 SLURM_JOB_ID=100 SLURM_PROCID=1 SLURM_STEP_NUM_TASKS=2 \
             SLURM_NTASKS=8 SLURM_LOCALID=1 SLURM_NNODES=1 MASTER_PORT=5",
            1,
            2,
            1,
            "127.0.0.1",
            5,
            "slurm 100.0",
        ),
        (
            "SLURM_STEP_ID=0 SLURM_JOB_ID=1 SLURM_PROCID=1 SLURM_NTASKS=2 SLURM_LOCALID=0 \
             SLURM_LAUNCH_NODE_IPADDR=10.0.0.9",
            1,
            2,
            0,
            "10.0.0.9",
            20_031,
            "slurm 1.0",
        ),
        // In a batch script, outside any step.
        (
            "SLURM_JOB_ID=1 SLURM_PROCID=0 SLURM_NTASKS=4",
            0,
            1,
            0,
            "127.0.0.1",
            0,
            "",
        ),
        (
            "OMPI_COMM_WORLD_RANK=3 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_RANK=3 \
             OMPI_COMM_WORLD_LOCAL_SIZE=4 PMIX_NAMESPACE=x@1",
            3,
            4,
            3,
            "127.0.0.1",
            29_500,
            "mpi x@1",
        ),
        (
            "PMI_RANK=1 PMI_SIZE=4 MPI_LOCALRANKID=1 MPI_LOCALNRANKS=2 MASTER_ADDR=h MASTER_PORT=8",
            1,
            4,
            1,
            "h",
            8,
            "mpi ",
        ),
    ];
    for (words, rank, size, local_rank, host, port, run) in table {
        let expected = Place {
            rank,
            size,
            local_rank,
            host: host.into(),
            port,
            run: run.into(),
        };
        assert_eq!(place(words), Ok(expected), "{words}");
    }
}

#[test]
fn half_and_contradicting_variables_are_refused() {
    let rest = "LOCAL_RANK=0 MASTER_ADDR=a MASTER_PORT=1";
    let table = [
        ("RANK=0".into(), "RANK is set and WORLD_SIZE is not"),
        ("WORLD_SIZE=2".into(), "WORLD_SIZE is set and RANK is not"),
        ("RANK=0 WORLD_SIZE=2".into(), "LOCAL_RANK is not"),
        (
            "RANK=0 WORLD_SIZE=2 LOCAL_RANK=0".into(),
            "MASTER_ADDR is not",
        ),
        (
            "RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=a".into(),
            "MASTER_PORT is not",
        ),
        (format!("RANK=2 WORLD_SIZE=2 {rest}"), "no such rank"),
        (format!("RANK=0 WORLD_SIZE=0 {rest}"), "no such rank"),
        (format!("RANK=-1 WORLD_SIZE=2 {rest}"), "RANK is \"-1\""),
        (
            format!("RANK=0 WORLD_SIZE=two {rest}"),
            "WORLD_SIZE is \"two\"",
        ),
        (
            "RANK=0 WORLD_SIZE=2 LOCAL_RANK=1 MASTER_ADDR=a MASTER_PORT=1".into(),
            "LOCAL_RANK is 1 and RANK is 0",
        ),
        (
            "RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=a MASTER_PORT=70000".into(),
            "MASTER_PORT is \"70000\"",
        ),
        ("SLURM_STEP_ID=0".into(), "SLURM_PROCID is not"),
        (
            "SLURM_STEP_ID=0 SLURM_JOB_ID=1 SLURM_PROCID=1 SLURM_NTASKS=2 SLURM_LOCALID=0".into(),
            "names no nodes",
        ),
        (
            "OMPI_COMM_WORLD_RANK=0".into(),
            "OMPI_COMM_WORLD_SIZE is not",
        ),
        (
            "PMI_RANK=1 PMI_SIZE=4 MPI_LOCALRANKID=1 MPI_LOCALNRANKS=2".into(),
            "several hosts, and MASTER_ADDR is not set",
        ),
    ];
    for (words, says) in table {
        let refused = place(&words).expect_err(&words);
        assert!(refused.contains(says), "{words}: {refused}");
    }
}

#[test]
fn first_nodes() {
    for (list, first) in [
        ("node7", Some("node7")),
        ("a1,a2", Some("a1")),
        ("gpu[003-010,12],login1", Some("gpu003")),
        ("gpu[5]", Some("gpu5")),
        ("rack[1-2]-n0.site,x", Some("rack1-n0.site")),
        ("rack[1-2]n[3-4]", None),
        ("gpu[", None),
        ("", None),
    ] {
        assert_eq!(first_node(list).as_deref(), first, "{list}");
    }
}
