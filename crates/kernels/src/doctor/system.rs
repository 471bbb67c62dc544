//! The GPU and NVIDIA's libraries.

/// One line of the report.
#[derive(Clone, Debug)]
pub struct Finding {
    /// What was looked for.
    pub what: String,
    /// What was found, or what to do.
    pub answer: String,
    /// Whether training can go on with it.
    pub fine: bool,
}

/// The driver, the GPUs, and which libraries open, in which version and from where, with what to
/// install where one is missing.
#[cfg(feature = "cuda")]
pub fn system() -> Vec<Finding> {
    use crate::libraries::{loaded_from, missing};
    let mut all = gpus();
    for (name, package, wheel, version) in LIBRARIES {
        // Opening a library to ask its version also maps its file.
        let version = version();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
        let answer = match &version {
            None if name == OPTIONAL => {
                format!(
                    "only several GPUs need it: {}",
                    missing(name, package, wheel)
                )
            }
            None => missing(name, package, wheel),
            Some(version) => {
                let file = loaded_from(name, &maps).map(|file| file.display().to_string());
                format!("{version}, {}", file.as_deref().unwrap_or("file unknown"))
            }
        };
        all.push(Finding {
            what: name.into(),
            answer,
            fine: version.is_some() || name == OPTIONAL,
        });
    }
    all
}

/// One GPU needs none.
#[cfg(feature = "cuda")]
const OPTIONAL: &str = "libnccl";

/// Name, NVIDIA's system package and wheel, and what tells its version if it can be opened.
#[cfg(feature = "cuda")]
type Library = (
    &'static str,
    &'static str,
    &'static str,
    fn() -> Option<String>,
);

#[cfg(feature = "cuda")]
const LIBRARIES: [Library; 4] = [
    ("libcublasLt", "libcublas-13-0", "nvidia-cublas", || {
        use cudarc::cublaslt::sys;
        // SAFETY: the library is asked for only if it can be opened.
        unsafe { sys::is_culib_present().then(|| dotted(sys::cublasLtGetVersion())) }
    }),
    ("libcudnn", "cudnn9-cuda-13", "nvidia-cudnn-cu13", || {
        use cudarc::cudnn::sys;
        // SAFETY: as above.
        unsafe { sys::is_culib_present().then(|| dotted(sys::cudnnGetVersion())) }
    }),
    ("libnvrtc", "cuda-nvrtc-13-0", "nvidia-cuda-nvrtc", || {
        use cudarc::nvrtc::sys;
        let (mut major, mut minor) = (0, 0);
        // SAFETY: as above; writes two integers.
        unsafe {
            sys::is_culib_present().then(|| sys::nvrtcVersion(&mut major, &mut minor))?;
        }
        Some(format!("{major}.{minor}"))
    }),
    (OPTIONAL, "libnccl2", "nvidia-nccl-cu13", || {
        use cudarc::nccl::sys;
        let mut version = 0;
        // SAFETY: as above; writes an integer.
        unsafe {
            sys::is_culib_present().then(|| sys::ncclGetVersion(&mut version))?;
        }
        Some(dotted(version as usize))
    }),
];

/// 91900 is 9.19.0: two digits each after the first part.
#[cfg(feature = "cuda")]
fn dotted(version: usize) -> String {
    format!(
        "{}.{}.{}",
        version / 10_000,
        version / 100 % 100,
        version % 100
    )
}

#[cfg(feature = "cuda")]
fn gpus() -> Vec<Finding> {
    use cudarc::driver::{result as driver, sys};
    let missing = |answer: String| {
        vec![Finding {
            what: "GPU".into(),
            answer,
            fine: false,
        }]
    };
    // SAFETY: only asks whether the library can be opened.
    if !unsafe { sys::is_culib_present() } {
        return missing("libcuda was not found: install NVIDIA's driver".into());
    }
    if let Err(error) = driver::init() {
        return missing(format!("the driver does not start: {error}"));
    }
    let count = driver::device::get_count().unwrap_or(0);
    if count == 0 {
        return missing("the driver sees no GPU".into());
    }
    let mut cuda = 0;
    // SAFETY: writes one integer.
    let known = unsafe { sys::cuDriverGetVersion(&mut cuda) }
        .result()
        .is_ok();
    let release = std::fs::read_to_string("/sys/module/nvidia/version").unwrap_or_default();
    let supports = format!("CUDA {}.{}", cuda / 1000, cuda % 1000 / 10);
    let driver = Finding {
        what: "driver".into(),
        answer: match release.trim() {
            "" => supports,
            release => format!("{release}, {supports}"),
        },
        fine: known,
    };
    let describe = |ordinal: i32| -> Result<String, driver::DriverError> {
        use sys::CUdevice_attribute::*;
        let device = driver::device::get(ordinal)?;
        let name = driver::device::get_name(device)?;
        // SAFETY: `device` is valid.
        let (bytes, major, minor) = unsafe {
            (
                driver::device::total_mem(device)?,
                driver::device::get_attribute(
                    device,
                    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                )?,
                driver::device::get_attribute(
                    device,
                    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
                )?,
            )
        };
        let gib = bytes as f64 / (1u64 << 30) as f64;
        Ok(format!(
            "{name}, compute capability {major}.{minor}, {gib:.1} GiB"
        ))
    };
    let gpus = (0..count).map(|ordinal| match describe(ordinal) {
        Ok(answer) => Finding {
            what: format!("GPU {ordinal}"),
            answer,
            fine: true,
        },
        Err(error) => Finding {
            what: format!("GPU {ordinal}"),
            answer: error.to_string(),
            fine: false,
        },
    });
    [driver].into_iter().chain(gpus).collect()
}

/// GPUs that the driver shows; 0 where there is no driver, or no support for GPUs in this program.
pub fn gpu_count() -> usize {
    let gpus = system();
    let gpus = gpus.iter().filter(|f| f.fine && f.what.starts_with("GPU"));
    gpus.count()
}

/// Says that this program was built without CUDA.
#[cfg(not(feature = "cuda"))]
pub fn system() -> Vec<Finding> {
    vec![Finding {
        what: "CUDA".into(),
        answer: "this program was built without the feature `cuda`".into(),
        fine: false,
    }]
}

/// The first GPU's name; `None` without one.
#[cfg(feature = "cuda")]
pub fn gpu_name() -> Option<String> {
    use cudarc::driver::{result as driver, sys};
    // SAFETY: only asks whether the library can be opened.
    if !unsafe { sys::is_culib_present() } {
        return None;
    }
    driver::init().ok()?;
    driver::device::get_name(driver::device::get(0).ok()?).ok()
}

/// There is none without CUDA.
#[cfg(not(feature = "cuda"))]
pub fn gpu_name() -> Option<String> {
    None
}

/// Bytes per second that the first GPU's memory moves at most; `None` if the driver does not tell.
#[cfg(feature = "cuda")]
pub fn bandwidth() -> Option<f64> {
    use cudarc::driver::{result as driver, sys};
    use sys::CUdevice_attribute::*;
    // SAFETY: only asks whether the library can be opened.
    if !unsafe { sys::is_culib_present() } {
        return None;
    }
    driver::init().ok()?;
    let device = driver::device::get(0).ok()?;
    // SAFETY: `device` is valid.
    let (kilohertz, bits) = unsafe {
        (
            driver::device::get_attribute(device, CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE).ok()?,
            driver::device::get_attribute(device, CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH)
                .ok()?,
        )
    };
    // Two transfers per clock.
    let rate = 2.0 * f64::from(kilohertz) * 1e3 * f64::from(bits) / 8.0;
    (rate > 0.0).then_some(rate)
}

/// Not known without CUDA.
#[cfg(not(feature = "cuda"))]
pub fn bandwidth() -> Option<f64> {
    None
}
