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

/// The driver, the GPUs, and which libraries open, with what to install where one is missing.
#[cfg(feature = "cuda")]
pub fn system() -> Vec<Finding> {
    let mut all = gpus();
    let library = |name: &str, present: bool, wheel: &str, version: Option<String>| Finding {
        what: name.into(),
        answer: match present {
            true => version.map_or("found".into(), |v| format!("version {v}")),
            false => format!(
                "not found: install CUDA's {name} or the wheel {wheel}, and put its folder on LD_LIBRARY_PATH"
            ),
        },
        fine: present,
    };
    use cudarc::{cublaslt, cudnn, nccl, nvrtc};
    // SAFETY: each call only asks whether a library can be opened.
    let [lt, dnn, rtc, ccl] = unsafe {
        [
            cublaslt::sys::is_culib_present(),
            cudnn::sys::is_culib_present(),
            nvrtc::sys::is_culib_present(),
            nccl::sys::is_culib_present(),
        ]
    };
    // SAFETY: no arguments; the libraries are present.
    let versions = unsafe {
        [
            lt.then(|| cublaslt::sys::cublasLtGetVersion().to_string()),
            dnn.then(|| cudnn::sys::cudnnGetVersion().to_string()),
        ]
    };
    let [lt_version, dnn_version] = versions;
    all.push(library("libcublasLt", lt, "nvidia-cublas", lt_version));
    all.push(library("libcudnn", dnn, "nvidia-cudnn-cu13", dnn_version));
    all.push(library("libnvrtc", rtc, "nvidia-cuda-nvrtc", None));
    // One GPU needs no NCCL.
    all.push(Finding {
        fine: true,
        ..library("libnccl", ccl, "nvidia-nccl-cu13", None)
    });
    all
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
    (0..count)
        .map(|ordinal| match describe(ordinal) {
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
        })
        .collect()
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
