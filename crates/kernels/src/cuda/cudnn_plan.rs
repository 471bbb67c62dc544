//! A graph of cuDNN's that was made ready, and its runs.

use std::ffi::c_void;

use cudarc::cudnn::{result as cudnn, sys};
use cudarc::driver::sys::CUstream;
use sys::cudnnBackendAttributeName_t as Attribute;
use sys::cudnnBackendAttributeType_t as Kind;
use sys::cudnnBackendDescriptorType_t as Type;

use super::cudnn::{Library, Node, Raw, check, create, finalize, set};
use super::profile;
use crate::work::Work;

/// Something that can run.
pub struct Plan {
    raw: Raw,
    bound: Vec<i64>,
    scalars: Vec<(i64, Box<f32>)>,
    /// Bytes of scratch memory that a run needs.
    pub workspace: usize,
    /// What a profile calls it.
    name: String,
    work: Option<Work>,
}

impl Plan {
    pub(super) fn new(
        raw: Raw,
        bound: &[Node],
        scalars: Vec<(i64, Box<f32>)>,
    ) -> Result<Self, String> {
        let (mut bytes, mut count) = (0i64, 0);
        // SAFETY: writes one i64.
        let status = unsafe {
            sys::cudnnBackendGetAttribute(
                raw,
                Attribute::CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE,
                Kind::CUDNN_TYPE_INT64,
                1,
                &mut count,
                (&raw mut bytes).cast(),
            )
        };
        check(status, "workspace")?;
        Ok(Self {
            raw,
            bound: bound.iter().map(|node| node.id).collect(),
            scalars,
            workspace: bytes.max(0) as usize,
            name: "cuDNN".into(),
            work: None,
        })
    }

    /// The same plan under a name, with what it does, for a profile.
    pub fn named(self, name: String, work: Option<Work>) -> Self {
        Self { name, work, ..self }
    }

    /// Issues the plan on `stream` with the bound tensors at `addresses`.
    pub fn run(
        &self,
        library: &Library,
        stream: CUstream,
        addresses: &[u64],
        workspace: u64,
    ) -> Result<(), String> {
        use Attribute::*;
        if addresses.len() != self.bound.len() {
            return Err("cuDNN: a tensor without an address".into());
        }
        let scalar_ids = self.scalars.iter().map(|(id, _)| *id);
        let ids: Vec<i64> = self.bound.iter().copied().chain(scalar_ids).collect();
        let scalars = self
            .scalars
            .iter()
            .map(|(_, value)| (&raw const **value).cast_mut().cast());
        let pointers: Vec<*mut c_void> = addresses
            .iter()
            .map(|&at| at as *mut c_void)
            .chain(scalars)
            .collect();
        let pack = create(Type::CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR)?;
        set(
            pack,
            CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS,
            Kind::CUDNN_TYPE_INT64,
            &ids,
        )?;
        set(
            pack,
            CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS,
            Kind::CUDNN_TYPE_VOID_PTR,
            &pointers,
        )?;
        let workspace = [workspace as *mut c_void];
        set(
            pack,
            CUDNN_ATTR_VARIANT_PACK_WORKSPACE,
            Kind::CUDNN_TYPE_VOID_PTR,
            &workspace,
        )?;
        finalize(pack, "arguments")?;
        let describe = || (self.name.clone(), self.work);
        let done = profile::timed(stream, describe, || {
            // SAFETY: the stream is live; the plan's tensors are at the addresses, which the caller
            // holds.
            let status = unsafe {
                cudnn::set_stream(library.handle, stream.cast())
                    .map_err(|e| format!("cuDNN: {e:?}"))?;
                sys::cudnnBackendExecute(library.handle, self.raw, pack)
            };
            check(status, "run")
        });
        // SAFETY: destroyed once, after use.
        let _ = unsafe { sys::cudnnBackendDestroyDescriptor(pack) };
        done
    }
}
