//! Our kernels: compiled by NVRTC for the present GPU, kept on disk, launched.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::hash::{DefaultHasher, Hash, Hasher};

use cudarc::driver::{result as driver, sys};
use cudarc::nvrtc::{result as nvrtc, sys as nvrtc_sys};

use super::profile;
use super::stream::{Arg, Context};
use crate::libraries::{self, cache_folder};
use crate::work::Work;

/// The sources of each program. NVRTC takes seconds for the products for Hopper, so they are programs of their own,
/// compiled side by side.
const PROGRAMS: [&str; 3] = [
    concat!(
        include_str!("source/common.cu"),
        include_str!("source/elementwise.cu"),
        include_str!("source/norm.cu"),
        include_str!("source/heads.cu"),
        include_str!("source/conv.cu"),
        include_str!("source/scan.cu"),
        include_str!("source/loss.cu"),
        include_str!("source/embedding.cu"),
        include_str!("source/attention_dq.cu"),
        include_str!("source/attention_merge.cu"),
        include_str!("source/optimizer.cu"),
    ),
    concat!(
        include_str!("source/common.cu"),
        include_str!("source/elementwise.cu"),
        include_str!("source/hopper.cu"),
        include_str!("source/hopper_backward.cu"),
        include_str!("source/hopper_gated.cu"),
    ),
    concat!(
        include_str!("source/common.cu"),
        include_str!("source/hopper.cu"),
        include_str!("source/hopper_scan.cu"),
    ),
];

/// The loaded functions, by context.
#[derive(Default)]
pub struct Kernels {
    modules: HashMap<usize, Loaded>,
}

struct Loaded {
    /// Of each program.
    modules: Vec<sys::CUmodule>,
    processors: u32,
    hopper: bool,
    functions: HashMap<&'static str, sys::CUfunction>,
}

impl Kernels {
    fn loaded(&mut self) -> Result<&mut Loaded, String> {
        let context = driver::ctx::get_current()
            .map_err(|e| format!("no CUDA context: {e}"))?
            .map_or(0, |c| c as usize);
        match self.modules.entry(context) {
            std::collections::hash_map::Entry::Occupied(found) => Ok(found.into_mut()),
            std::collections::hash_map::Entry::Vacant(free) => Ok(free.insert(load()?)),
        }
    }
}

impl Loaded {
    /// Kernel `name` of whichever program has it.
    fn function(&self, name: &str) -> Result<sys::CUfunction, String> {
        let symbol = CString::new(name).map_err(|e| e.to_string())?;
        let mut found = Err("there are no programs".to_string());
        for &module in &self.modules {
            // SAFETY: the module is loaded and never unloaded.
            found = unsafe { driver::module::get_function(module, symbol.clone()) }
                .map_err(|e| format!("kernel {name}: {e}"));
            if found.is_ok() {
                break;
            }
        }
        found
    }
}

/// The attribute of the current device.
fn attribute(which: sys::CUdevice_attribute) -> Result<i32, String> {
    let mut device = 0;
    // SAFETY: writes one integer; a context is current.
    unsafe { sys::cuCtxGetDevice(&mut device) }
        .result()
        .map_err(|e| format!("no current CUDA device: {e}"))?;
    // SAFETY: `device` is valid.
    unsafe { driver::device::get_attribute(device, which) }
        .map_err(|e| format!("cuDeviceGetAttribute failed: {e}"))
}

/// `sm_90a`, `sm_80`, ...: the suffix opens the instructions of exactly this chip.
fn architecture() -> Result<String, String> {
    use sys::CUdevice_attribute::*;
    let major = attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    let suffix = if major >= 9 { "a" } else { "" };
    Ok(format!("sm_{major}{minor}{suffix}"))
}

fn load() -> Result<Loaded, String> {
    let architecture = architecture()?;
    let mut modules = vec![];
    for image in cubins(&architecture)? {
        // SAFETY: a complete cubin, from NVRTC or from the cache that this program wrote.
        let module = unsafe { driver::module::load_data(image.as_ptr().cast()) }
            .map_err(|e| format!("the compiled kernels do not load: {e}"))?;
        modules.push(module);
    }
    let processors = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
    Ok(Loaded {
        modules,
        processors: processors.max(1) as u32,
        hopper: architecture == "sm_90a",
        functions: HashMap::new(),
    })
}

/// All programs for `architecture`.
fn cubins(architecture: &str) -> Result<Vec<Vec<u8>>, String> {
    std::thread::scope(|scope| {
        let compile = |source| scope.spawn(move || cubin(source, architecture));
        let threads: Vec<_> = PROGRAMS.map(compile).into_iter().collect();
        let done = threads.into_iter().map(|thread| {
            let ended = thread.join();
            ended.map_err(|_| "a thread that compiled kernels panicked".to_string())?
        });
        done.collect()
    })
}

/// `source` compiled for `architecture`, from the cache if it is there.
///
/// # Errors
/// If NVRTC refuses the source: its log.
fn cubin(source: &str, architecture: &str) -> Result<Vec<u8>, String> {
    let mut hash = DefaultHasher::new();
    (source, architecture, env!("CARGO_PKG_VERSION")).hash(&mut hash);
    let name = format!("kernels-{architecture}-{:016x}.cubin", hash.finish());
    let path = cache_folder().map(|folder| folder.join(name));
    if let Some(found) = path.as_ref().and_then(|p| std::fs::read(p).ok()) {
        // An ELF image; anything else is a damaged file and is written anew.
        if found.starts_with(b"\x7fELF") {
            return Ok(found);
        }
    }
    let image = compile(source, architecture)?;
    if let Some(path) = path {
        // The cache saves time only: a folder that cannot be written costs seconds at start.
        let _ = keep(&path, &image);
    }
    Ok(image)
}

/// Written beside and renamed, so that no process reads half a file.
fn keep(path: &std::path::Path, image: &[u8]) -> std::io::Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let part = path.with_extension(format!("{}.part", std::process::id()));
    std::fs::write(&part, image)?;
    std::fs::rename(part, path)
}

/// NVRTC's cubin of `source`.
///
/// # Errors
/// If the library is missing or refuses the source.
fn compile(source: &str, architecture: &str) -> Result<Vec<u8>, String> {
    // SAFETY: only asks whether the library can be opened.
    if !unsafe { nvrtc_sys::is_culib_present() } {
        let (package, wheel) = ("cuda-nvrtc-13-0", "nvidia-cuda-nvrtc");
        return Err(libraries::missing("libnvrtc", package, wheel));
    }
    let code = CString::new(source).map_err(|e| e.to_string())?;
    let program = nvrtc::create_program(&code, Some(c"ttt.cu")).map_err(|e| format!("{e:?}"))?;
    let options = [
        format!("--gpu-architecture={architecture}"),
        "--std=c++17".to_string(),
    ];
    // SAFETY: `program` lives until it is destroyed below.
    let done = unsafe { nvrtc::compile_program(program, &options) };
    if let Err(error) = done {
        // SAFETY: as above.
        let log = unsafe { nvrtc::get_program_log(program) }.unwrap_or_default();
        let log: String = log.iter().map(|&c| c as u8 as char).collect();
        return Err(format!("NVRTC ({architecture}): {error:?}\n{log}"));
    }
    let mut size = 0;
    // SAFETY: writes one integer.
    unsafe { nvrtc_sys::nvrtcGetCUBINSize(program, &mut size) }
        .result()
        .map_err(|e| format!("{e:?}"))?;
    let mut image = vec![0u8; size];
    // SAFETY: the image has the size that NVRTC asked for.
    unsafe { nvrtc_sys::nvrtcGetCUBIN(program, image.as_mut_ptr().cast()) }
        .result()
        .map_err(|e| format!("{e:?}"))?;
    // SAFETY: destroyed once, not used again. A failure leaks a little host memory.
    let _ = unsafe { nvrtc::destroy_program(program) };
    Ok(image)
}

/// The bytes of all buffers among `args`, as if each were read or written once; `None` if one points
/// into the middle of a buffer, of which it then uses an unknown part.
fn touched(extents: &[(u64, u64)], args: &[Arg]) -> Option<Work> {
    let mut bytes = 0;
    for arg in args {
        match arg {
            Arg::Ptr(0) => {}
            Arg::Ptr(at) => bytes += extents.iter().find(|(from, _)| from == at)?.1,
            _ => {}
        }
    }
    Some(Work::Bytes(bytes as f64))
}

impl Context<'_> {
    /// Writes zeros over `bytes`.
    pub fn zero(&mut self, at: u64, bytes: usize) -> Result<(), String> {
        let work = Work::Bytes(bytes as f64);
        profile::timed(
            self.stream,
            || ("zero".into(), Some(work)),
            || {
                // SAFETY: the range lies in a buffer that the caller holds.
                unsafe { driver::memset_d8_async(at, 0, bytes, self.stream) }
                    .map_err(|e| format!("clearing {bytes} bytes: {e}"))
            },
        )
    }

    /// Copies `bytes` on the device.
    pub fn copy(&mut self, to: u64, from: u64, bytes: usize) -> Result<(), String> {
        let work = Work::Bytes(2.0 * bytes as f64);
        profile::timed(
            self.stream,
            || ("copy".into(), Some(work)),
            || {
                // SAFETY: both ranges lie in buffers that the caller holds.
                unsafe { driver::memcpy_dtod_async(to, from, bytes, self.stream) }
                    .map_err(|e| format!("copying {bytes} bytes: {e}"))
            },
        )
    }

    /// Multiprocessors of the GPU.
    pub fn processors(&mut self) -> Result<u32, String> {
        Ok(self.kernels.loaded()?.processors)
    }

    /// Whether the kernels for Hopper are there (`source/hopper_*.cu`).
    pub fn is_hopper(&mut self) -> bool {
        self.kernels.loaded().is_ok_and(|loaded| loaded.hopper)
    }

    /// Says what the next launch does, for a profile: by itself that counts the bytes of the tensors
    /// that a kernel is given.
    pub fn doing(&mut self, work: Work) -> &mut Self {
        self.work = Some(work);
        self
    }

    /// Launches kernel `name` over `grid` blocks of `threads`.
    pub fn launch(
        &mut self,
        name: &'static str,
        grid: (u32, u32, u32),
        threads: u32,
        args: &[Arg],
    ) -> Result<(), String> {
        self.launch_shared(name, grid, threads, 0, args)
    }

    /// [`Context::launch`] with `shared` bytes of dynamic shared memory.
    pub fn launch_shared(
        &mut self,
        name: &'static str,
        grid: (u32, u32, u32),
        threads: u32,
        shared: u32,
        args: &[Arg],
    ) -> Result<(), String> {
        let loaded = self.kernels.loaded()?;
        let function = match loaded.functions.get(name) {
            Some(&found) => found,
            None => {
                let found = loaded.function(name)?;
                if shared > 48 << 10 {
                    use sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as MOST;
                    // SAFETY: the function is of a loaded module.
                    unsafe { driver::function::set_function_attribute(found, MOST, shared as i32) }
                        .map_err(|e| {
                            format!("kernel {name}, {shared} bytes of shared memory: {e}")
                        })?;
                }
                loaded.functions.insert(name, found);
                found
            }
        };
        let mut pointers: Vec<*mut c_void> = args
            .iter()
            .map(|arg| match arg {
                Arg::Ptr(v) | Arg::Size(v) => (v as *const u64).cast_mut().cast(),
                Arg::Int(v) => (v as *const i32).cast_mut().cast(),
                Arg::Bits(v) => (v as *const u32).cast_mut().cast(),
                Arg::Float(v) => (v as *const f32).cast_mut().cast(),
                Arg::Parts(v) => (v as *const [u64; 26]).cast_mut().cast(),
                Arg::Floats(v) => (v as *const [f32; 7]).cast_mut().cast(),
                Arg::Map(v) => (v as *const [u64; 16]).cast_mut().cast(),
                Arg::Chains(v) => (v as *const [u32; 32]).cast_mut().cast(),
            })
            .collect();
        let (stream, told, extents) = (self.stream, self.work.take(), &self.extents);
        profile::timed(
            stream,
            || (name.into(), told.or_else(|| touched(extents, args))),
            || {
                // SAFETY: the caller passes the arguments of the kernel's declaration; their memory is
                // held by the buffers of `on_stream`.
                unsafe {
                    driver::launch_kernel(
                        function,
                        grid,
                        (threads, 1, 1),
                        shared,
                        stream,
                        &mut pointers,
                    )
                }
                .map_err(|e| format!("launch of {name}: {e}"))
            },
        )
    }

    /// Launches an element-wise kernel: enough blocks of 256 to fill the GPU, at most one thread per
    /// item.
    pub fn launch_over(
        &mut self,
        name: &'static str,
        items: u64,
        args: &[Arg],
    ) -> Result<(), String> {
        let most = u64::from(self.processors()?) * 16;
        let blocks = items.div_ceil(256).clamp(1, most) as u32;
        self.launch(name, (blocks, 1, 1), 256, args)
    }
}
